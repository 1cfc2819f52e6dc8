//! A volume's copy: made in passes while the instance runs, completed while it stands still.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{StorageError, pace::Pace, room::Room};
use crate::{
    instance::{Instance, volume::Volume},
    profile::written::Watched,
    tracee::{layout, tree},
    volume::{
        VolumeError,
        built::{BuiltVolume, Unsynced},
        place,
        record::{self, Frames},
        source::SourceVolume,
    },
};

/// Further passes that may be no faster than the fastest before.
const PATIENCE: u32 = 5;
/// A pass is made once more, though it was short enough, as long as each is shorter than the one before by a quarter, and none as short as
/// this: what the instance waits for is as long as the last one.
const SHORT: Duration = Duration::from_millis(8);

/// What is known of a copy on its way.
pub(super) struct Copy {
    pub(super) source: SourceVolume,
    pub(super) built: BuiltVolume,
    room: Room,
    pub(super) passes: u32,
    pub(super) bytes: u64,
    pub(super) shared_bytes: u64,
    /// Bytes of the volume and of the copy that were read again.
    pub(super) compared_bytes: u64,
    /// Begins to watch what is written.
    log: Option<JoinHandle<Result<Watched, String>>>,
}

/// What of a complete copy may not be on the disk yet.
pub(super) struct Unwritten {
    root: OwnedFd,
    unsynced: Unsynced,
    above: Vec<OwnedFd>,
}

impl Unwritten {
    /// It is on the disk when this returns.
    pub(super) fn write_through(self) -> Result<(), VolumeError> {
        self.unsynced.write_through(&self.root, self.above)
    }
}

impl Copy {
    /// Begins one of the volume in `from`, in `built`; there must be room.
    pub(super) fn begin(from: &Path, built: &Path) -> Result<Self, StorageError> {
        let pool = built.parent().unwrap_or(built);
        let source = SourceVolume::open(from)?;
        let followed = from.to_owned();
        let log = Some(thread::spawn(move || Watched::start(&followed)));
        let built = BuiltVolume::make(built)?;
        let room = Room::require(&source, &built, pool)?;
        Ok(Self { source, built, room, passes: 0, bytes: 0, shared_bytes: 0, compared_bytes: 0, log })
    }

    /// Passes, until one was short enough for the freeze.
    pub(super) fn run(
        &mut self,
        instance: &Instance,
        volume: &Volume,
        allowed: Duration,
        deadline: Instant,
        on_pass: &mut dyn FnMut(u32, u64, Duration),
    ) -> Result<(), StorageError> {
        let mut pace = Pace::of(&instance.cgroup);
        match self.log.take().map(JoinHandle::join) {
            Some(Ok(Ok(log))) => self.source.follow(Box::new(log)),
            Some(Ok(Err(reason))) => tracing::info!(%reason, "files that change are read whole"),
            Some(Err(_)) => tracing::warn!("what is written can't be watched: its thread panicked"),
            None => {}
        }
        let mut fastest: Option<Duration> = None;
        let mut fruitless = 0;
        let mut before: Option<Duration> = None;
        // Of the beginning, or of the comparison.
        let mut since = 0;
        let mut compared = false;
        loop {
            let began = Instant::now();
            let pids = tree::listed(instance)?;
            self.pass(false, volume, &pids, &mut || keep(&mut pace, deadline))?;
            let took = began.elapsed().saturating_sub(pace.take_waited());
            on_pass(self.passes, self.bytes, took);
            since += 1;
            let shrinks = took > SHORT && before.is_some_and(|before| took < before * 3 / 4);
            before = Some(took);
            let faster = fastest.is_none_or(|fastest| took < fastest * 9 / 10);
            fruitless = if faster { 0 } else { fruitless + 1 };
            fastest = Some(fastest.map_or(took, |fastest| fastest.min(took)));
            let is_over = fruitless >= PATIENCE;
            if took <= allowed && since > 1 && (!compared || !shrinks || is_over) {
                if compared {
                    return Ok(());
                }
                // What is written meanwhile is for further passes.
                let mut mapped = || mapped(volume, &tree::listed(instance).unwrap_or_default());
                self.compare(&mut mapped, &mut || keep(&mut pace, deadline).map_err(VolumeError::Send))?;
                pace.take_waited();
                (compared, since, fastest, fruitless, before) = (true, 0, None, 0, None);
                continue;
            }
            if is_over {
                return Err(StorageError::TooFast {
                    passes: self.passes,
                    expected_ms: took.as_secs_f64() * 1e3,
                    allowed_ms: allowed.as_secs_f64() * 1e3,
                });
            }
        }
    }

    /// Compares the copy, as its disk has it, and the volume, as programs see it, with what was copied. `mapped` tells which files processes
    /// map for writing now.
    fn compare(
        &mut self,
        mapped: &mut dyn FnMut() -> BTreeSet<u64>,
        on_block: &mut dyn FnMut() -> Result<(), VolumeError>,
    ) -> Result<(), StorageError> {
        let began = Instant::now();
        let room = &self.room;
        let mut on_block = || {
            room.keep(0)?;
            on_block()
        };
        let there = self.built.compare(&mut on_block)?;
        let here = self.source.compare(mapped, &mut on_block)?;
        self.compared_bytes += there + here;
        let ms = began.elapsed().as_secs_f64() * 1e3;
        tracing::info!(here, there, ms, "a volume and its copy were compared");
        Ok(())
    }

