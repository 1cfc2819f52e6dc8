//! Raw frames and packets: whole IP packets, and frames that are held while an instance is not reached.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use super::{filter, neighbour::solicited_node, socket};

/// Sends a whole IP packet through a raw socket of its family (`IPPROTO_RAW`), to `to`.
pub fn send_ip(raw: &OwnedFd, packet: &[u8], to: IpAddr) -> io::Result<()> {
    use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(raw.as_raw_fd(), packet, &to, MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}

/// The address of a packet socket; the protocol as a frame has it.
pub(super) fn link_address(if_index: u32, protocol: u16) -> libc::sockaddr_ll {
    // SAFETY: the struct is plain numbers, for which all zeros is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = if_index as i32;
    address
}

/// Holds the frames of one Ethernet address, until they are passed on.
///
/// A sender would repeat what got lost after 200 ms at the earliest; what is passed on needs no repetition. Frames
/// that reach their destination all the same come twice, which TCP takes as a repetition.
#[derive(Debug)]
pub struct Holder {
    socket: OwnedFd,
    /// Out of which interface they are passed on.
    to: u32,
    /// What they come from then, if not from their sender.
    from: Option<[u8; 6]>,
}

/// Offsets in a frame with its `struct virtio_net_hdr` before it: that, then destination and source address.
const VNET_HEADER: usize = 10;
const SOURCE_AT: usize = VNET_HEADER + 6;
/// The largest frame that segmentation offload makes of small ones, roughly.
const FRAME_LIMIT: usize = 1 << 18;
/// Memory for what is held, as the kernel counts it.
const HOLD_BYTES: i32 = 32 << 20;

/// A packet socket that takes what passes interface `if_index` and `filter`, with the header of offloads.
fn listen(if_index: u32, filter: impl FnOnce(&OwnedFd) -> io::Result<()>) -> io::Result<OwnedFd> {
    // Without a protocol nothing comes in before the filter is there.
    let socket = socket::create(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    filter(&socket)?;
    // Offloaded checksums and segments are complete only together with this header.
    const PACKET_VNET_HDR: i32 = 15;
    socket::set_option(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
    socket::set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, HOLD_BYTES)?;
    bind(&socket, if_index, libc::ETH_P_ALL)?;
    Ok(socket)
}

/// From here on a packet socket gets what comes through an interface.
pub(super) fn bind(socket: &OwnedFd, if_index: u32, protocol: i32) -> io::Result<()> {
    let address = link_address(if_index, (protocol as u16).to_be());
    // SAFETY: `address` is plain numbers that are read as the bytes that they are.
    let name = unsafe {
        std::slice::from_raw_parts((&raw const address).cast::<u8>(), size_of::<libc::sockaddr_ll>())
    };
    socket::bind(socket, name)
}

impl Holder {
    /// Begins to hold what comes to bridge `if_index` (of the calling thread's network namespace) for `mac`, and questions
    /// who has address `ipv6`.
    pub fn start(if_index: u32, mac: [u8; 6], ipv6: Option<Ipv6Addr>) -> io::Result<Self> {
        let socket =
            listen(if_index, |socket| filter::take_frames_to(socket, mac, ipv6.map(solicited_node)))?;
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
        // Passed on, they come from the bridge, so that no switch on the way takes the true sender to be here.
        Ok(Self { socket, to: if_index, from: Some(own_mac) })
    }

    /// Begins to hold what `mac` sends through `port`, to be passed on out of `bridge`, while the port is on no bridge.
    pub fn start_from(port: u32, mac: [u8; 6], bridge: u32) -> io::Result<Self> {
        // What a bridge floods to the port is on its way out, and not from the instance (Linux 4.20).
        const PACKET_IGNORE_OUTGOING: i32 = 23;
        let socket = listen(port, |socket| {
            socket::set_option(socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
            filter::take_frames_from(socket, mac)
        })?;
        Ok(Self { socket, to: bridge, from: None })
    }

    /// What is held is passed on out of another interface, as it came.
    pub fn towards(self, to: u32) -> Self {
        Self { to, from: None, ..self }
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

    /// Holds no more than it has.
    pub fn stop(&self) -> io::Result<()> {
        filter::take_nothing(&self.socket)
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

    /// Sends what was held into the bridge, as if it came now, in its order; returns how many frames that were.
    pub fn pass_on(&self) -> io::Result<usize> {
        let mut frame = vec![0_u8; FRAME_LIMIT];
        let to = link_address(self.to, 0);
        let mut passed = 0;
        loop {
            let Some(got) = self.receive(&mut frame)? else { return Ok(passed) };
            if got < SOURCE_AT + 6 {
                continue;
            }
            if let Some(mac) = self.from {
                frame[SOURCE_AT..SOURCE_AT + 6].copy_from_slice(&mac);
            }
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
