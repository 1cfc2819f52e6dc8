//! One of the two copies of a directory.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File, Permissions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use procfs::{FromRead, process::MountInfos};
use rustix::{
    fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

use super::{Member, Part, Plan, Target};
use crate::{
    sys::{file, namespace},
    volume::tree,
};

/// What is copied at once.
const CHUNK: u64 = 1 << 20;

/// Where the other copy's mount is in the instance's namespace while it is frozen, and nobody looks: a directory that each has.
pub(super) const ASIDE: &str = "/proc";

/// A copy, with a mount of it that is or will be the instance's.
#[derive(Debug)]
pub struct Side {
    mount: OwnedFd,
    /// The kernel's number of the mount.
    mount_id: u64,
    /// Device and inode of its root.
    root: (u64, u64),
    found: BTreeMap<Target, Found>,
    /// Files without a name, as they were before anything was brought to the other copy.
    held: BTreeMap<usize, File>,
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
        let (found, held) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { mount, mount_id, root: (root.dev(), root.ino()), found, held })
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
        self.is_at(seen(plan).as_ref())
    }

    /// Mounts it at `plan`'s point in the instance's mount namespace, in place of `other`. That is put [aside](ASIDE): what is open
    /// by it may have to go back.
    ///
    /// Without the `other`, because its disk does not answer: what is mounted there is it, if as much is mounted there as ever.
    pub fn mount(&self, plan: &Plan, other: Option<&Self>) -> io::Result<()> {
        let aside = Path::new(ASIDE);
        let no_flags = MoveMountFlags::empty();
        let mounts = Mounts::of(plan)?;
        namespace::inside(plan.init, &["mnt"], || {
            while !self.is_at(&plan.point)? {
                let at_point = root_at(&plan.point)?;
                if at_point.is_none() {
                    // It is not this one, unless this one tells nothing, either.
                    rustix::fs::fstat(&self.mount)?;
                }
                let is_other = match other {
                    Some(other) => at_point.is_none() || at_point == Some(other.root),
                    None => mounts.at(&plan.point)? >= plan.mounts,
                };
                if is_other {
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

    /// Takes away the mount of the copy that was put aside: nothing is open by it any more.
    pub fn forget_aside(plan: &Plan) -> io::Result<()> {
        let mounts = Mounts::of(plan)?;
        namespace::inside(plan.init, &["mnt"], || {
            while mounts.at(Path::new(ASIDE))? > plan.mounts_aside {
                rustix::mount::unmount(ASIDE, UnmountFlags::DETACH)?;
            }
            Ok(())
        })
    }

    /// Whether the mount of some copy is still [aside](ASIDE) in the instance's namespace.
    pub fn any_is_aside(plan: &Plan) -> io::Result<bool> {
        Ok(Mounts::of(plan)?.at(Path::new(ASIDE))? > plan.mounts_aside)
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        Ok(root_at(path)? == Some(self.root))
    }

    /// Whether descriptor `fd` of process `pid` is of `target` here, opened by this mount.
    pub fn has(&self, target: &Target, pid: i32, fd: RawFd) -> io::Result<bool> {
        self.is_of(self.inode(target)?, pid, fd)
    }

    /// Whether descriptor `fd` of process `pid` was opened by this mount, and is of the file with this device and inode.
    pub fn is_of(&self, inode: (u64, u64), pid: i32, fd: RawFd) -> io::Result<bool> {
        // Of another mount nothing is asked: its disk may have failed.
        if mount_id(&pid.to_string(), fd)? != self.mount_id {
            return Ok(false);
        }
        let found = fs::metadata(format!("/proc/{pid}/fd/{fd}"))?;
        Ok((found.dev(), found.ino()) == inode)
    }

    /// Keeps the files without a name open that are on this side, so that going back needs nothing of the other one.
    pub fn hold_nameless(&mut self, plan: &Plan) {
        for number in 0..plan.nameless.len() {
            let target = Target::Nameless(number);
            let descriptions =
                plan.descriptions.iter().filter(|one| one.target == target && one.flags & libc::O_PATH == 0);
            let open =
                descriptions.flat_map(|one| &one.members).map(|of| format!("/proc/{}/fd/{}", of.pid, of.fd));
            let mapped = plan.mappings.iter().filter(|part| part.target == target).map(map_file);
            // Who has it may be killed meanwhile.
            if let Some(file) = open.chain(mapped).find_map(|place| File::open(place).ok()) {
                self.held.insert(number, file);
            }
        }
    }

    /// Device and inode of `target` as the plan found it, if this is the side that it was found on. Of the other one nothing is asked.
    pub fn original(&self, plan: &Plan, target: &Target) -> io::Result<(u64, u64)> {
        match target {
            Target::Name(name) => {
                let found =
                    File::from(tree::open_below(self.mount.as_fd(), name, OFlags::PATH)?).metadata()?;
                Ok((found.dev(), found.ino()))
            }
            Target::Nameless(number) => {
                let nameless = plan.nameless.get(*number).map(|nameless| nameless.inode);
                nameless.ok_or_else(|| io::Error::other("a file that the plan does not tell of"))
            }
        }
    }

    /// Opens all that `plan` names. What has no name is taken from who has it on this side already, or is copied from who has it
    /// on the other one.
    ///
    /// `before`, on the way back: this copy as it was opened before anything was re-homed. What has no name is copied from what it
    /// [holds](Self::hold_nameless) then.
    pub fn open_all(&mut self, plan: &Plan, before: Option<&Self>) -> io::Result<()> {
        let descriptions = plan.descriptions.iter().map(|one| &one.target);
        let mappings = plan.mappings.iter().map(|part| &part.target);
        let working = plan.working.iter().map(|(_, target)| target);
        for target in descriptions.chain(mappings).chain(working) {
            if let Entry::Vacant(missing) = self.found.entry(target.clone()) {
                let handle = match target {
                    Target::Name(name) => tree::open_below(self.mount.as_fd(), name, OFlags::PATH)?.into(),
                    Target::Nameless(number) => {
                        let held = before.and_then(|before| before.held.get(number));
                        nameless(&self.mount, self.mount_id, plan, *number, held)?
                    }
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

/// The file of a mapping.
fn map_file(part: &Part) -> String {
    format!("/proc/{}/map_files/{:x}-{:x}", part.pid, part.start, part.end)
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

/// The list of the mounts in the instance's namespace, whoever reads it. Nothing is asked of their disks.
struct Mounts(File);

impl Mounts {
    fn of(plan: &Plan) -> io::Result<Self> {
        File::open(format!("/proc/{}/mountinfo", plan.init)).map(Self)
    }

    /// How many there are at `path`, one over the other.
    fn at(&self, path: &Path) -> io::Result<usize> {
        let mut list = &self.0;
        list.seek(SeekFrom::Start(0))?;
        let all = MountInfos::from_read(list).map_err(io::Error::other)?;
        Ok(all.into_iter().filter(|mount| mount.mount_point == path).count())
    }
}

/// Device and inode of what is at `path`; `None` if that is on a disk that has failed: some file systems tell nothing any more then.
fn root_at(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some((found.dev(), found.ino()))),
        Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// File `number` of those without a name, opened by `mount`. `held`: that file on the side that it was found on.
fn nameless(mount: &OwnedFd, id: u64, plan: &Plan, number: usize, held: Option<&File>) -> io::Result<File> {
    let target = Target::Nameless(number);
    let mut other = held.map(File::try_clone).transpose()?;
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
        other = other.or_else(|| File::open(map_file(part)).ok());
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
