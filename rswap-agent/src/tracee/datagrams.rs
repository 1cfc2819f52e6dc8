//! Internet sockets without a stream: UDP with what waits in the queue, and raw and ping sockets with nothing in it.
//!
//! What waits was received: at the destination it is received again, as packets that are put in locally in the senders' names
//! (the port is down), and compared before the socket counts as made.

mod queue;
mod seen;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{OwnedFd, RawFd},
    time::{Duration, Instant},
};

use queue::Readers;
pub use queue::keep_in;
use serde::{Deserialize, Serialize};

use super::{
    TraceeError,
    capture::link,
    image::Buffers,
    memberships::{self, Membership},
    remote::Remote,
    segment::{self, socket_address},
    sockets, tcp,
};
use crate::sys::{filter, packet, socket};

/// Bytes that are carried of one queue.
const QUEUE_LIMIT: usize = 16 << 20;
/// How long packets that are put in locally may take.
const LOCAL: Duration = Duration::from_millis(500);
/// `IPPROTO_UDPLITE`'s and others' sockets look like UDP's.
const UDP: i32 = libc::IPPROTO_UDP;

/// Numbers that the libc crate does not name (include/uapi/linux/udp.h, icmp.h, in.h, in6.h).
const UDP_CORK: i32 = 1;
const UDP_ENCAP: i32 = 100;
const UDP_NO_CHECK6_TX: i32 = 101;
const UDP_NO_CHECK6_RX: i32 = 102;
const SOL_RAW: i32 = 255;
const ICMP_FILTER: i32 = 1;
const IP_MULTICAST_ALL: i32 = 49;
const IPV6_MULTICAST_ALL: i32 = 29;
const SO_NO_CHECK: i32 = 11;

/// Options that are set where they differ from a new socket's.
const OPTIONS: [(i32, i32); 40] = [
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_BROADCAST),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, SO_NO_CHECK),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL),
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_HDRINCL),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_IF),
    (libc::IPPROTO_IP, IP_MULTICAST_ALL),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (libc::IPPROTO_IPV6, IPV6_MULTICAST_ALL),
    (UDP, UDP_NO_CHECK6_TX),
    (UDP, UDP_NO_CHECK6_RX),
    (UDP, libc::UDP_SEGMENT),
    (UDP, libc::UDP_GRO),
];

/// Options that are no `int`, with their size in bytes; those that are all zeros are left as they are.
const OTHER_OPTIONS: [(i32, i32, usize); 4] = [
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO, 16),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO, 16),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16),
    (SOL_RAW, ICMP_FILTER, 4),
];

/// A socket of the internet families without a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatagramImage {
    /// `AF_INET` or `AF_INET6`.
    pub domain: i32,
    /// `SOCK_DGRAM` or `SOCK_RAW`.
    pub kind: i32,
    /// `SO_PROTOCOL`.
    pub protocol: i32,
    /// Options as (level, name, value).
    pub options: Vec<(i32, i32, i32)>,
    /// Options that are no `int`, as (level, name, the kernel's bytes).
    pub other_options: Vec<(i32, i32, Vec<u8>)>,
    /// Its buffers.
    pub buffers: Buffers,
    /// The address that it is bound to, the kernel's bytes; empty when it isn't.
    pub local: Vec<u8>,
    /// The address that it is connected to; empty when it isn't.
    pub peer: Vec<u8>,
    /// Multicast groups that it has joined.
    pub memberships: Vec<Membership>,
    /// What waits to be read.
    pub queued: Vec<Datagram>,
}

/// A datagram that waits to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Who sent it.
    pub from: SocketAddr,
    /// Where it was sent to.
    pub to: IpAddr,
    /// Its data.
    #[serde(with = "tcp::bytes")]
    pub data: Vec<u8>,
}

