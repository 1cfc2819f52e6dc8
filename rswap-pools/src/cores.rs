//! Cores: which there are, of which class, and what is known of each.

use std::collections::BTreeMap;

use rswap_types::CpuSet;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Known,
    root::{Root, numbered},
};

const CPUS: &str = "/sys/devices/system/cpu";

/// Cores belong to one class when they are at least this share as fast as its fastest: firmware rates some cores of one
/// make a few percent above the others.
const SAME_CLASS: f64 = 0.9;

/// One logical CPU. What the kernel does not say is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Core {
    /// Its number.
    pub cpu: usize,
    /// Whether it takes work.
    pub online: bool,
    /// The kernel's rating, 1024 for the fastest core of the machine (`cpu_capacity`).
    pub capacity: Option<u64>,
    /// Highest clock rate (`cpufreq/cpuinfo_max_freq`).
    pub max_khz: Option<u64>,
    /// Lowest clock rate (`cpufreq/cpuinfo_min_freq`).
    pub min_khz: Option<u64>,
    /// Highest clock rate that is allowed now (`cpufreq/scaling_max_freq`).
    pub limit_khz: Option<u64>,
    /// Number of its core in its package (`topology/core_id`).
    pub core_id: Option<i64>,
    /// Number of its package (`topology/physical_package_id`).
    pub package_id: Option<i64>,
    /// Its NUMA node.
    pub node: Option<usize>,
    /// CPUs that share its core, itself among them (`topology/thread_siblings_list`).
    #[schema(value_type = Option<BTreeSet<usize>>)]
    pub siblings: Option<CpuSet>,
    /// Its caches.
    pub caches: Vec<Cache>,
}

/// One cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cache {
    /// 1, 2, 3.
    pub level: u32,
    /// `data`, `instruction` or `unified`.
    pub what: String,
    /// Its size.
    pub bytes: Option<u64>,
    /// CPUs that share it.
    #[schema(value_type = Option<BTreeSet<usize>>)]
    pub shared_by: Option<CpuSet>,
}

/// The CPUs that are online; where sysfs is not there, as many as this process may use.
pub(crate) fn online(root: &Root<'_>) -> (CpuSet, String) {
    let file = format!("{CPUS}/online");
    match root.set(&file) {
        Some(cpus) if !cpus.is_empty() => (cpus, file),
        _ => {
            let count = std::thread::available_parallelism().map_or(1, |count| count.get());
            ((0..count).collect(), "sched_getaffinity(2)".to_owned())
        }
    }
}

/// What is known of one CPU. What its package is made of is taken over from a look `before` at it: these are some twenty files of each CPU, and they say the same
/// as long as no CPU comes or goes.
pub(crate) fn core(root: &Root<'_>, cpu: usize, online: bool, before: Option<&Core>) -> Core {
    let dir = format!("{CPUS}/cpu{cpu}");
    Core {
        cpu,
        online,
        capacity: root.number(&format!("{dir}/cpu_capacity")),
        max_khz: root.number(&format!("{dir}/cpufreq/cpuinfo_max_freq")),
        min_khz: root.number(&format!("{dir}/cpufreq/cpuinfo_min_freq")),
        limit_khz: root.number(&format!("{dir}/cpufreq/scaling_max_freq")),
        ..before.cloned().unwrap_or_else(|| place(root, &dir))
    }
}

/// Where it is in the machine.
fn place(root: &Root<'_>, dir: &str) -> Core {
    let caches =
        root.names(&format!("{dir}/cache")).into_iter().filter(|name| numbered(name, "index").is_some());
    Core {
        core_id: root.number(&format!("{dir}/topology/core_id")),
        package_id: root.number(&format!("{dir}/topology/physical_package_id")),
        node: root.names(dir).iter().find_map(|name| numbered(name, "node")),
        siblings: root.set(&format!("{dir}/topology/thread_siblings_list")),
        caches: caches.filter_map(|name| cache(root, &format!("{dir}/cache/{name}"))).collect(),
        ..Core::default()
    }
}

fn cache(root: &Root<'_>, dir: &str) -> Option<Cache> {
    Some(Cache {
        level: root.number(&format!("{dir}/level"))?,
        what: root.text(&format!("{dir}/type")).unwrap_or_default().to_lowercase(),
        bytes: root.text(&format!("{dir}/size")).and_then(|text| cache_bytes(&text)),
        shared_by: root.set(&format!("{dir}/shared_cpu_list")),
    })
}

