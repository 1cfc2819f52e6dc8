//! Which neighbours `/metrics` names. Cgroups come and go, by the thousand on hosts of containers, and whoever collects the metrics keeps a series of each
//! name for ever.

use std::collections::BTreeMap;

use crate::{
    profile::{Profile, Who},
    units::UnixMillis,
};

/// Most cgroups that have a name at a time.
const PLACES: usize = 64;
/// A name is kept for so long after its cgroup was a neighbour last: no more than [`PLACES`] come in that time.
const KEPT_MS: u64 = 24 * 3_600_000;

/// Cgroups that have a name of their own, and when each was a neighbour last.
#[derive(Clone, Debug, Default)]
pub struct NeighbourNames(BTreeMap<String, UnixMillis>);

impl NeighbourNames {
    /// Takes in a window: the first who come get the places.
    pub fn note(&mut self, profile: &Profile) {
        let now = profile.at;
        let of_disks = profile.disk_neighbours.iter().flat_map(|device| &device.others).map(|of| &of.who);
        for who in profile.cpu.neighbours.iter().map(|of| &of.who).chain(of_disks) {
            let Who::Cgroup(path) = who else { continue };
            if let Some(last) = self.0.get_mut(path) {
                *last = now;
                continue;
            }
            if self.0.len() >= PLACES {
                self.0.retain(|_, last| now.since(*last) < KEPT_MS);
            }
            if self.0.len() < PLACES {
                self.0.insert(path.clone(), now);
            }
        }
    }

    /// What a neighbour is called: its kind, and its name, if it has one.
    pub fn words<'a>(&self, who: &'a Who) -> (&'static str, &'a str) {
        match who {
            Who::Cgroup(path) if !self.0.contains_key(path) => ("others", ""),
            who => who.words(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{CpuNeighbour, CpuProfile, MemoryProfile, TcpProfile};

    fn window(at: u64, paths: &[String]) -> Profile {
        let neighbour = |path: &String| CpuNeighbour { who: Who::Cgroup(path.clone()), waited_ns: 1 };
        let neighbours = paths.iter().map(neighbour).collect();
        Profile {
            instance: "a".parse().unwrap(),
            at: UnixMillis(at),
            window_ms: 1000,
            cpu: CpuProfile { neighbours, ..CpuProfile::default() },
            block: Vec::new(),
            block_counted: true,
            disk_neighbours: Vec::new(),
            io: Default::default(),
            tcp: TcpProfile::default(),
            tcp_counted: true,
            memory: MemoryProfile::default(),
        }
    }

    #[test]
    fn only_so_many_have_names_in_a_day_and_the_others_are_others() {
        let mut names = NeighbourNames::default();
        let path = |n: usize| format!("/run-{n}.scope");
        let lasting = Who::Cgroup("/lasting".into());
        for n in 0..1000 {
            names.note(&window(1000 * n as u64, &["/lasting".into(), path(n)]));
        }
        let named = (0..1000).filter(|n| names.words(&Who::Cgroup(path(*n))).0 == "cgroup").count();
        assert_eq!(named, PLACES - 1);
        assert_eq!(names.words(&lasting), ("cgroup", "/lasting"));
        assert_eq!(names.words(&Who::Cgroup(path(999))), ("others", ""));
        assert_eq!(names.words(&Who::KernelThreads), ("kernel_threads", ""));
        // A day later their places are free; who is still there keeps its own.
        names.note(&window(KEPT_MS / 2, &["/lasting".into()]));
        names.note(&window(KEPT_MS + 1_000_000, &[path(999)]));
        assert_eq!(names.words(&Who::Cgroup(path(999))).0, "cgroup");
        assert_eq!(names.words(&Who::Cgroup(path(1))).0, "others");
        assert_eq!(names.words(&lasting).0, "cgroup");
    }
}
