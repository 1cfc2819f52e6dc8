//! A volume of an instance that is being moved away.

mod compare;
mod followed;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs::File,
    ops::Range,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{FileType, OFlags},
    io::Errno,
};

use self::followed::Followed;
use super::{
    VolumeError,
    blocks::{self, BLOCK, Blocks},
    digest,
    record::{Frames, Record},
    tree::{self, Found, Kind, Time, Tree},
};
use crate::sys::file;

/// A file that changed so shortly before a pass, in seconds, is read again in the next one: the time of a long write(2) is
/// set when it begins, and it may still be under way when the file is read.
const UNSURE_S: i64 = 5;
/// Bytes of a file that are written back in one go.
const WRITE_BACK_BYTES: u64 = 32 << 20;

/// What of a file was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// In some way that the log does not follow: from here on times have to tell.
    pub whole: bool,
    /// Blocks, by their number; more may be named than were written.
    pub blocks: BTreeSet<u64>,
}

/// Tells what was written to the files of a volume's file system, whoever wrote it. A page that has been written is named again for a later
/// write only once it was written back.
pub trait WriteLog: std::fmt::Debug + Send {
    /// Takes note of what there is, so that nothing is lost for want of room.
    fn look(&mut self);
    /// What was written since it was asked last, by inode. With `all`, nothing is missed that was written before the call; else the
    /// next call may tell of it. `None`: something was lost.
    fn take(&mut self, all: bool) -> Option<BTreeMap<u64, Touched>>;
}

/// What a copy takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// On the disk.
    pub bytes: u64,
    /// Of those, what is in blocks that a copy on the same file system could share.
    pub shareable_bytes: u64,
    /// Files, directories and whatever else has a name.
    pub inodes: u64,
}

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
    /// What is written to it, where the kernel tells.
    log: Option<Followed>,
    /// What it has told of, and no pass has read since.
    told: BTreeMap<u64, Touched>,
    /// Files that were written in a way that it does not follow, whether they had a name then or not: a write may still be under way.
    unfollowable: BTreeSet<u64>,
}

/// What of a file has to be read.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    Nothing,
    Blocks(BTreeSet<u64>),
    All,
}

/// A file as the destination has it.
#[derive(Clone, Debug, Default)]
struct Known {
    changed: Time,
    modified: Time,
    size: u64,
    unsure: bool,
    /// The log tells of all that was written since.
    followed: bool,
    blocks: Blocks,
}

