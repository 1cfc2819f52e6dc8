//! What lies in the maps that the eBPF programs write and the agent maps into its memory.
//!
//! Every tracked instance has a slot ([`MAX_SLOTS`]). Scheduler and TCP records are kept once per slot and CPU, so no two
//! CPUs write to the same record and plain (not atomic) additions are enough. Block records are larger (one
//! per device and operation) and their events are rarer: these are kept in a few shards, with atomic
//! additions. All counters only ever grow (and wrap); the agent works with differences.

use core::ops::Range;

use crate::histogram::BUCKETS;

/// Most slots on one host. Every instance has one of its own, as long as there are any left; the last one is shared by all
/// past those, whose events are counted together.
pub const MAX_SLOTS: u32 = 256;

/// Most cgroups (instances' own and their descendants) that are mapped to slots at a time.
pub const MAX_CGROUPS: u32 = 8192;

/// Block devices told apart. The last index is shared by all devices past the table.
pub const MAX_DEVICES: u32 = 8;

/// Index under which devices that are not in the table are counted.
pub const OTHER_DEVICE: u32 = MAX_DEVICES - 1;

/// A wait for a core that is shorter than this, in nanoseconds, is none for somebody else's sake: so long it takes until a task that
/// gives way has gone.
pub const LEAST_WAIT_NS: u64 = 100_000;

/// Most shards of the block records.
pub const MAX_BLOCK_SHARDS: u32 = 4;

/// Most TCP connections of instances that are remembered at a time.
pub const MAX_CONNECTIONS: u32 = 1 << 16;

/// Of so many the agent hands over the addresses in one call: as many arguments as a tracepoint may have.
pub const CONNECTIONS_AT_ONCE: usize = 12;

/// Names of the maps in the eBPF object.
pub mod map_names {
    /// Array of [`crate::tables::CgroupSet`]: kernfs cgroup id -> slot.
    pub const CGROUPS: &str = "CGROUPS";
    /// Array of [`crate::tables::CgroupSet`]: kernfs id of a cgroup that was made in an instance's -> slot; the programs fill it.
    pub const CHILDREN: &str = "CHILDREN";
    /// Array of one [`super::ChildCounts`].
    pub const CHILD_COUNTS: &str = "CHILD_COUNTS";
    /// Array of words: tasks that wait for a CPU -> since when, index by [`crate::tables::waiter_place`].
    pub const WAITERS: &str = "WAITERS";
    /// Array of [`super::SlotRecord`], index by [`super::slot_index`]; can be mapped into memory.
    pub const SLOTS: &str = "SLOTS";
    /// Array of [`super::BlockRecord`], index by [`super::block_index`]; can be mapped into memory.
    pub const BLOCKS: &str = "BLOCKS";
    /// Array of [`super::UnownedRecord`], index by CPU; can be mapped into memory.
    pub const UNOWNED: &str = "UNOWNED";
    /// Array of [`crate::neighbours::NeighbourRecord`], index by [`super::slot_index`]; can be mapped into memory.
    pub const NEIGHBOURS: &str = "NEIGHBOURS";
    /// Hash map of [`crate::neighbours::DiskUser`] to [`crate::neighbours::DiskUse`].
    pub const DISK_USERS: &str = "DISK_USERS";
    /// Array of [`super::FaultRecord`], index by [`super::fault_index`]; can be mapped into memory.
    pub const FAULTS: &str = "FAULTS";
    /// Array of words: tasks in page faults -> since when, index by [`crate::tables::fault_place`]; can be mapped into memory.
    pub const FAULTS_BEGUN: &str = "FAULTS_BEGUN";
    /// Array of one [`super::DeviceTable`]; can be mapped into memory.
    pub const DEVICES: &str = "DEVICES";
    /// Array of one number: how often the programs that know TCP connections were away.
    pub const TCP_ERA: &str = "TCP_ERA";
    /// Array of [`super::TallyRecord`], index by CPU; can be mapped into memory.
    pub const TALLIES: &str = "TALLIES";
    /// Hash map of sockets' addresses, with their bytes swapped, to what is remembered of instances' connections.
    pub const CONNECTIONS: &str = "CONNECTIONS";
    /// Ring buffer of [`super::WrittenRecord`].
    pub const WRITTEN: &str = "WRITTEN";
    /// Array of one [`super::WrittenCounts`].
    pub const WRITTEN_COUNTS: &str = "WRITTEN_COUNTS";
}

