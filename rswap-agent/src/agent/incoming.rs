//! Migrations that arrive: a bounded number, each on a thread of its own.

use std::sync::Arc;

use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::wiring::refused;
use crate::{
    instance::{Instance, launch::Place},
    migrate::{ledger::Ledger, linux},
    sys::heap,
};

const ATTEMPTED: &str = "take in a migration";

/// Arrivals at a time; more are turned away, and their sources go on.
const ARRIVALS_AT_ONCE: usize = 4;

/// Connections at a time: most of them ask a short question.
const CONNECTIONS_AT_ONCE: usize = 32;

/// Takes in what arrives, and answers questions.
pub(super) struct Incoming {
    place: Place,
    ledger: Arc<Ledger>,
    deadline_s: u64,
    connections: Arc<Semaphore>,
    free: Arc<Semaphore>,
    arrived: tokio::sync::mpsc::UnboundedSender<Instance>,
}

impl Incoming {
    pub(super) fn new(
        place: Place,
        ledger: Arc<Ledger>,
        deadline_s: u64,
        arrived: tokio::sync::mpsc::UnboundedSender<Instance>,
    ) -> Self {
        let free = Arc::new(Semaphore::new(ARRIVALS_AT_ONCE));
        let connections = Arc::new(Semaphore::new(CONNECTIONS_AT_ONCE));
        Self { place, ledger, deadline_s, connections, free, arrived }
    }

    /// Whether something is arriving.
    pub(super) fn is_busy(&self) -> bool {
        self.free.available_permits() < ARRIVALS_AT_ONCE
    }

    /// Begins to serve `stream`.
    pub(super) fn accept(&self, stream: TcpStream, from: std::net::SocketAddr) {
        let Ok(connection) = self.connections.clone().try_acquire_owned() else {
            tracing::warn!(%from, at_once = CONNECTIONS_AT_ONCE, "turned away: too many connections");
            return;
        };
        let (place, ledger, deadline_s) = (self.place.clone(), self.ledger.clone(), self.deadline_s);
        let (free, arrived) = (self.free.clone(), self.arrived.clone());
        std::thread::spawn(move || {
            let _at_the_end = heap::GiveBack;
            let _connection: OwnedSemaphorePermit = connection;
            let served = stream.into_std().and_then(|stream| {
                stream.set_nonblocking(false)?;
                Ok(stream)
            });
            let served = served.map_err(|error| refused(ATTEMPTED, &error)).and_then(|stream| {
                let mut tell = |instance: &Instance| {
                    tracing::info!(%from, instance = %instance.name, "arrived");
                    // The agent is stopping: the next one finds it in the registry.
                    drop(arrived.send(instance.clone()));
                };
                let place_for = || free.try_acquire_owned().ok();
                linux::receive(&place, &ledger, stream, deadline_s, place_for, &mut tell)
                    .map_err(|error| refused(ATTEMPTED, &error))
            });
            if let Err(error) = served {
                tracing::warn!(%from, %error, "an arrival failed");
            }
        });
    }
}
