//! How much of each pool is in use, from what the instances were seen to use. Pure.

use super::{Capacity, Pool, PoolKind, overlap};
use crate::profile::Profile;

/// `pools` with their `used` filled in. Each profile comes with the CPU pool that its instance sits on, `None` if it
/// may use every core. Core sets may overlap: a use is spread evenly over the CPUs of its pool.
/// What a host pool has in use is known to that host alone, and is left as it is.
pub fn with_usage(mut pools: Vec<Pool>, seen: &[(&Profile, Option<&str>)]) -> Vec<Pool> {
    let sets: Vec<Pool> = pools.clone();
    for pool in pools
        .iter_mut()
        .filter(|pool| !matches!(pool.kind, PoolKind::Host { .. }) && !pool.kind.is_for_flows())
    {
        pool.used = Capacity::default();
        for (profile, sits_on) in seen {
            let cores = if profile.cpu.cores.is_finite() { profile.cpu.cores.max(0.0) } else { 0.0 };
            pool.used.cores += cores * overlap(&sets, *sits_on, pool);
            if pool.kind == PoolKind::ThisHost {
                pool.used.memory_bytes = pool.used.memory_bytes.saturating_add(profile.memory.resident_bytes);
            }
        }
    }
    pools
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pool::{CpuSet, PoolState, THIS_HOST},
        profile::{CpuProfile, MemoryProfile, TcpProfile},
        units::UnixMillis,
    };

    fn pool(name: &str, kind: PoolKind) -> Pool {
        Pool {
            name: name.into(),
            kind,
            capacity: Capacity { cores: 2.0, memory_bytes: 0 },
            used: Capacity::default(),
            cost_per_core_hour: 0.0,
            cost_per_gib_hour: 0.0,
            performance: 1.0,
            state: PoolState::Ready,
        }
    }

    #[test]
    fn use_is_spread_over_common_cpus() {
        let pools = vec![
            pool(THIS_HOST, PoolKind::ThisHost),
            pool(
                "one",
                PoolKind::Cpu { cpus: CpuSet::from([0]), instance_cores: None, slowdown: Default::default() },
            ),
            pool(
                "both",
                PoolKind::Cpu {
                    cpus: CpuSet::from([0, 1]),
                    instance_cores: None,
                    slowdown: Default::default(),
                },
            ),
        ];
        let profile = Profile {
            instance: "a".parse().unwrap(),
            at: UnixMillis(0),
            window_ms: 1000,
            cpu: CpuProfile { cores: 0.8, ..CpuProfile::default() },
            block: vec![],
            block_counted: true,
            disk_neighbours: Vec::new(),
            io: Default::default(),
            tcp: TcpProfile::default(),
            tcp_counted: true,
            memory: MemoryProfile { resident_bytes: 7, ..MemoryProfile::default() },
        };
        let used = |sits_on| {
            let pools = with_usage(pools.clone(), &[(&profile, sits_on)]);
            assert_eq!(pools[0].used, Capacity { cores: 0.8, memory_bytes: 7 });
            (pools[1].used.cores, pools[2].used.cores)
        };
        assert_eq!(used(Some("one")), (0.8, 0.8));
        assert_eq!(used(Some("both")), (0.4, 0.8));
        assert_eq!(used(None), (0.4, 0.8));
    }
}
