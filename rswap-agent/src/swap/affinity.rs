//! Moving threads by their affinity. A new thread inherits the affinity of the one that made it, so passes over all
//! threads end: once a full pass finds none outside of the target, and none was just being made, none can appear there.

use std::collections::BTreeMap;

use super::{SwapError, threads::Threads};
use crate::pool::CpuSet;

/// Passes before it is given up: threads are then made faster than they are found.
const MAX_PASSES: u32 = 1000;
/// Passes in a row that must find nothing. A thread has the affinity that its maker had at the beginning of clone(2), but is
/// listed at its end: one that is not listed yet may still come outside of the target.
const EMPTY_PASSES: u32 = 3;

/// What the threads had before, to restore it.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    before: BTreeMap<i32, CpuSet>,
}

/// Step 1: every thread's affinity as it is.
pub(super) fn snapshot(threads: &mut impl Threads) -> Result<Snapshot, SwapError> {
    let mut before = BTreeMap::new();
    for tid in threads.list()? {
        if let Some(cpus) = threads.affinity(tid)? {
            before.insert(tid, cpus);
        }
    }
    Ok(Snapshot { before })
}

/// Moves every thread that is outside of the target now; returns how many there were.
pub(super) fn pass(
    threads: &mut impl Threads,
    target: &CpuSet,
    snapshot: &mut Snapshot,
) -> Result<u64, SwapError> {
    let mut moved = 0;
    for tid in threads.list()? {
        let Some(cpus) = threads.affinity(tid)? else { continue };
        if cpus == *target {
            continue;
        }
        snapshot.before.entry(tid).or_insert(cpus);
        moved += u64::from(threads.set_affinity(tid, target)?);
    }
    Ok(moved)
}

/// Step 3: repeats until a full pass finds no thread missed. Returns (threads moved, passes).
pub(super) fn settle(
    threads: &mut impl Threads,
    target: &CpuSet,
    snapshot: &mut Snapshot,
) -> Result<(u64, u32), SwapError> {
    let mut total = 0;
    let mut empty = 0;
    for passes in 1..=MAX_PASSES {
        match pass(threads, target, snapshot)? {
            0 if empty + 1 == EMPTY_PASSES => return Ok((total, passes)),
            0 => {
                empty += 1;
                threads.let_them_appear();
            }
            moved => {
                empty = 0;
                total += moved;
            }
        }
    }
    Err(SwapError::Unsettled { passes: MAX_PASSES })
}

/// Step 4: reads every thread's affinity back.
pub(super) fn verify(threads: &mut impl Threads, target: &CpuSet) -> Result<(), SwapError> {
    for tid in threads.list()? {
        match threads.affinity(tid)? {
            Some(found) if found != *target => {
                return Err(SwapError::Misplaced { tid, found, wanted: target.clone() });
            }
            Some(_) | None => {}
        }
    }
    Ok(())
}

/// The way back. A thread that was made meanwhile gets everything that the old ones had. One thread's failure does
/// not keep the others from being restored.
pub(super) fn restore(
    threads: &mut impl Threads,
    target: &CpuSet,
    snapshot: &Snapshot,
) -> Result<(), SwapError> {
    let fallback: CpuSet = snapshot.before.values().flatten().copied().collect();
    for _ in 0..MAX_PASSES {
        let (mut changed, mut failure) = (false, None);
        for tid in threads.list()? {
            let wanted = snapshot.before.get(&tid);
            let result = threads.affinity(tid).and_then(|found| match (found, wanted) {
                (Some(found), Some(wanted)) if found != *wanted => threads.set_affinity(tid, wanted),
                (Some(found), None) if found == *target && found != fallback => {
                    threads.set_affinity(tid, &fallback)
                }
                _ => Ok(false),
            });
            match result {
                Ok(set) => changed |= set,
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            Some(error) => return Err(error),
            None if !changed => return Ok(()),
            None => {}
        }
    }
    Err(SwapError::Unsettled { passes: MAX_PASSES })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Threads in memory. Each listing, the first `spawning` ones make a new thread, which inherits.
    struct Model {
        affinity: BTreeMap<i32, CpuSet>,
        spawning: usize,
        refuses: Option<i32>,
        /// The affinity of one that was being made all the time.
        late: Option<CpuSet>,
    }

    impl Threads for Model {
        fn list(&mut self) -> Result<BTreeSet<i32>, SwapError> {
            let listed: BTreeSet<i32> = self.affinity.keys().copied().collect();
            if self.spawning > 0 {
                self.spawning -= 1;
                // Made after the listing, by the thread that is moved last.
                let (last, cpus) = self.affinity.iter().next_back().map(|(t, c)| (*t, c.clone())).unwrap();
                self.affinity.insert(last + 1, cpus);
            }
            Ok(listed)
        }

        fn affinity(&mut self, tid: i32) -> Result<Option<CpuSet>, SwapError> {
            Ok(self.affinity.get(&tid).cloned())
        }

        fn set_affinity(&mut self, tid: i32, cpus: &CpuSet) -> Result<bool, SwapError> {
            if self.refuses == Some(tid) {
                let source = std::io::Error::from_raw_os_error(libc::EPERM);
                return Err(SwapError::Thread { what: "setting", tid, source });
            }
            Ok(self.affinity.insert(tid, cpus.clone()).is_some())
        }

        fn let_them_appear(&mut self) {
            // Its maker has been moved since.
            if let Some(cpus) = self.late.take() {
                self.affinity.insert(1000, cpus);
            }
        }
    }

    fn model(spawning: usize, refuses: Option<i32>) -> Model {
        let affinity =
            BTreeMap::from([(10, CpuSet::from([0])), (20, CpuSet::from([0, 1])), (30, CpuSet::from([0]))]);
        Model { affinity, spawning, refuses, late: None }
    }

    #[test]
    fn no_thread_is_missed_however_late_it_was_made() {
        let (mut threads, target) = (model(9, None), CpuSet::from([1]));
        let mut before = snapshot(&mut threads).unwrap();
        let (moved, passes) = settle(&mut threads, &target, &mut before).unwrap();
        verify(&mut threads, &target).unwrap();
        assert!(threads.affinity.values().all(|cpus| *cpus == target));
        assert!(moved >= 4 && passes > 1, "{moved} in {passes}");
    }

    #[test]
    fn a_thread_that_appears_after_its_maker_was_moved_is_moved_too() {
        let (mut threads, target) = (model(0, None), CpuSet::from([1]));
        threads.late = Some(CpuSet::from([0]));
        let mut before = snapshot(&mut threads).unwrap();
        settle(&mut threads, &target, &mut before).unwrap();
        verify(&mut threads, &target).unwrap();
        assert!(threads.affinity.contains_key(&1000));
    }

    #[test]
    fn what_never_settles_is_given_up() {
        let (mut threads, target) = (model(10_000, None), CpuSet::from([1]));
        let mut before = snapshot(&mut threads).unwrap();
        assert!(matches!(settle(&mut threads, &target, &mut before), Err(SwapError::Unsettled { .. })));
    }

    #[test]
    fn a_failure_half_way_is_undone() {
        let (mut threads, target) = (model(0, Some(30)), CpuSet::from([1]));
        let old = threads.affinity.clone();
        let mut before = snapshot(&mut threads).unwrap();
        assert!(matches!(settle(&mut threads, &target, &mut before), Err(SwapError::Thread { tid: 30, .. })));
        assert_ne!(threads.affinity, old);
        restore(&mut threads, &target, &before).unwrap();
        assert_eq!(threads.affinity, old);
    }
}