/// What [`describe`] finds, or what stands against it and what would help.
pub type Described = Result<DatagramImage, (String, &'static str)>;

/// A socket of `domain` and `kind` behind our duplicate of it; with `contents`, also what waits in it.
pub fn describe(
    ours: &OwnedFd,
    domain: i32,
    kind: i32,
    pid: i32,
    contents: bool,
) -> Result<Described, TraceeError> {
    let failed = |error| TraceeError::call("looking at a datagram socket", pid)(error);
    let int = |level, name| socket::option(ours, level, name).unwrap_or(0);
    let protocol = socket::option(ours, libc::SOL_SOCKET, libc::SO_PROTOCOL).map_err(failed)?;
    let is_udp = kind == libc::SOCK_DGRAM && protocol == UDP;
    let is_ping = kind == libc::SOCK_DGRAM && matches!(protocol, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6);
    let refuse = |what: String, remedy| Ok(Err((what, remedy)));
    if !is_udp && !is_ping && kind != libc::SOCK_RAW {
        let what = format!("a socket of family {domain}, type {kind} and protocol {protocol}");
        return refuse(what, "only TCP, UDP, raw and ping sockets are carried of the internet families");
    }
    let name = match (is_udp, is_ping) {
        (true, _) => "a UDP socket",
        (_, true) => "a ping socket",
        _ => "a raw socket",
    };
    if filter::is_attached(ours) {
        return refuse(format!("{name} with a filter"), "filters aren't carried in this version");
    }
    if is_udp && (int(UDP, UDP_CORK) != 0 || int(UDP, UDP_ENCAP) != 0) {
        return refuse(format!("{name} with UDP_CORK or UDP_ENCAP"), "switch them off");
    }
    if domain == libc::AF_INET6 && int(libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF) != 0 {
        return refuse(
            format!("{name} with IPV6_MULTICAST_IF"),
            "interface numbers are the host's: leave it to the routes",
        );
    }
    let local = socket::local_name(ours).map_err(failed)?;
    let peer = socket::peer_name(ours).unwrap_or_default();
    let own_network = link(pid, "ns/net")? != link(std::process::id() as i32, "ns/net")?;
    if has_scope(&local) || has_scope(&peer) {
        return refuse(
            format!("{name} with a link-local address"),
            "its meaning is the host's: use one of global scope",
        );
    }
    if !own_network && peer.is_empty() && is_hosts(&local) {
        let remedy = "the address is the host's: bind to all addresses, or start the instance with --net";
        return refuse(format!("{name} with an address of the host"), remedy);
    }
    let memberships = match memberships::of(ours, domain, pid)? {
        Ok(memberships) => memberships,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let mut queued = Vec::new();
    if contents {
        queued = match is_udp {
            true => match queue::peek(ours, domain, Readers::Some).map_err(failed)? {
                Ok(queued) => queued,
                Err(refusal) => return Ok(Err(refusal)),
            },
            false if socket::is_readable(ours).map_err(failed)? => {
                return refuse(
                    format!("{name} with packets to be read"),
                    "try again when the program has read them",
                );
            }
            false => Vec::new(),
        };
        let local_only = |datagram: &Datagram| datagram.to.is_loopback() && datagram.from.ip().is_loopback();
        if !own_network && !queued.iter().all(local_only) {
            return refuse(
                format!("{name} of the host's network with datagrams to be read"),
                "try again when the program has read them",
            );
        }
    }
    let read = |&(level, name): &(i32, i32)| Some((level, name, socket::option(ours, level, name).ok()?));
    let other = |&(level, name, size): &(i32, i32, usize)| {
        Some((level, name, socket::option_bytes(ours, level, name, size).ok()?))
    };
    let buffer = |name| int(libc::SOL_SOCKET, name);
    Ok(Ok(DatagramImage {
        domain,
        kind,
        protocol,
        options: OPTIONS.iter().filter_map(read).collect(),
        other_options: OTHER_OPTIONS
            .iter()
            .filter_map(other)
            .filter(|(_, _, value)| value.iter().any(|byte| *byte != 0))
            .collect(),
        buffers: Buffers {
            send: buffer(libc::SO_SNDBUF),
            receive: buffer(libc::SO_RCVBUF),
            locked: buffer(libc::SO_BUF_LOCK),
        },
        local,
        peer,
        memberships,
        queued,
    }))
}

/// Whether a `struct sockaddr_in6` names an interface.
fn has_scope(name: &[u8]) -> bool {
    name.len() == 28 && name[24..28] != [0; 4]
}

/// Whether a name is one address of the host, and not all or one that every host has.
fn is_hosts(name: &[u8]) -> bool {
    socket_address(name).is_some_and(|address| {
        !address.ip().is_unspecified() && !address.ip().is_loopback() && !address.ip().is_multicast()
    })
}

/// Refuses what no source sends: options outside the lists could do anything to this host.
fn validate(image: &DatagramImage) -> Result<(), String> {
    let kinds = [libc::SOCK_DGRAM, libc::SOCK_RAW];
    if !matches!(image.domain, libc::AF_INET | libc::AF_INET6) || !kinds.contains(&image.kind) {
        return Err(format!("family {} and type {}", image.domain, image.kind));
    }
    if let Some(unknown) = image.options.iter().find(|(level, name, _)| !OPTIONS.contains(&(*level, *name))) {
        return Err(format!("option {unknown:?} is not carried"));
    }
    let known = |(level, name, value): &&(i32, i32, Vec<u8>)| {
        OTHER_OPTIONS.iter().any(|&(l, n, size)| l == *level && n == *name && value.len() <= size)
    };
    match image.other_options.iter().find(|option| !known(option)) {
        Some(unknown) => Err(format!("option {unknown:?} is not carried")),
        None => Ok(()),
    }
}

/// Makes the socket in the stub, and returns its number there.
pub fn make(remote: &mut Remote, image: &DatagramImage) -> Result<RawFd, TraceeError> {
    validate(image)
        .map_err(|problem| TraceeError::Unsupported(format!("a socket of the image: {problem}")))?;
    let args = [image.domain as u64, image.kind as u64, image.protocol as u64, 0, 0, 0];
    let made = remote.call("socket", libc::SYS_socket, args)? as RawFd;
    let ours = remote.share_descriptor(made)?;
    let own_network = sockets::require_own_network(remote.tid()).is_ok();
    let mut raw = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let needed = image.queued.iter().any(|datagram| datagram.to.is_ipv4() == (family == libc::AF_INET));
        if needed {
            let args = [family as u64, libc::SOCK_RAW as u64, libc::IPPROTO_RAW as u64, 0, 0, 0];
            let number = remote.call("socket", libc::SYS_socket, args)? as RawFd;
            raw.push((family, remote.take_descriptor(number)?));
        }
    }
    restore(&ours, image, &raw, own_network)
        .map_err(TraceeError::call("restoring a datagram socket", remote.tid()))?;
    Ok(made)
}

fn restore(
    ours: &OwnedFd,
    image: &DatagramImage,
    raw: &[(i32, OwnedFd)],
    own_network: bool,
) -> io::Result<()> {
    for &(level, name, value) in &image.options {
        // What is as in a new socket is left alone: setting it could mean more.
        if socket::option(ours, level, name).is_ok_and(|here| here != value) {
            socket::set_option(ours, level, name, value)?;
        }
    }
    for (level, name, value) in &image.other_options {
        socket::set_option_bytes(ours, *level, *name, value)?;
    }
    let mut local = image.local.clone();
    if !own_network && !image.peer.is_empty() && is_hosts(&local) {
        // The kernel chose the address when it was connected; it does so again.
        let end = if local.len() == 28 { 8..24 } else { 4..8 };
        local[end].fill(0);
    }
    let bound = socket_address(&local).is_some_and(|name| name.port() != 0 || !name.ip().is_unspecified());
    if bound {
        socket::bind(ours, &local)?;
    }
    memberships::join(ours, &image.memberships)?;
    let room = image.queued.iter().map(|datagram| datagram.data.len() * 2 + 4096).sum::<usize>();
    let wanted = i32::try_from(room).unwrap_or(i32::MAX).max(image.buffers.receive / 2);
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, wanted)?;
    let port = socket_address(&local).map_or(0, |name| name.port());
    for Datagram { from, to, data } in &image.queued {
        let to = SocketAddr::new(*to, port);
        let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let raw = raw.iter().find(|(of, _)| *of == family).map(|(_, raw)| raw);
        let raw = raw.ok_or_else(|| io::Error::other("a raw socket is missing"))?;
        packet::send_ip(raw, &segment::udp_packet(*from, to, data), to.ip())?;
    }
    compare(ours, image)?;
    if !image.peer.is_empty() {
        socket::connect(ours, &image.peer)?;
    }
    sockets::set_buffers(ours, image.buffers, 3)
}

/// What was made must be what was wanted.
fn compare(ours: &OwnedFd, image: &DatagramImage) -> io::Result<()> {
    if image.queued.is_empty() {
        return Ok(());
    }
    let deadline = Instant::now() + LOCAL;
    loop {
        let here = queue::peek(ours, image.domain, Readers::None)?.unwrap_or_default();
        if here == image.queued {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!(
                "{} datagrams are queued instead of {}, or others",
                here.len(),
                image.queued.len()
            )));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
