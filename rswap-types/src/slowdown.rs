//! How much longer work takes on a set of cores for waiting until others leave one, by the load.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What work takes at one load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SlowdownPoint {
    /// The load: share of the pool's cores that instances use, or that others take from them.
    pub load: f64,
    /// How many times as long work takes as it would on a core of its own, at the median: 1 is undisturbed.
    pub times: f64,
    /// How long instances ran or waited there for this to be known, in seconds, older times counted in part. 0: nothing is known
    /// but that a core of one's own disturbs nobody.
    pub seconds: f64,
}

impl SlowdownPoint {
    /// Whether instances have experienced it.
    pub fn is_experienced(&self) -> bool {
        self.seconds >= 0.01
    }
}

/// How much longer work takes at any load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SlowdownCurve {
    /// By load, ascending.
    pub points: Vec<SlowdownPoint>,
}

impl SlowdownCurve {
    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// How much longer work takes at this load: on the line between the logarithms of two points, and outside of all points as at
    /// the nearest.
    pub fn at(&self, load: f64) -> Option<SlowdownPoint> {
        let after = self.points.partition_point(|point| point.load <= load);
        let (before, after) = (after.checked_sub(1).and_then(|n| self.points.get(n)), self.points.get(after));
        let known = match (before, after) {
            (Some(before), Some(after)) => between(before, after, load),
            (Some(only), None) | (None, Some(only)) => *only,
            (None, None) => return None,
        };
        Some(SlowdownPoint { load, ..known })
    }
}

fn between(before: &SlowdownPoint, after: &SlowdownPoint, load: f64) -> SlowdownPoint {
    let ln = |amount: f64| amount.max(1e-6).ln();
    let (low, high) = (ln(before.load), ln(after.load));
    let share = if high > low { ((ln(load) - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 };
    SlowdownPoint {
        load,
        times: (ln(before.times) + (ln(after.times) - ln(before.times)) * share).exp(),
        seconds: before.seconds + (after.seconds - before.seconds) * share,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_two_loads_it_is_on_the_line_of_the_logarithms() {
        let point = |load, times, seconds| SlowdownPoint { load, times, seconds };
        let curve = SlowdownCurve { points: vec![point(0.25, 1.0, 4.0), point(1.0, 4.0, 2.0)] };
        for (load, times, seconds) in
            [(0.5, 2.0, 3.0), (0.1, 1.0, 4.0), (0.0, 1.0, 4.0), (1.0, 4.0, 2.0), (9.0, 4.0, 2.0)]
        {
            let found = curve.at(load).unwrap();
            assert!(
                (found.times - times).abs() < 1e-9 && (found.seconds - seconds).abs() < 1e-9,
                "{found:?} at {load}"
            );
            assert_eq!(found.load, load);
        }
        assert_eq!(SlowdownCurve::default().at(0.5), None);
    }
}
