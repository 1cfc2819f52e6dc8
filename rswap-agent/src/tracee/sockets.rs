//! What all TCP sockets have in common: options, buffers, and the listening ones.

use std::{io, os::fd::OwnedFd};

use super::{
    TraceeError,
    capture::link,
    image::{Buffers, SocketImage, SocketState},
    reconnect,
};
use crate::sys::socket;

/// Options that are read at the source and set at the destination, where they aren't 0. What sets another one as a
/// side effect comes before it.
const OPTIONS: [(i32, i32); 26] = [
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_BROADCAST),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
];

/// Options that are no `int`, with their size in bytes; those that are all zeros are left as they are.
const OTHER_OPTIONS: [(i32, i32, usize); 6] = [
    (libc::SOL_SOCKET, libc::SO_LINGER, 8),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO, 16),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO, 16),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 8),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16),
];

/// `SO_BUF_LOCK`'s bits (include/uapi/linux/socket.h).
const SEND_LOCKED: i32 = 1;
const RECEIVE_LOCKED: i32 = 2;

/// Completes the image of a TCP socket.
pub(super) fn describe(
    ours: &OwnedFd,
    domain: i32,
    kind: i32,
    local: Vec<u8>,
    state: SocketState,
) -> SocketImage {
    let int = |name| socket::option(ours, libc::SOL_SOCKET, name).unwrap_or(0);
    // What a socket doesn't know (IPv6 options at IPv4 sockets, options of newer kernels) it doesn't have.
    let read = |&(level, name): &(i32, i32)| Some((level, name, socket::option(ours, level, name).ok()?));
    let other = |&(level, name, size): &(i32, i32, usize)| {
        Some((level, name, socket::option_bytes(ours, level, name, size).ok()?))
    };
    SocketImage {
        domain,
        kind,
        options: OPTIONS.iter().filter_map(read).filter(|(_, _, value)| *value != 0).collect(),
        other_options: OTHER_OPTIONS
            .iter()
            .filter_map(other)
            .filter(|(_, name, value)| value.iter().any(|b| *b != 0) && !is_unlimited(*name, value))
            .collect(),
        buffers: Buffers {
            send: int(libc::SO_SNDBUF),
            receive: int(libc::SO_RCVBUF),
            locked: int(libc::SO_BUF_LOCK),
        },
        local,
        state,
    }
}

/// The default of the pacing rate, which would switch pacing on if it was set.
fn is_unlimited(name: i32, value: &[u8]) -> bool {
    name == libc::SO_MAX_PACING_RATE && value.iter().all(|byte| *byte == u8::MAX)
}

/// Refuses what no source sends: options outside the lists could do anything to this host.
pub(super) fn validate(image: &SocketImage) -> Result<(), String> {
    if !matches!(image.domain, libc::AF_INET | libc::AF_INET6) || image.kind != libc::SOCK_STREAM {
        return Err(format!("family {} and type {} are no TCP socket", image.domain, image.kind));
    }
    if let Some(unknown) = image.options.iter().find(|(level, name, _)| !OPTIONS.contains(&(*level, *name))) {
        return Err(format!("option {unknown:?} is not carried"));
    }
    let known = |(level, name, value): &&(i32, i32, Vec<u8>)| {
        OTHER_OPTIONS.iter().any(|&(l, n, size)| l == *level && n == *name && value.len() <= size)
    };
    if let Some(unknown) = image.other_options.iter().find(|option| !known(option)) {
        return Err(format!("option {unknown:?} is not carried"));
    }
    if image.buffers.send < 0 || image.buffers.receive < 0 || !(0..=3).contains(&image.buffers.locked) {
        return Err(format!("its buffers are {:?}", image.buffers));
    }
    match &image.state {
        SocketState::Connected(connection) => reconnect::validate(image.domain, connection),
        _ => Ok(()),
    }
}

/// Sets what a new socket has in common with others, and lets it listen if it did. A connection is made afterwards,
/// by [`reconnect::restore`].
pub(super) fn restore(ours: &OwnedFd, image: &SocketImage) -> io::Result<()> {
    for &(level, name, value) in &image.options {
        socket::set_option(ours, level, name, value)?;
    }
    for (level, name, value) in &image.other_options {
        socket::set_option_bytes(ours, *level, *name, value)?;
    }
    if !matches!(image.state, SocketState::Connected(_) | SocketState::Ended { .. }) {
        set_buffers(ours, image.buffers, image.buffers.locked)?;
    }
    if let SocketState::Listening { backlog } = image.state {
        socket::bind(ours, &image.local)?;
        socket::listen(ours, backlog)?;
    }
    Ok(())
}

/// Sets those buffers that are in `which` (as `SO_BUF_LOCK`'s bits), and which of them the kernel may grow.
pub(super) fn set_buffers(ours: &OwnedFd, buffers: Buffers, which: i32) -> io::Result<()> {
    let both = [
        (SEND_LOCKED, libc::SO_SNDBUFFORCE, buffers.send),
        (RECEIVE_LOCKED, libc::SO_RCVBUFFORCE, buffers.receive),
    ];
    for (bit, name, size) in both {
        if which & bit != 0 {
            // The kernel doubles what it is given.
            socket::set_option(ours, libc::SOL_SOCKET, name, size / 2)?;
        }
    }
    if which == 0 {
        return Ok(());
    }
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_BUF_LOCK, buffers.locked)
}

/// Whether process `pid` has another network namespace than this agent.
pub(super) fn has_own_network(pid: i32) -> Result<bool, TraceeError> {
    Ok(link(pid, "ns/net")? != link(std::process::id() as i32, "ns/net")?)
}

/// A connection can only be made in a network namespace of the instance's own.
pub(super) fn require_own_network(pid: i32) -> Result<(), TraceeError> {
    if !has_own_network(pid)? {
        let text = "a connection in the image of an instance without an address of its own";
        return Err(TraceeError::Unsupported(text.into()));
    }
    Ok(())
}
