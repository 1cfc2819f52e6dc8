//! Mounts that were made inside of an instance: its namespace has them, and the one that the destination makes would not.

use std::path::PathBuf;

use procfs::process::{MountInfo, Process};

use super::TraceeError;
use crate::instance::Instance;

/// Mounts without files of a program's: what keeps a namespace.
const WITHOUT_FILES: &str = "nsfs";

/// What would make it possible to carry an instance with mounts of its own.
pub const REMEDY: &str = "it was made inside of the instance, and isn't carried in this version: unmount it, or mount it on both \
                          hosts before the instance is started; for a directory that moves, use a volume";

/// The mount points of `instance` that this agent's namespace has no such mount at, and that the instance was not started with,
/// each with the file system's type. What the host has mounted or unmounted since may be different: the destination's host decides
/// about that.
pub fn of_its_own(instance: &Instance) -> Result<Vec<(PathBuf, String)>, TraceeError> {
    let Some(init) = instance.init_pid else { return Ok(Vec::new()) };
    let agents = mounts(std::process::id() as i32)?;
    // Each once: a second one over it is the program's.
    let mut given: Vec<(PathBuf, Option<&str>)> =
        vec![("/proc".into(), Some("proc")), ("/dev/pts".into(), Some("devpts"))];
    given.extend(instance.volumes.iter().map(|volume| (volume.path.clone(), None)));
    Ok(others(mounts(init)?, &agents, given))
}

fn others(
    instances: Vec<MountInfo>,
    agents: &[MountInfo],
    mut given: Vec<(PathBuf, Option<&str>)>,
) -> Vec<(PathBuf, String)> {
    let same = |one: &MountInfo, other: &MountInfo| {
        (&one.mount_point, &one.root, &one.majmin) == (&other.mount_point, &other.root, &other.majmin)
    };
    let mut own = Vec::new();
    for mount in instances {
        if mount.fs_type == WITHOUT_FILES || agents.iter().any(|agents| same(agents, &mount)) {
            continue;
        }
        let is_given = |(path, kind): &(PathBuf, Option<&str>)| {
            *path == mount.mount_point && kind.is_none_or(|kind| kind == mount.fs_type)
        };
        match given.iter().position(is_given) {
            Some(at) => drop(given.swap_remove(at)),
            None => own.push((mount.mount_point, mount.fs_type)),
        }
    }
    own
}

fn mounts(pid: i32) -> Result<Vec<MountInfo>, TraceeError> {
    let wrong = |error: procfs::ProcError| TraceeError::Proc {
        path: format!("/proc/{pid}/mountinfo"),
        problem: error.to_string(),
    };
    Ok(Process::new(pid).and_then(|process| process.mountinfo()).map_err(wrong)?.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(point: &str, root: &str, device: &str, kind: &str) -> MountInfo {
        MountInfo {
            mnt_id: 1,
            pid: 1,
            majmin: device.into(),
            root: root.into(),
            mount_point: point.into(),
            mount_options: Default::default(),
            opt_fields: Vec::new(),
            fs_type: kind.into(),
            mount_source: None,
            super_options: Default::default(),
        }
    }

    #[test]
    fn what_neither_the_host_nor_the_start_has_mounted_is_found() {
        let agents = [mount("/", "/", "8:1", "ext4"), mount("/proc", "/", "0:4", "proc")];
        let started = [
            mount("/", "/", "8:1", "ext4"),
            mount("/proc", "/", "0:4", "proc"),
            mount("/proc", "/", "0:44", "proc"),
            mount("/data", "/volumes/db/data", "8:1", "ext4"),
            mount("/run/netns/x", "net:[1]", "0:5", "nsfs"),
        ];
        let given = || vec![("/proc".into(), Some("proc")), ("/data".into(), None)];
        assert_eq!(others(started.to_vec(), &agents, given()), []);
        let further = [
            mount("/proc", "/", "0:45", "proc"),
            mount("/data", "/", "0:46", "tmpfs"),
            mount("/srv", "/volumes", "8:1", "ext4"),
        ];
        let found = others([&started[..], &further].concat(), &agents, given());
        let points: Vec<_> =
            found.iter().map(|(path, kind)| (path.to_str().unwrap(), kind.as_str())).collect();
        assert_eq!(points, [("/proc", "proc"), ("/data", "tmpfs"), ("/srv", "ext4")]);
    }
}
