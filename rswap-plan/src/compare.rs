//! The numbers of every pool for one instance, and the best of them.

use std::collections::BTreeMap;

use rswap_types::{Pool, PoolKind, PoolState, UnixMillis};

use crate::{
    Candidate, Dropped, InstanceView, MoveKind, MovePrice, NeedUsed, PlanConfig, Terms, price, score,
};

/// Candidates that a decision keeps: of a fleet of a thousand hosts, the best are enough to explain it.
const KEPT: usize = 16;

/// What one round of planning rests on.
pub(super) struct Round<'a> {
    pub(super) now: UnixMillis,
    pub(super) pools: &'a [Pool],
    pub(super) this_host: Option<usize>,
    /// Bytes of memory per second to it, per pool.
    pub(super) links: Vec<f64>,
    pub(super) config: &'a PlanConfig,
    pub(super) by_name: &'a BTreeMap<&'a str, usize>,
}

/// The numbers of one pool.
pub(super) struct Compared {
    index: usize,
    terms: Terms,
    score: f64,
    move_price: Option<MovePrice>,
    total: f64,
    dropped: Option<Dropped>,
}

impl Round<'_> {
    /// Number of the pool that the instance sits on. One that may use every core sits on the host as a whole.
    pub(super) fn current(&self, view: &InstanceView, kind: MoveKind) -> Option<usize> {
        if let Some(host) = &view.host {
            return self.by_name.get(host.as_str()).copied().filter(|_| kind == MoveKind::Host);
        }
        let own = match kind {
            MoveKind::Cpu => view.cpu_pool.as_deref().and_then(|name| self.by_name.get(name).copied()),
            MoveKind::Host => None,
        };
        own.filter(|&index| self.pools[index].cpus().is_some()).or(self.this_host)
    }

    /// Scores pool number `index`; `moving` is who would have to move there, next to how many others that are on their way;
    /// `None` for the pool that it sits on.
    pub(super) fn compare(
        &self,
        need: &NeedUsed,
        index: usize,
        (cores, bytes): (f64, u64),
        kind: MoveKind,
        moving: Option<(&InstanceView, u32)>,
    ) -> Compared {
        let (pool, config) = (&self.pools[index], self.config);
        let terms = score::terms(need, pool, cores, config.weight);
        let link = self.links[index];
        let moved = moving.map(|(view, _)| price::price(kind, view, terms.cost_per_hour, link, config));
        let (move_price, hopeless) = moved.map_or((None, None), |(price, dropped)| (Some(price), dropped));
        let horizon_hours = config.horizon_ms as f64 / 3_600_000.0;
        let busy = moving.map_or(0, |(_, busy)| busy);
        let dropped = match &pool.state {
            PoolState::Unavailable { reason } => Some(Dropped::Unavailable { reason: reason.clone() }),
            PoolState::Ready if terms.limit_cores > cores => {
                Some(Dropped::Cores { needed: terms.limit_cores, available: cores })
            }
            PoolState::Ready if kind == MoveKind::Host && need.limit_bytes > bytes => {
                Some(Dropped::Memory { needed_bytes: need.limit_bytes, available_bytes: bytes })
            }
            PoolState::Ready if kind == MoveKind::Host && busy >= config.moves_per_host => {
                Some(Dropped::Busy { moves: busy })
            }
            PoolState::Ready => hopeless,
        };
        let score = terms.score();
        let total = score + move_price.map_or(0.0, |price| price.money / horizon_hours);
        Compared { index, terms, score, move_price, total, dropped }
    }
}

impl Compared {
    pub(super) fn candidate(self, pools: &[Pool]) -> Candidate {
        Candidate {
            pool: pools[self.index].name.clone(),
            score: self.score,
            terms: self.terms,
            move_price: self.move_price,
            total: self.total,
            dropped: self.dropped,
        }
    }
}

/// The best of `pools` by what `compare` says, in order, and how many others there were.
pub(super) fn best(
    which: impl Iterator<Item = usize>,
    pools: &[Pool],
    compare: impl Fn(usize) -> Compared,
) -> (Vec<Candidate>, usize) {
    // Of a thousand pools, most are forgotten at once: only what they are ranked by is kept.
    let mut ranked: Vec<(bool, f64, usize)> = which
        .map(|index| {
            let compared = compare(index);
            (compared.dropped.is_some(), compared.total, index)
        })
        .collect();
    let order = |a: &(bool, f64, usize), b: &(bool, f64, usize)| {
        a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then_with(|| pools[a.2].name.cmp(&pools[b.2].name))
    };
    let left_out = ranked.len().saturating_sub(KEPT);
    if left_out > 0 {
        ranked.select_nth_unstable_by(KEPT, order);
        ranked.truncate(KEPT);
    }
    ranked.sort_by(order);
    (ranked.into_iter().map(|(_, _, index)| compare(index).candidate(pools)).collect(), left_out)
}

pub(super) fn is_candidate(pool: &Pool, kind: MoveKind) -> bool {
    match kind {
        MoveKind::Cpu => matches!(pool.kind, PoolKind::Cpu { .. }),
        MoveKind::Host => matches!(pool.kind, PoolKind::Host { .. }),
    }
}
