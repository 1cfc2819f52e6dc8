//! TCP connections at the destination: made again inside the instance's network namespace while its port is down,
//! and let go when it is up.
//!
//! ```text
//!   restore   repair mode on: numbers, names, options, queues, phase, windows
//!             what was sent stands in the queue as sent, the rest behind it, held back by a closed window
//!   (commit)  the port comes up
//!   resume    repair mode off: the kernel asks the peer what it has
//!   repeat    what the peer doesn't have is sent again
//! ```
//!
//! A restored socket knows no round-trip time and would wait seconds before it repeats a segment, so its first
//! segments are repeated from here. The peer's lost segments are the source's business (see [`crate::sys::packet::Holder`]).

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::{
    TraceeError,
    image::Buffers,
    segment::{Segment, socket_address},
    sockets,
    tcp::{Connection, Phase, QUEUE_LIMIT},
};
use crate::sys::{
    packet, socket,
    tcp::{self, Queue, Queued, Repair, Window},
};

/// Segments that are sent again at once: what a new connection may send before the first acknowledgement
/// (RFC 6928).
const REPEATED_SEGMENTS: usize = 10;
/// Between two passes: a round trip between hosts that are near.
const REPEATING_PAUSE: Duration = Duration::from_millis(2);
/// Enough for some megabytes. By then the kernel knows the round-trip time, and its own time-outs are short.
const REPEATING_PASSES: u32 = 10;
/// Bytes that are written to a queue in one call.
const CHUNK: usize = 64 << 10;
/// Memory that the kernel takes at most for a byte in a queue, roughly, and for a queue at all.
const QUEUE_OVERHEAD: (usize, usize) = (4, 1 << 20);
/// The largest `TCP_MAXSEG` that the kernel takes (`MAX_TCP_WINDOW`).
const LARGEST_CHOSEN_SEGMENT: u32 = 32767;
const BOTH_BUFFERS: i32 = 3;
/// How long a segment that is put in locally may take.
const LOCAL: Duration = Duration::from_millis(200);

/// Raw IP sockets of the instance's network namespace.
#[derive(Debug, Default)]
pub struct RawSockets {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
}

impl RawSockets {
    /// Makes those that `connections` need, by `make`, which gets the address family.
    pub fn for_connections<'a>(
        connections: impl Iterator<Item = &'a Connection>,
        mut make: impl FnMut(i32) -> Result<OwnedFd, TraceeError>,
    ) -> Result<Self, TraceeError> {
        let mut raw = Self::default();
        for connection in connections.filter(|c| c.phase != Phase::Established || c.sent() > 0) {
            match socket_address(&connection.peer) {
                Some(SocketAddr::V4(_)) if raw.v4.is_none() => raw.v4 = Some(make(libc::AF_INET)?),
                Some(SocketAddr::V6(_)) if raw.v6.is_none() => raw.v6 = Some(make(libc::AF_INET6)?),
                _ => {}
            }
        }
        Ok(raw)
    }

    fn send(&self, segment: Segment<'_>) -> io::Result<()> {
        let raw = if segment.to.is_ipv4() { &self.v4 } else { &self.v6 };
        let raw = raw.as_ref().ok_or_else(|| io::Error::other("there is no raw socket of this family"))?;
        packet::send_ip(raw, &segment.to_packet(), segment.to.ip())
    }
}

