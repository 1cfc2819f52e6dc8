//! TCP connections at the source: what can be carried, and how they are taken.
//!
//! ```text
//!   describe    by reading only: what state, is anything in the way
//!   take        instance frozen, port down: repair mode on
//!   read        queues and numbers copied
//!   release     the migration failed: repair mode off, the connection goes on here
//!   (dropped)   the migration was committed: the socket ends in repair mode, and sends nothing
//! ```
//!
//! In repair mode a socket still answers what comes in, which is why the port has to be down. A connection of
//! the instance to itself goes over its own loopback, which stays up: a filter keeps its segments away, so that
//! neither end changes after it was copied.

use std::{io, os::fd::OwnedFd};

use serde::{Deserialize, Serialize};

use super::{
    TraceeError,
    capture::link,
    image::{Descriptor, DescriptorKind, SocketState},
    segment::socket_address,
};
use crate::sys::{
    filter, process, socket,
    tcp::{self, Agreed, Queue, Repair, Window},
};

/// Bytes of all queues of an instance that are carried. With the rest of the image they must fit a frame, whose
/// limit is [`crate::migrate::wire::Tag::Image`]'s.
pub const QUEUE_LIMIT: usize = 48 << 20;

/// The head of the send queue may hold bytes that are acknowledged already: of one segment, at most.
const SEGMENT_LIMIT: usize = 1 << 16;

const TCPI_OPT_TIMESTAMPS: u8 = 1;
const TCPI_OPT_SACK: u8 = 2;
const TCPI_OPT_WSCALE: u8 = 4;

/// Where a connection stands (RFC 9293, section 3.3.2); the numbers are the kernel's (include/net/tcp_states.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Open in both directions.
    Established = 1,
    /// Our end of the stream was written, the peer has not acknowledged it.
    FinWait1 = 4,
    /// It has; it still sends.
    FinWait2 = 5,
    /// The peer's stream has ended.
    CloseWait = 8,
    /// And ours, which the peer has not acknowledged.
    LastAck = 9,
    /// Both streams have ended at the same time.
    Closing = 11,
}

impl Phase {
    fn from_kernel(state: u8) -> Option<Self> {
        let all = [
            Self::Established,
            Self::FinWait1,
            Self::FinWait2,
            Self::CloseWait,
            Self::LastAck,
            Self::Closing,
        ];
        all.into_iter().find(|phase| *phase as u8 == state)
    }

    /// The peer's end of the stream has come.
    pub fn received_end(self) -> bool {
        matches!(self, Self::CloseWait | Self::LastAck | Self::Closing)
    }

    /// The program has ended its own stream.
    pub fn ended(self) -> bool {
        matches!(self, Self::FinWait1 | Self::FinWait2 | Self::LastAck | Self::Closing)
    }
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Where it stands.
    pub phase: Phase,
    /// Its own address, the kernel's bytes (`struct sockaddr_in` or `sockaddr_in6`).
    pub local: Vec<u8>,
    /// The peer's.
    pub peer: Vec<u8>,
    /// Sequence number after the last byte that was written, the end of the stream included.
    pub send_sequence: u32,
    /// Sequence number after the last byte that was received, the end of the stream included.
    pub receive_sequence: u32,
    /// Written and not acknowledged.
    #[serde(with = "bytes")]
    pub send_queue: Vec<u8>,
    /// How many bytes at the end of it were not sent yet.
    pub unsent: u32,
    /// Received and not read.
    #[serde(with = "bytes")]
    pub receive_queue: Vec<u8>,
    /// What was agreed at its beginning.
    pub agreed: Agreed,
    /// The clock of its timestamps.
    pub timestamp: u32,
    /// Both windows.
    pub window: Window,
    /// The program reads no more (`SHUT_RD`).
    pub reading_ended: bool,
    /// `TCP_QUICKACK`, as the kernel has it at the moment.
    pub quick_acknowledgements: bool,
}

