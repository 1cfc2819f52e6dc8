//! Pairs of unix sockets without names, as socketpair(2) makes them, with what waits in their queues.

use std::{
    cell::OnceCell,
    collections::BTreeMap,
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    unix::{ShowFlags, StateFlags, UnixRequest, nlas::Nla},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg},
};

use super::{TraceeError, image::UnixImage};
use crate::sys::socket;

/// Bytes that are carried per socket at most: more than the kernel's default send buffer holds.
const QUEUE_LIMIT: usize = 4 << 20;
/// Messages that are carried per socket at most.
const MESSAGES_LIMIT: usize = 4096;
/// A message is no longer than this.
const MESSAGE_LIMIT: usize = 1 << 20;

/// Who is connected to whom among the unix sockets of a network namespace, by inode; asked once, when it is needed.
#[derive(Debug)]
pub struct Peers {
    pid: i32,
    found: OnceCell<BTreeMap<u64, u64>>,
}

impl Peers {
    /// Those of the namespace that process `pid` is in.
    pub fn of_process(pid: i32) -> Self {
        Self { pid, found: OnceCell::new() }
    }

    /// The inode of the socket at the other end: 0 when that is closed, `None` without a connection.
    fn of(&self, inode: u64) -> Result<Option<u64>, TraceeError> {
        if self.found.get().is_none() {
            let listed =
                list(self.pid).map_err(TraceeError::call("asking for the unix sockets", self.pid))?;
            // Nobody else can have set it meanwhile: the cell is this thread's.
            let _ = self.found.set(listed);
        }
        Ok(self.found.get().and_then(|found| found.get(&inode)).copied())
    }
}

/// Asks the kernel (sock_diag(7)) from inside the network namespace of `pid`.
fn list(pid: i32) -> io::Result<BTreeMap<u64, u64>> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let ask = move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        dump()
    };
    thread::spawn(ask).join().unwrap_or_else(|_| Err(io::Error::other("the asking thread panicked")))
}

fn dump() -> io::Result<BTreeMap<u64, u64>> {
    let mut netlink = Socket::new(NETLINK_SOCK_DIAG)?;
    netlink.bind_auto()?;
    netlink.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let request = UnixRequest {
        state_flags: StateFlags::all(),
        inode: 0,
        show_flags: ShowFlags::PEER,
        cookie: [0xff; 8],
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::UnixRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    netlink.send(&bytes, 0)?;

    let mut peers = BTreeMap::new();
    loop {
        let (datagram, _) = netlink.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = <NetlinkMessage<SockDiagMessage>>::deserialize(rest)
                .map_err(|error| io::Error::other(error.to_string()))?;
            match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::UnixResponse(response)) => {
                    let peer = response.nlas.iter().find_map(|nla| match nla {
                        Nla::Peer(inode) => Some(u64::from(*inode)),
                        _ => None,
                    });
                    peers.extend(peer.map(|peer| (u64::from(response.header.inode), peer)));
                }
                NetlinkPayload::Done(_) => return Ok(peers),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            let length = (message.header.length as usize).next_multiple_of(4).clamp(4, rest.len());
            rest = &rest[length..];
        }
    }
}

/// Why a unix socket can't be carried: what it is, and what to do.
type Refusal = (String, &'static str);

/// Describes a socket behind our duplicate of it; with `contents`, also what waits in its queue.
pub fn describe(
    ours: &OwnedFd,
    inode: u64,
    peers: &Peers,
    contents: bool,
) -> Result<Result<UnixImage, Refusal>, TraceeError> {
    let pid = peers.pid;
    let failed = |error| TraceeError::call("looking at a unix socket", pid)(error);
    let option = |name| socket::option(ours, libc::SOL_SOCKET, name);
    let kind = option(libc::SO_TYPE).map_err(failed)?;
    // Of a socket without a name the kernel tells only its family.
    let has_name = socket::local_name(ours).map_err(failed)?.len() > size_of::<libc::sa_family_t>();
    if has_name || option(libc::SO_ACCEPTCONN).map_err(failed)? != 0 {
        let remedy = "only pairs of unix sockets without names are carried in this version";
        return Ok(Err(("a unix socket with a name".into(), remedy)));
    }
    let Some(peer) = peers.of(inode)? else {
        return Ok(Err(("a unix socket without a connection".into(), "not carried in this version")));
    };
    let passes_credentials = option(libc::SO_PASSCRED).map_err(failed)?;
    let options = match passes_credentials {
        0 => Vec::new(),
        on => vec![(libc::SOL_SOCKET, libc::SO_PASSCRED, on)],
    };
    let queued = match contents {
        false => Vec::new(),
        true => match peek(ours, kind).map_err(failed)? {
            Ok(queued) => queued,
            Err(refusal) => return Ok(Err(refusal)),
        },
    };
    Ok(Ok(UnixImage { kind, inode, peer, queued, options }))
}

/// Copies what is queued, and leaves it there.
fn peek(ours: &OwnedFd, kind: i32) -> io::Result<Result<Vec<Vec<u8>>, Refusal>> {
    let before = socket::option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
    let peeked = peek_from_the_start(ours, kind);
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before)?;
    peeked
}

fn peek_from_the_start(ours: &OwnedFd, kind: i32) -> io::Result<Result<Vec<Vec<u8>>, Refusal>> {
    let mut queued: Vec<Vec<u8>> = Vec::new();
    let mut total = 0;
    let mut buffer = vec![0; MESSAGE_LIMIT];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 253]);
    for _ in 0..MESSAGES_LIMIT {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let mut into = [IoSliceMut::new(&mut buffer)];
        let got = match recvmsg::<UnixAddr>(ours.as_raw_fd(), &mut into, Some(&mut control), flags) {
            Err(Errno::EAGAIN) => return Ok(Ok(queued)),
            got => got?,
        };
        let mut passes_descriptors = false;
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = message {
                passes_descriptors = true;
                for descriptor in descriptors {
                    // Peeking has made a duplicate of it here.
                    let _ = nix::unistd::close(descriptor);
                }
            }
        }
        if passes_descriptors {
            let remedy = "try again when the program has read them";
            return Ok(Err(("a unix socket with descriptors in its queue".into(), remedy)));
        }
        let bytes = got.bytes;
        if bytes == 0 && kind == libc::SOCK_STREAM {
            return Ok(Ok(queued)); // the other end is closed, and all was seen
        }
        total += bytes;
        if total > QUEUE_LIMIT {
            break;
        }
        match queued.last_mut() {
            Some(all) if kind == libc::SOCK_STREAM => all.extend_from_slice(&buffer[..bytes]),
            _ => queued.push(buffer[..bytes].to_vec()),
        }
    }
    Ok(Err(("a unix socket with a very long queue".into(), "try again when the program has read from it")))
}

/// Puts `queued` into the queue of the socket whose other end is `peer`.
pub fn fill(peer: &OwnedFd, queued: &[Vec<u8>]) -> io::Result<()> {
    for message in queued {
        let mut rest = message.as_slice();
        loop {
            let sent = sendmsg::<UnixAddr>(
                peer.as_raw_fd(),
                &[IoSlice::new(rest)],
                &[],
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                None,
            )?;
            rest = &rest[sent.min(rest.len())..];
            if rest.is_empty() {
                break;
            }
        }
    }
    Ok(())
}
