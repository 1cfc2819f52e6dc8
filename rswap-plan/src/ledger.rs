//! Who is promised what in a round: capacity is reserved across decisions, so that two instances are never sent to
//! the same free core. Sums are kept per pool: what is left of one is known without a walk over all instances.

use std::collections::BTreeMap;

use rswap_types::{InstanceName, Pool, PoolKind, overlap};

use crate::{PlanConfig, score::Room};

/// What an instance is promised: reference cores and bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Promise {
    /// What it is expected to need.
    pub(super) expected_cores: f64,
    /// What its limit is above that.
    pub(super) spread_cores: f64,
    pub(super) bytes: u64,
}

/// Where an instance counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// On this host, on the CPU pool of this number; `None` = on every core.
    Here(Option<usize>),
    /// On the host pool of this number.
    At(usize),
    /// On a host that is no pool.
    Elsewhere,
}

/// One promise at one place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    promise: Promise,
    place: Place,
}

/// What several are promised together, in cores of a pool and bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    expected: f64,
    spread: f64,
    spread_squared: f64,
    bytes: u64,
}

impl Sum {
    fn add(&mut self, other: &Self) {
        self.expected += other.expected;
        self.spread += other.spread;
        self.spread_squared += other.spread_squared;
        self.bytes = self.bytes.saturating_add(other.bytes);
    }

    fn take(&mut self, other: &Self) {
        self.expected = (self.expected - other.expected).max(0.0);
        self.spread = (self.spread - other.spread).max(0.0);
        self.spread_squared = (self.spread_squared - other.spread_squared).max(0.0);
        self.bytes = self.bytes.saturating_sub(other.bytes);
    }

    /// What all need together at the limit, with one more of this spread, less its spread.
    fn cores_next_to(&self, spread: f64, correlation: f64) -> f64 {
        if correlation >= 1.0 {
            return self.expected + self.spread;
        }
        let (sum, squares) = (self.spread + spread, self.spread_squared + spread * spread);
        let together = (correlation * sum * sum + (1.0 - correlation) * squares).sqrt();
        self.expected + together - spread
    }
}

/// Moves that are under way.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Traffic {
    /// To a pool.
    pub(super) arriving: u32,
    /// From it.
    pub(super) leaving: u32,
}

/// Free capacity per pool, for one round.
pub(super) struct Ledger<'a> {
    pools: &'a [Pool],
    by_name: &'a BTreeMap<&'a str, usize>,
    headroom: f64,
    headroom_staying: f64,
    /// How far spreads add up: see [`PlanConfig::correlation`].
    correlation: f64,
    /// Number of the pool that this host is, if it is one.
    this_host: Option<usize>,
    /// Numbers of this host's own pools.
    own_pools: Vec<usize>,
    /// Share of the use on one of them (the last row: on every core) that falls on another.
    overlaps: Vec<Vec<f64>>,
    /// Use by what is not planned for, per pool.
    foreign: Vec<(f64, u64)>,
    /// What is promised, per pool.
    promised: Vec<Sum>,
    /// Moves to and from it, per pool.
    traffic: Vec<Traffic>,
    /// Where each instance counts: where it sits, then where it is going, as the capacity is gone at both ends.
    entries: BTreeMap<InstanceName, Vec<Entry>>,
}

/// Who uses how many cores (of its pool) and bytes now, and where.
pub(super) struct Seen<'v> {
    pub(super) host: Option<&'v str>,
    pub(super) cpu_pool: Option<&'v str>,
    pub(super) cores: f64,
    pub(super) bytes: u64,
}

