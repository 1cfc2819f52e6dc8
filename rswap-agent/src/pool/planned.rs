//! The pools that plans see: from what was found, and from the configuration.

use procfs::{Current, Meminfo};
use rswap_types::{LatencyCurve, SlowdownCurve};

use super::{
    Capacity, Flow, Inventory, Known, LocalKind, LocalPool, Pool, PoolKind, PoolState, State, THIS_HOST,
};
use crate::config::{Config, PoolConfig, PoolKindConfig};

const GIB: f64 = (1u64 << 30) as f64;

/// All pools of this host as they are now: this host itself, other hosts, and core sets.
pub fn discover(config: &Config) -> Vec<Pool> {
    planned(config, &super::look(config, None))
}

/// The pools that plans see, in what was found.
pub fn planned(config: &Config, found: &Inventory) -> Vec<Pool> {
    let memory_bytes = Meminfo::current().map_or(0, |info| info.mem_total);
    planned_with(config, found, memory_bytes)
}

fn planned_with(config: &Config, found: &Inventory, memory_bytes: u64) -> Vec<Pool> {
    let core_sets: Vec<Pool> =
        found.pools.iter().filter_map(|pool| core_set(pool, config.this_host.performance)).collect();
    let host = &config.this_host;
    let capacity = Capacity {
        cores: host.cores.unwrap_or(found.online.len() as f64),
        memory_bytes: host.memory_gib.map_or(memory_bytes, |gib| (gib * GIB) as u64),
    };
    let this_host = Pool {
        name: THIS_HOST.to_owned(),
        kind: PoolKind::ThisHost,
        capacity,
        used: Capacity::default(),
        cost_per_core_hour: host.cost_per_core_hour,
        cost_per_gib_hour: host.cost_per_gib_hour,
        performance: host.performance,
        state: PoolState::Ready,
    };
    let others = config.pools.iter().filter_map(another_host);
    let parts = flows(config, found);
    std::iter::once(this_host).chain(core_sets).chain(others).chain(parts).collect()
}

/// What volumes and ports can be put on by plans: storage with a directory for volumes, and links that the configuration names.
fn flows(config: &Config, found: &Inventory) -> Vec<Pool> {
    let storage = |pool: &&LocalPool| matches!(pool.kind, LocalKind::Storage { .. });
    let fastest_us = found.pools.iter().filter(storage).filter_map(LocalPool::latency_us).reduce(f64::min);
    let named = config.pools.iter().filter_map(|wanted| {
        let PoolKindConfig::Local { volumes, .. } = &wanted.kind else { return None };
        let pool = found.pool(&wanted.name)?;
        match &pool.kind {
            LocalKind::Storage { .. } => volumes.as_ref().map(|_| storage_pool(found, pool, fastest_us)),
            LocalKind::Link { instance_rate, .. } => Some(link_pool(pool, instance_rate.as_ref())),
            _ => None,
        }
    });
    named.collect()
}

/// Its speed is that of its requests, relative to the fastest one's. What others use, and what requests really take, is known only
/// next to what instances do: see [`super::Disks`].
fn storage_pool(found: &Inventory, pool: &LocalPool, fastest_us: Option<f64>) -> Pool {
    let bytes = |known: &Option<Known>| known.as_ref().map_or(0, |known| known.value as u64);
    let measured = fastest_us.zip(pool.latency_us()).map(|(fastest, own)| fastest / own.max(1e-9));
    Pool {
        cost_per_gib_hour: pool.cost_per_hour.as_ref().map_or(0.0, |cost| cost.value),
        performance: pool.relative_speed().or(measured).unwrap_or(1.0),
        ..part(
            pool,
            PoolKind::Storage {
                size_bytes: bytes(&pool.capacity),
                free_bytes: bytes(&pool.free),
                gives: pool.gives(),
                disks: super::disks_of(found, pool).map(|device| device.name.clone()).collect(),
                foreign: Flow::default(),
                latency: LatencyCurve::default(),
            },
        )
    }
}

/// What others use of it is known only next to what instances do: see [`super::with_usage`].
fn link_pool(pool: &LocalPool, instance_rate: Option<&Known>) -> Pool {
    let used = pool.used.as_ref().map_or(0.0, |used| used.value / 8.0);
    part(
        pool,
        PoolKind::Link {
            gives: pool.gives(),
            instance_bytes_per_s: instance_rate.map(|rate| rate.value / 8.0),
            foreign: Flow { operations_per_s: 0.0, bytes_per_s: used },
            cost_per_gbit_hour: pool.cost_per_hour.as_ref().map_or(0.0, |cost| cost.value),
        },
    )
}

