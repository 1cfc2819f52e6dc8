//! What there is to sit on: from the configuration, and from sysfs where that says nothing.

use std::{collections::BTreeMap, path::Path};

use procfs::{Current, Meminfo};

use super::{Capacity, CpuSet, Pool, PoolKind, PoolState, THIS_HOST, cpu_list};
use crate::config::{Config, PoolConfig, PoolKindConfig};

const GIB: f64 = (1u64 << 30) as f64;

/// All pools of this host: this host itself, the configured ones, and, if no core set is configured, one per core class.
pub fn discover(config: &Config) -> Vec<Pool> {
    let memory_bytes = Meminfo::current().map_or(0, |info| info.mem_total);
    discover_in(config, Path::new("/sys/devices/system/cpu"), memory_bytes)
}

fn discover_in(config: &Config, sysfs: &Path, memory_bytes: u64) -> Vec<Pool> {
    let online = online(sysfs);
    let host = &config.this_host;
    let capacity = Capacity {
        cores: host.cores.unwrap_or(online.len() as f64),
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
    let mut pools = vec![this_host];
    pools.extend(config.pools.iter().map(|pool| configured(pool, &online)));
    if !pools.iter().any(|pool| pool.cpus().is_some()) {
        let classes = core_classes(sysfs, &online);
        pools.extend(classes.into_iter().map(|(name, cpus, speed)| Pool {
            name,
            capacity: Capacity { cores: cpus.len() as f64, memory_bytes: 0 },
            kind: PoolKind::Cpu { cpus },
            used: Capacity::default(),
            cost_per_core_hour: host.cost_per_core_hour,
            cost_per_gib_hour: 0.0,
            performance: host.performance * speed,
            state: PoolState::Ready,
        }));
    }
    pools
}

fn configured(pool: &PoolConfig, online: &CpuSet) -> Pool {
    let (kind, capacity, cost_per_gib_hour, state) = match &pool.kind {
        PoolKindConfig::Cpu { cpus, capacity_cores } => {
            let missing: CpuSet = cpus.difference(online).copied().collect();
            let state = if missing.is_empty() {
                PoolState::Ready
            } else {
                PoolState::Unavailable { reason: format!("CPU {} is not online", cpu_list::format(&missing)) }
            };
            // More than there are CPUs cannot be given, whatever is configured.
            let cores = capacity_cores.unwrap_or(f64::INFINITY).min(cpus.len() as f64);
            (PoolKind::Cpu { cpus: cpus.clone() }, Capacity { cores, memory_bytes: 0 }, 0.0, state)
        }
        PoolKindConfig::Host { host, cost_per_gib_hour, cores, memory_gib } => (
            PoolKind::Host { address: *host },
            Capacity { cores: *cores, memory_bytes: (memory_gib * GIB) as u64 },
            *cost_per_gib_hour,
            PoolState::Ready,
        ),
    };
    Pool {
        name: pool.name.clone(),
        kind,
        capacity,
        used: Capacity::default(),
        cost_per_core_hour: pool.cost_per_core_hour,
        cost_per_gib_hour,
        performance: pool.performance,
        state,
    }
}

/// The CPUs that are online; where sysfs is not there, as many as this process may use.
fn online(sysfs: &Path) -> CpuSet {
    let listed =
        std::fs::read_to_string(sysfs.join("online")).ok().and_then(|text| cpu_list::parse(&text).ok());
    match listed {
        Some(cpus) if !cpus.is_empty() => cpus,
        _ => (0..std::thread::available_parallelism().map_or(1, |count| count.get())).collect(),
    }
}

/// One (name, CPUs, speed relative to the fastest) per class of cores, fastest first. The kernel's own
/// `cpu_capacity` tells classes apart where it has them; elsewhere the highest clock rate does.
fn core_classes(sysfs: &Path, online: &CpuSet) -> Vec<(String, CpuSet, f64)> {
    let read = |cpu: usize, file: &str| -> Option<u64> {
        std::fs::read_to_string(sysfs.join(format!("cpu{cpu}/{file}"))).ok()?.trim().parse().ok()
    };
    for file in ["cpu_capacity", "cpufreq/cpuinfo_max_freq"] {
        let mut classes: BTreeMap<u64, CpuSet> = BTreeMap::new();
        for &cpu in online {
            if let Some(speed) = read(cpu, file).filter(|&speed| speed > 0) {
                classes.entry(speed).or_default().insert(cpu);
            }
        }
        // A class of unknown speed cannot be compared: all or none must say.
        let known: usize = classes.values().map(CpuSet::len).sum();
        if classes.len() > 1 && known == online.len() {
            let fastest = classes.keys().next_back().copied().unwrap_or(1) as f64;
            let from_fastest = classes.into_iter().rev().enumerate();
            return from_fastest
                .map(|(i, (speed, cpus))| (format!("cores-{i}"), cpus, speed as f64 / fastest))
                .collect();
        }
    }
    vec![("cores".to_owned(), online.clone(), 1.0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(online: &str, capacities: &[u32]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("online"), online).unwrap();
        for (cpu, capacity) in capacities.iter().enumerate() {
            std::fs::create_dir(dir.path().join(format!("cpu{cpu}"))).unwrap();
            std::fs::write(dir.path().join(format!("cpu{cpu}/cpu_capacity")), format!("{capacity}\n"))
                .unwrap();
        }
        dir
    }

    #[test]
    fn equal_cores_are_one_pool() {
        let dir = sysfs("0-1\n", &[1024, 1024]);
        let pools = discover_in(&Config::default(), dir.path(), 1 << 30);
        assert_eq!(pools.len(), 2);
        assert_eq!((pools[0].name.as_str(), pools[0].capacity.memory_bytes), (THIS_HOST, 1 << 30));
        assert_eq!((pools[1].name.as_str(), pools[1].cpus()), ("cores", Some(&CpuSet::from([0, 1]))));
    }

    #[test]
    fn unequal_cores_are_a_pool_per_class() {
        let dir = sysfs("0-2\n", &[512, 1024, 512]);
        let pools = discover_in(&Config::default(), dir.path(), 0);
        assert_eq!((pools[1].cpus(), pools[1].performance), (Some(&CpuSet::from([1])), 1.0));
        assert_eq!((pools[2].cpus(), pools[2].performance), (Some(&CpuSet::from([0, 2])), 0.5));
    }

    #[test]
    fn the_configuration_wins_and_offline_cpus_are_said() {
        let text = "[[pool]]\nname='a'\ncpus='0'\n[[pool]]\nname='b'\ncpus='0,7'\n";
        let config = Config::parse(text, Path::new("t")).unwrap();
        let dir = sysfs("0-1\n", &[512, 1024]);
        let pools = discover_in(&config, dir.path(), 0);
        assert_eq!(pools.len(), 3);
        assert_eq!(pools[1].state, PoolState::Ready);
        assert_eq!(pools[2].state, PoolState::Unavailable { reason: "CPU 7 is not online".into() });
    }
}
