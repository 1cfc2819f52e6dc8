//! Both ends of a migration on this host: over TCP, with real instances.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use rswap_trust::Name;

use super::{
    MigrateError, Progress, Report, TaskError,
    destination::{self, Opening},
    guard::Guard,
    journal::{self, Journal, MigrationId},
    ledger::Ledger,
    link::{Link, SILENCE},
    links::Links,
    linux_destination::{LinuxDestination, Reception},
    linux_source::{LinuxSource, Uplink},
    meeting::{Departing, Meeting},
    offer::{FileDigests, Objection, Requirements, available_memory_bytes},
    probe,
    recovery::{self, Particulars, Recovery},
    rules::{DestinationState, SourceState},
    source,
    volumes::SourceVolumes,
};
use crate::{
    config::MigrateConfig,
    instance::{
        Instance, InstanceError,
        affinity::{Choices, Processors},
        arrival::{self, Arrival},
        cgroup,
        launch::Place,
        network::Port,
        registry::Registry,
    },
    swap::storage,
    sys::{clock::Clocks, packet::Holder},
    tracee::{
        cgroups,
        files::Places,
        mounts::{self, Memory},
        tree,
    },
    volume::place,
};

/// Part of the memory that is available that copies of sent pages may take: what is migrated may be what fills the host.
const CACHE_PART: u64 = 4;
/// How long the destination may take to look through what an instance needs.
const PROBING: Duration = Duration::from_secs(60);

/// How long the agent at the source asks by itself what became of a commit before it reports a doubt: a peer that was
/// only cut off answers at once.
const ASK_AT_ONCE: Duration = Duration::from_secs(5);

/// Moves `instance` from `recovery`'s place to the agent at `host`, which has to be `whose` if that is known. Blocks; the thread must live until it returns.
///
/// # Errors
/// As [`source::run`]: with any error but [`MigrateError::InDoubt`] the instance runs here as before.
pub fn send(
    recovery: &Recovery,
    instance: &Instance,
    host: SocketAddr,
    whose: Option<&Name>,
    config: &MigrateConfig,
    on_progress: &mut dyn FnMut(&Progress),
) -> Result<Report, MigrateError> {
    let failed = |source| MigrateError::Task { doing: "looking at the instance", source };
    let link = |source| MigrateError::Link { doing: "connecting to the destination", source };
    let (place, journals) = (&recovery.place, recovery.directory());
    recovery::refuse_if_in_doubt(journals, &instance.name)?;
    if let Some(reason) = storage::frozen(&place.state_dir, instance) {
        // No call can be made in it, and it would arrive running.
        return Err(failed(reason.into()));
    }
    let uplink = HostPort { port: port(place, instance), held: None };
    let end = recovery.end_of(instance.clone());
    let (places, volumes) = files_of(place, instance).map_err(failed)?;
    let chosen = chosen(place, instance).map_err(|error| failed(error.into()))?;
    let mut task =
        LinuxSource::new(instance.clone(), uplink, places, chosen, volumes, end).map_err(failed)?;
    let deadline = Instant::now() + Duration::from_secs(config.deadline_s);
    let links = &recovery.links;
    let until = deadline.min(Instant::now() + SILENCE);
    let (mut stream, peer) = links.dial(host, whose, until).map_err(link)?;
    stream.set_deadline(deadline);
    let particulars = Particulars {
        instance: instance.clone(),
        peer: Some(host),
        peer_name: peer.clone(),
        volumes: Vec::new(),
    };
    let particulars = particulars.to_bytes().map_err(failed)?;
    let id = MigrationId::random()
        .map_err(|source| MigrateError::Journal { path: "/dev/urandom".into(), source })?;
    tracing::info!(%id, instance = %instance.name, %host, "migrating");
    let path = journal::path::<SourceState>(journals, id);
    task.guard_by(Guard::start(place, instance, path, config.freeze_limit()).map_err(failed)?);
    let mut journal = Journal::begin(journals, id, SourceState::Begun, &particulars)?;
    let mut ask = |id| recovery::ask_within(links, host, peer.as_ref(), id, ASK_AT_ONCE);
    let cache_bytes = config.cache_bytes.or_else(|| Some(available_memory_bytes().ok()? / CACHE_PART));
    let config = &MigrateConfig { cache_bytes, ..config.clone() };
    let stream = Departing::new(stream, links, (host, peer.clone()), config.streams, deadline);
    source::run(stream, &mut task, config, &mut journal, &mut ask, on_progress)
}

