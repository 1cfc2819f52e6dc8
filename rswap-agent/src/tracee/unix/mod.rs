//! Unix sockets: pairs, connections, listening ones and datagrams, with names and without, with what waits in their queues.
//!
//! ```text
//!   source       diag      who is connected to whom, who waits to be accepted (sock_diag(7))
//!                describe  one socket
//!                queue     what waits in it: bytes, messages, credentials, descriptors
//!   destination  make      all sockets of the instance, before the first process is rebuilt
//!                names     binding under a name that is still the source's
//! ```

mod describe;
mod diag;
mod make;
mod names;
mod queue;

use serde::{Deserialize, Serialize};

pub use self::diag::{Peers, named_files};
pub(super) use self::{
    describe::describe,
    make::{Maker, Wanted, finish},
    names::Binding,
    queue::fill,
};
use super::tcp;

/// One unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixImage {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    /// Its inode at the source.
    pub inode: u64,
    /// Its name as the kernel tells it: a path, or a zero byte and an abstract name; empty without one.
    pub name: Vec<u8>,
    /// The file of its name, if that is still there.
    pub file: Option<SocketFile>,
    /// What it does.
    pub state: UnixState,
    /// `SO_PEERCRED`.
    pub peer_credentials: Identity,
    /// What waits to be read here.
    pub queued: Vec<Message>,
    /// Options as (level, name, value).
    pub options: Vec<(i32, i32, i32)>,
    /// How long it waits to read and to write (`SO_RCVTIMEO`, `SO_SNDTIMEO`), as the kernel tells it; empty for ever.
    pub timeouts: [Vec<u8>; 2],
    /// Its send buffer, as the kernel tells it.
    pub send_buffer: i32,
    /// Bits 1: it reads no more, 2: it writes no more.
    pub shutdown: u8,
}

impl UnixImage {
    /// Whether descriptors wait in its queue.
    pub(super) fn passes_descriptors(&self) -> bool {
        self.queued.iter().any(|message| !message.descriptors.is_empty())
    }
}

/// What a unix socket does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixState {
    /// Nothing: it has no peer.
    Alone,
    /// Listening.
    Listening {
        /// The queue's length.
        backlog: u32,
        /// Who waits to be accepted, in their order, by inode.
        waiting: Vec<u64>,
    },
    /// It has a peer with this inode.
    Connected {
        /// The peer's.
        peer: u64,
    },
    /// It waits to be accepted.
    Waiting,
    /// Its peer is closed.
    Orphan,
    /// A datagram socket whose peer outside of the instance has this name.
    Outside {
        /// The peer's name.
        peer: Vec<u8>,
    },
}

/// The file of a socket's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFile {
    /// Its absolute path.
    pub path: String,
    /// Its device and inode at the source.
    pub inode: (u64, u64),
    /// Permissions, user and group.
    pub access: (u32, u32, u32),
}

/// A process as others are told of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its pid in the instance's namespace; 0 for one that has ended, or is outside.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// What was sent at once; of a stream, what has the same sender.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its bytes.
    #[serde(with = "tcp::bytes")]
    pub data: Vec<u8>,
    /// The name that it was sent from.
    pub from: Vec<u8>,
    /// Who sent it, if the receiver wants to know.
    pub sender: Option<Identity>,
    /// Descriptors that are passed with it, under the numbers that they have in the process that holds the socket
    /// (see [`super::descriptors::in_flight`]).
    pub descriptors: Vec<i32>,
}

/// A name as the bytes of a `struct sockaddr_un`.
fn address(name: &[u8]) -> Vec<u8> {
    let mut address = (libc::AF_UNIX as libc::sa_family_t).to_ne_bytes().to_vec();
    address.extend(name);
    address
}
