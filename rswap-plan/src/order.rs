//! In which order the moves are made that one round decides for one instance.
//!
//! One at a time. What enlarges comes before what only saves, and of that what is needed first; each begins early enough for those
//! after it. No step may take away what the instance needs at that moment: where an order exists in which none does, it is taken.
//! Nothing is queued: the first move begins, and when it has ended, the others are decided anew, by the numbers as they are then. So
//! one that failed takes with it whatever rested on it; and while a part that must move waits after a failure, nothing that only
//! saves is moved. A migration takes all of the instance along: with one decided, the moves on this host are not made.

use std::collections::BTreeSet;

use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Candidate, Decision, MoveKind, Outcome, StayReason, lead};

/// More moves than this of one instance are ordered by urgency alone.
const SEARCHED: usize = 16;
/// More than this times what is needed is not told apart.
const PLENTY: f64 = 1e6;

/// What one move does to what the instance can have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    /// How much more (or less) of a resource it can have when it is done: (number of the resource, amount in its unit).
    pub gives: Vec<(usize, f64)>,
    /// Milliseconds until it has to be done; `None` for what only saves.
    pub due_ms: Option<u64>,
    /// How long it takes, in milliseconds.
    pub takes_ms: u64,
}

impl Change {
    fn takes_nothing(&self) -> bool {
        self.gives.iter().all(|(_, amount)| *amount >= 0.0)
    }
}

/// One move of several, in their order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Step {
    /// Of which kind.
    pub kind: MoveKind,
    /// Of which volume, if it is of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// To which pool.
    pub to: String,
    /// Milliseconds until it has to be done; `None` for what only saves.
    pub due_ms: Option<u64>,
    /// How long it is taken to last, in milliseconds, with a margin.
    pub takes_ms: u64,
}

/// The order of `changes`, where there is so much more of each resource than is needed (`spare`, in the same units). No step takes
/// a resource below what is needed, or further below if it was there before. What is not in the result can't be made next to the others
/// without that.
pub fn arrange(spare: &[f64], changes: &[Change]) -> Vec<usize> {
    let mut preferred: Vec<usize> = (0..changes.len()).collect();
    preferred.sort_by_key(|&n| {
        let change = &changes[n];
        (change.due_ms.is_none(), change.due_ms, !change.takes_nothing(), change.takes_ms, n)
    });
    if changes.len() > SEARCHED {
        return preferred;
    }
    let mut search =
        Search { changes, preferred: &preferred, seen: BTreeSet::new(), way: Vec::new(), best: Vec::new() };
    search.go_on(0, spare);
    search.best
}

/// What is left of each resource depends on which moves were made, not on their order: each set of them is looked at once.
struct Search<'c> {
    changes: &'c [Change],
    preferred: &'c [usize],
    seen: BTreeSet<u32>,
    way: Vec<usize>,
    best: Vec<usize>,
}

impl Search<'_> {
    /// Whether all could be made from here.
    fn go_on(&mut self, made: u32, spare: &[f64]) -> bool {
        if self.way.len() > self.best.len() {
            self.best.clone_from(&self.way);
        }
        if self.way.len() == self.changes.len() {
            return true;
        }
        for &next in self.preferred {
            let with = made | 1 << next;
            if with == made || self.seen.contains(&with) {
                continue;
            }
            let Some(left) = after(spare, &self.changes[next]) else { continue };
            self.seen.insert(with);
            self.way.push(next);
            if self.go_on(with, &left) {
                return true;
            }
            self.way.pop();
        }
        false
    }
}

/// What is spare after it; `None` if it takes what is needed.
fn after(spare: &[f64], change: &Change) -> Option<Vec<f64>> {
    let mut left = spare.to_vec();
    for &(resource, amount) in &change.gives {
        left[resource] += amount;
    }
    left.iter().zip(spare).all(|(left, before)| *left >= 0.0 || left >= before).then_some(left)
}

/// Milliseconds until the first of them has to begin, so that each is done when it is due, one after the other. When one has ended,
/// the next look begins the next one: that takes `look_ms` at most.
pub fn begin_in_ms<'c>(sequence: impl IntoIterator<Item = &'c Change>, look_ms: u64) -> Option<u64> {
    let mut lasted = 0u64;
    let mut begin: Option<u64> = None;
    for (n, change) in sequence.into_iter().enumerate() {
        lasted = lasted.saturating_add(change.takes_ms).saturating_add(if n == 0 { 0 } else { look_ms });
        if let Some(due_ms) = change.due_ms {
            let latest = due_ms.saturating_sub(lasted);
            begin = Some(begin.map_or(latest, |begin| begin.min(latest)));
        }
    }
    begin
}

