//! Kernel events -> [`Profile`]: what each instance did in the last window.

pub mod histogram;

use serde::{Deserialize, Serialize};

use crate::{instance::InstanceName, units::UnixMillis};
use histogram::Histogram;

/// What one instance did in one window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Whose.
    pub instance: InstanceName,
    /// End of the window.
    pub at: UnixMillis,
    /// Length of the window, in milliseconds.
    pub window_ms: u64,
    /// Scheduler.
    pub cpu: CpuProfile,
    /// One entry per device and direction that had I/O.
    pub block: Vec<BlockProfile>,
    /// TCP.
    pub tcp: TcpProfile,
    /// Memory.
    pub memory: MemoryProfile,
}

/// CPU use and waiting.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuProfile {
    /// CPU time used in the window / its length: 1.0 is one core kept busy.
    pub cores: f64,
    /// Time from runnable to running, in nanoseconds.
    pub run_queue_ns: Histogram,
    /// Time on a core between two switches, in nanoseconds.
    pub on_cpu_ns: Histogram,
    /// PSI `some` share of the window, 0 to 1, where the kernel has it.
    pub pressure_some: Option<f64>,
}

/// Direction of block I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From the device.
    Read,
    /// To the device.
    Write,
}

/// Block I/O of one device and direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockProfile {
    /// `major:minor`.
    pub device: String,
    /// Which way.
    pub direction: Direction,
    /// Bytes completed in the window.
    pub bytes: u64,
    /// Issue to completion, in nanoseconds.
    pub latency_ns: Histogram,
}

/// TCP traffic.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TcpProfile {
    /// Payload bytes received in the window.
    pub bytes_in: u64,
    /// Payload bytes sent in the window.
    pub bytes_out: u64,
    /// Smoothed round-trip time, in microseconds, one sample per received segment.
    pub rtt_us: Histogram,
}

/// Memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryProfile {
    /// Resident set, in bytes.
    pub resident_bytes: u64,
    /// Bytes written per second (distinct pages x page size), `None` while writes are not tracked.
    pub dirty_bytes_per_s: Option<f64>,
    /// PSI `some` share of the window, 0 to 1, where the kernel has it.
    pub pressure_some: Option<f64>,
}
