//! Which mounts an instance has made, what each shows, and which of them can't be made again.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    mount::{OpenTreeFlags, open_tree},
};

use super::{
    super::TraceeError,
    KERNEL, LONGEST_PATH, MEMORY_OPTIONS, MOST, Memory, Mount, Mounts, What,
    info::{self, Info},
};
use crate::{instance::Instance, sys::namespace};

/// Mounts without files of a program's: what keeps a namespace.
const WITHOUT_FILES: &str = "nsfs";

const ANOTHER_TYPE: &str = "this file system isn't carried: unmount it, or mount it on both hosts before the instance is \
                            started; for a directory that moves, use a volume";
const PART: &str = "only a part of it is mounted: mount it as a whole first";
const COVERED: &str = "another mount lies over it, and its files can't be read: unmount one of them";
const SHARED: &str =
    "mounts in it would appear elsewhere (MS_SHARED): make it private (mount --make-private)";
const MAPPED: &str = "its owners are mapped to others (idmapped mount): unmount it";
const ROOT: &str = "another root was mounted (pivot_root): start the instance without it, or use chroot";
const REMOVED: &str = "the directory that it lies on was removed: unmount it";
const OPTION: &str =
    "it has an option that isn't carried (quotas, memory policy, case folding): mount it without";
const TERMINALS: &str = "it has pseudo-terminals: close them, or use those of /dev/pts";
const LONG: &str = "its path is too long, or there are too many mounts: make them fewer or shorter";

/// A mount that isn't made again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Where it is.
    pub point: PathBuf,
    /// The file system's type.
    pub kind: String,
    /// Why not, and what would make it possible.
    pub reason: &'static str,
}

impl Refused {
    /// What it is, for people.
    pub fn item(&self) -> String {
        format!("a mount of its own at {} ({})", self.point.display(), self.kind)
    }
}

/// What an instance has mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// What is made again.
    pub mounts: Mounts,
    /// The rest.
    pub refused: Vec<Refused>,
}

/// The mounts of `instance` that this agent's namespace has not, and that the instance was not started with. What the host has
/// mounted or unmounted since may be different: the destination's host decides about that.
pub fn survey(instance: &Instance) -> Result<Survey, TraceeError> {
    let Some(init) = instance.init_pid else { return Ok(Survey::default()) };
    let volumes: Vec<PathBuf> = instance.volumes.iter().map(|volume| volume.path.clone()).collect();
    survey_of(init, &volumes)
}

/// As [`survey`], of the namespace of process `pid`.
pub(super) fn survey_of(pid: i32, volumes: &[PathBuf]) -> Result<Survey, TraceeError> {
    let agents = info::read(std::process::id() as i32)?;
    // Each once: a second one over it is the program's.
    let mut given: Vec<(PathBuf, Option<&str>)> =
        vec![("/proc".into(), Some("proc")), ("/dev/pts".into(), Some("devpts"))];
    given.extend(volumes.iter().map(|volume| (volume.clone(), None)));
    let parted = part(info::read(pid)?, &agents, given);
    let mut surveyor =
        Surveyor { pid, agents, given: parted.given, found: Survey::default(), first: BTreeMap::new() };
    for own in in_order(parted.own) {
        if let Err(reason) = surveyor.take(&own) {
            surveyor.found.refused.push(Refused { point: own.point, kind: own.kind, reason });
        }
    }
    for host in parted.changed {
        let mount = Mount {
            flags: host.flags(),
            what: What::Host,
            follows_host: true,
            visible: is_visible(pid, &host),
            point: host.point,
        };
        surveyor.found.mounts.list.extend(Some(mount).filter(|mount| mount.visible));
    }
    Ok(surveyor.found)
}

/// Refuses what has changed since `before`, and what can't be carried.
pub fn require_same(instance: &Instance, before: &Mounts) -> Result<(), TraceeError> {
    let now = survey(instance)?;
    if let Some(refused) = now.refused.first() {
        return Err(TraceeError::Unsupported(format!("{}: {}", refused.item(), refused.reason)));
    }
    if now.mounts != *before {
        let text = "something was mounted or unmounted since the migration began: try again";
        return Err(TraceeError::Unsupported(text.into()));
    }
    Ok(())
}

