//! Who held an instance up: counts by cgroup as the programs leave them, and whose these are.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use rswap_common::{
    layout::slot_index,
    neighbours::{KERNEL_THREADS, NeighbourCount},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{cgroup, probes::Maps};
use crate::{instance::InstanceName, sys};

/// Most neighbours of one instance that are shown by name; the others are [`Who::Others`] together.
const MAX_SHOWN: usize = 10;

/// `FILEID_KERNFS`: a handle of a kernfs file is its id.
const KERNFS_HANDLE: i32 = 0xfe;

/// What the kernel has under this id by now has another one.
const GONE: [i32; 2] = [libc::ESTALE, libc::ENOENT];

/// Whoever uses a CPU or a disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind", content = "name")]
pub enum Who {
    /// An instance.
    Instance(InstanceName),
    /// A cgroup that is no instance's, by its path below the mount of cgroup v2; `/` has all that is in no other.
    Cgroup(String),
    /// Threads of the kernel's, all together.
    KernelThreads,
    /// Cgroups that were gone when they were asked for, all together.
    Removed,
    /// Those who are not shown by name, as their part is smaller.
    Others,
    /// Nobody knows.
    Unknown,
}

impl Who {
    /// What kind it is, and its name, if it has one.
    pub fn words(&self) -> (&'static str, &str) {
        match self {
            Self::Instance(name) => ("instance", name.as_str()),
            Self::Cgroup(path) => ("cgroup", path),
            Self::KernelThreads => ("kernel_threads", ""),
            Self::Removed => ("removed", ""),
            Self::Others => ("others", ""),
            Self::Unknown => ("unknown", ""),
        }
    }
}

/// For whom an instance waited for a CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuNeighbour {
    /// Who ran meanwhile.
    #[serde(flatten)]
    pub who: Who,
    /// For how long, in nanoseconds.
    pub waited_ns: u64,
}

/// What a slot's records say at one moment: places that are used, in the order of CPU and place.
#[derive(Debug, Default)]
pub(super) struct Waits(Vec<((u32, usize), NeighbourCount)>);

impl Waits {
    pub(super) fn read(maps: &Maps, slots: u32, slot: u32) -> Self {
        let mut used = Vec::new();
        for cpu in 0..maps.cpus {
            let Some(record) = maps.neighbours.read(slot_index(cpu, slot, slots)) else { continue };
            let places = record.places.into_iter().enumerate().filter(|(_, of)| of.cgroup_id != 0);
            used.extend(places.map(|(place, of)| ((cpu, place), of)));
        }
        used.shrink_to_fit();
        Self(used)
    }

    /// By cgroup, for how long the instance waited since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> BTreeMap<u64, u64> {
        let before = |place| {
            let at = earlier.0.binary_search_by_key(place, |(place, _)| *place).ok()?;
            Some(earlier.0[at].1)
        };
        let mut waited = BTreeMap::new();
        for (place, now) in &self.0 {
            // One that has had the place since then begins with 0.
            let before = before(place).filter(|of: &NeighbourCount| of.cgroup_id == now.cgroup_id);
            let before = before.map_or(0, |of| of.waited_ns);
            let ns = if before <= now.waited_ns { now.waited_ns - before } else { now.waited_ns };
            if ns > 0 {
                *waited.entry(now.cgroup_id).or_default() += ns;
            }
        }
        waited
    }
}

/// Names cgroups by their ids, as long as a window is looked at.
#[derive(Debug, Default)]
pub(super) struct Names {
    mount: Option<(File, PathBuf)>,
    known: HashMap<u64, Who>,
}

impl Names {
    /// Begins anew, with the ids of instances' cgroups: what an id means may change from window to window.
    pub(super) fn begin<'a>(&mut self, instances: impl Iterator<Item = (u64, &'a InstanceName)>) {
        self.known.clear();
        self.known.extend(instances.map(|(id, name)| (id, Who::Instance(name.clone()))));
    }

    /// Whose cgroup this is; `below` knows by its path of one that is an instance's, but was not when the window was begun.
    pub(super) fn who(&mut self, id: u64, below: impl FnOnce(&Path) -> Option<InstanceName>) -> Who {
        match id {
            0 => return Who::Unknown,
            KERNEL_THREADS => return Who::KernelThreads,
            _ => {}
        }
        if let Some(who) = self.known.get(&id) {
            return who.clone();
        }
        let who = self.path(id, below);
        self.known.insert(id, who.clone());
        who
    }

    fn path(&mut self, id: u64, instance: impl FnOnce(&Path) -> Option<InstanceName>) -> Who {
        if self.mount.is_none() {
            self.mount = cgroup::unified_mount().ok().and_then(|path| Some((File::open(&path).ok()?, path)));
        }
        let Some((mount, at)) = &self.mount else { return Who::Unknown };
        let opened = match sys::handle::open(mount, KERNFS_HANDLE, &id.to_ne_bytes()) {
            Ok(opened) => opened,
            Err(error) if error.raw_os_error().is_some_and(|code| GONE.contains(&code)) => {
                return Who::Removed;
            }
            Err(error) => {
                tracing::debug!(id, %error, "a cgroup's name can't be found");
                return Who::Unknown;
            }
        };
        let path = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).ok();
        if let Some(name) = path.as_deref().and_then(instance) {
            return Who::Instance(name);
        }
        let below = path.as_ref().and_then(|path| path.strip_prefix(at).ok()).and_then(|path| path.to_str());
        below.map_or(Who::Unknown, |path| Who::Cgroup(format!("/{path}")))
    }
}

