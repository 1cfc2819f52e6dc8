//! Which pools are the best for one instance.
//!
//! Of a fleet, most pools are forgotten at once: ranked by two numbers each, and only those that a decision shows are explained.
//! The numbers are those that [`Round::compare`] has, made by the same operations in the same order: ranks are exact.

use crate::{
    Candidate, Dropped, InstanceView, MoveKind, NeedUsed,
    compare::{self, Compared, Round},
    ledger::{Entry, Ledger},
    price::Way,
    score::{self, Room},
};

/// Finds the best pools, in order, and says how many others there are.
pub(super) type Rank = fn(&Ranking<'_, '_, '_>) -> (Vec<Candidate>, usize);

/// What a ranking rests on.
pub(super) struct Ranking<'a, 'r, 'v> {
    pub(super) round: &'a Round<'r, 'v>,
    pub(super) ledger: &'a Ledger<'r>,
    pub(super) view: &'a InstanceView,
    pub(super) need: &'a NeedUsed,
    pub(super) kind: MoveKind,
    /// What the instance is promised itself.
    pub(super) own: &'a [Entry],
    /// Number of the pool that it sits on.
    pub(super) here: Option<usize>,
    /// Why it can't leave that now.
    pub(super) no_leave: Option<Dropped>,
    /// It is short here only for what others take: pools that it left a short while ago are named by this, with the milliseconds until
    /// that may lead it back.
    pub(super) left_for_others: &'a [(String, u64)],
}

/// The best pools but the present one, in order, and how many others there are.
pub(super) fn best(ranking: &Ranking<'_, '_, '_>) -> (Vec<Candidate>, usize) {
    let kept = ranking.round.config.candidates_kept as usize;
    let (mut possible, mut dropped) = (Vec::new(), Vec::new());
    let mut way = ranking.over(ranking.round.config.link_bytes_per_s);
    for index in ranking.others() {
        let room = ranking.ledger.available(index, ranking.own);
        let way = ranking.way(index, &mut way);
        if ranking.is_possible(index, room, way) {
            possible.push((ranking.total(index, &room, way), index));
        } else {
            dropped.push(index);
        }
    }
    let left_out = (possible.len() + dropped.len()).saturating_sub(kept);
    ranking.keep(&mut possible, kept);
    // Who is out of the question is ranked only where too few others are there to be shown.
    if possible.len() < kept {
        let mut total = |index: usize| {
            let room = ranking.ledger.available(index, ranking.own);
            ranking.total(index, &room, ranking.way(index, &mut way))
        };
        let mut rest: Vec<_> = dropped.into_iter().map(|index| (total(index), index)).collect();
        ranking.keep(&mut rest, kept - possible.len());
        possible.append(&mut rest);
    }
    let explained = possible.iter().map(|&(_, index)| ranking.explain(index).candidate(ranking.round.pools));
    (explained.collect(), left_out)
}

impl Ranking<'_, '_, '_> {
    /// Numbers of the pools that it could move to.
    fn others(&self) -> impl Iterator<Item = usize> {
        let pools = self.round.pools.iter().enumerate();
        pools
            .filter(|(index, pool)| Some(*index) != self.here && compare::is_candidate(pool, self.kind))
            .map(|(index, _)| index)
    }

    /// The way over a link of this speed.
    fn over(&self, link: f64) -> (f64, Way) {
        (link, Way::new(self.kind, self.view, link, self.round.config))
    }

    /// The way to pool number `index`; hosts mostly have equal links, so the `last` one is looked at first.
    fn way<'w>(&self, index: usize, last: &'w mut (f64, Way)) -> &'w Way {
        let link = self.round.links[index];
        if last.0 != link {
            *last = self.over(link);
        }
        &last.1
    }

    /// Whether [`Ranking::explain`] has no reason to drop it.
    fn is_possible(&self, index: usize, room: Room, way: &Way) -> bool {
        let (pool, need, round) = (&self.round.pools[index], self.need, self.round);
        self.no_leave.is_none()
            && way.hopeless.is_none()
            && need.limit_cores / score::speed(pool) <= room.cores
            && (self.kind == MoveKind::Cpu || need.limit_bytes <= room.bytes)
            && round.is_open(index, self.kind, self.ledger.traffic(index))
            && round.groups.forbids(self.view, index, round.pools, self.kind).is_none()
            && self.just_left(index).is_none()
    }

    /// What others take here may be what they do for this very instance, and come along: it must not walk in circles.
    fn just_left(&self, index: usize) -> Option<Dropped> {
        let name = &self.round.pools[index].name;
        let left = self.left_for_others.iter().find(|(pool, _)| pool == name);
        left.map(|&(_, left_ms)| Dropped::LeftForOthers { left_ms })
    }

    fn total(&self, index: usize, room: &Room, way: &Way) -> f64 {
        let terms = score::terms(self.need, &self.round.pools[index], room, self.round.config);
        terms.score() + way.money(terms.cost_per_hour) / self.round.horizon_hours()
    }

    /// Keeps the best `count` of them, in order. Equal ones are ordered by name.
    fn keep(&self, ranked: &mut Vec<(f64, usize)>, count: usize) {
        let name = |index: usize| &self.round.pools[index].name;
        let order =
            |a: &(f64, usize), b: &(f64, usize)| a.0.total_cmp(&b.0).then_with(|| name(a.1).cmp(name(b.1)));
        if ranked.len() > count {
            ranked.select_nth_unstable_by(count, order);
            ranked.truncate(count);
        }
        ranked.sort_by(order);
    }

    /// All that there is to say about pool number `index`.
    fn explain(&self, index: usize) -> Compared {
        let (room, traffic) = (self.ledger.available(index, self.own), self.ledger.traffic(index));
        let forbidden = || self.round.groups.forbids(self.view, index, self.round.pools, self.kind);
        self.round
            .compare(self.need, index, room, self.kind, Some((self.view, traffic)))
            .but_after(self.just_left(index))
            .but(self.no_leave.clone().or_else(forbidden))
    }
}

/// The same as [`best`], by explaining all and sorting them.
#[cfg(test)]
pub(super) fn plainly(ranking: &Ranking<'_, '_, '_>) -> (Vec<Candidate>, usize) {
    let mut all: Vec<Candidate> =
        ranking.others().map(|index| ranking.explain(index).candidate(ranking.round.pools)).collect();
    all.sort_by(|a, b| {
        let dropped = a.dropped.is_some().cmp(&b.dropped.is_some());
        dropped.then(a.total.total_cmp(&b.total)).then_with(|| a.pool.cmp(&b.pool))
    });
    let kept = ranking.round.config.candidates_kept as usize;
    let left_out = all.len().saturating_sub(kept);
    all.truncate(kept);
    (all, left_out)
}