/// Opens the tmpfs `number` of a process's namespace, without what is mounted in it.
pub fn open_memory(pid: i32, mounts: &Mounts, number: u32) -> Result<OwnedFd, TraceeError> {
    let shows = |mount: &&Mount| {
        let all = match &mount.what {
            What::Memory(this) => *this == number,
            What::Again { of, path } => {
                path.as_os_str().is_empty()
                    && mounts.list.get(*of as usize).is_some_and(|of| of.what == What::Memory(number))
            }
            _ => false,
        };
        all && mount.visible
    };
    let point = mounts.list.iter().find(shows).map(|mount| mount.point.clone());
    let point = point.ok_or_else(|| TraceeError::Unsupported(COVERED.into()))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    namespace::inside(pid, &["mnt"], || Ok(open_tree(CWD, &point, flags)?))
        .map_err(TraceeError::call("opening a tmpfs", pid))
}

/// A namespace's mounts.
struct Parted {
    /// Those that the program made.
    own: Vec<Info>,
    /// Those that the instance was started with, besides the host's.
    given: Vec<Info>,
    /// Those of the host that have other flags now.
    changed: Vec<Info>,
}

fn part(instances: Vec<Info>, agents: &[Info], mut given: Vec<(PathBuf, Option<&str>)>) -> Parted {
    let mut parted = Parted { own: Vec::new(), given: Vec::new(), changed: Vec::new() };
    for mount in instances {
        if mount.kind == WITHOUT_FILES {
            continue;
        }
        let mut same = agents.iter().filter(|agents| agents.is_same(&mount)).peekable();
        if same.peek().is_some() {
            if same.all(|agents| agents.flags() != mount.flags()) {
                parted.changed.push(mount);
            }
            continue;
        }
        let is_given = |(path, kind): &(PathBuf, Option<&str>)| {
            *path == mount.point && kind.is_none_or(|kind| kind == mount.kind)
        };
        match given.iter().position(is_given) {
            Some(at) => {
                given.swap_remove(at);
                parted.given.push(mount);
            }
            None => parted.own.push(mount),
        }
    }
    parted
}

/// What lies on another one comes after it, what is hidden by another one before that, a part of a file system after the whole, and
/// else by their mount points: their numbers say in which order the kernel has made them, not where they belong.
fn in_order(mut left: Vec<Info>) -> Vec<Info> {
    left.sort_by(|one, other| one.point.cmp(&other.point));
    let mut ordered: Vec<Info> = Vec::with_capacity(left.len());
    let is_whole = |mount: &Info| mount.root == Path::new("/");
    while !left.is_empty() {
        let is_next = |mount: &Info| {
            let has_whole = |other: &Info| is_whole(other) && other.device == mount.device;
            let needs_whole = !is_whole(mount) && !ordered.iter().any(has_whole);
            let waits_for = |other: &Info| {
                let hidden = other.point != mount.point && other.point.starts_with(&mount.point);
                other.id == mount.parent
                    || hidden && !lies_on(&left, other, mount.id)
                    || needs_whole && has_whole(other)
            };
            !left.iter().any(waits_for)
        };
        let next = left.iter().position(is_next).unwrap_or(0);
        ordered.push(left.remove(next));
    }
    ordered
}

/// Whether `mount` lies on the mount with this number, or on others that do.
fn lies_on(all: &[Info], mount: &Info, id: i32) -> bool {
    let mut parent = mount.parent;
    // No longer than all of them, whatever the kernel says.
    for _ in all {
        if parent == id {
            return true;
        }
        match all.iter().find(|other| other.id == parent) {
            Some(other) => parent = other.parent,
            None => return false,
        }
    }
    false
}

struct Surveyor {
    pid: i32,
    agents: Vec<Info>,
    given: Vec<Info>,
    found: Survey,
    /// The mount that shows all of a file system of the instance's own, by its device.
    first: BTreeMap<String, u32>,
}