/// A part of a file that was written.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenRecord {
    /// The file's inode number.
    pub inode: u64,
    /// Its first page.
    pub first_page: u64,
    /// How many; 0: nobody knows which parts, and later ones may not be told of.
    pub pages: u64,
}

/// How many [`WrittenRecord`]s there were.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WrittenCounts {
    /// Those that were lost included.
    pub due: u64,
    /// For which there was no room.
    pub lost: u64,
}

/// Cgroups that were made in instances'.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChildCounts {
    /// How many, so far.
    pub made: u64,
    /// Of these, how many have gone since.
    pub gone: u64,
    /// For which another one's place was taken.
    pub displaced: u64,
}

/// One histogram as the programs fill it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistogramRecord {
    /// Exact sum of the samples; wraps.
    pub sum: u64,
    /// Samples per bucket; each wraps.
    pub buckets: [u32; BUCKETS],
}

impl HistogramRecord {
    /// One without samples.
    pub const EMPTY: Self = Self { sum: 0, buckets: [0; BUCKETS] };
}

/// Why a task is off the CPU, and not waiting for it.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffCpu {
    /// It waits for something to happen: a timer, a message, a child, a lock of its own program.
    Sleep = 0,
    /// It waits for I/O, and says so to the kernel (`in_iowait`).
    IoWait = 1,
    /// It can't be interrupted, but says nothing of I/O: locks inside of the kernel, memory that is made free.
    Blocked = 2,
    /// It was stopped, is traced, or frozen.
    Stopped = 3,
}

/// Number of kinds in [`OffCpu`].
pub const OFF_CPU_KINDS: usize = 4;

/// TCP connections, and what went wrong.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpCounts {
    /// Connections that it made.
    pub opened: u64,
    /// Connections that others made to it.
    pub accepted: u64,
    /// Connections that ended, also those of which the beginning was not seen.
    pub closed: u64,
    /// Connections of which the beginning was seen, and that have ended, or of which the end will not be seen.
    pub seen: u64,
    /// Connections that it tried to make, without success.
    pub failed: u64,
    /// Times that something was sent again.
    pub retransmits: u64,
}

/// What one CPU saw of one slot's instance: scheduler and TCP. What every switch writes is together in the first cache line, but for turns on the CPU and the buckets.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRecord {
    /// Sums of what is in `off_cpu_ns`; each wraps.
    pub off_cpu_sums_ns: [u64; OFF_CPU_KINDS],
    /// When a task of it last left the CPU, by the run queue's clock: for the programs.
    pub left_ns: u64,
    /// Time in nanoseconds for which a task of it waited while others than its own ran, from [`LEAST_WAIT_NS`] on: of several tasks that
    /// wait for the same, the time counts once.
    pub others_wait_ns: u64,
    /// The same while nobody ran that belongs to any tracked instance.
    pub foreign_wait_ns: u64,
    /// Time from runnable to running, in nanoseconds.
    pub run_queue_ns: HistogramRecord,
    /// Time on a CPU between two switches, in nanoseconds.
    pub on_cpu_ns: HistogramRecord,
    /// Smoothed TCP round-trip time, in microseconds.
    pub tcp_rtt_us: HistogramRecord,
    /// TCP payload received, in bytes.
    pub tcp_bytes_in: u64,
    /// TCP payload sent, in bytes.
    pub tcp_bytes_out: u64,
    /// Connections, and what went wrong.
    pub tcp: TcpCounts,
    /// How long connections lasted, in microseconds, of which the beginning was seen.
    pub tcp_life_us: HistogramRecord,
    /// Page faults that were seen to begin, some of them twice or not at all: it says whether there were any.
    pub faults_begun: u64,
    /// Times that a task went from one CPU to another.
    pub migrations: u64,
    /// Times off the CPU that ended, by [`OffCpu`], in nanoseconds.
    pub off_cpu_ns: [[u32; BUCKETS]; OFF_CPU_KINDS],
    /// To the end of a cache line.
    pub padding: [u64; 3],
}

