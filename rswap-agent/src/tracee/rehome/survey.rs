//! What refers to a directory of an instance.

mod mapped;
mod opened;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

use procfs::process::{MountInfo, Process};

use super::{
    super::{TraceeError, stopped::list_threads, tree, unix},
    Plan, Target, side,
};
use crate::{
    instance::{Instance, volume::Volume},
    sys::process::{Common, has_in_common},
    volume::tree::{Kind, Tree},
};

/// Something that can't be brought to a copy, for people.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refused {
    /// Which process, as the agent sees it; 0 for none in particular.
    pub pid: i32,
    /// What of it.
    pub item: String,
    /// Why not, and what would make it possible.
    pub reason: &'static str,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            0 => write!(f, "{}: {}", self.item, self.reason),
            pid => write!(f, "process {pid}: {}: {}", self.item, self.reason),
        }
    }
}

/// What a survey has to know.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Whose.
    pub instance: &'a Instance,
    /// Which directory.
    pub volume: &'a Volume,
    /// Where it is on this host.
    pub directory: &'a Path,
    /// What is in it.
    pub tree: &'a Tree,
}

/// Looks at the processes `pids`. Consistent only while all of them are stopped; of what comes and goes meanwhile nothing is
/// told.
pub fn survey(subject: &Subject<'_>, pids: &[i32]) -> Result<(Plan, Vec<Refused>), TraceeError> {
    let init = subject.instance.init_pid.ok_or_else(|| {
        TraceeError::Unsupported("it has no mount namespace of its own: start it with `rswap run`".into())
    })?;
    let root =
        fs::metadata(subject.directory).map_err(TraceeError::proc(subject.directory.to_string_lossy()))?;
    let plan = Plan {
        point: subject.volume.path.clone(),
        init,
        mounts: 0,
        mounts_aside: 0,
        descriptions: Vec::new(),
        mappings: Vec::new(),
        working: Vec::new(),
        nameless: Vec::new(),
    };
    let inodes = subject.tree.iter().map(|(name, found)| (found.inode, name.as_slice())).collect();
    let mut look = Look {
        subject,
        device: root.dev(),
        root: root.ino(),
        mount: 0,
        kernel_device: 0,
        inodes,
        plan,
        refused: Vec::new(),
    };
    look.mounts(init)?;
    look.outside(init)?;
    for &pid in pids {
        match look.process(init, pid) {
            Err(_) if tree::has_ended(pid) => {}
            done => done?,
        }
    }
    look.tables(pids)?;
    Ok((look.plan, look.refused))
}

struct Look<'a> {
    subject: &'a Subject<'a>,
    device: u64,
    root: u64,
    /// The id of the volume's mount.
    mount: i32,
    /// The device of its file system in the kernel's own form, which stat(2) need not tell: 20 bits of minor.
    kernel_device: u64,
    inodes: BTreeMap<u64, &'a [u8]>,
    plan: Plan,
    refused: Vec<Refused>,
}

