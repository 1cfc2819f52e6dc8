//! Mergeable log-linear histograms (relative error at most 1/16).

use serde::{Deserialize, Serialize};

/// Counts per log-linear bucket, with the exact number and sum of the samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// (bucket index, count), ascending, only buckets with samples.
    pub buckets: Vec<(u16, u64)>,
    /// Number of samples.
    pub count: u64,
    /// Sum of the samples' bucket values, in the histogram's unit.
    pub sum: u64,
}