impl SlotRecord {
    /// One without events.
    pub const EMPTY: Self = Self {
        off_cpu_sums_ns: [0; OFF_CPU_KINDS],
        left_ns: 0,
        others_wait_ns: 0,
        foreign_wait_ns: 0,
        run_queue_ns: HistogramRecord::EMPTY,
        on_cpu_ns: HistogramRecord::EMPTY,
        tcp_rtt_us: HistogramRecord::EMPTY,
        tcp_bytes_in: 0,
        tcp_bytes_out: 0,
        tcp: TcpCounts { opened: 0, accepted: 0, closed: 0, seen: 0, failed: 0, retransmits: 0 },
        tcp_life_us: HistogramRecord::EMPTY,
        faults_begun: 0,
        migrations: 0,
        off_cpu_ns: [[0; BUCKETS]; OFF_CPU_KINDS],
        padding: [0; 3],
    };
}

/// What a page fault did.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// It waited, for a disk, for swap, or for who serves memory to the program.
    Major = 0,
    /// It was served from memory.
    Minor = 1,
}

/// What one CPU saw of page faults of one kind of one slot's instance.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultRecord {
    /// From the beginning to the end, in nanoseconds.
    pub ns: HistogramRecord,
    /// Faults of which the beginning was not seen.
    pub not_timed: u64,
}

impl FaultRecord {
    /// One without faults.
    pub const EMPTY: Self = Self { ns: HistogramRecord::EMPTY, not_timed: 0 };
}

/// What one shard saw of one slot's instance on one device in one operation. What every request adds to is together at the beginning, in one cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRecord {
    /// Bytes completed.
    pub bytes: u64,
    /// Requests in `device_ns` that are not in `queue_ns`.
    pub not_split: u64,
    /// Sum of what is in `device_ns`; wraps.
    pub device_sum_ns: u64,
    /// Sum of what is in `queue_ns`; wraps.
    pub queue_sum_ns: u64,
    /// Requests by the time from when the driver was given the request to its end, in nanoseconds; of a request of which that is not known, from when it was made.
    pub device_ns: [u32; BUCKETS],
    /// Requests by the time from when the request was made to when the driver was given it, in nanoseconds, where both are known.
    pub queue_ns: [u32; BUCKETS],
}

/// What a block request does, as its records are indexed.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOperation {
    /// Takes data from the device.
    Read = 0,
    /// Gives data to the device.
    Write = 1,
    /// Makes what was written lasting.
    Flush = 2,
    /// Discards, erases or zeroes, without data that go there.
    Discard = 3,
}

/// Requests that were nobody's who is tracked.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnownedCount {
    /// How many.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What requests that are nobody's who is tracked are counted as.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unowned {
    /// Reads.
    Read = 0,
    /// Writes that somebody waits for, or that the kernel does not call background ones.
    Write = 1,
    /// Writes in the background: of pages that anybody, instances included, may have written before.
    WriteBack = 2,
}

/// Number of kinds in [`Unowned`].
pub const UNOWNED_KINDS: usize = 3;

/// What one CPU saw of requests that were nobody's who is tracked, by the device's place and by [`Unowned`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnownedRecord {
    /// All of them.
    pub by_device: [[UnownedCount; UNOWNED_KINDS]; MAX_DEVICES as usize],
    /// Time that devices took for requests of whom nobody knows whose they were, or for whom there was no room, in nanoseconds.
    pub unknown_ns: [u64; MAX_DEVICES as usize],
}

/// What one CPU's programs count of themselves: mostly what they could not remember, or had forgotten when it was asked for, and so is in no profile.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TallyRecord {
    /// Times off the CPU: there was no room for another task that sleeps.
    pub lost_sleeps: u64,
    /// Waits for a CPU that were to be measured exactly, and are as the kernel has them.
    pub lost_waits: u64,
    /// Block requests, reads and writes, of which nobody knows who made them.
    pub lost_requests: u64,
    /// TCP connections for which there was no room, or no memory.
    pub lost_connections: u64,
}

/// The devices told apart, by their place in the table; 0 is an empty place.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceTable {
    /// `major << 20 | minor`, as the kernel numbers devices inside.
    pub devices: [u32; MAX_DEVICES as usize],
}

