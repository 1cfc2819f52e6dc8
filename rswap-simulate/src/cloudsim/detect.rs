//! When a host counts as overloaded: the four rules of the literature.

use super::center::HISTORY;

/// Samples below which the rules that need a history fall back to a fixed threshold.
const ENOUGH: usize = 12;
/// That threshold.
const FALLBACK: f64 = 0.7;
/// Samples of a local regression.
const REGRESSION: usize = 10;

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Detector {
    /// A fixed share of the host's speed.
    Threshold(f64),
    /// 1 - this x the interquartile range.
    InterquartileRange(f64),
    /// 1 - this x the median absolute deviation.
    MedianDeviation(f64),
    /// This x the utilization that a regression over ten samples expects after a migration reaches 1.
    LocalRegression(f64),
}

/// What a rule looks at: of one host, with the machines that it has or would have.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Load {
    /// Demand / speed.
    pub(super) utilization: f64,
    /// Demand / speed at the last ticks, newest first.
    pub(super) history: [f64; HISTORY],
    /// Memory of its largest machine, in MiB.
    pub(super) largest_mib: f64,
}

impl Detector {
    pub(super) fn is_overloaded(self, load: &Load) -> bool {
        let seen = load.history.iter().rposition(|&share| share != 0.0).map_or(0, |last| last + 1);
        let history = &load.history[..seen];
        let threshold = match self {
            Self::Threshold(share) => share,
            _ if seen < ENOUGH && !matches!(self, Self::LocalRegression(_)) => FALLBACK,
            Self::InterquartileRange(safety) => 1.0 - safety * interquartile_range(history),
            Self::MedianDeviation(safety) => 1.0 - safety * median_deviation(history),
            Self::LocalRegression(_) if seen < REGRESSION => FALLBACK,
            Self::LocalRegression(safety) => {
                let intervals = (load.largest_mib / super::MIGRATION_MIB_PER_S / super::INTERVAL_S).ceil();
                return safety * extrapolated(&history[..REGRESSION], intervals) >= 1.0;
            }
        };
        load.utilization > threshold
    }
}

fn interquartile_range(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    let at = |quarters: f64| (quarters * 0.25 * (values.len() + 1) as f64).round() as usize - 1;
    values[at(3.0)] - values[at(1.0)]
}

fn median_deviation(values: &[f64]) -> f64 {
    let middle = median(values.to_vec());
    median(values.iter().map(|value| (middle - value).abs()).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[half - 1] + values[half]) / 2.0 } else { values[half] }
}

/// A straight line through the samples (newest first), `intervals` after the newest.
///
/// The original means to weight them by a tricube; since none of its weights is 0, it uses none.
fn extrapolated(newest_first: &[f64], intervals: f64) -> f64 {
    let n = newest_first.len() as f64;
    let mean_x = (n + 1.0) / 2.0;
    let mean_y = newest_first.iter().sum::<f64>() / n;
    let (mut sxy, mut sxx) = (0.0, 0.0);
    for (number, y) in newest_first.iter().rev().enumerate() {
        let x = number as f64 + 1.0 - mean_x;
        sxy += x * (y - mean_y);
        sxx += x * x;
    }
    mean_y + sxy / sxx * (n + intervals - mean_x)
}
