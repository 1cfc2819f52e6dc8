//! Block I/O: latency per device and direction, and bytes.
//!
//! Whose a request is: the `bio`'s cgroup where the v2 hierarchy has the `io` controller (that also covers
//! asynchronous write-back); else the submitter's, remembered from `block_io_start`, which runs in the
//! submitting task (write-back by kernel threads is then nobody's).

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    Global,
    bindings::BPF_ANY,
    helpers::{bpf_get_current_cgroup_id, bpf_ktime_get_ns},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::debug;
use rswap_common::layout::{BlockDirection, BlockRecord, MAX_DEVICES, OTHER_DEVICE, device_number};

use crate::{
    kernel::{KernelPtr, cgroup_id, field, offsets},
    maps::{DEVICES, REQUESTS, block_record, bucket_of, slot_of},
};

offsets!(
    REQUEST_Q,
    REQUEST_BIO,
    REQUEST_CMD_FLAGS,
    REQUEST_DATA_LEN,
    REQUEST_START_NS,
    REQUEST_IO_START_NS,
    QUEUE_DISK,
    DISK_MAJOR,
    DISK_FIRST_MINOR,
    BIO_BLKG,
    BLKG_BLKCG,
    BLKCG_CGROUP,
);

#[unsafe(no_mangle)]
static BLOCK_BY_BLKCG: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
static BLOCK_BY_SUBMITTER: Global<u32> = Global::new(0);

/// `enum req_op`, the low byte of a request's flags. Flushes, discards and the like carry no data.
const REQ_OP_MASK: u32 = 0xff;
const REQ_OP_READ: u32 = 0;
const REQ_OP_WRITE: u32 = 1;
const REQ_OP_ZONE_APPEND: u32 = 7;

/// `block_io_start(rq)`: remembers which tracked instance submitted the request.
#[btf_tracepoint(function = "block_io_start")]
fn block_io_start(ctx: BtfTracePointContext) -> i32 {
    let request: KernelPtr = ctx.arg(0);
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let submitter = unsafe { bpf_get_current_cgroup_id() };
    if let Some(slot) = slot_of(submitter) {
        // When the table is full the request is counted as nobody's, which is what an absent entry means.
        let _full = REQUESTS.insert(request as u64, slot, u64::from(BPF_ANY));
    }
    0
}

/// `block_rq_complete(rq, error, nr_bytes)`: may come more than once per request, each time with a part.
#[btf_tracepoint(function = "block_rq_complete")]
fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    let request: KernelPtr = ctx.arg(0);
    let bytes: u32 = ctx.arg(2);
    let complete = bytes >= field::<u32>(request, &REQUEST_DATA_LEN);

    let Some(slot) = slot_of_request(request, complete) else { return 0 };
    let direction = match field::<u32>(request, &REQUEST_CMD_FLAGS) & REQ_OP_MASK {
        REQ_OP_READ => BlockDirection::Read,
        REQ_OP_WRITE | REQ_OP_ZONE_APPEND => BlockDirection::Write,
        _ => return 0,
    };
    let Some(record) = block_record(slot, device_of(request), direction) else { return 0 };

    // SAFETY: the map gave the pointer. Other CPUs of the shard write here too: hence the atomic addition.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*record).bytes, bytes.into()) };
    if complete {
        let latency_ns = latency_of(request);
        add_shared(record, latency_ns);
        debug!(&ctx, "slot {} block request took {} ns", slot, latency_ns);
    }
    0
}

/// The slot that a request is charged to; forgets the submitter once the request is `complete`.
#[inline(always)]
fn slot_of_request(request: KernelPtr, complete: bool) -> Option<u32> {
    if BLOCK_BY_BLKCG.load() == 1 {
        let bio: KernelPtr = field(request, &REQUEST_BIO);
        let blkg: KernelPtr = field(bio, &BIO_BLKG);
        let blkcg: KernelPtr = field(blkg, &BLKG_BLKCG);
        // A null pointer on the way reads as 0 in the end, which is no cgroup's id.
        if let Some(slot) = slot_of(cgroup_id(field(blkcg, &BLKCG_CGROUP))) {
            return Some(slot);
        }
    }
    if BLOCK_BY_SUBMITTER.load() == 1 {
        // SAFETY: as for every hash: an entry reused meanwhile would be another request's, but nobody else
        // removes this request's entry while it is in flight.
        let slot = unsafe { REQUESTS.get(request as u64) }.copied();
        if slot.is_some() && complete {
            let _absent = REQUESTS.remove(request as u64);
        }
        return slot;
    }
    None
}

/// Nanoseconds since the request was given to the driver, or since it was made where only that is known.
#[inline(always)]
fn latency_of(request: KernelPtr) -> u64 {
    let issued: u64 = field(request, &REQUEST_IO_START_NS);
    let started: u64 = if issued != 0 { issued } else { field(request, &REQUEST_START_NS) };
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let now = unsafe { bpf_ktime_get_ns() };
    if started == 0 { 0 } else { now.saturating_sub(started) }
}

/// The request's device's place in the table.
#[inline(always)]
fn device_of(request: KernelPtr) -> u32 {
    let queue: KernelPtr = field(request, &REQUEST_Q);
    let disk: KernelPtr = field(queue, &QUEUE_DISK);
    let number =
        device_number(field::<i32>(disk, &DISK_MAJOR) as u32, field::<i32>(disk, &DISK_FIRST_MINOR) as u32);
    let Some(table) = DEVICES.get(0) else { return OTHER_DEVICE };
    let mut place = 0;
    while place < MAX_DEVICES {
        if table.devices[place as usize] == number {
            return place;
        }
        place += 1;
    }
    OTHER_DEVICE
}

/// Counts one sample in a record that other CPUs also write.
#[inline(always)]
fn add_shared(record: *mut BlockRecord, value: u64) {
    let Some(index) = bucket_of(value) else { return };
    // SAFETY: the map gave the pointer, `index` is in range, and every writer adds atomically.
    unsafe {
        let histogram = &raw mut (*record).latency_ns;
        let bucket = (&raw mut (*histogram).buckets).cast::<u32>().add(index);
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*histogram).sum, value);
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(bucket, 1);
    }
}
