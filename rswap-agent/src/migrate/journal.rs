//! What a migration has come to, on disk: one small file each, written through before the next step.
//!
//! The file is made, with its directory entry, before anything is frozen. A new state is written over the old one
//! in place: one sector, without a change of size, so that it needs no transaction of the file system in the freeze.
//! What doesn't change (which instance, which peer) follows that sector, and is opaque here.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    MigrateError,
    rules::{DestinationState, SourceState},
};

/// The record is filled up to this length, in bytes: one sector, which a disk writes whole or not at all.
const RECORD_BYTES: usize = 512;
/// Longest file that is read: what is longer is none of ours.
const FILE_LIMIT: u64 = 8 << 20;

/// Writes what a file holds through to the disk. A rename or a crash after it finds all of it; a directory's file holds names.
type Through = fn(&File) -> io::Result<()>;

/// A migration's name: random, the same at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MigrationId(pub u128);

impl MigrationId {
    /// A new one.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(u128::from_le_bytes(bytes)))
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for MigrationId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(Self)
    }
}

/// The states of one side's journal.
pub trait Stage: Copy + PartialEq + fmt::Debug + Serialize + DeserializeOwned {
    /// How this side's files end.
    const EXTENSION: &'static str;
}

impl Stage for SourceState {
    const EXTENSION: &'static str = "source";
}

impl Stage for DestinationState {
    const EXTENSION: &'static str = "destination";
}

/// The sector that changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record<S> {
    state: S,
    /// The kernel's run in which it was begun: processes of an earlier one are gone.
    boot_id: String,
}

impl<S: Stage> Record<S> {
    fn to_sector(&self) -> io::Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self)?;
        text.resize(RECORD_BYTES - 1, b' ');
        text.push(b'\n');
        Ok(text)
    }
}

/// The journal of one migration at one side. Whoever holds it has it alone: the file is locked.
#[derive(Debug)]
pub struct Journal<S> {
    path: PathBuf,
    id: MigrationId,
    record: Record<S>,
    file: File,
    finished: bool,
    through: Through,
}

impl<S: Stage> Journal<S> {
    /// Opens a journal for a new migration, with what has to be known of it after a crash.
    pub fn begin(
        directory: &Path,
        id: MigrationId,
        state: S,
        particulars: &[u8],
    ) -> Result<Self, MigrateError> {
        Self::begin_through(directory, id, state, particulars, File::sync_data)
    }

    fn begin_through(
        directory: &Path,
        id: MigrationId,
        state: S,
        particulars: &[u8],
        through: Through,
    ) -> Result<Self, MigrateError> {
        let path = path::<S>(directory, id);
        let make = || -> io::Result<(File, Record<S>)> {
            fs::create_dir_all(directory)?;
            let record = Record { state, boot_id: boot_id()? };
            let temporary = path.with_extension(format!("{}.new", S::EXTENSION));
            let mut file = File::options().read(true).write(true).create_new(true).open(&temporary)?;
            file.try_lock()?;
            file.write_all(&record.to_sector()?)?;
            file.write_all(particulars)?;
            through(&file)?;
            fs::rename(&temporary, &path)?;
            through(&File::open(directory)?)?;
            Ok((file, record))
        };
        let (file, record) = make().map_err(failed(&path))?;
        Ok(Self { path, id, record, file, finished: false, through })
    }

    /// Takes over the journal in `path`, and reads the particulars; `None` when somebody has it.
    pub fn claim(path: &Path) -> io::Result<Option<(Self, Vec<u8>)>> {
        let file = File::options().read(true).write(true).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        let Entry { id, state, boot_id, particulars } = read_entry(path, &file)?;
        let record = Record { state, boot_id };
        let path = path.to_owned();
        Ok(Some((Self { path, id, record, file, finished: false, through: File::sync_data }, particulars)))
    }

    /// Which migration.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// What it says.
    pub fn state(&self) -> S {
        self.record.state
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether [`Journal::finish`] was called.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Writes the state through to the disk.
    pub fn record(&mut self, state: S) -> Result<(), MigrateError> {
        let record = Record { state, boot_id: self.record.boot_id.clone() };
        let write = || self.file.write_all_at(&record.to_sector()?, 0);
        write().and_then(|()| (self.through)(&self.file)).map_err(failed(&self.path))?;
        self.record = record;
        Ok(())
    }

    /// Both sides know how it ended.
    pub fn finish(&mut self) {
        self.finished = true;
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a finished journal could not be removed");
        }
    }
}

/// What a journal says, to be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<S> {
    /// Which migration.
    pub id: MigrationId,
    /// How far it came.
    pub state: S,
    /// The kernel's run in which it was begun.
    pub boot_id: String,
    /// What was given to [`Journal::begin`].
    pub particulars: Vec<u8>,
}

impl<S> Entry<S> {
    /// Whether the host was started anew since.
    pub fn started_anew(&self) -> io::Result<bool> {
        Ok(self.boot_id != boot_id()?)
    }
}

fn read_entry<S: Stage>(path: &Path, file: &File) -> io::Result<Entry<S>> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let id = name.parse().map_err(|_| io::Error::other(format!("{name:?} is no migration's name")))?;
    let mut bytes = Vec::new();
    file.take(FILE_LIMIT).read_to_end(&mut bytes)?;
    let (record, particulars) =
        bytes.split_at_checked(RECORD_BYTES).ok_or_else(|| io::Error::other("a journal that is cut off"))?;
    let Record { state, boot_id } = serde_json::from_slice(record)?;
    Ok(Entry { id, state, boot_id, particulars: particulars.to_vec() })
}

