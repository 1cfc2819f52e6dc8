//! What the profiler remembers in the kernel, and what had no room there.

use rswap_common::layout::TallyRecord;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::probes::Maps;

/// What the profiler remembers in the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Bookkeeping {
    /// Slots that nobody has.
    pub slots_free: u64,
    /// TCP connections of instances, as they were counted last.
    pub connections: u64,
    /// Pairs of a cgroup that is no instance's and a disk that it used not long ago.
    pub disk_users: u64,
    /// What is in no profile, or less exact there.
    pub lost: Lost,
}

/// What the eBPF programs could not remember, or had forgotten when it was asked for, since the agent's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lost {
    /// Times off the CPU that are in no profile: too many threads slept at a time.
    pub off_cpu: u64,
    /// Waits for a CPU that are as the kernel has them, though `profile.exact` is on.
    pub exact_waits: u64,
    /// Reads and writes of block devices of which nobody knows who made them.
    pub block_requests: u64,
    /// TCP connections that are not counted: there was no room, or no memory, for what is to be remembered of them.
    pub tcp_connections: u64,
}

/// What all CPUs' programs count of themselves.
pub(super) fn tallies(maps: &Maps) -> TallyRecord {
    let all = (0..maps.cpus).filter_map(|cpu| maps.tallies.read(cpu));
    all.fold(TallyRecord::default(), |sum, of| TallyRecord {
        lost_sleeps: sum.lost_sleeps.wrapping_add(of.lost_sleeps),
        lost_waits: sum.lost_waits.wrapping_add(of.lost_waits),
        lost_requests: sum.lost_requests.wrapping_add(of.lost_requests),
        lost_connections: sum.lost_connections.wrapping_add(of.lost_connections),
    })
}

impl From<TallyRecord> for Lost {
    fn from(of: TallyRecord) -> Self {
        Self {
            off_cpu: of.lost_sleeps,
            exact_waits: of.lost_waits,
            block_requests: of.lost_requests,
            tcp_connections: of.lost_connections,
        }
    }
}
