//! Instances window by window, for plots.

use serde::{Deserialize, Serialize};

/// One instance, window by window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Focus {
    /// Whose.
    pub instance: String,
    /// Numbers of the windows.
    pub windows: Vec<usize>,
    /// Demand, in reference cores.
    pub demand: Vec<f32>,
    /// What it got, in reference cores.
    pub used: Vec<f32>,
    /// Number of the pool that it sat on.
    pub pool: Vec<usize>,
    /// What was forecast for the next window.
    pub forecast: Vec<Option<Forecast>>,
    /// Its moves.
    pub moves: Vec<MoveMark>,
}

/// Quantiles, in reference cores.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Exceeded in 50 % of windows.
    pub p50: f32,
    /// Exceeded in 5 % of windows.
    pub p95: f32,
    /// Exceeded in 1 % of windows.
    pub p99: f32,
}

/// A move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveMark {
    /// Window at whose end it began.
    pub window: usize,
    /// Number of the pool that it went to.
    pub to: usize,
    /// Whether its need forced it.
    pub forced: bool,
    /// How it ended; `None` while it is under way.
    pub done: Option<bool>,
}
