//! Scheduler: run-queue latency of the task that comes, time on the CPU of the task that goes, and between going and being woken.
//!
//! The kernel keeps both starting points itself (`sched_info`), on the run queue's clock. So one program at
//! `sched_switch` is enough: no hook on wake-ups, no map of start times, no call for the time. The figures
//! are those of `/proc/PID/schedstat`: waiting for a busy CPU, not the time that an idle one takes to wake.
//!
//! Where that is asked for ([`EXACT`]) waits are measured from when somebody wakes a task, or it has to give way, by the monotonic clock: with a hook on
//! wake-ups and a table, and the time that an idle CPU takes.
//!
//! For whom a task waited follows from who left its CPU last: from the moment on at which the last task of its own instance left, others
//! ran, and from the moment on at which the last task of any instance left, nobody's. What it waited before that, it waited for
//! another task of its own, which counted then what that one had waited itself: no moment counts twice. A CPU may be idle meanwhile
//! only if a limit of the group held the task back: that is no waiting for others. Who the others were: [`crate::neighbours`].

use aya_ebpf::{Global, helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};
use aya_log_ebpf::debug;

use rswap_common::{
    histogram::BUCKETS,
    layout::{LEAST_WAIT_NS, OffCpu, SlotRecord},
    tables::{slept_ns, why_of_word},
};

use crate::{
    kernel::{KernelPtr, cgroup_id, field, offsets},
    maps::{Leavers, count, count_shared, leavers, slot_of, slot_record, tally},
    neighbours::{count_neighbours, note_turn},
    sets::{remember_sleeper, remember_waiter, take_sleeper, take_waiter},
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
    TASK_IN_IOWAIT,
);

#[unsafe(no_mangle)]
static SWITCH_HAS_STATE: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
static EXACT: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
static TASK_IN_IOWAIT_MASK: Global<u32> = Global::new(0);

/// The run queue's clock is not the monotonic one.
const CLOCKS_APART_NS: u64 = 1_000_000;

/// Bits of a task's state, which have kept their numbers since the tracepoint tells it.
const TASK_UNINTERRUPTIBLE: u32 = 2;
const TASK_STOPPED: u32 = 4;
const TASK_TRACED: u32 = 8;
const TASK_DEAD: u32 = 0x80;
/// A kernel thread that waits for work is not held up.
const TASK_NOLOAD: u32 = 0x400;
const TASK_FROZEN: u32 = 0x8000;

