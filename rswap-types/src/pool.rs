//! What there is to sit on, as plans see it.

use std::{collections::BTreeSet, net::SocketAddr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{LatencyCurve, SlowdownCurve};

/// Name of the pool that stands for this host.
pub const THIS_HOST: &str = "this-host";

/// A set of logical CPUs.
pub type CpuSet = BTreeSet<usize>;

/// Something that an instance can sit on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    /// Unique on the host.
    pub name: String,
    /// What it is made of.
    pub kind: PoolKind,
    /// All of it.
    pub capacity: Capacity,
    /// What is in use of it now by instances, and what others take of it.
    pub used: Capacity,
    /// Money per core and hour, in the configuration's currency.
    pub cost_per_core_hour: f64,
    /// Money per GiB of memory and hour (0 where the pool has no memory of its own).
    pub cost_per_gib_hour: f64,
    /// Speed of one of its cores relative to the reference core (1.0).
    pub performance: f64,
    /// Whether instances may be put there.
    pub state: PoolState,
}

/// What a pool is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum PoolKind {
    /// A set of this host's cores.
    Cpu {
        /// Which.
        #[schema(value_type = BTreeSet<usize>)]
        cpus: CpuSet,
        /// What one instance can have of them at most, in cores.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        instance_cores: Option<f64>,
        /// How much longer work takes there for waiting, by load; without points, nothing is known of that.
        #[serde(default, skip_serializing_if = "SlowdownCurve::is_empty")]
        slowdown: SlowdownCurve,
    },
    /// Another host's agent.
    Host {
        /// Where it takes migrations.
        #[schema(value_type = String)]
        address: SocketAddr,
    },
    /// This host as a whole: the pool that an instance leaves when it migrates.
    ThisHost,
    /// A file system of this host that volumes can be put on.
    Storage {
        /// Its size, in bytes.
        size_bytes: u64,
        /// What can still be put there, in bytes.
        free_bytes: u64,
        /// What it gives; `None` while nobody has measured or configured that.
        gives: Option<Flow>,
        /// The disks that it lies on in the end. Pools that have one in common share what it gives.
        #[serde(default)]
        disks: BTreeSet<String>,
        /// What others than volumes of instances use of its disks.
        #[serde(default)]
        foreign: Flow,
        /// What requests take, by load; without points, [`Pool::performance`] is all that is known.
        #[serde(default)]
        latency: LatencyCurve,
    },
    /// A link of this host that instances can be on.
    Link {
        /// What it gives in each direction; `None` while nobody has measured or configured that.
        gives: Option<Flow>,
        /// What one instance can have of it at most, in bytes per second of each direction.
        instance_bytes_per_s: Option<f64>,
        /// What is used of it by others than instances, in the fuller direction.
        foreign: Flow,
        /// Money per Gbit/s and hour.
        cost_per_gbit_hour: f64,
    },
}

/// What flows in a second: requests and bytes of block I/O, or bytes over a link, which has no requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Flow {
    /// Requests per second.
    pub operations_per_s: f64,
    /// Bytes per second.
    pub bytes_per_s: f64,
}

impl Flow {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            operations_per_s: self.operations_per_s + other.operations_per_s,
            bytes_per_s: self.bytes_per_s + other.bytes_per_s,
        }
    }

    /// What is left of it without `other`, not less than nothing.
    pub fn less(self, other: Self) -> Self {
        Self {
            operations_per_s: (self.operations_per_s - other.operations_per_s).max(0.0),
            bytes_per_s: (self.bytes_per_s - other.bytes_per_s).max(0.0),
        }
    }

    /// The smaller one of each.
    pub fn least(self, other: Self) -> Self {
        Self {
            operations_per_s: self.operations_per_s.min(other.operations_per_s),
            bytes_per_s: self.bytes_per_s.min(other.bytes_per_s),
        }
    }

    /// So many times as much.
    pub fn times(self, factor: f64) -> Self {
        Self { operations_per_s: self.operations_per_s * factor, bytes_per_s: self.bytes_per_s * factor }
    }

    /// The larger one of each.
    pub fn most(self, other: Self) -> Self {
        Self {
            operations_per_s: self.operations_per_s.max(other.operations_per_s),
            bytes_per_s: self.bytes_per_s.max(other.bytes_per_s),
        }
    }
}

impl PoolKind {
    /// Whether what is put there is a part of an instance by itself (a volume, its port), and not the instance.
    pub fn is_for_flows(&self) -> bool {
        matches!(self, Self::Storage { .. } | Self::Link { .. })
    }
}

/// An amount of what a pool offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// Cores.
    pub cores: f64,
    /// Memory, in bytes.
    pub memory_bytes: u64,
}

/// Whether a pool takes instances.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum PoolState {
    /// It does.
    Ready,
    /// It does not, and those on it are to leave: somebody wants to switch it off.
    Draining,
    /// It does not, and why.
    Unavailable {
        /// For people.
        reason: String,
    },
}

impl Pool {
    /// The pool's CPUs, if it is a set of this host's cores.
    pub fn cpus(&self) -> Option<&CpuSet> {
        match &self.kind {
            PoolKind::Cpu { cpus, .. } => Some(cpus),
            PoolKind::Host { .. } | PoolKind::ThisHost | PoolKind::Storage { .. } | PoolKind::Link { .. } => {
                None
            }
        }
    }
}

impl Pool {
    /// What a storage pool or a link gives, if that is known.
    pub fn gives(&self) -> Option<Flow> {
        match self.kind {
            PoolKind::Storage { gives, .. } | PoolKind::Link { gives, .. } => gives,
            PoolKind::Cpu { .. } | PoolKind::Host { .. } | PoolKind::ThisHost => None,
        }
    }

    /// What requests to a storage pool take, by load, if that is known.
    pub fn latency(&self) -> Option<&LatencyCurve> {
        match &self.kind {
            PoolKind::Storage { latency, .. } if !latency.is_empty() => Some(latency),
            _ => None,
        }
    }

    /// How much longer work takes on a set of cores for waiting, by load, if that is known.
    pub fn slowdown(&self) -> Option<&SlowdownCurve> {
        match &self.kind {
            PoolKind::Cpu { slowdown, .. } if !slowdown.is_empty() => Some(slowdown),
            _ => None,
        }
    }

    /// Whether both lie on one disk.
    pub fn shares_a_disk(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (PoolKind::Storage { disks, .. }, PoolKind::Storage { disks: others, .. }) => {
                !disks.is_disjoint(others)
            }
            _ => false,
        }
    }
}

/// Share (0 to 1) of what an instance on `sits_on` uses that falls on `pool`: 1 on its own pool and on this host,
/// 0 on other hosts, and in proportion to the common CPUs elsewhere.
pub fn overlap(pools: &[Pool], sits_on: Option<&str>, pool: &Pool) -> f64 {
    let there = match &pool.kind {
        PoolKind::ThisHost => return 1.0,
        PoolKind::Host { .. } | PoolKind::Storage { .. } | PoolKind::Link { .. } => return 0.0,
        PoolKind::Cpu { cpus, .. } => cpus,
    };
    let own = sits_on.and_then(|name| pools.iter().find(|pool| pool.name == name)).and_then(Pool::cpus);
    let every: CpuSet;
    let own = match own {
        Some(cpus) => cpus,
        None => {
            every = pools.iter().filter_map(Pool::cpus).flatten().copied().collect();
            &every
        }
    };
    if own.is_empty() { 0.0 } else { own.intersection(there).count() as f64 / own.len() as f64 }
}
