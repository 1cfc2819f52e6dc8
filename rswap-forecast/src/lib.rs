//! What instances used, window by window -> [`Demand`]. Pure: no I/O, no clock.
//!
//! Online: one update per instance and window, in constant memory. Amounts are seen on a scale that is linear near 0 and
//! logarithmic far from it ([`series`]). For each lead, experts give quantiles: a regression on smoothed values and the time of
//! the day ([`regression`]), with its own past errors; spreads that are steered by errors ([`steered`]) around it, around the last
//! windows and around what is usual at that time of the day; changes and values that followed on similar moments ([`analogs`]); a fading histogram and the day's habit ([`habit`]); a found season, repeated
//! ([`season`]). They are mixed for each quantile by what mixing would have gained ([`mixture`]), and a conformal step then moves
//! each quantile until it is exceeded as often as it says ([`lead`]). Where the level has changed ([`level`]), what came before
//! counts less. What a series has learnt can be handed to new ones of its kind, by name, class and likeness ([`priors`]). Nothing
//! is believed before enough forecasts of a lead have met their outcome.

#![allow(
    clippy::needless_range_loop,
    reason = "experts, quantiles and features run in step over several arrays of one length"
)]

mod amounts;
mod analogs;
mod config;
mod forecaster;
mod habit;
mod history;
mod lead;
mod level;
mod mixture;
mod moments;
mod numeric;
mod part;
mod prior;
mod priors;
mod profile;
mod regression;
mod resource;
mod season;
mod series;
mod state;
mod steered;
mod unused;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use config::ForecastConfig;
pub use forecaster::{Forecaster, Kin, Observation};
pub use moments::Moments;
pub use part::Part;
pub use prior::{Prior, PriorError};
pub use priors::Priors;
pub use resource::{Resource, Usage};
pub use series::Series;
pub use state::{Lessons, StateError};

use rswap_types::{InstanceName, UnixMillis};

/// Forecast quantiles, in the resource's unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Quantiles {
    /// Exceeded in 50 % of windows.
    pub p50: f64,
    /// Exceeded in 10 % of windows.
    pub p90: f64,
    /// Exceeded in 5 % of windows.
    pub p95: f64,
    /// Exceeded in 1 % of windows.
    pub p99: f64,
}

/// Which of the [`Quantiles`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Quantile {
    /// Exceeded in 50 % of windows.
    P50,
    /// Exceeded in 10 % of windows.
    P90,
    /// Exceeded in 5 % of windows.
    P95,
    /// Exceeded in 1 % of windows.
    P99,
}

impl Quantiles {
    /// The one that is asked for.
    pub fn at(&self, quantile: Quantile) -> f64 {
        match quantile {
            Quantile::P50 => self.p50,
            Quantile::P90 => self.p90,
            Quantile::P95 => self.p95,
            Quantile::P99 => self.p99,
        }
    }
}

/// What one instance will need of one resource, at one horizon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DemandPoint {
    /// Of what.
    pub resource: Resource,
    /// How far ahead, in milliseconds.
    pub horizon_ms: u64,
    /// How much.
    pub need: Quantiles,
    /// Whether the forecast has seen enough to be believed.
    pub evidence: Evidence,
}

/// How much a forecast rests on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Evidence {
    /// Fewer outcomes seen than needed to be calibrated: plans must not rest on it.
    TooLittle {
        /// Forecasts of this horizon whose outcome is known.
        seen: u64,
        /// How many are needed.
        needed: u64,
    },
    /// Calibrated.
    Enough {
        /// Forecasts of this horizon whose outcome is known.
        seen: u64,
        /// Share of those outcomes at or under their p95: 0.95 is perfect.
        p95_coverage: f64,
    },
}

/// The forecast need of one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Demand {
    /// Whose.
    pub instance: InstanceName,
    /// When the forecast was made.
    pub at: UnixMillis,
    /// Per resource and horizon.
    pub points: Vec<DemandPoint>,
}

#[cfg(test)]
mod level_tests;
#[cfg(test)]
mod part_tests;
#[cfg(test)]
mod prior_tests;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;
