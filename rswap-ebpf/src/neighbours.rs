//! Who took the CPU while an instance waited: a CPU's last turns, and the waits that are laid over them.
//!
//! A switch between two tasks of one cgroup, which is the most frequent one, only compares. Waits of which something is to be told are rare
//! ([`rswap_common::layout::LEAST_WAIT_NS`] and longer), so that going through the turns is paid by those who waited long.

use rswap_common::neighbours::{KERNEL_THREADS, NEIGHBOURS, NeighbourCount, NeighbourRecord, TURNS, Turn};

use crate::{
    kernel::{KernelPtr, field, offsets},
    maps::{Leavers, ROOT_CGROUP_ID, neighbour_record},
};

offsets!(TASK_FLAGS);

/// A task's flag that says that it is a thread of the kernel's.
const PF_KTHREAD: u32 = 0x0020_0000;

/// Whether a task is a thread of the kernel's.
#[inline(always)]
pub fn is_kernel_thread(task: KernelPtr) -> bool {
    field::<u32>(task, &TASK_FLAGS) & PF_KTHREAD != 0
}

/// Remembers that a task of this cgroup comes.
#[inline(always)]
pub fn note_turn(leavers: &mut Leavers, next: KernelPtr, pid: u32, cgroup_id: u64, now: u64) {
    (leavers.pid, leavers.cgroup_id) = (pid, cgroup_id);
    let who = if cgroup_id != ROOT_CGROUP_ID {
        cgroup_id
    } else if pid == 0 {
        // While a CPU is idle nobody waits there whom others hold up: no wait begins before.
        return;
    } else if is_kernel_thread(next) {
        KERNEL_THREADS
    } else {
        cgroup_id
    };
    if leavers.turns[leavers.turn as usize % TURNS].cgroup_id != who {
        leavers.turn = leavers.turn.wrapping_add(1);
        leavers.turns[leavers.turn as usize % TURNS] = Turn { cgroup_id: who, since_ns: now };
    }
}

/// Counts for whom a task of a slot's instance waited from `own` until `now`, when it comes; before its own turn is noted. What is longer ago than
/// the turns reach is left out.
#[inline(always)]
pub fn count_neighbours(slot: u32, leavers: &Leavers, own: u64, now: u64) {
    let Some(record) = neighbour_record(slot) else { return };
    let (mut end, mut number) = (now, leavers.turn);
    for _ in 0..TURNS {
        let turn = &leavers.turns[number as usize % TURNS];
        let since = turn.since_ns.max(own);
        if turn.cgroup_id != 0 && end > since {
            add(record, turn.cgroup_id, end - since);
            end = since;
        }
        if end <= own {
            break;
        }
        number = number.wrapping_sub(1);
    }
}

/// Adds to what is counted of one cgroup.
#[inline(always)]
fn add(record: *mut NeighbourRecord, cgroup_id: u64, waited_ns: u64) {
    // SAFETY: the map gave the pointer, and only this program on this CPU writes this record.
    let record = unsafe { &mut *record };
    for place in &mut record.places {
        if place.cgroup_id == cgroup_id {
            place.waited_ns = place.waited_ns.wrapping_add(waited_ns);
            return;
        }
        if place.cgroup_id == 0 {
            *place = NeighbourCount { cgroup_id, waited_ns };
            return;
        }
    }
    record.places[record.next as usize % NEIGHBOURS] = NeighbourCount { cgroup_id, waited_ns };
    record.next = record.next.wrapping_add(1);
}