/// What a pool has of what is needed, as multiples of it: cores, requests and bytes per second.
fn ratios(candidate: &Candidate) -> Vec<f64> {
    let ratio = |has: f64, needs: f64| if needs > 0.0 { (has / needs).min(PLENTY) } else { PLENTY };
    match candidate.flow {
        None => vec![ratio(candidate.terms.available_cores, candidate.terms.limit_cores)],
        Some(flow) => vec![
            ratio(flow.available.operations_per_s, flow.limit.operations_per_s),
            ratio(flow.available.bytes_per_s, flow.limit.bytes_per_s),
        ],
    }
}

const OTHER_FIRST: Outcome = Outcome::Stay { reason: StayReason::OtherMoveFirst };

/// Of the moves of one instance, leaves the one that is to be made first. Plans are made every `look_ms` milliseconds.
pub(crate) fn put_in_order(decisions: &mut [Decision], now: UnixMillis, look_ms: u64) {
    let moves = |decision: &Decision| decision.moves();
    if decisions.iter().any(|decision| decision.kind == MoveKind::Host && decision.moves()) {
        let others = decisions.iter_mut().filter(|decision| decision.kind != MoveKind::Host);
        others.filter(|decision| decision.moves()).for_each(|decision| decision.outcome = OTHER_FIRST);
        return;
    }
    let waits = |decision: &Decision| {
        let must = decision.current.as_ref().is_some_and(|current| current.dropped.is_some());
        must && matches!(decision.outcome, Outcome::Stay { reason: StayReason::BackOff { .. } })
    };
    if decisions.iter().any(waits) {
        for decision in decisions.iter_mut().filter(|decision| decision.exchange.is_none()) {
            if matches!(decision.outcome, Outcome::Move { forced: false, .. }) {
                decision.outcome = OTHER_FIRST;
            }
        }
    }
    let movers: Vec<usize> = (0..decisions.len()).filter(|&n| moves(&decisions[n])).collect();
    if movers.len() < 2 {
        return;
    }
    let (mut spare, mut changes, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    for &mover in &movers {
        let (change, step) = change(&decisions[mover], now, &mut spare);
        changes.push(change);
        steps.push(step);
    }
    let order = arrange(&spare, &changes);
    let Some(&first) = order.first() else {
        movers.iter().for_each(|&mover| decisions[mover].outcome = OTHER_FIRST);
        return;
    };
    let sequence: Vec<Step> = order.iter().map(|&n| steps[n].clone()).collect();
    let begin = begin_in_ms(order.iter().map(|&n| &changes[n]), look_ms);
    for (n, &mover) in movers.iter().enumerate() {
        let decision = &mut decisions[mover];
        decision.steps.clone_from(&sequence);
        match &mut decision.outcome {
            Outcome::Move { start_by, .. } if n == first => {
                if let Some(begin) = begin {
                    *start_by = (*start_by).min(UnixMillis(now.0.saturating_add(begin)));
                }
            }
            outcome => *outcome = OTHER_FIRST,
        }
    }
}

/// A decided move, as what it changes; what its part of the instance has to spare now is put to `spare`.
fn change(decision: &Decision, now: UnixMillis, spare: &mut Vec<f64>) -> (Change, Step) {
    let (to, start_by, forced) = match &decision.outcome {
        Outcome::Move { to, start_by, forced } => (to.clone(), *start_by, *forced),
        Outcome::Stay { .. } => (String::new(), now, false),
    };
    let target = decision.candidates.iter().find(|candidate| candidate.pool == to);
    let has = decision.current.as_ref().map(ratios).unwrap_or_default();
    let will_have = target.map(ratios).unwrap_or_default();
    let first = spare.len();
    spare.extend(has.iter().map(|ratio| ratio - 1.0));
    let gives = has.iter().zip(&will_have).enumerate();
    let gives = gives.map(|(n, (has, will_have))| (first + n, will_have - has)).collect();
    let takes_ms = decision.lead.map(|lead| lead.takes_ms);
    let takes_ms = takes_ms.or_else(|| target.map(lead::careful_ms)).unwrap_or_default();
    // Who changes places with another one has the other waiting for it.
    let due_ms = match decision.lead {
        _ if decision.exchange.is_some() => Some(0),
        Some(lead) => Some(lead.due_ms),
        None => forced.then(|| start_by.since(now).saturating_add(takes_ms)),
    };
    let step = Step { kind: decision.kind, volume: decision.volume.clone(), to, due_ms, takes_ms };
    (Change { gives, due_ms, takes_ms }, step)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn change(gives: &[(usize, f64)], due_ms: Option<u64>, takes_ms: u64) -> Change {
        Change { gives: gives.to_vec(), due_ms, takes_ms }
    }

    fn permutations(of: usize) -> Vec<Vec<usize>> {
        let mut all = vec![vec![]];
        for n in 0..of {
            let longer = |order: &Vec<usize>| {
                let order = order.clone();
                (0..=order.len()).map(move |at| [&order[..at], &[n], &order[at..]].concat())
            };
            all = all.iter().flat_map(longer).collect();
        }
        all
    }

    fn is_safe(spare: &[f64], changes: &[Change], order: &[usize]) -> bool {
        let mut spare = spare.to_vec();
        order.iter().all(|&n| match after(&spare, &changes[n]) {
            Some(left) => {
                spare = left;
                true
            }
            None => false,
        })
    }

    /// The largest delay of one that is due, if all begin at once.
    fn delay_ms(changes: &[Change], order: &[usize]) -> u64 {
        let mut at = 0;
        let ends = order.iter().map(|&n| {
            at += changes[n].takes_ms;
            changes[n].due_ms.map_or(0, |due| at.saturating_sub(due))
        });
        ends.max().unwrap_or(0)
    }

    #[test]
    fn what_is_needed_first_comes_first_and_what_only_saves_last() {
        let changes = [
            change(&[(0, -0.5)], None, 10),
            change(&[(1, 2.0)], Some(9_000), 4_000),
            change(&[(2, 1.0)], Some(3_000), 50),
        ];
        let spare = [0.6, -0.1, -0.1];
        assert_eq!(arrange(&spare, &changes), [2, 1, 0]);
        assert_eq!(begin_in_ms([2, 1, 0].map(|n| &changes[n]), 0), Some(2_950));
        // The second one takes so long that the first one begins earlier.
        let slow = [changes[2].clone(), change(&[(1, 2.0)], Some(9_000), 8_000)];
        assert_eq!(begin_in_ms(&slow, 0), Some(950));
        // And what begins it looks every 700 ms.
        assert_eq!(begin_in_ms(&slow, 700), Some(250));
    }

    #[test]
    fn what_would_take_what_is_needed_waits_for_what_gives_it() {
        // Due first, but it takes away what only the other one gives back.
        let changes = [change(&[(0, 1.0), (1, -1.0)], Some(10), 5), change(&[(1, 1.0)], Some(900), 5)];
        assert_eq!(arrange(&[-0.5, 0.5], &changes), [1, 0]);
        // Each takes what the other one gives: there is no order.
        let changes = [change(&[(0, 1.0), (1, -1.0)], None, 5), change(&[(0, -1.0), (1, 1.0)], None, 5)];
        assert_eq!(arrange(&[0.0, 0.0], &changes), Vec::<usize>::new());
    }

    fn changes(monotone: bool) -> impl Strategy<Value = (Vec<f64>, Vec<Change>)> {
        let amount = (-8i32..8).prop_map(f64::from);
        let gives = prop::collection::vec((0usize..3, amount), 1..4);
        let one = (gives, prop::option::of(0u64..500), 1u64..200, prop::bool::ANY);
        let one = one.prop_map(move |(mut gives, due_ms, takes_ms, saves)| {
            if monotone {
                gives
                    .iter_mut()
                    .for_each(|(_, amount)| *amount = amount.abs() * if saves { -1.0 } else { 1.0 });
            }
            let due_ms = due_ms.filter(|_| !monotone || !saves);
            Change { gives, due_ms, takes_ms }
        });
        (prop::collection::vec((-4i32..12).prop_map(f64::from), 3), prop::collection::vec(one, 0..6))
    }

    proptest! {
        /// At every step there is what is needed, and where all can be made in some order, all are.
        #[test]
        fn no_step_takes_what_is_needed((spare, changes) in changes(false)) {
            let order = arrange(&spare, &changes);
            prop_assert!(is_safe(&spare, &changes, &order), "{:?}", order);
            let mut once = order.clone();
            once.sort_unstable();
            once.dedup();
            prop_assert_eq!(once.len(), order.len());
            let possible = permutations(changes.len()).iter().any(|order| is_safe(&spare, &changes, order));
            prop_assert_eq!(order.len() == changes.len(), possible);
        }

        /// Moves that enlarge, and moves that save: if there is enough at the end, or as much as before, all are made, and no other order
        /// is on time where this one is not.
        #[test]
        fn enough_at_both_ends_is_enough_in_between((spare, changes) in changes(true)) {
            let total = |resource: usize| {
                let gives = changes.iter().flat_map(|change| &change.gives);
                spare[resource] + gives.filter(|(of, _)| *of == resource).map(|(_, amount)| amount).sum::<f64>()
            };
            let enough = (0..3).all(|resource| spare[resource] >= 0.0 && total(resource) >= 0.0);
            let order = arrange(&spare, &changes);
            if enough {
                prop_assert_eq!(order.len(), changes.len());
                let least = permutations(changes.len()).iter().map(|other| delay_ms(&changes, other)).min();
                prop_assert_eq!(Some(delay_ms(&changes, &order)), least);
            }
        }
    }
}
