//! File systems, one pool for each, wherever else it is mounted.

use std::{collections::BTreeMap, path::PathBuf};

use procfs_core::process::MountInfo;

use crate::{
    Device, Known, LocalKind, State,
    block::stack,
    root::{Room, Root, unescape},
};

const MOUNTS: &str = "/proc/self/mountinfo";

/// Reached over a network: asking for their room may wait for ever for a host that is gone.
const REMOTE: &[&str] = &[
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "9p",
    "afs",
    "gfs2",
    "ocfs2",
    "lustre",
    "glusterfs",
    "fuse.sshfs",
];

/// On pools of disks of their own, which mountinfo does not name as a device.
const OWN_DISKS: &[&str] = &["btrfs", "zfs", "bcachefs"];

/// A file system as it was found.
pub(crate) struct FileSystem {
    pub(crate) mount_points: Vec<PathBuf>,
    pub(crate) kind: LocalKind,
    pub(crate) capacity: Option<Known>,
    pub(crate) used: Option<Known>,
    pub(crate) free: Option<Known>,
    pub(crate) state: State,
}

/// All file systems on block devices, and remote ones.
pub(crate) fn file_systems(root: &Root<'_>, devices: &[Device], full_below: f64) -> Vec<FileSystem> {
    let text = root.text(MOUNTS).unwrap_or_default();
    let mut by_device: BTreeMap<String, Vec<MountInfo>> = BTreeMap::new();
    // What one line says wrong is no reason to know nothing of the others.
    for mount in text.lines().filter_map(|line| MountInfo::from_line(line).ok()) {
        by_device.entry(mount.majmin.clone()).or_default().push(mount);
    }
    by_device.into_values().filter_map(|mounts| file_system(root, devices, mounts, full_below)).collect()
}

fn file_system(
    root: &Root<'_>,
    devices: &[Device],
    mut mounts: Vec<MountInfo>,
    full_below: f64,
) -> Option<FileSystem> {
    // The main place is where all of it is seen; of several, the shortest path.
    mounts.sort_by_key(|mount| {
        (mount.root != "/", mount.mount_point.as_os_str().len(), mount.mount_point.clone())
    });
    let main = mounts.first()?;
    let fs_type = main.fs_type.clone();
    let mounted = unescape(main.mount_source.as_deref().unwrap_or_default());
    let device = device_of(devices, &main.majmin, &mounted);
    let remote = REMOTE.contains(&fs_type.as_str());
    if device.is_none() && !remote && !OWN_DISKS.contains(&fs_type.as_str()) {
        return None;
    }
    let mut mount_points: Vec<PathBuf> = Vec::new();
    for mount in &mounts {
        let point = PathBuf::from(unescape(&mount.mount_point.to_string_lossy()));
        if !mount_points.contains(&point) {
            mount_points.push(point);
        }
    }
    let at = mount_points.first()?.clone();
    let room = if remote { None } else { root.room(&at).ok() };
    let devices_below = device.map(|device| stack(devices, &device.name)).unwrap_or_default();
    let missing = devices.iter().filter(|device| devices_below.contains(&device.name));
    let missing = missing.filter_map(|device| Some((device, device.missing.filter(|&n| n > 0)?))).next();
    // Of the mount or of the file system: the kernel makes it so when a device fails.
    let read_only = main.mount_options.contains_key("ro") || main.super_options.contains_key("ro");
    let file = format!("statvfs({})", at.display());
    let known =
        |value: fn(&Room) -> u64| room.as_ref().map(|room| Known::found(value(room) as f64, file.clone()));
    let state = match (missing, room) {
        _ if read_only => State::Degraded { reason: "it is mounted read-only".to_owned() },
        (Some((device, count)), _) => {
            State::Degraded { reason: format!("{count} of the members of {} missing", device.name) }
        }
        (None, Some(room)) => fullness(&room, full_below),
        (None, None) => State::Online,
    };
    Some(FileSystem {
        capacity: known(|room| room.size_bytes),
        used: known(|room| room.size_bytes.saturating_sub(room.free_bytes)),
        free: known(|room| room.available_bytes),
        state,
        kind: LocalKind::Storage {
            mount_points: mount_points.clone(),
            fs_type,
            mounted,
            devices: devices_below,
            remote,
        },
        mount_points,
    })
}

/// Whether a file system has room left: in bytes, and for files.
pub(crate) fn fullness(room: &Room, full_below: f64) -> State {
    let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    let bytes = share(room.available_bytes, room.size_bytes);
    let files = share(room.files_available, room.files);
    let reason = if room.size_bytes > 0 && bytes < full_below {
        format!("{:.2} % of it is available, less than {:.2} %", bytes * 100.0, full_below * 100.0)
    } else if room.files > 0 && files < full_below {
        format!("{:.2} % of its files can be made, less than {:.2} %", files * 100.0, full_below * 100.0)
    } else {
        return State::Online;
    };
    State::Full { reason }
}

/// By its number; where a file system has a number of its own (btrfs), by its name.
fn device_of<'a>(devices: &'a [Device], number: &str, mounted: &str) -> Option<&'a Device> {
    let by_number = devices.iter().find(|device| device.number.as_deref() == Some(number));
    by_number.or_else(|| {
        let name = mounted.strip_prefix("/dev/")?;
        let mapper = name.strip_prefix("mapper/");
        devices.iter().find(|device| {
            device.name == name || (mapper.is_some() && device.mapper_name.as_deref() == mapper)
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn full_is_what_has_less_than_the_share(size in 1u64..1 << 50, part in 0.0f64..1.0, below in 0.0f64..0.5) {
            let available_bytes = (size as f64 * part) as u64;
            let room = Room { size_bytes: size, available_bytes, ..Room::default() };
            let full = matches!(fullness(&room, below), State::Full { .. });
            prop_assert_eq!(full, (available_bytes as f64 / size as f64) < below);
        }
    }

    #[test]
    fn a_file_system_without_files_left_is_full() {
        let room =
            Room { size_bytes: 100, available_bytes: 90, free_bytes: 90, files: 100, files_available: 1 };
        assert!(matches!(fullness(&room, 0.02), State::Full { .. }));
        // btrfs and others say 0 files: there is no limit.
        assert_eq!(fullness(&Room { files: 0, files_available: 0, ..room }, 0.02), State::Online);
    }
}