impl<'a> Ledger<'a> {
    pub(super) fn new<'v>(
        pools: &'a [Pool],
        by_name: &'a BTreeMap<&'a str, usize>,
        config: &PlanConfig,
        seen: impl IntoIterator<Item = Seen<'v>>,
    ) -> Self {
        let own_pools: Vec<usize> =
            (0..pools.len()).filter(|&i| !matches!(pools[i].kind, PoolKind::Host { .. })).collect();
        let row = |on: Option<&str>| {
            let mut row = vec![0.0; pools.len()];
            own_pools.iter().for_each(|&index| row[index] = overlap(pools, on, &pools[index]));
            row
        };
        // Of other hosts, nothing falls on this one.
        let of_pool = |pool: &Pool| if pool.cpus().is_some() { row(Some(&pool.name)) } else { Vec::new() };
        let mut overlaps: Vec<Vec<f64>> = pools.iter().map(of_pool).collect();
        overlaps.push(row(None));
        let number = |cpu_pool: Option<&str>| {
            let found = cpu_pool.and_then(|name| by_name.get(name).copied());
            found.filter(|&index| pools[index].cpus().is_some()).unwrap_or(pools.len())
        };
        let mut foreign: Vec<(f64, u64)> =
            pools.iter().map(|pool| (pool.used.cores, pool.used.memory_bytes)).collect();
        for seen in seen {
            let mut take = |index: usize, cores: f64| {
                let (used, bytes) = &mut foreign[index];
                *used -= cores;
                *bytes = bytes.saturating_sub(seen.bytes);
            };
            match seen.host {
                Some(host) => by_name.get(host).into_iter().for_each(|&index| take(index, seen.cores)),
                None => {
                    let shares = &overlaps[number(seen.cpu_pool)];
                    own_pools.iter().for_each(|&index| take(index, seen.cores * shares[index]));
                }
            }
        }
        foreign.iter_mut().for_each(|(cores, _)| *cores = cores.max(0.0));
        Self {
            pools,
            by_name,
            headroom: config.headroom,
            headroom_staying: config.headroom_staying,
            correlation: config.correlation,
            this_host: pools.iter().position(|pool| pool.kind == PoolKind::ThisHost),
            own_pools,
            overlaps,
            foreign,
            promised: vec![Sum::default(); pools.len()],
            traffic: vec![Traffic::default(); pools.len()],
            entries: BTreeMap::new(),
        }
    }

    pub(super) fn sits(
        &mut self,
        name: &InstanceName,
        host: Option<&str>,
        cpu_pool: Option<&str>,
        promise: Promise,
    ) {
        let place = match host {
            Some(host) => self.by_name.get(host).map_or(Place::Elsewhere, |&index| Place::At(index)),
            None => Place::Here(cpu_pool.and_then(|pool| self.by_name.get(pool).copied())),
        };
        self.replace(name, vec![Entry { promise, place }]);
    }

    pub(super) fn under_way(&mut self, name: &InstanceName, to: &str, promise: Promise) {
        let place = self.going(name, to);
        let mut entries = self.own(name).to_vec();
        entries.push(Entry { promise, place });
        self.replace(name, entries);
    }

    /// From now on in this round, `name` counts where it goes, and no longer where it was.
    pub(super) fn moves(&mut self, name: &InstanceName, to: &str, promise: Promise) {
        let place = self.going(name, to);
        self.replace(name, vec![Entry { promise, place }]);
    }

    /// What is no core set of this host is another host, also one that was named by its address and is no pool.
    fn going(&mut self, name: &InstanceName, to: &str) -> Place {
        let target = self.by_name.get(to).copied();
        if target.is_none_or(|index| self.pools[index].cpus().is_none()) {
            let from = match self.own(name).first().map(|entry| entry.place) {
                Some(Place::At(host)) => Some(host),
                Some(Place::Here(_)) => self.this_host,
                Some(Place::Elsewhere) | None => None,
            };
            from.into_iter().for_each(|index| self.traffic[index].leaving += 1);
        }
        let Some(index) = target else { return Place::Elsewhere };
        self.traffic[index].arriving += 1;
        if self.pools[index].cpus().is_some() { Place::Here(Some(index)) } else { Place::At(index) }
    }

    fn replace(&mut self, name: &InstanceName, entries: Vec<Entry>) {
        let old = self.entries.insert(name.clone(), entries.clone()).unwrap_or_default();
        for entry in &old {
            self.count(entry, Sum::take);
        }
        for entry in &entries {
            self.count(entry, Sum::add);
        }
    }

    fn count(&mut self, entry: &Entry, change: impl Fn(&mut Sum, &Sum)) {
        match entry.place {
            Place::Elsewhere => {}
            Place::At(index) => {
                let share = self.share(entry, index);
                change(&mut self.promised[index], &share);
            }
            Place::Here(_) => {
                for at in 0..self.own_pools.len() {
                    let index = self.own_pools[at];
                    let share = self.share(entry, index);
                    change(&mut self.promised[index], &share);
                }
            }
        }
    }

    /// What a promise takes of pool number `index`, in its own cores, and bytes.
    fn share(&self, entry: &Entry, index: usize) -> Sum {
        let pool = &self.pools[index];
        let (share, memory) = match (&pool.kind, entry.place) {
            (PoolKind::Host { .. }, Place::At(host)) if host == index => (1.0, true),
            (PoolKind::ThisHost, Place::Here(_)) => (1.0, true),
            (PoolKind::Cpu { .. }, Place::Here(on)) => {
                let cores = on.filter(|&on| self.pools[on].cpus().is_some()).unwrap_or(self.pools.len());
                (self.overlaps[cores][index], false)
            }
            _ => return Sum::default(),
        };
        let cores = share / pool.performance.max(1e-6);
        let spread = entry.promise.spread_cores * cores;
        Sum {
            expected: entry.promise.expected_cores * cores,
            spread,
            spread_squared: spread * spread,
            bytes: if memory { entry.promise.bytes } else { 0 },
        }
    }

    /// What an instance is promised itself.
    pub(super) fn own(&self, name: &InstanceName) -> &[Entry] {
        self.entries.get(name).map_or(&[], Vec::as_slice)
    }

    /// Moves to and from pool number `index`.
    pub(super) fn traffic(&self, index: usize) -> Traffic {
        self.traffic[index]
    }

    /// What of pool number `index` can be had by who is promised `own` and would come: what is left next to all others.
    pub(super) fn available(&self, index: usize, own: &[Entry]) -> Room {
        self.left(index, own, self.headroom)
    }

    /// The same for who is there.
    pub(super) fn kept(&self, index: usize, own: &[Entry]) -> Room {
        self.left(index, own, self.headroom_staying)
    }

    fn left(&self, index: usize, own: &[Entry], headroom: f64) -> Room {
        let pool = &self.pools[index];
        let mut others = self.promised[index];
        for entry in own {
            if entry.place == Place::At(index) || matches!(entry.place, Place::Here(_)) {
                others.take(&self.share(entry, index));
            }
        }
        // Of two that change places, the first is who is asked for.
        let spread = own.first().map_or(0.0, |entry| entry.promise.spread_cores / pool.performance.max(1e-6));
        let (instances, foreign) = (others.cores_next_to(spread, self.correlation), self.foreign[index].0);
        let bytes = others.bytes.saturating_add(self.foreign[index].1);
        let usable = 1.0 - headroom;
        let most = match pool.kind {
            PoolKind::Cpu { instance_cores: Some(most), .. } => most,
            _ => f64::INFINITY,
        };
        let next_to = |used: f64| (pool.capacity.cores * usable - used).max(0.0).min(most);
        let free_bytes = ((pool.capacity.memory_bytes as f64 * usable) as u64).saturating_sub(bytes);
        Room {
            cores: next_to(instances + foreign),
            without_others: next_to(instances),
            bytes: free_bytes,
            others_cores: foreign,
            beside_cores: others.expected + foreign,
        }
    }
}
