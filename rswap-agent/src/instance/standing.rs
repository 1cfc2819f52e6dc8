//! Whether a living instance stands still: read of its cgroup's files when the kernel says that one of them has changed, and now and then.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};

use super::Instance;
use crate::kept_files::{Kept, Reader, has_gone};

/// So many times events are read in one look: whoever writes to the files without an end must not hold it up.
const MOST_READS: usize = 64;
/// After so many looks the files are read again even if nothing is said to have changed.
const READ_AFTER_LOOKS: u32 = 10;

/// Tells which cgroups' files may say something else than before: the kernel notifies of both, whoever writes `cgroup.freeze`.
#[derive(Debug)]
pub(super) struct Changes {
    /// Nothing, if this process has as many open as it may.
    inotify: Option<Inotify>,
    /// Whose file each watch is of, by the cgroup's id.
    watched: BTreeMap<WatchDescriptor, u64>,
}

impl Default for Changes {
    fn default() -> Self {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC);
        if let Err(error) = &inotify {
            tracing::debug!(%error, "no inotify: the files of each instance's cgroup are read in every window");
        }
        Self { inotify: inotify.ok(), watched: BTreeMap::new() }
    }
}

/// The cgroups of which something has changed.
#[derive(Debug, Default)]
pub(super) struct Changed {
    all: bool,
    cgroups: BTreeSet<u64>,
}

impl Changed {
    pub(super) fn contains(&self, cgroup_id: u64) -> bool {
        self.all || self.cgroups.contains(&cgroup_id)
    }
}

impl Changes {
    /// Those of which something has changed since this was called last.
    pub(super) fn take(&mut self) -> Changed {
        let mut changed = Changed::default();
        let Some(inotify) = &self.inotify else { return changed };
        for _ in 0..MOST_READS {
            match inotify.read_events() {
                Ok(events) => {
                    for event in events {
                        // There were more than the kernel keeps.
                        changed.all |= event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                        changed.cgroups.extend(self.watched.get(&event.wd));
                        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                            self.watched.remove(&event.wd);
                        }
                    }
                }
                Err(Errno::EAGAIN) => return changed,
                Err(_) => break,
            }
        }
        changed.all = true;
        changed
    }

    /// From now on tells of these files; `false`, if it can't.
    fn watch(&mut self, cgroup_id: u64, files: [&Path; 2]) -> bool {
        let Some(inotify) = &self.inotify else { return false };
        let added = files.map(|file| inotify.add_watch(file, AddWatchFlags::IN_MODIFY));
        let are_all = added.iter().all(Result::is_ok);
        self.watched.extend(added.into_iter().flatten().map(|watch| (watch, cgroup_id)));
        if !are_all {
            self.forget(cgroup_id);
        }
        are_all
    }

    /// Tells no more of this cgroup.
    pub(super) fn forget(&mut self, cgroup_id: u64) {
        let Some(inotify) = &self.inotify else { return };
        self.watched.retain(|watch, of| {
            if *of == cgroup_id {
                // The kernel has removed it already if the file has gone.
                let _gone = inotify.rm_watch(*watch);
            }
            *of != cgroup_id
        });
    }

    /// Tells no more of cgroups other than these.
    pub(super) fn retain(&mut self, cgroups: &BTreeSet<u64>) {
        let others: BTreeSet<u64> =
            self.watched.values().filter(|id| !cgroups.contains(id)).copied().collect();
        others.into_iter().for_each(|id| self.forget(id));
    }
}

/// The files of one instance's cgroup that say so.
#[derive(Debug)]
pub(super) struct Standing {
    events: Kept,
    freeze: Kept,
    is_watched: bool,
    /// What they said when they were read last; nothing, if that is to be read again.
    said: Option<bool>,
    looks_since: u32,
}

impl Standing {
    pub(super) fn new(instance: &Instance) -> Self {
        let file = |name: &str| Kept::new(instance.cgroup.join(name));
        Self {
            events: file("cgroup.events"),
            freeze: file("cgroup.freeze"),
            is_watched: false,
            said: None,
            looks_since: 0,
        }
    }

    /// Whether it is of the cgroup at the instance's path.
    pub(super) fn is_of(&self, instance: &Instance) -> bool {
        self.events.path().parent() == Some(&*instance.cgroup)
    }

    pub(super) fn open_files(&self) -> usize {
        usize::from(self.events.is_open()) + usize::from(self.freeze.is_open())
    }

    /// Nothing, if the instance is dead; else whether it stands still, or is about to ([`super::cgroup::stands_still`]).
    pub(super) fn look(
        &mut self,
        instance: &Instance,
        reader: &mut Reader,
        changes: &mut Changes,
        changed: &Changed,
    ) -> Option<bool> {
        let is_known = self.is_watched && self.looks_since < READ_AFTER_LOOKS;
        if let Some(said) = self.said
            && is_known
            && !changed.contains(instance.cgroup_id)
        {
            self.looks_since += 1;
            return Some(said);
        }
        // Before they are read: what changes behind that is told of. Only its own: at the path of one that has gone may be another's, whose watches these would become.
        if !self.is_watched && matches!(instance.is_here(), Ok(true)) {
            self.is_watched = changes.watch(instance.cgroup_id, [self.events.path(), self.freeze.path()]);
        }
        self.looks_since = 0;
        let (found, is_certain) = self.read(instance, reader)?;
        self.said = is_certain.then_some(found);
        Some(found)
    }