/// The kernel's number of the device `major:minor`.
#[inline(always)]
pub const fn device_number(major: u32, minor: u32) -> u32 {
    (major << 20) | (minor & 0xf_ffff)
}

/// Place of a slot's record of one CPU, with `slots` slots.
#[inline(always)]
pub const fn slot_index(cpu: u32, slot: u32, slots: u32) -> u32 {
    cpu * slots + slot
}

/// Place of a slot's record of one CPU and kind of fault, with `slots` slots and `kinds` kinds: major ones only, or both.
#[inline(always)]
pub const fn fault_index(cpu: u32, slot: u32, slots: u32, kind: FaultKind, kinds: u32) -> u32 {
    slot_index(cpu, slot, slots) * kinds + kind as u32
}

/// Place of a slot's record of one shard, device and operation, with `slots` slots. Flushes and discards are rare: they share one shard.
#[inline(always)]
pub const fn block_index(shard: u32, slot: u32, slots: u32, device: u32, operation: BlockOperation) -> u32 {
    let (part, column) = match operation {
        BlockOperation::Flush => (0, 0),
        BlockOperation::Discard => (0, 1),
        BlockOperation::Read => (shard + 1, 0),
        BlockOperation::Write => (shard + 1, 1),
    };
    block_range(part, device, slots).start + slot * 2 + column
}

/// Where all records of a device lie in one part of them: the first part has flushes and discards, each other one a shard's reads and writes.
/// They are together, so that the agent need not map those of devices that a host has not.
#[inline(always)]
pub const fn block_range(part: u32, device: u32, slots: u32) -> Range<u32> {
    let start = (part * MAX_DEVICES + device) * slots * 2;
    start..start + slots * 2
}

/// Number of block records.
pub const fn block_records(shards: u32, slots: u32) -> u32 {
    (shards + 1) * slots * MAX_DEVICES * 2
}

/// Shards of the block records on a host with `cpus` CPUs: a power of two.
pub const fn block_shards(cpus: u32) -> u32 {
    let mut shards = 1;
    while shards * 2 <= cpus && shards * 2 <= MAX_BLOCK_SHARDS {
        shards *= 2;
    }
    shards
}

// Both sides are compiled apart: the layout must not depend on the target's alignment rules.
const _: () = assert!(size_of::<HistogramRecord>() == 8 + 4 * BUCKETS);
const _: () = assert!(
    size_of::<SlotRecord>() == 4 * size_of::<HistogramRecord>() + 128 + (8 + 4 * BUCKETS) * OFF_CPU_KINDS
);
const _: () = assert!(size_of::<TallyRecord>() == 4 * 8);
// Each begins with a cache line: maps begin with a page.
const _: () = assert!(size_of::<SlotRecord>().is_multiple_of(64));
const _: () = assert!(size_of::<BlockRecord>() == 2 * size_of::<HistogramRecord>() + 16);
const _: () = assert!(size_of::<FaultRecord>() == size_of::<HistogramRecord>() + 8);
// The first four words of each of an array that begins with a page are in one cache line.
const _: () = assert!(size_of::<BlockRecord>().is_multiple_of(4 * size_of::<u64>()));
const _: () = assert!(size_of::<UnownedRecord>() == MAX_DEVICES as usize * (UNOWNED_KINDS * 16 + 8));

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn places_do_not_overlap_and_fill_the_map() {
        let (shards, slots) = (4, 5);
        let mut seen = BTreeSet::new();
        for shard in 0..shards {
            for slot in 0..slots {
                for device in 0..MAX_DEVICES {
                    for operation in [BlockOperation::Read, BlockOperation::Write] {
                        assert!(seen.insert(block_index(shard, slot, slots, device, operation)));
                    }
                    for operation in [BlockOperation::Flush, BlockOperation::Discard] {
                        let place = block_index(shard, slot, slots, device, operation);
                        assert_eq!(seen.insert(place), shard == 0, "one for all shards");
                    }
                }
            }
        }
        assert_eq!(seen.len() as u32, block_records(shards, slots));
        assert_eq!(seen.last().copied(), Some(block_records(shards, slots) - 1));
    }

    #[test]
    fn shards_are_a_power_of_two_within_the_limit() {
        for (cpus, shards) in [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (256, 4)] {
            assert_eq!(block_shards(cpus), shards);
        }
    }
}