/// When a file is copied: what changed since that second may be changing still.
#[derive(Clone, Copy)]
struct Moment {
    since: i64,
    last: bool,
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
        let (files, mapped, unfollowable) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        let told = BTreeMap::new();
        Self { root, tree: Tree::new(), files, mapped, silent, log: None, told, unfollowable }
    }

    /// Has `log` tell what is written. It must have begun already. From here on it is [looked at](WriteLog::look) by a thread of its own, all the time.
    pub fn follow(&mut self, log: Box<dyn WriteLog>) {
        self.log = Some(Followed::new(log));
    }

    /// What the destination needs room for. What can't be carried is refused.
    pub fn need(&self) -> Result<Need, VolumeError> {
        let tree = tree::scan(self.root.as_fd(), &Tree::new())?;
        let inodes: BTreeMap<u64, &Found> = tree.values().map(|found| (found.inode, found)).collect();
        let whole_blocks = |found: &Found| match found.kind {
            Kind::File { .. } => found.allocated.min(found.size / BLOCK * BLOCK),
            _ => 0,
        };
        Ok(Need {
            bytes: inodes.values().map(|found| found.allocated).sum(),
            shareable_bytes: inodes.values().map(|found| whole_blocks(found)).sum(),
            inodes: inodes.len() as u64,
        })
    }

    /// A file whose first block could be shared, if its file system can: the longest one.
    pub fn sample(&self) -> Result<Option<File>, VolumeError> {
        let tree = tree::scan(self.root.as_fd(), &Tree::new())?;
        let files = tree.iter().filter(|(_, found)| matches!(found.kind, Kind::File { .. }));
        match files.max_by_key(|(_, found)| found.allocated).filter(|(_, found)| found.size >= BLOCK) {
            Some((path, found)) => self.open_found(path, found, false),
            None => Ok(None),
        }
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
        self.collect(last);
        let fresh = tree::scan(self.root.as_fd(), &self.tree)?;
        self.mapped.extend(mapped);
        let mut seen = BTreeSet::new();
        let mut written = BTreeSet::new();
        for (path, found) in &fresh {
            let Kind::File { inode } = found.kind else { continue };
            if !seen.insert(inode) {
                continue;
            }
            let part = self.part(inode, found, last);
            if part != Part::Nothing {
                self.copy(path, found, Moment { since, last }, part, frames)?;
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
        self.told.clear();
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

    /// Takes in what the log tells; `all` as in [`WriteLog::take`].
    fn collect(&mut self, all: bool) {
        let Some(log) = &mut self.log else { return };
        let Some(more) = log.take(all) else {
            tracing::debug!("more was written than can be followed: files are read whole");
            self.log = None;
            return;
        };
        for (inode, more) in more {
            if more.whole {
                self.unfollowable.insert(inode);
            }
            let touched = self.told.entry(inode).or_default();
            touched.whole |= more.whole;
            touched.blocks.extend(more.blocks);
        }
    }

    /// What of a file may be another than at its last copy.
    fn part(&self, inode: u64, found: &Found, last: bool) -> Part {
        let none = Touched::default();
        let touched = self.log.is_some().then(|| self.told.get(&inode).unwrap_or(&none));
        let Some(known) = self.files.get(&inode).filter(|_| !(self.silent && last)) else { return Part::All };
        let same_contents = (known.modified, known.size) == (found.attributes.modified, found.size);
        let same_times = same_contents && known.changed == found.changed;
        match touched.filter(|touched| known.followed && !touched.whole) {
            // It changed in a way that nobody knows.
            Some(touched) if touched.blocks.is_empty() && !same_contents => Part::All,
            Some(touched) if touched.blocks.is_empty() => Part::Nothing,
            Some(touched) => Part::Blocks(touched.blocks.clone()),
            None if touched.is_some_and(|touched| touched.whole) => Part::All,
            None if same_times && !known.unsure && !self.mapped.contains(&inode) => Part::Nothing,
            None => Part::All,
        }
    }

    /// Opens a file that the walk has found; `None` if it is another one by now.
    fn open_found(&self, path: &[u8], found: &Found, last: bool) -> Result<Option<File>, VolumeError> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME;
        let file = match tree::open_below(self.root.as_fd(), path, flags) {
            // Removed or replaced since the walk.
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) if !last => return Ok(None),
            opened => opened.map_err(VolumeError::io("opening", path))?,
        };
        let stat = rustix::fs::fstat(&file).map_err(VolumeError::io("looking at", path))?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        Ok((regular && stat.st_ino == found.inode).then_some(File::from(file)))
    }

    /// Sends the blocks of a file that are others than at its last copy. `part`: those that may be.
    fn copy(
        &mut self,
        path: &[u8],
        found: &Found,
        Moment { since, last }: Moment,
        part: Part,
        frames: &mut Frames<'_>,
    ) -> Result<(), VolumeError> {
        let failed = || VolumeError::io::<std::io::Error>("reading", path);
        let inode = found.inode;
        let Some(file) = self.open_found(path, found, last)? else {
            if last {
                return Err(VolumeError::unsupported(path, "it was changed from outside of the instance"));
            }
            // Its name is sent all the same: the next pass tells what became of it.
            match self.files.entry(inode) {
                Entry::Vacant(unknown) => {
                    unknown.insert(Known { unsure: true, ..Known::default() });
                    frames.put(&Record::File { inode, size: 0 })?;
                }
                // What the log has told of it is forgotten.
                Entry::Occupied(mut known) => {
                    known.get_mut().unsure = true;
                    known.get_mut().followed = false;
                }
            }
            return Ok(());
        };
        let mut known = self.files.remove(&inode).unwrap_or_default();
        let may_follow = self.log.is_some() && !self.unfollowable.contains(&inode) && !last;
        // Whoever writes from here on is told of.
        known.followed = may_follow && self.write_back(&file, frames)?;
        let stat = rustix::fs::fstat(&file).map_err(VolumeError::io("looking at", path))?;
        let size = stat.st_size as u64;
        let changed = (stat.st_ctime, stat.st_ctime_nsec as u32);
        if last && (changed, size) != (found.changed, found.size) {
            return Err(VolumeError::unsupported(path, "it is written from outside of the instance"));
        }
        frames.put(&Record::File { inode, size })?;
        let part = match part {
            Part::Blocks(mut blocks) => {
                // Where it ended and where it ends.
                let (shorter, longer) = (known.size.min(size), known.size.max(size));
                if shorter < longer {
                    blocks.extend(shorter / BLOCK..longer.div_ceil(BLOCK));
                }
                Some(blocks)
            }
            Part::All | Part::Nothing => None,
        };
        let data = match &part {
            Some(blocks) => file::data_of(&file, blocks.iter().map(|number| blocks::range(*number, size))),
            None => file::data(&file),
        };
        let data = data.map_err(failed())?;
        // Those that are holes now, unless they are found below.
        let mut before = match &part {
            Some(blocks) => {
                let taken = blocks.iter().filter_map(|number| Some((*number, known.blocks.remove(number)?)));
                taken.collect()
            }
            None => std::mem::take(&mut known.blocks),
        };
        let mut contents = Vec::new();
        for number in blocks::with_data(&data, size) {
            blocks::read(&file, number, size, &mut contents).map_err(failed())?;
            let range = blocks::range(number, size);
            let inside =
                |part: &Range<u64>| (part.start - range.start) as usize..(part.end - range.start) as usize;
            let holes = blocks::holes(&range, &data);
            for hole in &holes {
                // What was written there since is not sent: it must not count as sent, either.
                contents[inside(hole)].fill(0);
            }
            let hash = blocks::hash(&contents);
            let earlier = before.remove(&number);
            // In the freeze it would have to wait for the disk.
            let may_share = !last && holes.is_empty() && range.end - range.start == BLOCK;
            if earlier != Some(hash) && !(may_share && frames.share(inode, &file, number, hash)?) {
                for hole in holes.iter().filter(|_| earlier.is_some()) {
                    let (offset, length) = (hole.start, hole.end - hole.start);
                    frames.put(&Record::Hole { inode, offset, length })?;
                }
                for part in blocks::holes(&range, &holes) {
                    frames.put_data(inode, part.start, &contents[inside(&part)])?;
                }
            }
            known.blocks.insert(number, hash);
            frames.say_alive()?;
        }
        for number in before.into_keys() {
            let range = blocks::range(number, size);
            if range.start < size {
                let (offset, length) = (range.start, range.end - range.start);
                frames.put(&Record::Hole { inode, offset, length })?;
            }
        }
        known.changed = changed;
        known.modified = (stat.st_mtime, stat.st_mtime_nsec as u32);
        known.size = size;
        known.unsure = changed.0 >= since;
        self.files.insert(inode, known);
        Ok(())
    }

    /// Has what was written to a file written back, so that later writes are told of. Says whether they will be.
    fn write_back(&self, file: &File, frames: &mut Frames<'_>) -> Result<bool, VolumeError> {
        // Those are cheaper to read than to follow.
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        if size <= BLOCK || !file::is_plain(file) {
            return Ok(false);
        }
        for start in (0..size).step_by(WRITE_BACK_BYTES as usize) {
            // What can't be written back stays dirty, and is not told of again.
            if file::write_back(file, start, WRITE_BACK_BYTES).is_err() {
                return Ok(false);
            }
            frames.say_alive()?;
        }
        Ok(true)
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
