//! rswap's agent: kernel events -> profile -> forecast -> plan -> swap -> status.
//!
//! Each room exports one noun and takes the noun of the room before it; only the wiring in
//! [`agent`] sees them all. Rooms that decide ([`forecast`], [`plan`]) are crates of their own, with no I/O and no clock.

pub mod agent;
pub mod cli;
pub mod config;
pub mod control;
pub mod instance;
mod kept_files;
pub mod migrate;
pub mod pool;
pub mod privilege;
pub mod profile;
pub mod status;
pub mod swap;
pub mod sys;
pub mod tracee;
pub mod volume;

pub use rswap_forecast as forecast;
pub use rswap_plan as plan;

/// Quantities that cross rooms, with their units in their names.
pub mod units {
    pub use rswap_types::UnixMillis;
}