/// Who calls, and the other migrations that arrive here, of which this may be a lane.
#[derive(Debug)]
pub struct Caller {
    /// The connection.
    pub link: Link,
    /// Who it is, as its certificate says.
    pub peer: Option<Name>,
    /// What arrives here.
    pub meeting: Meeting,
}

/// Serves the agent that called: takes the instance that it offers, makes the connection a lane, or answers its question. Blocks.
///
/// `place_for` is asked for a place among the arrivals when an instance is offered; `arrived` is told when it runs.
pub fn receive<P>(
    place: &Place,
    ledger: &Ledger,
    Caller { mut link, peer, meeting }: Caller,
    deadline_s: u64,
    place_for: impl FnOnce() -> Option<P>,
    arrived: &mut dyn FnMut(&Instance),
) -> Result<(), MigrateError> {
    link.set_deadline(Instant::now() + PROBING);
    let mut task = LinuxDestination::new(HostReception { place: place.clone(), arrived }, peer.clone());
    let (id, requirements) = match destination::greet(&mut link, &mut task, ledger, peer.as_ref()) {
        Ok(Opening::Offer { id, requirements }) => (id, requirements),
        Ok(Opening::Join { id, number }) => {
            let welcome = |link: &mut Link| destination::welcome(link, id);
            return meeting.join(id, number, peer.as_ref(), link, welcome).map_err(|(mut link, error)| {
                destination::turn_away(&mut link, &error.to_string());
                link.linger();
                error
            });
        }
        Ok(Opening::Answered) => return Ok(()),
        Err(error) => {
            link.linger();
            return Err(error);
        }
    };
    let Some(_place) = place_for() else {
        destination::turn_away(&mut link, "too many migrations arrive here at the moment: try again");
        link.linger();
        return Err(MigrateError::Peer { doing: "offering", reason: "turned away: too many arrive".into() });
    };
    let deadline = Instant::now() + Duration::from_secs(deadline_s) + SILENCE;
    link.set_deadline(deadline);
    let mut stream = meeting.arriving(id, link, peer, deadline);
    destination::run(&mut stream, &mut task, ledger, id, &requirements).inspect_err(|_| stream.linger())
}

/// Which processors the threads of an instance chose, if it was moved between sets of cores.
fn chosen(place: &Place, instance: &Instance) -> Result<Option<(Choices, Processors)>, InstanceError> {
    let choices = Registry::open(&place.state_dir)?.choices(instance)?;
    choices.map(|choices| Ok((choices, Processors::of_host()?))).transpose()
}

/// The port of `instance`, if it has one, on the bridge that it is on.
pub fn port(place: &Place, instance: &Instance) -> Option<Port> {
    match (&instance.network, &place.bridge, instance.init_pid) {
        (Some(identity), Some(bridge), Some(init)) => {
            let port = Port::new(&instance.name, bridge, identity, init);
            Some(if instance.uplink.is_some() { port.where_it_is() } else { port })
        }
        _ => None,
    }
}

/// Where the files of `instance` are, and those that go along.
fn files_of(place: &Place, instance: &Instance) -> Result<(Places, SourceVolumes), TaskError> {
    let mounts = mounts::survey(instance)?.mounts;
    let places = place.places_of(instance, &mounts);
    Ok((places, SourceVolumes::open(place, instance, mounts)?))
}

