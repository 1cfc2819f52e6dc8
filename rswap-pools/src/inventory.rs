//! The noun that leaves this room.

use std::{collections::BTreeMap, path::PathBuf};

use rswap_types::{CpuSet, Flow, UnixMillis};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Core, Device,
    discover::{BYTES_PER_S, OPERATIONS_PER_S, RELATIVE_SPEED},
};

/// Where a number comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "from")]
pub enum Source {
    /// The kernel says so.
    Found {
        /// In this file, or by this system call.
        file: String,
    },
    /// The configuration says so.
    Configured {
        /// Under this key.
        key: String,
    },
    /// `rswap calibrate` measured it.
    Measured {
        /// When.
        at: UnixMillis,
    },
    /// Requests of instances took so long there.
    Experienced {
        /// When the last of them were counted.
        at: UnixMillis,
        /// How many count, older ones in part.
        requests: u64,
    },
    /// Nobody said anything else.
    Default,
}

impl Source {
    /// A file, or a system call, of the kernel.
    pub fn found(file: impl Into<String>) -> Self {
        Self::Found { file: file.into() }
    }

    /// A key of the configuration.
    pub fn configured(key: impl Into<String>) -> Self {
        Self::Configured { key: key.into() }
    }
}

/// A number and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Known {
    /// In the unit of what holds it.
    pub value: f64,
    /// Where it comes from.
    pub source: Source,
}

impl Known {
    /// A number of the kernel's.
    pub fn found(value: f64, file: impl Into<String>) -> Self {
        Self { value, source: Source::found(file) }
    }
}

/// One property of how well a pool does its work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Measure {
    /// Which, with its unit at the end: `read_latency_p50_us`. `docs/pools.md` lists them.
    pub what: String,
    /// How much.
    #[serde(flatten)]
    pub known: Known,
}

/// Something of this host that an instance can sit on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LocalPool {
    /// Unique on the host.
    pub name: String,
    /// What it is made of. It also says the unit of capacity, used and free.
    #[serde(flatten)]
    pub kind: LocalKind,
    /// All of it: cores, bytes, or (links) bits per second.
    pub capacity: Option<Known>,
    /// What anybody uses of it.
    pub used: Option<Known>,
    /// What is left: what the kernel would give, which is not always capacity less used.
    pub free: Option<Known>,
    /// Money per hour and core, GiB, or Gbit/s.
    pub cost_per_hour: Option<Known>,
    /// Share (0 to 1) of the last interval in which it had work; for cores and links the mean share in use.
    pub busy: Option<Known>,
    /// How well it does its work.
    pub performance: Vec<Measure>,
    /// Whether it can be used.
    #[serde(flatten)]
    pub state: State,
}

impl LocalPool {
    /// Cores: speed of one, relative to the reference core. Storage: relative to the host's fastest, where that is configured.
    pub fn relative_speed(&self) -> Option<f64> {
        self.measured(RELATIVE_SPEED)
    }

    pub(crate) fn measured(&self, what: &str) -> Option<f64> {
        self.performance.iter().find(|measure| measure.what == what).map(|measure| measure.known.value)
    }

    /// Storage and links: what they give, as configured, else as measured. Storage is measured by requests that are made eight at once
    /// (reading) and one at a time (writing); of both rates the lower one is what a program can count on.
    pub fn gives(&self) -> Option<Flow> {
        match &self.kind {
            LocalKind::Storage { .. } => {
                let reads = self.measured("read_iops");
                let writes = self.measured("write_latency_p50_us").map(|us| 1e6 / us.max(1e-3));
                let measured = reads.zip(writes).map(|(reads, writes)| reads.min(writes));
                Some(Flow {
                    operations_per_s: self.measured(OPERATIONS_PER_S).or(measured)?,
                    bytes_per_s: self.measured(BYTES_PER_S).or(self.measured("write_bytes_per_s"))?,
                })
            }
            LocalKind::Link { .. } => {
                let bits = self.capacity.as_ref().map(|capacity| capacity.value);
                let bits = bits.or(self.measured("send_bits_per_s"))?;
                Some(Flow { operations_per_s: 0.0, bytes_per_s: bits / 8.0 })
            }
            _ => None,
        }
    }

    /// Storage: how long a request takes, in microseconds, where that was measured: the mean of reading's and writing's medians.
    pub fn latency_us(&self) -> Option<f64> {
        let medians = self.measured("read_latency_p50_us").zip(self.measured("write_latency_p50_us"));
        medians.map(|(read, write)| (read + write) / 2.0)
    }
}

