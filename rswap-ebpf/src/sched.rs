//! Scheduler: run-queue latency of the task that comes, time on the CPU of the task that goes.
//!
//! The kernel keeps both starting points itself (`sched_info`), on the run queue's clock. So one program at
//! `sched_switch` is enough: no hook on wake-ups, no map of start times, no call for the time. The figures
//! are those of `/proc/PID/schedstat`: waiting for a busy CPU, not the time that an idle one takes to wake.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use aya_log_ebpf::debug;

use crate::{
    kernel::{KernelPtr, cgroup_id, field, offsets},
    maps::{count, slot_of, slot_record},
};

offsets!(
    TASK_CGROUPS,
    TASK_LAST_QUEUED,
    TASK_LAST_ARRIVAL,
    TASK_CFS_RQ,
    CFS_RQ_RQ,
    RQ_CLOCK,
    CSS_SET_DFL_CGRP,
);

/// `sched_switch(preempt, prev, next, ..)`.
#[btf_tracepoint(function = "sched_switch")]
fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    let prev: KernelPtr = ctx.arg(1);
    let next: KernelPtr = ctx.arg(2);

    if let Some(slot) = slot_of(task_cgroup_id(prev)) {
        let arrived: u64 = field(prev, &TASK_LAST_ARRIVAL);
        if arrived != 0
            && let Some(record) = slot_record(slot)
        {
            let ran_ns = run_queue_clock(prev).saturating_sub(arrived);
            // SAFETY: the map gave the pointer, and only this program on this CPU writes this histogram.
            unsafe { count(&mut (*record).on_cpu_ns, ran_ns) };
            debug!(&ctx, "slot {} ran {} ns", slot, ran_ns);
        }
    }
    if let Some(slot) = slot_of(task_cgroup_id(next)) {
        // 0: the task never left its CPU's queue in the kernel's own accounting; it counts nothing either.
        let queued: u64 = field(next, &TASK_LAST_QUEUED);
        if queued != 0
            && let Some(record) = slot_record(slot)
        {
            let waited_ns = run_queue_clock(next).saturating_sub(queued);
            // SAFETY: the map gave the pointer, and only this program on this CPU writes this histogram.
            unsafe { count(&mut (*record).run_queue_ns, waited_ns) };
            debug!(&ctx, "slot {} waited {} ns", slot, waited_ns);
        }
    }
    0
}

/// The id of a task's cgroup in the v2 hierarchy (not the one that it is scheduled under: autogroup).
#[inline(always)]
fn task_cgroup_id(task: KernelPtr) -> u64 {
    let css_set: KernelPtr = field(task, &TASK_CGROUPS);
    cgroup_id(field(css_set, &CSS_SET_DFL_CGRP))
}

/// The clock of the run queue that a task is on. `se.cfs_rq` is kept up for tasks of every class.
#[inline(always)]
fn run_queue_clock(task: KernelPtr) -> u64 {
    let cfs_rq: KernelPtr = field(task, &TASK_CFS_RQ);
    field(field(cfs_rq, &CFS_RQ_RQ), &RQ_CLOCK)
}
