//! Multicast groups that a socket has joined. The kernel lists the groups of an interface, not those of a socket; but a socket
//! can be asked for its filter of a group (RFC 3678), which fails unless it is a member.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

use serde::{Deserialize, Serialize};

use super::{TraceeError, read_proc};
use crate::sys::datagram;

/// One group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Its address.
    pub group: IpAddr,
    /// The interface by which it was joined.
    pub interface: String,
}

type Found = Result<Vec<Membership>, (String, &'static str)>;

/// The groups of a socket of process `pid`.
pub(super) fn of(ours: &OwnedFd, domain: i32, pid: i32) -> Result<Found, TraceeError> {
    let mut groups = parse_v4(&read_proc(&format!("/proc/{pid}/net/igmp"))?);
    if domain == libc::AF_INET6 {
        // Without IPv6 there are none.
        groups.extend(parse_v6(&read_proc(&format!("/proc/{pid}/net/igmp6")).unwrap_or_default()));
    }
    let mut found = Vec::new();
    for (index, interface, group) in groups {
        match datagram::group_filter(ours, group, index) {
            Ok((datagram::EXCLUDE, 0)) => found.push(Membership { group, interface }),
            Ok(_) => {
                let what = format!("a socket with a filter of senders to group {group}");
                return Ok(Err((what, "such filters aren't carried in this version")));
            }
            // It is no member.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EADDRNOTAVAIL | libc::ENODEV | libc::EINVAL | libc::ENOPROTOOPT)
                ) => {}
            Err(error) => return Err(TraceeError::call("asking for a multicast group", pid)(error)),
        }
    }
    Ok(Ok(found))
}

/// Joins them again.
pub(super) fn join(ours: &OwnedFd, memberships: &[Membership]) -> io::Result<()> {
    for Membership { group, interface } in memberships {
        datagram::join(ours, *group, datagram::interface_index(ours, interface)?)?;
    }
    Ok(())
}

/// `/proc/net/igmp`: a line for each interface, and below it one for each group, in the host's byte order. The group of all
/// hosts is every interface's.
fn parse_v4(text: &str) -> Vec<(u32, String, IpAddr)> {
    const ALL_HOSTS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);
    let mut found = Vec::new();
    let mut interface = None;
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        if line.starts_with(char::is_numeric) {
            let index = words.next().and_then(|word| word.parse().ok());
            interface = index.zip(words.next().map(|name| name.trim_end_matches(':').to_owned()));
            continue;
        }
        let group = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
        if let (Some((index, name)), Some(group)) = (&interface, group) {
            let group = Ipv4Addr::from(group.to_ne_bytes());
            if group != ALL_HOSTS {
                found.push((*index, name.clone(), group.into()));
            }
        }
    }
    found
}

/// `/proc/net/igmp6`: interface, its name and a group in each line.
fn parse_v6(text: &str) -> Vec<(u32, String, IpAddr)> {
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [index, name, group, ..] = words[..] else { return None };
        let group = Ipv6Addr::from(u128::from_str_radix(group, 16).ok()?);
        Some((index.parse().ok()?, name.to_owned(), group.into()))
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const V4: &str = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                      1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
                      7\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
    const V6: &str = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";

    #[test]
    fn groups_are_read_with_their_interfaces() {
        let mdns: IpAddr = Ipv4Addr::new(224, 0, 0, 251).into();
        assert_eq!(parse_v4(V4), [(7, "eth0".to_owned(), mdns)]);
        let all = "ff02::1".parse().expect("an address");
        assert_eq!(parse_v6(V6), [(1, "lo".to_owned(), all)]);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "(\\PC|\n){0,200}") {
            parse_v4(&text);
            parse_v6(&text);
        }
    }
}
