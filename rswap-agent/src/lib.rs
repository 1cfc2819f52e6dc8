//! rswap's agent: kernel events -> profile -> forecast -> plan -> swap -> status.
//!
//! Each room exports one noun and takes the noun of the room before it; only the wiring in
//! [`agent`] sees them all. Rooms that decide ([`forecast`], [`plan`]) do no I/O and have no clock.

pub mod agent;
pub mod cli;
pub mod config;
pub mod control;
pub mod forecast;
pub mod instance;
pub mod migrate;
pub mod plan;
pub mod pool;
pub mod profile;
pub mod status;
pub mod swap;
pub mod sys;
pub mod tracee;
pub mod units;
pub mod volume;
