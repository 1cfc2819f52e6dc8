//! Moving threads by their affinity. A new thread inherits the affinity of the one that made it, so passes over all
//! threads end: once a full pass finds none outside of the target, and none was just being made, none can appear there.
//!
//! What threads chose for themselves holds within the target, and is remembered (`instance::affinity`).

use super::{SwapError, threads::Threads};
use crate::{
    instance::affinity::{Choice, Choices, Processors},
    pool::CpuSet,
};

/// Passes before it is given up: threads are then made faster than they are found.
const MAX_PASSES: u32 = 1000;
/// Passes in a row that must find nothing. A thread has the affinity that its maker had at the beginning of clone(2), but is
/// listed at its end: one that is not listed yet may still come outside of the target.
const EMPTY_PASSES: u32 = 3;

/// What threads chose, as far as it is known, and the processors of the host.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) choices: Choices,
    pub(super) host: Processors,
}

impl Known {
    /// What thread `tid`, which is found with `found`, is given in `pool`. Its own choice is noted.
    fn given(
        &mut self,
        threads: &mut impl Threads,
        tid: i32,
        found: &CpuSet,
        pool: Option<&CpuSet>,
    ) -> CpuSet {
        let own = self.choices.of(tid, found, &self.host, || threads.started_ticks(tid));
        match &own {
            None => drop(self.choices.own.remove(&tid)),
            Some(cpus) if self.choices.own.get(&tid).is_some_and(|choice| choice.cpus == *cpus) => {}
            Some(cpus) => {
                // One that has ended has no choice.
                if let Some(started_ticks) = threads.started_ticks(tid) {
                    self.choices.own.insert(tid, Choice { started_ticks, cpus: cpus.clone() });
                }
            }
        }
        self.host.given(own.as_ref(), pool)
    }

    /// Step 1: notes what every thread chose.
    pub(super) fn learn(&mut self, threads: &mut impl Threads) -> Result<(), SwapError> {
        let tids = threads.list()?;
        self.choices.own.retain(|tid, _| tids.contains(tid));
        for tid in tids {
            if let Some(found) = threads.affinity(tid)? {
                self.given(threads, tid, &found, None);
            }
        }
        Ok(())
    }

    fn place(
        &mut self,
        threads: &mut impl Threads,
        tid: i32,
        target: Option<&CpuSet>,
    ) -> Result<bool, SwapError> {
        let Some(found) = threads.affinity(tid)? else { return Ok(false) };
        let wanted = self.given(threads, tid, &found, target);
        if self.host.is_listed(&wanted, &found) {
            return Ok(false);
        }
        match threads.set_affinity(tid, &wanted) {
            Err(SwapError::Thread { source, .. })
                if source.raw_os_error() == Some(libc::EINVAL) && threads.is_fixed(tid) =>
            {
                Ok(false)
            }
            set => set,
        }
    }

    /// Moves every thread that is outside of the target (`None`: all processors) now; returns how many there were.
    pub(super) fn pass(
        &mut self,
        threads: &mut impl Threads,
        target: Option<&CpuSet>,
    ) -> Result<u64, SwapError> {
        let mut moved = 0;
        for tid in threads.list()? {
            moved += u64::from(self.place(threads, tid, target)?);
        }
        Ok(moved)
    }

