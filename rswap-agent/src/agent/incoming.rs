//! Migrations that arrive: a bounded number, each on a thread of its own.
//!
//! Strangers come first: whoever has not shown yet who it is has [`HANDSHAKE`](crate::migrate::links::HANDSHAKE) for it, and takes
//! none of the places of those who have.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{net::TcpStream, sync::Semaphore};

use super::wiring::refused;
use crate::{
    instance::{Instance, launch::Place},
    migrate::{
        destination,
        ledger::Ledger,
        links::{HANDSHAKE, Links},
        linux,
    },
    sys::heap,
};

const ATTEMPTED: &str = "take in a migration";

/// Arrivals at a time; more are turned away, and their sources go on.
const ARRIVALS_AT_ONCE: usize = 4;

/// Connections at a time: most of them ask a short question.
const CONNECTIONS_AT_ONCE: usize = 32;

/// Handshakes at a time, and of one network: a few slow callers must not keep the others out.
const STRANGERS_AT_ONCE: usize = 64;
const STRANGERS_OF_ONE_NETWORK: usize = 16;

/// Those who have not shown yet who they are.
#[derive(Clone, Default)]
struct Strangers(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// The place of one of them, until it is dropped.
struct Stranger {
    strangers: Strangers,
    network: IpAddr,
}

/// An IPv4 address, or the /64 that an IPv6 host has to itself.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

impl Strangers {
    /// A place for a caller; hosts that the configuration names (`known`) find one even if others have taken all.
    fn admit(&self, from: IpAddr, known: bool) -> Option<Stranger> {
        let network = network(from);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        let here = counts.get(&network).copied().unwrap_or_default();
        if (all >= STRANGERS_AT_ONCE && !known) || here >= STRANGERS_OF_ONE_NETWORK {
            return None;
        }
        counts.insert(network, here + 1);
        Some(Stranger { strangers: self.clone(), network })
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut counts = self.strangers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.network);
            }
        }
    }
}

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
        let serving = Serving { place, links, ledger, deadline_s, connections, free: free.clone(), arrived };
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
        let peer = name.map_or_else(|| from.to_string(), |name| format!("{name} ({from})"));
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
        let received =
            linux::receive(&self.place, &self.ledger, &mut link, self.deadline_s, place_for, &mut tell);
        if let Err(error) = received.map_err(|error| refused(ATTEMPTED, &error)) {
            tracing::warn!(peer, %error, "an arrival failed");
            link.linger();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_cannot_take_the_places_of_all() {
        let strangers = Strangers::default();
        let at = |n: u8| IpAddr::from([10, 0, 0, n]);
        let here: Vec<_> = (0..STRANGERS_OF_ONE_NETWORK).map(|_| strangers.admit(at(1), false)).collect();
        assert!(here.iter().all(Option::is_some));
        assert!(strangers.admit(at(1), true).is_none());
        assert!(strangers.admit("::ffff:10.0.0.1".parse().unwrap(), false).is_none());
        assert!(strangers.admit(at(2), false).is_some());
        drop(here);
        assert!(strangers.admit(at(1), false).is_some());
        assert!(strangers.0.lock().unwrap().is_empty());
        let all: Vec<_> = (0..=u8::MAX).filter_map(|n| strangers.admit(at(n), false)).collect();
        assert_eq!(all.len(), STRANGERS_AT_ONCE);
        assert!(strangers.admit(at(200), false).is_none());
        assert!(strangers.admit(at(200), true).is_some(), "a host that is known");
    }

    #[test]
    fn an_ipv6_host_is_one_network() {
        let strangers = Strangers::default();
        let address = |n: usize| format!("2001:db8::{n:x}").parse().unwrap();
        let here: Vec<_> = (0..40).filter_map(|n| strangers.admit(address(n), false)).collect();
        assert_eq!(here.len(), STRANGERS_OF_ONE_NETWORK);
        assert!(strangers.admit("2001:db8:0:1::1".parse().unwrap(), false).is_some());
    }
}
