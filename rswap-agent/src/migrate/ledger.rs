//! The destination's journals, as one place where each migration's fate is decided once.
//!
//! A commit that arrives on one connection and a question that arrives on another must not both find the
//! state `Prepared`: whichever comes first writes its answer down, and the other finds it.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rswap_trust::Name;
use serde::Deserialize;

use super::{
    MigrateError,
    journal::{self, Entry, Journal, MigrationId},
    rules::{self, DestinationState, Fate},
};

/// How often a disk that takes no word is tried again.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_secs(1);

/// The destination's journals in one directory; one per agent.
#[derive(Debug)]
pub struct Ledger {
    directory: PathBuf,
    /// Held for every change. Those that were committed and don't run yet: they may not be forgotten.
    pending: Mutex<BTreeSet<MigrationId>>,
}

impl Ledger {
    /// The journals in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, pending: Mutex::default() }
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes down that something of `id` is about to be built here.
    pub fn prepare(&self, id: MigrationId, particulars: &[u8]) -> Result<(), MigrateError> {
        let _alone = self.alone();
        if self.entry(id)?.is_some() {
            let problem = format!("migration {id} has been offered before");
            return Err(MigrateError::Protocol { doing: "offering", problem });
        }
        Journal::begin(&self.directory, id, DestinationState::Prepared, particulars).map(drop)
    }

    /// Takes the commit, if nobody has been told that it never will be.
    pub fn commit(&self, id: MigrationId) -> Result<bool, MigrateError> {
        let mut pending = self.alone();
        let state = self.entry(id)?.map(|entry| entry.state);
        if !rules::may_activate(state) {
            return Ok(false);
        }
        if let Err(error) = self.write(id, DestinationState::Activated) {
            // What the disk holds now is not known: nobody gets an answer before it says that it never will run.
            while let Err(again) = self.write(id, DestinationState::Never) {
                tracing::error!(error = %again, "a commit can neither be written down nor called off: trying again");
                std::thread::sleep(RETRY_AFTER);
            }
            return Err(error);
        }
        pending.insert(id);
        Ok(true)
    }

    /// What was committed can't be let run for the moment.
    pub fn postpone(&self, id: MigrationId) {
        self.alone().insert(id);
    }

    /// What was committed runs.
    pub fn activated(&self, id: MigrationId) {
        self.alone().remove(&id);
    }

    /// Writes down that it never will run here, unless it was committed.
    pub fn never(&self, id: MigrationId) -> Result<(), MigrateError> {
        self.inquire(id).map(drop)
    }

    /// What became of `id`. After the answer `Never` it stays so.
    pub fn inquire(&self, id: MigrationId) -> Result<Fate, MigrateError> {
        let _alone = self.alone();
        self.fate(id, self.entry(id)?)
    }

    /// [`Ledger::inquire`] for the peer that has this name, if the link says one.
    ///
    /// # Errors
    /// It is somebody else's.
    pub fn inquire_for(&self, id: MigrationId, peer: Option<&Name>) -> Result<Fate, MigrateError> {
        let _alone = self.alone();
        let entry = self.entry(id)?;
        require_own(id, entry.as_ref(), peer)?;
        self.fate(id, entry)
    }

    fn fate(&self, id: MigrationId, entry: Option<Entry<DestinationState>>) -> Result<Fate, MigrateError> {
        let started_anew = match &entry {
            Some(entry) => entry.started_anew().map_err(self.failed(id))?,
            None => false,
        };
        let state = entry.map(|entry| entry.state);
        let (after, fate) = rules::on_inquiry(state, started_anew);
        if let Some(after) = after.filter(|_| after != state) {
            self.write(id, after)?;
        }
        Ok(fate)
    }

    /// Forgets `id`: nothing of it is in doubt at the source, or nothing that it could rely on was said to it.
    ///
    /// # Errors
    /// It was committed and does not run yet: without the journal nobody would let it after a crash.
    pub fn settle(&self, id: MigrationId) -> Result<(), MigrateError> {
        self.forget(&self.alone(), id)
    }

    /// [`Ledger::settle`] for the peer that has this name, if the link says one.
    ///
    /// # Errors
    /// Also: it is somebody else's.
    pub fn settle_for(&self, id: MigrationId, peer: Option<&Name>) -> Result<(), MigrateError> {
        let pending = self.alone();
        require_own(id, self.entry(id)?.as_ref(), peer)?;
        self.forget(&pending, id)
    }

    fn forget(&self, pending: &BTreeSet<MigrationId>, id: MigrationId) -> Result<(), MigrateError> {
        if pending.contains(&id) {
            let problem = format!("migration {id} is still being let run here: ask again");
            return Err(MigrateError::Protocol { doing: "settling", problem });
        }
        match std::fs::remove_file(self.file(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed(id)(error)),
            _ => Ok(()),
        }
    }

    /// All of them, each with its file.
    pub fn list(&self) -> io::Result<Vec<Entry<DestinationState>>> {
        let _alone = self.alone();
        Ok(journal::list(&self.directory)?.into_iter().map(|(_, entry)| entry).collect())
    }