impl Surveyor {
    fn take(&mut self, own: &Info) -> Result<(), &'static str> {
        let obstacles = [
            (own.point == Path::new("/"), ROOT),
            (own.point.as_os_str().as_encoded_bytes().ends_with(b"//deleted"), REMOVED),
            (own.root.as_os_str().as_encoded_bytes().ends_with(b"//deleted"), REMOVED),
            (own.is_shared(), SHARED),
            (own.options.contains_key("idmapped"), MAPPED),
            (own.point.as_os_str().len() > LONGEST_PATH || self.found.mounts.list.len() >= MOST, LONG),
        ];
        if let Some((_, reason)) = obstacles.into_iter().find(|(stands, _)| *stands) {
            return Err(reason);
        }
        let visible = is_visible(self.pid, own);
        let what = match self.first.get(&own.device) {
            Some(of) => {
                What::Again { of: *of, path: own.root.strip_prefix("/").unwrap_or(&own.root).to_owned() }
            }
            None => self.first_of_its_kind(own, visible)?,
        };
        let at = self.found.mounts.list.len() as u32;
        if matches!(what, What::Memory(_) | What::Kernel { .. }) {
            self.first.insert(own.device.clone(), at);
        }
        let (point, flags, follows_host) = (own.point.clone(), own.flags(), own.follows());
        self.found.mounts.list.push(Mount { point, what, flags, follows_host, visible });
        Ok(())
    }

    fn first_of_its_kind(&mut self, own: &Info, visible: bool) -> Result<What, &'static str> {
        if let Some((from, directory)) = self.origin(own, visible) {
            return Ok(What::Bind { from, directory });
        }
        let whole = own.root == Path::new("/");
        if own.kind == "tmpfs" {
            let options = own.own_options();
            if options.iter().any(|(name, _)| !MEMORY_OPTIONS.contains(&name.as_str())) {
                return Err(OPTION);
            }
            if !whole {
                return Err(PART);
            }
            if !visible {
                return Err(COVERED);
            }
            let read_only = own.super_options.contains_key("ro");
            self.found.mounts.memories.push(Memory { source: own.source.clone(), options, read_only });
            return Ok(What::Memory(self.found.mounts.memories.len() as u32 - 1));
        }
        if !KERNEL.contains(&own.kind.as_str()) {
            return Err(ANOTHER_TYPE);
        }
        if !whole {
            return Err(PART);
        }
        if own.kind == "devpts" {
            let entries = fs::read_dir(seen_by(self.pid, &own.point)).map_err(|_| COVERED)?;
            if !visible {
                return Err(COVERED);
            }
            if entries.flatten().any(|entry| entry.file_name() != "ptmx") {
                return Err(TERMINALS);
            }
        }
        let read_only = own.super_options.contains_key("ro");
        Ok(What::Kernel { kind: own.kind.clone(), options: own.own_options(), read_only })
    }

    /// Under which path the instance had it when it was started, and whether that is a directory.
    fn origin(&self, own: &Info, visible: bool) -> Option<(PathBuf, bool)> {
        let here = look(&seen_by(self.pid, &own.point)).filter(|_| visible);
        let from = |mounts: &[Info], sees: &dyn Fn(&Path) -> PathBuf| {
            let mut found: Vec<(usize, PathBuf)> = mounts
                .iter()
                .filter(|mount| mount.device == own.device)
                .filter_map(|mount| {
                    let rest = own.root.strip_prefix(&mount.root).ok()?;
                    let path = if rest.as_os_str().is_empty() {
                        mount.point.clone()
                    } else {
                        mount.point.join(rest)
                    };
                    Some((mount.root.as_os_str().len(), path))
                })
                .collect();
            found.sort_by_key(|(root, _)| std::cmp::Reverse(*root));
            found.into_iter().find_map(|(root, path)| {
                let there = look(&sees(&path))?;
                let same =
                    there.device == own.device && here.as_ref().is_none_or(|here| here.inode == there.inode);
                (same && path.as_os_str().len() <= LONGEST_PATH).then_some((root, path, there.directory))
            })
        };
        let given = from(&self.given, &|path| seen_by(self.pid, path));
        let host = from(&self.agents, &|path| path.to_owned());
        // A volume lies on a file system of the host's, too.
        let best = match (given, host) {
            (Some(given), Some(host)) => Some(if given.0 >= host.0 { given } else { host }),
            (given, host) => given.or(host),
        };
        best.map(|(_, path, directory)| (path, directory))
    }
}

/// A path of the instance's, for this process.
pub(super) fn seen_by(pid: i32, path: &Path) -> PathBuf {
    Path::new(&format!("/proc/{pid}/root")).join(path.strip_prefix("/").unwrap_or(path))
}

/// What a path leads to.
pub(super) struct Looked {
    device: String,
    pub(super) inode: u64,
    mount: u64,
    directory: bool,
}

