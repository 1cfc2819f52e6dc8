//! Which processors the threads of an instance chose for themselves (sched_setaffinity(2)), while a pool limits them.
//!
//! The kernel does the same for cpusets: a thread may run where both its own choice and the cpuset allow it, in all of the cpuset if
//! they have nothing in common, and has its own choice back when the cpuset allows it again (`user_cpus_ptr`, Linux 6.2). Where no
//! cpuset is there and pools are given by affinity, a thread has one mask for both, and its own choice must be remembered here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::InstanceError;
use crate::pool::{CpuSet, cpu_list};

const ONLINE: &str = "/sys/devices/system/cpu/online";
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// A thread that had a choice of its own. Numbers of threads are used again: so also when it was started, in clock ticks after the
/// kernel's start (field 22 of `/proc/TID/stat`, proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// When it was started.
    pub started_ticks: u64,
    /// What it chose.
    pub cpus: CpuSet,
}

/// Where the threads of an instance may be found, and what they chose.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choices {
    /// The instance's cgroup: another one of the same name is another instance.
    pub cgroup_id: u64,
    /// The pools that its threads are on: one, or several while it is moved. `None` is all processors.
    pub places: BTreeSet<Option<CpuSet>>,
    /// By thread.
    pub own: BTreeMap<i32, Choice>,
    /// What stood in the files of the cpu controller before a pool limited the instance to a share; nothing while none does.
    #[serde(default)]
    pub stood: Option<Vec<(PathBuf, String)>>,
}

/// The processors of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processors {
    /// Those that could be there.
    pub possible: CpuSet,
    /// Those that run: no other is told of by sched_getaffinity(2).
    pub online: CpuSet,
}

impl Processors {
    /// Those of this host.
    ///
    /// # Errors
    /// The kernel's files can't be read.
    pub fn of_host() -> Result<Self, InstanceError> {
        let of = |path: &str| {
            let text = fs::read_to_string(path).map_err(InstanceError::io(format!("reading {path}")))?;
            let invalid = |error| InstanceError::Invalid(format!("{path} is no list of CPUs: {error}"));
            cpu_list::parse(text.trim()).map_err(invalid)
        };
        Ok(Self { possible: of(POSSIBLE)?, online: of(ONLINE)? })
    }

    /// What a thread with this choice is given in a pool (`None`: it has none, or there is none).
    pub fn given(&self, own: Option<&CpuSet>, pool: Option<&CpuSet>) -> CpuSet {
        let pool = pool.unwrap_or(&self.possible);
        let both: CpuSet = own.map(|own| own.intersection(pool).copied().collect()).unwrap_or_default();
        // A processor that does not run is none to run on.
        if both.is_disjoint(&self.online) { pool.clone() } else { both }
    }

    /// Whether a thread that was told to have `given` is listed with `found`.
    pub fn is_listed(&self, given: &CpuSet, found: &CpuSet) -> bool {
        given.intersection(&self.online).eq(found)
    }
}

impl Choices {
    /// Nothing is known but the pool that the instance is on.
    pub fn new(cgroup_id: u64, pool: Option<CpuSet>) -> Self {
        Self { cgroup_id, places: BTreeSet::from([pool]), own: BTreeMap::new(), stood: None }
    }

    /// What a thread chose that is found with `found` now.
    ///
    /// `started_ticks` is only asked of threads that have the number of one which is known.
    pub fn of(
        &self,
        tid: i32,
        found: &CpuSet,
        host: &Processors,
        started_ticks: impl FnOnce() -> Option<u64>,
    ) -> Option<CpuSet> {
        let is_given = |own: Option<&CpuSet>| {
            self.places.iter().any(|place| host.is_listed(&host.given(own, place.as_ref()), found))
        };
        let known = self.own.get(&tid).filter(|choice| is_given(Some(&choice.cpus)));
        if let Some(choice) = known.filter(|choice| started_ticks() == Some(choice.started_ticks)) {
            return Some(choice.cpus.clone());
        }
        if host.online.is_subset(found) || is_given(None) {
            return None;
        }
        // A new thread has what the one that made it has.
        let inherited = self.own.values().find(|choice| is_given(Some(&choice.cpus)));
        Some(inherited.map_or_else(|| found.clone(), |choice| choice.cpus.clone()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(cpus: &[usize]) -> CpuSet {
        cpus.iter().copied().collect()
    }

    fn host() -> Processors {
        Processors { possible: set(&[0, 1, 2, 3, 4]), online: set(&[0, 1, 2, 3]) }
    }

    #[test]
    fn a_choice_holds_within_the_pool_and_comes_back_after_it() {
        let host = host();
        let pool = set(&[0, 1]);
        assert_eq!(host.given(Some(&set(&[1, 2])), Some(&pool)), set(&[1]));
        assert_eq!(host.given(Some(&set(&[2, 3])), Some(&pool)), pool, "nothing in common");
        assert_eq!(host.given(None, Some(&pool)), pool);
        assert_eq!(host.given(None, None), host.possible);
        assert_eq!(host.given(Some(&set(&[4])), None), host.possible, "it does not run");
        let mut choices = Choices::new(7, Some(pool.clone()));
        choices.own.insert(10, Choice { started_ticks: 5, cpus: set(&[2, 3]) });
        choices.own.insert(11, Choice { started_ticks: 5, cpus: set(&[1, 2]) });
        let of = |tid, found: &[usize], ticks| choices.of(tid, &set(found), &host, || Some(ticks));
        assert_eq!(of(10, &[0, 1], 5), Some(set(&[2, 3])));
        assert_eq!(of(10, &[0, 1], 6), None, "another thread of the same number, on all of the pool");
        assert_eq!(of(11, &[1], 5), Some(set(&[1, 2])));
        assert_eq!(of(11, &[0], 5), Some(set(&[0])), "it has chosen anew");
        assert_eq!(of(12, &[1], 9), Some(set(&[1, 2])), "made by 11");
        assert_eq!(of(12, &[3], 9), Some(set(&[3])), "its own");
        assert_eq!(of(11, &[0, 1, 2, 3], 5), None, "it wants to run anywhere");
    }

    proptest! {
        /// However a swap is broken off, and wherever it goes then: everybody's choice is known.
        #[test]
        fn choices_outlive_any_swaps(
            own in proptest::option::of(proptest::collection::btree_set(0usize..4, 1..3)),
            pools in proptest::collection::vec(proptest::option::of(proptest::collection::btree_set(0usize..4, 1..4)), 1..6),
            broken in proptest::collection::vec(any::<bool>(), 6),
        ) {
            let host = host();
            let own = own.filter(|own| !host.online.is_subset(own));
            let mut choices = Choices::new(1, None);
            let mut found: CpuSet = host.given(own.as_ref(), None).intersection(&host.online).copied().collect();
            for (pool, broken) in pools.into_iter().zip(broken) {
                let known = choices.of(5, &found, &host, || Some(3));
                prop_assert_eq!(&known, &own);
                if let Some(cpus) = known {
                    choices.own.insert(5, Choice { started_ticks: 3, cpus });
                }
                choices.places.insert(pool.clone());
                if broken {
                    continue;
                }
                found = host.given(own.as_ref(), pool.as_ref()).intersection(&host.online).copied().collect();
                choices.places = BTreeSet::from([pool]);
            }
        }
    }
}
