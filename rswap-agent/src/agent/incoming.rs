//! Migrations that arrive: a bounded number, each on a thread of its own.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::wiring::refused;
use crate::{
    instance::{Instance, launch::Place},
    migrate::linux,
    status::ApiError,
};

/// Arrivals at a time; more are turned away, and their sources go on.
const ARRIVALS_AT_ONCE: usize = 4;

/// Takes in what arrives.
pub(super) struct Incoming {
    place: Place,
    free: Arc<Semaphore>,
    arrived: tokio::sync::mpsc::UnboundedSender<Instance>,
}

impl Incoming {
    pub(super) fn new(place: Place, arrived: tokio::sync::mpsc::UnboundedSender<Instance>) -> Self {
        Self { place, free: Arc::new(Semaphore::new(ARRIVALS_AT_ONCE)), arrived }
    }

    /// Whether something is arriving.
    pub(super) fn is_busy(&self) -> bool {
        self.free.available_permits() < ARRIVALS_AT_ONCE
    }

    /// Begins to take an instance from `stream`.
    pub(super) fn accept(&self, stream: TcpStream, from: std::net::SocketAddr) {
        let Ok(permit) = self.free.clone().try_acquire_owned() else {
            tracing::warn!(%from, at_once = ARRIVALS_AT_ONCE, "turned away: too many migrations arrive");
            return;
        };
        let (place, arrived) = (self.place.clone(), self.arrived.clone());
        std::thread::spawn(move || {
            let _permit: OwnedSemaphorePermit = permit;
            match receive(stream, &place) {
                Ok(Some(instance)) => {
                    tracing::info!(%from, instance = %instance.name, "arrived");
                    // The agent is stopping: the next one finds it in the registry.
                    drop(arrived.send(instance));
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%from, %error, "an arrival failed"),
            }
        });
    }
}

fn receive(stream: TcpStream, place: &Place) -> Result<Option<Instance>, ApiError> {
    static ARRIVALS: AtomicU64 = AtomicU64::new(0);
    let attempted = "take in a migration";
    let stream = stream.into_std().map_err(|error| refused(attempted, &error))?;
    stream.set_nonblocking(false).map_err(|error| refused(attempted, &error))?;
    // The journal is begun before the offer says which instance it is.
    let name = format!("arrival-{}-{}", std::process::id(), ARRIVALS.fetch_add(1, Ordering::Relaxed));
    linux::receive(place, stream, &name).map_err(|error| refused(attempted, &error))
}
