//! A volume that arrives: written beside its place, and put there when the instance runs.
//!
//! Each file is written in a directory of its own under the source's inode number, and the names are links to it: a name that
//! the peer sends only ever says where in the tree a link is made, which the kernel keeps below the root.

mod compare;
mod through;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, Permissions},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

pub use self::through::Unsynced;
use super::{
    VolumeError,
    blocks::{self, BLOCK, Blocks},
    digest,
    memory::Tmpfs,
    record::{self, Record, Shared},
    tree::{self, Attributes, Kind, NAMES, Tree},
};
use crate::sys::file;

/// Blocks of a file that are written before they are read back and written through.
const BATCH: usize = 512;

/// Where the files of a tmpfs are while it is built: its own root is the tree.
const INODES: &[u8] = b".rswap-inodes";

/// A volume under construction. What was not [kept](BuiltVolume::keep) is removed when it is dropped.
#[derive(Debug)]
pub struct BuiltVolume {
    home: Home,
    root: OwnedFd,
    inodes: OwnedFd,
    files: BTreeMap<u64, Built>,
    /// The file that is being written, and its blocks that were not read back yet.
    open: Option<(u64, File)>,
    fresh: BTreeSet<u64>,
    names: usize,
    complete: bool,
    /// What was changed since it was written through.
    unsynced: Unsynced,
    /// Writing through is left to the caller.
    deferred: bool,
    /// No block can be shared with where they come from.
    apart: bool,
}

/// Where it is built.
#[derive(Debug)]
enum Home {
    /// In this directory, from which it is put to its place.
    Directory(PathBuf),
    /// In a tmpfs that is mounted nowhere yet, with the times of its root.
    Memory(Tmpfs, Option<Timestamps>),
}

/// A file under construction.
#[derive(Debug)]
struct Built {
    /// Its inode number here.
    inode: u64,
    size: u64,
    blocks: Blocks,
}

impl BuiltVolume {
    /// Makes an empty one in `directory`, which must not be there yet.
    pub fn make(directory: &Path) -> Result<Self, VolumeError> {
        let make = || -> std::io::Result<(OwnedFd, OwnedFd)> {
            fs::create_dir(directory)?;
            fs::set_permissions(directory, Permissions::from_mode(0o700))?;
            let open = |name: &str| -> std::io::Result<OwnedFd> {
                let path = directory.join(name);
                fs::create_dir(&path)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Ok(rustix::fs::open(&path, flags, Mode::empty())?)
            };
            Ok((open("tree")?, open("inodes")?))
        };
        let (root, inodes) = make().map_err(VolumeError::host("making", directory))?;
        Ok(Self::of(Home::Directory(directory.to_owned()), root, inodes))
    }

