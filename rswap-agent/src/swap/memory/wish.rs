//! What is to become of an instance's pages that are, or could be, in swap.

use std::collections::VecDeque;

use crate::forecast::{Demand, Evidence, Resource};

/// What was used in so many windows counts as used of late.
const WINDOWS: usize = 5;
/// A need that is so many times what was used of late is a rise ...
const RISE: f64 = 1.5;
/// ... if it is more by so many reference cores as well: what does next to nothing rises for any reason.
const RISE_CORES: f64 = 0.05;
/// What comes back per second at least, in bytes: a fifth of what zram was measured with.
const BACK_BYTES_PER_S: f64 = 1e8;

/// What the agent does about an instance on a swap pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// What is cold goes.
    #[default]
    Out,
    /// Nothing is moved.
    Hold {
        /// For people.
        reason: String,
    },
    /// What has gone comes back.
    Back {
        /// For people.
        reason: String,
    },
}

/// What an instance used in the last windows, in reference cores.
#[derive(Clone, Debug, Default)]
pub struct Lately(VecDeque<f64>);

impl Lately {
    /// Takes in one window.
    pub fn note(&mut self, cores: f64) {
        self.0.truncate(WINDOWS - 1);
        self.0.push_front(cores);
    }

    fn most(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }
}

/// Brings pages back before the instance gets more to do: when it is more likely than not that it will, as soon as that is no further
/// ahead than bringing back so many bytes takes (or than the shortest horizon, if that is further).
///
/// The need for CPU tells, since whoever does more uses more of its memory. That for memory does not: what is in swap is not counted in it.
pub fn wish(lately: &Lately, demand: &Demand, swapped_bytes: u64) -> Wish {
    let points = || {
        let calibrated = |evidence: &Evidence| matches!(evidence, Evidence::Enough { .. });
        demand
            .points
            .iter()
            .filter(move |point| point.resource == Resource::Cpu && calibrated(&point.evidence))
    };
    let takes_ms = (swapped_bytes as f64 / BACK_BYTES_PER_S * 1e3) as u64;
    let shortest = points().map(|point| point.horizon_ms).min().unwrap_or_default();
    let ahead = points().filter(|point| point.horizon_ms <= takes_ms.max(shortest));
    let most = lately.most();
    let rises = |need: f64| need > most * RISE && need > most + RISE_CORES;
    match ahead.filter(|point| rises(point.need.p50)).min_by_key(|point| point.horizon_ms) {
        Some(point) if swapped_bytes > 0 => {
            let (ahead_s, need) = (point.horizon_ms as f64 / 1e3, point.need.p50);
            let reason =
                format!("in {ahead_s} s it will use {need:.2} cores by the forecast, and {most:.2} of late");
            Wish::Back { reason }
        }
        _ => Wish::Out,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        forecast::{DemandPoint, Quantiles},
        units::UnixMillis,
    };

    const ENOUGH: Evidence = Evidence::Enough { seen: 100, p95_coverage: 0.95 };

    fn demand(points: &[(Resource, u64, f64, Evidence)]) -> Demand {
        let points = points.iter().map(|&(resource, horizon_ms, p50, evidence)| DemandPoint {
            resource,
            horizon_ms,
            need: Quantiles { p50, p90: 9.0, p95: 9.0, p99: 9.0 },
            evidence,
        });
        Demand { instance: "a".parse().unwrap(), at: UnixMillis(0), points: points.collect() }
    }

    fn lately(cores: &[f64]) -> Lately {
        let mut lately = Lately::default();
        cores.iter().for_each(|cores| lately.note(*cores));
        lately
    }

    fn is_back(lately: &Lately, points: &[(Resource, u64, f64, Evidence)], swapped: u64) -> bool {
        matches!(wish(lately, &demand(points), swapped), Wish::Back { .. })
    }

    #[test]
    fn a_rise_brings_pages_back_and_a_quiet_forecast_does_not() {
        let quiet = lately(&[0.1, 0.12, 0.1]);
        assert!(is_back(&quiet, &[(Resource::Cpu, 5000, 0.5, ENOUGH)], 1 << 20));
        assert!(!is_back(&quiet, &[(Resource::Cpu, 5000, 0.15, ENOUGH)], 1 << 20));
        assert!(!is_back(&quiet, &[(Resource::Cpu, 5000, 0.5, ENOUGH)], 0), "nothing is in swap");
        assert!(!is_back(&quiet, &[(Resource::Memory, 5000, 0.5, ENOUGH)], 1 << 20));
        assert!(!is_back(
            &quiet,
            &[(Resource::Cpu, 5000, 0.5, Evidence::TooLittle { seen: 1, needed: 30 })],
            1 << 20
        ));
        // Once it has come, it is no rise any more, and it is forgotten after a while.
        assert!(!is_back(&lately(&[0.1, 0.5, 0.1]), &[(Resource::Cpu, 5000, 0.5, ENOUGH)], 1 << 20));
        assert!(is_back(
            &lately(&[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]),
            &[(Resource::Cpu, 5000, 0.5, ENOUGH)],
            1 << 20
        ));
    }

    #[test]
    fn what_does_next_to_nothing_does_not_rise() {
        assert!(!is_back(&lately(&[0.001]), &[(Resource::Cpu, 5000, 0.04, ENOUGH)], 1 << 20));
    }

    #[test]
    fn a_rise_is_awaited_as_far_ahead_as_bringing_back_takes() {
        let quiet = lately(&[0.1]);
        let points = [(Resource::Cpu, 5000, 0.1, ENOUGH), (Resource::Cpu, 60_000, 0.5, ENOUGH)];
        assert!(!is_back(&quiet, &points, 1 << 30), "ten seconds would do");
        assert!(is_back(&quiet, &points, 8 << 30));
        let Wish::Back { reason } = wish(&quiet, &demand(&points), 8 << 30) else {
            unreachable!("see above")
        };
        assert_eq!(reason, "in 60 s it will use 0.50 cores by the forecast, and 0.10 of late");
    }
}
