//! Block I/O: time in the queue and on the device, by device and operation, and bytes.
//!
//! The kernel keeps both starting points itself, where it keeps statistics of the queue (`queue/iostats`, and writeback throttling or an I/O
//! scheduler that asks for it): when the request was made, and when the driver was given it. So no program is needed where requests are issued.
//!
//! Whose a request is: the `bio`'s cgroup where the v2 hierarchy has the `io` controller (that also covers
//! asynchronous write-back); else the submitter's, remembered from `block_io_start`, which runs in the
//! submitting task (write-back by kernel threads is then nobody's). The kernel makes requests at the places of former ones: one whose end was
//! missed leaves its submitter behind, for the next one there that nobody else claims.

use aya_ebpf::{Global, helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};
use aya_log_ebpf::debug;
use rswap_common::layout::{BlockOperation, MAX_DEVICES, OTHER_DEVICE, Unowned, device_number};

use crate::{
    disk_users::{count_disk_use, current_submitter, owner_of_submitter},
    kernel::{KernelPtr, cgroup_id, field, number_of, offsets},
    maps::{DEVICES, ROOT_CGROUP_ID, add, block_record, count_shared, slot_of, tally, unowned_count},
    sets::{remember_request, request_submitter},
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

#[unsafe(no_mangle)]
static BLOCK_SHARDS_SHARED: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
static REQUEST_BACKGROUND: Global<u32> = Global::new(0);

/// `enum req_op`, the low byte of a request's flags.
const REQ_OP_MASK: u32 = 0xff;
const REQ_OP_READ: u32 = 0;
const REQ_OP_WRITE: u32 = 1;
const REQ_OP_FLUSH: u32 = 2;
const REQ_OP_DISCARD: u32 = 3;
const REQ_OP_SECURE_ERASE: u32 = 5;
const REQ_OP_ZONE_APPEND: u32 = 7;
const REQ_OP_WRITE_ZEROES: u32 = 9;

/// `block_io_start(rq)`: remembers who submitted the request.
#[btf_tracepoint(function = "block_io_start")]
fn block_io_start(ctx: BtfTracePointContext) -> i32 {
    let request: KernelPtr = ctx.arg(0);
    remember_request(number_of(request), current_submitter());
    0
}

/// `block_rq_complete(rq, error, nr_bytes)`: may come more than once per request, each time with a part.
#[btf_tracepoint(function = "block_rq_complete")]
fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    let request: KernelPtr = ctx.arg(0);
    let bytes: u32 = ctx.arg(2);
    let length: u32 = field(request, &REQUEST_DATA_LEN);
    let complete = bytes >= length;

    let (owner, slot) = owner_of_request(request, complete);
    let flags: u32 = field(request, &REQUEST_CMD_FLAGS);
    let Some(operation) = operation_of(flags, length) else { return 0 };
    let device = device_of(request);
    let Some(slot) = slot else {
        count_unowned(device, operation, flags, bytes, complete);
        if complete {
            let moves_data = matches!(operation, BlockOperation::Read | BlockOperation::Write);
            if owner == 0 && moves_data && BLOCK_BY_SUBMITTER.load() == 1 {
                tally(|of| &mut of.lost_requests);
            }
            count_disk_use(owner, device, device_ns(request));
        }
        return 0;
    };
    let Some(record) = block_record(slot, device, operation) else { return 0 };
    let alone =
        BLOCK_SHARDS_SHARED.load() == 0 && matches!(operation, BlockOperation::Read | BlockOperation::Write);

    // SAFETY: the map gave the pointer.
    add(unsafe { &raw mut (*record).bytes }, bytes.into(), alone);
    if complete {
        let issued: u64 = field(request, &REQUEST_IO_START_NS);
        let made: u64 = field(request, &REQUEST_START_NS);
        let device_ns = device_ns(request);
        // SAFETY: the map gave the pointer.
        let (device_sum, on_device, queue_sum, in_queue, not_split) = unsafe {
            (
                &raw mut (*record).device_sum_ns,
                &raw mut (*record).device_ns,
                &raw mut (*record).queue_sum_ns,
                &raw mut (*record).queue_ns,
                &raw mut (*record).not_split,
            )
        };
        count_shared(device_sum, on_device, device_ns, alone);
        if issued != 0 && made != 0 {
            count_shared(queue_sum, in_queue, issued.saturating_sub(made), alone);
        } else {
            add(not_split, 1, alone);
        }
        debug!(&ctx, "slot {} block request took {} ns", slot, device_ns);
    }
    0
}

