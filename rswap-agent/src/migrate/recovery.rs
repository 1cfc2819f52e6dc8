//! What follows a crash: the journals are read, and what they owe is done, again and again until it is.
//!
//! At the source a migration that was not committed goes on here; of one that was, the destination is asked, and
//! whoever can't get an answer leaves the instance frozen for a person to decide. At the destination what was not
//! committed is removed, and what was is let run. The decisions are in [`rules`](super::rules); here they are
//! carried out, each step so that it can be done twice.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rswap_trust::Name;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    MigrateError, TaskError, guard,
    journal::{self, Entry, Journal, MigrationId},
    ledger::Ledger,
    link::Link,
    links::Links,
    linux,
    resolve::Inquiry,
    rules::{self, Arrears, DestinationState, Duty, Fate, SourceState, Verdict},
    volumes,
};
use crate::{
    instance::{
        Instance, InstanceName, arrival, cgroup,
        launch::{self, Place},
        registry::Registry,
    },
    tracee::{leftovers, settle, tree},
};

/// One conversation of questions may take so long.
const CONVERSATION: Duration = Duration::from_secs(5);
/// Between the first two tries at a peer that doesn't answer; doubled with each.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Between two tries at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What a journal keeps of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Particulars {
    /// The instance on this host.
    pub instance: Instance,
    /// Where it goes to, in the source's journal.
    pub peer: Option<SocketAddr>,
    /// Who is at the other end, by its certificate: at the source nobody else is asked, at the destination nobody else is answered.
    /// Not known of links in the clear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_name: Option<Name>,
    /// Where its volumes were built and where they go, in the destination's.
    #[serde(default)]
    pub volumes: Vec<(PathBuf, PathBuf)>,
}

impl Particulars {
    /// For the journal.
    pub fn to_bytes(&self) -> Result<Vec<u8>, TaskError> {
        Ok(serde_json::to_vec(self)?)
    }

    /// From the journal.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TaskError> {
        Ok(serde_json::from_slice(bytes)?)
    }
}

/// A migration away from here whose end only the destination knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// Which migration.
    pub id: MigrationId,
    /// The instance, frozen here.
    pub instance: Instance,
    /// Who knows.
    pub peer: Option<SocketAddr>,
}

/// The migrations away from here that are committed, by their journals: those under way, and those in doubt.
pub fn doubts(journals: &Path) -> io::Result<Vec<Doubt>> {
    let committed = journal::list::<SourceState>(journals)?;
    let committed = committed.into_iter().filter(|(_, entry)| entry.state == SourceState::Committed);
    let mut doubts = Vec::new();
    for (path, entry) in committed {
        match Particulars::from_bytes(&entry.particulars) {
            Ok(Particulars { instance, peer, .. }) => doubts.push(Doubt { id: entry.id, instance, peer }),
            Err(error) => tracing::error!(path = %path.display(), %error, "a journal can't be understood"),
        }
    }
    Ok(doubts)
}

/// A second migration of an instance in doubt could let it go on here while it runs elsewhere.
pub fn refuse_if_in_doubt(journals: &Path, name: &InstanceName) -> Result<(), MigrateError> {
    let failed = |source| MigrateError::Journal { path: journals.display().to_string(), source };
    match doubts(journals).map_err(failed)?.iter().find(|doubt| doubt.instance.name == *name) {
        None => Ok(()),
        Some(doubt) => Err(failed(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!(
                "{name} was committed to another host, and its end is not known: `rswap recover {name}`; {}",
                doubt.id
            ),
        ))),
    }
}

/// Asks the agent at `peer` what became of `id`, again and again, `limit` at most.
pub fn ask_within(
    links: &Links,
    peer: SocketAddr,
    name: Option<&Name>,
    id: MigrationId,
    limit: Duration,
) -> Result<Fate, MigrateError> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(50);
    loop {
        match converse(links, peer, name, |inquiry| inquiry.fate(id)) {
            Err(error) if Instant::now() + pause < deadline => {
                tracing::debug!(%id, %error, "asked in vain");
                std::thread::sleep(pause);
                pause = (pause * 2).min(FIRST_PAUSE);
            }
            answered => return answered,
        }
    }
}

fn converse<T>(
    links: &Links,
    peer: SocketAddr,
    name: Option<&Name>,
    talk: impl FnOnce(&mut Inquiry<Link>) -> Result<T, MigrateError>,
) -> Result<T, MigrateError> {
    let link = |source| MigrateError::Link { doing: "connecting to the destination", source };
    let (stream, _) = links.dial(peer, name, Instant::now() + CONVERSATION).map_err(link)?;
    talk(&mut Inquiry::begin(stream)?)
}

/// A person's decision about an instance in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = RecoveryDecision)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// The copy here is the instance: it goes on.
    Here,
    /// The copy at the destination is: the one here is removed.
    There,
}

