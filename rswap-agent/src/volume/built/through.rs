//! Writing a copy through to its disk: what was changed in it, and nothing of what others write to the same file system.
//!
//! syncfs(2) writes and waits for everything that anybody has written there. Beside a program that fills the page cache this takes as long
//! as the disk takes for that program's data, in the freeze as well. So each file and directory is synced by itself, unless there are
//! so many, or such, that only syncfs(2) will do.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{FileType, OFlags},
    io::Errno,
};

use super::super::{
    VolumeError,
    tree::{self, Name},
};

/// Above so many names the file system is synced as a whole: each fsync(2) may make the disk empty its cache.
const EACH: usize = 1000;
/// Calls of fsync(2) at the same time: those that wait for one commit of the journal, or for one emptying of the disk's cache, share it.
const AT_ONCE: usize = 8;

/// What of a copy may not be on the disk yet.
#[derive(Debug, Default)]
pub struct Unsynced {
    names: BTreeSet<Name>,
    /// There were too many to remember.
    many: bool,
}

impl Unsynced {
    /// What has this name has changed. Of a file whose contents are written its attributes are set afterwards, so that it is enough to
    /// tell of those.
    pub(super) fn note(&mut self, path: &[u8]) {
        if self.many {
            return;
        }
        self.names.insert(path.to_vec());
        if self.names.len() > EACH {
            self.names.clear();
            self.many = true;
        }
    }

    /// A name has come or gone.
    pub(super) fn note_entry(&mut self, path: &[u8]) {
        let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        self.note(&path[..end]);
    }

    /// All of it, below `root`, and the directories `above` it are on the disk when this returns.
    pub fn write_through(self, root: &OwnedFd, above: Vec<OwnedFd>) -> Result<(), VolumeError> {
        if self.many {
            return whole(root);
        }
        let Some(mut opened) = self.open(root)? else { return whole(root) };
        opened.extend(above.into_iter().map(|directory| (b"..".to_vec(), directory)));
        let next = AtomicUsize::new(0);
        let sync = || {
            while let Some((path, file)) = opened.get(next.fetch_add(1, Ordering::Relaxed)) {
                rustix::fs::fsync(file).map_err(VolumeError::io("syncing", path))?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..AT_ONCE.min(opened.len())).map(|_| scope.spawn(sync)).collect();
            let own = sync();
            let joined = others
                .into_iter()
                .map(|other| other.join().unwrap_or(Err(VolumeError::Damaged("syncing panicked"))));
            // All of them are waited for.
            joined.fold(own, Result::and)
        })
    }

    /// All that is still there, each file once; `None` if there is something that can't be synced by itself: a link, a FIFO, a socket.
    fn open(self, root: &OwnedFd) -> Result<Option<Vec<(Name, OwnedFd)>>, VolumeError> {
        let mut seen = BTreeSet::new();
        let mut opened = Vec::new();
        for path in self.names {
            let failed = || VolumeError::io("opening", &path);
            let found = match tree::open_below(root.as_fd(), &path, OFlags::PATH) {
                // It went again.
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                found => found.map_err(failed())?,
            };
            let stat = rustix::fs::fstat(&found).map_err(failed())?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if !matches!(kind, FileType::RegularFile | FileType::Directory) {
                return Ok(None);
            }
            if seen.insert(stat.st_ino) {
                let file = tree::open_below(root.as_fd(), &path, OFlags::RDONLY).map_err(failed())?;
                opened.push((path, file));
            }
        }
        Ok(Some(opened))
    }
}

/// All that anybody has written to the file system of `root` is on the disk when this returns.
fn whole(root: &OwnedFd) -> Result<(), VolumeError> {
    rustix::fs::syncfs(root).map_err(VolumeError::io("writing through", b""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let root = rustix::fs::open(directory.path(), flags, rustix::fs::Mode::empty()).expect("open");
        (directory, root)
    }

    #[test]
    fn files_and_directories_are_synced_once_and_what_went_is_left_out() {
        let (directory, root) = root();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir(at("base")).expect("make");
        std::fs::write(at("base/table"), "contents").expect("write");
        std::fs::hard_link(at("base/table"), at("linked")).expect("link");
        let mut unsynced = Unsynced::default();
        for name in ["base/table", "linked", "gone", "base/table/below"] {
            unsynced.note(name.as_bytes());
            unsynced.note_entry(name.as_bytes());
        }
        let opened = unsynced.open(&root).expect("open").expect("each can be synced");
        let names: Vec<_> = opened.iter().map(|(name, _)| String::from_utf8_lossy(name)).collect();
        assert_eq!(names, ["", "base", "base/table"]);
    }

    #[test]
    fn links_and_very_many_names_take_the_whole_file_system() {
        let (directory, root) = root();
        std::os::unix::fs::symlink("nowhere", directory.path().join("link")).expect("link");
        let mut unsynced = Unsynced::default();
        unsynced.note(b"link");
        assert!(unsynced.open(&root).expect("look").is_none());
        let mut unsynced = Unsynced::default();
        for number in 0..=EACH {
            unsynced.note(number.to_string().as_bytes());
        }
        assert!(unsynced.many && unsynced.names.is_empty());
        unsynced.write_through(&root, Vec::new()).expect("sync");
    }
}
