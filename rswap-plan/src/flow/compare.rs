//! The numbers of a storage pool or a link for a volume or a port.

use rswap_forecast::Quantiles;
use rswap_types::{Flow, LatencyPoint, PoolKind, PoolState};

use super::{
    FlowNeed, FlowTerms, Lane, Round,
    ledger::{Ledger, Room},
    price,
};
use crate::{Candidate, Dropped, MoveKind, Terms, rules, score};

const GIB: f64 = (1u64 << 30) as f64;
/// Bytes per second of a Gbit/s.
const GBIT: f64 = 1e9 / 8.0;

/// A pool, what is left of it, and for who would come: who else is coming.
pub(super) struct Place<'l> {
    pub(super) index: usize,
    pub(super) room: Room,
    pub(super) coming: Option<&'l Ledger<'l>>,
}

/// Which part of the need is expected to be missing, of requests or of bytes, whichever is more: the expected shortfall as a share
/// of the highest p99.
pub fn shortfall_share(operations: &Quantiles, bytes: &Quantiles, available: Flow) -> f64 {
    let share = |need: &Quantiles, available: f64| {
        let most = [need.p50, need.p90, need.p95, need.p99].into_iter().fold(0.0, f64::max);
        if most > 0.0 { score::shortfall(need, available) / most } else { 0.0 }
    };
    share(operations, available.operations_per_s).max(share(bytes, available.bytes_per_s))
}

/// What a request takes there, at the load that the pool has with this volume on it.
fn latency(need: &FlowNeed, place: &Place<'_>, round: &Round<'_>) -> Option<LatencyPoint> {
    round.pools[place.index].latency()?.at(place.room.others_per_s + need.expected.operations_per_s)
}

fn terms(need: &FlowNeed, place: &Place<'_>, round: &Round<'_>) -> Terms {
    let (pool, config) = (round.pools[place.index], round.config);
    let available = place.room.available;
    let part = |limit: f64, available: f64| if limit <= available { 1.0 } else { available.max(0.0) / limit };
    let met = part(need.limit.operations_per_s, available.operations_per_s)
        .min(part(need.limit.bytes_per_s, available.bytes_per_s));
    let gib = need.size_bytes as f64 / GIB;
    let (cost_per_hour, performance) = match pool.kind {
        PoolKind::Link { cost_per_gbit_hour, .. } => {
            (need.expected.bytes_per_s / GBIT * cost_per_gbit_hour, 0.0)
        }
        _ => {
            let load = place.room.others_per_s + need.expected.operations_per_s;
            let experienced = pool.latency().and_then(|latency| latency.speed_at(load));
            let speed = experienced.unwrap_or(pool.performance);
            (gib * pool.cost_per_gib_hour, need.expected.operations_per_s / 1e3 * speed * met)
        }
    };
    Terms {
        expected_gib: gib,
        cost_per_hour,
        performance,
        weight: config.io_weight,
        violation_per_hour: shortfall_share(&need.operations, &need.bytes, available)
            * config.io_violation_cost_per_hour,
        ..Terms::default()
    }
}

pub(super) fn candidate(lane: &Lane<'_>, need: &FlowNeed, place: &Place<'_>, round: &Round<'_>) -> Candidate {
    let (pool, config) = (round.pools[place.index], round.config);
    let terms = terms(need, place, round);
    let Room { available, free_bytes, .. } = place.room;
    let move_price = place.coming.map(|_| price::price(lane, need, pool, terms.cost_per_hour, round));
    let limit = need.limit;
    let is_short =
        limit.operations_per_s > available.operations_per_s || limit.bytes_per_s > available.bytes_per_s;
    let coming = place.coming.map_or(0, |ledger| ledger.coming(place.index));
    let no_space = place.coming.is_some() && lane.kind == MoveKind::Storage && need.size_bytes > free_bytes;
    let dropped = match &pool.state {
        PoolState::Unavailable { reason } => Some(Dropped::Unavailable { reason: reason.clone() }),
        PoolState::Draining => Some(Dropped::Draining),
        PoolState::Ready if pool.gives().is_none() => Some(Dropped::Unmeasured),
        PoolState::Ready if is_short => Some(Dropped::Flow { needed: limit, available }),
        PoolState::Ready if no_space => {
            Some(Dropped::Space { needed_bytes: need.size_bytes, available_bytes: free_bytes })
        }
        PoolState::Ready if coming >= config.volume_moves_per_pool && lane.kind == MoveKind::Storage => {
            Some(Dropped::Busy { moves: coming })
        }
        PoolState::Ready => None,
    };
    let pools = || round.pools.iter().enumerate().filter(|(index, _)| round.is_of_kind(*index, lane.kind));
    let pinned =
        rules::pinned(lane.view, &pool.name, || pools().map(|(_, pool)| pool.name.as_str()).collect());
    let score = terms.score();
    let per_hour = move_price.map_or(0.0, |price| price.money / (config.horizon_ms as f64 / 3_600_000.0));
    Candidate {
        pool: pool.name.clone(),
        score,
        terms,
        flow: Some(FlowTerms {
            limit,
            available,
            size_bytes: need.size_bytes,
            free_bytes,
            latency: latency(need, place, round),
        }),
        move_price,
        total: score + per_hour,
        dropped: pinned.or(dropped),
    }
}
