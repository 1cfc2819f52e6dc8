//! A volume of an instance that is being moved away.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{FileType, OFlags},
    io::Errno,
};

use super::{
    VolumeError,
    blocks::{self, Blocks},
    digest,
    record::{Frames, Record},
    tree::{self, Found, Kind, Time, Tree},
};
use crate::sys::file;

/// A file that changed so shortly before a pass, in seconds, is read again in the next one: the time of a long write(2) is
/// set when it begins, and it may still be under way when the file is read.
const UNSURE_S: i64 = 5;

/// A volume, with what is known of its copy.
#[derive(Debug)]
pub struct SourceVolume {
    root: OwnedFd,
    tree: Tree,
    files: BTreeMap<u64, Known>,
    /// Files that somebody had mapped for writing when a pass began: their times need not change.
    mapped: BTreeSet<u64>,
    /// Times tell nothing of what is written through mappings, not even at the first write.
    silent: bool,
}

/// A file as the destination has it.
#[derive(Clone, Debug, Default)]
struct Known {
    changed: Time,
    modified: Time,
    size: u64,
    unsure: bool,
    blocks: Blocks,
}

impl SourceVolume {
    /// Opens the volume in `directory`.
    pub fn open(directory: &Path) -> Result<Self, VolumeError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, rustix::fs::Mode::empty());
        let root = root.map_err(VolumeError::host("opening", directory))?;
        Ok(Self::of(root, false))
    }

    /// The file system in memory whose root this is; nothing else is mounted in it. It notes no times of what is written through
    /// mappings, so the last pass reads all of it.
    pub fn of_memory(root: &OwnedFd) -> Result<Self, VolumeError> {
        let opened = tree::open_below(root.as_fd(), b"", OFlags::RDONLY | OFlags::DIRECTORY);
        Ok(Self::of(opened.map_err(VolumeError::io("opening", b""))?, true))
    }

    fn of(root: OwnedFd, silent: bool) -> Self {
        Self { root, tree: Tree::new(), files: BTreeMap::new(), mapped: BTreeSet::new(), silent }
    }

    /// What the destination needs room for: bytes on the disk, and inodes. What can't be carried is refused.
    pub fn need(&self) -> Result<(u64, u64), VolumeError> {
        let tree = tree::scan(self.root.as_fd(), &Tree::new())?;
        let inodes: BTreeMap<u64, u64> = tree.values().map(|found| (found.inode, found.allocated)).collect();
        Ok((inodes.values().sum(), inodes.len() as u64))
    }

    /// Sends what changed since the last pass. `mapped`: the files that processes map for writing. With `last`, the
    /// instance is frozen, and nothing is missed.
    pub fn pass(
        &mut self,
        last: bool,
        mapped: &BTreeSet<u64>,
        frames: &mut Frames<'_>,
    ) -> Result<(), VolumeError> {
        let since =
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64 - UNSURE_S;
        let fresh = tree::scan(self.root.as_fd(), &self.tree)?;
        self.mapped.extend(mapped);
        let mut seen = BTreeSet::new();
        let mut written = BTreeSet::new();
        for (path, found) in &fresh {
            let Kind::File { inode } = found.kind else { continue };
            let read_anyway = self.silent && last;
            if seen.insert(inode) && (read_anyway || !self.is_known(inode, found)) {
                self.copy(path, found, since, last, frames)?;
                written.insert(inode);
            }
            frames.say_alive()?;
        }
        self.send_names(&fresh, &written, last, frames)?;
        let gone: Vec<u64> = self.files.keys().copied().filter(|inode| !seen.contains(inode)).collect();
        for inode in gone {
            self.files.remove(&inode);
            self.mapped.remove(&inode);
            frames.put(&Record::Forget { inode })?;
        }
        self.tree = fresh;
        frames.put(&Record::End { last })?;
        frames.flush()
    }

    /// What there was at the last pass.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Its root.
    pub fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// The digest of what was sent.
    pub fn digest(&self) -> u128 {
        digest::of(&self.tree, |inode| self.files.get(&inode).map(|known| &known.blocks))
    }

    fn is_known(&self, inode: u64, found: &Found) -> bool {
        let same = |known: &Known| {
            !known.unsure
                && (known.changed, known.modified) == (found.changed, found.attributes.modified)
                && known.size == found.size
        };
        !self.mapped.contains(&inode) && self.files.get(&inode).is_some_and(same)
    }

    /// Sends the blocks of a file that are others than at its last copy.
    fn copy(
        &mut self,
        path: &[u8],
        found: &Found,
        since: i64,
        last: bool,
        frames: &mut Frames<'_>,
    ) -> Result<(), VolumeError> {
        let failed = || VolumeError::io::<std::io::Error>("reading", path);
        let inode = found.inode;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME;
        let file = match tree::open_below(self.root.as_fd(), path, flags) {
            // Removed or replaced since the walk.
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) if !last => None,
            opened => Some(opened.map_err(VolumeError::io("opening", path))?),
        };
        let opened = match file {
            Some(file) => {
                let stat = rustix::fs::fstat(&file).map_err(VolumeError::io("looking at", path))?;
                let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
                (regular && stat.st_ino == inode).then_some((File::from(file), stat))
            }
            None => None,
        };
        let Some((file, stat)) = opened else {
            if last {
                return Err(VolumeError::unsupported(path, "it was changed from outside of the instance"));
            }
            // Its name is sent all the same: the next pass tells what became of it.
            if let std::collections::btree_map::Entry::Vacant(unknown) = self.files.entry(inode) {
                unknown.insert(Known { unsure: true, ..Known::default() });
                frames.put(&Record::File { inode, size: 0 })?;
            }
            return Ok(());
        };
        let changed = (stat.st_ctime, stat.st_ctime_nsec as u32);
        let modified = (stat.st_mtime, stat.st_mtime_nsec as u32);
        let size = stat.st_size as u64;
        if last && (changed, size) != (found.changed, found.size) {
            return Err(VolumeError::unsupported(path, "it is written from outside of the instance"));
        }
        frames.put(&Record::File { inode, size })?;
        let mut before = self.files.remove(&inode).unwrap_or_default().blocks;
        let mut now = Blocks::new();
        let data = file::data(&file).map_err(failed())?;
        let mut contents = Vec::new();
        for number in blocks::with_data(&data, size) {
            blocks::read(&file, number, size, &mut contents).map_err(failed())?;
            let hash = blocks::hash(&contents);
            let earlier = before.remove(&number);
            if earlier != Some(hash) {
                let range = blocks::range(number, size);
                let holes = blocks::holes(&range, &data);
                for hole in holes.iter().filter(|_| earlier.is_some()) {
                    let (offset, length) = (hole.start, hole.end - hole.start);
                    frames.put(&Record::Hole { inode, offset, length })?;
                }
                for part in blocks::holes(&range, &holes) {
                    let inside = (part.start - range.start) as usize..(part.end - range.start) as usize;
                    frames.put_data(inode, part.start, &contents[inside])?;
                }
            }
            now.insert(number, hash);
            frames.say_alive()?;
        }
        for number in before.into_keys() {
            let range = blocks::range(number, size);
            if range.start < size {
                let (offset, length) = (range.start, range.end - range.start);
                frames.put(&Record::Hole { inode, offset, length })?;
            }
        }
        let unsure = changed.0 >= since;
        self.files.insert(inode, Known { changed, modified, size, unsure, blocks: now });
        Ok(())
    }

    fn send_names(
        &self,
        fresh: &Tree,
        written: &BTreeSet<u64>,
        last: bool,
        frames: &mut Frames<'_>,
    ) -> Result<(), VolumeError> {
        // What is in a directory goes before it, and comes after it.
        for (path, old) in self.tree.iter().rev() {
            if fresh.get(path).is_none_or(|new| new.kind != old.kind) {
                frames.put(&Record::Remove { path })?;
            }
        }
        for (path, new) in fresh {
            let old = self.tree.get(path).filter(|old| old.kind == new.kind);
            if old.is_none() && !path.is_empty() {
                frames.put(&Record::Add { path, kind: new.kind.clone() })?;
            }
        }
        // Names that come and go change a directory's times: hence only now.
        for (path, new) in fresh {
            let old = self.tree.get(path).filter(|old| old.kind == new.kind);
            let same = |old: &Found| {
                tree::Attributes { accessed: new.attributes.accessed, ..old.attributes.clone() }
                    == new.attributes
            };
            let stale = matches!(new.kind, Kind::File { inode } if written.contains(&inode))
                || (last && new.kind == Kind::Directory);
            if stale || !old.is_some_and(same) {
                frames.put(&Record::Attributes { path, attributes: new.attributes.clone() })?;
            }
        }
        Ok(())
    }
}