/// Refuses what no source sends: the image comes from another host.
pub fn validate(domain: i32, connection: &Connection) -> Result<(), String> {
    let family = |name: &[u8]| name.first_chunk().map(|bytes| i32::from(u16::from_ne_bytes(*bytes)));
    for (whose, name) in [("own", &connection.local), ("peer's", &connection.peer)] {
        let understood = socket_address(name).is_some_and(|address| address.port() != 0);
        if !understood || family(name) != Some(domain) {
            return Err(format!("its {whose} address is no address of family {domain}"));
        }
    }
    let (local, peer) = (socket_address(&connection.local), socket_address(&connection.peer));
    if local.map(|address| address.is_ipv4()) != peer.map(|address| address.is_ipv4()) {
        return Err("its addresses are of different families".into());
    }
    let bytes = connection.send_queue.len().saturating_add(connection.receive_queue.len());
    if bytes > QUEUE_LIMIT {
        return Err(format!("its queues hold {bytes} bytes, and the limit is {QUEUE_LIMIT}"));
    }
    if connection.unsent as usize > connection.send_queue.len() {
        return Err("it has more unsent bytes than bytes".into());
    }
    if connection.phase == Phase::FinWait2 && !connection.send_queue.is_empty() {
        return Err("its stream is acknowledged, and not all of its bytes are".into());
    }
    let agreed = &connection.agreed;
    if agreed.window_scale.is_some_and(|(theirs, ours)| theirs > 14 || ours > 14) {
        return Err("its window scale is above 14".into());
    }
    if !(1..=u32::from(u16::MAX)).contains(&agreed.mss) {
        return Err(format!("its segment size is {}", agreed.mss));
    }
    Ok(())
}

/// A restored connection that waits, in repair mode, for the port to come up.
#[derive(Debug)]
pub struct Waiting {
    ours: OwnedFd,
    from: SocketAddr,
    to: SocketAddr,
    /// `SO_REUSEADDR` and `TCP_NODELAY`, to be set when repair mode is off.
    reuse: i32,
    no_delay: i32,
    quick: i32,
    /// What was sent and may be lost, and where it begins; `end` when the end of the stream belongs to it.
    sent: Vec<u8>,
    sequence: u32,
    end: bool,
    has_unsent: bool,
    acknowledged: u32,
    window: u16,
    timestamps: bool,
}

