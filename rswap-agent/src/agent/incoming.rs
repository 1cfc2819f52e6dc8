//! Migrations that arrive: a bounded number, each on a thread of its own.
//!
//! Strangers come first: whoever has not shown yet who it is has [`HANDSHAKE`](crate::migrate::links::HANDSHAKE) for it, and takes
//! none of the places of those who have.

use std::{net::SocketAddr, sync::Arc};

use rswap_trust::strangers::{Stranger, Strangers};
use tokio::{net::TcpStream, sync::Semaphore};

use super::wiring::refused;
use crate::{
    instance::{Instance, launch::Place},
    migrate::{
        destination,
        ledger::Ledger,
        links::{HANDSHAKE, Links},
        linux::{self, Caller},
        meeting::Meeting,
    },
    sys::heap,
};

const ATTEMPTED: &str = "take in a migration";

/// Arrivals at a time; more are turned away, and their sources go on.
const ARRIVALS_AT_ONCE: usize = 4;

/// Connections at a time: most of them ask a short question.
const CONNECTIONS_AT_ONCE: usize = 32;

/// Takes in what arrives, and answers questions.
pub(super) struct Incoming {
    serving: Serving,
    free: Arc<Semaphore>,
    strangers: Strangers,
}

#[derive(Clone)]
struct Serving {
    place: Place,
    links: Links,
    ledger: Arc<Ledger>,
    meeting: Meeting,
    deadline_s: u64,
    connections: Arc<Semaphore>,
    free: Arc<Semaphore>,
    arrived: tokio::sync::mpsc::UnboundedSender<Instance>,
}

impl Incoming {
    pub(super) fn new(
        place: Place,
        links: Links,
        ledger: Arc<Ledger>,
        deadline_s: u64,
        arrived: tokio::sync::mpsc::UnboundedSender<Instance>,
    ) -> Self {
        let free = Arc::new(Semaphore::new(ARRIVALS_AT_ONCE));
        let connections = Arc::new(Semaphore::new(CONNECTIONS_AT_ONCE));
        let meeting = Meeting::default();
        let serving =
            Serving { place, links, ledger, meeting, deadline_s, connections, free: free.clone(), arrived };
        Self { serving, free, strangers: Strangers::default() }
    }

    /// Whether something is arriving.
    pub(super) fn is_busy(&self) -> bool {
        self.free.available_permits() < ARRIVALS_AT_ONCE
    }

    /// Begins to serve `stream`.
    pub(super) fn accept(&self, stream: TcpStream, from: SocketAddr) {
        let Some(stranger) = self.strangers.admit(from.ip(), self.serving.links.knows(from.ip())) else {
            tracing::warn!(%from, within_s = HANDSHAKE.as_secs(), "turned away: too many have not shown who they are");
            return;
        };
        let serving = self.serving.clone();
        std::thread::spawn(move || {
            let _at_the_end = heap::GiveBack;
            let stream = stream.into_std().and_then(|stream| {
                stream.set_nonblocking(false)?;
                Ok(stream)
            });
            if let Err(error) = stream.and_then(|stream| serving.serve(stream, from, stranger)) {
                tracing::warn!(%from, %error, "a caller was turned away");
            }
        });
    }
}

impl Serving {
    fn serve(self, stream: std::net::TcpStream, from: SocketAddr, stranger: Stranger) -> std::io::Result<()> {
        let (mut link, name) = self.links.take(stream)?;
        let peer = name.as_ref().map_or_else(|| from.to_string(), |name| format!("{name} ({from})"));
        let Ok(_connection) = self.connections.try_acquire_owned() else {
            destination::turn_away(&mut link, "too many connections: try again");
            tracing::warn!(peer, at_once = CONNECTIONS_AT_ONCE, "turned away: too many connections");
            return Ok(());
        };
        drop(stranger);
        let mut tell = |instance: &Instance| {
            tracing::info!(peer, instance = %instance.name, "arrived");
            // The agent is stopping: the next one finds it in the registry.
            drop(self.arrived.send(instance.clone()));
        };
        let place_for = || self.free.try_acquire_owned().ok();
        let caller = Caller { link, peer: name, meeting: self.meeting };
        let received =
            linux::receive(&self.place, &self.ledger, caller, self.deadline_s, place_for, &mut tell);
        if let Err(error) = received.map_err(|error| refused(ATTEMPTED, &error)) {
            tracing::warn!(peer, %error, "an arrival failed");
        }
        Ok(())
    }
}
