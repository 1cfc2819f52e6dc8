//! Small tables of words in array maps: which slot a cgroup has, who submitted a block request in flight, and since when a task is off the CPU.
//!
//! An array map is read by a few instructions in place, a hash map by a call; and what one program looks for in a table is in one cache line. The
//! tables are cut into sets: the key's hash chooses the set, and the set is searched. A request, and a task that waits for a CPU, has one place, so that its beginning is
//! written down without a look.

use crate::layout::OffCpu;

/// An odd number whose bits are mixed: multiplied by it, keys that differ little differ in the upper bits.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// Bits of a word that hold the slot.
const SLOT_BITS: u32 = 8;

const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;

const _: () = assert!(crate::layout::MAX_SLOTS as u64 <= SLOT_MASK + 1);

/// The number of sets of the table of cgroups is two to this power.
const CGROUP_SET_BITS: u32 = 13;

/// Sets of the table of cgroups.
pub const CGROUP_SETS: u32 = 1 << CGROUP_SET_BITS;

/// Cgroups of one set: as many words as a cache line has.
pub type CgroupSet = [u64; 8];

/// A set without cgroups. Its used words are always the first ones.
pub const NO_CGROUPS: CgroupSet = [0; 8];

/// The set that a cgroup's slot is looked for in.
#[inline(always)]
pub const fn cgroup_set(cgroup_id: u64) -> u32 {
    (cgroup_id.wrapping_mul(MIX) >> (u64::BITS - CGROUP_SET_BITS)) as u32
}

/// What stands for a cgroup and its slot. The kernel numbers cgroups upwards from 1, and would need years of nothing else to come to 2^56.
#[inline(always)]
pub const fn cgroup_word(cgroup_id: u64, slot: u32) -> u64 {
    cgroup_id << SLOT_BITS | (slot as u64 & SLOT_MASK)
}

/// The cgroup that a word stands for; 0: none.
#[inline(always)]
pub const fn cgroup_of_word(word: u64) -> u64 {
    word >> SLOT_BITS
}

/// The slot in a word.
#[inline(always)]
pub const fn slot_of_word(word: u64) -> u32 {
    (word & SLOT_MASK) as u32
}

/// The number of pages of the table of requests is two to this power.
const REQUEST_PAGE_BITS: u32 = 16;

/// Requests of 4 KiB of the kernel's memory: none is smaller than 256 bytes.
const REQUESTS_PER_PAGE_BITS: u32 = 4;

/// Places of the table of requests. Each request has one of its own, which it shares with those of other pages: with 512 requests in flight one in two
/// thousand loses it to another.
pub const REQUEST_PLACES: u32 = 1 << (REQUEST_PAGE_BITS + REQUESTS_PER_PAGE_BITS);

/// Times are kept in units of about a microsecond.
const TIME_SHIFT: u32 = 10;

/// A number whose every part depends on every part of `key`.
#[inline(always)]
const fn mixed(key: u64) -> u64 {
    (key ^ (key >> 32)).wrapping_mul(MIX)
}

/// The place that a request is looked for in; `key` is its address, with the bytes swapped. Those of one page of the kernel's memory are side by side.
#[inline(always)]
pub const fn request_place(key: u64) -> u32 {
    /// Where an address within a page is in its bytes, swapped.
    const IN_PAGE: u64 = 0xff0f << 48;
    let page = mixed(key & !IN_PAGE) >> (u64::BITS - REQUEST_PAGE_BITS);
    let in_page = (key >> 48) & ((1 << REQUESTS_PER_PAGE_BITS) - 1);
    (page << REQUESTS_PER_PAGE_BITS | in_page) as u32
}

/// Bits of a request's word that hold who submitted it.
const SUBMITTER_BITS: u32 = 32;

/// Stands for the kernel's threads among submitters.
pub const KERNEL_SUBMITTER: u32 = u32::MAX;

