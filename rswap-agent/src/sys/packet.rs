//! Raw frames and packets: to tell neighbours that an address has moved, and to hold what comes for it meanwhile.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use super::{filter, socket};

/// Sends a gratuitous ARP announcement (RFC 5227, section 3) for `address` at `mac` out of interface
/// `if_index` of the calling thread's network namespace.
///
/// Returns the socket: the frame is on its way, but closing a packet socket waits for an RCU grace period, which takes
/// milliseconds that the caller may not have.
pub fn announce_ipv4(if_index: u32, mac: [u8; 6], address: Ipv4Addr) -> io::Result<OwnedFd> {
    let protocol = (libc::ETH_P_ARP as u16).to_be();
    let socket = socket::create(libc::AF_PACKET, libc::SOCK_RAW, protocol.into())?;

    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]); // to everybody
    frame.extend(mac);
    frame.extend([0x08, 0x06]); // ARP
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]); // Ethernet, IPv4, request
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());

    let mut to = link_address(if_index, protocol);
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

/// Offsets in a frame with its `struct virtio_net_hdr` before it: that, then destination and source address.
const VNET_HEADER: usize = 10;
const SOURCE_AT: usize = VNET_HEADER + 6;
/// The largest frame that segmentation offload makes of small ones, roughly.
const FRAME_LIMIT: usize = 1 << 18;
/// Memory for what is held, as the kernel counts it.
const HOLD_BYTES: i32 = 32 << 20;

impl Holder {
    /// Begins to hold what comes to bridge `if_index` (of the calling thread's network namespace) for `mac`.
    pub fn start(if_index: u32, mac: [u8; 6]) -> io::Result<Self> {
        // Without a protocol nothing comes in before the filter is there.
        let socket = socket::create(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
        filter::take_frames_to(&socket, mac)?;
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
