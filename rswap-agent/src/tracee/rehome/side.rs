//! One of the two copies of a directory.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid},
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

use super::{Member, Plan, Target};
use crate::{
    sys::{file, namespace},
    volume::tree,
};

/// What is copied at once.
const CHUNK: u64 = 1 << 20;

/// Where the other copy's mount is in the instance's namespace while it is frozen, and nobody looks: a directory that each has.
const ASIDE: &str = "/proc";

/// A copy, with a mount of it that is or will be the instance's.
#[derive(Debug)]
pub struct Side {
    mount: OwnedFd,
    /// The kernel's number of the mount.
    mount_id: u64,
    /// Device and inode of its root.
    root: (u64, u64),
    found: BTreeMap<Target, Found>,
}

/// A file or directory of a copy.
#[derive(Debug)]
struct Found {
    handle: File,
    inode: (u64, u64),
}

impl Side {
    /// The copy in `directory` of this host.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = rustix::mount::open_tree(CWD, directory, flags)?;
        Self::of(mount)
    }

    fn of(mount: OwnedFd) -> io::Result<Self> {
        let root = fs::metadata(by_descriptor(&mount))?;
        let mount_id = mount_id("self", mount.as_raw_fd())?;
        Ok(Self { mount, mount_id, root: (root.dev(), root.ino()), found: BTreeMap::new() })
    }

    /// The copy in `directory`: by the mount at `plan`'s point, if it is mounted there already.
    pub fn open_for(directory: &Path, plan: &Plan) -> io::Result<Self> {
        let side = Self::open(directory)?;
        if !side.is_mounted(plan)? {
            return Ok(side);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self::of(rustix::fs::open(seen(plan), flags, Mode::empty())?)
    }

    /// Whether it is what is mounted at `plan`'s point.
    pub fn is_mounted(&self, plan: &Plan) -> io::Result<bool> {
        let seen = fs::metadata(seen(plan))?;
        Ok((seen.dev(), seen.ino()) == self.root)
    }

    /// Mounts it at `plan`'s point in the instance's mount namespace, in place of `other`. That is put [aside](ASIDE): what is open
    /// by it may have to go back.
    pub fn mount(&self, plan: &Plan, other: &Self) -> io::Result<()> {
        let aside = Path::new(ASIDE);
        let no_flags = MoveMountFlags::empty();
        namespace::inside(plan.init, &["mnt"], || {
            while !self.is_at(&plan.point)? {
                if other.is_at(&plan.point)? {
                    // On the way back this one's is there already. A mount in one that others share can't be moved.
                    let taken = self.is_at(aside)?;
                    if taken || rustix::mount::move_mount(CWD, &plan.point, CWD, aside, no_flags).is_err() {
                        rustix::mount::unmount(&plan.point, UnmountFlags::DETACH)?;
                    }
                } else if self.is_at(aside)? {
                    rustix::mount::move_mount(CWD, aside, CWD, &plan.point, no_flags)?;
                } else {
                    let none: Option<&str> = None;
                    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                    rustix::mount::move_mount(&self.mount, "", CWD, &plan.point, flags)?;
                    // What is mounted in it later stays the instance's own.
                    nix::mount::mount(none, &plan.point, none, nix::mount::MsFlags::MS_SLAVE, none)?;
                }
            }
            Ok(())
        })
    }

    /// Takes its mount away that was put aside: nothing is open by it any more.
    pub fn forget_mount(&self, plan: &Plan) -> io::Result<()> {
        namespace::inside(plan.init, &["mnt"], || {
            while self.is_at(Path::new(ASIDE))? {
                rustix::mount::unmount(ASIDE, UnmountFlags::DETACH)?;
            }
            Ok(())
        })
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        let seen = fs::metadata(path)?;
        Ok((seen.dev(), seen.ino()) == self.root)
    }

    /// Whether descriptor `fd` of process `pid` is of `target` here, opened by this mount.
    pub fn has(&self, target: &Target, pid: i32, fd: RawFd) -> io::Result<bool> {
        let found = fs::metadata(format!("/proc/{pid}/fd/{fd}"))?;
        Ok((found.dev(), found.ino()) == self.inode(target)?
            && mount_id(&pid.to_string(), fd)? == self.mount_id)
    }

    /// Opens all that `plan` names. What has no name is taken from who has it on this side already, or is copied from who has it
    /// on the other one.
    pub fn open_all(&mut self, plan: &Plan) -> io::Result<()> {
        let descriptions = plan.descriptions.iter().map(|one| &one.target);
        let mappings = plan.mappings.iter().map(|part| &part.target);
        let working = plan.working.iter().map(|(_, target)| target);
        for target in descriptions.chain(mappings).chain(working) {
            if let Entry::Vacant(missing) = self.found.entry(target.clone()) {
                let handle = match target {
                    Target::Name(name) => tree::open_below(self.mount.as_fd(), name, OFlags::PATH)?.into(),
                    Target::Nameless(number) => nameless(&self.mount, self.mount_id, plan, *number)?,
                };
                let inode = handle.metadata().map(|metadata| (metadata.dev(), metadata.ino()))?;
                missing.insert(Found { handle, inode });
            }
        }
        // What can't be opened as it is now is known before anything is changed.
        for one in &plan.descriptions {
            self.describe(&one.target, one.flags)?;
        }
        Ok(())
    }

    /// Device and inode of `target` here.
    pub fn inode(&self, target: &Target) -> io::Result<(u64, u64)> {
        self.found(target).map(|found| found.inode)
    }

    /// A new description of `target`.
    pub fn describe(&self, target: &Target, flags: i32) -> io::Result<File> {
        let access = flags & libc::O_ACCMODE;
        let made_once = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);
        let mut flags = flags & !(libc::O_ACCMODE | made_once);
        let handle = &self.found(target)?.handle;
        match target {
            // By the handle it would be a link that is followed.
            Target::Name(name) if flags & libc::O_NOFOLLOW != 0 => {
                let flags = OFlags::from_bits_retain((flags | access) as u32);
                return Ok(tree::open_below(self.mount.as_fd(), name, flags)?.into());
            }
            Target::Name(_) => {}
            Target::Nameless(_) => flags &= !(libc::O_DIRECTORY | libc::O_NOFOLLOW),
        }
        File::options()
            .read(access != libc::O_WRONLY)
            .write(access != libc::O_RDONLY)
            .custom_flags(flags)
            .open(by_descriptor(handle))
    }

    fn found(&self, target: &Target) -> io::Result<&Found> {
        self.found.get(target).ok_or_else(|| io::Error::other(format!("{target:?} was not opened")))
    }
}

