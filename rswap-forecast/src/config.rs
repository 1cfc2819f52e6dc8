//! What can be configured about the forecast.

use rswap_types::bounds::positive_integer;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

/// `[forecast]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ForecastConfig {
    /// How far ahead to forecast, in milliseconds.
    #[serde(deserialize_with = "horizons")]
    pub horizons_ms: Vec<u64>,
    /// Outcomes of a horizon that must be known before plans may rest on it.
    #[serde(deserialize_with = "positive_integer")]
    pub min_seen: u64,
}

impl Default for ForecastConfig {
    fn default() -> Self {
        Self { horizons_ms: vec![5_000, 15_000, 30_000, 60_000], min_seen: 30 }
    }
}

fn horizons<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u64>, D::Error> {
    let mut horizons = Vec::<u64>::deserialize(from)?;
    horizons.sort_unstable();
    horizons.dedup();
    match horizons.first() {
        None => Err(D::Error::custom("at least one horizon is needed")),
        Some(0) => Err(D::Error::custom("a horizon of 0 ms is not a forecast")),
        Some(_) if horizons.len() > 16 => Err(D::Error::custom("at most 16 horizons")),
        Some(_) => Ok(horizons),
    }
}
