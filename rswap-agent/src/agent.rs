//! The wiring: it connects the rooms and decides nothing.