/// What stands for a request and who submitted it: a cgroup's id, or [`KERNEL_SUBMITTER`]. 0, which is an empty place, hardly ever.
#[inline(always)]
pub const fn request_word(key: u64, submitter: u32) -> u64 {
    mixed(key) & !((1 << SUBMITTER_BITS) - 1) | submitter as u64
}

/// Whether two words of one place stand for the same request. Of a thousand requests in flight, hardly one in a hundred million times two are taken for one.
#[inline(always)]
pub const fn same_request(word: u64, other: u64) -> bool {
    word >> SUBMITTER_BITS == other >> SUBMITTER_BITS
}

/// Who submitted the request of a word; 0: nobody knows.
#[inline(always)]
pub const fn submitter_of_word(word: u64) -> u32 {
    word as u32
}

/// The kernel gives cgroups' ids upwards from 1; one that has come so far that it does not fit is nobody's.
#[inline(always)]
pub const fn submitter_of_cgroup(cgroup_id: u64) -> u32 {
    if cgroup_id < KERNEL_SUBMITTER as u64 { cgroup_id as u32 } else { 0 }
}

/// The number of sets of the table of tasks that are off the CPU is two to this power.
const SLEEPER_SET_BITS: u32 = 13;

/// Sets of the table of tasks that are off the CPU.
pub const SLEEPER_SETS: u32 = 1 << SLEEPER_SET_BITS;

/// Tasks of one set.
pub type SleeperSet = [u64; 4];

const SLEEPER_TIME_BITS: u32 = 40;
const SLEEPER_TIME_MASK: u64 = (1 << SLEEPER_TIME_BITS) - 1;
const SLEEPER_TAG_SHIFT: u32 = SLEEPER_TIME_BITS + 2;

/// The set that a task is looked for in.
#[inline(always)]
pub const fn sleeper_set(pid: u32) -> u32 {
    (mixed(pid as u64) >> (u64::BITS - SLEEPER_SET_BITS)) as u32
}

/// What stands for a task that is off the CPU since then, by the run queue's clock in nanoseconds, and why. Never 0, which is an empty place.
#[inline(always)]
pub const fn sleeper_word(pid: u32, since_ns: u64, why: OffCpu) -> u64 {
    let tag = (mixed(pid as u64) << SLEEPER_SET_BITS >> SLEEPER_TAG_SHIFT) | 1;
    tag << SLEEPER_TAG_SHIFT
        | (why as u64) << SLEEPER_TIME_BITS
        | (since_ns >> TIME_SHIFT) & SLEEPER_TIME_MASK
}

/// Whether two words stand for the same task.
#[inline(always)]
pub const fn same_sleeper(word: u64, other: u64) -> bool {
    word >> SLEEPER_TAG_SHIFT == other >> SLEEPER_TAG_SHIFT
}

/// Why the task of a word is off the CPU, as [`OffCpu`] numbers it.
#[inline(always)]
pub const fn why_of_word(word: u64) -> usize {
    ((word >> SLEEPER_TIME_BITS) & 3) as usize
}

/// How long the task of a word had been off the CPU when it woke, in nanoseconds, to within 1024; `None` if it was on a CPU since: then the word is of
/// an earlier time, and the task was elsewhere meanwhile.
#[inline(always)]
pub const fn slept_ns(word: u64, arrived_ns: u64, woke_ns: u64) -> Option<u64> {
    /// Later than this is earlier.
    const HALF: u64 = 1 << (SLEEPER_TIME_BITS - 1);
    if arrived_ns == 0 {
        // A new task, which has the number of one that is remembered.
        return None;
    }
    let since = word & SLEEPER_TIME_MASK;
    let after_arrival = since.wrapping_sub(arrived_ns >> TIME_SHIFT) & SLEEPER_TIME_MASK;
    if after_arrival >= HALF {
        return None;
    }
    let slept = (woke_ns >> TIME_SHIFT).wrapping_sub(since) & SLEEPER_TIME_MASK;
    // The clocks of two CPUs may differ a little.
    Some(if slept >= HALF { 0 } else { slept << TIME_SHIFT })
}

const WAITER_PLACE_BITS: u32 = 16;