    /// Step 3: repeats until a full pass finds no thread missed. Returns (threads moved, passes).
    pub(super) fn settle(
        &mut self,
        threads: &mut impl Threads,
        target: Option<&CpuSet>,
    ) -> Result<(u64, u32), SwapError> {
        let mut total = 0;
        let mut empty = 0;
        for passes in 1..=MAX_PASSES {
            match self.pass(threads, target)? {
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

    /// Step 4: reads every thread's affinity back. A thread may have chosen anew meanwhile, within the target.
    ///
    /// # Errors
    /// The first that is not where it belongs.
    pub(super) fn verify(
        &mut self,
        threads: &mut impl Threads,
        target: Option<&CpuSet>,
    ) -> Result<(), SwapError> {
        for tid in threads.list()? {
            let Some(found) = threads.affinity(tid)? else { continue };
            let wanted = self.given(threads, tid, &found, target);
            let within = target.is_some_and(|target| found.is_subset(target));
            if !within && !self.host.is_listed(&wanted, &found) && !threads.is_fixed(tid) {
                return Err(SwapError::Misplaced { tid, found, wanted });
            }
        }
        Ok(())
    }

    /// The way back to `before`. One thread's failure does not keep the others from being restored.
    pub(super) fn restore(
        &mut self,
        threads: &mut impl Threads,
        before: Option<&CpuSet>,
    ) -> Result<(), SwapError> {
        for _ in 0..MAX_PASSES {
            let (mut changed, mut failure) = (false, None);
            for tid in threads.list()? {
                match self.place(threads, tid, before) {
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
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// Threads in memory. Each listing, the first `spawning` ones make a new thread, which inherits.
    struct Model {
        affinity: BTreeMap<i32, CpuSet>,
        spawning: usize,
        refuses: Option<i32>,
        /// The kernel has bound it.
        fixed: Option<i32>,
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
            // Processors that are not online are not listed.
            let online = CpuSet::from([0, 1]);
            Ok(self.affinity.get(&tid).map(|cpus| cpus.intersection(&online).copied().collect()))
        }

        fn set_affinity(&mut self, tid: i32, cpus: &CpuSet) -> Result<bool, SwapError> {
            if self.refuses == Some(tid) {
                let source = std::io::Error::from_raw_os_error(libc::EPERM);
                return Err(SwapError::Thread { what: "setting", tid, source });
            }
            if self.fixed == Some(tid) {
                let source = std::io::Error::from_raw_os_error(libc::EINVAL);
                return Err(SwapError::Thread { what: "setting", tid, source });
            }
            Ok(self.affinity.insert(tid, cpus.clone()).is_some())
        }

        fn started_ticks(&mut self, tid: i32) -> Option<u64> {
            self.affinity.contains_key(&tid).then_some(7)
        }

        fn is_fixed(&mut self, tid: i32) -> bool {
            self.fixed == Some(tid)
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
        Model { affinity, spawning, refuses, fixed: None, late: None }
    }

    /// Three threads on a host of three processors, of which one is not running: two that chose, and one that did not.
    fn known(target: &CpuSet) -> Known {
        let host = Processors { possible: CpuSet::from([0, 1, 2]), online: CpuSet::from([0, 1]) };
        let mut choices = Choices::new(1, None);
        choices.places.insert(Some(target.clone()));
        Known { choices, host }
    }

    #[test]
    fn no_thread_is_missed_however_late_it_was_made() {
        let (mut threads, target) = (model(9, None), CpuSet::from([1]));
        let mut known = known(&target);
        known.learn(&mut threads).unwrap();
        let (moved, passes) = known.settle(&mut threads, Some(&target)).unwrap();
        known.verify(&mut threads, Some(&target)).unwrap();
        assert!(threads.affinity.values().all(|cpus| *cpus == target));
        assert!(moved >= 4 && passes > 1, "{moved} in {passes}");
    }

    #[test]
    fn a_thread_that_appears_after_its_maker_was_moved_is_moved_too() {
        let (mut threads, target) = (model(0, None), CpuSet::from([1]));
        threads.late = Some(CpuSet::from([0]));
        let mut known = known(&target);
        known.settle(&mut threads, Some(&target)).unwrap();
        known.verify(&mut threads, Some(&target)).unwrap();
        assert!(threads.affinity.contains_key(&1000));
    }

    #[test]
    fn what_never_settles_is_given_up() {
        let (mut threads, target) = (model(10_000, None), CpuSet::from([1]));
        let settled = known(&target).settle(&mut threads, Some(&target));
        assert!(matches!(settled, Err(SwapError::Unsettled { .. })));
    }

    #[test]
    fn a_failure_half_way_is_undone() {
        let (mut threads, target) = (model(0, Some(30)), CpuSet::from([1]));
        let old = threads.affinity.clone();
        let mut known = known(&target);
        known.learn(&mut threads).unwrap();
        let settled = known.settle(&mut threads, Some(&target));
        assert!(matches!(settled, Err(SwapError::Thread { tid: 30, .. })));
        assert_ne!(threads.affinity, old);
        known.restore(&mut threads, None).unwrap();
        let all = CpuSet::from([0, 1, 2]);
        assert_eq!(
            threads.affinity,
            BTreeMap::from([(20, all), (10, old[&10].clone()), (30, old[&30].clone())])
        );
    }

    #[test]
    fn a_thread_that_the_kernel_has_bound_stays_where_it_is() {
        let (mut threads, target) = (model(0, None), CpuSet::from([1]));
        threads.fixed = Some(10);
        let mut known = known(&target);
        known.settle(&mut threads, Some(&target)).unwrap();
        known.verify(&mut threads, Some(&target)).unwrap();
        assert_eq!(threads.affinity[&10], CpuSet::from([0]));
        assert_eq!(threads.affinity[&30], target);
    }

    #[test]
    fn what_is_not_where_it_belongs_is_found() {
        let (mut threads, target) = (model(0, None), CpuSet::from([1]));
        let mut known = known(&target);
        known.settle(&mut threads, Some(&target)).unwrap();
        // Within the target is right, whoever chose it; on the way to all processors it is not.
        known.verify(&mut threads, Some(&target)).unwrap();
        assert!(matches!(known.verify(&mut threads, None), Err(SwapError::Misplaced { .. })));
        threads.affinity.insert(20, CpuSet::from([0]));
        assert!(matches!(
            known.verify(&mut threads, Some(&target)),
            Err(SwapError::Misplaced { tid: 20, .. })
        ));
    }
}
