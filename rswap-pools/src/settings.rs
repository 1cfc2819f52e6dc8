//! What the configuration says about pools, in the form that this room takes.

use std::path::PathBuf;

use rswap_types::CpuSet;
use serde::Serialize;

use crate::{Known, Source};

/// What a configured pool is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Member {
    /// Cores.
    Cpus(CpuSet),
    /// NUMA nodes.
    Nodes(CpuSet),
    /// The file system that is mounted there.
    Storage(PathBuf),
    /// A file or device of /proc/swaps.
    Swap(PathBuf),
    /// A network interface.
    Link(String),
}

/// One configured pool of this host.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// Where it stands in the configuration: `pool[0]`.
    pub key: String,
    /// What it is made of.
    pub member: Member,
    /// Limit: cores, bytes, or bits per second.
    pub capacity: Option<f64>,
    /// Money per hour and core, GiB, or Gbit/s.
    pub cost_per_hour: Option<f64>,
    /// Cores: speed of one, relative to the reference core. Storage: relative to the host's fastest.
    pub performance: Option<f64>,
    /// Storage: requests per second that it gives.
    pub operations_per_s: Option<f64>,
    /// Storage: bytes per second that it gives.
    pub bytes_per_s: Option<f64>,
    /// Links: what one instance may send, and receive, in bits per second.
    pub instance_rate: Option<f64>,
    /// Cores: what one instance may have of them at most, in cores.
    pub instance_cores: Option<f64>,
    /// Cores: what one instance has in relation to others when there is not enough; 100 is usual.
    pub instance_weight: Option<f64>,
}

/// What the configuration says.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Pools with a name.
    pub pools: Vec<Wanted>,
    /// Money per core and hour, where a pool does not say it.
    pub cost_per_core_hour: Known,
    /// Money per GiB of memory and hour, where a pool does not say it.
    pub cost_per_gib_hour: Known,
    /// Speed of the fastest core, relative to the reference core.
    pub performance: Known,
    /// A file system or swap area with a smaller share available than this (0 to 1) is full.
    pub full_below_share: f64,
}

impl Default for Settings {
    fn default() -> Self {
        let known = |value| Known { value, source: Source::Default };
        Self {
            pools: Vec::new(),
            cost_per_core_hour: known(0.0),
            cost_per_gib_hour: known(0.0),
            performance: known(1.0),
            full_below_share: 0.02,
        }
    }
}
