//! What profiling may cost, and what goes without being measured where it would cost more.
//!
//! The kernel measures the programs now and then. Where all of them together take more of a core than `profile.budget`, several times in a row, a tier of
//! them is detached: the least important one whose absence suffices, or the dearest. It is tried again after a while, and after twice that if it has to go again.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::units::UnixMillis;

/// Measurements in a row that are above the budget before anything goes.
const OVER: u32 = 3;
/// What is left must take less than this share of the budget before anything comes back.
const ROOM: f64 = 0.8;
/// A tier stays away no longer than this at a time; and one that has been back for so long is forgiven.
const LONGEST_MS: u64 = 3_600_000;
/// While all is well, one window of so many is measured: measuring costs, too.
const MEASURED_EVERY: u32 = 16;

/// What goes together, the most important first. What cgroups and /proc tell does not go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Waiting for a CPU, turns on it, time off it.
    Scheduler,
    /// Block I/O.
    Block,
    /// TCP.
    Tcp,
    /// How long page faults take.
    Faults,
}

impl Tier {
    /// The most important first.
    pub const ALL: [Self; 4] = [Self::Scheduler, Self::Block, Self::Tcp, Self::Faults];

    /// Whose the program at a tracepoint or event is; `None`: nobody's alone, and it is never dropped. Those that know cgroups are so: all others need them.
    pub(super) fn of(tracepoint: &str) -> Option<Self> {
        match tracepoint.split('_').next()? {
            "sched" => Some(Self::Scheduler),
            "block" => Some(Self::Block),
            "tcp" | "inet" => Some(Self::Tcp),
            "page" | "major" | "minor" => Some(Self::Faults),
            _ => None,
        }
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scheduler => "scheduler",
            Self::Block => "block",
            Self::Tcp => "tcp",
            Self::Faults => "faults",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What profiling costs, as it was measured last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProfileCost {
    /// `profile.budget`, as a share of one core; 0: there is none, and nothing is measured for it.
    pub budget_share: f64,
    /// What all programs took of one core, on all CPUs together; `None`: not measured yet.
    pub used_share: Option<f64>,
    /// Of it, what the programs took that are in no tier, and always stay: those at `cgroup_*`.
    pub untiered_share: f64,
    /// By tier.
    pub tiers: Vec<TierCost>,
}

/// What a tier costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TierCost {
    /// Which.
    pub tier: Tier,
    /// What its programs took of one core; of one that has gone, what they took then.
    pub core_share: f64,
    /// It was dropped, and is tried again then.
    pub dropped_until: Option<UnixMillis>,
}

/// Something of each tier, and (`None`) of the programs that are in no tier.
pub(super) type ByTier<T> = BTreeMap<Option<Tier>, T>;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Drop(Tier),
    Return(Tier),
}

/// Decides.
#[derive(Clone, Debug)]
pub(super) struct Judge {
    budget: f64,
    first_pause_ms: u64,
    over: u32,
    shares: Option<ByTier<f64>>,
    away: BTreeMap<Tier, Away>,
    went: BTreeMap<Tier, Went>,
}

/// What is known of one that went, also when it is back.
#[derive(Clone, Copy, Debug, Default)]
struct Went {
    /// How often in a row.
    times: u32,
    /// When it came back last.
    back: UnixMillis,
    /// What it took then of a core.
    share: f64,
}

#[derive(Clone, Copy, Debug)]
struct Away {
    share: f64,
    until: UnixMillis,
}

impl Judge {
    pub(super) fn new(budget: f64, first_pause: Duration) -> Self {
        let (over, shares, away, went) = Default::default();
        let first_pause_ms = (first_pause.as_millis() as u64).clamp(1, LONGEST_MS);
        Self { budget, first_pause_ms, over, shares, away, went }
    }

    fn has_budget(&self) -> bool {
        self.budget > 0.0
    }

    /// Takes in what each tier took of a core, and decides.
    pub(super) fn judge(&mut self, now: UnixMillis, shares: ByTier<f64>) -> Option<Change> {
        let total: f64 = shares.values().sum();
        let change = if !self.has_budget() {
            None
        } else if total > self.budget {
            self.over += 1;
            (self.over >= OVER).then(|| self.drop_one(now, &shares, total - self.budget)).flatten()
        } else {
            self.over = 0;
            let due = self.away.iter().find(|(_, away)| away.until <= now).map(|(tier, _)| *tier);
            due.filter(|_| total <= self.budget * ROOM).map(|tier| {
                self.away.remove(&tier);
                self.went.entry(tier).or_default().back = now;
                Change::Return(tier)
            })
        };
        self.shares = Some(shares);
        change
    }

