//! What can be configured about plans.

use rswap_forecast::Quantile;
use rswap_types::bounds::{finite, non_negative, positive, positive_integer, positive_u32, share};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

/// `[plan]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanConfig {
    /// Alternatives are looked for when the score of the present pool is above this, in money per hour.
    #[serde(deserialize_with = "finite")]
    pub threshold: f64,
    /// The optimization weight: what one unit of performance is worth, in money per hour.
    #[serde(deserialize_with = "non_negative")]
    pub weight: f64,
    /// The quantile of the forecast that a pool must be able to give.
    pub quantile: Quantile,
    /// How much better another pool must be for a move that nothing forces, in money per hour.
    #[serde(deserialize_with = "non_negative")]
    pub hysteresis: f64,
    /// How far the needs of instances on one pool go beyond what is expected at the same time: 1 adds their limits up; with 0,
    /// only their variances are, as of needs that don't depend on each other.
    #[serde(deserialize_with = "correlation")]
    pub correlation: f64,
    /// Share of a pool that is left free: for who would come, it is full before it is.
    #[serde(deserialize_with = "share")]
    pub headroom: f64,
    /// The same for who is there: less than `headroom`, so that what was placed stays when forecasts waver.
    #[serde(deserialize_with = "share")]
    pub headroom_staying: f64,
    /// Time after a move in which the instance stays, in milliseconds.
    pub cool_down_ms: u64,
    /// How far ahead plans look, and the time in which a move must pay for itself, in milliseconds.
    #[serde(deserialize_with = "positive_integer")]
    pub horizon_ms: u64,
    /// What an hour of an instance's standing still costs, in money.
    #[serde(deserialize_with = "non_negative")]
    pub unavailability_cost_per_hour: f64,
    /// What a GiB sent to another host costs, in money.
    #[serde(deserialize_with = "non_negative")]
    pub cost_per_gib_sent: f64,
    /// What an hour in which a reference core that is needed is not there costs, in money.
    #[serde(deserialize_with = "non_negative")]
    pub violation_cost_per_core_hour: f64,
    /// The optimization weight of storage: what 1000 requests per second on the host's fastest storage are worth, in money per hour.
    #[serde(deserialize_with = "non_negative")]
    pub io_weight: f64,
    /// What an hour costs in which nothing of a volume's I/O, or of an instance's traffic, could be done that is needed, in money; a
    /// part of it costs its share.
    #[serde(deserialize_with = "non_negative")]
    pub io_violation_cost_per_hour: f64,
    /// What a GiB copied between storage pools costs, in money.
    #[serde(deserialize_with = "non_negative")]
    pub cost_per_gib_copied: f64,
    /// How fast a volume is copied to another storage pool, in bytes per second, until it has been measured.
    #[serde(deserialize_with = "positive")]
    pub copy_bytes_per_s: f64,
    /// Volumes that may be on their way to one storage pool at once.
    #[serde(deserialize_with = "positive_u32")]
    pub volume_moves_per_pool: u32,
    /// Pools that a decision names at most, the best first: of a fleet of a thousand hosts, some are enough to explain it.
    #[serde(deserialize_with = "positive_u32")]
    pub candidates_kept: u32,
    /// Moves that may be on their way to one host at once.
    #[serde(deserialize_with = "positive_u32")]
    pub moves_per_host: u32,
    /// Moves that may use one host's link at once, in both directions together.
    #[serde(deserialize_with = "positive_u32")]
    pub moves_per_link: u32,
    /// Moves to and from one host within an hour.
    #[serde(deserialize_with = "positive_u32")]
    pub moves_per_hour: u32,
    /// Speed of the link to other hosts, in bytes per second, until it has been measured.
    #[serde(deserialize_with = "positive")]
    pub link_bytes_per_s: f64,
}

impl Default for PlanConfig {
    fn default() -> Self {
        Self {
            threshold: 0.0,
            weight: 0.02,
            quantile: Quantile::P95,
            hysteresis: 0.005,
            correlation: 1.0,
            headroom: 0.1,
            headroom_staying: 0.05,
            cool_down_ms: 30_000,
            horizon_ms: 60_000,
            unavailability_cost_per_hour: 10.0,
            cost_per_gib_sent: 0.0005,
            violation_cost_per_core_hour: 0.4,
            io_weight: 0.0005,
            io_violation_cost_per_hour: 0.4,
            cost_per_gib_copied: 0.0001,
            copy_bytes_per_s: 50e6,
            volume_moves_per_pool: 1,
            candidates_kept: 16,
            moves_per_host: 4,
            moves_per_link: 6,
            moves_per_hour: 120,
            link_bytes_per_s: 100e6,
        }
    }
}

fn correlation<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    let value = f64::deserialize(from)?;
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(D::Error::custom(format!("{value} is not from 0 to 1")))
    }
}
