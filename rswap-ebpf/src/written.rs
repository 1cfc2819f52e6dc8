//! Which parts of the files of one file system are written: for the copy of a volume that a program goes on writing.
//!
//! A folio of the page cache that was clean and becomes dirty is told of, whoever writes to it, by a call or through a
//! mapping. What changes a file in other ways (direct I/O, cutting it, taking parts out) is told of as the whole file.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    Global,
    bindings::BPF_RB_NO_WAKEUP,
    helpers::bpf_probe_read_kernel,
    macros::{btf_tracepoint, map, raw_tracepoint},
    maps::{Array, RingBuf},
    programs::{BtfTracePointContext, RawTracePointContext},
};
use rswap_common::layout::{WrittenCounts, WrittenRecord};

use crate::kernel::{KernelPtr, field, offsets};

offsets!(
    FOLIO_FLAGS,
    FOLIO_FLAGS_1,
    FOLIO_INDEX,
    MAPPING_HOST,
    INODE_SB,
    INODE_INO,
    SUPER_BLOCK_DEV,
    KIOCB_FILE,
    FILE_INODE,
    ITER_DATA_SOURCE,
);

/// The file system's device as the kernel numbers it: 20 bits of minor.
#[unsafe(no_mangle)]
static WRITTEN_DEVICE: Global<u32> = Global::new(0);

/// The bit of a folio's flags that says that it has more than one page.
#[unsafe(no_mangle)]
static FOLIO_LARGE_BIT: Global<u32> = Global::new(0);

/// What was written; the agent sets the size.
#[map]
static WRITTEN: RingBuf = RingBuf::with_byte_size(4096, 0);

/// How much was to be told, and how much of it could not be.
#[map]
static WRITTEN_COUNTS: Array<WrittenCounts> = Array::with_max_entries(1, 0);

/// Of `_flags_1`: the logarithm of a large folio's number of pages.
const ORDER_MASK: u64 = 0xff;
/// Of a shift.
const SHIFT_MASK: u64 = 31;
/// `FALLOC_FL_KEEP_SIZE`: with that, or nothing, fallocate(2) changes no contents.
const KEEP_SIZE: i32 = 1;

/// `writeback_dirty_folio(folio, mapping)`: a folio of the mapping was clean, and is dirty.
#[btf_tracepoint(function = "writeback_dirty_folio")]
fn writeback_dirty_folio(ctx: BtfTracePointContext) -> i32 {
    let folio: KernelPtr = ctx.arg(0);
    let mapping: KernelPtr = ctx.arg(1);
    // The verifier wants to see it, since the tracepoint would take none.
    if mapping.is_null() {
        return 0;
    }
    let inode: KernelPtr = field(mapping, &MAPPING_HOST);
    if !is_watched(inode) {
        return 0;
    }
    let is_large = field::<u64>(folio, &FOLIO_FLAGS) >> (u64::from(FOLIO_LARGE_BIT.load()) & SHIFT_MASK) & 1;
    let order = if is_large == 1 { field::<u64>(folio, &FOLIO_FLAGS_1) & ORDER_MASK } else { 0 };
    tell(WrittenRecord {
        inode: field(inode, &INODE_INO),
        first_page: field(folio, &FOLIO_INDEX),
        pages: 1 << (order & SHIFT_MASK),
    });
    0
}

/// `iomap_dio_rw_begin(iocb, iter, flags, done_before)`: direct I/O begins.
#[btf_tracepoint(function = "iomap_dio_rw_begin")]
fn iomap_dio_rw_begin(ctx: BtfTracePointContext) -> i32 {
    let iocb: KernelPtr = ctx.arg(0);
    let iter: KernelPtr = ctx.arg(1);
    let inode: KernelPtr = field(field(iocb, &KIOCB_FILE), &FILE_INODE);
    let is_write = field::<u8>(iter, &ITER_DATA_SOURCE) & 1 == 1;
    if is_write && is_watched(inode) {
        tell(WrittenRecord { inode: field(inode, &INODE_INO), first_page: 0, pages: 0 });
    }
    0
}

// Raw ones: ext4 may be a module, whose types the agent does not read. The first argument of each is the inode.

/// `ext4_truncate_enter(inode)`: it is cut; also when the last link and descriptor are gone.
#[raw_tracepoint(tracepoint = "ext4_truncate_enter")]
fn ext4_truncate_enter(ctx: RawTracePointContext) -> i32 {
    whole(ctx.arg(0))
}

/// `ext4_fallocate_enter(inode, offset, len, mode)`.
#[raw_tracepoint(tracepoint = "ext4_fallocate_enter")]
fn ext4_fallocate_enter(ctx: RawTracePointContext) -> i32 {
    let mode: i32 = ctx.arg(3);
    if mode & !KEEP_SIZE == 0 { 0 } else { whole(ctx.arg(0)) }
}

/// `ext4_punch_hole(inode, offset, len, mode)`.
#[raw_tracepoint(tracepoint = "ext4_punch_hole")]
fn ext4_punch_hole(ctx: RawTracePointContext) -> i32 {
    whole(ctx.arg(0))
}

/// `ext4_zero_range(inode, offset, len, mode)`.
#[raw_tracepoint(tracepoint = "ext4_zero_range")]
fn ext4_zero_range(ctx: RawTracePointContext) -> i32 {
    whole(ctx.arg(0))
}

/// `ext4_collapse_range(inode, offset, len)`.
#[raw_tracepoint(tracepoint = "ext4_collapse_range")]
fn ext4_collapse_range(ctx: RawTracePointContext) -> i32 {
    whole(ctx.arg(0))
}

/// `ext4_insert_range(inode, offset, len)`.
#[raw_tracepoint(tracepoint = "ext4_insert_range")]
fn ext4_insert_range(ctx: RawTracePointContext) -> i32 {
    whole(ctx.arg(0))
}

#[inline(always)]
fn is_watched(inode: KernelPtr) -> bool {
    let block: KernelPtr = field(inode, &INODE_SB);
    field::<u32>(block, &SUPER_BLOCK_DEV) == WRITTEN_DEVICE.load()
}

/// Tells of all of an inode's file.
#[inline(always)]
fn whole(inode: KernelPtr) -> i32 {
    let block: KernelPtr = probed(inode, &INODE_SB).unwrap_or(core::ptr::null());
    if probed::<u32>(block, &SUPER_BLOCK_DEV) == Some(WRITTEN_DEVICE.load())
        && let Some(inode) = probed(inode, &INODE_INO)
    {
        tell(WrittenRecord { inode, first_page: 0, pages: 0 });
    }
    0
}

/// The field of type `T` at `offset` in the structure at `base`, of whose type the verifier knows nothing.
#[inline(always)]
fn probed<T: Copy>(base: KernelPtr, offset: &Global<u64>) -> Option<T> {
    // SAFETY: the helper takes any address; one that can't be read is an error.
    unsafe { bpf_probe_read_kernel(base.byte_add(offset.load() as usize).cast::<T>()) }.ok()
}

#[inline(always)]
fn tell(record: WrittenRecord) {
    let Some(counts) = WRITTEN_COUNTS.get_ptr_mut(0) else { return };
    // Before it is told: whoever has found as many as were to be told of has found all of them.
    // SAFETY: the map gave the pointer, and every writer adds atomically.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*counts).due, 1) };
    if WRITTEN.output::<WrittenRecord>(record, u64::from(BPF_RB_NO_WAKEUP)).is_err() {
        // SAFETY: as above.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*counts).lost, 1) };
    }
}
