//! Which share of the processors an instance may have, by the cpu controller: of cgroup v2 where its cgroup has it, else of v1.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use procfs::process::Process;
use serde::{Deserialize, Serialize};

use super::SwapError;
use crate::instance::{Instance, launch::Place};

/// The kernel's own period of `cpu.max`, in microseconds (Documentation/admin-guide/cgroup-v2.rst).
const PERIOD_US: u64 = 100_000;
/// The kernel takes no smaller quota (`min_cfs_quota_period`, kernel/sched/core.c), in microseconds.
const LEAST_QUOTA_US: u64 = 1000;
/// The weight of a cgroup of which nothing was said (cgroup-v2.rst), and what v1 has in its place (`cpu.shares`).
const USUAL_WEIGHT: u64 = 100;
const USUAL_SHARES: u64 = 1024;
const LEAST_SHARES: u64 = 2;
/// Passes until every process is in the cgroup of v1: those that are made meanwhile are there already.
const MAX_PASSES: u32 = 100;

/// What an instance may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// So many cores at most (`cpu.max`). Nothing: all of the pool.
    pub cores: Option<f64>,
    /// So much in relation to others when there is not enough (`cpu.weight`, 1 to 10,000). Nothing: 100.
    pub weight: Option<u64>,
}

impl Share {
    /// Whether it says nothing.
    pub fn is_all(&self) -> bool {
        *self == Self::default()
    }

    fn quota_us(&self) -> Option<u64> {
        self.cores.map(|cores| ((cores * PERIOD_US as f64).round() as u64).max(LEAST_QUOTA_US))
    }

