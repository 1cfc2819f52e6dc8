//! What was decided about instances, round by round: the newest decisions whole, and of older ones where the result changed. Bounded.

use std::{collections::VecDeque, mem, sync::Arc};

use crate::plan::{Decision, Outcome};

/// Decisions kept of an instance at most; the oldest go first.
pub const DECISIONS_KEPT: usize = 200;
/// Decisions kept whole of all instances together, as long as each keeps [`WHOLE_AT_LEAST`]: one has a kilobyte or two.
const WHOLE_OF_ALL: usize = 2_000;
/// The newest decisions of an instance that are kept whole, however many instances there are.
const WHOLE_AT_LEAST: usize = 10;

/// How many of the newest decisions are kept whole of each of so many instances.
pub(super) fn kept_whole(instances: usize) -> usize {
    (WHOLE_OF_ALL / instances.max(1)).clamp(WHOLE_AT_LEAST, DECISIONS_KEPT)
}

/// An instance's decisions, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Decisions {
    // Each by itself: a queue of them whole grows in steps of hundreds of kilobytes. Shared: the newest are the last plan's, too.
    kept: VecDeque<Arc<Decision>>,
    /// How many of the oldest have been looked at: of these, only those stay with which a run of equal results begins or ends.
    thinned: usize,
}

impl Decisions {
    /// Takes in a decision. The newest `whole` stay as they are; of those before, the ones go whose neighbours about the same part
    /// decided the same.
    pub(super) fn keep(&mut self, decision: Arc<Decision>, whole: usize) {
        self.kept.push_back(decision);
        while self.kept.len() - self.thinned > whole {
            if self.is_in_a_run(self.thinned) {
                self.kept.remove(self.thinned);
            } else {
                self.thinned += 1;
            }
        }
        while self.kept.len() > DECISIONS_KEPT {
            self.kept.pop_front();
            self.thinned = self.thinned.saturating_sub(1);
        }
    }

    /// Whether the decisions about the same part before and after it have the same result.
    fn is_in_a_run(&self, at: usize) -> bool {
        let Some(it) = self.kept.get(at) else { return false };
        let same_part = |other: &&Decision| (other.kind, &other.volume) == (it.kind, &it.volume);
        let same_result = |other: &Decision| is_same_result(&it.outcome, &other.outcome);
        let before = self.kept.range(..at).rev().map(Arc::as_ref).find(same_part);
        let after = self.kept.range(at + 1..).map(Arc::as_ref).find(same_part);
        before.zip(after).is_some_and(|(before, after)| same_result(before) && same_result(after))
    }

    /// All that are kept, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Decision> {
        self.kept.iter().map(Arc::as_ref)
    }
}

/// Whether both say the same, whatever their numbers.
fn is_same_result(one: &Outcome, other: &Outcome) -> bool {
    match (one, other) {
        (Outcome::Stay { reason: one }, Outcome::Stay { reason: other }) => {
            mem::discriminant(one) == mem::discriminant(other)
        }
        (Outcome::Move { to: one, forced: is_forced, .. }, Outcome::Move { to: other, forced, .. }) => {
            one == other && is_forced == forced
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        plan::{MoveKind, StayReason},
        units::UnixMillis,
    };

    fn decision(kind: MoveKind, volume: Option<&str>, at: u64, outcome: Outcome) -> Arc<Decision> {
        Arc::new(Decision {
            instance: "a".parse().unwrap(),
            kind,
            volume: volume.map(str::to_owned),
            at: UnixMillis(at),
            need: None,
            flow: None,
            crossing_in_ms: None,
            crossing_by: None,
            current: None,
            candidates: Vec::new(),
            left_out: 0,
            threshold: 0.0,
            hysteresis: 0.0,
            exchange: None,
            steps: Vec::new(),
            lead: None,
            writing: None,
            timing: None,
            outcome,
        })
    }

    fn stay(reason: StayReason) -> Outcome {
        Outcome::Stay { reason }
    }

    fn to(pool: &str, start_by: u64, forced: bool) -> Outcome {
        Outcome::Move { to: pool.to_owned(), start_by: UnixMillis(start_by), forced }
    }

    fn ats(decisions: &Decisions) -> Vec<u64> {
        decisions.iter().map(|decision| decision.at.0).collect()
    }

    #[test]
    fn few_instances_keep_all_and_many_the_newest() {
        assert_eq!((kept_whole(0), kept_whole(1), kept_whole(20)), (200, 200, 100));
        assert_eq!((kept_whole(100), kept_whole(200), kept_whole(100_000)), (20, 10, 10));
        let mut decisions = Decisions::default();
        for at in 0..500 {
            decisions
                .keep(decision(MoveKind::Cpu, None, at, stay(StayReason::UnderThreshold)), kept_whole(1));
        }
        assert_eq!(ats(&decisions), (300..500).collect::<Vec<_>>());
        // More instances came.
        decisions.keep(decision(MoveKind::Cpu, None, 500, stay(StayReason::UnderThreshold)), 20);
        assert_eq!(ats(&decisions), [300].into_iter().chain(481..=500).collect::<Vec<_>>());
    }

    #[test]
    fn of_older_ones_the_first_and_the_last_of_equal_results_stay() {
        let mut decisions = Decisions::default();
        let outcome = |at: u64| match at {
            0..10 => stay(StayReason::TooLittleSeen { seen: at, needed: 10 }),
            10..20 => stay(StayReason::UnderThreshold),
            20..23 => to("fast", at, false),
            23..25 => to("fast", at, true),
            25 => to("slow", at, true),
            _ => stay(StayReason::CoolDown { left_ms: 1_000 - at }),
        };
        for at in 0..100 {
            decisions.keep(decision(MoveKind::Cpu, None, at, outcome(at)), 20);
        }
        let older = [0, 9, 10, 19, 20, 22, 23, 24, 25, 26];
        assert_eq!(ats(&decisions), older.into_iter().chain(80..100).collect::<Vec<_>>());
    }

    #[test]
    fn parts_of_an_instance_have_runs_of_their_own() {
        let mut decisions = Decisions::default();
        for at in 0..60 {
            decisions.keep(decision(MoveKind::Cpu, None, at, stay(StayReason::UnderThreshold)), 20);
            for volume in ["data", "logs"] {
                let moves = volume == "data" && (20..30).contains(&at);
                let outcome = if moves { to("ssd", at, true) } else { stay(StayReason::NoPoolFits) };
                decisions.keep(decision(MoveKind::Storage, Some(volume), at, outcome), 20);
            }
        }
        let of = |kind: MoveKind, volume: Option<&str>| {
            let of_part =
                decisions.iter().filter(|kept| kept.kind == kind && kept.volume.as_deref() == volume);
            of_part.map(|kept| kept.at.0).filter(|at| *at < 50).collect::<Vec<_>>()
        };
        assert_eq!(of(MoveKind::Cpu, None), [0]);
        assert_eq!(of(MoveKind::Storage, Some("data")), [0, 19, 20, 29, 30]);
        assert_eq!(of(MoveKind::Storage, Some("logs")), [0]);
    }

    #[test]
    fn results_that_change_in_every_round_are_bounded_too() {
        let mut decisions = Decisions::default();
        for at in 0..1_000 {
            let outcome = if at % 2 == 0 { to("fast", at, false) } else { stay(StayReason::InFlight) };
            decisions.keep(decision(MoveKind::Cpu, None, at, outcome), 20);
        }
        assert_eq!(ats(&decisions), (800..1_000).collect::<Vec<_>>());
        assert_eq!(decisions.thinned, DECISIONS_KEPT - 20);
    }
}
