//! Which kind of socket a descriptor is.

use std::os::fd::OwnedFd;

use super::{
    super::{
        TraceeError, datagrams, ended,
        image::{DescriptorKind, SocketState},
        netlink, sockets, tcp, unix,
    },
    Look,
    info::Kind,
};
use crate::sys::{filter, socket};

/// Of include/uapi/linux/in.h.
const IPPROTO_MPTCP: i32 = 262;
const TCP_SYN_SENT: u8 = 2;
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;

/// A socket behind our duplicate of it.
pub(super) fn describe(ours: &OwnedFd, look: &Look<'_>) -> Result<Kind, TraceeError> {
    let pid = look.pid;
    let get = |name| {
        socket::option(ours, libc::SOL_SOCKET, name).map_err(TraceeError::call("getsockopt of a socket", pid))
    };
    let (domain, kind) = (get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?);
    if domain == libc::AF_UNIX {
        let inode = nix::sys::stat::fstat(ours)
            .map_err(|error| TraceeError::call("fstat of a socket", pid)(error.into()))?
            .st_ino;
        let described = unix::describe(ours, inode, pid, &look.around.peers, look.contents)?;
        return Ok(described.map(|(mut image, passed)| {
            for (message, descriptors) in image.queued.iter_mut().zip(passed) {
                message.descriptors = look.around.keep(descriptors);
            }
            DescriptorKind::Unix(Box::new(image))
        }));
    }
    if domain == libc::AF_NETLINK {
        return Ok(netlink::describe(ours, kind, pid, look.contents)?.map(DescriptorKind::Netlink));
    }
    if domain != libc::AF_INET && domain != libc::AF_INET6 {
        let what = format!("a socket of family {}", family(domain));
        return Ok(Err((what, "only unix, internet and netlink sockets are carried in this version")));
    }
    if kind != libc::SOCK_STREAM {
        let described = datagrams::describe(ours, domain, kind, pid, look.contents)?;
        return Ok(described.map(|image| DescriptorKind::Datagram(Box::new(image))));
    }
    match get(libc::SO_PROTOCOL)? {
        libc::IPPROTO_TCP => {}
        IPPROTO_MPTCP => {
            return Ok(Err(("a multipath TCP socket".into(), "only plain TCP is carried in this version")));
        }
        other => {
            let what = format!("a stream socket of protocol {other}");
            return Ok(Err((what, "only TCP is carried in this version")));
        }
    }
    let info = socket::tcp_info(ours).map_err(TraceeError::call("TCP_INFO", pid))?;
    let state = match info.state {
        TCP_LISTEN => SocketState::Listening { backlog: info.backlog as i32 },
        TCP_CLOSE => match socket::bytes_waiting(ours) {
            Ok(0) => SocketState::Idle,
            _ if !sockets::has_own_network(pid)? => {
                let remedy = "only an instance with --net keeps it: try again when it is read";
                return Ok(Err(("a TCP connection that has ended, with data to be read".into(), remedy)));
            }
            _ => match ended::describe(ours).map_err(TraceeError::call("reading a TCP socket", pid))? {
                Ok(data) => SocketState::Ended { data },
                Err(refused) => return Ok(Err(refused)),
            },
        },
        // It has an end soon, which is waited for before the freeze.
        TCP_SYN_SENT if !look.contents && sockets::has_own_network(pid)? => SocketState::Idle,
        state => match tcp::describe(ours, state, pid)? {
            Ok(state) => state,
            Err(refused) => return Ok(Err(refused)),
        },
    };
    let mut local = Vec::new();
    if matches!(state, SocketState::Listening { .. }) {
        if filter::is_attached(ours) {
            return Ok(Err((
                "a listening socket with a filter".into(),
                "filters aren't carried in this version",
            )));
        }
        local = socket::local_name(ours).map_err(TraceeError::call("getsockname", pid))?;
    }
    Ok(Ok(DescriptorKind::Socket(sockets::describe(ours, domain, kind, local, state))))
}

/// What people call an address family (include/linux/socket.h).
fn family(domain: i32) -> String {
    let name = match domain {
        libc::AF_PACKET => "AF_PACKET",
        libc::AF_VSOCK => "AF_VSOCK",
        libc::AF_ALG => "AF_ALG",
        libc::AF_BLUETOOTH => "AF_BLUETOOTH",
        libc::AF_CAN => "AF_CAN",
        libc::AF_XDP => "AF_XDP",
        libc::AF_KEY => "AF_KEY",
        libc::AF_TIPC => "AF_TIPC",
        _ => return domain.to_string(),
    };
    name.to_owned()
}
