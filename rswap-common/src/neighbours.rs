//! Who took a CPU while an instance waited for it: what the program at `sched_switch` leaves for the agent.
//!
//! Every CPU keeps its last turns, from when on which cgroup ran. When a task of an instance comes that has waited, its wait is laid over them: each
//! cgroup gets what of it fell into its turns. The sums are kept by CPU and slot, for a few cgroups: a new one takes the place of that which is there
//! for longest, and what was counted of that one since the agent looked is not told.

/// Turns that a CPU keeps. Tasks of one cgroup that follow each other are one turn, however often they take turns among themselves.
pub const TURNS: usize = 64;

/// Cgroups that are told apart by CPU and slot.
pub const NEIGHBOURS: usize = 16;

/// Stands for all threads of the kernel's, in place of a cgroup's id.
pub const KERNEL_THREADS: u64 = u64::MAX;

/// For how long a task of an instance waited while one cgroup ran.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NeighbourCount {
    /// The cgroup's id, or [`KERNEL_THREADS`]; 0: an empty place.
    pub cgroup_id: u64,
    /// In nanoseconds, since it has this place.
    pub waited_ns: u64,
}

/// What one CPU saw of those for whom one slot's instance waited.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourRecord {
    /// The place that is given away next.
    pub next: u64,
    /// Who has which place.
    pub places: [NeighbourCount; NEIGHBOURS],
}

/// A turn of a cgroup's on a CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// As in [`NeighbourCount::cgroup_id`].
    pub cgroup_id: u64,
    /// Since when it runs, by the run queue's clock in nanoseconds. It ends where the next one begins, or before, if the CPU was idle.
    pub since_ns: u64,
}

/// Most cgroups that are no instances, times devices, that block I/O is counted for.
pub const DISK_USERS: u32 = 512;

/// A cgroup that is no instance's, on one device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DiskUser {
    /// As in [`NeighbourCount::cgroup_id`].
    pub cgroup_id: u64,
    /// The device's place in the table.
    pub device: u64,
}

/// What it had done.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUse {
    /// Requests.
    pub requests: u64,
    /// Time that the device took for them, in nanoseconds.
    pub device_ns: u64,
}

// Both sides are compiled apart: the layout must not depend on the target's alignment rules.
const _: () = assert!(size_of::<NeighbourRecord>() == 8 + 16 * NEIGHBOURS);
// The verifier follows a mask, but no remainder.
const _: () = assert!(TURNS.is_power_of_two() && NEIGHBOURS.is_power_of_two());
