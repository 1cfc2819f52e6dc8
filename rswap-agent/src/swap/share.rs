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

    /// What a file is to say in which `stood` stood before: only what the share is about is changed, and no limit is lifted.
    fn text(&self, file: &str, stood: &str) -> String {
        let ours = match file {
            "cpu.max" => self.quota_us().filter(|quota| {
                let mut words = stood.split_whitespace().map(str::parse::<f64>);
                let (before, period) = (words.next(), words.next());
                let before = before.and_then(Result::ok).zip(period.and_then(Result::ok));
                before.is_none_or(|(before, period)| before / period > *quota as f64 / PERIOD_US as f64)
            }),
            "cpu.cfs_quota_us" => self.quota_us(),
            "cpu.weight" => self.weight,
            "cpu.shares" => {
                self.weight.map(|weight| (weight * USUAL_SHARES / USUAL_WEIGHT).max(LEAST_SHARES))
            }
            _ => None,
        };
        match (file, ours) {
            ("cpu.max", Some(quota)) => format!("{quota} {PERIOD_US}"),
            (_, Some(number)) => number.to_string(),
            (_, None) => stood.to_owned(),
        }
    }

    /// All files, with what they are to say.
    fn texts<'a>(&'a self, stood: &'a [(PathBuf, String)]) -> impl Iterator<Item = (PathBuf, String)> + 'a {
        stood.iter().map(|(path, text)| {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            (path.clone(), self.text(&file, text))
        })
    }
}

/// What a cgroup of v1 says that nobody has limited; first the period, since a quota is checked against it.
fn unlimited(cgroup: &Path) -> Vec<(PathBuf, String)> {
    let files = [
        ("cpu.cfs_period_us", PERIOD_US.to_string()),
        ("cpu.cfs_quota_us", "-1".to_owned()),
        ("cpu.shares", USUAL_SHARES.to_string()),
    ];
    files.map(|(name, text)| (cgroup.join(name), text)).into()
}

/// What limits an instance.
#[derive(Debug)]
pub(super) enum Controller {
    /// Its own cgroup's files.
    Unified(PathBuf),
    /// Those of a cgroup of ours in v1's hierarchy, which it is put into.
    Legacy {
        /// The cgroup.
        ours: PathBuf,
        /// Where its processes came from, and go back to.
        root: PathBuf,
    },
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
        let Some(root) = legacy_root()? else { return Ok(None) };
        // Directly below the root: it is weighed against what is beside it, and that is where all others are.
        let ours = root.join(format!("{}{}", prefix(place), instance.name));
        for pid in processes(&instance.cgroup)? {
            let other = legacy_cgroup(pid).filter(|path| path != "/" && root.join(&path[1..]) != ours);
            if let Some(cgroup) = other {
                return Err(SwapError::OtherCgroup { pid, cgroup });
            }
        }
        Ok(Some(Self::Legacy { ours, root }))
    }

    /// What stands in its files while we say nothing.
    pub(super) fn stands(&self) -> Result<Vec<(PathBuf, String)>, SwapError> {
        match self {
            Self::Unified(cgroup) => {
                let read = |name| {
                    let path = cgroup.join(name);
                    let text = fs::read_to_string(&path).map_err(file("reading", &path))?;
                    Ok((path, text.trim().to_owned()))
                };
                ["cpu.max", "cpu.weight"].into_iter().map(read).collect()
            }
            Self::Legacy { ours, .. } => Ok(unlimited(ours)),
        }
    }

    /// Whether it limits the instance to `share` now, where `stood` stood before.
    pub(super) fn says(&self, share: &Share, stood: &[(PathBuf, String)]) -> bool {
        share
            .texts(stood)
            .all(|(path, wanted)| fs::read_to_string(path).is_ok_and(|text| text.trim() == wanted))
    }

    /// Limits the instance in `own` to `share`, where `stood` stood before.
    pub(super) fn set(
        &self,
        own: &Path,
        share: &Share,
        stood: &[(PathBuf, String)],
    ) -> Result<(), SwapError> {
        if let Self::Legacy { ours, .. } = self {
            fs::create_dir_all(ours).map_err(file("making", ours))?;
        }
        write_all(share.texts(stood))?;
        match self {
            Self::Unified(_) => Ok(()),
            Self::Legacy { ours, .. } => attach(ours, own),
        }
    }

    /// Limits the instance to nothing any more: what stood there does again.
    pub(super) fn leave(&self, stood: &[(PathBuf, String)]) -> Result<(), SwapError> {
        match self {
            Self::Unified(_) => write_all(stood.iter().cloned()),
            Self::Legacy { ours, .. } if !ours.exists() => Ok(()),
            // Beside the root's own processes it would weigh less than they do, however many there are in it.
            Self::Legacy { ours, root } => {
                attach(root, ours)?;
                fs::remove_dir(ours).map_err(file("removing", ours))
            }
        }
    }
}

