//! Kernel events -> [`Profile`]: what each instance did in the last window.
//!
//! eBPF programs count the events of tracked cgroups into histograms ([`probes`]); a [`Profiler`] maps these
//! into its memory, reads them once per window, and adds what cgroup v2 and /proc say. A probe that this
//! kernel does not take is reported with its reason, and the rest goes on.
//!
//! ```text
//!   sched_switch   block_rq_complete   inet_sock_set_state, call   page_fault_user, perf
//!        |                |                    |                        |
//!        |           cgroup id -> slot, or not counted                  |
//!        v                v                    v                        v
//!   records per CPU and slot (maps) --mmap--> counters at a window's end, less those at its start
//!                                                  |
//!   cpu.stat, *.pressure, /proc/PID/statm ---------+--> Profile
//! ```

mod ages;
mod block_records;
mod bookkeeping;
pub mod btf;
mod cgroup;
mod cgroup_table;
mod children;
mod connections;
mod counting;
mod device_list;
mod disk_users;
pub mod doctor;
mod empty;
mod fault_latency;
mod faults;
mod foreign;
pub mod histogram;
mod instance_files;
mod listeners;
mod neighbours;
mod pressure;
mod probes;
mod profiler;
mod slot_records;
mod slots;
mod sources;
mod tiers;
pub mod written;

use std::{io, path::PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{instance::InstanceName, units::UnixMillis};
use histogram::Histogram;

pub use ages::{AgesCost, PageAges, SPANS_S, UsedWithin};
pub use bookkeeping::{Bookkeeping, Lost};
pub use cgroup::unified_mount;
pub use children::CgroupsKnown;
pub use disk_users::{DeviceNeighbours, DiskNeighbour};
pub use empty::EmptyProgram;
pub use fault_latency::FaultLatency;
pub use faults::Faults;
pub use foreign::{ForeignPrograms, program_ids};
pub use neighbours::{CpuNeighbour, Who};
pub use probes::{ProbeState, ProbeStatus, ProgramCost};
pub use profiler::{ProfileConfig, Profiler, SharedProfile};
pub use tiers::{ProfileCost, Tier, TierCost};

/// What devices are called that are not told apart.
pub const OTHER_DEVICE: &str = "other";

/// Why something could not be profiled.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// A file of the kernel's could not be read.
    #[error("read {path}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the kernel's does not hold what is expected there.
    #[error("understand {path}: {what}", path = path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// The host has no cgroup v2.
    #[error(
        "no cgroup2 file system is mounted here: mount one (`mount -t cgroup2 none /sys/fs/cgroup/unified`)"
    )]
    NoUnifiedHierarchy,
    /// The kernel's type information can't be used.
    #[error(transparent)]
    Types(#[from] btf::BtfError),
    /// An instance is tracked already, in another cgroup.
    #[error("{name} is already profiled, as {path}: untrack it first", path = path.display())]
    AlreadyTracked {
        /// The instance.
        name: InstanceName,
        /// Its cgroup.
        path: PathBuf,
    },
}

/// What one instance did in one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Profile {
    /// Whose.
    pub instance: InstanceName,
    /// End of the window.
    pub at: UnixMillis,
    /// Length of the window, in milliseconds.
    pub window_ms: u64,
    /// Scheduler.
    pub cpu: CpuProfile,
    /// One entry per device and operation that had I/O.
    pub block: Vec<BlockProfile>,
    /// Whether I/O was counted: without the probe, or a slot, no entry says nothing.
    #[serde(default)]
    pub block_counted: bool,
    /// Who used the devices that it waited for, by device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk_neighbours: Vec<DeviceNeighbours>,
    /// Waiting for I/O.
    #[serde(default)]
    pub io: IoProfile,
    /// TCP.
    pub tcp: TcpProfile,
    /// Whether TCP bytes were counted.
    #[serde(default)]
    pub tcp_counted: bool,
    /// Memory.
    pub memory: MemoryProfile,
}

impl Profile {
    /// Bytes per second read and written; `None` where they were not counted.
    pub fn io_bytes_per_s(&self) -> Option<f64> {
        let bytes: u64 = self.block_data().map(|block| block.bytes).sum();
        self.block_counted.then(|| self.per_second(bytes))
    }

