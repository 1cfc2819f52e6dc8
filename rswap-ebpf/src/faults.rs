//! Page faults: how long those took that waited (major ones), and all others where that is asked for.
//!
//! A tracepoint says that a fault begins. Nothing says that it ends but the kernel's software events (perf), of which those of major faults are
//! rare: so all that a minor fault pays is that its beginning is noted. A fault that is tried again, as it waited without the lock of the address
//! space, is one: its beginning is noted once, and its event comes when it is over.

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    helpers::{bpf_get_current_task_btf, bpf_get_smp_processor_id},
    macros::{btf_tracepoint, map, perf_event},
    maps::Array,
    programs::{BtfTracePointContext, PerfEventContext},
};
use rswap_common::{
    layout::{FaultKind, FaultRecord, fault_index},
    tables::{FAULT_PLACES, fault_place, same_waiter, waited_ns, waiter_word},
};

use crate::{
    kernel::{KernelPtr, field},
    maps::{SLOT_COUNT, count, slot_of, slot_record},
    sched::{TASK_PID, monotonic_ns, task_cgroup_id},
};

/// How long faults took; the agent sets the number of entries.
#[map]
static FAULTS: Array<FaultRecord> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Tasks of instances in page faults (by pid) -> since when. What a minor fault leaves behind, the next one there writes over.
#[map]
static FAULTS_BEGUN: Array<u64> = Array::with_max_entries(FAULT_PLACES, BPF_F_MMAPABLE);

#[unsafe(no_mangle)]
static FAULT_KINDS: Global<u32> = Global::new(0);

/// `page_fault_user(address, regs, error_code)`: a program's own access faults.
#[btf_tracepoint(function = "page_fault_user")]
fn page_fault_user(_ctx: BtfTracePointContext) -> i32 {
    begins()
}

/// `page_fault_kernel(address, regs, error_code)`: an access of the kernel's for a program, in a system call.
#[btf_tracepoint(function = "page_fault_kernel")]
fn page_fault_kernel(_ctx: BtfTracePointContext) -> i32 {
    begins()
}

/// A major fault is over.
#[perf_event]
fn major_faults(_ctx: PerfEventContext) -> u32 {
    ends(FaultKind::Major)
}

/// A minor fault is over.
#[perf_event]
fn minor_faults(_ctx: PerfEventContext) -> u32 {
    ends(FaultKind::Minor)
}

#[inline(always)]
fn current_task() -> KernelPtr {
    // SAFETY: a helper without arguments; unsafe only for being foreign. There is always a current task.
    unsafe { bpf_get_current_task_btf() }.cast_const().cast()
}

#[inline(always)]
fn begins() -> i32 {
    let task = current_task();
    if let Some(slot) = slot_of(task_cgroup_id(task)) {
        if let Some(record) = slot_record(slot) {
            // SAFETY: the map gave the pointer, and only these two programs write this word. One of another task may come in between, and a count be
            // lost: it changes all the same.
            unsafe { (*record).faults_begun = (*record).faults_begun.wrapping_add(1) };
        }
        let pid = field(task, &TASK_PID);
        if let Some(begun) = FAULTS_BEGUN.get_ptr_mut(fault_place(pid)) {
            // SAFETY: the map gave the pointer; other CPUs may write the word, which is written at once.
            unsafe { begun.write_volatile(waiter_word(pid, monotonic_ns())) };
        }
    }
    0
}

#[inline(always)]
fn ends(kind: FaultKind) -> u32 {
    let task = current_task();
    let Some(slot) = slot_of(task_cgroup_id(task)) else { return 0 };
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let cpu = unsafe { bpf_get_smp_processor_id() } as u32;
    let place = fault_index(cpu, slot, SLOT_COUNT.load(), kind, FAULT_KINDS.load());
    let Some(record) = FAULTS.get_ptr_mut(place) else { return 0 };
    // SAFETY: the map gave the pointer, and only this program on this CPU writes this record: perf calls it with preemption off.
    let record = unsafe { &mut *record };
    let pid = field(task, &TASK_PID);
    if let Some(begun) = FAULTS_BEGUN.get_ptr_mut(fault_place(pid)) {
        // SAFETY: as in `begins`.
        let word = unsafe { begun.read_volatile() };
        if same_waiter(word, waiter_word(pid, 0)) {
            // SAFETY: as in `begins`.
            unsafe { begun.write_volatile(0) };
            count(&mut record.ns, waited_ns(word, monotonic_ns()));
            return 0;
        }
    }
    record.not_timed = record.not_timed.wrapping_add(1);
    0
}
