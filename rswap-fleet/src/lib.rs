//! What the agents of a fleet report -> what the fleet knows -> orders. Pure: no I/O, no clock.
//!
//! ```text
//! Report ([`report`]) -> is it new? ([`sequence`]) -> history ([`amounts`])
//!                     -> who is where ([`inventory`]) -> plan ([`plan`]), maintenance ([`maintenance`]) -> Order ([`orders`])
//!        lessons      -> what the others of a kind taught ([`model`])
//! ```
//!
//! The plan of a fleet is that of a host, with hosts as the only pools: the same planner decides both. An order has a token and a
//! deadline; what came twice, too late or after a newer one does nothing, which the agent decides by itself ([`orders::Ledger`]).

pub mod amounts;
pub mod inventory;
pub mod maintenance;
pub mod model;
mod name;
pub mod orders;
mod placements;
pub mod plan;
pub mod report;
pub mod sequence;

pub use inventory::Inventory;
pub use maintenance::Roll;
pub use model::Model;
pub use name::{HostName, HostNameError};
pub use orders::{Action, Order, OrderOutcome, Token};
pub use report::{InstanceReport, LinkMeasured, Report, Running};

#[cfg(test)]
mod tests;