    /// Times that devices took for all its reads and writes, in nanoseconds.
    pub fn io_latency_ns(&self) -> Histogram {
        let mut all = Histogram::default();
        self.block_data().for_each(|block| all.merge(&block.latency_ns));
        all
    }

    /// Its reads and writes.
    fn block_data(&self) -> impl Iterator<Item = &BlockProfile> {
        self.block.iter().filter(|block| block.operation.moves_data())
    }

    /// TCP bytes received per second, and sent; `None` where they were not counted.
    pub fn net_bytes_per_s(&self) -> Option<(f64, f64)> {
        self.tcp_counted.then(|| (self.per_second(self.tcp.bytes_in), self.per_second(self.tcp.bytes_out)))
    }

    fn per_second(&self, bytes: u64) -> f64 {
        bytes as f64 * 1e3 / self.window_ms.max(1) as f64
    }
}

/// CPU use and waiting.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CpuProfile {
    /// CPU time used in the window / its length: 1.0 is one core kept busy.
    pub cores: f64,
    /// Time from runnable to running, in nanoseconds: waiting for a busy core, as in `/proc/PID/schedstat`.
    pub run_queue_ns: Histogram,
    /// Whether that is from when a thread was woken (`profile.exact`), and not the kernel's own time.
    #[serde(default)]
    pub exact: bool,
    /// Time on a core between two switches, in nanoseconds.
    pub on_cpu_ns: Histogram,
    /// PSI `some` share of the window, 0 to 1, where the kernel has it.
    pub pressure_some: Option<f64>,
    /// PSI `full` share of the window, 0 to 1, where the kernel has it (5.13): none of its threads ran, and some could have.
    #[serde(default)]
    pub pressure_full: Option<f64>,
    /// Of each CPU on which it ran or waited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub by_cpu: Vec<OnCpu>,
    /// Where this host has several pools of cores (its classes of cores, unless they are configured): time on each, as far as it has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub by_class: Vec<OnClass>,
    /// Times that one of its threads went from one core to another; `None` where that is not counted.
    #[serde(default)]
    pub migrations: Option<u64>,
    /// Who ran while one of its threads waited, the longest first: all of the time that `by_cpu` has of others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub neighbours: Vec<CpuNeighbour>,
    /// Why its threads were not on a CPU and not waiting for one; `None` where the kernel does not tell.
    #[serde(default)]
    pub off_cpu: Option<OffCpuProfile>,
    /// Whether turns on CPUs were counted: without the probe, or a slot, none says nothing.
    #[serde(default)]
    pub counted: bool,
}

impl CpuProfile {
    /// While a limit of its own cgroup holds its tasks back they are queued, too, for nobody else's sake: takes that time, in
    /// nanoseconds over all CPUs, out of what they waited for others.
    fn without_own_limit(&mut self, held_back_ns: u64) {
        let waited_ns: u64 = self.by_cpu.iter().map(|of| of.others_wait_ns).sum();
        if held_back_ns == 0 || waited_ns == 0 {
            return;
        }
        let left = 1.0 - (held_back_ns as f64 / waited_ns as f64).min(1.0);
        for of in &mut self.by_cpu {
            of.others_wait_ns = (of.others_wait_ns as f64 * left) as u64;
            of.foreign_wait_ns = (of.foreign_wait_ns as f64 * left) as u64;
        }
        // Nobody knows whose turns these were of.
        for of in &mut self.neighbours {
            of.waited_ns = (of.waited_ns as f64 * left) as u64;
        }
    }
}

/// Time on the cores of one pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OnClass {
    /// The pool's name.
    pub class: String,
    /// Time that its threads ran there, of turns that ended in the window, in nanoseconds.
    pub ran_ns: u64,
}

