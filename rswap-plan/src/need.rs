//! What a forecast says that a plan rests on.

use rswap_forecast::{DemandPoint, Evidence, Quantiles, Resource};
use rswap_types::Pool;

use crate::{InstanceView, MoveKind, NeedUsed, PlanConfig, StayReason, lead::Crossing, score::Room};

/// The need over the planning horizon; why there is none, if the forecast has seen too little.
pub(crate) fn need(view: &InstanceView, config: &PlanConfig) -> Result<NeedUsed, StayReason> {
    let cores = over_horizon(view, Resource::Cpu, config)?;
    // Memory in use now is a fair forecast of memory until there is a better one.
    let resident = view.resident_bytes as f64;
    let memory = over_horizon(view, Resource::Memory, config);
    let (expected_bytes, limit_bytes) =
        memory.map_or((resident, resident), |memory| (memory.expected, memory.most.at(config.quantile)));
    Ok(NeedUsed {
        expected_cores: cores.expected,
        limit_cores: cores.most.at(config.quantile).max(0.0),
        cores: cores.most,
        expected_bytes: expected_bytes as u64,
        limit_bytes: limit_bytes as u64,
        quantile: config.quantile,
    })
}

pub(crate) struct OverHorizon {
    /// Mean of the medians.
    pub(crate) expected: f64,
    /// The highest of each quantile.
    pub(crate) most: Quantiles,
}

fn points<'v>(
    view: &'v InstanceView,
    resource: Resource,
    config: &PlanConfig,
) -> impl Iterator<Item = &'v DemandPoint> + use<'v> {
    let horizon_ms = config.horizon_ms;
    view.demand.points.iter().filter(move |p| p.resource == resource && p.horizon_ms <= horizon_ms)
}

/// Of the points that can be believed.
pub(crate) fn over_horizon(
    view: &InstanceView,
    resource: Resource,
    config: &PlanConfig,
) -> Result<OverHorizon, StayReason> {
    let (mut sum, mut most, mut count) = (0.0, Quantiles::default(), 0u32);
    let mut nearest = StayReason::TooLittleSeen { seen: 0, needed: 1 };
    for point in points(view, resource, config) {
        match point.evidence {
            Evidence::Enough { .. } => {
                sum += point.need.p50.max(0.0);
                most = Quantiles {
                    p50: most.p50.max(point.need.p50),
                    p90: most.p90.max(point.need.p90),
                    p95: most.p95.max(point.need.p95),
                    p99: most.p99.max(point.need.p99),
                };
                count += 1;
            }
            Evidence::TooLittle { seen, needed } => nearest = StayReason::TooLittleSeen { seen, needed },
        }
    }
    if count == 0 { Err(nearest) } else { Ok(OverHorizon { expected: sum / f64::from(count), most }) }
}

/// The medians of a resource over the horizon that can be believed: (milliseconds from now, amount), the nearest first.
pub(crate) fn expected(view: &InstanceView, resource: Resource, config: &PlanConfig) -> Vec<(u64, f64)> {
    let known = |point: &&DemandPoint| matches!(point.evidence, Evidence::Enough { .. });
    let mut medians: Vec<(u64, f64)> = points(view, resource, config)
        .filter(known)
        .map(|point| (point.horizon_ms, point.need.p50.max(0.0)))
        .filter(|(at, amount)| *at > 0 && amount.is_finite())
        .collect();
    medians.sort_by_key(|(at, _)| *at);
    medians.dedup_by_key(|(at, _)| *at);
    medians
}

/// When the need first exceeds what the pool can give: between two horizons, along the line through both.
pub(crate) fn crossing(
    view: &InstanceView,
    pool: &Pool,
    room: &Room,
    kind: MoveKind,
    config: &PlanConfig,
) -> Option<Crossing> {
    let speed = pool.performance.max(1e-6);
    let cpu = first(view, Resource::Cpu, view.cores * speed, room.cores * speed, config);
    let memory = match kind {
        MoveKind::Host => {
            first(view, Resource::Memory, view.resident_bytes as f64, room.bytes as f64, config)
        }
        MoveKind::Cpu | MoveKind::Storage | MoveKind::Link => None,
    };
    Crossing::first(cpu.into_iter().chain(memory))
}

/// When the need for a resource, which is `now`, first exceeds `limit`.
pub(crate) fn first(
    view: &InstanceView,
    resource: Resource,
    now: f64,
    limit: f64,
    config: &PlanConfig,
) -> Option<Crossing> {
    let mut points: Vec<_> = points(view, resource, config)
        .filter(|point| matches!(point.evidence, Evidence::Enough { .. }))
        .map(|point| (point.horizon_ms as f64, point.need.at(config.quantile)))
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut at, mut value) = (0.0, now);
    for (next_at, next) in points {
        if next > limit {
            let share = if value < limit { (limit - value) / (next - value) } else { 0.0 };
            return Some(Crossing {
                at_ms: (at + (next_at - at) * share) as u64,
                after_ms: at as u64,
                by_ms: next_at as u64,
            });
        }
        (at, value) = (next_at, next);
    }
    None
}
