//! Places for those who have not shown yet who they are: a few slow callers must not keep the others out.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
};

/// Handshakes at a time, and of one network.
const STRANGERS_AT_ONCE: usize = 64;
const STRANGERS_OF_ONE_NETWORK: usize = 16;

/// Those who have not shown yet who they are.
#[derive(Clone, Debug, Default)]
pub struct Strangers(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// The place of one of them, until it is dropped.
#[derive(Debug)]
pub struct Stranger {
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
    /// A place for a caller; those who are expected from there (`known`) find one even if others have taken all.
    pub fn admit(&self, from: IpAddr, known: bool) -> Option<Stranger> {
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
        assert!(strangers.admit("::ffff:10.0.0.1".parse().expect("an address"), false).is_none());
        assert!(strangers.admit(at(2), false).is_some());
        drop(here);
        assert!(strangers.admit(at(1), false).is_some());
        assert!(strangers.0.lock().expect("the places").is_empty());
        let all: Vec<_> = (0..=u8::MAX).filter_map(|n| strangers.admit(at(n), false)).collect();
        assert_eq!(all.len(), STRANGERS_AT_ONCE);
        assert!(strangers.admit(at(200), false).is_none());
        assert!(strangers.admit(at(200), true).is_some(), "a host that is known");
    }

    #[test]
    fn an_ipv6_host_is_one_network() {
        let strangers = Strangers::default();
        let address = |n: usize| format!("2001:db8::{n:x}").parse().expect("an address");
        let here: Vec<_> = (0..40).filter_map(|n| strangers.admit(address(n), false)).collect();
        assert_eq!(here.len(), STRANGERS_OF_ONE_NETWORK);
        assert!(strangers.admit("2001:db8:0:1::1".parse().expect("an address"), false).is_some());
    }
}