/// Time of threads off the CPU until they could run again, by reason. What they waited for a CPU then is in [`CpuProfile::run_queue_ns`]. Counted when it
/// ends: a thread that goes on sleeping is in no window yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OffCpuProfile {
    /// Waiting for something to happen: a timer, a message, a child, a lock of the program's own; or in a frozen cgroup.
    pub sleep_ns: Histogram,
    /// Waiting for I/O.
    pub io_wait_ns: Histogram,
    /// Held up inside of the kernel by something else than I/O: its locks, memory that is made free.
    pub blocked_ns: Histogram,
    /// Stopped by a signal, or by a tracer.
    pub stopped_ns: Histogram,
}

/// Why threads were off the CPU, and not waiting for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OffCpuReason {
    /// For something to happen.
    Sleep,
    /// For I/O.
    IoWait,
    /// For something inside of the kernel.
    Blocked,
    /// As they were stopped.
    Stopped,
}

impl OffCpuReason {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sleep => "sleep",
            Self::IoWait => "io_wait",
            Self::Blocked => "blocked",
            Self::Stopped => "stopped",
        }
    }
}

impl OffCpuProfile {
    /// The times of one reason.
    pub fn of_mut(&mut self, reason: OffCpuReason) -> &mut Histogram {
        match reason {
            OffCpuReason::Sleep => &mut self.sleep_ns,
            OffCpuReason::IoWait => &mut self.io_wait_ns,
            OffCpuReason::Blocked => &mut self.blocked_ns,
            OffCpuReason::Stopped => &mut self.stopped_ns,
        }
    }

    /// All of it.
    pub fn by_reason(&self) -> [(OffCpuReason, &Histogram); 4] {
        [
            (OffCpuReason::Sleep, &self.sleep_ns),
            (OffCpuReason::IoWait, &self.io_wait_ns),
            (OffCpuReason::Blocked, &self.blocked_ns),
            (OffCpuReason::Stopped, &self.stopped_ns),
        ]
    }
}

/// What an instance did on one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OnCpu {
    /// Number of the CPU.
    pub cpu: usize,
    /// How long it ran, as far as its turns have ended, in nanoseconds.
    pub ran_ns: u64,
    /// For how long one of its threads waited while others than it ran, in nanoseconds.
    pub others_wait_ns: u64,
    /// For how long one of its threads waited while nobody ran that belongs to an instance, in nanoseconds.
    pub foreign_wait_ns: u64,
}

/// What block requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Take data from the device.
    Read,
    /// Give data to the device.
    Write,
    /// Make what was written lasting.
    Flush,
    /// Discard, erase or zero, without data that go there.
    Discard,
}

impl Operation {
    /// Whether data go to the device or come from it.
    pub fn moves_data(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
        }
    }
}

/// Block I/O of one device and operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BlockProfile {
    /// `major:minor`; `other` for the devices past the [`rswap_common::layout::MAX_DEVICES`] told apart.
    pub device: String,
    /// What the requests do.
    pub operation: Operation,
    /// Bytes completed in the window.
    pub bytes: u64,
    /// From when the driver was given a request to its end, in nanoseconds: one sample per request.
    pub latency_ns: Histogram,
    /// From when a request was made to when the driver was given it, in nanoseconds: one sample per request of which both are known.
    pub queue_ns: Histogram,
    /// Requests without a sample in `queue_ns`: that time is in `latency_ns`. Flushes always, others where the kernel keeps no statistics.
    pub not_split: u64,
    /// Requests that were under way, on average over the window, as far as they ended in it.
    pub in_flight: f64,
}

/// Block I/O of nobody who is profiled, on one device, since the agent's start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnownedBlock {
    /// As in [`BlockProfile::device`].
    pub device: String,
    /// Reads of others than instances.
    pub reads: RequestCount,
    /// Writes of others than instances, and write-back that the kernel does not call a background one.
    pub writes: RequestCount,
    /// Write-back in the background, of pages that anybody may have written before, instances included.
    pub write_back: RequestCount,
}

/// Block requests that have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RequestCount {
    /// How many.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl From<rswap_common::layout::UnownedCount> for RequestCount {
    fn from(count: rswap_common::layout::UnownedCount) -> Self {
        Self { requests: count.requests, bytes: count.bytes }
    }
}

/// What there is to know of block devices beside instances' profiles.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostBlock {
    /// I/O that is nobody's who is profiled, by device.
    pub unowned: Vec<UnownedBlock>,
    /// Devices in use of which nothing is counted: they complete no requests (dm, md, zram). What they pass on to disks is counted there.
    pub not_covered: Vec<String>,
}

