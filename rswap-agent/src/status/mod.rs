//! Read-only HTTP on loopback, and metrics.
