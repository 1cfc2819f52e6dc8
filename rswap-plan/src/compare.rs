//! The numbers of a pool for one instance.

use std::collections::BTreeMap;

use rswap_types::{Pool, PoolKind, PoolState, UnixMillis};

use crate::{
    Candidate, Dropped, InstanceView, MoveKind, MovePrice, NeedUsed, PlanConfig, Terms,
    ledger::Traffic,
    price,
    rank::Rank,
    rules::Groups,
    score::{self, Room},
};

/// What one round of planning rests on.
pub(super) struct Round<'a, 'v> {
    pub(super) now: UnixMillis,
    pub(super) pools: &'a [Pool],
    pub(super) this_host: Option<usize>,
    /// Bytes of memory per second to it, per pool.
    pub(super) links: Vec<f64>,
    pub(super) config: &'a PlanConfig,
    pub(super) by_name: &'a BTreeMap<&'a str, usize>,
    /// Moves to and from it in the last hour, per pool.
    pub(super) last_hour: Vec<u32>,
    /// Who of each group is where.
    pub(super) groups: Groups<'v>,
    /// Finds the best pools for an instance.
    pub(super) rank: Rank,
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

impl Round<'_, '_> {
    /// Number of the pool that the instance sits on. One that may use every core sits on the host as a whole.
    pub(super) fn current(&self, view: &InstanceView, kind: MoveKind) -> Option<usize> {
        if let Some(host) = &view.host {
            return self.by_name.get(host.as_str()).copied().filter(|_| kind == MoveKind::Host);
        }
        let own = match kind {
            MoveKind::Cpu => view.cpu_pool.as_deref().and_then(|name| self.by_name.get(name).copied()),
            MoveKind::Host => None,
            // Plans of their own.
            MoveKind::Storage | MoveKind::Link => return None,
        };
        own.filter(|&index| self.pools[index].cpus().is_some()).or(self.this_host)
    }

    /// Scores pool number `index`; `moving` is who would have to move there, next to what other moves; `None` for the pool that
    /// it sits on.
    pub(super) fn compare(
        &self,
        need: &NeedUsed,
        index: usize,
        room: Room,
        kind: MoveKind,
        moving: Option<(&InstanceView, Traffic)>,
    ) -> Compared {
        let (pool, config) = (&self.pools[index], self.config);
        let terms = score::terms(need, pool, &room, config);
        let link = self.links[index];
        let moved = moving.map(|(view, _)| price::price(kind, view, terms.cost_per_hour, link, config));
        let (move_price, hopeless) = moved.map_or((None, None), |(price, dropped)| (Some(price), dropped));
        let traffic = moving.filter(|_| kind == MoveKind::Host).map(|(_, traffic)| traffic);
        // Between core sets, the host as a whole is only where an instance is that may use every core.
        let whole = kind == MoveKind::Cpu && pool.kind == PoolKind::ThisHost;
        let dropped = match if whole { &PoolState::Ready } else { &pool.state } {
            PoolState::Unavailable { reason } => Some(Dropped::Unavailable { reason: reason.clone() }),
            PoolState::Draining => Some(Dropped::Draining),
            PoolState::Ready if terms.limit_cores > room.cores => {
                Some(Dropped::Cores { needed: terms.limit_cores, available: room.cores })
            }
            PoolState::Ready if kind == MoveKind::Host && need.limit_bytes > room.bytes => {
                Some(Dropped::Memory { needed_bytes: need.limit_bytes, available_bytes: room.bytes })
            }
            PoolState::Ready => traffic.and_then(|traffic| self.budget(index, traffic)).or(hopeless),
        };
        debug_assert!(
            moving.is_none_or(|(_, traffic)| dropped.is_some() || self.is_open(index, kind, traffic)),
            "a pool is closed for no reason"
        );
        let score = terms.score();
        let total = score + move_price.map_or(0.0, |price| price.money / self.horizon_hours());
        Compared { index, terms, score, move_price, total, dropped }
    }
}

impl Round<'_, '_> {
    /// The planning horizon, in hours.
    pub(super) fn horizon_hours(&self) -> f64 {
        self.config.horizon_ms as f64 / 3_600_000.0
    }

    /// Whether anybody may move to pool number `index` now, by its state and budgets: where not, [`Round::compare`] has a reason for
    /// everybody.
    pub(super) fn is_open(&self, index: usize, kind: MoveKind, traffic: Traffic) -> bool {
        let pool = &self.pools[index];
        match kind {
            // Whoever may use every core sits on the host as a whole.
            MoveKind::Cpu => pool.state == PoolState::Ready || pool.kind == PoolKind::ThisHost,
            MoveKind::Host => pool.state == PoolState::Ready && self.has_budget(index, traffic),
            MoveKind::Storage | MoveKind::Link => false,
        }
    }

    /// The budgets' part of it: [`Round::budget`] has no reason against a move to host number `index`.
    fn has_budget(&self, index: usize, Traffic { arriving, leaving }: Traffic) -> bool {
        let on_link = arriving + leaving;
        arriving < self.config.moves_per_host
            && on_link < self.config.moves_per_link
            && self.last_hour[index] + on_link < self.config.moves_per_hour
    }

    /// Why nobody may move to host number `index` now, by the budgets of hosts, links and hours.
    fn budget(&self, index: usize, traffic: Traffic) -> Option<Dropped> {
        let arriving = traffic.arriving;
        if arriving >= self.config.moves_per_host {
            return Some(Dropped::Busy { moves: arriving });
        }
        self.link_budget(index, traffic)
    }

    /// Why nobody may move to or from host number `index` now, by the budgets of links and hours.
    pub(super) fn link_budget(&self, index: usize, traffic: Traffic) -> Option<Dropped> {
        let host = || self.pools[index].name.clone();
        let (on_link, spent) = (traffic.arriving + traffic.leaving, self.last_hour[index]);
        if on_link >= self.config.moves_per_link {
            return Some(Dropped::LinkBusy { host: host(), moves: on_link });
        }
        let in_hour = spent + on_link;
        (in_hour >= self.config.moves_per_hour).then(|| Dropped::HourSpent { host: host(), moves: in_hour })
    }
}

impl Compared {
    /// Out of the question for another reason as well.
    pub(super) fn but(mut self, dropped: Option<Dropped>) -> Self {
        self.dropped = dropped.or(self.dropped);
        self
    }

    /// Out of the question for this, if for nothing else.
    pub(super) fn but_after(mut self, dropped: Option<Dropped>) -> Self {
        self.dropped = self.dropped.or(dropped);
        self
    }

    pub(super) fn candidate(self, pools: &[Pool]) -> Candidate {
        Candidate {
            pool: pools[self.index].name.clone(),
            score: self.score,
            terms: self.terms,
            flow: None,
            move_price: self.move_price,
            total: self.total,
            dropped: self.dropped,
        }
    }
}

/// Whether the pool can be where an instance sits, by this kind.
pub(super) fn is_of_kind(pool: &Pool, kind: MoveKind) -> bool {
    is_candidate(pool, kind) || (kind == MoveKind::Host && pool.kind == PoolKind::ThisHost)
}

pub(super) fn is_candidate(pool: &Pool, kind: MoveKind) -> bool {
    match kind {
        MoveKind::Cpu => matches!(pool.kind, PoolKind::Cpu { .. }),
        MoveKind::Host => matches!(pool.kind, PoolKind::Host { .. }),
        MoveKind::Storage => matches!(pool.kind, PoolKind::Storage { .. }),
        MoveKind::Link => matches!(pool.kind, PoolKind::Link { .. }),
    }
}
