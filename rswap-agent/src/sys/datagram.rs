//! Datagram sockets: looking at what waits, and multicast groups.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg},
};

/// Largest UDP datagram, and more.
const DATAGRAM_LIMIT: usize = 1 << 16;

/// A datagram that was looked at.
#[derive(Debug)]
pub struct Peeked {
    /// Its data.
    pub data: Vec<u8>,
    /// Who sent it.
    pub from: Option<SocketAddr>,
    /// Where it was sent to, if the socket has `IP_PKTINFO` or `IPV6_RECVPKTINFO`.
    pub to: Option<IpAddr>,
}

/// Looks at the datagram at the socket's `SO_PEEK_OFF`, which goes on to the next; `None` behind the last.
pub fn peek(socket: &OwnedFd) -> io::Result<Option<Peeked>> {
    let mut buffer = vec![0; DATAGRAM_LIMIT];
    let mut control = vec![0_u8; 512];
    let mut into = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let got = match recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut into, Some(&mut control), flags) {
        Err(Errno::EAGAIN) => return Ok(None),
        got => got?,
    };
    let mut to = None;
    for message in got.cmsgs()? {
        match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                to = Some(IpAddr::V4(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes())));
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).to_canonical());
            }
            _ => {}
        }
    }
    let from = got.address.and_then(|address| match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddr::from((v4.ip(), v4.port()))),
        (_, Some(v6)) => Some(SocketAddr::from((v6.ip().to_canonical(), v6.port()))),
        _ => None,
    });
    let bytes = got.bytes;
    buffer.truncate(bytes);
    Ok(Some(Peeked { data: buffer, from, to }))
}

/// `struct group_req`: interface, padding, the group as `struct sockaddr_storage`.
fn group_request(group: IpAddr, interface: u32) -> [u8; 136] {
    let mut request = [0; 136];
    request[..4].copy_from_slice(&interface.to_ne_bytes());
    match group {
        IpAddr::V4(group) => {
            request[8..10].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            request[12..16].copy_from_slice(&group.octets());
        }
        IpAddr::V6(group) => {
            request[8..10].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            request[16..32].copy_from_slice(&group.octets());
        }
    }
    request
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

/// Filter mode of a member that takes what any sender sends (`MCAST_EXCLUDE`, no sources).
pub const EXCLUDE: u32 = 0;

/// Filter mode and number of sources of a socket's membership (`MCAST_MSFILTER`).
///
/// # Errors
/// `EADDRNOTAVAIL` when it is no member.
pub fn group_filter(socket: &OwnedFd, group: IpAddr, interface: u32) -> io::Result<(u32, u32)> {
    const MCAST_MSFILTER: i32 = 48;
    // `struct group_filter`: as a request, then mode, number of sources, and room for none.
    let mut filter = [0_u8; 144];
    filter[..136].copy_from_slice(&group_request(group, interface));
    let mut len = filter.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `len` bytes of `filter`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level(group),
            MCAST_MSFILTER,
            filter.as_mut_ptr().cast(),
            &mut len,
        )
    };
    super::check(done.into())?;
    let word = |at: usize| filter[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
    Ok((word(136), word(140)))
}

/// Joins a group by an interface.
pub fn join(socket: &OwnedFd, group: IpAddr, interface: u32) -> io::Result<()> {
    const MCAST_JOIN_GROUP: i32 = 42;
    super::socket::set_option_bytes(socket, level(group), MCAST_JOIN_GROUP, &group_request(group, interface))
}

/// The number of an interface in the network namespace of the socket.
pub fn interface_index(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    // `struct ifreq`: a name of 16 bytes, then a union that is no longer than 24.
    let mut request = [0_u8; 40];
    let name = name.as_bytes();
    if name.len() > 15 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request[..name.len()].copy_from_slice(name);
    let (fd, at) = (socket.as_raw_fd(), request.as_mut_ptr());
    // SAFETY: no safe wrapper; the kernel reads and writes one `struct ifreq`, which is as large as the array.
    super::check(unsafe { libc::ioctl(fd, libc::SIOCGIFINDEX as libc::Ioctl, at) }.into())?;
    Ok(request[16..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word)))
}