    /// Makes an empty one in a tmpfs, whose root it is.
    pub fn make_in(tmpfs: Tmpfs) -> Result<Self, VolumeError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |at: &OwnedFd, name: &[u8]| rustix::fs::openat(at, name, flags, Mode::empty());
        let failed = || VolumeError::io("opening", b"");
        let root = open(tmpfs.mount(), b".").map_err(failed())?;
        rustix::fs::mkdirat(&root, INODES, Mode::RWXU).map_err(failed())?;
        let inodes = open(&root, INODES).map_err(failed())?;
        Ok(Self::of(Home::Memory(tmpfs, None), root, inodes))
    }

    fn of(home: Home, root: OwnedFd, inodes: OwnedFd) -> Self {
        let (files, fresh) = (BTreeMap::new(), BTreeSet::new());
        Self {
            home,
            root,
            inodes,
            files,
            open: None,
            fresh,
            names: 0,
            complete: false,
            unsynced: Unsynced::default(),
            deferred: false,
            apart: false,
        }
    }

    /// Where it can be mounted from already; of a tmpfs nowhere.
    pub fn root(&self) -> PathBuf {
        match &self.home {
            Home::Directory(directory) => directory.join("tree"),
            Home::Memory(..) => PathBuf::new(),
        }
    }

    /// The tmpfs that it is built in, to be mounted.
    pub fn memory(&self) -> Option<&Tmpfs> {
        match &self.home {
            Home::Directory(_) => None,
            Home::Memory(tmpfs, _) => Some(tmpfs),
        }
    }

    /// From here on the caller writes through what is [not on the disk yet](Self::take_unsynced), once, when it has put it to its place.
    pub fn defer(&mut self) {
        self.deferred = true;
    }

    /// What may not be on the disk yet, besides its place.
    pub fn take_unsynced(&mut self) -> Unsynced {
        std::mem::take(&mut self.unsynced)
    }

    /// Its root, wherever it is put.
    pub fn handle(&self) -> Result<OwnedFd, VolumeError> {
        self.root.try_clone().map_err(VolumeError::io("keeping open", b""))
    }

    /// Whether the last pass was taken.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Applies one record.
    pub fn take(&mut self, record: Record<'_>) -> Result<(), VolumeError> {
        if self.complete {
            return Err(VolumeError::Damaged("something follows the last pass"));
        }
        match record {
            Record::File { inode, size } => self.resize(inode, size),
            Record::Data { inode, offset, length, contents } => {
                let contents = record::unpack(contents, length)?;
                self.inside(inode, offset, u64::from(length))?;
                let file = self.file(inode)?;
                file.write_all_at(&contents, offset).map_err(VolumeError::io("writing", b"a file"))?;
                self.note(offset, u64::from(length))
            }
            Record::Hole { inode, offset, length } => {
                self.inside(inode, offset, length)?;
                let file = self.file(inode)?;
                file::punch_hole(file, offset, length)
                    .map_err(VolumeError::io("making a hole in", b"a file"))?;
                self.note(offset, length)
            }
            Record::Remove { path } => self.remove(path),
            Record::Add { path, kind } => self.add(path, &kind),
            Record::Attributes { path, attributes } => self.set(path, &attributes),
            Record::Forget { inode } => self.forget(inode),
            Record::End { last } => {
                self.read_back()?;
                self.complete = last;
                if self.deferred {
                    return Ok(());
                }
                // What the program wrote through is written through here, before the source's copy goes.
                self.take_unsynced().write_through(&self.root, Vec::new())
            }
        }
    }

    /// Shares block `number` of a file of this host, which was read with this `hash`, instead of taking its contents. The block is a whole one,
    /// and the file known.
    pub fn share(&mut self, inode: u64, from: &File, number: u64, hash: u128) -> Result<Shared, VolumeError> {
        if self.apart {
            return Ok(Shared::Never);
        }
        let range = number * BLOCK..(number + 1) * BLOCK;
        self.inside(inode, range.start, BLOCK)?;
        let mut contents = Vec::new();
        let file = self.file(inode)?;
        match shared(file::share(from, range.clone(), file))? {
            Shared::Yes => {}
            Shared::No => return Ok(Shared::No),
            Shared::Never => {
                self.apart = true;
                return Ok(Shared::Never);
            }
        }
        blocks::read(file, number, range.end, &mut contents)
            .map_err(VolumeError::io("reading back", b"a file"))?;
        if blocks::hash(&contents) != hash {
            // It was written in between: what was read is sent, and what it is now by the next pass.
            return Ok(Shared::No);
        }
        if let Some(built) = self.files.get_mut(&inode) {
            match blocks::is_zero(&contents) {
                true => drop(built.blocks.remove(&number)),
                false => drop(built.blocks.insert(number, hash)),
            }
        }
        self.fresh.remove(&number);
        Ok(Shared::Yes)
    }

    /// Whether a block of this file of this host can be shared; it is tried.
    pub fn shares_with(&self, from: &File) -> Result<bool, VolumeError> {
        const NAME: &str = "shared";
        let failed = || VolumeError::io::<Errno>("trying to share a block of", b"a file");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(&self.inodes, NAME, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(made.map_err(failed())?);
        rustix::fs::unlinkat(&self.inodes, NAME, AtFlags::empty()).map_err(failed())?;
        Ok(shared(file::share(from, 0..BLOCK, &file))? == Shared::Yes)
    }

    /// The digest of what is there, read back from the disk's side; only when it is [finished](Self::finish).
    pub fn digest(&self) -> Result<u128, VolumeError> {
        if !self.complete {
            return Err(VolumeError::Damaged("the last pass is missing"));
        }
        let tree = tree::scan(self.root.as_fd(), &Tree::new())?;
        let by_inode: BTreeMap<u64, &Built> = self.files.values().map(|built| (built.inode, built)).collect();
        Ok(digest::of(&tree, |inode| by_inode.get(&inode).map(|built| &built.blocks)))
    }

    /// Takes away what only building needed; nothing comes any more.
    pub fn finish(&mut self) -> Result<(), VolumeError> {
        if !self.complete {
            return Err(VolumeError::Damaged("the last pass is missing"));
        }
        self.open = None;
        match &self.home {
            Home::Directory(directory) => {
                let path = directory.join("inodes");
                fs::remove_dir_all(&path).map_err(VolumeError::host("removing", &path))
            }
            Home::Memory(tmpfs, times) => {
                let names = format!("/proc/self/fd/{}/", self.root.as_raw_fd());
                let path = Path::new(&names).join(std::ffi::OsStr::from_bytes(INODES));
                fs::remove_dir_all(&path).map_err(VolumeError::host("removing", &path))?;
                if let Some(times) = times {
                    rustix::fs::utimensat(&self.root, "", times, AtFlags::EMPTY_PATH)
                        .map_err(VolumeError::io("setting the attributes of", b""))?;
                }
                tmpfs.limit().map_err(VolumeError::io("limiting", b""))
            }
        }
    }

    /// Puts it to its place, where nothing may be. Mounts follow it.
    pub fn keep(self, place: &Path) -> Result<(), VolumeError> {
        self.put(place)
    }

    /// The same; what it was built in goes when this is dropped.
    pub fn put(&self, place: &Path) -> Result<(), VolumeError> {
        let failed = || VolumeError::host("putting a volume to", place);
        // The disk may have been taken away: what the names lead to then is on another one.
        let here = rustix::fs::fstat(&self.root).map_err(VolumeError::host("looking at", place))?;
        let there = rustix::fs::stat(self.root()).map_err(VolumeError::host("looking for", place))?;
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino) {
            return Err(VolumeError::Damaged("its names lead to another disk by now"));
        }
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent).map_err(failed())?;
        }
        fs::rename(self.root(), place).map_err(failed())
    }

    fn resize(&mut self, inode: u64, size: u64) -> Result<(), VolumeError> {
        let failed = || VolumeError::io("resizing", b"a file");
        if !self.files.contains_key(&inode) {
            if self.files.len() >= NAMES {
                return Err(VolumeError::Damaged("too many files"));
            }
            self.read_back()?;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = rustix::fs::openat(&self.inodes, inode.to_string(), flags, Mode::RUSR | Mode::WUSR);
            let file = File::from(made.map_err(VolumeError::io("making", b"a file"))?);
            let here = file.metadata().map_err(failed())?.ino();
            self.files.insert(inode, Built { inode: here, size: 0, blocks: Blocks::new() });
            self.open = Some((inode, file));
        }
        self.file(inode)?.set_len(size).map_err(failed())?;
        if let Some(built) = self.files.get_mut(&inode) {
            built.size = size;
            built.blocks.retain(|number, _| number * BLOCK < size);
        }
        Ok(())
    }

    /// The file, opened.
    fn file(&mut self, inode: u64) -> Result<&File, VolumeError> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != inode) {
            self.read_back()?;
            if !self.files.contains_key(&inode) {
                return Err(VolumeError::Damaged("a file that was not announced"));
            }
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = rustix::fs::openat(&self.inodes, inode.to_string(), flags, Mode::empty());
            self.open = Some((inode, File::from(opened.map_err(VolumeError::io("opening", b"a file"))?)));
        }
        self.open.as_ref().map(|(_, file)| file).ok_or(VolumeError::Damaged("no file is open"))
    }

    /// The peer names the place: nothing may grow by it.
    fn inside(&self, inode: u64, offset: u64, length: u64) -> Result<(), VolumeError> {
        let end = offset.checked_add(length);
        match self.files.get(&inode) {
            Some(built) if end.is_some_and(|end| end <= built.size) => Ok(()),
            _ => Err(VolumeError::Damaged("contents behind the end of their file")),
        }
    }

    fn note(&mut self, offset: u64, length: u64) -> Result<(), VolumeError> {
        let mut at = offset / BLOCK;
        while at < (offset + length).div_ceil(BLOCK) {
            self.fresh.insert(at);
            at += 1;
            if self.fresh.len() >= BATCH {
                self.read_back()?;
            }
        }
        Ok(())
    }

    /// Reads what came from where it was written to, and has it written to the disk.
    fn read_back(&mut self) -> Result<(), VolumeError> {
        let Some((inode, file)) = self.open.as_ref().filter(|_| !self.fresh.is_empty()) else {
            return Ok(());
        };
        let built = self.files.get_mut(inode).ok_or(VolumeError::Damaged("an unknown file"))?;
        let mut contents = Vec::new();
        for number in std::mem::take(&mut self.fresh) {
            if number * BLOCK >= built.size {
                continue;
            }
            blocks::read(file, number, built.size, &mut contents)
                .map_err(VolumeError::io("reading back", b"a file"))?;
            // Zeros are no part of the digest.
            match blocks::is_zero(&contents) {
                true => drop(built.blocks.remove(&number)),
                false => drop(built.blocks.insert(number, blocks::hash(&contents))),
            }
        }
        if self.deferred {
            return Ok(());
        }
        // Waited for, so that the copy is no faster than the disk. For a file by file fsync(2) the journal would be written once per
        // file: that is done once, at the end of the pass.
        file::write_back(file, 0, 0).map_err(VolumeError::io("writing", b"a file"))
    }

    fn forget(&mut self, inode: u64) -> Result<(), VolumeError> {
        if self.open.as_ref().is_some_and(|(open, _)| *open == inode) {
            self.open = None;
            self.fresh.clear();
        }
        if self.files.remove(&inode).is_none() {
            return Err(VolumeError::Damaged("a file that was not announced"));
        }
        rustix::fs::unlinkat(&self.inodes, inode.to_string(), AtFlags::empty())
            .map_err(VolumeError::io("removing", b"a file"))
    }

    fn add(&mut self, path: &[u8], kind: &Kind) -> Result<(), VolumeError> {
        if self.names >= NAMES {
            return Err(VolumeError::Damaged("too many names"));
        }
        let (parent, name) = self.parent(path)?;
        let private = Mode::RUSR | Mode::WUSR;
        let added = match kind {
            Kind::Directory => rustix::fs::mkdirat(&parent, name, private | Mode::XUSR),
            Kind::Symlink { target } => rustix::fs::symlinkat(target.as_slice(), &parent, name),
            Kind::Fifo => rustix::fs::mknodat(&parent, name, FileType::Fifo, private, 0),
            Kind::Socket => rustix::fs::mknodat(&parent, name, FileType::Socket, private, 0),
            Kind::Device { major, minor } => {
                let device = rustix::fs::makedev(*major, *minor);
                rustix::fs::mknodat(&parent, name, FileType::CharacterDevice, private, device)
            }
            Kind::File { inode } if self.files.contains_key(inode) => {
                rustix::fs::linkat(&self.inodes, inode.to_string(), &parent, name, AtFlags::empty())
            }
            Kind::File { .. } => return Err(VolumeError::Damaged("a file that was not announced")),
        };
        added.map_err(VolumeError::io("making", path))?;
        self.unsynced.note(path);
        self.unsynced.note_entry(path);
        self.names += 1;
        Ok(())
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), VolumeError> {
        let (parent, name) = self.parent(path)?;
        let removed = match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR),
            removed => removed,
        };
        self.unsynced.note_entry(path);
        self.names = self.names.saturating_sub(1);
        removed.map_err(VolumeError::io("removing", path))
    }

    fn parent<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p [u8]), VolumeError> {
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&[][..], path),
        };
        if self.memory().is_some() && (parent, name) == (b"", INODES) {
            return Err(VolumeError::Damaged("a name that only building needs"));
        }
        let opened = tree::open_below(self.root.as_fd(), parent, OFlags::PATH | OFlags::DIRECTORY);
        Ok((opened.map_err(VolumeError::io("opening", parent))?, name))
    }

    fn set(&mut self, path: &[u8], attributes: &Attributes) -> Result<(), VolumeError> {
        let failed = || VolumeError::io("setting the attributes of", path);
        let opened = tree::open_below(self.root.as_fd(), path, OFlags::PATH).map_err(failed())?;
        // The way to what a descriptor is open on, whatever its kind: no name is looked up again.
        let at = format!("/proc/self/fd/{}", opened.as_raw_fd());
        let stat = rustix::fs::fstat(&opened).map_err(failed())?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        rustix::fs::chownat(&opened, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH).map_err(failed())?;
        if kind != FileType::Symlink {
            // After the owner, whose change takes set-id bits away.
            let mode = Permissions::from_mode(attributes.mode);
            fs::set_permissions(&at, mode).map_err(VolumeError::io("setting the mode of", path))?;
        }
        let is_same = self.set_xattrs(path, &at, attributes)? && is_so(&stat, attributes);
        // All directories are told of in the last pass.
        if kind != FileType::Directory || !is_same {
            self.unsynced.note(path);
        }
        let time = |(seconds, nanoseconds): tree::Time| Timespec {
            tv_sec: seconds,
            tv_nsec: i64::from(nanoseconds.min(999_999_999)),
        };
        let times = Timestamps {
            last_access: time(attributes.accessed),
            last_modification: time(attributes.modified),
        };
        if let Home::Memory(_, of_root) = &mut self.home
            && path.is_empty()
        {
            *of_root = Some(times.clone());
        }
        rustix::fs::utimensat(&opened, "", &times, AtFlags::EMPTY_PATH).map_err(failed())
    }

    /// Says whether there were these already.
    fn set_xattrs(&self, path: &[u8], at: &str, attributes: &Attributes) -> Result<bool, VolumeError> {
        let failed = || VolumeError::io("setting the extended attributes of", path);
        let mut names = vec![0; 64 << 10];
        let length = match rustix::fs::listxattr(at, names.as_mut_slice()) {
            Err(Errno::NOTSUP) => 0,
            length => length.map_err(failed())?,
        };
        let mut same = true;
        for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if attributes.xattrs.iter().all(|(wanted, _)| wanted != name) {
                rustix::fs::removexattr(at, name).map_err(failed())?;
                same = false;
            }
        }
        let mut found = vec![0; 64 << 10];
        for (name, value) in &attributes.xattrs {
            let length = rustix::fs::getxattr(at, name.as_slice(), found.as_mut_slice());
            if length.is_ok_and(|length| found[..length] == **value) {
                continue;
            }
            rustix::fs::setxattr(at, name.as_slice(), value, XattrFlags::empty()).map_err(failed())?;
            same = false;
        }
        Ok(same)
    }
}