impl Look<'_> {
    fn refuse(&mut self, pid: i32, item: impl Into<String>, reason: &'static str) {
        self.refused.push(Refused { pid, item: item.into(), reason });
    }

    /// The mounts of the namespace: one shows the volume, and none a part of it, or something else in it.
    fn mounts(&mut self, init: i32) -> Result<(), TraceeError> {
        let failed = |error: procfs::ProcError| TraceeError::Proc {
            path: format!("/proc/{init}/mountinfo"),
            problem: error.to_string(),
        };
        let all = Process::new(init).and_then(|process| process.mountinfo()).map_err(failed)?;
        let all: Vec<MountInfo> = all.into_iter().collect();
        let point = &self.subject.volume.path;
        let Some(ours) = all.iter().rfind(|mount| mount.mount_point == *point) else {
            let text = format!("no volume is mounted at {}: was it unmounted?", point.display());
            return Err(TraceeError::Unsupported(text));
        };
        self.mount = ours.mnt_id;
        let at = |path: &Path| all.iter().filter(|mount| mount.mount_point == path).count();
        (self.plan.mounts, self.plan.mounts_aside) = (at(point), at(Path::new(side::ASIDE)));
        let (major, minor) = ours.majmin.split_once(':').unwrap_or_default();
        let number = |text: &str| text.parse::<u64>().unwrap_or_default();
        self.kernel_device = number(major) << 20 | number(minor);
        let seen = fs::metadata(format!("/proc/{init}/root{}", point.display()))
            .map_err(TraceeError::proc(point.to_string_lossy()))?;
        if (seen.dev(), seen.ino()) != (self.device, self.root) {
            self.refuse(0, point.to_string_lossy(), "something else is mounted over the volume: unmount it");
        }
        for other in all.iter().filter(|other| other.mnt_id != ours.mnt_id) {
            let name = other.mount_point.display().to_string();
            if other.mount_point != *point && other.mount_point.starts_with(point) {
                self.refuse(0, name, "it is mounted in the volume: unmount it");
            } else if other.majmin == ours.majmin && Path::new(&other.root).starts_with(&ours.root) {
                self.refuse(0, name, "a part of the volume is mounted here, too: unmount it");
            }
        }
        Ok(())
    }

    /// What the kernel itself does with files of the volume.
    fn outside(&mut self, init: i32) -> Result<(), TraceeError> {
        let sockets: BTreeSet<u32> = self
            .subject
            .tree
            .values()
            .filter(|found| found.kind == Kind::Socket)
            .map(|found| found.inode as u32)
            .collect();
        if !sockets.is_empty() {
            for (inode, _) in
                unix::named_files(init)?.into_iter().filter(|(inode, _)| sockets.contains(inode))
            {
                let name = self.inodes.get(&u64::from(inode)).map(|name| String::from_utf8_lossy(name));
                let item = format!("the unix socket {}", name.unwrap_or_default());
                self.refuse(
                    0,
                    item,
                    "what a socket is bound to stays as it is: bind it outside of the volume",
                );
            }
        }
        for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            if Path::new(file.trim_end()).starts_with(self.subject.directory) {
                let name = entry.file_name().to_string_lossy().into_owned();
                self.refuse(0, name, "this loop device is a file of the volume: detach it");
            }
        }
        Ok(())
    }

    /// Tables that threads or processes have for themselves, or in common.
    fn tables(&mut self, pids: &[i32]) -> Result<(), TraceeError> {
        let same = |one, other, what| match has_in_common(one, other, what) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            same => same.map(Some).map_err(TraceeError::call("kcmp", other)),
        };
        let concerned = self.plan.processes();
        for &pid in pids {
            for tid in list_threads(pid).unwrap_or_default().into_iter().filter(|tid| *tid != pid) {
                for what in [Common::Descriptors, Common::Directories] {
                    if same(pid, tid, what)? == Some(false) {
                        let item = format!("thread {tid}");
                        self.refuse(pid, item, "it has descriptors or directories of its own (unshare(2))");
                    }
                }
            }
            for &other in concerned.iter().filter(|other| **other > pid) {
                if concerned.contains(&pid) && same(pid, other, Common::Descriptors)? == Some(true) {
                    let item = format!("its descriptors are those of process {other}");
                    self.refuse(pid, item, "a table that processes share can't be re-homed in this version");
                }
            }
        }
        Ok(())
    }

    fn process(&mut self, init: i32, pid: i32) -> Result<(), TraceeError> {
        let link = |pid: i32, name: &str| {
            let path = format!("/proc/{pid}/{name}");
            fs::read_link(&path).map_err(TraceeError::proc(path))
        };
        if link(pid, "ns/mnt")? != link(init, "ns/mnt")? {
            self.refuse(
                pid,
                "a mount namespace of its own",
                "the volume can't be switched in two: let it end",
            );
        }
        let point = self.subject.volume.path.clone();
        if link(pid, "exe")?.starts_with(&point) {
            self.refuse(pid, "its program", "it lies in the volume: start it from elsewhere");
        }
        if link(pid, "root")?.starts_with(&point) {
            self.refuse(pid, "its root directory (chroot)", "it lies in the volume");
        }
        let working = link(pid, "cwd")?;
        if working.starts_with(&point) {
            match self.named(&working, Some(&format!("/proc/{pid}/cwd"))) {
                Some(name) => self.plan.working.push((pid, Target::Name(name))),
                None => self.refuse(pid, "its working directory", "it was removed: change to another one"),
            }
        }
        let before = self.references();
        let mut uring = false;
        let entries =
            fs::read_dir(format!("/proc/{pid}/fd")).map_err(TraceeError::proc(format!("/proc/{pid}/fd")))?;
        for entry in entries.flatten() {
            let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            uring |= target.as_os_str() == "anon_inode:[io_uring]";
            self.descriptor(pid, fd, &target)?;
        }
        self.mappings(pid)?;
        if uring && self.references() > before {
            self.refuse(pid, "an io_uring", "which files it has registered can't be seen: switch to epoll");
        }
        Ok(())
    }

    fn references(&self) -> usize {
        let members: usize = self.plan.descriptions.iter().map(|one| one.members.len()).sum();
        members + self.plan.mappings.len() + self.plan.working.len()
    }

    /// The name below the volume of what is seen at `path`: it must be what is at `place`, if that is given.
    fn named(&self, path: &Path, place: Option<&str>) -> Option<Vec<u8>> {
        let name = path.strip_prefix(&self.subject.volume.path).ok()?.as_os_str().as_bytes();
        let found = self.subject.tree.get(name);
        let Some(place) = place else { return found.map(|_| name.to_vec()) };
        let metadata = fs::metadata(place).ok()?;
        if found.is_some_and(|found| found.inode == metadata.ino()) {
            return Some(name.to_vec());
        }
        self.inodes.get(&metadata.ino()).map(|name| name.to_vec())
    }
}