impl Connection {
    fn described(phase: Phase, local: Vec<u8>, peer: Vec<u8>) -> Self {
        Self {
            phase,
            local,
            peer,
            send_sequence: 0,
            receive_sequence: 0,
            send_queue: Vec::new(),
            unsent: 0,
            receive_queue: Vec::new(),
            agreed: Agreed::default(),
            timestamp: 0,
            window: Window::default(),
            reading_ended: false,
            quick_acknowledgements: true,
        }
    }

    /// Whether its segments may never leave the instance, and so don't stop with the port.
    fn is_to_itself(&self) -> bool {
        match (socket_address(&self.local), socket_address(&self.peer)) {
            (Some(local), Some(peer)) => {
                local.ip() == peer.ip() || local.ip().is_loopback() || peer.ip().is_loopback()
            }
            _ => true,
        }
    }

    /// How much of the send queue was sent, in bytes.
    pub fn sent(&self) -> usize {
        self.send_queue.len().saturating_sub(self.unsent as usize)
    }

    /// Sequence number of the first byte of the send queue, or of what follows when it is empty.
    pub fn send_start(&self) -> u32 {
        self.send_sequence.wrapping_sub(self.phase.ended().into()).wrapping_sub(self.send_queue.len() as u32)
    }

    /// Sequence number of the first byte of the receive queue, or of what follows when it is empty.
    pub fn receive_start(&self) -> u32 {
        let end = self.receive_sequence.wrapping_sub(self.phase.received_end().into());
        end.wrapping_sub(self.receive_queue.len() as u32)
    }
}

