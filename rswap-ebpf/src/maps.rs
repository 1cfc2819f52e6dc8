//! The maps, and the way from a cgroup id to a slot's record.

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    helpers::bpf_get_smp_processor_id,
    macros::map,
    maps::{Array, HashMap, PerCpuArray},
};
use rswap_common::{
    histogram::{BUCKETS, index_of},
    layout::{
        BlockDirection, BlockRecord, DeviceTable, HistogramRecord, MAX_CGROUPS, MAX_REQUESTS, SlotRecord,
        block_index, slot_index,
    },
};

/// kernfs cgroup id -> slot.
#[map]
static CGROUP_SLOTS: HashMap<u64, u32> = HashMap::with_max_entries(MAX_CGROUPS, 0);

/// Scheduler and TCP records; the agent sets the number of entries.
#[map]
static SLOTS: Array<SlotRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Block records; the agent sets the number of entries.
#[map]
static BLOCKS: Array<BlockRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Who left each CPU last.
#[map]
static LEAVERS: PerCpuArray<Leavers> = PerCpuArray::with_max_entries(1, 0);

/// Who left a CPU last, by its run queue's clock in nanoseconds.
pub struct Leavers {
    /// The idle task: since then there has been work.
    pub idle_ns: u64,
    /// A task of any instance.
    pub instance_ns: u64,
}

/// The block devices told apart.
#[map]
pub static DEVICES: Array<DeviceTable> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Requests in flight (by address) -> slot of the submitter.
#[map]
pub static REQUESTS: HashMap<u64, u32> = HashMap::with_max_entries(MAX_REQUESTS, 0);

#[unsafe(no_mangle)]
static SLOT_COUNT: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
static BLOCK_SHARD_MASK: Global<u32> = Global::new(0);

/// The v2 hierarchy's root: never an instance, and where idle tasks and most kernel threads are.
const ROOT_CGROUP_ID: u64 = 1;

/// The slot of a cgroup, if it is tracked.
#[inline(always)]
pub fn slot_of(cgroup_id: u64) -> Option<u32> {
    if cgroup_id == ROOT_CGROUP_ID {
        return None;
    }
    // SAFETY: the kernel's hash needs an unsafe call because an entry removed by the agent meanwhile may be
    // reused; the value is one aligned word and at worst names a slot whose instance has just left.
    unsafe { CGROUP_SLOTS.get(cgroup_id) }.copied()
}

/// The bucket that counts `value`, if the verifier is to believe that there is one.
#[inline(always)]
pub fn bucket_of(value: u64) -> Option<usize> {
    let mut index = index_of(value);
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

/// This CPU's record of a slot.
#[inline(always)]
pub fn slot_record(slot: u32) -> Option<*mut SlotRecord> {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let cpu = unsafe { bpf_get_smp_processor_id() } as u32;
    SLOTS.get_ptr_mut(slot_index(cpu, slot, SLOT_COUNT.load()))
}

/// Who left this CPU last.
#[inline(always)]
pub fn leavers() -> Option<*mut Leavers> {
    LEAVERS.get_ptr_mut(0)
}

/// The record of a slot, device and direction in this CPU's shard. Other CPUs may write it too.
#[inline(always)]
pub fn block_record(slot: u32, device: u32, direction: BlockDirection) -> Option<*mut BlockRecord> {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let cpu = unsafe { bpf_get_smp_processor_id() } as u32;
    let shard = cpu & BLOCK_SHARD_MASK.load();
    BLOCKS.get_ptr_mut(block_index(shard, slot, SLOT_COUNT.load(), device, direction))
}