/// Does what the journals of a host owe.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// Where the host's instances are.
    pub place: Place,
    /// How other hosts are spoken to.
    pub links: Links,
    directory: PathBuf,
    /// Arrivals that were committed and could not be let run yet.
    owed: Vec<Entry<DestinationState>>,
    /// When each journal is tried again, and the pause after that.
    again: BTreeMap<MigrationId, (Instant, Duration)>,
}

impl Recovery {
    /// For `place`, by the journals in `directory`.
    pub fn new(place: Place, links: Links, directory: PathBuf) -> Self {
        Self { place, links, directory, owed: Vec::new(), again: BTreeMap::new() }
    }

    /// Where the journals are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Before anything else happens on this host: what needs nobody's answer.
    pub fn at_start(&mut self, ledger: &Ledger) {
        // One that is slow could let go what this agent freezes.
        guard::end_all(&self.place);
        match ledger.list() {
            Ok(entries) => entries.iter().for_each(|entry| self.arrears(entry, ledger)),
            Err(error) => {
                tracing::error!(path = %self.directory.display(), %error, "the journals can't be read");
            }
        }
        self.each_of_source(|recovery, journal, particulars| match rules::source_duty(journal.state()) {
            Duty::Thaw => recovery.go_on(journal, particulars),
            Duty::Ask | Duty::Tell => Ok(()),
        });
    }

    /// Tries whatever is due, once each.
    pub fn round(&mut self, ledger: &Ledger) {
        for entry in std::mem::take(&mut self.owed) {
            self.arrears(&entry, ledger);
        }
        self.each_of_source(|recovery, journal, particulars| {
            let id = journal.id();
            let now = Instant::now();
            let (due, pause) = recovery.again.get(&id).copied().unwrap_or((now, FIRST_PAUSE));
            if due > now {
                return Ok(());
            }
            let done = recovery.duty(journal, particulars);
            match journal.is_finished() {
                true => drop(recovery.again.remove(&id)),
                false => {
                    recovery.again.insert(id, (now + pause, (pause * 2).min(LONGEST_PAUSE)));
                }
            }
            done
        });
    }

    /// Carries out a person's decision about instance `name`.
    ///
    /// # Errors
    /// It is not in doubt, its journal is in use at this moment, or the decision could not be carried out.
    pub fn decide(&self, name: &InstanceName, decision: Decision) -> Result<(), TaskError> {
        let doubts = doubts(&self.directory)?;
        let doubt = doubts.iter().find(|doubt| doubt.instance.name == *name);
        let doubt = doubt.ok_or_else(|| format!("{name} is not in doubt"))?;
        let path = journal::path::<SourceState>(&self.directory, doubt.id);
        let held = Journal::<SourceState>::claim(&path)?;
        let (mut journal, _) =
            held.ok_or_else(|| format!("the agent is asking about {name} at this moment: try again"))?;
        tracing::warn!(id = %doubt.id, instance = %name, ?decision, "a person has decided");
        match decision {
            Decision::Here => thaw(&self.place, &doubt.instance)?,
            Decision::There => self.remove(&doubt.instance)?,
        }
        Ok(journal.record(SourceState::Ended)?)
    }

    /// What ends `instance` here for good.
    pub fn end_of(&self, instance: Instance) -> Box<dyn FnMut() -> Result<(), TaskError>> {
        let recovery = self.clone();
        Box::new(move || recovery.remove(&instance))
    }