fn at(what: &'static str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Makes `connection` in the new socket behind `ours`, whose plain options are set.
///
/// # Errors
/// What the kernel refuses, and any difference between what was to be queued and what is.
pub fn restore(
    ours: OwnedFd,
    connection: &Connection,
    buffers: Buffers,
    raw: &RawSockets,
) -> io::Result<Waiting> {
    let (from, to) = match (socket_address(&connection.local), socket_address(&connection.peer)) {
        (Some(from), Some(to)) => (from, to),
        _ => return Err(io::Error::other("a connection without addresses")),
    };
    let option = |name| socket::option(&ours, libc::IPPROTO_TCP, name);
    let reuse = socket::option(&ours, libc::SOL_SOCKET, libc::SO_REUSEADDR).map_err(at("SO_REUSEADDR"))?;
    let no_delay = option(libc::TCP_NODELAY).map_err(at("TCP_NODELAY"))?;
    tcp::repair(&ours, Repair::On).map_err(at("TCP_REPAIR"))?;
    if from.port() != 0 {
        socket::bind(&ours, &connection.local).map_err(at("bind"))?;
    }
    tcp::set_sequence(&ours, Queue::Receive, connection.receive_start()).map_err(at("TCP_QUEUE_SEQ"))?;
    tcp::set_sequence(&ours, Queue::Send, connection.send_start()).map_err(at("TCP_QUEUE_SEQ"))?;
    // Without it the kernel would take the smallest segments for all of the connection's life: it looks at what the
    // peer takes only now. It is no choice of the program's, and is taken back.
    let largest = connection.agreed.mss.min(LARGEST_CHOSEN_SEGMENT) as i32;
    let segment = |size| socket::set_option(&ours, libc::IPPROTO_TCP, libc::TCP_MAXSEG, size);
    // One too small to be chosen is used all the same.
    let chosen = segment(largest).is_ok();
    socket::connect(&ours, &connection.peer).map_err(at("connect"))?;
    let from = socket_address(&socket::local_name(&ours)?).unwrap_or(from);
    if chosen {
        segment(0).map_err(at("TCP_MAXSEG"))?;
    }
    tcp::set_agreed(&ours, &connection.agreed).map_err(at("TCP_REPAIR_OPTIONS"))?;
    if connection.agreed.timestamps {
        // The kernel rounds down, and a clock that goes back makes the peer drop segments (RFC 7323, section 5).
        let clock = connection.timestamp.wrapping_add(2) as i32;
        socket::set_option(&ours, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP, clock)
            .map_err(at("TCP_TIMESTAMP"))?;
    }
    make_room(&ours, connection).map_err(at("making room for the queues"))?;
    tcp::select_queue(&ours, Queue::Receive)?;
    write_all(&ours, &connection.receive_queue).map_err(at("filling the receive queue"))?;
    let (sent, unsent) = connection.send_queue.split_at(connection.sent());
    tcp::select_queue(&ours, Queue::Send)?;
    write_all(&ours, sent).map_err(at("filling the send queue"))?;
    tcp::set_window(&ours, &provisional(connection)).map_err(at("TCP_REPAIR_WINDOW"))?;
    let peer = Peer { ours: &ours, connection, raw, from: to, to: from };
    if connection.phase == Phase::Closing || !connection.phase.received_end() {
        end_stream(&ours, connection, unsent)?;
        peer.advance()?;
    } else {
        peer.advance()?;
        end_stream(&ours, connection, unsent)?;
    }
    tcp::set_window(&ours, &connection.window).map_err(at("TCP_REPAIR_WINDOW"))?;
    if connection.reading_ended {
        nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&ours), nix::sys::socket::Shutdown::Read)
            .map_err(|error| at("SHUT_RD")(error.into()))?;
    }
    sockets::set_buffers(&ours, buffers, BOTH_BUFFERS).map_err(at("SO_SNDBUF, SO_RCVBUF"))?;
    compare(&ours, connection)?;
    let window = connection.window;
    let left = window.receive_at.wrapping_add(window.receive).wrapping_sub(connection.receive_sequence);
    let scale = connection.agreed.window_scale.map_or(0, |(_, ours)| ours);
    Ok(Waiting {
        from,
        to,
        reuse,
        no_delay,
        quick: connection.quick_acknowledgements.into(),
        sent: sent.to_vec(),
        sequence: connection.send_start(),
        end: unsent.is_empty()
            && matches!(connection.phase, Phase::FinWait1 | Phase::LastAck | Phase::Closing),
        has_unsent: !unsent.is_empty(),
        acknowledged: connection.receive_sequence,
        // The end of a stream may lie behind a window that is full.
        window: (left.cast_signed().max(0) >> scale).min(u16::MAX.into()) as u16,
        timestamps: connection.agreed.timestamps,
        ours,
    })
}

/// Queues may hold more than a socket's buffers allow: what was received counts differently.
fn make_room(ours: &OwnedFd, connection: &Connection) -> io::Result<()> {
    let bytes = connection.send_queue.len().max(connection.receive_queue.len());
    let room = bytes.saturating_mul(QUEUE_OVERHEAD.0).saturating_add(QUEUE_OVERHEAD.1);
    let room = i32::try_from(room).unwrap_or(i32::MAX);
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room)?;
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, room)
}

/// Writes what was not sent behind what was, and the end of the stream behind both. Nothing of it may count as
/// sent: the peer would be taken to have lost it, and more than its window allows would be on the way.
fn end_stream(ours: &OwnedFd, connection: &Connection, unsent: &[u8]) -> io::Result<()> {
    let shut = || {
        if !connection.phase.ended() {
            return Ok(());
        }
        nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(ours), nix::sys::socket::Shutdown::Write)
            .map_err(|error| at("SHUT_WR")(error.into()))
    };
    if unsent.is_empty() {
        // The send queue is selected, so that the end of the stream counts as sent.
        return shut();
    }
    tcp::set_window(ours, &provisional(connection)).map_err(at("TCP_REPAIR_WINDOW"))?;
    tcp::repair(ours, Repair::OffSilently).map_err(at("TCP_REPAIR"))?;
    write_all(ours, unsent).map_err(at("writing what was not sent"))?;
    shut()?;
    tcp::repair(ours, Repair::On).map_err(at("TCP_REPAIR"))
}

