//! What moving a volume or a port costs.

use rswap_types::Pool;

use super::{FlowNeed, Lane, Round};
use crate::{MoveKind, MovePrice};

/// Looking, freezing and verifying, next to copying, in seconds.
pub(crate) const FIXED_S: f64 = 0.5;
/// Standing still next to what is copied then, in seconds.
const STILL_S: f64 = 0.02;
/// Passes after which the rest is taken to be copied while it stands still.
const PASSES: i32 = 5;
/// Written / copied bytes that are reckoned with at most.
const CONVERGES_BELOW: f64 = 0.8;
/// A port's move: probes, and the moment on no bridge.
const PORT_S: f64 = 0.3;
const PORT_STILL_S: f64 = 0.001;

/// The price of a move to a pool that costs `cost_per_hour` for it; while it goes on, both are paid for.
pub(super) fn price(
    lane: &Lane<'_>,
    need: &FlowNeed,
    to: &Pool,
    cost_per_hour: f64,
    round: &Round<'_>,
) -> MovePrice {
    let config = round.config;
    let (seconds, bytes, still_s) = if lane.kind == MoveKind::Storage {
        let rate = round.copied.get(&to.name).copied().unwrap_or(config.copy_bytes_per_s);
        // What of its I/O is writing, and what is written again and again, is not known: the copy itself gives up, before it has
        // touched anything, on one that it can't follow.
        let shrink = (lane.now.bytes_per_s / rate).min(CONVERGES_BELOW);
        let size = need.size_bytes as f64;
        let bytes = size / (1.0 - shrink);
        (bytes / rate + FIXED_S, bytes, STILL_S + size * shrink.powi(PASSES) / rate)
    } else {
        (PORT_S, 0.0, PORT_STILL_S)
    };
    let money = seconds / 3600.0 * cost_per_hour.max(0.0)
        + bytes / (1u64 << 30) as f64 * config.cost_per_gib_copied
        + still_s / 3600.0 * config.unavailability_cost_per_hour;
    MovePrice { seconds, bytes: bytes as u64, unavailability_ms: still_s * 1e3, money }
}