/// Waiting for I/O, of any device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct IoProfile {
    /// PSI `some` share of the window, 0 to 1, where the kernel has it.
    pub pressure_some: Option<f64>,
    /// PSI `full` share of the window, 0 to 1, where the kernel has it: all of its threads that had something to do waited.
    pub pressure_full: Option<f64>,
}

/// TCP traffic.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TcpProfile {
    /// Payload bytes received in the window.
    pub bytes_in: u64,
    /// Payload bytes sent in the window.
    pub bytes_out: u64,
    /// Smoothed round-trip time, in microseconds, one sample of each connection over which something went.
    pub rtt_us: Histogram,
    /// Connections; `None` where they are not counted.
    #[serde(default)]
    pub connections: Option<TcpConnections>,
    /// Times that something was sent again in the window; `None` where that is not counted.
    #[serde(default)]
    pub retransmits: Option<u64>,
    /// Connections to it that were dropped before it could accept them, as the kernel counts them at its sockets, which are looked at every five seconds:
    /// since then. `None` where the kernel does not tell.
    #[serde(default)]
    pub listen_drops: Option<u64>,
}

/// TCP connections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TcpConnections {
    /// Made in the window.
    pub opened: u64,
    /// Made to it in the window, as far as the kernel has finished them, whether the program has accepted them or not.
    pub accepted: u64,
    /// Ended in the window.
    pub closed: u64,
    /// That it tried to make in vain.
    pub failed: u64,
    /// At the window's end, of those that began while it was profiled.
    pub open: u64,
    /// How long those lasted that ended and of which the beginning was seen, in microseconds.
    pub life_us: Histogram,
}

/// Memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemoryProfile {
    /// Resident set, in bytes.
    pub resident_bytes: u64,
    /// Bytes written per second (distinct pages x page size), `None` while writes are not tracked.
    pub dirty_bytes_per_s: Option<f64>,
    /// PSI `some` share of the window, 0 to 1, where the kernel has it.
    pub pressure_some: Option<f64>,
    /// PSI `full` share of the window, 0 to 1, where the kernel has it: all of its threads that had something to do waited.
    #[serde(default)]
    pub pressure_full: Option<f64>,
    /// Page faults in the window.
    #[serde(default)]
    pub faults: Option<Faults>,
    /// How long they took; `None` where that is not measured.
    #[serde(default)]
    pub fault_latency: Option<FaultLatency>,
    /// Pages in the window that reclaim had taken, and that were fetched again; `None` without the memory controller of cgroup v2.
    #[serde(default)]
    pub refaults: Option<u64>,
    /// How long ago its memory was used; `None` where that is not looked at, or not yet.
    #[serde(default)]
    pub ages: Option<PageAges>,
    /// How long ago it was written last; `None` where that is not looked at (`profile.written_budget`), or not yet.
    #[serde(default)]
    pub written_ages: Option<PageAges>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_its_own_limit_held_back_was_not_waited_for_others() {
        let on =
            |cpu, others_wait_ns, foreign_wait_ns| OnCpu { cpu, ran_ns: 5, others_wait_ns, foreign_wait_ns };
        let left_of = |held_back_ns| {
            let mut cpu =
                CpuProfile { by_cpu: vec![on(0, 600, 400), on(1, 200, 0)], ..CpuProfile::default() };
            cpu.neighbours = vec![CpuNeighbour { who: Who::KernelThreads, waited_ns: 800 }];
            cpu.without_own_limit(held_back_ns);
            let others: u64 = cpu.by_cpu.iter().map(|of| of.others_wait_ns).sum();
            assert_eq!(cpu.neighbours[0].waited_ns, others);
            cpu.by_cpu
        };
        assert_eq!(left_of(0), [on(0, 600, 400), on(1, 200, 0)]);
        assert_eq!(left_of(400), [on(0, 300, 200), on(1, 100, 0)]);
        assert_eq!(left_of(4000), [on(0, 0, 0), on(1, 0, 0)]);
    }
}