/// What a request that has `length` bytes of data left does. A flush is asked for by an
/// empty write, from which the kernel takes the flag that says so.
#[inline(always)]
fn operation_of(flags: u32, length: u32) -> Option<BlockOperation> {
    match flags & REQ_OP_MASK {
        REQ_OP_READ => Some(BlockOperation::Read),
        REQ_OP_WRITE if length == 0 => Some(BlockOperation::Flush),
        REQ_OP_WRITE | REQ_OP_ZONE_APPEND => Some(BlockOperation::Write),
        REQ_OP_FLUSH => Some(BlockOperation::Flush),
        REQ_OP_DISCARD | REQ_OP_SECURE_ERASE | REQ_OP_WRITE_ZEROES => Some(BlockOperation::Discard),
        _ => None,
    }
}

/// Counts a request that is nobody's who is tracked.
#[inline(always)]
fn count_unowned(device: u32, operation: BlockOperation, flags: u32, bytes: u32, complete: bool) {
    let kind = match operation {
        BlockOperation::Read => Unowned::Read,
        BlockOperation::Write if flags & REQUEST_BACKGROUND.load() != 0 => Unowned::WriteBack,
        BlockOperation::Write => Unowned::Write,
        BlockOperation::Flush | BlockOperation::Discard => return,
    };
    if let Some(count) = unowned_count(device, kind) {
        // SAFETY: the map gave the pointer, and only this program on this CPU writes there.
        unsafe {
            (*count).bytes = (*count).bytes.wrapping_add(bytes.into());
            (*count).requests = (*count).requests.wrapping_add(complete.into());
        }
    }
}

/// How long the device has had a request that ends now, in nanoseconds; where that is not known, for how long it has been there.
#[inline(always)]
fn device_ns(request: KernelPtr) -> u64 {
    let issued: u64 = field(request, &REQUEST_IO_START_NS);
    let since = if issued != 0 { issued } else { field(request, &REQUEST_START_NS) };
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let now = unsafe { bpf_ktime_get_ns() };
    if since == 0 { 0 } else { now.saturating_sub(since) }
}

/// The cgroup that a request is charged to, and its slot, if it is tracked; forgets the submitter once the request is `complete`.
#[inline(always)]
fn owner_of_request(request: KernelPtr, complete: bool) -> (u64, Option<u32>) {
    // Looked up also where the bio says whose it is: the next request at this address may be nobody's.
    let submitter = match BLOCK_BY_SUBMITTER.load() {
        1 => owner_of_submitter(request_submitter(number_of(request), complete)),
        _ => 0,
    };
    let mut charged = 0;
    if BLOCK_BY_BLKCG.load() == 1 {
        let bio: KernelPtr = field(request, &REQUEST_BIO);
        let blkg: KernelPtr = field(bio, &BIO_BLKG);
        let blkcg: KernelPtr = field(blkg, &BLKG_BLKCG);
        // A null pointer on the way reads as 0 in the end, which is no cgroup's id.
        charged = cgroup_id(field(blkcg, &BLKCG_CGROUP));
        if let Some(slot) = slot_of(charged) {
            return (charged, Some(slot));
        }
    }
    if let Some(slot) = slot_of(submitter) {
        return (submitter, Some(slot));
    }
    // The root is charged with what is nobody's, also.
    (if charged > ROOT_CGROUP_ID { charged } else { submitter }, None)
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
