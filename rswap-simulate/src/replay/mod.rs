//! Demand on pools, in virtual time: what each policy would have done, and what it would have cost.
//!
//! ```text
//!   per window:  moves end -> demand -> what pools give -> money, energy, violations -> policy -> moves begin
//! ```
//!
//! `act` is the production forecast and the production planner, given what an agent would see: what was used, not what was wanted.
//! `static` leaves everything where it was put at first, `reactive` follows thresholds, and `oracle` is what the demand would have cost
//! if at every moment it were spread over the cheapest pools that can carry it, for nothing: no policy can cost less without
//! violations.
//!
//! A pool that has too little gives to all in proportion. A move takes what the planner's price says, begins after a window, and may
//! fail at its end; meanwhile the instance runs at its source, and the target is paid for as well. A move that takes less than half a
//! window counts as done when the window begins.

mod act;
mod chart;
mod outcome;
mod page;
mod reactive;
mod run;
mod scenario;

pub use act::Act;
pub use chart::{Focus, Forecast, MoveMark};
pub use outcome::{Report, Row, Timeline};
pub use reactive::Reactive;
pub use run::{Placement, Policy, Start, View, forecast_for, plan_for, simulate};
pub use scenario::{MoveModel, Scenario, ScenarioError, Shape, SimPool, Workload};

#[cfg(test)]
mod tests;
