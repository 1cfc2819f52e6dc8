//! The maps, and the way from a cgroup id to a slot's record.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    helpers::bpf_get_smp_processor_id,
    macros::map,
    maps::{Array, PerCpuArray},
};
use rswap_common::{
    histogram::{BUCKETS, index_by_table},
    layout::{
        BlockOperation, BlockRecord, ChildCounts, DeviceTable, HistogramRecord, MAX_DEVICES, SlotRecord,
        TallyRecord, UNOWNED_KINDS, Unowned, UnownedCount, UnownedRecord, block_index, slot_index,
    },
    neighbours::{NeighbourRecord, TURNS, Turn},
    tables::{self, CGROUP_SETS, CgroupSet, cgroup_of_word, cgroup_word, slot_of_word},
};

/// kernfs cgroup id -> slot. What can be mapped into memory begins with a page, so that a set is in one cache line.
#[map]
static CGROUPS: Array<CgroupSet> = Array::with_max_entries(CGROUP_SETS, BPF_F_MMAPABLE);

/// The same of cgroups that were made in those, from the moment on at which they are made. Only the programs write it, one at a time: the kernel makes
/// and removes cgroups under a lock.
#[map]
static CHILDREN: Array<CgroupSet> = Array::with_max_entries(CGROUP_SETS, BPF_F_MMAPABLE);

/// How many there were.
#[map]
static CHILD_COUNTS: Array<ChildCounts> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[unsafe(no_mangle)]
static CHILDREN_KNOWN: Global<u32> = Global::new(0);

/// Scheduler and TCP records; the agent sets the number of entries.
#[map]
static SLOTS: Array<SlotRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Block records; the agent sets the number of entries.
#[map]
static BLOCKS: Array<BlockRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Requests that are nobody's who is tracked; the agent sets the number of entries.
#[map]
static UNOWNED: Array<UnownedRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// What the programs count of themselves; the agent sets the number of entries.
#[map]
static TALLIES: Array<TallyRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Who left each CPU last, and who was there.
#[map]
static LEAVERS: PerCpuArray<Leavers> = PerCpuArray::with_max_entries(1, 0);

/// Who left a CPU last, by its run queue's clock in nanoseconds, who is there, and its last turns.
pub struct Leavers {
    /// The cgroup of who came last.
    pub cgroup_id: u64,
    /// Its pid: who came unseen, while no program ran, is not taken for it.
    pub pid: u32,
    /// The idle task: since then there has been work.
    pub idle_ns: u64,
    /// A task of any instance.
    pub instance_ns: u64,
    /// Number of the turn that goes on.
    pub turn: u64,
    /// Turns by their number's last bits.
    pub turns: [Turn; TURNS],
}

/// For whom instances waited; the agent sets the number of entries.
#[map]
static NEIGHBOURS: Array<NeighbourRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// The block devices told apart.
#[map]
pub static DEVICES: Array<DeviceTable> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[unsafe(no_mangle)]
pub static SLOT_COUNT: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
static BLOCK_SHARD_MASK: Global<u32> = Global::new(0);

/// The v2 hierarchy's root: never an instance, and where idle tasks and most kernel threads are.
pub const ROOT_CGROUP_ID: u64 = 1;

/// The slot of a cgroup, if it is tracked.
#[inline(always)]
pub fn slot_of(cgroup_id: u64) -> Option<u32> {
    // 0 is no cgroup's: it is what an empty place holds, and what is read where there is none.
    if cgroup_id <= ROOT_CGROUP_ID {
        return None;
    }
    for &word in CGROUPS.get(tables::cgroup_set(cgroup_id))? {
        if cgroup_of_word(word) == cgroup_id {
            return Some(slot_of_word(word));
        }
        if word == 0 {
            break;
        }
    }
    if CHILDREN_KNOWN.load() == 1 { child_slot(cgroup_id) } else { None }
}

/// The slot of a cgroup that was made in a tracked one.
#[inline(always)]
fn child_slot(cgroup_id: u64) -> Option<u32> {
    let words = CHILDREN.get_ptr_mut(tables::cgroup_set(cgroup_id))?.cast::<u64>();
    let mut way = 0;
    while way < size_of::<CgroupSet>() / size_of::<u64>() {
        // SAFETY: the map gave the pointer to a set, and `way` is in it. Other CPUs write words of it: one word is read at once.
        let word = unsafe { words.add(way).read_volatile() };
        if cgroup_of_word(word) == cgroup_id {
            return Some(slot_of_word(word));
        }
        way += 1;
    }
    None
}

/// From now on the cgroup's events are counted for this slot. Of a set that is full, one is forgotten: the agent finds it, if it lives for long.
#[inline(always)]
pub fn remember_child(cgroup_id: u64, slot: u32) {
    let Some(set) = CHILDREN.get_ptr_mut(tables::cgroup_set(cgroup_id)) else { return };
    let words = set.cast::<u64>();
    let (mut place, mut found, mut way) = (words, false, 0);
    while way < size_of::<CgroupSet>() / size_of::<u64>() {
        // SAFETY: as in `child_slot`; one word is written at once.
        let (at, word) = unsafe { (words.add(way), words.add(way).read_volatile()) };
        if word == 0 {
            (place, found) = (at, true);
        }
        way += 1;
    }
    // SAFETY: as in `child_slot`; one word is written at once.
    unsafe { place.write_volatile(cgroup_word(cgroup_id, slot)) };
    if let Some(counts) = CHILD_COUNTS.get_ptr_mut(0) {
        // SAFETY: the map gave the pointer, and only one program writes it at a time.
        unsafe {
            (*counts).made += 1;
            if !found {
                (*counts).displaced += 1;
            }
        }
    }
}