    /// Whether it stands still, and whether that could be read. Nothing, if the instance is dead.
    fn read(&mut self, instance: &Instance, reader: &mut Reader) -> Option<(bool, bool)> {
        let says = |text: &str| (text.contains("populated 1"), text.contains("frozen 1"));
        let mut is_certain = true;
        // An open file is of the very cgroup, whatever is at its path by now.
        let known = reader.read_open(&mut self.events).map(|text| says(&text));
        let (is_populated, is_frozen) = match known {
            Some(known) => known,
            None => {
                let read = match reader.read(&mut self.events) {
                    Ok(text) => says(&text),
                    Err(error) if has_gone(&error) => return None,
                    // It can't be read now: that is no reason to take it for dead.
                    Err(_) => {
                        is_certain = false;
                        (true, false)
                    }
                };
                // Looked at behind it: what was opened is its own then.
                let is_here = instance.is_here();
                if !matches!(is_here, Ok(true)) {
                    self.events.close();
                    is_certain = false;
                }
                if let Ok(false) = is_here {
                    return None;
                }
                read
            }
        };
        if !is_populated {
            return None;
        }
        // With a process in a wait that nothing ends, it is never said to be frozen.
        let is_to_be = is_frozen
            || match reader.read(&mut self.freeze) {
                Ok(word) => word.trim() == "1",
                Err(_) => {
                    is_certain = false;
                    false
                }
            };
        Some((is_to_be, is_certain))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;

    struct Looked {
        directory: tempfile::TempDir,
        instance: Instance,
        standing: Standing,
        reader: Reader,
        changes: Changes,
    }

    impl Looked {
        /// Files of the same names and contents as a cgroup's.
        fn at() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let instance = Instance {
                name: "a".parse().unwrap(),
                labels: Default::default(),
                cgroup: directory.path().to_owned(),
                cgroup_id: fs::metadata(directory.path()).unwrap().ino(),
                origin: crate::instance::Origin::Run,
                init_pid: None,
                command: vec!["true".into()],
                network: None,
                volumes: Vec::new(),
                pool: None,
                uplink: None,
                memory: None,
                since: Default::default(),
            };
            let standing = Standing::new(&instance);
            let new = Self {
                directory,
                instance,
                standing,
                reader: Reader::default(),
                changes: Changes::default(),
            };
            new.write("cgroup.events", "populated 1\nfrozen 0\n");
            new.write("cgroup.freeze", "0\n");
            new
        }

        fn write(&self, file: &str, text: &str) {
            // In place, as the kernel's files are.
            fs::write(self.directory.path().join(file), text).unwrap();
        }

        fn look(&mut self) -> Option<bool> {
            let Self { instance, standing, reader, changes, .. } = self;
            let changed = changes.take();
            standing.look(instance, reader, changes, &changed)
        }
    }

    #[test]
    fn what_changes_is_seen_at_the_next_look_and_what_does_not_is_not_read() {
        for is_watched in [true, false] {
            let mut looked = Looked::at();
            if !is_watched {
                looked.changes.inotify = None;
            } else if looked.changes.inotify.is_none() {
                eprintln!("not tested: there is no inotify");
                continue;
            }
            assert_eq!(looked.look(), Some(false));
            for (file, text, expected) in [
                ("cgroup.freeze", "1\n", Some(true)),
                ("cgroup.events", "populated 1\nfrozen 1\n", Some(true)),
                ("cgroup.freeze", "0\n", Some(true)),
                ("cgroup.events", "populated 1\nfrozen 0\n", Some(false)),
                ("cgroup.events", "populated 0\nfrozen 0\n", None),
                ("cgroup.events", "populated 1\nfrozen 0\n", Some(false)),
            ] {
                looked.write(file, text);
                assert_eq!(looked.look(), expected, "{file}: {text}");
                if expected.is_some() {
                    let read = |looked: &Looked| looked.standing.looks_since == 0;
                    assert!(read(&looked));
                    assert_eq!(looked.look(), expected);
                    assert_eq!(read(&looked), !is_watched, "{file}: {text}");
                }
            }
            for look in 1..=2 * READ_AFTER_LOOKS {
                assert_eq!(looked.look(), Some(false));
                assert!(looked.standing.looks_since <= READ_AFTER_LOOKS, "{look}");
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_read_again_and_what_has_gone_is_dead() {
        let mut looked = Looked::at();
        fs::remove_file(looked.directory.path().join("cgroup.freeze")).unwrap();
        assert_eq!(looked.look(), Some(false));
        looked.write("cgroup.freeze", "1\n");
        assert_eq!(looked.look(), Some(true));
        looked.instance.cgroup_id += 1;
        let another = looked.instance.clone();
        looked.standing = Standing::new(&another);
        assert_eq!(looked.look(), None);
    }

    #[test]
    fn one_that_is_forgotten_is_not_watched_any_more() {
        let mut looked = Looked::at();
        if looked.changes.inotify.is_none() {
            eprintln!("not tested: there is no inotify");
            return;
        }
        looked.look();
        assert_eq!(looked.changes.watched.len(), 2);
        // One that was at the same path before takes nothing away.
        let before = Instance { cgroup_id: looked.instance.cgroup_id + 1, ..looked.instance.clone() };
        let changed = looked.changes.take();
        let Looked { reader, changes, .. } = &mut looked;
        assert_eq!(Standing::new(&before).look(&before, reader, changes, &changed), None);
        changes.forget(before.cgroup_id);
        looked.write("cgroup.freeze", "1\n");
        assert_eq!(looked.look(), Some(true));
        let own = looked.instance.cgroup_id;
        looked.changes.retain(&BTreeSet::from([own]));
        assert_eq!(looked.changes.watched.len(), 2);
        looked.changes.retain(&BTreeSet::new());
        assert!(looked.changes.watched.is_empty());
        looked.write("cgroup.freeze", "1\n");
        assert!(!looked.changes.take().contains(own));
    }
}
