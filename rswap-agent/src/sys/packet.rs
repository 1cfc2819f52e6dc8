//! Raw Ethernet frames, to tell neighbours that an address has moved.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// Sends a gratuitous ARP announcement (RFC 5227, section 3) for `address` at `mac` out of interface
/// `if_index` of the calling thread's network namespace.
///
/// Returns the socket: the frame is on its way, but closing a packet socket waits for an RCU grace period, which takes
/// milliseconds that the caller may not have.
pub fn announce_ipv4(if_index: u32, mac: [u8; 6], address: Ipv4Addr) -> io::Result<OwnedFd> {
    let protocol = (libc::ETH_P_ARP as u16).to_be();
    // SAFETY: a plain system call; a non-negative result is a descriptor that is ours.
    let fd = super::check(unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into()).into()
    })?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd as i32) };

    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]); // to everybody
    frame.extend(mac);
    frame.extend([0x08, 0x06]); // ARP
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]); // Ethernet, IPv4, request
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());

    // SAFETY: the struct is plain numbers, for which all zeros is a value.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = protocol;
    to.sll_ifindex = if_index as i32;
    to.sll_halen = 6;
    to.sll_addr[..6].fill(0xff);
    // SAFETY: `frame` and `to` outlive the call, and the lengths are theirs.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    super::check(sent as libc::c_long)?;
    Ok(socket)
}
