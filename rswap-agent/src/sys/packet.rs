//! Raw frames and packets: to tell neighbours that an address has moved, and to hold what comes for it meanwhile.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use super::{filter, socket};

/// Tells all neighbours out of interface `if_index` of the calling thread's network namespace that `addresses` are at `mac`.
///
/// Returns the socket: the frames are on their way, but closing a packet socket waits for an RCU grace period, which takes
/// milliseconds that the caller may not have.
pub fn announce(if_index: u32, mac: [u8; 6], addresses: &[IpAddr]) -> io::Result<OwnedFd> {
    // Without a protocol nothing comes in.
    let socket = socket::create(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    for address in addresses {
        let (frame, protocol) = match address {
            IpAddr::V4(address) => (arp_announcement(mac, *address), libc::ETH_P_ARP),
            IpAddr::V6(address) => (neighbour_advertisement(mac, *address), libc::ETH_P_IPV6),
        };
        let mut to = link_address(if_index, (protocol as u16).to_be());
        to.sll_halen = 6;
        to.sll_addr[..6].copy_from_slice(&frame[..6]);
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
    }
    Ok(socket)
}

/// A gratuitous ARP announcement (RFC 5227, section 3).
fn arp_announcement(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]); // to everybody
    frame.extend(mac);
    frame.extend([0x08, 0x06]); // ARP
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]); // Ethernet, IPv4, request
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame
}