fn write_all(files: impl IntoIterator<Item = (PathBuf, String)>) -> Result<(), SwapError> {
    files.into_iter().try_for_each(|(path, text)| fs::write(&path, text).map_err(file("writing", &path)))
}

/// Removes the cgroups of v1 that were made for instances that have ended. Not while any is moved: one may just be made.
pub fn sweep(place: &Place) {
    let Ok(Some(root)) = legacy_root() else { return };
    let prefix = prefix(place);
    let entries = fs::read_dir(&root).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)) {
        // The kernel removes none that has processes.
        let _ = fs::remove_dir(entry.path());
    }
}

/// What the names of our cgroups in v1's hierarchy begin with.
fn prefix(place: &Place) -> String {
    format!("{}.", place.cgroup_parent.trim_matches('/').replace('/', "."))
}

/// Puts all processes of the cgroup `own`, of whichever version, into a cgroup of v1.
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

/// Where v1's cpu hierarchy is mounted, if it is.
fn legacy_root() -> Result<Option<PathBuf>, SwapError> {
    let at = PathBuf::from("/proc/self/mountinfo");
    let failed = |error| SwapError::File { what: "reading", path: at, source: std::io::Error::other(error) };
    let mounts = Process::myself().and_then(|process| process.mountinfo()).map_err(failed)?;
    let mut legacy = mounts.into_iter().filter(|mount| mount.fs_type == "cgroup" && mount.root == "/");
    Ok(legacy.find(|mount| mount.super_options.contains_key("cpu")).map(|mount| mount.mount_point))
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
        assert_eq!(half.text("cpu.max", "max 100000"), "50000 100000");
        assert_eq!(half.text("cpu.weight", "100"), "50");
        let legacy: Vec<String> = half.texts(&unlimited(Path::new("/"))).map(|(_, text)| text).collect();
        assert_eq!(legacy, ["100000", "50000", "512"]);
        let least = Share { cores: Some(1e-6), weight: Some(1) };
        assert_eq!(least.text("cpu.max", "max 100000"), "1000 100000");
        assert_eq!(least.text("cpu.shares", "1024"), "10");
    }

    #[test]
    fn a_share_changes_only_what_it_is_about_and_lifts_no_limit() {
        let light = Share { cores: None, weight: Some(50) };
        assert_eq!(light.text("cpu.max", "30000 60000"), "30000 60000");
        let much = Share { cores: Some(4.0), weight: None };
        assert_eq!(much.text("cpu.max", "30000 60000"), "30000 60000");
        assert_eq!(much.text("cpu.max", "500000 100000"), "400000 100000");
        assert_eq!(much.text("cpu.weight", "70"), "70");
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
        assert!(!controller.says(&half, &stood));
        controller.set(Path::new("/"), &half, &stood).expect("set");
        assert!(controller.says(&half, &stood));
        controller.leave(&stood).expect("put back");
        assert_eq!(fs::read_to_string(file("cpu.max")).expect("a file"), "150000 100000");
    }
}
