//! Both ends of a migration on this host: over TCP, with real instances.

use std::{
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use super::{
    MigrateError, Progress, Report, TaskError, destination,
    journal::{self, Entry, Role, State},
    linux_destination::{LinuxDestination, Reception},
    linux_source::{LinuxSource, Uplink},
    offer::{FileDigests, Objection, Requirements},
    probe, source,
    volumes::{self, SourceVolumes},
};
use crate::{
    config::MigrateConfig,
    instance::{
        Instance,
        arrival::{self, Arrival},
        launch::{self, Place},
        network::Port,
        registry::Registry,
    },
    sys::{clock::Clocks, packet::Holder},
    tracee::{settle, tree},
    volume::place,
};

/// A peer that says nothing for so long is taken for dead.
const SILENCE: Duration = Duration::from_secs(10);

/// Where the journals of this host's migrations are.
pub fn journals(place: &Place) -> PathBuf {
    place.state_dir.join("migrations")
}

/// Moves `instance` from `place` to the agent at `host`. Blocks; the thread must live until it returns.
///
/// # Errors
/// As [`source::run`]: with any error but [`MigrateError::InDoubt`] the instance runs here as before.
pub fn send(
    place: &Place,
    instance: &Instance,
    host: SocketAddr,
    config: &MigrateConfig,
    on_progress: &mut dyn FnMut(&Progress),
) -> Result<Report, MigrateError> {
    let failed = |source| MigrateError::Task { doing: "looking at the instance", source };
    let link = |source| MigrateError::Link { doing: "connecting to the destination", source };
    let port = match (&instance.network, &place.bridge, instance.init_pid) {
        (Some(identity), Some(bridge), Some(init)) => Some(Port::new(&instance.name, bridge, identity, init)),
        _ => None,
    };
    let uplink = HostPort { port, held: None };
    let end = end_at_source(place.clone(), instance.clone());
    let volumes = SourceVolumes::open(place, instance).map_err(|error| failed(error.into()))?;
    let places = place.places_of(instance);
    let mut task = LinuxSource::new(instance.clone(), uplink, places, volumes, end).map_err(failed)?;
    let stream = TcpStream::connect_timeout(&host, SILENCE).map_err(link)?;
    set_up(&stream).map_err(link)?;
    let journals = journals(place);
    source::run(stream, &mut task, config, &journals, instance.name.as_str(), on_progress)
}

/// What the agent at `host` would refuse of `instance`. Nothing is made there, and nothing is touched here.
pub fn ask(place: &Place, instance: &Instance, host: SocketAddr) -> Result<Vec<Objection>, MigrateError> {
    let failed = |source| MigrateError::Task { doing: "looking at the instance", source };
    let link = |source| MigrateError::Link { doing: "connecting to the destination", source };
    let members = tree::members(instance).map_err(|error| failed(error.into()))?;
    let living: Vec<_> = members.into_iter().filter(|member| member.node.status.is_none()).collect();
    let mut digests = FileDigests::new(place.places_of(instance));
    let volumes = SourceVolumes::open(place, instance).map_err(|error| failed(error.into()))?;
    let requirements = Requirements::of(instance, &living, &mut digests, &volumes).map_err(failed)?;
    let requirements = postcard::to_stdvec(&requirements).map_err(|error| failed(error.into()))?;
    let stream = TcpStream::connect_timeout(&host, SILENCE).map_err(link)?;
    set_up(&stream).map_err(link)?;
    probe::ask(stream, &requirements)
}

/// Takes an instance that comes in on `stream` to `place`; returns it when it runs. Blocks.
pub fn receive(place: &Place, stream: TcpStream, name: &str) -> Result<Option<Instance>, MigrateError> {
    set_up(&stream).map_err(|source| MigrateError::Link { doing: "taking a connection", source })?;
    let mut task = LinuxDestination::new(HostReception(place.clone()));
    match destination::run(stream, &mut task, &journals(place), name) {
        Err(MigrateError::OnlyAsked) => Ok(None),
        received => received.map(|()| task.into_instance()),
    }
}

fn set_up(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))
}

/// Removes what an agent that was killed has left of volumes. What a committed arrival may need stays.
pub fn sweep_volumes(place: &Place) {
    let left = journal::left_over(&journals(place)).unwrap_or_default();
    let needed = |entry: &Entry| entry.role == Role::Destination && entry.state == State::Committed;
    if !left.iter().any(|(_, entry)| needed(entry)) {
        place::sweep(&place.volumes);
    }
}

/// Gives `instance` back what an agent that was killed in its freeze has taken from it: its port, its connections.
/// Nothing of it is committed.
pub fn recover(place: &Place, instance: &Instance) -> Result<(), TaskError> {
    if let (Some(identity), Some(bridge), Some(init)) = (&instance.network, &place.bridge, instance.init_pid)
    {
        Port::new(&instance.name, bridge, identity, init).attach()?;
    }
    for pid in tree::listed(instance)? {
        settle::recover(pid)?;
    }
    Ok(())
}

fn end_at_source(place: Place, instance: Instance) -> Box<dyn FnMut() -> Result<(), TaskError>> {
    Box::new(move || {
        // Before the processes end, so that a waiting `rswap run` knows why.
        launch::note_moved(&place.state_dir, &instance.name)?;
        Registry::open(&place.state_dir)?.remove(&instance.name)?;
        arrival::end(&instance)?;
        volumes::remove(&place, &instance);
        Ok(())
    })
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

struct HostReception(Place);

impl Reception for HostReception {
    fn objections(&self, requirements: &Requirements) -> Result<Vec<Objection>, TaskError> {
        let found = arrival::objections(&self.0, &requirements.instance)?;
        let mut found: Vec<_> =
            found.into_iter().map(|(item, reason)| Objection::new(item, reason)).collect();
        let (bytes, inodes) = requirements.volumes;
        let (free_bytes, free_inodes) = place::room(&self.0.volumes)?;
        if bytes > free_bytes || inodes > free_inodes {
            let text = format!(
                "{bytes} bytes and {inodes} inodes are needed, {free_bytes} and {free_inodes} are free"
            );
            let directory = self.0.volumes.display();
            found.push(Objection::new("volumes", format!("no room: {text} at {directory}")));
        }
        Ok(found)
    }

    fn receive(
        &mut self,
        instance: &Instance,
        inner_pid: i32,
        offsets: Option<Clocks>,
    ) -> Result<Arrival, TaskError> {
        Ok(Arrival::receive(&self.0, instance, inner_pid, offsets)?)
    }
}