    fn drop_one(&mut self, now: UnixMillis, shares: &ByTier<f64>, excess: f64) -> Option<Change> {
        let tiers = || shares.iter().filter_map(|(tier, share)| Some(((*tier)?, *share)));
        let here = || tiers().filter(|(tier, _)| !self.away.contains_key(tier));
        let suffices = here().rev().find(|(_, share)| *share >= excess);
        let dearest = here().max_by(|(_, a), (_, b)| a.total_cmp(b));
        let (tier, share) = suffices.or(dearest)?;
        self.send_away(now, tier, share);
        self.over = 0;
        Some(Change::Drop(tier))
    }

    fn send_away(&mut self, now: UnixMillis, tier: Tier, share: f64) {
        let went = self.went.entry(tier).or_default();
        if now.since(went.back) >= LONGEST_MS {
            went.times = 0;
        }
        let pause_ms = self.first_pause_ms.saturating_mul(1 << went.times.min(30)).min(LONGEST_MS);
        went.times += 1;
        went.share = share;
        self.away.insert(tier, Away { share, until: UnixMillis(now.0 + pause_ms) });
    }

    /// One that was to return could not: it is tried again, later each time.
    pub(super) fn did_not_return(&mut self, now: UnixMillis, tier: Tier) {
        // It was not there, so nothing newer is known of what it takes.
        let share = self.went.get(&tier).map_or(0.0, |went| went.share);
        self.send_away(now, tier, share);
    }

    /// As it is shown.
    pub(super) fn cost(&self) -> ProfileCost {
        let share = |tier| self.shares.as_ref().and_then(|shares| shares.get(&tier)).copied().unwrap_or(0.0);
        let of = |tier: &Tier| {
            let away = self.away.get(tier);
            TierCost {
                tier: *tier,
                core_share: away.map_or_else(|| share(Some(*tier)), |away| away.share),
                dropped_until: away.map(|away| away.until),
            }
        };
        ProfileCost {
            budget_share: self.budget,
            used_share: self.shares.as_ref().map(|shares| shares.values().sum()),
            untiered_share: share(None),
            tiers: Tier::ALL.iter().map(of).collect(),
        }
    }
}

/// When is measured, and what.
pub(super) struct Meter {
    pub(super) judge: Judge,
    /// Since when, and how long the programs of each tier had run then, in nanoseconds.
    measuring: Option<(Instant, ByTier<u64>)>,
    windows: u32,
}

impl Meter {
    pub(super) fn new(judge: Judge) -> Self {
        Self { judge, measuring: None, windows: 0 }
    }

    /// Whether the coming window is to be measured.
    pub(super) fn is_due(&mut self) -> bool {
        let due = self.windows.is_multiple_of(MEASURED_EVERY) || self.judge.over > 0;
        self.windows = self.windows.wrapping_add(1);
        due && self.judge.has_budget()
    }

    /// A window begins that is measured.
    pub(super) fn begin(&mut self, ran_ns: ByTier<u64>) {
        self.measuring = Some((Instant::now(), ran_ns));
    }