fn look(path: &Path) -> Option<Looked> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID).ok()?;
    Some(Looked {
        device: format!("{}:{}", stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
        mount: stat.stx_mnt_id,
        directory: u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR,
    })
}

fn is_visible(pid: i32, mount: &Info) -> bool {
    look(&seen_by(pid, &mount.point)).is_some_and(|found| found.mount == mount.id as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(id: i32, parent: i32, point: &str, root: &str, device: &str, kind: &str) -> Info {
        let line = format!("{id} {parent} {device} {root} {point} rw,relatime - {kind} none rw");
        Info::of(procfs::process::MountInfo::from_line(&line).expect("a line of mountinfo"))
    }

    fn points(mounts: &[Info]) -> Vec<(&str, &str)> {
        mounts.iter().map(|mount| (mount.point.to_str().unwrap_or_default(), mount.kind.as_str())).collect()
    }

    #[test]
    fn what_neither_the_host_nor_the_start_has_mounted_is_found() {
        let agents = [mount(1, 0, "/", "/", "8:1", "ext4"), mount(2, 1, "/proc", "/", "0:4", "proc")];
        let started = vec![
            mount(11, 10, "/", "/", "8:1", "ext4"),
            mount(12, 11, "/proc", "/", "0:4", "proc"),
            mount(13, 12, "/proc", "/", "0:44", "proc"),
            mount(14, 11, "/data", "/volumes/db/data", "8:1", "ext4"),
            mount(15, 11, "/run/netns/x", "net:[1]", "0:5", "nsfs"),
        ];
        let given = || vec![("/proc".into(), Some("proc")), ("/data".into(), None)];
        let parted = part(started.clone(), &agents, given());
        assert_eq!(points(&parted.own), []);
        assert_eq!(points(&parted.given), [("/proc", "proc"), ("/data", "ext4")]);
        let further = [
            mount(16, 13, "/proc", "/", "0:45", "proc"),
            mount(17, 14, "/data", "/", "0:46", "tmpfs"),
            mount(18, 11, "/srv", "/volumes", "8:1", "ext4"),
        ];
        let parted = part([&started[..], &further].concat(), &agents, given());
        assert_eq!(points(&parted.own), [("/proc", "proc"), ("/data", "tmpfs"), ("/srv", "ext4")]);
    }

    #[test]
    fn other_flags_of_a_mount_of_the_host_are_found() {
        let agents = [mount(1, 0, "/", "/", "8:1", "ext4")];
        let line = "11 10 8:1 / / ro,nosuid,relatime - ext4 none rw";
        let changed = Info::of(procfs::process::MountInfo::from_line(line).expect("a line"));
        let parted = part(vec![changed], &agents, Vec::new());
        assert_eq!((points(&parted.own), points(&parted.changed)), (vec![], vec![("/", "ext4")]));
    }

    #[test]
    fn what_lies_on_another_one_comes_after_it() {
        let moved = vec![
            mount(20, 22, "/b/a", "/", "0:46", "tmpfs"),
            mount(21, 1, "/c", "/", "0:47", "tmpfs"),
            mount(22, 1, "/b", "/", "0:48", "tmpfs"),
        ];
        assert_eq!(points(&in_order(moved)), [("/b", "tmpfs"), ("/b/a", "tmpfs"), ("/c", "tmpfs")]);
    }

    #[test]
    fn a_part_comes_after_the_whole() {
        let parts =
            vec![mount(20, 1, "/b", "/", "0:46", "tmpfs"), mount(21, 1, "/a", "/sub", "0:46", "tmpfs")];
        assert_eq!(points(&in_order(parts)), [("/b", "tmpfs"), ("/a", "tmpfs")]);
    }

    #[test]
    fn what_is_hidden_comes_first() {
        let hidden = vec![
            mount(20, 1, "/b", "/", "0:46", "tmpfs"),
            mount(21, 1, "/b/a", "/", "0:47", "ext4"),
            mount(22, 20, "/b/a", "/", "0:48", "proc"),
            mount(23, 22, "/b/a", "/", "0:49", "sysfs"),
        ];
        let wanted = [("/b/a", "ext4"), ("/b", "tmpfs"), ("/b/a", "proc"), ("/b/a", "sysfs")];
        assert_eq!(points(&in_order(hidden)), wanted);
    }
}
