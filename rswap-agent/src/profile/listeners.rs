//! Connections that came and were dropped: the kernel counts them at the socket that listens (`sk_drops`), and tells of it by sock_diag(7), with
//! the socket's cgroup. No event is needed that kernels would have in common.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use super::cgroup;
use crate::{
    instance::InstanceName,
    sys::{
        namespace,
        netlink::{self, Message},
    },
    units::UnixMillis,
};

/// How often sockets are looked at, in milliseconds: a network namespace takes about a tenth of a millisecond.
const LOOK_EVERY_MS: u64 = 5000;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// State `TCP_LISTEN`, as a bit.
const LISTENING: u32 = 1 << 10;
const INET_DIAG_SKMEMINFO: u16 = 7;
const INET_DIAG_CGROUP_ID: u16 = 21;
/// Place of `SK_MEMINFO_DROPS` among the words of [`INET_DIAG_SKMEMINFO`].
const DROPS: usize = 8;
/// `struct inet_diag_msg`, and its cookie.
const MESSAGE_BYTES: usize = 72;
const COOKIE_AT: usize = 44;

/// A socket that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Listener {
    cookie: u64,
    cgroup_id: u64,
    drops: u32,
}

/// What was dropped by when.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    looked: Option<UnixMillis>,
    /// By instance: sockets (by network namespace and cookie), and what each had dropped.
    seen: BTreeMap<InstanceName, HashMap<(u64, u64), u32>>,
    /// What instances' sockets have dropped since the last look but one.
    dropped: BTreeMap<InstanceName, u64>,
    failed: bool,
}

impl Listeners {
    /// Looks again, if it is time: at the sockets of instances, each with its cgroup's path and the ids of its cgroups.
    pub(super) fn look<'a>(
        &mut self,
        now: UnixMillis,
        instances: impl Iterator<Item = (&'a InstanceName, &'a Path, &'a BTreeSet<u64>)> + Clone,
    ) {
        self.dropped.clear();
        if self.looked.is_some_and(|looked| now.since(looked) < LOOK_EVERY_MS && now.0 >= looked.0) {
            return;
        }
        self.looked = Some(now);
        let mut found = Vec::new();
        let mut namespaces = BTreeSet::new();
        self.failed = false;
        for pid in instances.clone().filter_map(|(_, cgroup, _)| cgroup::pids(cgroup).ok()?.pop_first()) {
            let Ok(namespace) = fs::metadata(format!("/proc/{pid}/ns/net")) else { continue };
            if !namespaces.insert(namespace.ino()) {
                continue;
            }
            match namespace::inside(pid, &["net"], list) {
                Ok(list) => found.extend(list.into_iter().map(|of| (namespace.ino(), of))),
                // The process may have ended.
                Err(error) if fs::exists(format!("/proc/{pid}")).unwrap_or(false) => {
                    tracing::debug!(pid, %error, "sockets that listen can't be listed");
                    self.failed = true;
                }
                Err(_) => {}
            }
        }
        let mut seen = BTreeMap::new();
        for (name, _, ids) in instances {
            let own = found.iter().filter(|(_, of)| ids.contains(&of.cgroup_id));
            let own = own.map(|(namespace, of)| ((*namespace, of.cookie), of.drops)).collect();
            // What there was before the first look is nobody's news.
            if let Some(before) = self.seen.get(name) {
                self.dropped.insert(name.clone(), more(before, &own));
            }
            seen.insert(name.clone(), own);
        }
        self.seen = seen;
    }

    /// What an instance's sockets have dropped by the last look since that before, if that was just now; `None` where it can't be known.
    pub(super) fn drops(&self, name: &InstanceName) -> Option<u64> {
        (!self.failed).then(|| self.dropped.get(name).copied().unwrap_or(0))
    }
}

/// How much more was dropped; a socket that was not there before begins with nothing.
fn more(before: &HashMap<(u64, u64), u32>, now: &HashMap<(u64, u64), u32>) -> u64 {
    let of = |(socket, drops): (&_, &u32)| drops.wrapping_sub(before.get(socket).copied().unwrap_or(0));
    now.iter().map(of).map(u64::from).sum()
}

/// Whether this kernel tells of dropped connections.
pub(super) fn is_told() -> io::Result<()> {
    list().map(drop)
}

/// The TCP sockets that listen in the calling thread's network namespace.
fn list() -> io::Result<Vec<Listener>> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // `struct inet_diag_req_v2`: family, protocol, attributes, padding, states, and a socket's name that stands for all.
        let mut body = vec![family as u8, libc::IPPROTO_TCP as u8, 1 << (INET_DIAG_SKMEMINFO - 1), 0];
        body.extend(LISTENING.to_ne_bytes());
        body.extend([0; 48]);
        let answers = netlink::dump(libc::NETLINK_SOCK_DIAG, Message { kind: SOCK_DIAG_BY_FAMILY, body })?;
        found.extend(answers.iter().filter_map(|answer| listener(&answer.body)));
    }
    Ok(found)
}

fn listener(message: &[u8]) -> Option<Listener> {
    let word = |bytes: &[u8], at: usize| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let cookie = word(message, COOKIE_AT)?;
    let (mut cgroup_id, mut drops) = (None, None);
    let mut rest = message.get(MESSAGE_BYTES..)?;
    while let Some((length, kind)) = rest
        .first_chunk()
        .map(|[a, b, c, d]| (usize::from(u16::from_ne_bytes([*a, *b])), u16::from_ne_bytes([*c, *d])))
    {
        let value = rest.get(4..length)?;
        match kind {
            INET_DIAG_CGROUP_ID => cgroup_id = word(value, 0),
            INET_DIAG_SKMEMINFO => {
                drops = value.get(DROPS * 4..)?.first_chunk().map(|word| u32::from_ne_bytes(*word));
            }
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Listener { cookie, cgroup_id: cgroup_id?, drops: drops? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_read_from_the_kernels_message() {
        let mut message = vec![0; MESSAGE_BYTES];
        message[COOKIE_AT] = 9;
        let mut attribute = |kind: u16, value: &[u8]| {
            message.extend((value.len() as u16 + 4).to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(value);
            message.resize(message.len().next_multiple_of(4), 0);
        };
        attribute(8, &[1]);
        let mut memory = [0; 36];
        memory[32] = 5;
        attribute(INET_DIAG_SKMEMINFO, &memory);
        attribute(INET_DIAG_CGROUP_ID, &77_u64.to_ne_bytes());
        assert_eq!(listener(&message), Some(Listener { cookie: 9, cgroup_id: 77, drops: 5 }));
        for length in 0..message.len() {
            listener(&message[..length]);
        }
        assert_eq!(listener(&message[..MESSAGE_BYTES]), None, "a kernel that does not say whose it is");
    }

    #[test]
    fn what_a_socket_dropped_before_counts_once() {
        let before = HashMap::from([((1, 1), 5), ((1, 2), u32::MAX)]);
        let now = HashMap::from([((1, 1), 7), ((1, 2), 1), ((2, 1), 3)]);
        assert_eq!(more(&before, &now), 2 + 2 + 3);
        assert_eq!(more(&now, &now), 0);
    }

    #[test]
    fn a_socket_that_listens_is_listed() {
        let _listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        match list() {
            Ok(found) => assert!(!found.is_empty()),
            Err(error) => eprintln!("not tested: {error}"),
        }
    }
}
