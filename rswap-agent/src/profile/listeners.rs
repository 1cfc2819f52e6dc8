//! Connections that came and were dropped: the kernel counts them at the socket that listens (`sk_drops`), and tells of it by sock_diag(7), with
//! the socket's cgroup. No event is needed that kernels would have in common.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    net::{Ipv4Addr, TcpListener},
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
    /// Instances of whose sockets some could not be looked at.
    missed: BTreeSet<InstanceName>,
}

impl Listeners {
    /// Looks again, if it is time: at the sockets of instances, each with its cgroup's path, those of its processes that are known already, and the ids of its
    /// cgroups.
    pub(super) fn look<'a, P: Iterator<Item = i32>>(
        &mut self,
        now: UnixMillis,
        instances: impl Iterator<Item = (&'a InstanceName, &'a Path, impl Fn() -> P, &'a BTreeSet<u64>)>,
    ) {
        self.dropped.clear();
        if self.looked.is_some_and(|looked| now.since(looked) < LOOK_EVERY_MS && now.0 >= looked.0) {
            return;
        }
        self.looked = Some(now);
        let mut found = Vec::new();
        let (mut listed, mut failed) = (BTreeSet::new(), BTreeSet::new());
        let mut all = Vec::new();
        for (name, cgroup, processes, ids) in instances {
            // Those that have ended meanwhile have none.
            let in_namespace = |pid| Some((pid, net_namespace(pid)?));
            let listed_now = || cgroup::pids(cgroup).unwrap_or_default().into_iter().find_map(in_namespace);
            let first = processes().find_map(in_namespace).or_else(listed_now);
            all.push((name, first.map(|(_, namespace)| namespace), ids));
            let Some((pid, namespace)) = first.filter(|(_, namespace)| !listed.contains(namespace)) else {
                continue;
            };
            match namespace::inside(pid, &["net"], list) {
                Ok(list) => {
                    found.extend(list.into_iter().map(|of| (namespace, of)));
                    listed.insert(namespace);
                }
                // The process may have ended: that of another instance in the same one may do.
                Err(error) => {
                    tracing::debug!(pid, %error, "sockets that listen can't be listed");
                    failed.insert(namespace);
                }
            }
        }
        self.compare(&found, &(&failed - &listed), all);
    }

    /// Takes in what was found in network namespaces, and which could not be listed; of each instance, in which it is, and the ids of its cgroups.
    fn compare(
        &mut self,
        found: &[(u64, Listener)],
        missed: &BTreeSet<u64>,
        instances: Vec<(&InstanceName, Option<u64>, &BTreeSet<u64>)>,
    ) {
        let mut by_cgroup: HashMap<u64, Vec<&(u64, Listener)>> = HashMap::new();
        found.iter().for_each(|of| by_cgroup.entry(of.1.cgroup_id).or_default().push(of));
        let mut all_before = std::mem::take(&mut self.seen);
        self.missed.clear();
        for (name, namespace, ids) in instances {
            let before = all_before.remove(name);
            let mut namespaces =
                before.iter().flat_map(HashMap::keys).map(|(namespace, _)| *namespace).chain(namespace);
            if namespaces.any(|namespace| missed.contains(&namespace)) {
                // The next look tells what was dropped since the one before.
                self.seen.extend(before.map(|before| (name.clone(), before)));
                self.missed.insert(name.clone());
                continue;
            }
            let own = ids.iter().filter_map(|id| by_cgroup.get(id)).flatten();
            let own = own.map(|(namespace, of)| ((*namespace, of.cookie), of.drops)).collect();
            // What there was before the first look is nobody's news.
            if let Some(before) = before {
                self.dropped.insert(name.clone(), more(&before, &own));
            }
            self.seen.insert(name.clone(), own);
        }
    }

    /// What an instance's sockets have dropped by the last look since that before, if that was just now; `None` where it can't be known.
    pub(super) fn drops(&self, name: &InstanceName) -> Option<u64> {
        (!self.missed.contains(name)).then(|| self.dropped.get(name).copied().unwrap_or(0))
    }
}

fn net_namespace(pid: i32) -> Option<u64> {
    Some(fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino())
}

/// How much more was dropped; a socket that was not there before begins with nothing.
fn more(before: &HashMap<(u64, u64), u32>, now: &HashMap<(u64, u64), u32>) -> u64 {
    let of = |(socket, drops): (&_, &u32)| drops.wrapping_sub(before.get(socket).copied().unwrap_or(0));
    now.iter().map(of).map(u64::from).sum()
}

/// Whether this kernel tells of dropped connections, and whose they were.
pub(super) fn is_told() -> io::Result<()> {
    // One at least: of none, nothing could be seen.
    let _one = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok();
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
        for answer in answers {
            // Not passed over: it would look as if nothing was dropped.
            let whose = || io::Error::other("the kernel does not say of which cgroup a socket is");
            found.push(listener(&answer.body).ok_or_else(whose)?);
        }
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
    fn what_could_not_be_looked_at_is_told_by_the_next_look() {
        let (web, db): (InstanceName, InstanceName) = ("web".parse().unwrap(), "db".parse().unwrap());
        let (of_web, of_db) = (BTreeSet::from([7]), BTreeSet::from([8]));
        let mut listeners = Listeners::default();
        let mut look = |drops: u32, missed: &[u64]| {
            let found = [(1, 7), (2, 8)]
                .map(|(namespace, cgroup_id)| (namespace, Listener { cookie: cgroup_id, cgroup_id, drops }));
            let missed: BTreeSet<u64> = missed.iter().copied().collect();
            let found: Vec<_> = found.into_iter().filter(|(of, _)| !missed.contains(of)).collect();
            listeners.dropped.clear();
            listeners.compare(&found, &missed, vec![(&web, Some(1), &of_web), (&db, Some(2), &of_db)]);
            (listeners.drops(&web), listeners.drops(&db))
        };
        assert_eq!(look(50, &[2]), (Some(0), None));
        assert_eq!(look(60, &[]), (Some(10), Some(0)), "what was there before the first look is no news");
        assert_eq!(look(63, &[1]), (None, Some(3)));
        assert_eq!(look(65, &[1]), (None, Some(2)));
        assert_eq!(look(66, &[]), (Some(6), Some(1)));
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
