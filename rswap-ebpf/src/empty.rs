//! A program that does nothing: what it costs that the kernel calls one at all. Only the benchmark loads it.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

/// `sched_switch(..)`.
#[btf_tracepoint(function = "sched_switch")]
fn empty_switch(_ctx: BtfTracePointContext) -> i32 {
    0
}