/// `48K`, `2M` or `512`.
fn cache_bytes(text: &str) -> Option<u64> {
    let (digits, unit) = match text.trim().strip_suffix(['K', 'M', 'G']) {
        Some(digits) => (digits, text.trim().chars().next_back()),
        None => (text.trim(), None),
    };
    let shift = match unit {
        Some('K') => 10,
        Some('M') => 20,
        Some('G') => 30,
        _ => 0,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// One class of cores.
pub(crate) struct Class {
    pub(crate) name: String,
    pub(crate) cpus: CpuSet,
    /// Relative to the fastest class; `None` if there is only one.
    pub(crate) speed: Option<Known>,
}

/// The classes of the online cores, fastest first. The kernel's own `cpu_capacity` tells classes apart where it has
/// them; elsewhere the highest clock rate does.
pub(crate) fn classes(cores: &[Core]) -> Vec<Class> {
    type Speed = fn(&Core) -> Option<u64>;
    let ways: [(&str, Speed); 2] =
        [("cpu_capacity", |core| core.capacity), ("cpufreq/cpuinfo_max_freq", |core| core.max_khz)];
    for (file, speed) in ways {
        let mut by_speed: BTreeMap<u64, CpuSet> = BTreeMap::new();
        for core in cores {
            if let Some(speed) = speed(core).filter(|&speed| speed > 0) {
                by_speed.entry(speed).or_default().insert(core.cpu);
            }
        }
        // A class of unknown speed cannot be compared: all or none must say.
        if by_speed.values().map(CpuSet::len).sum::<usize>() != cores.len() {
            continue;
        }
        let mut found: Vec<(u64, CpuSet)> = Vec::new();
        for (speed, cpus) in by_speed.into_iter().rev() {
            match found.last_mut() {
                Some((fastest, class)) if speed as f64 >= *fastest as f64 * SAME_CLASS => class.extend(cpus),
                _ => found.push((speed, cpus)),
            }
        }
        if found.len() > 1 {
            let fastest = found[0].0 as f64;
            let known = |speed| Some(Known::found(speed as f64 / fastest, format!("{CPUS}/cpu*/{file}")));
            let numbered = found.into_iter().enumerate();
            return numbered
                .map(|(i, (speed, cpus))| Class { name: format!("cores-{i}"), cpus, speed: known(speed) })
                .collect();
        }
    }
    vec![Class { name: "cores".to_owned(), cpus: cores.iter().map(|core| core.cpu).collect(), speed: None }]
}

/// What a CPU did since the kernel's start, in clock ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// In use, by anybody; what was stolen is among it.
    pub used: u64,
    /// In use by niced programs (their own code, not the kernel's).
    pub nice: u64,
    /// Wanted, and given to others by the hypervisor.
    pub stolen: u64,
    /// All.
    pub all: u64,
}

/// What each CPU did, by /proc/stat. `procfs` has a parser, too, but numbers the CPUs through, so that it is wrong when one is
/// offline.
pub fn cpu_times(stat: &str) -> BTreeMap<usize, CpuTime> {
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let cpu = numbered(words.next()?, "cpu")?;
        let times: Vec<u64> = words.take(8).map_while(|word| word.parse().ok()).collect();
        let at = |index: usize| times.get(index).copied();
        // user nice system idle iowait irq softirq steal; guest time is in user already.
        let idle = at(3)?.saturating_add(at(4).unwrap_or(0));
        let all = times.iter().fold(0u64, |sum, time| sum.saturating_add(*time));
        let used = all.saturating_sub(idle);
        Some((cpu, CpuTime { used, nice: at(1)?, stolen: at(7).unwrap_or(0), all }))
    };
    stat.lines().filter_map(line).collect()
}

/// CPU -> (time in use, time), in clock ticks.
pub(crate) fn times(stat: &str) -> BTreeMap<usize, (u64, u64)> {
    cpu_times(stat).into_iter().map(|(cpu, time)| (cpu, (time.used, time.all))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rated(ratings: &[Option<u64>]) -> Vec<Core> {
        let core = |(cpu, &capacity): (usize, &Option<u64>)| Core { cpu, capacity, ..Core::default() };
        ratings.iter().enumerate().map(core).collect()
    }

    #[test]
    fn cores_that_firmware_favours_are_of_the_same_class() {
        let found = classes(&rated(&[Some(1024), Some(1009), Some(600), Some(590)]));
        let sets: Vec<_> = found.iter().map(|class| class.cpus.clone()).collect();
        assert_eq!(sets, [CpuSet::from([0, 1]), CpuSet::from([2, 3])]);
        assert_eq!(found[1].speed.as_ref().unwrap().value, 600.0 / 1024.0);
        assert_eq!(classes(&rated(&[Some(1024), None])).len(), 1);
    }

    #[test]
    fn an_offline_cpu_leaves_a_hole_in_stat() {
        let stat = "cpu  9 9 9 9\ncpu0 10 1 5 100 4 0 0 0 3 0\ncpu2 1 0 0 9\nintr 5\ncpux 1\n";
        assert_eq!(times(stat), BTreeMap::from([(0, (16, 120)), (2, (1, 10))]));
        let stat = "cpu1 10 20 30 40 5 6 7 8 9 9\n";
        assert_eq!(
            cpu_times(stat),
            BTreeMap::from([(1, CpuTime { used: 81, nice: 20, stolen: 8, all: 126 })])
        );
    }

    #[test]
    fn cache_sizes() {
        assert_eq!(cache_bytes("107520K"), Some(107_520 << 10));
        assert_eq!(cache_bytes("2M"), Some(2 << 20));
        assert_eq!(cache_bytes("99999999999999999999G"), None);
        assert_eq!(cache_bytes(""), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in any::<String>(), numbers in proptest::collection::vec(any::<u64>(), 0..12)) {
            let _ = (cache_bytes(&text), times(&text));
            let line = numbers.iter().fold("cpu7".to_owned(), |line, number| format!("{line} {number}"));
            for (cpu, (used, all)) in times(&line) {
                prop_assert!(cpu == 7 && used <= all);
            }
        }
    }
}