    /// As two files of v2 say it.
    fn unified(&self) -> [(&'static str, String); 2] {
        let max = self.quota_us().map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        let weight = self.weight.unwrap_or(USUAL_WEIGHT);
        [("cpu.max", format!("{max} {PERIOD_US}")), ("cpu.weight", weight.to_string())]
    }

    /// As the files of v1 say it: first the period, since a quota is checked against it.
    fn legacy(&self) -> [(&'static str, String); 3] {
        let quota = self.quota_us().map_or_else(|| "-1".to_owned(), |quota| quota.to_string());
        let shares = self.weight.unwrap_or(USUAL_WEIGHT) * USUAL_SHARES / USUAL_WEIGHT;
        [
            ("cpu.cfs_period_us", PERIOD_US.to_string()),
            ("cpu.cfs_quota_us", quota),
            ("cpu.shares", shares.max(LEAST_SHARES).to_string()),
        ]
    }
}

/// The files that limit an instance.
#[derive(Debug)]
pub(super) enum Controller {
    /// Its own cgroup's.
    Unified(PathBuf),
    /// Those of a cgroup of ours in v1's hierarchy, which it is put into.
    Legacy(PathBuf),
}

impl Controller {
    /// The controller that limits `instance`, if it has one.
    ///
    /// # Errors
    /// The hierarchies can't be read, or some of it is in a cgroup of v1 that is not ours.
    pub(super) fn of(place: &Place, instance: &Instance) -> Result<Option<Self>, SwapError> {
        if instance.cgroup.join("cpu.max").exists() {
            return Ok(Some(Self::Unified(instance.cgroup.clone())));
        }
        let Some(parent) = legacy_parent(place)? else { return Ok(None) };
        let ours = parent.join(instance.name.as_str());
        for pid in processes(&instance.cgroup)? {
            if let Some(other) = legacy_cgroup(pid).filter(|path| path != "/" && !ours.ends_with(&path[1..]))
            {
                return Err(SwapError::OtherCgroup { pid, cgroup: other });
            }
        }
        Ok(Some(Self::Legacy(ours)))
    }

    /// Whether it limits the instance to `share` now.
    pub(super) fn says(&self, share: &Share) -> bool {
        let says = |directory: &Path, files: &[(&str, String)]| {
            files.iter().all(|(file, wanted)| {
                fs::read_to_string(directory.join(file)).is_ok_and(|text| text.trim() == wanted)
            })
        };
        match self {
            Self::Unified(cgroup) => says(cgroup, &share.unified()),
            // One that was never limited has none.
            Self::Legacy(cgroup) => (share.is_all() && !cgroup.exists()) || says(cgroup, &share.legacy()),
        }
    }

    /// What stands in its files while we say nothing.
    pub(super) fn stands(&self) -> Result<Vec<(PathBuf, String)>, SwapError> {
        match self {
            Self::Unified(cgroup) => {
                let read = |(name, _)| {
                    let path = cgroup.join(name);
                    let text = fs::read_to_string(&path).map_err(file("reading", &path))?;
                    Ok((path, text.trim().to_owned()))
                };
                Share::default().unified().into_iter().map(read).collect()
            }
            Self::Legacy(cgroup) => {
                Ok(Share::default().legacy().map(|(name, text)| (cgroup.join(name), text)).into())
            }
        }
    }

    /// Limits the instance in `own` to `share`.
    pub(super) fn set(&self, own: &Path, share: &Share) -> Result<(), SwapError> {
        match self {
            Self::Unified(cgroup) => {
                write_all(share.unified().into_iter().map(|(name, text)| (cgroup.join(name), text)))
            }
            Self::Legacy(cgroup) => {
                fs::create_dir_all(cgroup).map_err(file("making", cgroup))?;
                write_all(share.legacy().into_iter().map(|(name, text)| (cgroup.join(name), text)))?;
                attach(cgroup, own)
            }
        }
    }
}

/// Puts back what stood in the files; a cgroup that is gone needs nothing.
pub(super) fn put_back(stood: &[(PathBuf, String)]) -> Result<(), SwapError> {
    write_all(stood.iter().filter(|(path, _)| path.exists()).cloned())
}

fn write_all(files: impl IntoIterator<Item = (PathBuf, String)>) -> Result<(), SwapError> {
    files.into_iter().try_for_each(|(path, text)| fs::write(&path, text).map_err(file("writing", &path)))
}

/// Removes the cgroups of v1 that were made for instances that have ended.
pub fn sweep(place: &Place) {
    let Ok(Some(parent)) = legacy_parent(place) else { return };
    for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
        // The kernel removes none that has processes.
        let _ = fs::remove_dir(entry.path());
    }
    let _ = fs::remove_dir(parent);
}

/// Puts all processes of `own` into a cgroup of v1.
fn attach(cgroup: &Path, own: &Path) -> Result<(), SwapError> {
    let list = cgroup.join("cgroup.procs");
    for _ in 0..MAX_PASSES {
        let there: BTreeSet<i32> =
            numbers(&fs::read_to_string(&list).map_err(file("reading", &list))?).collect();
        let missing: Vec<i32> = processes(own)?.into_iter().filter(|pid| !there.contains(pid)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        for pid in missing {
            match fs::write(&list, pid.to_string()) {
                // It has ended.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                written => written.map_err(file("writing", &list))?,
            }
        }
    }
    Err(SwapError::Unsettled { passes: MAX_PASSES })
}

/// The processes of a cgroup of v2 and of those below it.
fn processes(own: &Path) -> Result<Vec<i32>, SwapError> {
    let failed = |source| SwapError::File { what: "reading the processes of", path: own.to_owned(), source };
    let mut found = Vec::new();
    let mut below = vec![own.to_owned()];
    while let Some(cgroup) = below.pop() {
        match fs::read_to_string(cgroup.join("cgroup.procs")) {
            Ok(text) => found.extend(numbers(&text)),
            // Removed meanwhile.
            Err(_) if cgroup != own => continue,
            Err(error) => return Err(failed(error)),
        }
        let entries = fs::read_dir(&cgroup).into_iter().flatten().flatten();
        below.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    Ok(found)
}

/// 0 stands for a process that this PID namespace can't see.
fn numbers(text: &str) -> impl Iterator<Item = i32> {
    text.lines().filter_map(|line| line.trim().parse().ok()).filter(|&number| number > 0)
}

/// The cgroup of v1's cpu hierarchy that a process is in.
fn legacy_cgroup(pid: i32) -> Option<String> {
    let found = Process::new(pid).and_then(|process| process.cgroups()).ok()?;
    found.0.into_iter().find(|one| one.controllers.iter().any(|name| name == "cpu")).map(|one| one.pathname)
}

/// Where the agent's cgroups are in v1's cpu hierarchy, if that is mounted.
fn legacy_parent(place: &Place) -> Result<Option<PathBuf>, SwapError> {
    let at = PathBuf::from("/proc/self/mountinfo");
    let failed = |error| SwapError::File { what: "reading", path: at, source: std::io::Error::other(error) };
    let mounts = Process::myself().and_then(|process| process.mountinfo()).map_err(failed)?;
    let mut legacy = mounts.into_iter().filter(|mount| mount.fs_type == "cgroup" && mount.root == "/");
    let cpu = legacy.find(|mount| mount.super_options.contains_key("cpu"));
    Ok(cpu.map(|mount| mount.mount_point.join(&place.cgroup_parent)))
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> SwapError {
    let path = path.to_owned();
    move |source| SwapError::File { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_written_as_the_kernel_takes_them() {
        let half = Share { cores: Some(0.5), weight: Some(50) };
        assert_eq!(half.unified(), [("cpu.max", "50000 100000".into()), ("cpu.weight", "50".into())]);
        assert_eq!(half.legacy()[1..], [("cpu.cfs_quota_us", "50000".into()), ("cpu.shares", "512".into())]);
        let all = Share::default();
        assert_eq!(all.unified(), [("cpu.max", "max 100000".into()), ("cpu.weight", "100".into())]);
        assert_eq!(all.legacy()[1..], [("cpu.cfs_quota_us", "-1".into()), ("cpu.shares", "1024".into())]);
        let least = Share { cores: Some(1e-6), weight: Some(1) };
        assert_eq!(least.unified()[0].1, "1000 100000");
        assert_eq!(least.legacy()[2].1, "10");
    }

    #[test]
    fn the_files_of_v2_are_written_and_put_back() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = |name: &str| directory.path().join(name);
        // Somebody has limited it before.
        fs::write(file("cpu.max"), "150000 100000\n").expect("a file");
        fs::write(file("cpu.weight"), "100\n").expect("a file");
        let controller = Controller::Unified(directory.path().to_owned());
        let half = Share { cores: Some(0.5), weight: None };
        let stood = controller.stands().expect("read");
        assert!(!controller.says(&half));
        controller.set(Path::new("/"), &half).expect("set");
        assert!(controller.says(&half));
        put_back(&stood).expect("put back");
        assert_eq!(fs::read_to_string(file("cpu.max")).expect("a file"), "150000 100000");
    }
}
