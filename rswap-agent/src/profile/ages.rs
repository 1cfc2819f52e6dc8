//! How long ago an instance's memory was used: its working set over the last second, the last two, four, and so on.
//!
//! The processor marks a page that is used. Marks are taken away once (`clear_refs`), and counted (`smaps_rollup`) a second, two, four ..
//! after that: what is marked then has been used within that time, exactly. Then it begins anew. So each span's figure is of the moment of its
//! own last count, and a count that comes late is one of a longer time, which is told with it.
//!
//! Counting walks the page tables. What both take of a core is measured, and nothing is counted while more was taken than the budget gives.

mod scanner;
mod writes;

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::units::UnixMillis;

pub(super) use scanner::{Means, Scanner, marks, noted_writes};

/// The spans, in seconds. Each is twice the one before.
pub const SPANS_S: [u64; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// So much of the budget may be saved up: counts come at certain times, not evenly.
const SAVED: Duration = Duration::from_secs(60);

/// It is looked after so often whether what stood still as a cycle began goes on: a few small files are read for that.
const LOOK_AFTER: Duration = Duration::from_secs(2);

/// How much of an instance's memory was used how long ago; or written, which is said by the same names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PageAges {
    /// What was used within each span that has been looked at, the shortest first. A longer span never has less.
    pub used: Vec<UsedWithin>,
    /// All of its memory at the last look, counted in the same way. What is in it and in no span was used longer ago.
    pub resident_bytes: u64,
    /// Of that, memory that is not looked at, and in no span: of processes that are too large (`profile.memory_lock_ms`). Where writes are looked at, what
    /// is of files or shared, or has been mapped since, and processes that can't be stopped for a moment.
    pub left_out_bytes: u64,
    /// When it was looked at last.
    pub at: UnixMillis,
}

/// What was used within a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UsedWithin {
    /// One of [`SPANS_S`].
    pub span_s: u64,
    /// How long it really was, in milliseconds.
    pub within_ms: u64,
    /// Memory that was used in it at least once, in bytes. Of a huge page, all; of one that was written, what was written of it.
    pub bytes: u64,
    /// When it ended, and was counted.
    #[serde(default)]
    pub at: UnixMillis,
}

impl PageAges {
    /// Memory by age: from which age on in milliseconds, up to which (`None`: any), and how much, in bytes.
    pub fn by_age(&self) -> Vec<(u64, Option<u64>, u64)> {
        let (mut from_ms, mut below) = (0, 0);
        let mut ages = Vec::with_capacity(self.used.len() + 1);
        for of in &self.used {
            ages.push((from_ms, Some(of.within_ms), of.bytes.saturating_sub(below)));
            (from_ms, below) = (of.within_ms, of.bytes);
        }
        let rest = self.resident_bytes.saturating_sub(self.left_out_bytes).saturating_sub(below);
        ages.push((from_ms, None, rest));
        ages
    }

    /// The working set over one of [`SPANS_S`].
    pub fn within(&self, span_s: u64) -> Option<UsedWithin> {
        self.used.iter().copied().find(|of| of.span_s == span_s)
    }
}

/// What looking at ages costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AgesCost {
    /// `profile.memory_budget`, or `profile.written_budget`: the share of one core that it may take.
    pub budget_share: f64,
    /// What it took of a core, since the first look.
    pub used_share: f64,
    /// How late the most overdue look is, in milliseconds: more than some hundreds, and the budget slows it.
    pub behind_ms: u64,
    /// Looks so far.
    pub looks: u64,
}

/// One count of marked memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    used_bytes: u64,
    resident_bytes: u64,
    left_out_bytes: u64,
}

/// From when marks are taken away until they are again. Times are since the scanner's start.
#[derive(Clone, Debug, Default)]
struct Cycle {
    /// `None`: marks are to be taken away now.
    cleared: Option<Duration>,
    /// Of the next span to be counted.
    next: usize,
    counted: [Option<UsedWithin>; SPANS_S.len()],
    last: Count,
    at: UnixMillis,
    /// Cgroups with processes that stood still as it began, so that their marks could not be taken away: they are left out of all its counts.
    still: BTreeSet<PathBuf>,
    /// From when on it may end early, as one of them goes on.
    again: Duration,
    /// How many before it did so, one after the other.
    early: usize,
}

impl Cycle {
    /// When there is something to do.
    fn due(&self) -> Duration {
        let count = self.count_due();
        if self.still.is_empty() { count } else { count.min(self.again) }
    }

    /// When marks are to be counted, or taken away.
    fn count_due(&self) -> Duration {
        self.cleared.map_or(Duration::ZERO, |cleared| cleared + Duration::from_secs(SPANS_S[self.next]))
    }

    /// Whether marks are to be taken away before its end, as one goes on that stood still when it began. `goes_on` says that, and is not asked each time.
    fn ends_early(&mut self, now: Duration, goes_on: impl FnOnce(&BTreeSet<PathBuf>) -> bool) -> bool {
        if self.still.is_empty() || now < self.again {
            return false;
        }
        self.again = now + LOOK_AFTER;
        let ends = goes_on(&self.still);
        self.early += usize::from(ends);
        ends
    }