    /// It ends: what is to be done.
    pub(super) fn end(&mut self, now: UnixMillis, ran_ns: impl FnOnce() -> ByTier<u64>) -> Option<Change> {
        let (began, before) = self.measuring.take()?;
        let elapsed_ns = began.elapsed().as_nanos().max(1) as f64;
        let share = |(tier, ran): (Option<Tier>, u64)| {
            let ran = ran.saturating_sub(before.get(&tier).copied().unwrap_or(0));
            (tier, ran as f64 / elapsed_ns)
        };
        self.judge.judge(now, ran_ns().into_iter().map(share).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(60);

    fn shares(scheduler: f64, block: f64, tcp: f64) -> ByTier<f64> {
        Tier::ALL.into_iter().map(Some).zip([scheduler, block, tcp]).collect()
    }

    fn at(second: u64) -> UnixMillis {
        UnixMillis(1_000_000_000 + second * 1000)
    }

    #[test]
    fn what_is_over_for_a_moment_stays_and_what_is_over_for_long_goes() {
        let mut judge = Judge::new(0.1, PAUSE);
        for second in 0..21 {
            let over = if second % 3 == 2 { 0.01 } else { 0.2 };
            assert_eq!(judge.judge(at(second), shares(over, 0.0, 0.0)), None);
        }
        judge.judge(at(21), shares(0.2, 0.01, 0.0));
        judge.judge(at(22), shares(0.2, 0.01, 0.0));
        assert_eq!(judge.judge(at(23), shares(0.2, 0.01, 0.0)), Some(Change::Drop(Tier::Scheduler)));
        let cost = judge.cost();
        assert_eq!((cost.tiers[0].core_share, cost.tiers[0].dropped_until), (0.2, Some(at(23 + 60))));
        assert_eq!((cost.tiers[1].dropped_until, cost.budget_share), (None, 0.1));
    }

    #[test]
    fn one_that_could_not_return_stays_dropped_and_is_tried_again_ever_later() {
        let mut judge = Judge::new(0.1, PAUSE);
        for second in 0..3 {
            judge.judge(at(second), shares(0.2, 0.0, 0.0));
        }
        let nothing = || shares(0.0, 0.0, 0.0);
        let told = |judge: &Judge| {
            let cost = judge.cost();
            (cost.tiers[0].tier, cost.tiers[0].core_share, cost.tiers[0].dropped_until)
        };
        let mut now = 2;
        for pause in [60, 120, 240, 480, 960, 1920, 3600, 3600] {
            assert_eq!(told(&judge), (Tier::Scheduler, 0.2, Some(at(now + pause))));
            assert_eq!(judge.judge(at(now + pause - 1), nothing()), None);
            now += pause;
            assert_eq!(judge.judge(at(now), nothing()), Some(Change::Return(Tier::Scheduler)));
            judge.did_not_return(at(now), Tier::Scheduler);
        }
        // Where the others cost too much, it is one of them that goes.
        let over = || shares(0.0, 0.2, 0.0);
        let changes: Vec<_> = (1..4).filter_map(|second| judge.judge(at(now + second), over())).collect();
        assert_eq!(changes, [Change::Drop(Tier::Block)]);
        assert_eq!(told(&judge), (Tier::Scheduler, 0.2, Some(at(now + 3600))));
    }

    #[test]
    fn what_is_measured_goes_stays_away_if_it_can_not_return_and_is_tried_again() {
        /// More than there can be of time.
        const MUCH: u64 = u64::MAX / 2;
        let ran = |ns: u64| -> ByTier<u64> { [(Some(Tier::Tcp), ns), (None, 0)].into() };
        let mut meter = Meter::new(Judge::new(0.1, PAUSE));
        for second in 0..3 {
            assert!(meter.is_due(), "the first, and each after one that was over");
            meter.begin(ran(0));
            let expected = (second == 2).then_some(Change::Drop(Tier::Tcp));
            assert_eq!(meter.end(at(second), || ran(MUCH)), expected);
        }
        assert!(!meter.is_due());
        assert_eq!(meter.end(at(62), || ran(MUCH)), None, "nothing was measured");
        // While it is away, its programs do not run.
        let mut idle = |second: u64| {
            meter.begin(ran(MUCH));
            let change = meter.end(at(second), || ran(MUCH));
            if change == Some(Change::Return(Tier::Tcp)) {
                meter.judge.did_not_return(at(second), Tier::Tcp);
            }
            (change.is_some(), meter.judge.cost().tiers[2].dropped_until)
        };
        assert_eq!(idle(61), (false, Some(at(62))));
        assert_eq!(idle(62), (true, Some(at(62 + 120))));
        assert_eq!(idle(62 + 119), (false, Some(at(62 + 120))));
        assert_eq!(idle(62 + 120), (true, Some(at(62 + 120 + 240))));
    }

    #[test]
    fn the_least_important_one_goes_that_suffices_else_the_dearest() {
        let first = |scheduler, block, tcp| {
            let mut judge = Judge::new(0.1, PAUSE);
            (0..3).filter_map(|second| judge.judge(at(second), shares(scheduler, block, tcp))).next()
        };
        assert_eq!(first(0.08, 0.05, 0.05), Some(Change::Drop(Tier::Scheduler)), "0.08 of excess");
        assert_eq!(first(0.05, 0.04, 0.03), Some(Change::Drop(Tier::Tcp)));
        assert_eq!(first(0.05, 0.06, 0.0), Some(Change::Drop(Tier::Block)));
        assert_eq!(first(0.2, 0.3, 0.2), Some(Change::Drop(Tier::Block)));
        assert_eq!(first(0.05, 0.05, 0.0), None, "as much as there is");
        let mut free = Judge::new(0.0, PAUSE);
        assert!((0..9).all(|second| free.judge(at(second), shares(9.0, 9.0, 9.0)).is_none()));
    }

    #[test]
    fn programs_in_no_tier_count_and_stay() {
        assert_eq!(["cgroup_mkdir", "cgroup_release"].map(Tier::of), [None; 2]);
        let with = |untiered| {
            let mut of = shares(0.03, 0.02, 0.01);
            of.insert(None, untiered);
            of
        };
        let after_three = |untiered| {
            let mut judge = Judge::new(0.1, PAUSE);
            let change = (0..3).filter_map(|second| judge.judge(at(second), with(untiered))).next();
            (change, judge.cost())
        };
        assert_eq!(after_three(0.03).0, None, "less than there is");
        let (change, cost) = after_three(0.05);
        assert_eq!(change, Some(Change::Drop(Tier::Tcp)), "they are in what all of them take");
        assert_eq!((cost.untiered_share, cost.tiers.len()), (0.05, Tier::ALL.len()));
        assert!((cost.used_share.expect("it was measured") - 0.11).abs() < 1e-9);
        // Even the dearest of all is not dropped if it is in none.
        let mut judge = Judge::new(0.1, PAUSE);
        let changes: Vec<_> = (0..30).filter_map(|second| judge.judge(at(second), with(0.2))).collect();
        assert_eq!(changes, [Tier::Scheduler, Tier::Block, Tier::Tcp].map(Change::Drop));
    }

    #[test]
    fn a_load_that_goes_on_is_tried_ever_more_seldom() {
        let mut judge = Judge::new(0.1, PAUSE);
        let (mut attached, mut drops) = (true, Vec::new());
        for second in 0..6 * 3600 {
            match judge.judge(at(second), shares(if attached { 0.5 } else { 0.0 }, 0.01, 0.0)) {
                Some(Change::Drop(tier)) => {
                    assert_eq!(tier, Tier::Scheduler);
                    attached = false;
                    drops.push(second);
                }
                Some(Change::Return(_)) => attached = true,
                None => {}
            }
        }
        let pauses: Vec<u64> = drops.windows(2).map(|two| two[1] - two[0]).collect();
        // Three measurements before it goes, each time.
        assert_eq!(pauses[..6], [63, 123, 243, 483, 963, 1923]);
        assert!(pauses[6..].iter().all(|pause| *pause == 3603), "{pauses:?}");
    }

    #[test]
    fn what_went_comes_back_when_there_is_room_the_most_important_first() {
        let mut judge = Judge::new(0.1, PAUSE);
        (0..3).for_each(|second| _ = judge.judge(at(second), shares(0.09, 0.05, 0.0)));
        assert_eq!(judge.cost().tiers[1].dropped_until, Some(at(62)));
        // Not while what is left leaves no room.
        assert_eq!(judge.judge(at(70), shares(0.09, 0.0, 0.0)), None);
        (71..74).for_each(|second| _ = judge.judge(at(second), shares(0.2, 0.0, 0.0)));
        assert!(judge.cost().tiers[0].dropped_until.is_some());
        assert_eq!(
            judge.judge(at(80), shares(0.0, 0.0, 0.0)),
            Some(Change::Return(Tier::Block)),
            "that was due"
        );
        assert_eq!(judge.judge(at(140), shares(0.0, 0.01, 0.0)), Some(Change::Return(Tier::Scheduler)));
        assert_eq!(judge.judge(at(141), shares(0.01, 0.01, 0.0)), None);
        assert!(judge.cost().tiers.iter().all(|tier| tier.dropped_until.is_none()));
        // It was back for an hour: the pause is short again.
        (0..3).for_each(|n| _ = judge.judge(at(5000 + n), shares(0.01, 0.3, 0.0)));
        assert_eq!(judge.cost().tiers[1].dropped_until, Some(at(5002 + 60)));
    }
}
