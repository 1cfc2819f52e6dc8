//! Two instances change places, where neither fits next to the other.

use std::collections::BTreeMap;

use rswap_types::UnixMillis;

use crate::{
    Candidate, Decision, Dropped, InstanceView, MoveKind, Outcome, Planner, StayReason,
    compare::Round,
    ledger::{Entry, Ledger},
    need, rules,
};

/// Stuck instances that are looked at in a round.
const LOOKED_AT: usize = 32;

/// A pair that can change places.
struct Pair {
    partner: usize,
    /// The stuck one at the partner's place, and the partner at its.
    there: Candidate,
    here: Candidate,
}

impl Planner {
    /// Instances that must move and find no place change it with another one, if both then have what they need.
    pub(crate) fn exchange<'v>(
        &self,
        views: &[&'v InstanceView],
        decided: &mut [Vec<Decision>],
        round: &mut Round<'_, 'v>,
        ledger: &mut Ledger<'_>,
    ) {
        let stuck: Vec<(usize, MoveKind)> = decided
            .iter()
            .enumerate()
            .filter(|(_, decisions)| !decisions.iter().any(Decision::moves))
            .filter_map(|(index, decisions)| {
                let stuck = Outcome::Stay { reason: StayReason::NoPoolFits };
                Some((index, decisions.iter().find(|decision| decision.outcome == stuck)?.kind))
            })
            .take(LOOKED_AT)
            .collect();
        if stuck.is_empty() {
            return;
        }
        let mut sitting: BTreeMap<(MoveKind, usize), Vec<usize>> = BTreeMap::new();
        for (index, view) in views.iter().enumerate() {
            for &kind in &view.movable {
                if let Some(pool) = round.current(view, kind) {
                    sitting.entry((kind, pool)).or_default().push(index);
                }
            }
        }
        for (index, kind) in stuck {
            let free = |other: usize| !decided[other].iter().any(Decision::moves);
            if free(index)
                && let Some(pair) = self.partner(index, kind, views, &sitting, round, ledger, &free)
            {
                let Pair { partner, there, here } = pair;
                for (mover, with, to, forced) in
                    [(index, partner, &there, true), (partner, index, &here, false)]
                {
                    let with = views[with].instance.clone();
                    ledger.moves(&views[mover].instance, &to.pool, self.promise(views[mover], round));
                    if let Some(&host) =
                        round.by_name.get(to.pool.as_str()).filter(|_| kind == MoveKind::Host)
                    {
                        round.groups.set(views[mover], host);
                    }
                    for decision in decided[mover].iter_mut().filter(|decision| decision.kind == kind) {
                        decision.outcome = Outcome::Move { to: to.pool.clone(), start_by: round.now, forced };
                        let before = decision.candidates.len();
                        decision.candidates.retain(|candidate| candidate.pool != to.pool);
                        if decision.candidates.len() == before {
                            // It was among those that were left out.
                            decision.left_out = decision.left_out.saturating_sub(1);
                        }
                        decision.candidates.insert(0, to.clone());
                        let most = (round.config.candidates_kept as usize).max(1);
                        decision.left_out += decision.candidates.len().saturating_sub(most);
                        decision.candidates.truncate(most);
                        decision.exchange = Some(with.clone());
                    }
                }
            }
        }
    }

    /// The pair whose totals are lowest.
    #[allow(clippy::too_many_arguments, reason = "the parts of one round")]
    fn partner(
        &self,
        index: usize,
        kind: MoveKind,
        views: &[&InstanceView],
        sitting: &BTreeMap<(MoveKind, usize), Vec<usize>>,
        round: &Round<'_, '_>,
        ledger: &Ledger<'_>,
        free: &dyn Fn(usize) -> bool,
    ) -> Option<Pair> {
        let view = views[index];
        let here = round.current(view, kind)?;
        let open = |pool: usize| round.is_open(pool, kind, ledger.traffic(pool));
        if !open(here) {
            return None;
        }
        let need = need::need(view, round.config).ok()?;
        let mut best: Option<(f64, Pair)> = None;
        let elsewhere = |of: MoveKind, there: usize| of == kind && there != here && open(there);
        for ((_, there), others) in sitting.iter().filter(|((of, there), _)| elsewhere(*of, *there)) {
            for &other in others.iter().filter(|&&other| free(other)) {
                let partner = views[other];
                let Ok(partners_need) = need::need(partner, round.config) else { continue };
                let apart = |mover, pool| round.groups.forbids(mover, pool, round.pools, kind).is_some();
                if apart(view, *there) || apart(partner, here) {
                    continue;
                }
                if rules::stays(partner) || !self.may_exchange(partner, kind, here, round) {
                    continue;
                }
                let (own, partners) = (ledger.own(&view.instance), ledger.own(&partner.instance));
                let at = |need, pool: usize, mover, own: &[Entry], other: &[Entry]| {
                    let room = ledger.available(pool, &[own, other].concat());
                    round
                        .compare(need, pool, room, kind, Some((mover, ledger.traffic(pool))))
                        .candidate(round.pools)
                };
                let there = at(&need, *there, view, own, partners);
                let back = at(&partners_need, here, partner, partners, own);
                let total = there.total + back.total;
                let possible = there.dropped.is_none() && back.dropped.is_none();
                if possible && best.as_ref().is_none_or(|(least, _)| total < *least) {
                    best = Some((total, Pair { partner: other, there, here: back }));
                }
            }
        }
        best.map(|(_, pair)| pair)
    }

    /// The partner is not forced: it must have rested, and must not be led back to where it was.
    fn may_exchange(&self, partner: &InstanceView, kind: MoveKind, to: usize, round: &Round<'_, '_>) -> bool {
        let Some(memory) = self.memory(&partner.instance) else { return true };
        let wait_ms = round.config.cool_down_ms;
        let rested =
            |at: Option<UnixMillis>, wait_ms: u64| at.is_none_or(|at| round.now.since(at) >= wait_ms);
        !memory.is_in_flight()
            && memory.last_failure.is_none()
            && rested(memory.last_move, wait_ms)
            && rested(memory.left(kind, &round.pools[to].name), self.return_ms())
    }
}

impl Dropped {
    /// Whether it is the room that is missing, and nothing else.
    pub fn is_for_want_of_room(&self) -> bool {
        matches!(self, Self::Cores { .. } | Self::Memory { .. } | Self::Flow { .. } | Self::Space { .. })
    }
}
