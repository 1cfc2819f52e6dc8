//! Why memory was not moved.

use std::{io, path::PathBuf};

use super::BACK_PASSES;
use crate::tracee::TraceeError;

/// Why memory stayed where it was. What is in swap then comes back when it is used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The swap area isn't used by the kernel.
    #[error("{path} is not in /proc/swaps: give it to the kernel with swapon(8)")]
    NoArea {
        /// The device or file.
        path: PathBuf,
    },
    /// Pages would go to another area.
    #[error(
        "pages would go to {other} (priority {priority}), not to {path}: the kernel fills the area of the highest priority \
         first, and takes turns between equal ones; name the pool of {other}, or give {path} a higher priority (swapon -p)"
    )]
    AnotherFirst {
        /// The area wanted.
        path: PathBuf,
        /// Where they would go.
        other: PathBuf,
        /// Its priority.
        priority: i32,
    },
    /// The area is full.
    #[error(
        "{path} has no room for what is cold: {out_mib} MiB of it were out when {room_kib} KiB more would have had room; all of it \
         is in memory"
    )]
    NoRoom {
        /// The area.
        path: PathBuf,
        /// What had gone until then.
        out_mib: u64,
        /// What could be used.
        room_kib: u64,
    },
    /// The agent ends.
    #[error("the agent is stopping; all of it is in memory")]
    Stopping,
    /// Memory is full.
    #[error(
        "{needed_mib} MiB of it are in swap, and {available_mib} MiB of memory are available ({kept_mib} MiB of which are left \
         alone): free some first"
    )]
    NoMemory {
        /// What is in swap.
        needed_mib: u64,
        /// `MemAvailable`.
        available_mib: u64,
        /// What is not used for it.
        kept_mib: u64,
    },
    /// Some pages did not come back.
    #[error(
        "{left_kib} KiB of it are still in swap after {BACK_PASSES} passes; they come back when they are used"
    )]
    Left {
        /// How much.
        left_kib: u64,
    },
    /// There is nothing to bring back, and nowhere else to go.
    #[error("nothing of it is in swap, and {}: there is nothing to move", match .nodes {
        0 | 1 => "this host has one memory node".to_owned(),
        nodes => format!("the pool is all {nodes} memory nodes of this host"),
    })]
    NothingToMove {
        /// How many memory nodes the host has.
        nodes: usize,
    },
    /// Several nodes.
    #[error(
        "this host has {nodes} memory nodes, and rswap does not move pages from node to node: only a pool of all nodes \
         (`nodes = \"{all}\"`) can be named, to bring back what is in swap"
    )]
    Nodes {
        /// How many.
        nodes: usize,
        /// As a list.
        all: String,
    },
    /// The processes of the instance could not be listed.
    #[error("its processes can't be listed")]
    Look {
        /// Why.
        #[source]
        source: Box<TraceeError>,
    },
    /// A process could not be looked at, or its pages not moved.
    #[error("cannot {what} of process {pid}")]
    Process {
        /// What was attempted.
        what: &'static str,
        /// Of which.
        pid: i32,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file of the kernel's could not be read.
    #[error("{0} does not say how much memory is available")]
    Unknown(&'static str),
    /// It failed, and so did the way back.
    #[error("the swap failed ({cause}), and what was out is in swap still; it comes back when it is used")]
    NotRestored {
        /// Why the swap failed.
        cause: Box<MemoryError>,
        /// Why the way back failed.
        #[source]
        source: Box<MemoryError>,
    },
}

impl MemoryError {
    pub(super) fn process(what: &'static str, pid: i32) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Process { what, pid, source }
    }
}