    fn alone(&self) -> MutexGuard<'_, BTreeSet<MigrationId>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, id: MigrationId) -> Result<Option<Entry<DestinationState>>, MigrateError> {
        journal::look(&self.directory, id).map_err(self.failed(id))
    }

    fn write(&self, id: MigrationId, state: DestinationState) -> Result<(), MigrateError> {
        match Journal::claim(&self.file(id)).map_err(self.failed(id))? {
            Some((mut journal, _)) => journal.record(state),
            None => Err(self.failed(id)(io::Error::other("another agent has this journal"))),
        }
    }

    fn file(&self, id: MigrationId) -> PathBuf {
        journal::path::<DestinationState>(&self.directory, id)
    }

    fn failed(&self, id: MigrationId) -> impl FnOnce(io::Error) -> MigrateError + use<> {
        let path = self.file(id).display().to_string();
        move |source| MigrateError::Journal { path, source }
    }
}

/// What is kept of the other end.
#[derive(Deserialize)]
struct Between {
    #[serde(default)]
    peer_name: Option<Name>,
}

/// Whether `peer` is the other end of the migration. Of a journal that names nobody (the link was in the clear) anybody may speak, and
/// of what is not known here there is nothing to tell.
fn require_own(
    id: MigrationId,
    entry: Option<&Entry<DestinationState>>,
    peer: Option<&Name>,
) -> Result<(), MigrateError> {
    let Some(entry) = entry else { return Ok(()) };
    let broken = |problem: String| MigrateError::Protocol { doing: "answering", problem };
    let Between { peer_name } = serde_json::from_slice(&entry.particulars)
        .map_err(|error| broken(format!("the journal of migration {id} can't be understood: {error}")))?;
    if peer_name.is_none() || peer_name.as_ref() == peer {
        return Ok(());
    }
    let who = peer.map_or("somebody whom the link does not name", Name::as_str);
    Err(broken(format!("migration {id} is between this host and another one: {who} is told nothing of it")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::journal::tests::start_anew;

    fn ledger() -> (tempfile::TempDir, Ledger) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let ledger = Ledger::new(directory.path().to_owned());
        (directory, ledger)
    }

    #[test]
    fn a_commit_that_comes_after_the_answer_never_is_refused() {
        let (_directory, ledger) = ledger();
        let id = MigrationId(1);
        ledger.prepare(id, b"{}").expect("prepare");
        assert_eq!(ledger.inquire(id).expect("inquire"), Fate::Never);
        assert!(
            !ledger.commit(id).expect("commit"),
            "it was taken after the source was told that it never will be"
        );
        assert_eq!(ledger.inquire(id).expect("inquire"), Fate::Never);
    }

    #[test]
    fn nobody_but_the_other_end_is_told_anything_or_has_it_forgotten() {
        let (_directory, ledger) = ledger();
        let name = |name: &str| name.parse::<Name>().expect("a name");
        let (source, other) = (name("a"), name("b"));
        let (named, open, unknown) = (MigrationId(4), MigrationId(5), MigrationId(6));
        ledger.prepare(named, br#"{ "peer_name": "a" }"#).expect("prepare");
        ledger.prepare(open, b"{}").expect("prepare");
        for stranger in [Some(&other), None] {
            let error = ledger.inquire_for(named, stranger).expect_err("it was told").to_string();
            assert!(error.contains("is between this host and another one"), "{error}");
            assert!(ledger.settle_for(named, stranger).is_err(), "it was forgotten");
            assert_eq!(ledger.inquire_for(unknown, stranger).expect("nothing is known"), Fate::Unknown);
        }
        // Nor was it called off by the question.
        assert!(ledger.commit(named).expect("commit"));
        ledger.activated(named);
        assert_eq!(ledger.inquire_for(named, Some(&source)).expect("its source"), Fate::Running);
        ledger.settle_for(named, Some(&source)).expect("its source");
        assert_eq!(ledger.inquire_for(named, Some(&source)).expect("its source"), Fate::Unknown);
        // A link in the clear says nobody's name.
        assert_eq!(ledger.inquire_for(open, Some(&other)).expect("anybody"), Fate::Never);
        std::fs::write(ledger.file(open), [b' '; 4096]).expect("write");
        assert!(ledger.inquire_for(open, Some(&source)).is_err(), "a journal that can't be read");
    }

    #[test]
    fn what_ran_before_the_host_was_started_anew_is_lost() {
        let (_directory, ledger) = ledger();
        let id = MigrationId(3);
        ledger.prepare(id, b"{}").expect("prepare");
        assert!(ledger.commit(id).expect("commit"));
        ledger.activated(id);
        assert_eq!(ledger.inquire(id).expect("inquire"), Fate::Running);
        start_anew(&ledger.file(id));
        assert_eq!(ledger.inquire(id).expect("inquire"), Fate::Lost, "the source must keep its copy");
    }

    #[test]
    fn a_commit_is_taken_once_and_then_it_runs() {
        let (_directory, ledger) = ledger();
        let id = MigrationId(2);
        ledger.prepare(id, b"{}").expect("prepare");
        assert!(ledger.prepare(id, b"{}").is_err(), "offered twice");
        assert!(ledger.commit(id).expect("commit"));
        assert!(!ledger.commit(id).expect("commit"));
        ledger.never(id).expect("never");
        assert_eq!(ledger.inquire(id).expect("inquire"), Fate::Running);
        assert!(ledger.settle(id).is_err(), "it does not run yet: a crash now would leave it standing still");
        ledger.activated(id);
        ledger.settle(id).expect("settle");
        ledger.settle(id).expect("settling twice");
        assert_eq!(ledger.inquire(id).expect("inquire"), Fate::Unknown);
        assert!(!ledger.commit(id).expect("commit"), "nothing of it is known");
    }
}