fn by_descriptor(of: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", of.as_raw_fd())
}

/// Where the agent sees the place that `plan` is about.
fn seen(plan: &Plan) -> String {
    format!("/proc/{}/root{}", plan.init, plan.point.display())
}

/// The number of the mount by which descriptor `fd` of `process` was opened.
fn mount_id(process: &str, fd: RawFd) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/fdinfo/{fd}"))?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("a descriptor without a mount"))
}

/// File `number` of those without a name, opened by `mount`.
fn nameless(mount: &OwnedFd, id: u64, plan: &Plan, number: usize) -> io::Result<File> {
    let target = Target::Nameless(number);
    let mut other = None;
    for one in plan.descriptions.iter().filter(|one| one.target == target && one.flags & libc::O_PATH == 0) {
        for Member { pid, fd, .. } in &one.members {
            let place = format!("/proc/{pid}/fd/{fd}");
            match mount_id(&pid.to_string(), *fd) {
                Ok(found) if found == id => return File::options().read(true).write(true).open(place),
                Ok(_) if other.is_none() => other = Some(File::open(place)?),
                _ => {}
            }
        }
    }
    for part in plan.mappings.iter().filter(|part| part.target == target) {
        // By which mount it was opened can't be seen: it is copied.
        let place = format!("/proc/{}/map_files/{:x}-{:x}", part.pid, part.start, part.end);
        other = other.or_else(|| File::open(place).ok());
    }
    let from = other.ok_or_else(|| io::Error::other("a deleted file is open nowhere any more"))?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let made = File::from(rustix::fs::openat(mount, ".", flags, Mode::RUSR | Mode::WUSR)?);
    made.set_len(from.metadata()?.len())?;
    for range in file::data(&from)? {
        let mut at = range.start;
        while at < range.end {
            let mut bytes = vec![0; CHUNK.min(range.end - at) as usize];
            let got = file::read_at(&from, &mut bytes, at)?;
            if got == 0 {
                break;
            }
            std::os::unix::fs::FileExt::write_all_at(&made, &bytes[..got], at)?;
            at += got as u64;
        }
    }
    let access = plan.nameless.get(number).map_or((0o600, 0, 0), |nameless| nameless.access);
    let (mode, uid, gid) = access;
    rustix::fs::chownat(&made, "", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::EMPTY_PATH)?;
    made.set_permissions(Permissions::from_mode(mode))?;
    Ok(made)
}
