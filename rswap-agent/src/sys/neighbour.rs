//! Neighbours on an Ethernet link: telling them where an address is, and asking whether they are there.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{packet, socket};

const ICMPV6: u8 = 58;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Neighbour solicitation and advertisement (RFC 4861, section 4).
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;

/// Tells all neighbours out of interface `if_index` of the calling thread's network namespace that `addresses` are at `mac`.
///
/// Returns the socket: the frames are on their way, but closing a packet socket waits for an RCU grace period, which takes
/// milliseconds that the caller may not have.
pub fn announce(if_index: u32, mac: [u8; 6], addresses: &[IpAddr]) -> io::Result<OwnedFd> {
    // Without a protocol nothing comes in.
    let socket = socket::create(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    for address in addresses {
        let frame = match address {
            // RFC 5227, section 3: a question for one's own address.
            IpAddr::V4(address) => arp_request(mac, *address, *address),
            IpAddr::V6(address) => neighbour_advertisement(mac, *address),
        };
        send(&socket, if_index, &frame)?;
    }
    Ok(socket)
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    /// Its Ethernet address, which the answers go to.
    pub mac: [u8; 6],
    /// Its addresses. Without them the questions are probes, which change nothing in what anybody knows (RFC 5227, section
    /// 2.1.1; RFC 4862, section 5.4.2).
    pub addresses: (Ipv4Addr, Ipv6Addr),
}

impl Asker {
    /// Somebody without addresses.
    pub fn nobody(mac: [u8; 6]) -> Self {
        Self { mac, addresses: (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED) }
    }
}

/// Those of `addresses` that answer on interface `if_index` of the calling thread's network namespace in this time. Who does
/// not is asked again, three times in all.
pub fn answering(
    if_index: u32,
    asker: &Asker,
    addresses: &BTreeSet<IpAddr>,
    within: Duration,
) -> io::Result<BTreeSet<IpAddr>> {
    const TRIES: u32 = 3;
    let mut answered = BTreeSet::new();
    let families =
        [(libc::ETH_P_ARP, IpAddr::is_ipv4 as fn(&IpAddr) -> bool), (libc::ETH_P_IPV6, IpAddr::is_ipv6)];
    for (protocol, of_family) in families {
        let asked: BTreeSet<IpAddr> = addresses.iter().copied().filter(of_family).collect();
        if asked.is_empty() {
            continue;
        }
        let socket = socket::create(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
        packet::bind(&socket, if_index, protocol)?;
        for _ in 0..TRIES {
            let silent: Vec<IpAddr> = asked.difference(&answered).copied().collect();
            if silent.is_empty() {
                break;
            }
            for address in silent {
                let frame = match address {
                    IpAddr::V4(address) => arp_request(asker.mac, asker.addresses.0, address),
                    IpAddr::V6(address) => neighbour_solicitation(asker, address),
                };
                send(&socket, if_index, &frame)?;
            }
            listen(&socket, &asked, &mut answered, Instant::now() + within / TRIES)?;
        }
    }
    Ok(answered)
}

/// Takes answers until everybody who was asked has given one, or the time has come.
fn listen(
    socket: &OwnedFd,
    asked: &BTreeSet<IpAddr>,
    answered: &mut BTreeSet<IpAddr>,
    until: Instant,
) -> io::Result<()> {
    let mut frame = [0_u8; 128];
    while !asked.is_subset(answered) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let left = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], left)?;
        let (fd, at) = (socket.as_raw_fd(), frame.as_mut_ptr());
        // SAFETY: the kernel writes at most `frame.len()` bytes to `frame`.
        let got = unsafe { libc::recv(fd, at.cast(), frame.len(), libc::MSG_DONTWAIT) };
        match super::check(got as libc::c_long) {
            Ok(got) => answered.extend(who_answers(&frame[..got as usize]).filter(|who| asked.contains(who))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Who says in this frame where it is; `None` for all other frames.
fn who_answers(frame: &[u8]) -> Option<IpAddr> {
    let (head, rest) = frame.split_at_checked(14)?;
    match head[12..] {
        // Ethernet, IPv4, reply; its sender.
        [0x08, 0x06] if rest.starts_with(&[0, 1, 0x08, 0, 6, 4, 0, 2]) => {
            rest.get(14..18)?.first_chunk().map(|octets: &[u8; 4]| IpAddr::from(*octets))
        }
        // Only who is on this link can send with this hop limit.
        [0x86, 0xdd] if rest.get(6..8)? == [ICMPV6, 255] && *rest.get(40)? == ADVERTISEMENT => {
            rest.get(48..64)?.first_chunk().map(|octets: &[u8; 16]| IpAddr::from(*octets))
        }
        _ => None,
    }
}

fn send(socket: &OwnedFd, if_index: u32, frame: &[u8]) -> io::Result<()> {
    let protocol = u16::from_ne_bytes([frame[12], frame[13]]);
    let mut to = packet::link_address(if_index, protocol);
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
    super::check(sent as libc::c_long).map(drop)
}

/// An ARP request (RFC 826).
fn arp_request(mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]); // to everybody
    frame.extend(mac);
    frame.extend([0x08, 0x06]); // ARP
    frame.extend([0, 1, 0x08, 0, 6, 4, 0, 1]); // Ethernet, IPv4, request
    frame.extend(mac);
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

/// An unsolicited neighbour advertisement (RFC 4861, section 7.2.6) to all nodes.
fn neighbour_advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    // That it replaces what is known; the address; its link-layer address.
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    icmpv6(mac, [0x33, 0x33, 0, 0, 0, 1], address, ALL_NODES, message)
}

/// A neighbour solicitation (RFC 4861, section 4.3).
fn neighbour_solicitation(asker: &Asker, target: Ipv6Addr) -> Vec<u8> {
    let (mac, sender) = (asker.mac, asker.addresses.1);
    let mut message = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    if !sender.is_unspecified() {
        message.extend([1, 1]);
        message.extend(mac);
    }
    let [.., a, b, c] = target.octets();
    let to = Ipv6Addr::from([0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
    icmpv6(mac, solicited_node(target), sender, to, message)
}

/// The Ethernet address that questions for an IPv6 address go to (RFC 4291, section 2.7.1; RFC 2464, section 7).
pub(super) fn solicited_node(address: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c] = address.octets();
    [0x33, 0x33, 0xff, a, b, c]
}

/// A frame with an ICMPv6 message whose checksum is still 0.
fn icmpv6(from_mac: [u8; 6], to_mac: [u8; 6], from: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let length = message.len() as u16;
    let pseudo_header =
        [&from.octets()[..], &to.octets(), &[0, 0], &length.to_be_bytes(), &[0, 0, 0, ICMPV6]];
    let checksum = internet_checksum(&[&pseudo_header.concat()[..], &message].concat());
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = Vec::with_capacity(86);
    frame.extend(to_mac);
    frame.extend(from_mac);
    frame.extend([0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([ICMPV6, 255]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(message);
    frame
}

/// The checksum of the internet protocols (RFC 1071) over an even number of bytes.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0x72, 10, 88, 0, 10];

    /// With the checksum in it, the sum over pseudo-header and message is zero.
    fn is_summed_up(frame: &[u8]) -> bool {
        let (header, message) = frame[14..].split_at(40);
        let length = [0, 0, 0, message.len() as u8, 0, 0, 0, ICMPV6];
        internet_checksum(&[&header[8..40], &length, message].concat()) == 0 && message[2..4] != [0, 0]
    }

    #[test]
    fn icmpv6_messages_have_a_right_checksum() {
        let address: Ipv6Addr = "fd88::10".parse().unwrap();
        let advertisement = neighbour_advertisement(MAC, address);
        assert_eq!(advertisement.len(), 14 + 40 + 32);
        assert!(is_summed_up(&advertisement));
        let probe = neighbour_solicitation(&Asker::nobody(MAC), address);
        // RFC 4861, section 4.3: without a sender there is no option with its address.
        assert_eq!(probe.len(), 14 + 40 + 24);
        assert!(is_summed_up(&probe));
        let asker = Asker { mac: MAC, addresses: (Ipv4Addr::LOCALHOST, address) };
        assert!(is_summed_up(&neighbour_solicitation(&asker, "fd88::1".parse().unwrap())));
    }

    #[test]
    fn answers_are_read_and_questions_are_none() {
        let (v4, v6): (Ipv4Addr, Ipv6Addr) = ("10.88.0.1".parse().unwrap(), "fd88::1".parse().unwrap());
        let mut reply = arp_request(MAC, v4, Ipv4Addr::UNSPECIFIED);
        assert_eq!(who_answers(&reply), None);
        reply[21] = 2;
        assert_eq!(who_answers(&reply), Some(v4.into()));
        assert_eq!(who_answers(&neighbour_advertisement(MAC, v6)), Some(v6.into()));
        assert_eq!(who_answers(&neighbour_solicitation(&Asker::nobody(MAC), v6)), None);
        let mut from_afar = neighbour_advertisement(MAC, v6);
        from_afar[21] = 254;
        assert_eq!(who_answers(&from_afar), None);
    }

    proptest::proptest! {
        #[test]
        fn any_frame_is_read(frame: Vec<u8>, kind in 0..3_usize, damaged in 0..86_usize, by: u8) {
            let _ = who_answers(&frame);
            let mut known = match kind {
                0 => arp_request(MAC, Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST),
                1 => neighbour_advertisement(MAC, Ipv6Addr::LOCALHOST),
                _ => neighbour_solicitation(&Asker::nobody(MAC), Ipv6Addr::LOCALHOST),
            };
            known.truncate(damaged.max(1));
            let at = usize::from(by) % known.len();
            known[at] ^= by;
            let _ = who_answers(&known);
        }
    }
}