    /// What is left; the instance stands still. The copy is put to `place`, and nothing of it is on the disk for certain. It ends early when it is
    /// `given_up`: the instance goes on then, and writes.
    pub(super) fn complete(
        &mut self,
        volume: &Volume,
        pids: &[i32],
        place: &Path,
        given_up: &AtomicBool,
    ) -> Result<Unwritten, StorageError> {
        let is_wanted = || match given_up.load(Ordering::Acquire) {
            true => Err(VolumeError::Send("nobody waits for it any more".into())),
            false => Ok(()),
        };
        self.built.defer();
        self.pass(true, volume, pids, &mut || is_wanted().map_err(Into::into))?;
        self.built.finish()?;
        let (root, unsynced) = (self.built.handle()?, self.built.take_unsynced());
        is_wanted()?;
        self.built.put(place)?;
        Ok(Unwritten { root, unsynced, above: place::above(place)? })
    }

    /// Compares both, when it is complete.
    pub(super) fn digest(&self) -> Result<u128, StorageError> {
        let (here, there) = (self.source.digest(), self.built.digest()?);
        if here == there { Ok(here) } else { Err(StorageError::Digest { here, there }) }
    }

    fn pass(
        &mut self,
        last: bool,
        volume: &Volume,
        pids: &[i32],
        on_frame: &mut dyn FnMut() -> Result<(), Box<dyn std::error::Error + Send + Sync>>,
    ) -> Result<(), StorageError> {
        let mapped = mapped(volume, pids);
        // Both write to it, one after the other.
        let built = RefCell::new(&mut self.built);
        let on_frame = RefCell::new(on_frame);
        let room = &self.room;
        let mut send = |frame: &[u8]| {
            let (_, records) = record::parse(frame)?;
            records.into_iter().try_for_each(|record| built.borrow_mut().take(record))?;
            room.keep(frame.len() as u64)?;
            (*on_frame.borrow_mut())()
        };
        let mut share = |inode, file: &File, number, hash| {
            let shared = built.borrow_mut().share(inode, file, number, hash)?;
            room.keep(0)?;
            (*on_frame.borrow_mut())().map_err(VolumeError::Send)?;
            Ok(shared)
        };
        let mut frames = Frames::unpacked(&mut send).with_sharer(&mut share);
        self.source.pass(last, &mapped, &mut frames)?;
        self.bytes += frames.contents_bytes;
        self.shared_bytes += frames.shared_bytes;
        self.passes += 1;
        Ok(())
    }
}

/// Called between blocks: waits if the instance does.
fn keep(pace: &mut Pace, deadline: Instant) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    pace.keep();
    if Instant::now() > deadline { Err("it takes too long".into()) } else { Ok(()) }
}

/// The files of the volume that processes map for writing: their times need not change.
fn mapped(volume: &Volume, pids: &[i32]) -> BTreeSet<u64> {
    // One that has ended maps nothing any more.
    let all = pids.iter().flat_map(|pid| layout::read_mappings(*pid).unwrap_or_default());
    all.filter(|mapping| {
        mapping.shared && mapping.is_file() && Path::new(&mapping.name).starts_with(&volume.path)
    })
    .map(|mapping| mapping.inode)
    .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A copy of a volume with one file, after a pass; in `arriving` of the directory.
    fn copied() -> (tempfile::TempDir, Volume, Copy) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let from = directory.path().join("from");
        fs::create_dir(&from).expect("make");
        fs::write(from.join("file"), vec![7; 300_000]).expect("write");
        let source = SourceVolume::open(&from).expect("open");
        let built = BuiltVolume::make(&directory.path().join("arriving")).expect("make");
        let room = Room::require(&source, &built, directory.path()).expect("room");
        let mut copy =
            Copy { source, built, room, passes: 0, bytes: 0, shared_bytes: 0, compared_bytes: 0, log: None };
        let volume = "data:/data".parse().expect("a volume");
        copy.pass(false, &volume, &[], &mut || Ok(())).expect("a pass");
        (directory, volume, copy)
    }

    #[test]
    fn room_is_watched_while_both_copies_are_compared() {
        let (directory, _, mut copy) = copied();
        let compare = |copy: &mut Copy| copy.compare(&mut BTreeSet::new, &mut || Ok(()));
        compare(&mut copy).expect("there is room");
        assert!(copy.compared_bytes >= 300_000);
        copy.room = Room::with_floor(directory.path(), u64::MAX);
        let ended = compare(&mut copy);
        assert!(matches!(ended, Err(StorageError::Volume(VolumeError::NoRoomLeft { .. }))), "{ended:?}");
    }

    #[test]
    fn one_whose_last_pass_failed_is_removed_when_its_owner_wants_it() {
        let (directory, volume, mut copy) = copied();
        // Where a directory is needed there is a file.
        let place = directory.path().join("from/file/place");
        let failed = copy.complete(&volume, &[], &place, &AtomicBool::new(false)).err();
        assert!(matches!(failed, Some(StorageError::Volume(VolumeError::Io { .. }))), "{failed:?}");
        assert!(directory.path().join("arriving/tree/file").exists(), "whoever waits for it stands still");
        drop(copy);
        assert!(!directory.path().join("arriving").exists());
    }

    #[test]
    fn one_that_nobody_waits_for_comes_to_no_place() {
        let (directory, volume, mut copy) = copied();
        let place = directory.path().join("place");
        let failed = copy.complete(&volume, &[], &place, &AtomicBool::new(true)).err();
        assert!(matches!(failed, Some(StorageError::Volume(VolumeError::Send(_)))), "{failed:?}");
        assert!(!place.exists());
    }
}