/// What [`describe`] finds: the state to be carried, or what stands against it and what would help.
pub type Described = Result<SocketState, (String, &'static str)>;

/// What a TCP socket that neither listens nor is closed does, by reading only.
pub fn describe(ours: &OwnedFd, state: u8, pid: i32) -> Result<Described, TraceeError> {
    let call = TraceeError::call;
    let own_network = link(pid, "ns/net")? != link(std::process::id() as i32, "ns/net")?;
    if !own_network {
        return Ok(Ok(SocketState::Disconnected));
    }
    let Some(phase) = Phase::from_kernel(state) else {
        return Ok(Err((
            "a TCP connection that is being made".into(),
            "it is a matter of moments, or the other side doesn't answer: try again",
        )));
    };
    let int = |level, name| socket::option(ours, level, name).unwrap_or(0);
    let refused = if int(libc::SOL_SOCKET, libc::SO_PROTOCOL) != libc::IPPROTO_TCP {
        Some(("a multipath TCP connection", "only plain TCP is carried in this version"))
    } else if socket::option_bytes(ours, libc::IPPROTO_TCP, libc::TCP_ULP, 16)
        .is_ok_and(|name| !name.is_empty())
    {
        Some(("a TCP connection with a protocol in the kernel (TLS)", "switch kernel TLS off"))
    } else if int(libc::SOL_SOCKET, libc::SO_ZEROCOPY) != 0 {
        Some(("a TCP connection with zero-copy sends (SO_ZEROCOPY)", "switch them off"))
    } else if filter::is_attached(ours) {
        Some(("a TCP connection with a socket filter", "filters aren't carried in this version"))
    } else if tcp::has_urgent_data(ours) {
        Some(("a TCP connection with urgent data", "it isn't carried in this version: try again"))
    } else {
        None
    };
    if let Some((what, remedy)) = refused {
        return Ok(Err((what.into(), remedy)));
    }
    let local = socket::local_name(ours).map_err(call("getsockname", pid))?;
    let peer = match socket::peer_name(ours) {
        Ok(peer) => peer,
        // It ended since its state was read.
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => return Ok(Ok(SocketState::Idle)),
        Err(error) => return Err(call("getpeername", pid)(error)),
    };
    if has_scope(&local) || has_scope(&peer) {
        let remedy = "its meaning is the host's: use an address of global scope";
        return Ok(Err(("a TCP connection with a link-local address".into(), remedy)));
    }
    Ok(Ok(SocketState::Connected(Box::new(Connection::described(phase, local, peer)))))
}

/// Whether a `struct sockaddr_in6` names an interface.
fn has_scope(name: &[u8]) -> bool {
    name.get(24..28).is_some_and(|scope| scope != [0; 4])
}

/// Refuses more queued bytes than the image has room for.
pub fn require_room(bytes: usize) -> Result<(), TraceeError> {
    if bytes <= QUEUE_LIMIT {
        return Ok(());
    }
    Err(TraceeError::Unsupported(format!(
        "{bytes} bytes wait in the queues of TCP connections, and {QUEUE_LIMIT} can be carried: try again when less waits"
    )))
}

/// The connection of a descriptor that has one, with the descriptor's number.
pub fn connection(descriptor: &Descriptor) -> Option<(i32, &Connection)> {
    let DescriptorKind::Socket(image) = &descriptor.kind else { return None };
    let SocketState::Connected(connection) = &image.state else { return None };
    Some((descriptor.numbers.first()?.0, connection))
}

/// The connections of a frozen instance, in repair mode as long as they are not released.
///
/// Dropping it closes only the duplicates: the program's sockets stay in repair mode, so that they end without a
/// word when the program does.
#[derive(Debug, Default)]
pub struct Held {
    sockets: Vec<HeldSocket>,
    bytes: usize,
}

#[derive(Debug)]
struct HeldSocket {
    /// Whose it is, and under which number.
    pid: i32,
    fd: i32,
    ours: OwnedFd,
    /// `SO_REUSEADDR`, which repair mode replaces.
    reuse: i32,
}

impl Held {
    /// Takes the connections among `descriptors` of stopped process `pid`. After a failure, what was taken is still
    /// held, and must be released.
    pub fn take(&mut self, pid: i32, descriptors: &[Descriptor]) -> Result<(), TraceeError> {
        let pidfd = process::pidfd_open(pid).map_err(TraceeError::call("pidfd_open", pid))?;
        for (fd, connection) in descriptors.iter().filter_map(connection) {
            let ours = process::pidfd_getfd(&pidfd, fd).map_err(TraceeError::call("pidfd_getfd", pid))?;
            let reuse = socket::option(&ours, libc::SOL_SOCKET, libc::SO_REUSEADDR)
                .map_err(TraceeError::call("SO_REUSEADDR", pid))?;
            if connection.is_to_itself() {
                filter::take_nothing(&ours).map_err(TraceeError::call("SO_ATTACH_FILTER", pid))?;
            }
            let repaired = tcp::repair(&ours, Repair::On);
            self.sockets.push(HeldSocket { pid, fd, ours, reuse });
            repaired.map_err(TraceeError::call("TCP_REPAIR", pid))?;
        }
        Ok(())
    }

    /// Completes the images of what was taken. The connections of all processes have to be taken before: a segment
    /// between two of them must not change one end after the other was read.
    pub fn read(&mut self, pid: i32, descriptors: &mut [Descriptor]) -> Result<(), TraceeError> {
        let mut held = self.sockets.iter().filter(|socket| socket.pid == pid);
        for descriptor in descriptors {
            let Some((fd, _)) = connection(descriptor) else { continue };
            let DescriptorKind::Socket(image) = &mut descriptor.kind else { continue };
            let SocketState::Connected(connection) = &mut image.state else { continue };
            // Both are in the same order.
            let not_taken =
                || TraceeError::Unsupported(format!("descriptor {fd} of process {pid} was not taken"));
            let socket = held.find(|socket| socket.fd == fd).ok_or_else(not_taken)?;
            dump(&socket.ours, connection)
                .map_err(TraceeError::call("reading a TCP connection", pid))?
                .map_err(|problem| {
                    let what = format!("descriptor {fd} of process {pid}: a TCP connection");
                    TraceeError::Unsupported(format!("{what} {problem}"))
                })?;
            self.bytes += connection.send_queue.len() + connection.receive_queue.len();
            require_room(self.bytes)?;
        }
        Ok(())
    }

    /// Lets the connections go on where they are. The port must be up: each peer is asked what it has.
    pub fn release(&mut self) {
        for HeldSocket { ours, reuse, .. } in self.sockets.drain(..) {
            let_go(&ours, reuse);
        }
        self.bytes = 0;
    }
}

/// Whether a socket is held, by this agent or one that was killed.
pub(super) fn is_held(ours: &OwnedFd) -> bool {
    tcp::is_in_repair(ours)
}

/// Takes a socket out of repair mode and gives it its `SO_REUSEADDR` back.
pub(super) fn let_go(ours: &OwnedFd, reuse: i32) {
    let released = filter::detach(ours)
        .and_then(|()| tcp::repair(ours, Repair::Off))
        .and_then(|()| socket::set_option(ours, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse));
    if let Err(error) = released {
        tracing::error!(%error, "a TCP connection could not be taken out of repair mode");
    }
}

/// Copies everything of a socket in repair mode. The inner error says what can't be carried.
fn dump(ours: &OwnedFd, connection: &mut Connection) -> io::Result<Result<(), String>> {
    let info = socket::tcp_info(ours)?;
    let Some(phase) = Phase::from_kernel(info.state) else {
        return Ok(Err("ended in the freeze: try again".into()));
    };
    connection.phase = phase;
    let has = |option| info.options & option != 0;
    connection.agreed = Agreed {
        // In repair mode this is what the peer announced, not what is used at the moment.
        mss: socket::option(ours, libc::IPPROTO_TCP, libc::TCP_MAXSEG)? as u32,
        window_scale: has(TCPI_OPT_WSCALE).then_some(info.window_scale),
        selective: has(TCPI_OPT_SACK),
        timestamps: has(TCPI_OPT_TIMESTAMPS),
    };
    connection.timestamp = socket::option(ours, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP)? as u32;
    connection.window = tcp::window(ours)?;
    connection.quick_acknowledgements = socket::option(ours, libc::IPPROTO_TCP, libc::TCP_QUICKACK)? != 0;
    connection.reading_ended = tcp::reading_ended(ours)? && !phase.received_end();

    let queued = tcp::queued(ours)?;
    connection.receive_sequence = tcp::sequence(ours, Queue::Receive)?;
    connection.receive_queue = tcp::peek_all(ours, queued.received as usize)?;
    if connection.receive_queue.len() != queued.received as usize {
        return Ok(Err(format!(
            "has {} bytes to be read of which {} can be copied",
            queued.received,
            connection.receive_queue.len()
        )));
    }
    connection.send_sequence = tcp::sequence(ours, Queue::Send)?;
    // The end of the stream is counted as a byte as long as it isn't acknowledged.
    let end = u32::from(phase.ended() && phase != Phase::FinWait2);
    let waiting = queued.unacknowledged.saturating_sub(end) as usize;
    let mut queue = if waiting > 0 { tcp::peek_all(ours, waiting + SEGMENT_LIMIT)? } else { Vec::new() };
    if queue.len() < waiting || queue.len() >= waiting + SEGMENT_LIMIT {
        return Ok(Err(format!("has {waiting} bytes to be acknowledged, and {} in its queue", queue.len())));
    }
    connection.send_queue = queue.split_off(queue.len() - waiting);
    connection.unsent = queued.unsent.saturating_sub(if queued.unsent > 0 { end } else { 0 });
    Ok(Ok(()))
}

/// Bytes as one piece: serde's way for a `Vec<u8>` goes byte by byte. The format is the same.
pub(crate) mod bytes {
    use serde::{
        Deserializer, Serializer,
        de::{SeqAccess, Visitor},
    };

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;

        impl<'de> Visitor<'de> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            // Formats for people have none but lists.
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u8>, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = list.next_element()? {
                    bytes.push(byte);
                }
                Ok(bytes)
            }
        }

        deserializer.deserialize_bytes(Bytes)
    }
}

#[cfg(test)]
mod tests;
