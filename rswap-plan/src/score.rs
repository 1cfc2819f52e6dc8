//! The Resource Optimization Score.
//!
//! ROS = (predicted demand x current cost) - (current performance x optimization weight), in **money per hour**; lower
//! is better. The two products get the same unit like this (`docs/score.md` has the derivation):
//!
//! - predicted demand x current cost: cores of the pool x money per core and hour + GiB x money per GiB and hour.
//!   Demand is forecast in reference cores; a pool of performance `p` needs `1/p` of its cores for each.
//! - current performance: the work (expected reference cores) weighted with the speed at which the pool does it
//!   (performance, 1.0 = reference) and with the share of the limit need that the pool can give. The optimization
//!   weight is money per hour for one reference core of work done at reference speed.
//!
//! To both comes the expected cost of violations: the need above what the pool can give, weighted with how likely it is, at the
//! price that is configured for a reference core that is missing.

use serde::{Deserialize, Serialize};

use rswap_forecast::Quantiles;
use rswap_types::Pool;

use crate::{NeedUsed, PlanConfig};

/// What a score is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// Expected need, in cores of this pool.
    pub expected_cores: f64,
    /// Need that must be met, in cores of this pool.
    pub limit_cores: f64,
    /// Cores that this instance can have here.
    pub available_cores: f64,
    /// Expected memory, in GiB.
    pub expected_gib: f64,
    /// Predicted demand x current cost, in money per hour.
    pub cost_per_hour: f64,
    /// Current performance: reference cores of work x speed x share of the need that is met.
    pub performance: f64,
    /// The optimization weight, in money per hour and unit of performance.
    pub weight: f64,
    /// What the need that this pool can't give is expected to cost, in money per hour.
    #[serde(default)]
    pub violation_per_hour: f64,
}

impl Terms {
    /// ROS in money per hour: lower is better.
    pub fn score(&self) -> f64 {
        self.cost_per_hour - self.performance * self.weight + self.violation_per_hour
    }
}

/// Its performance: the configuration refuses 0, and a pool from elsewhere must not divide by it either.
pub(crate) fn speed(pool: &Pool) -> f64 {
    pool.performance.max(1e-6)
}

/// The terms of `pool` for an instance with `need` that can have `available_cores` of it.
pub fn terms(need: &NeedUsed, pool: &Pool, available_cores: f64, config: &PlanConfig) -> Terms {
    let speed = speed(pool);
    let expected_cores = need.expected_cores / speed;
    let limit_cores = need.limit_cores / speed;
    let expected_gib = need.expected_bytes as f64 / (1u64 << 30) as f64;
    let met = if limit_cores <= available_cores { 1.0 } else { available_cores.max(0.0) / limit_cores };
    Terms {
        expected_cores,
        limit_cores,
        available_cores,
        expected_gib,
        cost_per_hour: expected_cores * pool.cost_per_core_hour + expected_gib * pool.cost_per_gib_hour,
        performance: need.expected_cores * pool.performance * met,
        weight: config.weight,
        violation_per_hour: shortfall(&need.cores, available_cores.max(0.0) * speed)
            * config.violation_cost_per_core_hour,
    }
}

/// The expected need above `available`, in its unit, as far as four quantiles tell it: between two, all values are taken for
/// equally likely, and none is above the last.
pub fn shortfall(need: &Quantiles, available: f64) -> f64 {
    if [need.p50, need.p90, need.p95, need.p99].iter().all(|quantile| *quantile <= available) {
        return 0.0;
    }
    let between = |low: f64, high: f64, share: f64| {
        if high <= available {
            0.0
        } else if low >= available || high <= low {
            share * ((low + high) / 2.0 - available).max(0.0)
        } else {
            let above = high - available;
            share * above * above / (2.0 * (high - low))
        }
    };
    // Below the median: as if it always were the median, or less where that is enough.
    0.5 * (need.p50 - available).max(0.0)
        + between(need.p50, need.p90, 0.4)
        + between(need.p90, need.p95, 0.05)
        + between(need.p95, need.p99, 0.04)
        + 0.01 * (need.p99 - available).max(0.0)
}
