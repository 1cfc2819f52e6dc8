//! `[memory]`: instances whose cold pages are in swap.

use rswap_types::bounds::{positive, positive_integer, share};
use serde::{Deserialize, Serialize};

/// `[memory]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// How often the pages of instances on a swap pool are looked at, in milliseconds.
    #[serde(deserialize_with = "positive_integer")]
    pub look_every_ms: u64,
    /// Pages that have not been used for so many seconds are cold.
    #[serde(deserialize_with = "positive_integer")]
    pub cold_after_s: u64,
    /// Share of the time that an instance may wait for its memory. The nearer it comes to it, the less is paged out.
    #[serde(deserialize_with = "share")]
    pub pressure_limit: f64,
    /// What is paged out at most of an instance that does not wait at all, in MiB per second.
    #[serde(deserialize_with = "positive")]
    pub out_mib_per_s: f64,
    /// Share of one core that the looks may take. They are made less often where they would take more.
    #[serde(deserialize_with = "share")]
    pub cpu_share: f64,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            look_every_ms: 1000,
            cold_after_s: 60,
            pressure_limit: 0.01,
            out_mib_per_s: 64.0,
            cpu_share: 0.05,
        }
    }
}