/// What a pool of this host is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum LocalKind {
    /// Cores of one class, or of one configured set. Capacity in cores.
    Cores {
        /// Those that belong to it, online or not.
        #[schema(value_type = BTreeSet<usize>)]
        cpus: CpuSet,
        /// What is known of each.
        cores: Vec<Core>,
        /// What one instance may have of them at most, in cores. Nothing: all.
        #[serde(default)]
        instance_cores: Option<Known>,
        /// What one has in relation to others when there is not enough; 100 is usual.
        #[serde(default)]
        instance_weight: Option<Known>,
    },
    /// Memory of one node or of several. Capacity in bytes.
    Memory {
        /// NUMA nodes; empty where the kernel knows none.
        #[schema(value_type = BTreeSet<usize>)]
        nodes: CpuSet,
        /// CPUs of these nodes.
        #[schema(value_type = BTreeSet<usize>)]
        cpus: CpuSet,
        /// The kernel's memory tier: a lower number is faster.
        tier: Option<u32>,
        /// Distance from the (first) node to each node, in the kernel's units (10 is itself).
        distances: Vec<u32>,
    },
    /// Where anonymous pages go. Capacity in bytes.
    Swap {
        /// The file or device.
        #[schema(value_type = String)]
        path: PathBuf,
        /// `zram`, `partition` or `file`.
        what: String,
        /// Higher is used first.
        priority: Option<i32>,
        /// zram: its algorithm.
        compression: Option<String>,
        /// zram: memory that the compressed pages take, in bytes.
        memory_bytes: Option<u64>,
    },
    /// A file system. Capacity in bytes.
    Storage {
        /// Where it is mounted, the main place first.
        #[schema(value_type = Vec<String>)]
        mount_points: Vec<PathBuf>,
        /// `ext4`, `xfs`, ...
        fs_type: String,
        /// What is mounted, as mountinfo says it.
        mounted: String,
        /// The block device that it is on, and those below that one; names of [`Inventory::devices`].
        devices: Vec<String>,
        /// It is reached over a network: its room is not asked for, since the answer may never come.
        remote: bool,
    },
    /// A network interface. Capacity in bits per second, of each direction.
    Link {
        /// Its name.
        interface: String,
        /// `physical`, `bridge`, `bond`, `vlan`, `veth`, `virtual`, ...
        what: String,
        /// Ports of a bridge, members of a bond.
        members: Vec<String>,
        /// The bridge or bond that it belongs to.
        master: Option<String>,
        /// Bytes per packet.
        mtu: Option<u32>,
        /// What one instance may send, and receive, in bits per second. Nothing: as much as the link gives.
        #[serde(default)]
        instance_rate: Option<Known>,
    },
}

impl LocalKind {
    /// Its CPUs, if it is a set of cores.
    pub fn cpus(&self) -> Option<&CpuSet> {
        match self {
            Self::Cores { cpus, .. } => Some(cpus),
            _ => None,
        }
    }
}

/// Whether a pool can be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = LocalPoolState)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum State {
    /// It can.
    Online,
    /// It is there, but not as it should be. Plans don't use it.
    Degraded {
        /// For people.
        reason: String,
    },
    /// It has no room left. Plans don't use it.
    Full {
        /// For people.
        reason: String,
    },
    /// It is not there.
    Gone {
        /// For people.
        reason: String,
        /// Since when.
        since: UnixMillis,
    },
}

impl State {
    /// Why it can't be used; `None` if it can.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Online => None,
            Self::Degraded { reason } | Self::Full { reason } | Self::Gone { reason, .. } => Some(reason),
        }
    }

    /// In one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Degraded { .. } => "degraded",
            Self::Full { .. } => "full",
            Self::Gone { .. } => "gone",
        }
    }
}

/// All that a host has to sit on, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Inventory {
    /// When.
    pub at: UnixMillis,
    /// CPUs that take work.
    #[schema(value_type = BTreeSet<usize>)]
    pub online: CpuSet,
    /// Block devices that have a size.
    pub devices: Vec<Device>,
    /// Pools: cores, memory, swap, storage, links.
    pub pools: Vec<LocalPool>,
    /// What only counts up, from which rates are made.
    #[serde(skip)]
    pub(crate) counters: Counters,
}

impl Inventory {
    /// The pool of this name.
    pub fn pool(&self, name: &str) -> Option<&LocalPool> {
        self.pools.iter().find(|pool| pool.name == name)
    }
}

/// Counters of the kernel, since its start.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Counters {
    /// CPU -> (time in use, time), in clock ticks.
    pub(crate) cpus: BTreeMap<usize, (u64, u64)>,
    /// Block device -> milliseconds with requests.
    pub(crate) devices: BTreeMap<String, u64>,
    /// Interface -> bytes (received, sent).
    pub(crate) links: BTreeMap<String, (u64, u64)>,
}
