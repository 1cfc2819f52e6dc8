//! Programs that do nothing: what it costs that the kernel calls one at all. Only the benchmark loads them.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

/// `sched_switch(..)`.
#[btf_tracepoint(function = "sched_switch")]
fn empty_switch(_ctx: BtfTracePointContext) -> i32 {
    0
}

/// `sched_waking(..)`.
#[btf_tracepoint(function = "sched_waking")]
fn empty_waking(_ctx: BtfTracePointContext) -> i32 {
    0
}

/// `block_io_start(..)`.
#[btf_tracepoint(function = "block_io_start")]
fn empty_io_start(_ctx: BtfTracePointContext) -> i32 {
    0
}

/// `block_rq_complete(..)`.
#[btf_tracepoint(function = "block_rq_complete")]
fn empty_rq_complete(_ctx: BtfTracePointContext) -> i32 {
    0
}
