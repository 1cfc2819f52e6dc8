//! What a migration has come to, on disk: one small file each, written through before the next step.
//!
//! The file is made, with its directory entry, before anything is frozen. A new state then is written over the old one
//! in place: one sector, without a change of size, so that it needs no transaction of the file system in the freeze.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::MigrateError;

/// Which side wrote the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The instance leaves.
    Source,
    /// The instance arrives.
    Destination,
}

/// How far it came. What follows a crash in each state is said with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Not committed: the source goes on, the destination forgets.
    Preparing,
    /// Committed: the source must not run again; the destination's copy is the instance.
    Committed,
}

/// One migration's entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Which side this is.
    pub role: Role,
    /// How far it came.
    pub state: State,
}

/// Every record is filled up to this length, in bytes: one sector, which a disk writes whole or not at all.
const RECORD_BYTES: usize = 512;

/// The journal of one migration; its file goes when it ends in an orderly way.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    role: Role,
    file: File,
}

impl Journal {
    /// Opens a journal for one migration, `name` among those of `directory`.
    pub fn begin(directory: &Path, name: &str, role: Role) -> Result<Self, MigrateError> {
        let side = match role {
            Role::Source => "source",
            Role::Destination => "destination",
        };
        let path = directory.join(format!("{name}.{side}.json"));
        let make = || -> io::Result<File> {
            fs::create_dir_all(directory)?;
            refuse_if_committed(&path)?;
            let temporary = path.with_extension("new");
            let mut file = File::create(&temporary)?;
            file.write_all(&Entry { role, state: State::Preparing }.record()?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(directory)?.sync_all()?;
            Ok(file)
        };
        let file = make().map_err(failed(&path))?;
        Ok(Self { path, role, file })
    }

    /// Writes the state through to the disk.
    pub fn record(&self, state: State) -> Result<(), MigrateError> {
        let write = || self.file.write_all_at(&Entry { role: self.role, state }.record()?, 0);
        write().and_then(|()| self.file.sync_data()).map_err(failed(&self.path))
    }

    /// The migration ended, one way or the other, and both sides know.
    pub fn finish(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a finished journal could not be removed");
        }
    }
}

impl Entry {
    fn record(&self) -> io::Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self)?;
        text.resize(RECORD_BYTES - 1, b' ');
        text.push(b'\n');
        Ok(text)
    }
}

/// Writing over a commit would forget that the instance may run at the other host, and the next
/// failure would let it go here as well: two copies.
fn refuse_if_committed(path: &Path) -> io::Result<()> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text?,
    };
    let entry: Entry = serde_json::from_slice(&text)?;
    if entry.state == State::Committed {
        let text = "an earlier migration was committed and its end is not known: make sure where the \
                    instance runs, then remove this file";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    Ok(())
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> MigrateError {
    let path = path.display().to_string();
    move |source| MigrateError::Journal { path, source }
}

/// The entries that a crash left behind, by file name.
pub fn left_over(directory: &Path) -> io::Result<Vec<(String, Entry)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.push((name, serde_json::from_slice(&fs::read(&path)?)?));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_in_doubt_is_not_written_over() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let begin = || Journal::begin(directory.path(), "redis", Role::Source);
        drop(begin().expect("begin"));
        // A crash before the commit is no obstacle.
        let journal = begin().expect("begin again");
        journal.record(State::Committed).expect("record");
        let refused = begin().expect_err("it is in doubt");
        assert!(matches!(refused, MigrateError::Journal { .. }), "{refused:?}");
        let entry = Entry { role: Role::Source, state: State::Committed };
        assert_eq!(
            left_over(directory.path()).expect("left over"),
            [("redis.source.json".to_owned(), entry)]
        );
        journal.finish();
        begin().expect("a settled migration is no obstacle");
    }

    #[test]
    fn a_crash_leaves_the_last_state() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let journal = Journal::begin(directory.path(), "redis", Role::Source).expect("begin");
        journal.record(State::Committed).expect("record");
        let entry = Entry { role: Role::Source, state: State::Committed };
        let found = left_over(directory.path()).expect("left over");
        assert_eq!(found, [("redis.source.json".to_owned(), entry)]);
        journal.finish();
        assert_eq!(left_over(directory.path()).expect("left over"), []);
    }
}