/// The windows while a connection is being made: what was sent fills the peer's, and ours takes the end of its stream.
fn provisional(connection: &Connection) -> Window {
    let send = connection.sent() as u32;
    let received = connection.receive_start().wrapping_add(connection.receive_queue.len() as u32);
    Window {
        update_at: received,
        send,
        send_max: connection.window.send_max.max(send),
        receive: u16::MAX.into(),
        receive_at: received,
    }
}

fn write_all(ours: &OwnedFd, mut data: &[u8]) -> io::Result<()> {
    let mut chunk = CHUNK;
    while !data.is_empty() {
        match tcp::write(ours, &data[..chunk.min(data.len())]) {
            Ok(0) => return Err(io::Error::other("the kernel takes no more")),
            Ok(taken) => data = &data[taken..],
            // Memory in one piece is short.
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && chunk > 1024 => chunk /= 2,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The other side of a connection, as far as it has to be played: what it did before can't be set, only received.
struct Peer<'a> {
    ours: &'a OwnedFd,
    connection: &'a Connection,
    raw: &'a RawSockets,
    from: SocketAddr,
    to: SocketAddr,
}

impl Peer<'_> {
    /// Ends its stream, or acknowledges ours, if the connection has come so far.
    fn advance(&self) -> io::Result<()> {
        let connection = self.connection;
        let end = connection.phase.received_end();
        if !end && connection.phase != Phase::FinWait2 {
            return Ok(());
        }
        let sequence = connection.receive_start().wrapping_add(connection.receive_queue.len() as u32);
        let acknowledged = if end { connection.send_start() } else { connection.send_sequence };
        let scale = connection.agreed.window_scale.map_or(0, |(theirs, _)| theirs);
        let window = (connection.window.send >> scale).min(u16::MAX.into()) as u16;
        let (from, to) = (self.from, self.to);
        let segment = Segment { from, to, sequence, acknowledged, window, timestamp: None, end, data: &[] };
        self.raw.send(segment).map_err(at("sending in the peer's name"))?;
        let deadline = Instant::now() + LOCAL;
        loop {
            let state = socket::tcp_info(self.ours)?.state;
            // LAST_ACK comes later, by our own end.
            let wanted = if connection.phase == Phase::LastAck { Phase::CloseWait } else { connection.phase };
            if state == wanted as u8 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!(
                    "it stays in state {state} and does not come to {wanted:?}"
                )));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// What was made must be what was wanted.
fn compare(ours: &OwnedFd, connection: &Connection) -> io::Result<()> {
    let state = socket::tcp_info(ours)?.state;
    let end = u32::from(connection.phase.ended() && connection.phase != Phase::FinWait2);
    let wanted = Queued {
        received: connection.receive_queue.len() as u32,
        unacknowledged: connection.send_queue.len() as u32 + end,
        unsent: connection.unsent + if connection.unsent > 0 { end } else { 0 },
    };
    let made = tcp::queued(ours)?;
    if state != connection.phase as u8 || made != wanted {
        let phase = connection.phase;
        return Err(io::Error::other(format!(
            "state {state} with {made:?} instead of {phase:?} with {wanted:?}"
        )));
    }
    let sequences = [tcp::sequence(ours, Queue::Send)?, tcp::sequence(ours, Queue::Receive)?];
    if sequences != [connection.send_sequence, connection.receive_sequence] {
        return Err(io::Error::other("the sequence numbers are others"));
    }
    Ok(())
}

impl Waiting {
    /// Receives the acknowledgement of the end of its stream, which is the last thing that `connection` waits for.
    pub(super) fn come_to_an_end(self, connection: &Connection, raw: &RawSockets) -> io::Result<()> {
        const TCP_CLOSE: u8 = 7;
        raw.send(Segment {
            from: self.to,
            to: self.from,
            sequence: connection.receive_sequence,
            acknowledged: connection.send_sequence,
            window: u16::MAX,
            timestamp: None,
            end: false,
            data: &[],
        })?;
        let deadline = Instant::now() + LOCAL;
        loop {
            let state = socket::tcp_info(&self.ours)?.state;
            if state == TCP_CLOSE {
                break;
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("it stays in state {state} and does not end")));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        tcp::repair(&self.ours, Repair::OffSilently).map_err(at("TCP_REPAIR"))?;
        socket::set_option(&self.ours, libc::SOL_SOCKET, libc::SO_REUSEADDR, self.reuse)?;
        let waiting = socket::bytes_waiting(&self.ours)?;
        if waiting != connection.receive_queue.len() {
            return Err(io::Error::other(format!("{waiting} bytes are to be read, and not all")));
        }
        Ok(())
    }

    /// Lets the connection go on; the port is up.
    fn resume(&self) -> io::Result<()> {
        let tcp_option = |name, value| socket::set_option(&self.ours, libc::IPPROTO_TCP, name, value);
        tcp::repair(&self.ours, Repair::Off).map_err(at("TCP_REPAIR"))?;
        socket::set_option(&self.ours, libc::SOL_SOCKET, libc::SO_REUSEADDR, self.reuse)?;
        tcp_option(libc::TCP_QUICKACK, self.quick)?;
        if self.has_unsent {
            // Setting this makes the kernel send what it has.
            tcp_option(libc::TCP_NODELAY, 1)?;
            tcp_option(libc::TCP_NODELAY, self.no_delay)?;
        }
        Ok(())
    }

    /// Sends again the first `limit` segments of what the peer has not acknowledged; `false` when it has all.
    fn repeat(&self, raw: &RawSockets, limit: usize) -> io::Result<bool> {
        let acknowledged = tcp::acknowledged(&self.ours)?.min(u32::MAX.into()) as usize;
        if acknowledged >= self.sent.len() + usize::from(self.end) {
            return Ok(false);
        }
        let size = socket::tcp_info(&self.ours)?.segment_bytes.max(1) as usize;
        let clock = socket::option(&self.ours, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP)? as u32;
        let mut offset = acknowledged.min(self.sent.len());
        for _ in 0..limit {
            let data = &self.sent[offset..self.sent.len().min(offset + size)];
            let end = self.end && offset + data.len() == self.sent.len();
            raw.send(Segment {
                from: self.from,
                to: self.to,
                sequence: self.sequence.wrapping_add(offset as u32),
                acknowledged: self.acknowledged,
                window: self.window,
                timestamp: self.timestamps.then_some(clock),
                end,
                data,
            })?;
            offset += data.len();
            if offset == self.sent.len() {
                break;
            }
        }
        Ok(true)
    }
}

/// All restored connections of an instance.
#[derive(Debug, Default)]
pub struct Reconnected {
    /// The raw sockets that they need.
    pub raw: RawSockets,
    /// The connections.
    pub waiting: Vec<Waiting>,
}

impl Reconnected {
    /// Lets all go on; the port is up. One that fails does not stop the others: the instance runs here now, come what
    /// may. What remains are those of which something may be lost.
    pub fn resume(&mut self) {
        for waiting in &self.waiting {
            if let Err(error) = waiting.resume() {
                tracing::error!(local = %waiting.from, peer = %waiting.to, %error, "a TCP connection stays behind");
            }
        }
        self.waiting.retain(|waiting| !waiting.sent.is_empty() || waiting.end);
    }

    /// Sends again what got lost on its way, after the peers had time to tell what they have. Doubles what it sends
    /// with each pass, as the kernel does; what it does not finish is left to the kernel.
    pub fn repeat_lost(mut self) {
        let mut limit = REPEATED_SEGMENTS;
        for _ in 0..REPEATING_PASSES {
            if self.waiting.is_empty() {
                return;
            }
            std::thread::sleep(REPEATING_PAUSE);
            let raw = &self.raw;
            // Dropped one by one: as long as a duplicate is here, the program's close sends nothing.
            self.waiting.retain(|waiting| match waiting.repeat(raw, limit) {
                Ok(goes_on) => goes_on,
                Err(error) => {
                    tracing::debug!(peer = %waiting.to, %error, "what got lost is left to the kernel");
                    false
                }
            });
            limit *= 2;
        }
    }
}