fn part(pool: &LocalPool, kind: PoolKind) -> Pool {
    Pool {
        name: pool.name.clone(),
        kind,
        capacity: Capacity::default(),
        used: Capacity::default(),
        cost_per_core_hour: 0.0,
        cost_per_gib_hour: 0.0,
        performance: 1.0,
        state: match pool.state.reason() {
            None => PoolState::Ready,
            Some(reason) => PoolState::Unavailable { reason: reason.to_owned() },
        },
    }
}

/// A set of cores as plans see it: what is not online they leave alone.
fn core_set(pool: &LocalPool, performance: f64) -> Option<Pool> {
    let cpus = pool.kind.cpus()?;
    let instance_cores = match &pool.kind {
        LocalKind::Cores { instance_cores, .. } => instance_cores.as_ref().map(|most| most.value),
        _ => None,
    };
    let state = match (&pool.state, pool.state.reason()) {
        (State::Online, _) | (_, None) => PoolState::Ready,
        (_, Some(reason)) => PoolState::Unavailable { reason: reason.to_owned() },
    };
    Some(Pool {
        name: pool.name.clone(),
        capacity: Capacity {
            cores: pool.capacity.as_ref().map_or(0.0, |capacity| capacity.value),
            memory_bytes: 0,
        },
        kind: PoolKind::Cpu { cpus: cpus.clone(), instance_cores, slowdown: SlowdownCurve::default() },
        used: Capacity::default(),
        cost_per_core_hour: pool.cost_per_hour.as_ref().map_or(0.0, |cost| cost.value),
        cost_per_gib_hour: 0.0,
        performance: pool.relative_speed().unwrap_or(performance),
        state,
    })
}

fn another_host(pool: &PoolConfig) -> Option<Pool> {
    let PoolKindConfig::Host {
        host,
        cost_per_core_hour,
        cost_per_gib_hour,
        cores,
        memory_gib,
        performance,
        ..
    } = &pool.kind
    else {
        return None;
    };
    Some(Pool {
        name: pool.name.clone(),
        kind: PoolKind::Host { address: *host },
        capacity: Capacity { cores: *cores, memory_bytes: (memory_gib * GIB) as u64 },
        used: Capacity::default(),
        cost_per_core_hour: *cost_per_core_hour,
        cost_per_gib_hour: *cost_per_gib_hour,
        performance: *performance,
        state: PoolState::Ready,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rswap_pools::{Room, Root};

    use super::*;
    use crate::pool::CpuSet;
    use crate::units::UnixMillis;

    fn planned_in(config: &Config, root: &Path, memory_bytes: u64) -> Vec<Pool> {
        let room = |_: &Path| Ok(Room::default());
        let settings = crate::config::settings(config);
        let found = rswap_pools::discover(&Root::at(root, &room), &settings, UnixMillis(1));
        planned_with(config, &found, memory_bytes)
    }

    fn sysfs(online: &str, capacities: &[u32]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let cpus = dir.path().join("sys/devices/system/cpu");
        std::fs::create_dir_all(&cpus).unwrap();
        std::fs::write(cpus.join("online"), online).unwrap();
        for (cpu, capacity) in capacities.iter().enumerate() {
            std::fs::create_dir(cpus.join(format!("cpu{cpu}"))).unwrap();
            std::fs::write(cpus.join(format!("cpu{cpu}/cpu_capacity")), format!("{capacity}\n")).unwrap();
        }
        dir
    }

    #[test]
    fn equal_cores_are_one_pool() {
        let dir = sysfs("0-1\n", &[1024, 1024]);
        let pools = planned_in(&Config::default(), dir.path(), 1 << 30);
        assert_eq!(pools.len(), 2);
        assert_eq!((pools[0].name.as_str(), pools[0].capacity.memory_bytes), (THIS_HOST, 1 << 30));
        assert_eq!((pools[1].name.as_str(), pools[1].cpus()), ("cores", Some(&CpuSet::from([0, 1]))));
    }

    #[test]
    fn unequal_cores_are_a_pool_per_class() {
        let dir = sysfs("0-2\n", &[512, 1024, 512]);
        let pools = planned_in(&Config::default(), dir.path(), 0);
        assert_eq!((pools[1].cpus(), pools[1].performance), (Some(&CpuSet::from([1])), 1.0));
        assert_eq!((pools[2].cpus(), pools[2].performance), (Some(&CpuSet::from([0, 2])), 0.5));
    }

    #[test]
    fn the_configuration_wins_and_offline_cpus_are_said() {
        let text = "[[pool]]\nname='a'\ncpus='0'\n[[pool]]\nname='b'\ncpus='0,7'\n";
        let config = Config::parse(text, Path::new("t")).unwrap();
        let dir = sysfs("0-1\n", &[512, 1024]);
        let pools = planned_in(&config, dir.path(), 0);
        assert_eq!(pools.len(), 3);
        assert_eq!(pools[1].state, PoolState::Ready);
        assert_eq!(pools[2].state, PoolState::Unavailable { reason: "CPU 7 is not online".into() });
    }
}
