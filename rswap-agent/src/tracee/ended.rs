//! TCP connections that have ended in both directions, with data that the program has not read yet.
//!
//! Nothing of such a socket is on the network any more; what is left is its queue, and the end behind it. At the destination it
//! is a connection of the instance to itself that comes to the same end: both streams end, the last acknowledgement is received.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    TraceeError,
    image::SocketImage,
    reconnect::{self, RawSockets},
    remote::Remote,
    sockets,
    tcp::{self, Connection, Phase},
};
use crate::sys::{
    socket,
    tcp::{Agreed, Window, peek_all},
};

/// Nobody listens there, and nobody is asked.
const DISCARD: u16 = 9;
/// Any will do: nobody else sees it.
const SEQUENCE: u32 = 1 << 20;
const SEGMENT_BYTES: u32 = 1460;
const WINDOW: u32 = 65535;

/// What waits in the queue of a socket that has ended, or why it can't be carried.
pub(super) fn describe(ours: &OwnedFd) -> io::Result<Result<Vec<u8>, (String, &'static str)>> {
    let mut asked = [PollFd::new(ours.as_fd(), PollFlags::empty())];
    poll(&mut asked, PollTimeout::ZERO)?;
    if asked[0].revents().is_some_and(|found| found.contains(PollFlags::POLLERR)) {
        // Asking for the error takes it from the program.
        let what = "a TCP connection that was reset, with data to be read";
        return Ok(Err((what.into(), "try again when the program has read it")));
    }
    let waiting = socket::bytes_waiting(ours)?;
    let data = peek_all(ours, waiting)?;
    if data.len() != waiting || waiting > tcp::QUEUE_LIMIT {
        let what =
            format!("a TCP connection that has ended, with {waiting} bytes to be read that can't be copied");
        return Ok(Err((what, "try again when the program has read them")));
    }
    Ok(Ok(data))
}

/// Brings the new socket behind `ours`, of the stub behind `remote`, whose options are set, to its end, with `data` to be read.
pub(super) fn restore(
    remote: &mut Remote,
    ours: OwnedFd,
    image: &SocketImage,
    data: &[u8],
) -> Result<(), TraceeError> {
    let pid = remote.tid();
    sockets::require_own_network(pid)?;
    tcp::require_room(data.len())?;
    let loopback = |port| match image.domain {
        libc::AF_INET => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        _ => SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    };
    let end = SEQUENCE.wrapping_add(data.len() as u32).wrapping_add(1);
    let connection = Connection {
        phase: Phase::LastAck,
        // The kernel chooses the port, and frees it at the end.
        local: bytes_of(loopback(0)),
        peer: bytes_of(loopback(DISCARD)),
        send_sequence: SEQUENCE,
        receive_sequence: end,
        send_queue: Vec::new(),
        unsent: 0,
        receive_queue: data.to_vec(),
        agreed: Agreed { mss: SEGMENT_BYTES, ..Agreed::default() },
        timestamp: 0,
        window: Window { update_at: end, send: WINDOW, send_max: WINDOW, receive: WINDOW, receive_at: end },
        reading_ended: false,
        quick_acknowledgements: true,
    };
    let raw = RawSockets::for_connections(std::iter::once(&connection), |family| {
        let args = [family as u64, libc::SOCK_RAW as u64, libc::IPPROTO_RAW as u64, 0, 0, 0];
        let made = remote.call("socket", libc::SYS_socket, args)?;
        remote.take_descriptor(made as i32)
    })?;
    reconnect::restore(ours, &connection, image.buffers, &raw)
        .and_then(|waiting| waiting.come_to_an_end(&connection, &raw))
        .map_err(TraceeError::call("restoring a TCP connection that has ended", pid))
}

/// An address in the kernel's bytes: `struct sockaddr_in` or `sockaddr_in6`.
fn bytes_of(address: SocketAddr) -> Vec<u8> {
    let port = address.port().to_be_bytes();
    match address {
        SocketAddr::V4(v4) => {
            [&(libc::AF_INET as u16).to_ne_bytes(), &port[..], &v4.ip().octets(), &[0; 8]].concat()
        }
        SocketAddr::V6(v6) => {
            [&(libc::AF_INET6 as u16).to_ne_bytes(), &port[..], &[0; 4], &v6.ip().octets(), &[0; 4]].concat()
        }
    }
}