/// An unsolicited neighbour advertisement (RFC 4861, section 7.2.6) to all nodes.
fn neighbour_advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const ICMPV6: u8 = 58;
    // Advertisement, code, checksum; that it replaces what is known; the address; its link-layer address.
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let length = message.len() as u16;
    let pseudo_header =
        [&address.octets()[..], &ALL_NODES.octets(), &[0, 0], &length.to_be_bytes(), &[0, 0, 0, ICMPV6]];
    let checksum = internet_checksum(&[&pseudo_header.concat()[..], &message].concat());
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend(mac);
    frame.extend([0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

/// The checksum of the internet protocols (RFC 1071) over an even number of bytes.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// Sends a whole IP packet through a raw socket of its family (`IPPROTO_RAW`), to `to`.
pub fn send_ip(raw: &OwnedFd, packet: &[u8], to: IpAddr) -> io::Result<()> {
    use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(raw.as_raw_fd(), packet, &to, MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}

fn link_address(if_index: u32, protocol: u16) -> libc::sockaddr_ll {
    // SAFETY: the struct is plain numbers, for which all zeros is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = if_index as i32;
    address
}

/// Holds the frames that come to a bridge for one Ethernet address, until they are passed on to where it is then.
///
/// A sender would repeat what got lost after 200 ms at the earliest; what is passed on needs no repetition. Frames
/// that reach their destination all the same come twice, which TCP takes as a repetition.
#[derive(Debug)]
pub struct Holder {
    socket: OwnedFd,
    if_index: u32,
    /// The bridge's own Ethernet address: passed on, the frames come from it, so that no switch on the way takes the
    /// true sender to be here.
    own_mac: [u8; 6],
}

/// The Ethernet address that questions for an IPv6 address go to (RFC 4291, section 2.7.1; RFC 2464, section 7).
fn solicited_node(address: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c] = address.octets();
    [0x33, 0x33, 0xff, a, b, c]
}

/// Offsets in a frame with its `struct virtio_net_hdr` before it: that, then destination and source address.
const VNET_HEADER: usize = 10;
const SOURCE_AT: usize = VNET_HEADER + 6;
/// The largest frame that segmentation offload makes of small ones, roughly.
const FRAME_LIMIT: usize = 1 << 18;
/// Memory for what is held, as the kernel counts it.
const HOLD_BYTES: i32 = 32 << 20;

impl Holder {
    /// Begins to hold what comes to bridge `if_index` (of the calling thread's network namespace) for `mac`, and questions
    /// who has address `ipv6`.
    pub fn start(if_index: u32, mac: [u8; 6], ipv6: Option<Ipv6Addr>) -> io::Result<Self> {
        // Without a protocol nothing comes in before the filter is there.
        let socket = socket::create(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
        filter::take_frames_to(&socket, mac, ipv6.map(solicited_node))?;
        // Offloaded checksums and segments are complete only together with this header.
        const PACKET_VNET_HDR: i32 = 15;
        socket::set_option(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        socket::set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, HOLD_BYTES)?;
        let address = link_address(if_index, (libc::ETH_P_ALL as u16).to_be());
        // SAFETY: `address` is plain numbers that are read as the bytes that they are.
        let name = unsafe {
            std::slice::from_raw_parts((&raw const address).cast::<u8>(), size_of::<libc::sockaddr_ll>())
        };
        socket::bind(&socket, name)?;
        let name = socket::local_name(&socket)?;
        let own_mac = *name.get(12..).and_then(|mac| mac.first_chunk()).ok_or(io::ErrorKind::InvalidData)?;
        // A promiscuous bridge shows what it passes between its ports. `struct packet_mreq`; it ends with the socket.
        const PACKET_MR_PROMISC: u16 = 1;
        const PACKET_ADD_MEMBERSHIP: i32 = 1;
        let mut membership = Vec::with_capacity(16);
        membership.extend((if_index as i32).to_ne_bytes());
        membership.extend(PACKET_MR_PROMISC.to_ne_bytes());
        membership.extend([0; 10]);
        socket::set_option_bytes(&socket, libc::SOL_PACKET, PACKET_ADD_MEMBERSHIP, &membership)?;
        Ok(Self { socket, if_index, own_mac })
    }

    /// Forgets what was held so far: it has reached its destination.
    pub fn forget(&self) -> io::Result<()> {
        // More may come all the time; what comes after this many is passed on, and arrives twice.
        const FRAMES: usize = 100_000;
        // The kernel refuses a shorter one (`packet_rcv_vnet`) with EINVAL.
        let mut head = [0_u8; VNET_HEADER];
        for _ in 0..FRAMES {
            if self.receive(&mut head)?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// The next frame that is held, cut to the length of `frame`; returns how much of it that is.
    fn receive(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let (fd, at) = (self.socket.as_raw_fd(), frame.as_mut_ptr());
        // SAFETY: the kernel writes at most `frame.len()` bytes to `frame`.
        let got = unsafe { libc::recv(fd, at.cast(), frame.len(), libc::MSG_DONTWAIT) };
        match super::check(got as libc::c_long) {
            Ok(got) => Ok(Some(got as usize)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends what was held into the bridge, as if it came now; returns how many frames that were.
    pub fn pass_on(&self) -> io::Result<usize> {
        let mut frame = vec![0_u8; FRAME_LIMIT];
        let to = link_address(self.if_index, 0);
        let mut passed = 0;
        loop {
            let Some(got) = self.receive(&mut frame)? else { return Ok(passed) };
            if got < SOURCE_AT + 6 {
                continue;
            }
            frame[SOURCE_AT..SOURCE_AT + 6].copy_from_slice(&self.own_mac);
            let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            let (fd, at) = (self.socket.as_raw_fd(), frame.as_ptr());
            let flags = libc::MSG_DONTWAIT;
            // SAFETY: `frame` and `to` outlive the call, and the lengths are theirs.
            let sent = unsafe { libc::sendto(fd, at.cast(), got, flags, (&raw const to).cast(), size) };
            match super::check(sent as libc::c_long) {
                Ok(_) => passed += 1,
                Err(error) => tracing::debug!(%error, "a frame that was held could not be passed on"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_advertisement_has_a_right_checksum() {
        let address: Ipv6Addr = "fd88::10".parse().unwrap();
        let frame = neighbour_advertisement([2, 0x72, 10, 88, 0, 10], address);
        assert_eq!(frame.len(), 14 + 40 + 32);
        let (header, message) = frame[14..].split_at(40);
        // With the checksum in it, the sum over pseudo-header and message is zero.
        let checked = [&header[8..40], &[0, 0, 0, 32, 0, 0, 0, 58], message].concat();
        assert_eq!(internet_checksum(&checked), 0);
        assert_ne!(message[2..4], [0, 0]);
    }
}
