//! Who is promised what in a round: capacity is reserved across decisions, so that two instances are never sent to
//! the same free core.

use std::collections::BTreeMap;

use crate::{
    instance::InstanceName,
    pool::{Pool, PoolKind, overlap},
};

/// What an instance is promised: reference cores and bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Promise {
    pub(super) reference_cores: f64,
    pub(super) bytes: u64,
}

#[derive(Clone, Debug)]
struct Entry {
    promise: Promise,
    /// CPU pool that it sits on or goes to; `None` = every core.
    cpu_pool: Option<String>,
    /// Host that it goes to; `None` = this one.
    host: Option<String>,
}

/// Free capacity per pool, for one round.
pub(super) struct Ledger<'a> {
    pools: &'a [Pool],
    headroom: f64,
    /// Use by what is not planned for, per pool.
    foreign: Vec<(f64, u64)>,
    entries: BTreeMap<InstanceName, Entry>,
    /// Targets of moves that are under way: the capacity is gone at both ends.
    in_flight: Vec<(InstanceName, Entry)>,
}

impl<'a> Ledger<'a> {
    /// `seen`: who uses how many cores (of its pool) and bytes now, on which CPU pool.
    pub(super) fn new(pools: &'a [Pool], headroom: f64, seen: &[(Option<&str>, f64, u64)]) -> Self {
        let foreign = pools
            .iter()
            .map(|pool| {
                let (mut cores, mut bytes) = (pool.used.cores, pool.used.memory_bytes);
                if !matches!(pool.kind, PoolKind::Host { .. }) {
                    for (sits_on, own_cores, own_bytes) in seen {
                        cores -= own_cores * overlap(pools, *sits_on, pool);
                        bytes = bytes.saturating_sub(*own_bytes);
                    }
                }
                (cores.max(0.0), bytes)
            })
            .collect();
        Self { pools, headroom, foreign, entries: BTreeMap::new(), in_flight: Vec::new() }
    }

    pub(super) fn sits(&mut self, name: &InstanceName, cpu_pool: Option<&str>, promise: Promise) {
        let entry = Entry { promise, cpu_pool: cpu_pool.map(str::to_owned), host: None };
        self.entries.insert(name.clone(), entry);
    }

    pub(super) fn under_way(&mut self, name: &InstanceName, to: &str, promise: Promise) {
        let entry = self.going(to, promise);
        self.in_flight.push((name.clone(), entry));
    }

    /// From now on in this round, `name` counts where it goes, and no longer where it was.
    pub(super) fn moves(&mut self, name: &InstanceName, to: &str, promise: Promise) {
        let entry = self.going(to, promise);
        self.entries.insert(name.clone(), entry);
    }

    /// What is no core set of this host is another host, also one that was named by its address and is no pool.
    fn going(&self, to: &str, promise: Promise) -> Entry {
        let is_core_set = self.pools.iter().any(|pool| pool.name == to && pool.cpus().is_some());
        let name = Some(to.to_owned());
        if is_core_set {
            Entry { promise, cpu_pool: name, host: None }
        } else {
            Entry { promise, cpu_pool: None, host: name }
        }
    }

    /// (cores, bytes) of pool number `index` that `name` can have: what is left next to all others.
    pub(super) fn available(&self, index: usize, name: &InstanceName) -> (f64, u64) {
        let pool = &self.pools[index];
        let (mut cores, mut bytes) = self.foreign[index];
        let others = self.entries.iter();
        let in_flight = self.in_flight.iter().map(|(other, entry)| (other, entry));
        for (_, entry) in others.chain(in_flight).filter(|(other, _)| *other != name) {
            let (share, memory) = match (&pool.kind, &entry.host) {
                (PoolKind::Host { .. }, Some(host)) => {
                    (f64::from(u8::from(*host == pool.name)), *host == pool.name)
                }
                (PoolKind::Host { .. }, None) => (0.0, false),
                (_, Some(_)) => (0.0, false),
                (PoolKind::ThisHost, None) => (1.0, true),
                (PoolKind::Cpu { .. }, None) => (overlap(self.pools, entry.cpu_pool.as_deref(), pool), false),
            };
            cores += entry.promise.reference_cores * share / pool.performance.max(1e-6);
            bytes = bytes.saturating_add(if memory { entry.promise.bytes } else { 0 });
        }
        let usable = 1.0 - self.headroom;
        let free_cores = (pool.capacity.cores * usable - cores).max(0.0);
        let free_bytes = ((pool.capacity.memory_bytes as f64 * usable) as u64).saturating_sub(bytes);
        (free_cores, free_bytes)
    }
}
