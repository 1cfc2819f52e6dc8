//! Netlink sockets on which nothing waits: runtimes keep one open to ask for routes and interfaces.

use std::os::fd::{OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use super::{TraceeError, remote::Remote};
use crate::sys::socket;

const SOL_NETLINK: i32 = 270;
const LISTEN_ALL_NSID: i32 = 8;
/// Protocols (include/uapi/linux/netlink.h) whose groups and answers mean the same on every host.
const CARRIED: [(i32, &str); 3] = [
    (libc::NETLINK_ROUTE, "route"),
    (libc::NETLINK_KOBJECT_UEVENT, "uevent"),
    (libc::NETLINK_SOCK_DIAG, "sock_diag"),
];
const LIST_MEMBERSHIPS: i32 = 9;
const ADD_MEMBERSHIP: i32 = 1;
/// Groups that can be asked for: more than these protocols have.
const GROUPS_LIMIT: usize = 256;

/// Options that are set where they aren't 0: packet info, broadcast errors, no ENOBUFS, all namespaces, short and extended
/// acknowledgements, strict checks; and credentials.
const OPTIONS: [(i32, i32); 8] = [
    (SOL_NETLINK, 3),
    (SOL_NETLINK, 4),
    (SOL_NETLINK, 5),
    (SOL_NETLINK, LISTEN_ALL_NSID),
    (SOL_NETLINK, 10),
    (SOL_NETLINK, 11),
    (SOL_NETLINK, 12),
    (libc::SOL_SOCKET, libc::SO_PASSCRED),
];

/// An idle netlink socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkImage {
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub kind: i32,
    /// Its protocol.
    pub protocol: i32,
    /// Its own number (`nl_pid`); 0 when it has none yet.
    pub port: u32,
    /// Multicast groups, by number.
    pub groups: Vec<u32>,
    /// Options as (level, name, value).
    pub options: Vec<(i32, i32, i32)>,
    /// `SO_RCVBUF`, as the kernel tells it.
    pub receive_buffer: i32,
}

/// What [`describe`] finds, or what stands against it and what would help.
pub type Described = Result<NetlinkImage, (String, &'static str)>;

/// A netlink socket behind our duplicate of it.
pub fn describe(ours: &OwnedFd, kind: i32, pid: i32, contents: bool) -> Result<Described, TraceeError> {
    let failed = |error| TraceeError::call("looking at a netlink socket", pid)(error);
    let protocol = socket::option(ours, libc::SOL_SOCKET, libc::SO_PROTOCOL).map_err(failed)?;
    let Some((_, name)) = CARRIED.iter().find(|(known, _)| *known == protocol) else {
        let remedy = "only idle sockets of NETLINK_ROUTE, KOBJECT_UEVENT and SOCK_DIAG are carried";
        return Ok(Err((format!("a netlink socket of protocol {protocol}"), remedy)));
    };
    if contents && socket::is_readable(ours).map_err(failed)? {
        let what = format!("a netlink socket ({name}) with messages to be read");
        return Ok(Err((what, "try again when the program has read them")));
    }
    let local = socket::local_name(ours).map_err(failed)?;
    // `struct sockaddr_nl`: family, padding, port, groups.
    let port =
        local.get(4..8).and_then(|word| word.first_chunk()).map_or(0, |word| u32::from_ne_bytes(*word));
    let bits = socket::option_bytes(ours, SOL_NETLINK, LIST_MEMBERSHIPS, GROUPS_LIMIT / 8).map_err(failed)?;
    let is_set = |group: &u32| {
        let at = (group - 1) as usize;
        bits.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
    };
    let read = |&(level, name): &(i32, i32)| Some((level, name, socket::option(ours, level, name).ok()?));
    Ok(Ok(NetlinkImage {
        kind,
        protocol,
        port,
        groups: (1..=GROUPS_LIMIT as u32).filter(is_set).collect(),
        options: OPTIONS.iter().filter_map(read).filter(|(_, _, value)| *value != 0).collect(),
        receive_buffer: socket::option(ours, libc::SOL_SOCKET, libc::SO_RCVBUF).map_err(failed)?,
    }))
}

/// Makes the socket in the stub, and returns its number there.
pub fn make(remote: &mut Remote, image: &NetlinkImage) -> Result<RawFd, TraceeError> {
    let pid = remote.tid();
    let known = CARRIED.iter().any(|(known, _)| *known == image.protocol);
    if !known || image.options.iter().any(|(level, name, _)| !OPTIONS.contains(&(*level, *name))) {
        return Err(TraceeError::Unsupported("a netlink socket of the image can't be made here".into()));
    }
    let args = [libc::AF_NETLINK as u64, image.kind as u64, image.protocol as u64, 0, 0, 0];
    let made = remote.call("socket", libc::SYS_socket, args)? as RawFd;
    let ours = remote.share_descriptor(made)?;
    let failed = |what| move |error| TraceeError::call(what, pid)(error);
    for &(level, name, value) in &image.options {
        socket::set_option(&ours, level, name, value).map_err(|error| not_set((level, name), pid, error))?;
    }
    socket::set_option(&ours, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, image.receive_buffer / 2)
        .map_err(failed("SO_RCVBUF"))?;
    if image.port != 0 {
        let mut name = vec![0; 12];
        name[..2].copy_from_slice(&(libc::AF_NETLINK as u16).to_ne_bytes());
        name[4..8].copy_from_slice(&image.port.to_ne_bytes());
        socket::bind(&ours, &name).map_err(failed("binding a netlink socket to its number"))?;
    }
    for group in &image.groups {
        socket::set_option(&ours, SOL_NETLINK, ADD_MEMBERSHIP, *group as i32)
            .map_err(failed("joining a netlink group"))?;
    }
    Ok(made)
}

/// Why an option could not be set, by the name of what is missing where that is known.
fn not_set(option: (i32, i32), pid: i32, error: std::io::Error) -> TraceeError {
    if option == (SOL_NETLINK, LISTEN_ALL_NSID) && error.kind() == std::io::ErrorKind::PermissionDenied {
        let what =
            "a netlink socket that hears of all network namespaces: the agent here has no CAP_NET_BROADCAST";
        return TraceeError::Unsupported(what.into());
    }
    TraceeError::call("setting a netlink socket's options", pid)(error)
}

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn who_may_not_listen_everywhere_says_what_it_lacks() {
        let said = |option, code| not_set(option, 7, Error::from_raw_os_error(code)).to_string();
        let all = (SOL_NETLINK, LISTEN_ALL_NSID);
        assert!(said(all, libc::EPERM).contains("CAP_NET_BROADCAST"));
        assert!(!said(all, libc::ENOPROTOOPT).contains("CAP_NET_BROADCAST"));
        assert!(!said((SOL_NETLINK, 3), libc::EPERM).contains("CAP_NET_BROADCAST"));
    }
}