/// Those who were waited for, by how long, the longest first; of `total_ns`, what nobody is known for is [`Who::Unknown`].
pub(super) fn ranked(waited: impl IntoIterator<Item = (Who, u64)>, total_ns: u64) -> Vec<CpuNeighbour> {
    let mut by: BTreeMap<Who, u64> = BTreeMap::new();
    for (who, ns) in waited {
        *by.entry(who).or_default() += ns;
    }
    let known: u64 = by.values().sum();
    if total_ns > known {
        *by.entry(Who::Unknown).or_default() += total_ns - known;
    }
    let list = by.into_iter().map(|(who, waited_ns)| CpuNeighbour { who, waited_ns });
    by_rank(
        list.collect(),
        |of| of.waited_ns,
        |rest| CpuNeighbour { who: Who::Others, waited_ns: rest.iter().map(|of| of.waited_ns).sum() },
    )
}

/// The largest first; those past [`MAX_SHOWN`] become one.
pub(super) fn by_rank<T>(
    mut list: Vec<T>,
    size: impl Fn(&T) -> u64,
    together: impl FnOnce(&[T]) -> T,
) -> Vec<T> {
    list.sort_by_key(|of| std::cmp::Reverse(size(of)));
    if list.len() > MAX_SHOWN {
        let rest = list.split_off(MAX_SHOWN);
        list.push(together(&rest));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(places: &[(u32, usize, u64, u64)]) -> Waits {
        let of =
            |&(cpu, place, cgroup_id, waited_ns)| ((cpu, place), NeighbourCount { cgroup_id, waited_ns });
        Waits(places.iter().map(of).collect())
    }

    #[test]
    fn a_cgroup_is_told_apart_from_one_that_had_its_place() {
        let earlier = waits(&[(0, 0, 7, 100), (0, 1, 8, 50), (1, 0, 7, 9)]);
        // On the first CPU the second place has gone to another; on the second, somebody had the place meanwhile.
        let later = waits(&[(0, 0, 7, 160), (0, 1, 9, 30), (1, 0, 7, 4), (1, 1, 8, 1)]);
        assert_eq!(later.since(&earlier), BTreeMap::from([(7, 64), (8, 1), (9, 30)]));
        assert_eq!(later.since(&later), BTreeMap::new());
    }

    #[test]
    fn who_was_waited_for_longest_comes_first_and_all_of_the_time_is_told() {
        let cgroup = |name: &str| Who::Cgroup(name.to_owned());
        let list = ranked([(cgroup("/a"), 5), (Who::KernelThreads, 9), (cgroup("/a"), 7)], 30);
        let list: Vec<_> = list.into_iter().map(|of| (of.who, of.waited_ns)).collect();
        assert_eq!(list, [(cgroup("/a"), 12), (Who::KernelThreads, 9), (Who::Unknown, 9)]);

        let many = (1..=14).map(|n| (cgroup(&format!("/{n:02}")), n));
        let list = ranked(many, 0);
        assert_eq!(list.len(), MAX_SHOWN + 1);
        assert_eq!((&list[0].who, list[MAX_SHOWN].waited_ns), (&cgroup("/14"), 1 + 2 + 3 + 4));
        assert_eq!(list[MAX_SHOWN].who, Who::Others);
    }

    #[test]
    fn cgroups_are_named_by_their_path() {
        let Ok(mount) = cgroup::unified_mount() else {
            eprintln!("not tested: no cgroup v2");
            return;
        };
        let mut names = Names::default();
        let root = cgroup::ids(&mount).unwrap().into_iter().min().unwrap();
        let found = names.who(root, |_| None);
        if found == Who::Unknown {
            eprintln!("not tested: files can't be opened by handles here");
            return;
        }
        assert_eq!(found, Who::Cgroup("/".into()));
        assert_eq!(names.who(u64::from(u32::MAX), |_| None), Who::Removed);
        let name: InstanceName = "db".parse().unwrap();
        names.begin([(5, &name)].into_iter());
        assert_eq!(names.who(5, |_| None), Who::Instance(name.clone()));
        assert_eq!(names.who(KERNEL_THREADS, |_| None), Who::KernelThreads);
        // Of an instance's that nobody has told of yet.
        names.begin(std::iter::empty());
        let by_path = |path: &Path| path.starts_with(&mount).then(|| name.clone());
        assert_eq!(names.who(root, by_path), Who::Instance(name.clone()));
    }
}
