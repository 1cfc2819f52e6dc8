//! Both ends of a migration on this host: over TCP, with real instances.

use std::{
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    time::Duration,
};

use super::{
    MigrateError, Progress, Report, TaskError, destination,
    linux_destination::{LinuxDestination, Reception},
    linux_source::{LinuxSource, Uplink},
    source,
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
    let mut task = LinuxSource::new(instance.clone(), uplink, end).map_err(failed)?;
    let stream = TcpStream::connect_timeout(&host, SILENCE).map_err(link)?;
    set_up(&stream).map_err(link)?;
    let journals = journals(place);
    source::run(stream, &mut task, config, &journals, instance.name.as_str(), on_progress)
}

/// Takes an instance that comes in on `stream` to `place`; returns it when it runs. Blocks.
pub fn receive(place: &Place, stream: TcpStream, name: &str) -> Result<Option<Instance>, MigrateError> {
    set_up(&stream).map_err(|source| MigrateError::Link { doing: "taking a connection", source })?;
    let mut task = LinuxDestination::new(HostReception(place.clone()));
    destination::run(stream, &mut task, &journals(place), name)?;
    Ok(task.into_instance())
}

fn set_up(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))
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
        Ok(arrival::end(&instance)?)
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
    fn receive(
        &mut self,
        instance: &Instance,
        inner_pid: i32,
        offsets: Option<Clocks>,
    ) -> Result<Arrival, TaskError> {
        Ok(Arrival::receive(&self.0, instance, inner_pid, offsets)?)
    }
}