/// What the journal in `path` says.
pub fn read<S: Stage>(path: &Path) -> io::Result<Entry<S>> {
    read_entry(path, &File::open(path)?)
}

/// What the journal of `id` says, if there is one.
pub fn look<S: Stage>(directory: &Path, id: MigrationId) -> io::Result<Option<Entry<S>>> {
    let path = path::<S>(directory, id);
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        file => read_entry(&path, &file?).map(Some),
    }
}

/// The journals of one side, those that can't be read left out (and logged): each with its file.
pub fn list<S: Stage>(directory: &Path) -> io::Result<Vec<(PathBuf, Entry<S>)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != S::EXTENSION) {
            continue;
        }
        match File::open(&path).and_then(|file| read_entry(&path, &file)) {
            Ok(entry) => found.push((path, entry)),
            // Finished since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(path = %path.display(), %error, "a journal can't be read"),
        }
    }
    found.sort_by_key(|(_, entry)| entry.id);
    Ok(found)
}

/// Where the journal of `id` is.
pub fn path<S: Stage>(directory: &Path, id: MigrationId) -> PathBuf {
    directory.join(format!("{id}.{}", S::EXTENSION))
}

/// The running kernel's identity.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> MigrateError {
    let path = path.display().to_string();
    move |source| MigrateError::Journal { path, source }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::RefCell;

    use super::*;
    use SourceState::{Begun, Committed, Ended};

    /// Makes a journal look as if its host was started anew since.
    pub(in crate::migrate) fn start_anew(path: &Path) {
        let bytes = fs::read(path).expect("readable");
        let here = boot_id().expect("a boot id");
        let at =
            bytes.windows(here.len()).position(|part| part == here.as_bytes()).expect("it names the boot");
        let mut bytes = bytes;
        bytes[at..at + here.len()].fill(b'0');
        fs::write(path, bytes).expect("writable");
    }

    #[test]
    fn a_crash_leaves_the_last_state_and_the_particulars() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let id = MigrationId::random().expect("an id");
        let mut journal = Journal::begin(directory.path(), id, Begun, b"redis").expect("begin");
        journal.record(Committed).expect("record");
        let (path, entry) = list::<SourceState>(directory.path()).expect("list").remove(0);
        assert_eq!((entry.id, entry.state, entry.particulars.as_slice()), (id, Committed, &b"redis"[..]));
        assert!(!entry.started_anew().expect("a boot id"));
        assert!(Journal::<SourceState>::claim(&path).expect("claim").is_none(), "it is held");
        drop(journal);
        let (mut journal, particulars) = Journal::claim(&path).expect("claim").expect("nobody holds it");
        assert_eq!((journal.state(), particulars.as_slice()), (Committed, &b"redis"[..]));
        journal.record(Ended).expect("record");
        assert_eq!(look::<SourceState>(directory.path(), id).expect("look").expect("it").state, Ended);
        start_anew(&path);
        let entry = look::<SourceState>(directory.path(), id).expect("look").expect("it");
        assert!(entry.started_anew().expect("a boot id"));
        journal.finish();
        assert_eq!(list::<SourceState>(directory.path()).expect("list"), []);
    }

    #[test]
    fn nothing_goes_on_before_it_is_on_the_disk() {
        thread_local! {
            static WRITTEN_THROUGH: RefCell<Vec<(bool, u64)>> = const { RefCell::new(Vec::new()) };
        }
        fn noted(file: &File) -> io::Result<()> {
            let about = file.metadata()?;
            WRITTEN_THROUGH.with_borrow_mut(|all| all.push((about.is_dir(), about.len())));
            file.sync_data()
        }
        let written = || WRITTEN_THROUGH.with_borrow_mut(std::mem::take).into_iter();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let id = MigrationId(8);
        let mut journal =
            Journal::begin_through(directory.path(), id, Begun, b"redis", noted).expect("begin");
        // The file with all that is in it, and then its name.
        let whole = (RECORD_BYTES + b"redis".len()) as u64;
        let begun: Vec<_> = written().collect();
        assert!(matches!(begun.as_slice(), [(false, bytes), (true, _)] if *bytes == whole), "{begun:?}");
        journal.record(Committed).expect("record");
        assert!(written().eq([(false, whole)]));
        journal.through = |_| Err(io::Error::other("the disk is gone"));
        assert!(journal.record(Ended).is_err() && journal.state() == Committed);
    }

    #[test]
    fn the_sides_and_strange_files_are_kept_apart() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let id = MigrationId(7);
        let _source = Journal::begin(directory.path(), id, Begun, b"").expect("begin");
        let _destination =
            Journal::begin(directory.path(), id, DestinationState::Prepared, b"").expect("begin");
        fs::write(directory.path().join("x.source"), b"nonsense").expect("write");
        fs::write(directory.path().join(format!("{:032x}.source", 8)), b"cut off").expect("write");
        assert_eq!(list::<SourceState>(directory.path()).expect("list").len(), 1);
        assert_eq!(list::<DestinationState>(directory.path()).expect("list").len(), 1);
        assert!(Journal::begin(directory.path(), MigrationId(9), Begun, b"").is_ok());
    }
}