/// `sched_switch(preempt, prev, next, prev_state)`.
#[btf_tracepoint(function = "sched_switch")]
fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    let prev: KernelPtr = ctx.arg(1);
    let next: KernelPtr = ctx.arg(2);
    let Some(leavers) = leavers() else { return 0 };
    // SAFETY: the map gave the pointer, and only this program on this CPU uses it.
    let leavers = unsafe { &mut *leavers };
    // Both are on this CPU's run queue.
    let now = run_queue_clock(prev);
    let (prev_pid, next_pid): (u32, u32) = (field(prev, &TASK_PID), field(next, &TASK_PID));
    // A turn is the cgroup's in which it began, and who goes is who came last: to find its cgroup again would take four dependent reads.
    let prev_cgroup = if leavers.pid == prev_pid { leavers.cgroup_id } else { task_cgroup_id(prev) };
    let next_cgroup = task_cgroup_id(next);

    // Whoever it is, as at wake-ups: else one that becomes an instance's while it waits would have waited since it was woken. The idle task waits for nothing.
    let mut asked_ns = None;
    if EXACT.load() == 1 && prev_pid != 0 {
        let (preempted, state): (u64, u32) = (ctx.arg(0), ctx.arg(3));
        if preempted & 1 == 1 || state == 0 {
            let now_ns = monotonic_ns();
            remember_waiter(prev_pid, now_ns);
            asked_ns = Some(now_ns);
        }
    }

    let prev_slot = slot_of(prev_cgroup);
    let prev_record = prev_slot.and_then(slot_record);
    if let Some(record) = prev_record {
        // Constant: a kernel whose tracepoint has no such argument does not see it asked for.
        if SWITCH_HAS_STATE.load() == 1 {
            let (preempted, state): (u64, u32) = (ctx.arg(0), ctx.arg(3));
            if preempted & 1 == 0
                && let Some(why) = why_off(prev, state)
            {
                remember_sleeper(prev_pid, now, why);
            }
        }
        let arrived: u64 = field(prev, &TASK_LAST_ARRIVAL);
        if arrived != 0 {
            let ran_ns = now.saturating_sub(arrived);
            // SAFETY: the map gave the pointer, and only this program on this CPU writes this record.
            unsafe {
                count(&mut (*record).on_cpu_ns, ran_ns);
                (*record).left_ns = now;
            }
            debug!(&ctx, "ran {} ns", ran_ns);
        }
        leavers.instance_ns = now;
    } else if prev_pid == 0 {
        leavers.idle_ns = now;
    }
    let (next_slot, next_record) = if next_cgroup == prev_cgroup {
        (prev_slot, prev_record)
    } else {
        let slot = slot_of(next_cgroup);
        (slot, slot.and_then(slot_record))
    };
    if let Some(slot) = next_slot
        && let Some(record) = next_record
    {
        // 0: the task never left its CPU's queue in the kernel's own accounting; it counts nothing either.
        let queued: u64 = field(next, &TASK_LAST_QUEUED);
        let mut waited = if queued != 0 { Some(now.saturating_sub(queued)) } else { None };
        if EXACT.load() == 1 {
            // Not by the run queue's clock: where a wake-up has made somebody give way, the kernel does not set it again until the switch.
            let now_ns = match asked_ns {
                Some(now_ns) => now_ns,
                None => monotonic_ns(),
            };
            let exact_ns = take_waiter(next_pid, now_ns);
            // A wait begins after the last turn: else what was remembered is of an earlier one, as this one's beginning was missed.
            let arrived: u64 = field(next, &TASK_LAST_ARRIVAL);
            let longest_ns =
                if arrived == 0 { u64::MAX } else { now.saturating_sub(arrived) + CLOCKS_APART_NS };
            match exact_ns {
                Some(exact_ns) if exact_ns <= longest_ns => waited = Some(exact_ns),
                _ if waited.is_some() => tally(|of| &mut of.lost_waits),
                _ => {}
            }
        }
        if let Some(waited_ns) = waited {
            // SAFETY: the map gave the pointer, and only this program on this CPU writes this record.
            unsafe { count(&mut (*record).run_queue_ns, waited_ns) };
            debug!(&ctx, "slot {} waited {} ns", slot, waited_ns);
        }
        if queued != 0 {
            if SWITCH_HAS_STATE.load() == 1
                && let Some(word) = take_sleeper(next_pid)
                && let Some(slept_ns) = slept_ns(word, field(next, &TASK_LAST_ARRIVAL), queued)
            {
                // SAFETY: the map gave the pointer, and only this program on this CPU writes this record; there are as many kinds.
                unsafe {
                    let sum = (&raw mut (*record).off_cpu_sums_ns).cast::<u64>().add(why_of_word(word));
                    let buckets =
                        (&raw mut (*record).off_cpu_ns).cast::<[u32; BUCKETS]>().add(why_of_word(word));
                    count_shared(sum, buckets, slept_ns, true);
                }
            }
            if now.saturating_sub(queued) >= LEAST_WAIT_NS {
                // SAFETY: the map gave the pointer, and only this program on this CPU writes this record.
                let own = unsafe { count_others(&mut *record, leavers, queued, now) };
                if let Some(own) = own {
                    count_neighbours(slot, leavers, own, now);
                }
            }
        }
    }
    note_turn(leavers, next, next_pid, next_cgroup, now);
    0
}