    /// Takes in a count, and answers whether marks are to be taken away now.
    fn count(&mut self, now: Duration, at: UnixMillis, count: Count) -> bool {
        (self.last, self.at) = (count, at);
        let Some(cleared) = self.cleared else { return true };
        let within = now.saturating_sub(cleared);
        // One that is late is a count of the longest span that has passed.
        let passed = SPANS_S.iter().rposition(|span| Duration::from_secs(*span) <= within);
        if let Some(span) = passed.filter(|span| *span >= self.next) {
            let (span_s, within_ms) = (SPANS_S[span], within.as_millis() as u64);
            self.counted[span] = Some(UsedWithin { span_s, within_ms, bytes: count.used_bytes, at });
            self.next = span + 1;
        }
        let ends = self.next == SPANS_S.len();
        if ends {
            self.early = 0;
        }
        ends
    }

    /// Marks were taken away.
    fn was_cleared(&mut self, now: Duration) {
        self.was_cleared_but(now, BTreeSet::new());
    }

    /// The same, but for those of processes in the cgroups `still`.
    fn was_cleared_but(&mut self, now: Duration, still: BTreeSet<PathBuf>) {
        (self.cleared, self.next) = (Some(now), 0);
        if still != self.still {
            // Of other processes than will be counted: beside what is left out now, it would tell of some twice, or not at all.
            self.counted = Default::default();
        }
        if still.is_empty() {
            self.early = 0;
        }
        // Twice as long each time: where one or the other of them always stands still as it begins, it must not begin every other second for ever.
        self.again = now + Duration::from_secs(SPANS_S[self.early.min(SPANS_S.len() - 1)]);
        self.still = still;
    }

    fn ages(&self) -> Option<PageAges> {
        let mut least = 0;
        let used = self.counted.iter().flatten().map(|counted| {
            // What was used within a second was used within a minute as well, whatever was counted a minute ago.
            least = counted.bytes.max(least);
            UsedWithin { bytes: least, ..*counted }
        });
        let used: Vec<_> = used.collect();
        (!used.is_empty()).then(|| PageAges {
            used,
            resident_bytes: self.last.resident_bytes.max(least + self.last.left_out_bytes),
            left_out_bytes: self.last.left_out_bytes,
            at: self.at,
        })
    }
}

/// What may be taken of a core.
#[derive(Clone, Debug)]
struct Budget {
    share: f64,
    spent: Duration,
    /// Of the spent, what the savings that were lost would have paid.
    forgiven: Duration,
}

impl Budget {
    fn new(share: f64) -> Self {
        Self { share, spent: Duration::ZERO, forgiven: Duration::ZERO }
    }

    /// How long nothing may be done, `elapsed` after the start.
    fn pause(&mut self, elapsed: Duration) -> Duration {
        let earned = elapsed.mul_f64(self.share);
        let saved = earned.saturating_sub(self.forgiven + self.spent);
        // What was saved in a day of nothing to do must not be spent at once.
        self.forgiven += saved.saturating_sub(SAVED.mul_f64(self.share));
        let owed = (self.forgiven + self.spent).saturating_sub(earned);
        if owed.is_zero() { Duration::ZERO } else { owed.div_f64(self.share.max(1e-6)) }
    }

