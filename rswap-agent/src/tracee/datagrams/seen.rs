//! Queues that were looked at, by their sockets' cookies, in files: an agent that is started anew knows of them.
//!
//! A file says that a socket is being looked at before it is. If the agent is killed in between, nobody knows what it has seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::Datagram;

/// Queues that are kept at most: those of the oldest sockets are forgotten first.
const KEPT: usize = 10_000;
/// What the name of a file ends with that says that a socket is being looked at.
const LOOKING: &str = "looking";

/// A queue with an empty datagram in it, as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Seen {
    pub(super) queue: Vec<Datagram>,
    /// Memory that the kernel counts for it, in bytes.
    pub(super) memory_bytes: u32,
}

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Store {
    directory: Option<PathBuf>,
    seen: BTreeMap<u64, Seen>,
    /// Of these nobody knows what was seen.
    unknown: BTreeSet<u64>,
}

impl Store {
    pub(super) const fn new() -> Self {
        Self { directory: None, seen: BTreeMap::new(), unknown: BTreeSet::new() }
    }

    /// Keeps it in `directory` from here on, where what earlier agents knew is. Cookies are a running kernel's own: what is of
    /// another one, which `boot` tells apart, is removed.
    pub(super) fn open(directory: &Path, boot: &str) -> io::Result<Self> {
        let ours = directory.join(boot);
        fs::create_dir_all(&ours)?;
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path != ours {
                fs::remove_dir_all(path)?;
            }
        }
        let mut store = Self { directory: Some(ours.clone()), ..Self::new() };
        for entry in fs::read_dir(&ours)? {
            let path = entry?.path();
            let cookie = path.file_stem().and_then(|name| u64::from_str_radix(name.to_str()?, 16).ok());
            let Some(cookie) = cookie else { continue };
            if path.extension().is_some_and(|extension| extension == LOOKING) {
                store.unknown.insert(cookie);
            } else if let Ok(seen) = postcard::from_bytes(&fs::read(&path)?) {
                store.seen.insert(cookie, seen);
            } else {
                store.unknown.insert(cookie);
            }
        }
        Ok(store)
    }

    /// The socket is about to be looked at. `None`: nobody knows what was seen of it before.
    pub(super) fn begin(&mut self, cookie: u64) -> io::Result<Option<Option<Seen>>> {
        if self.unknown.contains(&cookie) {
            return Ok(None);
        }
        if let Some(path) = self.path(cookie) {
            fs::write(path.with_extension(LOOKING), [])?;
        }
        self.unknown.insert(cookie);
        Ok(Some(self.seen.get(&cookie).cloned()))
    }

    /// It was looked at, and this is to be kept of it.
    pub(super) fn finish(&mut self, cookie: u64, seen: Option<Seen>) -> io::Result<()> {
        if let Some(seen) = &seen
            && let Some(path) = self.path(cookie)
        {
            let bytes = postcard::to_stdvec(seen).map_err(io::Error::other)?;
            let temporary = path.with_extension("new");
            fs::write(&temporary, bytes)?;
            fs::rename(&temporary, &path)?;
        }
        match seen {
            Some(seen) => drop(self.seen.insert(cookie, seen)),
            None => self.forget(cookie)?,
        }
        if let Some(oldest) = self.seen.keys().next().copied().filter(|_| self.seen.len() > KEPT) {
            self.forget(oldest)?;
        }
        self.unknown.remove(&cookie);
        self.path(cookie).map_or(Ok(()), |path| remove(&path.with_extension(LOOKING)))
    }

    /// Nothing waits in it.
    pub(super) fn is_empty_now(&mut self, cookie: u64) -> io::Result<()> {
        if self.seen.contains_key(&cookie) || self.unknown.contains(&cookie) {
            self.finish(cookie, None)?;
        }
        Ok(())
    }

    fn forget(&mut self, cookie: u64) -> io::Result<()> {
        match self.seen.remove(&cookie) {
            Some(_) => self.path(cookie).map_or(Ok(()), |path| remove(&path)),
            None => Ok(()),
        }
    }

    fn path(&self, cookie: u64) -> Option<PathBuf> {
        self.directory.as_ref().map(|directory| directory.join(format!("{cookie:016x}")))
    }
}

/// That it is gone already is no error.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_knows_what_the_one_before_it_has_seen() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let open = || Store::open(directory.path(), "this").expect("open");
        let seen = Seen { queue: Vec::new(), memory_bytes: 7 };
        let mut store = open();
        assert_eq!(store.begin(1).expect("begin"), Some(None));
        store.finish(1, Some(seen.clone())).expect("finish");
        assert_eq!(store.begin(2).expect("begin"), Some(None));

        // It was killed while it looked at the second one.
        let mut store = open();
        assert_eq!(store.begin(1).expect("begin"), Some(Some(seen.clone())));
        store.finish(1, Some(seen)).expect("finish");
        assert_eq!(store.begin(2).expect("begin"), None);
        store.is_empty_now(2).expect("nothing waits");
        store.is_empty_now(1).expect("nothing waits");

        let mut store = open();
        assert_eq!(
            (store.begin(1).expect("begin"), store.begin(2).expect("begin")),
            (Some(None), Some(None))
        );

        let mut store = Store::open(directory.path(), "another").expect("open");
        assert_eq!(store.begin(2).expect("begin"), Some(None), "cookies of another kernel mean nothing");
        assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 1);
    }
}
