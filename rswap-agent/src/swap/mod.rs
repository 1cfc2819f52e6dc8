//! Plan -> outcome on this host. Every swap has the same five steps: snapshot, transfer, activate,
//! verify, deactivate.

mod affinity;
pub mod cpu;
pub mod memory;
pub mod network;
pub mod share;
pub mod storage;
mod threads;

use std::{io, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    instance::InstanceError,
    pool::{CpuSet, cpu_list},
};

/// Why a swap did not happen. Unless it says so, the instance is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// The target has CPUs that don't run.
    #[error("cannot move to CPU {}: not online; choose another pool or bring it online", cpu_list::format(.cpus))]
    NotOnline {
        /// Which.
        cpus: CpuSet,
    },
    /// The target is empty.
    #[error("cannot move to an empty set of CPUs")]
    NoCpus,
    /// The instance has no threads.
    #[error("nothing to move: there is no thread in the cgroup {cgroup}; has the instance ended?")]
    NoThreads {
        /// Where.
        cgroup: PathBuf,
    },
    /// A file could not be read or written.
    #[error("{what} {path}")]
    File {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A thread's affinity could not be read or set.
    #[error("{what} the CPU affinity of thread {tid}; is the agent allowed to (root, CAP_SYS_NICE)?")]
    Thread {
        /// What was attempted.
        what: &'static str,
        /// On which thread.
        tid: i32,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// New threads kept appearing outside of the target.
    #[error("threads were still found outside of the target after {passes} passes over the cgroup")]
    Unsettled {
        /// Full passes made.
        passes: u32,
    },
    /// A thread is not where it was put.
    #[error(
        "thread {tid} may run on CPU {} instead of {}: does another cpuset limit it?",
        cpu_list::format(.found), cpu_list::format(.wanted)
    )]
    Misplaced {
        /// Which.
        tid: i32,
        /// Where it may run.
        found: CpuSet,
        /// Where it should.
        wanted: CpuSet,
    },
    /// A share was asked for, and there is nothing to limit it by.
    #[error(
        "no cpu controller limits {}: `echo +cpu > {}/cgroup.subtree_control`", cgroup.display(),
        cgroup.parent().unwrap_or(cgroup).display()
    )]
    NoCpuController {
        /// The instance's.
        cgroup: PathBuf,
    },
    /// A share was asked for, and somebody else limits it.
    #[error(
        "process {pid} is in the cgroup {cgroup} of the cpu controller (cgroup v1): it would lose what limits it there"
    )]
    OtherCgroup {
        /// The first one.
        pid: i32,
        /// Where it is.
        cgroup: String,
    },
    /// The controller says something else than what was written.
    #[error("the cpu controller does not hold it to {share:?}")]
    NotLimited {
        /// What was asked for.
        share: share::Share,
    },
    /// The processors could not be read, or what threads chose for themselves not be kept.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// It failed, and so did the way back: some threads may be left on the target.
    #[error("the swap failed ({cause}), and the old placement could not be restored: try `rswap swap` again")]
    NotRestored {
        /// Why the swap failed.
        cause: Box<SwapError>,
        /// Why the way back failed.
        #[source]
        source: Box<SwapError>,
    },
}

/// How the threads were moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// By the cpuset controller of cgroup v2.
    Cpuset,
    /// By every thread's affinity.
    Affinity,
}

/// What a swap did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapReport {
    /// How.
    pub method: Method,
    /// Threads whose placement changed.
    pub threads_moved: u64,
    /// Full passes over the cgroup until no thread was missed.
    pub passes: u32,
    /// How long all of it took, in microseconds.
    pub duration_us: u64,
}