/// What it means that a block could be shared, or why it could not.
fn shared(tried: std::io::Result<()>) -> Result<Shared, VolumeError> {
    let Err(error) = tried else { return Ok(Shared::Yes) };
    let is = |any: &[Errno]| any.iter().any(|errno| Some(errno.raw_os_error()) == error.raw_os_error());
    // Of two file systems; of one that can't; of one that knows of no such thing.
    if is(&[Errno::XDEV, Errno::OPNOTSUPP, Errno::NOTTY, Errno::NOSYS]) {
        return Ok(Shared::Never);
    }
    // These two files can't; or it is shorter by now.
    if is(&[Errno::INVAL, Errno::PERM, Errno::TXTBSY]) {
        return Ok(Shared::No);
    }
    Err(VolumeError::io("sharing a block of", b"a file")(error))
}

/// Whether something has these attributes already, but for extended ones and the time of reading, which is not worth a sync.
fn is_so(stat: &rustix::fs::Stat, attributes: &Attributes) -> bool {
    let modified = (stat.st_mtime, stat.st_mtime_nsec as u32);
    (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid) == (attributes.mode, attributes.uid, attributes.gid)
        && modified == attributes.modified
}

impl Drop for BuiltVolume {
    fn drop(&mut self) {
        self.open = None;
        let Home::Directory(directory) = &self.home else { return };
        // Of one that was kept only the empty directory is left.
        if let Err(error) = fs::remove_dir_all(directory) {
            tracing::warn!(path = %directory.display(), %error, "what a volume was built in could not be removed");
        }
    }
}

#[cfg(test)]
mod tests;
