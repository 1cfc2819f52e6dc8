//! The Resource Optimization Score.
//!
//! ROS = (predicted demand x current cost) - (current performance x optimization weight), in **money per hour**; lower
//! is better. The two products get the same unit like this (`docs/score.md` has the derivation):
//!
//! - predicted demand x current cost: cores of the pool x money per core and hour + GiB x money per GiB and hour.
//!   Demand is forecast in reference cores; a pool of performance `p` needs `1/p` of its cores for each.
//! - current performance: the work (expected reference cores) weighted with the speed at which the pool does it
//!   (performance, 1.0 = reference; less where instances have experienced that work takes longer there for waiting) and with the
//!   share of the limit need that the pool can give. The optimization weight is money per hour for one reference core of work done at reference speed.
//!
//! To both comes the expected cost of violations: the need above what the pool can give, weighted with how likely it is, at the
//! price that is configured for a reference core that is missing.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use rswap_forecast::Quantiles;
use rswap_types::{Pool, PoolKind, SlowdownPoint};

use crate::{NeedUsed, PlanConfig};

/// What a score is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
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
    /// What others than instances take of its cores.
    #[serde(default)]
    pub others_cores: f64,
    /// How much longer work takes here for waiting, at the load that the cores have with this instance, where instances experienced it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slowdown: Option<SlowdownPoint>,
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

/// What is left of a pool for one instance.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Room {
    /// Cores that it can have.
    pub cores: f64,
    /// The same, if others than instances took none.
    pub without_others: f64,
    /// Memory that it can have, in bytes.
    pub bytes: u64,
    /// Cores that others than instances take.
    pub others_cores: f64,
    /// Cores that all others together, instances among them, are expected to use.
    pub beside_cores: f64,
}

/// How much longer work takes in this pool, with this instance on it, if instances have experienced that.
fn slowdown(pool: &Pool, expected_cores: f64, room: &Room) -> Option<SlowdownPoint> {
    let PoolKind::Cpu { cpus, slowdown, .. } = &pool.kind else { return None };
    if slowdown.is_empty() || cpus.is_empty() {
        return None;
    }
    slowdown.at((room.beside_cores + expected_cores) / cpus.len() as f64)
}

/// The terms of `pool` for an instance with `need` that finds this room there.
pub fn terms(need: &NeedUsed, pool: &Pool, room: &Room, config: &PlanConfig) -> Terms {
    let available_cores = room.cores;
    let speed = speed(pool);
    let expected_cores = need.expected_cores / speed;
    let limit_cores = need.limit_cores / speed;
    let expected_gib = need.expected_bytes as f64 / (1u64 << 30) as f64;
    let slowdown = slowdown(pool, expected_cores, room);
    let times = slowdown.map_or(1.0, |point| point.times.max(1.0));
    let met = if limit_cores <= available_cores { 1.0 } else { available_cores.max(0.0) / limit_cores };
    Terms {
        expected_cores,
        limit_cores,
        available_cores,
        expected_gib,
        cost_per_hour: expected_cores * pool.cost_per_core_hour + expected_gib * pool.cost_per_gib_hour,
        performance: need.expected_cores * pool.performance / times * met,
        weight: config.weight,
        violation_per_hour: shortfall(&need.cores, available_cores.max(0.0) * speed)
            * config.violation_cost_per_core_hour,
        others_cores: room.others_cores,
        slowdown,
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