/// Places of the table of tasks that wait for a CPU. Of tasks that have the same place and wait at the same time, only the last one is remembered: of any that many
/// pids in a row each has its own.
pub const WAITER_PLACES: u32 = 1 << WAITER_PLACE_BITS;

/// Places of one cache line, as a power of two.
const LINE_BITS: u32 = 3;

const WAITER_TIME_BITS: u32 = 40;
const WAITER_TIME_MASK: u64 = (1 << WAITER_TIME_BITS) - 1;

/// The place that a task is looked for in. Threads of one program, whose pids follow each other, run on many CPUs: they are in different cache lines.
#[inline(always)]
pub const fn waiter_place(pid: u32) -> u32 {
    const LINES_BITS: u32 = WAITER_PLACE_BITS - LINE_BITS;
    (pid << LINE_BITS & (WAITER_PLACES - 1)) | (pid >> LINES_BITS & ((1 << LINE_BITS) - 1))
}

/// What stands for a task that waits since then, in nanoseconds. Never 0, which is an empty place: no task that waits has the number 0. The kernel has no pid
/// of more than 22 bits.
#[inline(always)]
pub const fn waiter_word(pid: u32, since_ns: u64) -> u64 {
    (pid as u64) << WAITER_TIME_BITS | since_ns & WAITER_TIME_MASK
}

/// Whether two words stand for the same task.
#[inline(always)]
pub const fn same_waiter(word: u64, other: u64) -> bool {
    word >> WAITER_TIME_BITS == other >> WAITER_TIME_BITS
}

/// How long the task of a word has waited by then, in nanoseconds, as far as it is less than 18 minutes; 0, if the clock is a little behind.
#[inline(always)]
pub const fn waited_ns(word: u64, now_ns: u64) -> u64 {
    const LITTLE_NS: u64 = 1 << 30;
    let waited = now_ns.wrapping_sub(word) & WAITER_TIME_MASK;
    if waited > WAITER_TIME_MASK - LITTLE_NS { 0 } else { waited }
}

/// Places of the table of tasks in page faults, a power of two. Of tasks that have the same place and fault at the same time, only the last one is timed.
pub const FAULT_PLACES: u32 = 1 << 15;