    fn each_of_source(
        &mut self,
        mut work: impl FnMut(&mut Self, &mut Journal<SourceState>, &Particulars) -> Result<(), TaskError>,
    ) {
        let listed = journal::list::<SourceState>(&self.directory).unwrap_or_else(|error| {
            tracing::error!(path = %self.directory.display(), %error, "the journals can't be read");
            Vec::new()
        });
        for (path, _) in listed {
            // One that is held belongs to a migration that is under way.
            let claimed = match Journal::<SourceState>::claim(&path) {
                Ok(claimed) => claimed,
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a journal can't be taken over");
                    None
                }
            };
            let Some((mut journal, particulars)) = claimed else { continue };
            let done = Particulars::from_bytes(&particulars)
                .and_then(|particulars| work(self, &mut journal, &particulars));
            if let Err(error) = done {
                tracing::info!(id = %journal.id(), state = ?journal.state(), %error, "a migration's end is still open");
            }
        }
    }

    fn duty(&self, journal: &mut Journal<SourceState>, particulars: &Particulars) -> Result<(), TaskError> {
        let Particulars { instance, peer, peer_name, .. } = particulars;
        let id = journal.id();
        match rules::source_duty(journal.state()) {
            Duty::Thaw => self.go_on(journal, particulars),
            Duty::Ask => {
                let peer = peer.ok_or("the journal does not say whom to ask")?;
                let fate = converse(&self.links, peer, peer_name.as_ref(), |inquiry| inquiry.fate(id))?;
                tracing::warn!(%id, instance = %instance.name, ?fate, "the destination has answered");
                match rules::on_fate(fate) {
                    Verdict::Remove => self.remove(instance)?,
                    Verdict::Thaw => thaw(&self.place, instance)?,
                    Verdict::AskAPerson => {
                        let text = format!(
                            "the destination says {fate:?}: decide with `rswap recover {}`",
                            instance.name
                        );
                        return Err(text.into());
                    }
                }
                journal.record(SourceState::Ended)?;
                self.tell(journal, particulars)
            }
            Duty::Tell => self.tell(journal, particulars),
        }
    }

    fn tell(&self, journal: &mut Journal<SourceState>, particulars: &Particulars) -> Result<(), TaskError> {
        let id = journal.id();
        if let Some(peer) = particulars.peer {
            let name = particulars.peer_name.as_ref();
            converse(&self.links, peer, name, |inquiry| inquiry.settle(id))?;
        }
        journal.finish();
        Ok(())
    }

    /// Not committed: it runs here.
    fn go_on(&self, journal: &mut Journal<SourceState>, particulars: &Particulars) -> Result<(), TaskError> {
        let name = &particulars.instance.name;
        tracing::warn!(id = %journal.id(), instance = %name, "its migration was broken off: it goes on here");
        thaw(&self.place, &particulars.instance)?;
        self.clean(&particulars.instance);
        Ok(journal.record(SourceState::Ended)?)
    }

    /// Removes what an agent that was killed has left in the programs. What fails is left to the next migration.
    fn clean(&self, instance: &Instance) {
        if !instance.is_here().unwrap_or(false) {
            return;
        }
        for pid in tree::listed(instance).unwrap_or_default() {
            if let Err(error) = leftovers::remove(pid) {
                tracing::warn!(pid, %error, "what an earlier agent has left is still there");
            }
        }
    }

    /// Ends the instance at the source, for good. What was removed already, or is another one by now, is left alone.
    fn remove(&self, instance: &Instance) -> Result<(), TaskError> {
        if !instance.is_here()? {
            return Ok(());
        }
        // Before the processes end, so that a waiting `rswap run` knows why.
        launch::note_moved(&self.place.state_dir, &instance.name)?;
        Registry::open(&self.place.state_dir)?.remove(&instance.name)?;
        arrival::end(instance)?;
        volumes::remove(&self.place, instance);
        Ok(())
    }

    /// Does what a destination's journal owes.
    fn arrears(&mut self, entry: &Entry<DestinationState>, ledger: &Ledger) {
        let id = entry.id;
        let done = (|| -> Result<(), TaskError> {
            let particulars = Particulars::from_bytes(&entry.particulars)?;
            match rules::destination_arrears(entry.state, entry.started_anew()?) {
                Arrears::Discard => {
                    ledger.never(id)?;
                    discard(&particulars.instance)
                }
                Arrears::Activate => self.activate(&particulars),
                Arrears::Keep => Ok(()),
            }
        })();
        match done {
            Ok(()) => {
                ledger.activated(id);
                tracing::info!(%id, state = ?entry.state, "an earlier agent's arrival was brought to its end");
            }
            Err(error) => {
                tracing::error!(%id, state = ?entry.state, %error, "an arrival could not be brought to its end yet");
                ledger.postpone(id);
                self.owed.push(entry.clone());
            }
        }
    }

    /// Does again what activation does. One that runs, and one that has left since, is left alone.
    fn activate(&self, particulars: &Particulars) -> Result<(), TaskError> {
        let instance = &particulars.instance;
        if !instance.is_alive()? {
            return Ok(());
        }
        let leaves =
            doubts(&self.directory)?.iter().any(|doubt| doubt.instance.cgroup_id == instance.cgroup_id);
        if leaves {
            return Ok(());
        }
        if cgroup::try_is_frozen(&instance.cgroup)? {
            volumes::keep(&particulars.volumes)?;
            thaw(&self.place, instance)?;
        }
        let registry = Registry::open(&self.place.state_dir)?;
        match registry.get(&instance.name)? {
            Some(_) => Ok(()),
            None => Ok(registry.put(instance)?),
        }
    }
}

/// Removes what an agent that was killed has left of an arrival.
fn discard(instance: &Instance) -> Result<(), TaskError> {
    if !instance.is_here()? {
        return Ok(());
    }
    Ok(arrival::end(instance)?)
}

/// Lets `instance` go on here, whatever a migration has taken from it: its port, its connections, its threads.
pub fn thaw(place: &Place, instance: &Instance) -> Result<(), TaskError> {
    if !instance.is_alive()? {
        return Ok(());
    }
    // The port first: a connection that goes on asks its peer at once what it has. A failure must not keep the rest
    // from going on.
    let attached = linux::port(place, instance).map_or(Ok(()), |port| port.attach());
    for pid in tree::listed(instance)? {
        if let Err(error) = settle::recover(pid) {
            tracing::error!(pid, %error, "a process's connections could not be let go");
        }
    }
    cgroup::freeze(&instance.cgroup, false)?;
    Ok(attached?)
}
