//! What a forecast says of a volume, or of a port.

use rswap_forecast::{Quantiles, Resource};
use rswap_types::Flow;

use super::{FlowNeed, Lane};
use crate::{MoveKind, PlanConfig, StayReason, lead::Crossing, need};

/// What is forecast of it: requests, which a port has none of, and bytes.
fn resources(kind: MoveKind) -> (Option<Resource>, Resource) {
    match kind {
        MoveKind::Storage => (Some(Resource::VolumeOperations), Resource::VolumeBytes),
        _ => (None, Resource::Port),
    }
}

fn scaled(need: Quantiles, share: f64) -> Quantiles {
    let part = |amount: f64| (amount * share).max(0.0);
    Quantiles { p50: part(need.p50), p90: part(need.p90), p95: part(need.p95), p99: part(need.p99) }
}

/// The need over the planning horizon; why there is none, if the forecast has seen too little.
pub(super) fn need(lane: &Lane<'_>, config: &PlanConfig) -> Result<FlowNeed, StayReason> {
    let (operations, bytes) = resources(lane.kind);
    let of = |resource| need::over_horizon(lane.view, resource, config);
    let bytes = of(bytes)?;
    let (expected, most) = match operations.map(of).transpose()? {
        Some(operations) => (operations.expected, operations.most),
        None => (0.0, Quantiles::default()),
    };
    let (operations, most_bytes) = (scaled(most, lane.share), scaled(bytes.most, lane.share));
    let flow = |operations_per_s, bytes_per_s| Flow { operations_per_s, bytes_per_s };
    Ok(FlowNeed {
        expected: flow(expected, bytes.expected).times(lane.share),
        limit: flow(operations.at(config.quantile), most_bytes.at(config.quantile)),
        operations,
        bytes: most_bytes,
        size_bytes: lane.size_bytes,
        quantile: config.quantile,
    })
}

/// When it first needs more than is available.
pub(super) fn crossing(lane: &Lane<'_>, available: Flow, config: &PlanConfig) -> Option<Crossing> {
    let (operations, bytes) = resources(lane.kind);
    // Of a part, the whole crosses where the whole is larger by as much.
    let whole = |amount: f64| if lane.share > 0.0 { amount / lane.share } else { f64::INFINITY };
    let first =
        |resource, now: f64, limit: f64| need::first(lane.view, resource, whole(now), whole(limit), config);
    let bytes = first(bytes, lane.now.bytes_per_s, available.bytes_per_s);
    let operations = operations
        .and_then(|resource| first(resource, lane.now.operations_per_s, available.operations_per_s));
    Crossing::first(bytes.into_iter().chain(operations))
}
