//! Small tables of words ([`rswap_common::tables`]): requests in flight and tasks that wait for a CPU, each of which has one place; and tasks off the CPU, in sets of
//! a few.
//!
//! Several CPUs write without a lock, one word at once: of two that take the same place in the same moment, one is forgotten. So is one of a set that is full.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use rswap_common::{
    layout::OffCpu,
    tables::{
        REQUEST_PLACES, SLEEPER_SETS, SleeperSet, WAITER_PLACES, request_place, request_word, same_request,
        same_sleeper, same_waiter, sleeper_set, sleeper_word, submitter_of_word, waited_ns, waiter_place,
        waiter_word,
    },
};

use crate::maps::tally;

// What can be mapped into memory begins with a page, so that a set is in one cache line.

/// Requests in flight (by address) -> who submitted them.
#[map]
static REQUESTS: Array<u64> = Array::with_max_entries(REQUEST_PLACES, BPF_F_MMAPABLE);

/// Tasks of instances that are off the CPU (by pid) -> since when, and why.
#[map]
static SLEEPERS: Array<SleeperSet> = Array::with_max_entries(SLEEPER_SETS, BPF_F_MMAPABLE);

/// Tasks that wait for a CPU (by pid) -> since when; the agent leaves one place where nobody asks.
#[map]
static WAITERS: Array<u64> = Array::with_max_entries(WAITER_PLACES, BPF_F_MMAPABLE);

/// Words of one set.
const WAYS: usize = 4;

/// Puts a word into a set, in the place of one that stands for the same; if the set is full, another one has to go for it, and the answer is `false`.
#[inline(always)]
fn put(set: *mut [u64; WAYS], new: u64, same: impl Fn(u64, u64) -> bool) -> bool {
    let words = set.cast::<u64>();
    let (mut place, mut found, mut way) = (words, false, 0);
    while way < WAYS {
        // SAFETY: the map gave the pointer to a set, and `way` is in it. Other CPUs write words of it: one word is read at once.
        let (at, word) = unsafe { (words.add(way), words.add(way).read_volatile()) };
        if same(word, new) {
            (place, found) = (at, true);
            break;
        }
        if word == 0 {
            (place, found) = (at, true);
        }
        way += 1;
    }
    // SAFETY: as above: a place in the set, and one word is written at once.
    unsafe { place.write_volatile(new) };
    found
}

/// Takes out the word of a set that stands for the same as `wanted`.
#[inline(always)]
fn take(set: *mut [u64; WAYS], wanted: u64, same: impl Fn(u64, u64) -> bool) -> Option<u64> {
    let words = set.cast::<u64>();
    let mut way = 0;
    while way < WAYS {
        // SAFETY: as in `put`.
        let (at, word) = unsafe { (words.add(way), words.add(way).read_volatile()) };
        if same(word, wanted) {
            // SAFETY: as in `put`.
            unsafe { at.write_volatile(0) };
            return Some(word);
        }
        way += 1;
    }
    None
}

/// The same as [`put`] for what has a way of its own in its set, which it nearly always finds free: then nothing else is looked at. Another word that stands for
/// the same may be left in another way, from when its own was not free and its end was missed.
#[inline(always)]
fn put_in_own_way(set: *mut [u64; WAYS], way: u32, new: u64, same: impl Fn(u64, u64) -> bool) -> bool {
    // SAFETY: as in `put`.
    let (at, word) = unsafe {
        let at = set.cast::<u64>().add(way as usize % WAYS);
        (at, at.read_volatile())
    };
    if word == 0 || same(word, new) {
        // SAFETY: as in `put`.
        unsafe { at.write_volatile(new) };
        true
    } else {
        put(set, new, same)
    }
}

/// The same as [`take`] for what was put there by [`put_in_own_way`].
#[inline(always)]
fn take_from_own_way(
    set: *mut [u64; WAYS],
    way: u32,
    wanted: u64,
    same: impl Fn(u64, u64) -> bool,
) -> Option<u64> {
    // SAFETY: as in `put`.
    let (at, word) = unsafe {
        let at = set.cast::<u64>().add(way as usize % WAYS);
        (at, at.read_volatile())
    };
    if same(word, wanted) {
        // SAFETY: as in `put`.
        unsafe { at.write_volatile(0) };
        return Some(word);
    }
    take(set, wanted, same)
}

/// Remembers who submitted a request; `key` is its address, with the bytes swapped. Nothing is read of the table, for which the CPU would have to wait.
#[inline(always)]
pub fn remember_request(key: u64, submitter: u32) {
    if let Some(place) = REQUESTS.get_ptr_mut(request_place(key)) {
        // SAFETY: the map gave the pointer. Other CPUs write there, too: one word is written at once.
        unsafe { place.write_volatile(request_word(key, submitter)) };
    }
}

/// Who submitted a request, 0 if nobody knows; forgets it if the request is `complete`.
#[inline(always)]
pub fn request_submitter(key: u64, complete: bool) -> u32 {
    let Some(place) = REQUESTS.get_ptr_mut(request_place(key)) else { return 0 };
    // SAFETY: as above.
    let word = unsafe { place.read_volatile() };
    if !same_request(word, request_word(key, 0)) {
        return 0;
    }
    if complete {
        // SAFETY: as above.
        unsafe { place.write_volatile(0) };
    }
    submitter_of_word(word)
}

/// Remembers since when a task is off the CPU, and why.
#[inline(always)]
pub fn remember_sleeper(pid: u32, since_ns: u64, why: OffCpu) {
    if let Some(set) = SLEEPERS.get_ptr_mut(sleeper_set(pid))
        && !put_in_own_way(set, pid, sleeper_word(pid, since_ns, why), same_sleeper)
    {
        tally(|of| &mut of.lost_sleeps);
    }
}

/// What was remembered of a task, and is not any more.
#[inline(always)]
pub fn take_sleeper(pid: u32) -> Option<u64> {
    let set = SLEEPERS.get_ptr_mut(sleeper_set(pid))?;
    take_from_own_way(set, pid, sleeper_word(pid, 0, OffCpu::Sleep), same_sleeper)
}

/// Remembers since when a task waits for a CPU. Nothing is read of the table.
#[inline(always)]
pub fn remember_waiter(pid: u32, since_ns: u64) {
    if let Some(place) = WAITERS.get_ptr_mut(waiter_place(pid)) {
        // SAFETY: the map gave the pointer. Other CPUs write there, too: one word is written at once.
        unsafe { place.write_volatile(waiter_word(pid, since_ns)) };
    }
}

/// How long a task has waited for a CPU, if it was remembered; it is not any more.
#[inline(always)]
pub fn take_waiter(pid: u32, now_ns: u64) -> Option<u64> {
    let place = WAITERS.get_ptr_mut(waiter_place(pid))?;
    // SAFETY: as above.
    let word = unsafe { place.read_volatile() };
    if !same_waiter(word, waiter_word(pid, 0)) {
        return None;
    }
    // SAFETY: as above.
    unsafe { place.write_volatile(0) };
    Some(waited_ns(word, now_ns))
}
