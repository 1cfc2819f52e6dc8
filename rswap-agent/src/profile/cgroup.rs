//! What cgroup v2 and /proc say about an instance: CPU time, members.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::ProfileError;

/// Deepest cgroup below an instance's own that is looked for.
const MAX_DEPTH: usize = 16;

/// Where cgroup v2 is mounted.
pub fn unified_mount() -> Result<PathBuf, ProfileError> {
    const MOUNTS: &str = "/proc/self/mountinfo";
    let text = read(Path::new(MOUNTS))?;
    unified_mount_in(&text).ok_or(ProfileError::NoUnifiedHierarchy)
}

fn unified_mount_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        (filesystem.split(' ').next() == Some("cgroup2"))
            .then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Whether the v2 hierarchy at `mount` has a controller.
pub(super) fn has_controller(mount: &Path, controller: &str) -> bool {
    fs::read_to_string(mount.join("cgroup.controllers"))
        .is_ok_and(|text| text.split_whitespace().any(|name| name == controller))
}

/// The kernel's id of a cgroup: its directory's inode number.
pub(super) fn id(cgroup: &Path) -> Result<u64, ProfileError> {
    let found = fs::metadata(cgroup);
    found.map(|found| found.ino()).map_err(|source| ProfileError::Read { path: cgroup.to_owned(), source })
}

/// A cgroup and all below it, each with the kernel's id of it: its directory's inode number.
pub(super) fn tree(cgroup: &Path) -> Result<Vec<(PathBuf, u64)>, ProfileError> {
    let mut all = Vec::new();
    walk(cgroup, 0, &mut |path| {
        all.push((path.to_owned(), fs::metadata(path)?.ino()));
        Ok(())
    })
    .map_err(|source| ProfileError::Read { path: cgroup.to_owned(), source })?;
    Ok(all)
}

/// The kernel's ids of a cgroup and all below it.
pub(super) fn ids(cgroup: &Path) -> Result<BTreeSet<u64>, ProfileError> {
    Ok(tree(cgroup)?.into_iter().map(|(_, id)| id).collect())
}

/// Calls `visit` with `cgroup` and all below it. A child that vanishes meanwhile is left out.
fn walk(cgroup: &Path, depth: usize, visit: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    visit(cgroup)?;
    if depth == MAX_DEPTH {
        return Ok(());
    }
    for entry in fs::read_dir(cgroup)? {
        let Ok(entry) = entry else { continue };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            match walk(&entry.path(), depth + 1, visit) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// What `cpu.stat`, read from `path`, says of the CPU time used, and of the time for which a limit held CPUs back (0 where there is none), in microseconds.
pub(super) fn cpu_stat_us(text: &str, path: &Path) -> Result<(u64, u64), ProfileError> {
    let held_back = field(text, "throttled_usec").unwrap_or(0);
    let no_usage = || ProfileError::Parse { path: path.to_owned(), what: "no usage_usec" };
    Ok((field(text, "usage_usec").ok_or_else(no_usage)?, held_back))
}

/// The processes of a cgroup and of all below it.
pub(super) fn pids(cgroup: &Path) -> Result<BTreeSet<i32>, ProfileError> {
    let mut pids = BTreeSet::new();
    walk(cgroup, 0, &mut |path| {
        // A threaded cgroup below lists no processes of its own (EOPNOTSUPP); they are listed above it.
        if let Ok(text) = fs::read_to_string(path.join("cgroup.procs")) {
            pids.extend(pids_in(&text));
        }
        Ok(())
    })
    .map_err(|source| ProfileError::Read { path: cgroup.to_owned(), source })?;
    Ok(pids)
}

/// Those that `cgroup.procs` lists.
pub(super) fn pids_in(text: &str) -> impl Iterator<Item = i32> {
    // 0 stands for a process outside of our PID namespace.
    text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|&pid| pid > 0)
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn read(path: &Path) -> Result<String, ProfileError> {
    fs::read_to_string(path).map_err(|source| ProfileError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_hierarchy_is_found_among_the_old_ones() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      38 31 0:35 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(unified_mount_in(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(unified_mount_in("garbage\n"), None);
    }

    #[test]
    fn counters_are_read_from_the_kernels_files() {
        assert_eq!(field("usage_usec 12\nuser_usec 7\n", "user_usec"), Some(7));
        assert_eq!(field("usage_usec_x 12\n", "usage_usec"), None);
    }
}
