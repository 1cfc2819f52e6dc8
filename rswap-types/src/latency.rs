//! How long a request to a storage pool takes, by the load at which it is made.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What requests take at one load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LatencyPoint {
    /// The load: requests per second of everybody, on the pool's disks.
    pub operations_per_s: f64,
    /// Half of the requests take no longer, in microseconds.
    pub p50_us: f64,
    /// 99 % of the requests take no longer, in microseconds.
    pub p99_us: f64,
    /// How many requests of instances this rests on, older ones counted in part. 0: only what was calibrated is known.
    pub requests: f64,
}

impl LatencyPoint {
    /// Whether requests of instances say it, and not calibration alone.
    pub fn is_experienced(&self) -> bool {
        self.requests >= 1.0
    }
}

/// What requests take at any load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LatencyCurve {
    /// What a request takes on the host's fastest storage without load, in microseconds.
    pub reference_us: f64,
    /// By load, ascending.
    pub points: Vec<LatencyPoint>,
}

impl LatencyCurve {
    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// What requests take at this load: on the line between the logarithms of two points, and outside of all points as at the nearest.
    pub fn at(&self, operations_per_s: f64) -> Option<LatencyPoint> {
        let after = self.points.partition_point(|point| point.operations_per_s <= operations_per_s);
        let (before, after) = (after.checked_sub(1).and_then(|n| self.points.get(n)), self.points.get(after));
        let known = match (before, after) {
            (Some(before), Some(after)) => between(before, after, operations_per_s),
            (Some(only), None) | (None, Some(only)) => *only,
            (None, None) => return None,
        };
        Some(LatencyPoint { operations_per_s, ..known })
    }

    /// The speed of a request at this load, relative to the host's fastest storage without load.
    pub fn speed_at(&self, operations_per_s: f64) -> Option<f64> {
        let point = self.at(operations_per_s)?;
        (self.reference_us > 0.0).then(|| self.reference_us / point.p50_us.max(1e-3))
    }
}

fn between(before: &LatencyPoint, after: &LatencyPoint, operations_per_s: f64) -> LatencyPoint {
    let ln = |amount: f64| amount.max(1e-3).ln();
    let (low, high) = (ln(before.operations_per_s), ln(after.operations_per_s));
    let share = if high > low { ((ln(operations_per_s) - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 };
    let line = |from: f64, to: f64| (ln(from) + (ln(to) - ln(from)) * share).exp();
    LatencyPoint {
        operations_per_s,
        p50_us: line(before.p50_us, after.p50_us),
        p99_us: line(before.p99_us, after.p99_us),
        requests: before.requests + (after.requests - before.requests) * share,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_two_loads_latency_is_on_the_line_of_the_logarithms() {
        let point = |operations_per_s, p50_us| LatencyPoint {
            operations_per_s,
            p50_us,
            p99_us: p50_us * 3.0,
            requests: 10.0,
        };
        let curve =
            LatencyCurve { reference_us: 50.0, points: vec![point(10.0, 100.0), point(1000.0, 900.0)] };
        let near = |load: f64, us: f64| {
            let found = curve.at(load).unwrap();
            assert!(
                (found.p50_us - us).abs() < 1e-6 && found.operations_per_s == load,
                "{found:?} at {load}"
            );
        };
        near(100.0, 300.0);
        near(1.0, 100.0);
        near(0.0, 100.0);
        near(1e6, 900.0);
        assert!((curve.speed_at(10.0).unwrap() - 0.5).abs() < 1e-9);
        assert_eq!(LatencyCurve::default().at(5.0), None);
        assert_eq!(LatencyCurve::default().speed_at(5.0), None);
    }
}
