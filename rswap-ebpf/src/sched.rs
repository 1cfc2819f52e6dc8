//! Scheduler: run-queue latency of the task that comes, time on the CPU of the task that goes.
//!
//! The kernel keeps both starting points itself (`sched_info`), on the run queue's clock. So one program at
//! `sched_switch` is enough: no hook on wake-ups, no map of start times, no call for the time. The figures
//! are those of `/proc/PID/schedstat`: waiting for a busy CPU, not the time that an idle one takes to wake.
//!
//! For whom a task waited follows from who left its CPU last: from the moment on at which the last task of its own instance left, others
//! ran, and from the moment on at which the last task of any instance left, nobody's. What it waited before that, it waited for
//! another task of its own, which counted then what that one had waited itself: no moment counts twice. A CPU may be idle meanwhile
//! only if a limit of the group held the task back: that is no waiting for others.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use aya_log_ebpf::debug;

use rswap_common::layout::{LEAST_WAIT_NS, SlotRecord};

use crate::{
    kernel::{KernelPtr, cgroup_id, field, offsets},
    maps::{Leavers, count, leavers, slot_of, slot_record},
};

offsets!(
    TASK_PID,
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
        let now = run_queue_clock(prev);
        if arrived != 0
            && let Some(record) = slot_record(slot)
        {
            let ran_ns = now.saturating_sub(arrived);
            // SAFETY: the map gave the pointer, and only this program on this CPU writes this record.
            unsafe {
                count(&mut (*record).on_cpu_ns, ran_ns);
                (*record).left_ns = now;
            }
            debug!(&ctx, "slot {} ran {} ns", slot, ran_ns);
        }
        if let Some(leavers) = leavers() {
            // SAFETY: the map gave the pointer, and only this program on this CPU uses it.
            unsafe { (*leavers).instance_ns = now };
        }
    } else if field::<i32>(prev, &TASK_PID) == 0
        && let Some(leavers) = leavers()
    {
        // SAFETY: as above.
        unsafe { (*leavers).idle_ns = run_queue_clock(prev) };
    }
    if let Some(slot) = slot_of(task_cgroup_id(next)) {
        // 0: the task never left its CPU's queue in the kernel's own accounting; it counts nothing either.
        let queued: u64 = field(next, &TASK_LAST_QUEUED);
        if queued != 0
            && let Some(record) = slot_record(slot)
        {
            let now = run_queue_clock(next);
            let waited_ns = now.saturating_sub(queued);
            // SAFETY: the map gave the pointer, and only this program on this CPU writes this record.
            unsafe { count(&mut (*record).run_queue_ns, waited_ns) };
            debug!(&ctx, "slot {} waited {} ns", slot, waited_ns);
            if waited_ns >= LEAST_WAIT_NS
                && let Some(leavers) = leavers()
            {
                // SAFETY: as above, of both pointers.
                unsafe { count_others(&mut *record, &*leavers, queued, now) };
            }
        }
    }
    0
}

/// Counts what a task that was queued then, and comes now, has waited for others than its own instance, and for others than instances.
#[inline(always)]
fn count_others(record: &mut SlotRecord, leavers: &Leavers, queued: u64, now: u64) {
    let own = queued.max(leavers.idle_ns).max(record.left_ns);
    let others_ns = now.saturating_sub(own);
    if others_ns >= LEAST_WAIT_NS {
        record.others_wait_ns = record.others_wait_ns.wrapping_add(others_ns);
    }
    let foreign_ns = now.saturating_sub(own.max(leavers.instance_ns));
    if foreign_ns >= LEAST_WAIT_NS {
        record.foreign_wait_ns = record.foreign_wait_ns.wrapping_add(foreign_ns);
    }
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
