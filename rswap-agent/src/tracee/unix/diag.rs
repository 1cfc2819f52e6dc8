//! Which unix sockets there are, and who is connected to whom (sock_diag(7)).

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::fd::AsFd,
    thread,
};

use netlink_packet_core::{Emitable as _, Nla as _, Parseable as _};
use netlink_packet_sock_diag::{
    SOCK_DIAG_BY_FAMILY,
    unix::{ShowFlags, StateFlags, UnixRequest, UnixResponse, nlas::Nla},
};
use nix::sched::{CloneFlags, setns};

use super::super::TraceeError;
use crate::sys::netlink::{self, Message};

const TCP_LISTEN: u8 = 10;

/// What the kernel tells of one socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// The inode of the socket at the other end: 0 when that is closed (or waits to be accepted), `None` without one.
    pub(super) peer: Option<u64>,
    /// It listens.
    pub(super) listens: bool,
    /// How many may wait, and who does, by inode.
    pub(super) backlog: u32,
    pub(super) waiting: Vec<u64>,
    /// Inode and device (in the kernel's form) of the file of its name.
    pub(super) file: Option<(u32, u32)>,
    /// Bits 1: it reads no more, 2: it writes no more.
    pub(super) shutdown: u8,
}

/// Who is connected to whom among the unix sockets of a network namespace, by inode; asked once, when it is needed.
#[derive(Debug)]
pub struct Peers {
    pid: i32,
    found: OnceCell<BTreeMap<u64, Known>>,
    /// The sockets that the instance's processes have.
    inside: BTreeSet<u64>,
}

impl Peers {
    /// Those of the namespace that the processes `pids` of an instance are in.
    pub fn of_processes(pids: &[i32]) -> Self {
        let pid = pids.first().copied().unwrap_or_default();
        let inside = pids.iter().flat_map(|pid| sockets_of(*pid)).collect();
        Self { pid, found: OnceCell::new(), inside }
    }

    /// What is known of a socket.
    pub(super) fn of(&self, inode: u64) -> Result<Option<Known>, TraceeError> {
        Ok(self.all()?.get(&inode).cloned())
    }

    /// Whether a socket waits to be accepted by a listening one.
    pub(super) fn is_waiting(&self, inode: u64) -> Result<bool, TraceeError> {
        Ok(self.all()?.values().any(|known| known.waiting.contains(&inode)))
    }

    /// Whether a process of the instance has this socket.
    pub(super) fn is_inside(&self, inode: u64) -> bool {
        self.inside.contains(&inode)
    }

    fn all(&self) -> Result<&BTreeMap<u64, Known>, TraceeError> {
        if self.found.get().is_none() {
            let listed =
                list(self.pid).map_err(TraceeError::call("asking for the unix sockets", self.pid))?;
            // Nobody else can have set it meanwhile: the cell is this thread's.
            let _ = self.found.set(listed);
        }
        let lost = || TraceeError::Unsupported("the list of unix sockets was lost".into());
        self.found.get().ok_or_else(lost)
    }
}

/// The files that name unix sockets of the network namespace of `pid`: inode and device, both as the kernel has them, cut
/// off at 32 bits.
pub fn named_files(pid: i32) -> Result<BTreeSet<(u32, u32)>, TraceeError> {
    let listed = list(pid).map_err(TraceeError::call("asking for the unix sockets", pid))?;
    Ok(listed.into_values().filter_map(|known| known.file).collect())
}

/// The inodes of all sockets of process `pid`, whichever family they are of.
fn sockets_of(pid: i32) -> Vec<u64> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let inode = |target: std::path::PathBuf| {
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    targets.filter_map(inode).collect()
}

/// Asks the kernel (sock_diag(7)) from inside the network namespace of `pid`.
fn list(pid: i32) -> io::Result<BTreeMap<u64, Known>> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let ask = move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        dump()
    };
    thread::spawn(ask).join().unwrap_or_else(|_| Err(io::Error::other("the asking thread panicked")))
}

fn dump() -> io::Result<BTreeMap<u64, Known>> {
    let request = UnixRequest {
        // Those that are not connected, too: their state (TCP_CLOSE) has no name there.
        state_flags: StateFlags::from_bits_retain(u32::MAX),
        inode: 0,
        show_flags: ShowFlags::PEER | ShowFlags::VFS | ShowFlags::ICONS | ShowFlags::RQLEN,
        cookie: [0xff; 8],
    };
    let mut body = vec![0; request.buffer_len()];
    request.emit(&mut body);
    let mut peers = BTreeMap::new();
    for message in netlink::dump(libc::NETLINK_SOCK_DIAG, Message { kind: SOCK_DIAG_BY_FAMILY, body })? {
        let response = UnixResponse::parse(&message.body).map_err(io::Error::other)?;
        peers.insert(u64::from(response.header.inode), known(&response));
    }
    Ok(peers)
}

fn known(response: &UnixResponse) -> Known {
    let listens = response.header.state == TCP_LISTEN;
    let mut known = Known { listens, ..Known::default() };
    for nla in &response.nlas {
        match nla {
            Nla::Peer(inode) => known.peer = Some(u64::from(*inode)),
            Nla::PendingConnections(inodes) => {
                known.waiting = inodes.iter().map(|inode| u64::from(*inode)).collect()
            }
            Nla::Vfs(_) => {
                // Its fields are private: inode and device, as the kernel sent them.
                let mut bytes = [0; 8];
                nla.emit_value(&mut bytes);
                let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
                known.file = Some((word(0), word(4)));
            }
            Nla::ReceiveQueueLength(_, backlog) if listens => known.backlog = *backlog,
            Nla::Shutdown(bits) => known.shutdown = *bits,
            _ => {}
        }
    }
    known
}