/// Forgets a cgroup that has gone.
#[inline(always)]
pub fn forget_child(cgroup_id: u64) {
    let Some(set) = CHILDREN.get_ptr_mut(tables::cgroup_set(cgroup_id)) else { return };
    let words = set.cast::<u64>();
    let mut way = 0;
    while way < size_of::<CgroupSet>() / size_of::<u64>() {
        // SAFETY: as in `child_slot`; one word is written at once.
        let (at, word) = unsafe { (words.add(way), words.add(way).read_volatile()) };
        if word != 0 && cgroup_of_word(word) == cgroup_id {
            // SAFETY: as in `child_slot`; one word is written at once.
            unsafe { at.write_volatile(0) };
            if let Some(counts) = CHILD_COUNTS.get_ptr_mut(0) {
                // SAFETY: as in `remember_child`.
                unsafe { (*counts).gone += 1 };
            }
            break;
        }
        way += 1;
    }
}

/// The bucket that counts `value`, if the verifier is to believe that there is one.
#[inline(always)]
pub fn bucket_of(value: u64) -> Option<usize> {
    let mut index = index_by_table(value);
    // The compiler knows that the index is in range and drops the check; the verifier does not know.
    // SAFETY: one move of a register onto itself, which hides from the compiler where the number comes from.
    // (No instruction at all would leave two line records for one address, which the kernel refuses.)
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) index, options(pure, nomem, nostack)) };
    (index < BUCKETS).then_some(index)
}

/// Counts one sample in a record that no other CPU writes.
#[inline(always)]
pub fn count(histogram: &mut HistogramRecord, value: u64) {
    if let Some(index) = bucket_of(value) {
        histogram.sum = histogram.sum.wrapping_add(value);
        // SAFETY: `bucket_of` answers only what is in range; a checked access would check twice.
        let bucket = unsafe { histogram.buckets.get_unchecked_mut(index) };
        *bucket = bucket.wrapping_add(1);
    }
}

/// Counts one sample in a histogram that other CPUs also write, unless this one is `alone`.
#[inline(always)]
pub fn count_shared(sum: *mut u64, buckets: *mut [u32; BUCKETS], value: u64, alone: bool) {
    let Some(index) = bucket_of(value) else { return };
    // SAFETY: a map gave the pointer, and `index` is in range.
    let bucket = unsafe { buckets.cast::<u32>().add(index) };
    add(sum, value, alone);
    if alone {
        // SAFETY: in a record that the map gave, which no other CPU writes.
        unsafe { *bucket = (*bucket).wrapping_add(1) };
    } else {
        // SAFETY: in a record that the map gave, to which every writer adds atomically.
        unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(bucket, 1) };
    }
}

/// Adds to a number that other CPUs also write, unless this one is `alone`.
#[inline(always)]
pub fn add(to: *mut u64, value: u64, alone: bool) {
    if alone {
        // SAFETY: in a record that the map gave, which no other CPU writes.
        unsafe { *to = (*to).wrapping_add(value) };
    } else {
        // SAFETY: in a record that the map gave, to which every writer adds atomically.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(to, value) };
    }
}

/// This CPU's record of a slot.
#[inline(always)]
pub fn slot_record(slot: u32) -> Option<*mut SlotRecord> {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let cpu = unsafe { bpf_get_smp_processor_id() } as u32;
    SLOTS.get_ptr_mut(slot_index(cpu, slot, SLOT_COUNT.load()))
}

/// This CPU's record of those for whom a slot's instance waited.
#[inline(always)]
pub fn neighbour_record(slot: u32) -> Option<*mut NeighbourRecord> {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let cpu = unsafe { bpf_get_smp_processor_id() } as u32;
    NEIGHBOURS.get_ptr_mut(slot_index(cpu, slot, SLOT_COUNT.load()))
}

/// Counts one more of what this CPU's programs count of themselves.
#[inline(always)]
pub fn tally(of: impl FnOnce(&mut TallyRecord) -> &mut u64) {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    if let Some(record) = TALLIES.get_ptr_mut(unsafe { bpf_get_smp_processor_id() } as u32) {
        // SAFETY: the map gave the pointer, and only programs on this CPU write there. Of two that interrupt each other one may not be counted.
        let count = of(unsafe { &mut *record });
        *count = count.wrapping_add(1);
    }
}

/// Who left this CPU last.
#[inline(always)]
pub fn leavers() -> Option<*mut Leavers> {
    LEAVERS.get_ptr_mut(0)
}

/// The record of a slot, device and operation in this CPU's shard. Other CPUs may write it too.
#[inline(always)]
pub fn block_record(slot: u32, device: u32, operation: BlockOperation) -> Option<*mut BlockRecord> {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let cpu = unsafe { bpf_get_smp_processor_id() } as u32;
    let shard = cpu & BLOCK_SHARD_MASK.load();
    BLOCKS.get_ptr_mut(block_index(shard, slot, SLOT_COUNT.load(), device, operation))
}

/// This CPU's record of requests that are nobody's who is tracked.
#[inline(always)]
pub fn unowned_record() -> Option<*mut UnownedRecord> {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    UNOWNED.get_ptr_mut(unsafe { bpf_get_smp_processor_id() } as u32)
}

/// This CPU's count of requests of a device that are nobody's who is tracked.
#[inline(always)]
pub fn unowned_count(device: u32, kind: Unowned) -> Option<*mut UnownedCount> {
    if device >= MAX_DEVICES {
        return None;
    }
    let counts = unowned_record()?.cast::<UnownedCount>();
    // SAFETY: in the record: `device` was checked, and there are as many kinds.
    Some(unsafe { counts.add(device as usize * UNOWNED_KINDS + kind as usize) })
}