    fn spend(&mut self, took: Duration) {
        self.spent += took;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: UnixMillis = UnixMillis(7);

    fn s(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn used(used_bytes: u64) -> Count {
        Count { used_bytes, resident_bytes: 1000, left_out_bytes: 0 }
    }

    #[test]
    fn spans_are_counted_in_turn_and_late_counts_are_of_longer_ones() {
        let mut cycle = Cycle::default();
        assert!(cycle.count(s(5.0), AT, used(900)), "there was no clearing yet: nothing is told by that");
        assert_eq!(cycle.ages(), None);
        cycle.was_cleared(s(10.0));
        assert_eq!(cycle.due(), s(11.0));
        assert!(!cycle.count(s(11.1), AT, used(100)));
        assert_eq!(cycle.due(), s(12.0));
        // Late: the span of two seconds is passed over.
        assert!(!cycle.count(s(15.5), AT, used(300)));
        assert_eq!(cycle.due(), s(18.0));
        let of = |span_s, within_ms, bytes| UsedWithin { span_s, within_ms, bytes, at: AT };
        assert_eq!(cycle.ages().unwrap().used, [of(1, 1100, 100), of(4, 5500, 300)]);
        assert_eq!(
            cycle.ages().unwrap().by_age(),
            [(0, Some(1100), 100), (1100, Some(5500), 200), (5500, None, 700)]
        );
        assert!(cycle.count(s(10.0 + 256.5), AT, used(400)));
        cycle.was_cleared(s(267.0));
        // It does more now: what was counted for longer spans is less than that.
        let later = UnixMillis(9);
        assert!(!cycle.count(s(268.0), later, used(350)));
        let shown = cycle.ages().unwrap();
        let newest = UsedWithin { at: later, ..of(1, 1000, 350) };
        assert_eq!(shown.used, [newest, of(4, 5500, 350), of(256, 256_500, 400)]);
        assert_eq!(shown.within(4).unwrap().bytes, 350);
    }

    fn cgroups(paths: &[&str]) -> BTreeSet<PathBuf> {
        paths.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn who_stood_still_as_a_cycle_began_is_looked_after_and_it_begins_anew_when_one_goes_on() {
        let mut cycle = Cycle::default();
        cycle.was_cleared(s(0.0));
        assert!(!cycle.count(s(1.0), AT, used(500)));
        assert!(!cycle.ends_early(s(1.5), |_| panic!("there is none that stood still")));
        cycle.was_cleared_but(s(10.0), cgroups(&["/a", "/b"]));
        assert_eq!(cycle.ages(), None, "it was counted of those, too");
        assert!(!cycle.ends_early(s(10.5), |_| panic!("it has just begun")));
        // What goes on is counted at its time.
        assert_eq!((cycle.due(), cycle.count_due()), (s(11.0), s(11.0)));
        assert!(!cycle.ends_early(s(11.0), |_| false));
        let few = Count { used_bytes: 10, resident_bytes: 1000, left_out_bytes: 900 };
        assert!(!cycle.count(s(11.0), AT, few));
        assert_eq!(cycle.due(), s(12.0));
        assert!(!cycle.ends_early(s(12.0), |_| panic!("it was looked after a second ago")));
        assert!(!cycle.count(s(12.0), AT, few));
        assert_eq!((cycle.due(), cycle.count_due()), (s(13.0), s(14.0)));
        assert!(!cycle.ends_early(s(13.5), |_| false));
        // Nothing is due twice.
        assert_eq!((cycle.due(), cycle.count_due()), (s(14.0), s(14.0)));
        assert!(!cycle.count(s(14.0), AT, few));
        assert_eq!((cycle.due(), cycle.count_due()), (s(15.5), s(18.0)));
        assert!(cycle.ends_early(s(15.5), |still| *still == cgroups(&["/a", "/b"])));
        // A count that is not due yet tells of no span, but of what is left out.
        assert!(!cycle.count(s(15.5), AT, Count { left_out_bytes: 800, ..few }));
        let shown = cycle.ages().unwrap();
        assert_eq!((shown.used.len(), shown.left_out_bytes), (3, 800));
        cycle.was_cleared(s(15.5));
        assert_eq!((cycle.ages(), cycle.due()), (None, s(16.5)), "what it counted was without those");
        assert!(!cycle.count(s(16.5), AT, used(300)));
        assert_eq!(cycle.ages().unwrap().left_out_bytes, 0);
    }

    #[test]
    fn cycles_that_end_early_one_after_the_other_last_longer_each_time() {
        let still = || cgroups(&["/a"]);
        let (mut cycle, mut now) = (Cycle::default(), s(10.0));
        cycle.was_cleared_but(now, still());
        for wait in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 256.0] {
            assert!(!cycle.ends_early(now + s(wait - 0.5), |_| true), "after {wait} s");
            now += s(wait);
            assert!(cycle.ends_early(now, |_| true), "after {wait} s");
            // Another stands still by then.
            cycle.was_cleared_but(now, still());
        }
        // One that lasts to its end is followed by one that may end soon, and shows on what it counted of the same ones.
        now += s(256.0);
        assert!(cycle.count(now, AT, used(100)));
        cycle.was_cleared_but(now, still());
        assert_eq!(cycle.ages().unwrap().within(256).unwrap().bytes, 100);
        now += s(1.0);
        assert!(cycle.ends_early(now, |_| true));
        // So is one that leaves none out.
        cycle.was_cleared(now);
        cycle.was_cleared_but(now, still());
        assert!(cycle.ends_early(now + s(1.0), |_| true));
    }

    #[test]
    fn the_budget_is_kept_over_time_and_little_of_it_saved() {
        let mut budget = Budget::new(0.01);
        assert_eq!(budget.pause(Duration::ZERO), Duration::ZERO);
        budget.spend(s(0.02));
        let pause = budget.pause(s(1.0)).as_secs_f64();
        assert!((pause - 1.0).abs() < 1e-6, "{pause}");
        assert_eq!(budget.pause(s(2.0)), Duration::ZERO);
        // After a day, a minute's share is there.
        assert_eq!(budget.pause(s(86_400.0)), Duration::ZERO);
        budget.spend(s(0.7));
        let pause = budget.pause(s(86_400.0)).as_secs_f64();
        assert!((pause - 10.0).abs() < 1e-3, "{pause}");
    }

    #[test]
    fn memory_that_is_left_out_is_in_no_age() {
        let mut cycle = Cycle::default();
        cycle.was_cleared(Duration::ZERO);
        cycle.count(s(1.0), AT, Count { used_bytes: 10, resident_bytes: 100, left_out_bytes: 60 });
        assert_eq!(cycle.ages().unwrap().by_age(), [(0, Some(1000), 10), (1000, None, 30)]);
    }
}