/// What the agent at `host` would refuse of `instance`. Nothing is made there, and nothing is touched here.
pub fn ask(
    place: &Place,
    links: &Links,
    instance: &Instance,
    host: SocketAddr,
) -> Result<Vec<Objection>, MigrateError> {
    let failed = |source| MigrateError::Task { doing: "looking at the instance", source };
    let link = |source| MigrateError::Link { doing: "connecting to the destination", source };
    let members = tree::members(instance).map_err(|error| failed(error.into()))?;
    let living: Vec<_> = members.into_iter().filter(|member| member.node.status.is_none()).collect();
    let (places, volumes) = files_of(place, instance).map_err(failed)?;
    let mut digests = FileDigests::new(places);
    let requirements = Requirements::of(instance, &living, &mut digests, &volumes).map_err(failed)?;
    let requirements = postcard::to_stdvec(&requirements).map_err(|error| failed(error.into()))?;
    let (stream, _) = links.dial(host, None, Instant::now() + PROBING).map_err(link)?;
    probe::ask(stream, &requirements)
}

/// Removes what an agent that was killed has left of volumes. What a committed arrival may need stays.
pub fn sweep_volumes(place: &Place, ledger: &Ledger) {
    let left = ledger.list().unwrap_or_default();
    if !left.iter().any(|entry| entry.state == DestinationState::Activated) {
        place::sweep(&place.volumes);
    }
}

/// An instance's port, and what came for the instance since the port was closed.
struct HostPort {
    port: Option<Port>,
    held: Option<Holder>,
}

impl Uplink for HostPort {
    fn prepare(&mut self) {
        // Without it the senders have to repeat what they sent, no more.
        let warn =
            |error: &dyn std::fmt::Display| tracing::warn!(%error, "what comes in the freeze is not held");
        self.held = self.port.as_ref().and_then(|port| port.hold().inspect_err(|error| warn(error)).ok());
    }

    fn detach(&mut self) -> Result<(), TaskError> {
        let Some(port) = &self.port else { return Ok(()) };
        if let Some(held) = &self.held {
            // What came while the instance still ran has reached it.
            held.forget()?;
        }
        Ok(port.detach()?)
    }

    fn attach(&mut self) -> Result<(), TaskError> {
        Ok(self.port.as_ref().map_or(Ok(()), Port::attach)?)
    }

    fn pass_on(&mut self) {
        let Some(held) = self.held.take() else { return };
        match held.pass_on() {
            Ok(frames) => tracing::debug!(frames, "passed on what came in the freeze"),
            Err(error) => tracing::warn!(%error, "what came in the freeze could not be passed on"),
        }
    }
}

struct HostReception<'a> {
    place: Place,
    arrived: &'a mut dyn FnMut(&Instance),
}

impl Reception for HostReception<'_> {
    fn objections(&self, requirements: &Requirements) -> Result<Vec<Objection>, TaskError> {
        let found = arrival::objections(&self.place, &requirements.instance)?;
        let mut found: Vec<_> =
            found.into_iter().map(|(item, reason)| Objection::new(item, reason)).collect();
        let (bytes, inodes) = requirements.volumes;
        let (free_bytes, free_inodes) = place::room(&self.place.volumes)?;
        if bytes > free_bytes || inodes > free_inodes {
            let text = format!(
                "{bytes} bytes and {inodes} inodes are needed, {free_bytes} and {free_inodes} are free"
            );
            let directory = self.place.volumes.display();
            found.push(Objection::new("volumes", format!("no room: {text} at {directory}")));
        }
        let mount = cgroup::mount_point()?;
        let lacking =
            cgroups::lacking(&mount, &mount.join(&self.place.cgroup_parent), &requirements.controllers);
        found.extend(lacking.into_iter().map(|(item, reason)| Objection::new(item, reason)));
        Ok(found)
    }

    fn receive(
        &mut self,
        instance: &Instance,
        memories: &[Memory],
        inner_pid: i32,
        offsets: Option<Clocks>,
    ) -> Result<Arrival, TaskError> {
        Ok(Arrival::receive(&self.place, instance, memories, inner_pid, offsets)?)
    }

    fn arrived(&mut self, instance: &Instance) {
        (self.arrived)(instance);
    }
}