/// The place of a task in page faults. What is there is a [`waiter_word`].
#[inline(always)]
pub const fn fault_place(pid: u32) -> u32 {
    pid & (FAULT_PLACES - 1)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_task_slept_from_when_it_went_to_when_it_woke() {
        let word = sleeper_word(1234, 5_000_000, OffCpu::IoWait);
        assert_eq!(why_of_word(word), OffCpu::IoWait as usize);
        assert!(same_sleeper(word, sleeper_word(1234, 7, OffCpu::Sleep)));
        assert!(!same_sleeper(word, sleeper_word(1235, 5_000_000, OffCpu::IoWait)));
        let slept = slept_ns(word, 4_000_000, 9_000_000).unwrap();
        assert!(slept.abs_diff(4_000_000) <= 1024, "{slept}");
        assert_eq!(slept_ns(word, 4_000_000, 4_990_000), Some(0), "another CPU's clock");
        assert_eq!(slept_ns(word, 6_000_000, 9_000_000), None, "it ran since");
        // The kernel's clock may have come further than there are bits.
        let late = (1 << 50) - 2_000_000;
        let word = sleeper_word(1, late, OffCpu::Stopped);
        assert_eq!(why_of_word(word), OffCpu::Stopped as usize);
        assert!(slept_ns(word, late - 5_000, late + 10_000_000).unwrap().abs_diff(10_000_000) <= 1024);
    }

    #[test]
    fn a_task_waited_since_it_was_woken_however_long_the_clock_has_run() {
        let late = (7 << 40) - 1_000;
        let word = waiter_word(4_194_303, late);
        assert_eq!(waited_ns(word, late + 5_000_123), 5_000_123);
        assert_eq!(waited_ns(word, late - 700), 0, "another clock");
        assert!(
            same_waiter(word, waiter_word(4_194_303, 1)) && !same_waiter(word, waiter_word(4_194_302, late))
        );
        assert!(
            (1..=4_194_303)
                .step_by(997)
                .all(|pid| waiter_place(pid) < WAITER_PLACES && waiter_word(pid, 0) != 0)
        );
    }

    #[test]
    fn tasks_that_wait_have_places_of_their_own_and_those_of_a_program_different_cache_lines() {
        for first in [1, 30_000, 4_194_303 - WAITER_PLACES] {
            let places: std::collections::BTreeSet<_> =
                (first..first + WAITER_PLACES).map(waiter_place).collect();
            assert_eq!(places.len(), WAITER_PLACES as usize);
        }
        assert!((1..1000).all(|pid| waiter_place(pid) >> LINE_BITS != waiter_place(pid + 1) >> LINE_BITS));
    }

    #[test]
    fn a_cgroups_word_holds_it_and_its_slot() {
        let word = cgroup_word(0x1234_5678_9abc, 255);
        assert_eq!((cgroup_of_word(word), slot_of_word(word)), (0x1234_5678_9abc, 255));
        assert_eq!(cgroup_of_word(NO_CGROUPS[0]), 0);
    }

    #[test]
    fn a_requests_word_tells_it_from_all_others_of_its_place() {
        let keys = (0..4_000_000u64).map(|n| (0xffff_8880_0000_0000 + n * 256).swap_bytes());
        let words: std::vec::Vec<u64> =
            keys.filter(|&key| request_place(key) == 7).map(|key| request_word(key, 3)).collect();
        assert!(words.len() > 5, "{}", words.len());
        for (n, word) in words.iter().enumerate() {
            assert!(words[..n].iter().all(|other| !same_request(*word, *other)));
            assert_eq!(submitter_of_word(*word), 3);
        }
        assert!(same_request(request_word(9, 1), request_word(9, KERNEL_SUBMITTER)));
        assert_eq!([7, u64::from(u32::MAX), 1 << 40].map(submitter_of_cgroup), [7, 0, 0]);
    }

    proptest! {
        #[test]
        fn sets_are_in_range_and_words_are_not_empty(key: u64, slot in 0..256u32) {
            prop_assert!(cgroup_set(key) < CGROUP_SETS && request_place(key) < REQUEST_PLACES);
            prop_assert!(sleeper_set(key as u32) < SLEEPER_SETS);
            let word = request_word(key, slot + 1);
            prop_assert_ne!(word, 0);
            prop_assert_eq!(submitter_of_word(word), slot + 1);
        }
    }

    /// The kernel numbers cgroups one after the other, with their files between, and makes requests at a distance of their size.
    #[test]
    fn as_many_as_there_may_be_find_their_places() {
        for files in [1, 20, 64, 77] {
            let mut sets = std::vec![0; CGROUP_SETS as usize];
            for n in 0..u64::from(crate::layout::MAX_CGROUPS) {
                sets[cgroup_set(5_000 + n * files) as usize] += 1;
            }
            assert!(sets.iter().all(|&used| used <= NO_CGROUPS.len()), "{files}: {:?}", sets.iter().max());
        }
        for size in [256, 320, 448, 704, 4096] {
            let requests = (0..1024u64).map(|n| 0xffff_8880_0400_0000 + n * size);
            assert_eq!(places(requests), 1024, "{size}");
        }
        // The first requests of many queues, each queue's in memory of its own.
        let chunk = |n: u64| 0xffff_8880_0000_0000 + (mixed(n) >> 46) * 0x1_0000;
        let found = places((0..512u64).map(|n| chunk(n / 8) + n % 8 * 384));
        assert!(found >= 508, "{found} of 512");
    }

    /// How many different places these requests have; by their addresses.
    fn places(requests: impl Iterator<Item = u64>) -> usize {
        // As the programs have them.
        requests
            .map(|address| request_place(address.swap_bytes()))
            .collect::<std::collections::BTreeSet<_>>()
            .len()
    }
}
