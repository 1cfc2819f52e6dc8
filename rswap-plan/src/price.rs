//! What a move costs: time, bytes, unavailability, and all of it as money.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Dropped, InstanceView, MoveKind, PlanConfig};

/// Setting affinities takes milliseconds; this is generous.
const CPU_MOVE_S: f64 = 0.05;
/// Offer, freeze, verify and commit, next to the transfer itself.
pub(crate) const HOST_FIXED_S: f64 = 1.0;
/// Stand-still of a migration next to its last delta.
const HOST_FIXED_UNAVAILABLE_S: f64 = 0.05;
/// Pre-copy rounds after which the rest is taken to be sent in the stand-still.
const ROUNDS: i32 = 5;
/// Written / sent bytes above which pre-copy is not expected to end.
const CONVERGES_BELOW: f64 = 0.8;

/// What a move is expected to take, and its price.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MovePrice {
    /// Duration.
    pub seconds: f64,
    /// Bytes sent.
    pub bytes: u64,
    /// Time in which the instance stands still, in milliseconds.
    pub unavailability_ms: f64,
    /// All of it, in money.
    pub money: f64,
}

/// The price of a move, whether or not it can be expected to end: see [`MovePrice`].
pub fn price_of_move(
    kind: MoveKind,
    view: &InstanceView,
    cost_per_hour: f64,
    link_bytes_per_s: f64,
    config: &PlanConfig,
) -> MovePrice {
    price(kind, view, cost_per_hour, link_bytes_per_s, config).0
}

/// The price of a move to a pool that costs `cost_per_hour` for this instance; while it goes on, both are paid for.
/// An estimate is given even where the move is not expected to end, so that the numbers can be shown.
pub(super) fn price(
    kind: MoveKind,
    view: &InstanceView,
    cost_per_hour: f64,
    link: f64,
    config: &PlanConfig,
) -> (MovePrice, Option<Dropped>) {
    let way = Way::new(kind, view, link, config);
    let price = MovePrice {
        seconds: way.seconds,
        bytes: way.bytes,
        unavailability_ms: way.unavailable_s * 1000.0,
        money: way.money(cost_per_hour),
    };
    (price, way.hopeless)
}

/// What moving one instance over one link is like, whatever the pool at its end costs.
pub(super) struct Way {
    seconds: f64,
    bytes: u64,
    unavailable_s: f64,
    hours: f64,
    money_sent: f64,
    money_unavailable: f64,
    /// Why it is not expected to end.
    pub(super) hopeless: Option<Dropped>,
}

impl Way {
    /// `link` is the speed of the way to another host, in bytes of memory per second.
    pub(super) fn new(kind: MoveKind, view: &InstanceView, link: f64, config: &PlanConfig) -> Self {
        let (seconds, bytes, unavailable_s, hopeless) = match kind {
            // Volumes and ports have prices of their own.
            MoveKind::Cpu | MoveKind::Storage | MoveKind::Link => (CPU_MOVE_S, 0.0, 0.0, None),
            MoveKind::Host => {
                // Untracked writes are unknown, not absent: a tenth of the link is assumed.
                let dirty =
                    view.dirty_bytes_per_s.filter(|rate| rate.is_finite()).unwrap_or(link / 10.0).max(0.0);
                // A round can't write more than the instance has: a small one always ends.
                let ratio = dirty / link;
                // Volumes go along.
                let files = view.volumes.iter().map(|volume| volume.size_bytes).fold(0, u64::saturating_add);
                let resident = view.resident_bytes.saturating_add(files) as f64;
                let hopeless = (ratio >= CONVERGES_BELOW)
                    .then_some(Dropped::WillNotConverge { dirty_bytes_per_s: dirty, link_bytes_per_s: link });
                // Each round sends what was written during the one before: a geometric series.
                let shrink = ratio.min(CONVERGES_BELOW);
                let bytes = resident / (1.0 - shrink);
                let last = resident * shrink.powi(ROUNDS);
                (bytes / link + HOST_FIXED_S, bytes, HOST_FIXED_UNAVAILABLE_S + last / link, hopeless)
            }
        };
        Self {
            seconds,
            bytes: bytes as u64,
            unavailable_s,
            hours: seconds / 3600.0,
            money_sent: bytes / (1u64 << 30) as f64 * config.cost_per_gib_sent,
            money_unavailable: unavailable_s / 3600.0 * config.unavailability_cost_per_hour,
            hopeless,
        }
    }

    /// All of it, in money, to a pool that costs `cost_per_hour` for this instance.
    pub(super) fn money(&self, cost_per_hour: f64) -> f64 {
        self.hours * cost_per_hour.max(0.0) + self.money_sent + self.money_unavailable
    }
}