/// `sched_migrate_task(p, dest_cpu)`: a task goes from one CPU to another.
#[btf_tracepoint(function = "sched_migrate_task")]
fn sched_migrate_task(ctx: BtfTracePointContext) -> i32 {
    if let Some(slot) = slot_of(task_cgroup_id(ctx.arg(0)))
        && let Some(record) = slot_record(slot)
    {
        // SAFETY: the map gave the pointer, and only this program on this CPU writes this counter.
        unsafe { (*record).migrations = (*record).migrations.wrapping_add(1) };
    }
    0
}

/// `sched_waking(p)`: somebody begins to wake a task. If it is still running, or on its way off the CPU, it waits from the next switch on, which says so.
#[btf_tracepoint(function = "sched_waking")]
fn sched_waking(ctx: BtfTracePointContext) -> i32 {
    woken(ctx.arg(0))
}

/// `sched_wakeup_new(p)`: a new task may run.
#[btf_tracepoint(function = "sched_wakeup_new")]
fn sched_wakeup_new(ctx: BtfTracePointContext) -> i32 {
    woken(ctx.arg(0))
}

/// Also of tasks that are no instance's: to look whose one is takes longer than to write down when it was.
#[inline(always)]
fn woken(task: KernelPtr) -> i32 {
    remember_waiter(field(task, &TASK_PID), monotonic_ns());
    0
}

#[inline(always)]
pub fn monotonic_ns() -> u64 {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    unsafe { bpf_ktime_get_ns() }
}

/// Why a task goes that is in this state; `None` if it could go on at once, or is at its end.
#[inline(always)]
fn why_off(task: KernelPtr, state: u32) -> Option<OffCpu> {
    if state == 0 || state & TASK_DEAD != 0 {
        return None;
    }
    if u32::from(field::<u8>(task, &TASK_IN_IOWAIT)) & TASK_IN_IOWAIT_MASK.load() != 0 {
        return Some(OffCpu::IoWait);
    }
    if state & (TASK_STOPPED | TASK_TRACED | TASK_FROZEN) != 0 {
        return Some(OffCpu::Stopped);
    }
    if state & TASK_UNINTERRUPTIBLE != 0 && state & TASK_NOLOAD == 0 {
        return Some(OffCpu::Blocked);
    }
    Some(OffCpu::Sleep)
}

/// Counts what a task that was queued then, and comes now, has waited for others than its own instance, and for others than instances: since when, if
/// it has waited for others.
#[inline(always)]
fn count_others(record: &mut SlotRecord, leavers: &Leavers, queued: u64, now: u64) -> Option<u64> {
    let own = queued.max(leavers.idle_ns).max(record.left_ns);
    let others_ns = now.saturating_sub(own);
    let foreign_ns = now.saturating_sub(own.max(leavers.instance_ns));
    if foreign_ns >= LEAST_WAIT_NS {
        record.foreign_wait_ns = record.foreign_wait_ns.wrapping_add(foreign_ns);
    }
    if others_ns < LEAST_WAIT_NS {
        return None;
    }
    record.others_wait_ns = record.others_wait_ns.wrapping_add(others_ns);
    Some(own)
}

/// The id of a task's cgroup in the v2 hierarchy (not the one that it is scheduled under: autogroup).
#[inline(always)]
pub fn task_cgroup_id(task: KernelPtr) -> u64 {
    let css_set: KernelPtr = field(task, &TASK_CGROUPS);
    cgroup_id(field(css_set, &CSS_SET_DFL_CGRP))
}

/// The clock of the run queue that a task is on. `se.cfs_rq` is kept up for tasks of every class.
#[inline(always)]
pub fn run_queue_clock(task: KernelPtr) -> u64 {
    let cfs_rq: KernelPtr = field(task, &TASK_CFS_RQ);
    field(field(cfs_rq, &CFS_RQ_RQ), &RQ_CLOCK)
}
