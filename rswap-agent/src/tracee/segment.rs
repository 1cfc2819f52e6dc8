//! TCP segments as whole IP packets, for the two cases in which the kernel makes none: what a restored socket's
//! peer had sent (its acknowledgement, the end of its stream), and what has to be sent again at once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const FIN: u8 = 1;
const PSH: u8 = 8;
const ACK: u8 = 16;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A segment that acknowledges something, as all do after the first.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Who sends it.
    pub from: SocketAddr,
    /// Who gets it; of the same family.
    pub to: SocketAddr,
    /// Sequence number of its first byte.
    pub sequence: u32,
    /// What was received.
    pub acknowledged: u32,
    /// The window, already scaled.
    pub window: u16,
    /// The sender's clock, if timestamps were agreed upon.
    pub timestamp: Option<u32>,
    /// It ends the stream.
    pub end: bool,
    /// Its data.
    pub data: &'a [u8],
}

impl Segment<'_> {
    /// The IP packet.
    pub fn to_packet(self) -> Vec<u8> {
        let segment = self.to_segment();
        let mut packet = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ipv4_header(from, to, TCP, segment.len()),
            (from, to) => ipv6_header(as_v6(from), as_v6(to), TCP, segment.len()),
        };
        packet.extend(segment);
        packet
    }

    fn to_segment(self) -> Vec<u8> {
        let options: Vec<u8> = match self.timestamp {
            // Two of padding, then the option; the peer's clock isn't known, and 0 says so.
            Some(clock) => [&[1, 1, 8, 10][..], &clock.to_be_bytes(), &[0; 4]].concat(),
            None => Vec::new(),
        };
        let header_words = (20 + options.len()) / 4;
        let push = if self.data.is_empty() { 0 } else { PSH };
        let flags = ACK | push | if self.end { FIN } else { 0 };
        let mut segment = Vec::with_capacity(header_words * 4 + self.data.len());
        segment.extend(self.from.port().to_be_bytes());
        segment.extend(self.to.port().to_be_bytes());
        segment.extend(self.sequence.to_be_bytes());
        segment.extend(self.acknowledged.to_be_bytes());
        segment.extend([(header_words as u8) << 4, flags]);
        segment.extend(self.window.to_be_bytes());
        segment.extend([0; 4]); // checksum, urgent pointer
        segment.extend(options);
        segment.extend(self.data);
        let sum = checksum(&[&pseudo_header(self.from.ip(), self.to.ip(), TCP, segment.len()), &segment]);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        segment
    }
}

/// A UDP datagram as a whole IP packet; `from` and `to` are of the same family.
pub fn udp_packet(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let length = 8 + data.len();
    let mut datagram = Vec::with_capacity(length);
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend((length as u16).to_be_bytes());
    datagram.extend([0; 2]);
    datagram.extend(data);
    // A sum of 0 would mean that there is none.
    let sum = match checksum(&[&pseudo_header(from.ip(), to.ip(), UDP, length), &datagram]) {
        0 => u16::MAX,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    let mut packet = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ipv4_header(from, to, UDP, length),
        (from, to) => ipv6_header(as_v6(from), as_v6(to), UDP, length),
    };
    packet.extend(datagram);
    packet
}

/// What the checksum of a transport protocol covers besides its own bytes.
fn pseudo_header(from: IpAddr, to: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut header = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (from, to) => [as_v6(from).octets(), as_v6(to).octets()].concat(),
    };
    header.extend((length as u32).to_be_bytes());
    header.extend([0, 0, 0, protocol]);
    header
}

fn as_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// RFC 791, section 3.1.
fn ipv4_header(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: usize) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + payload as u16).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]); // no fragments; 64 hops; checksum
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

/// RFC 8200, section 3.
fn ipv6_header(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: usize) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0];
    header.extend((payload as u16).to_be_bytes());
    header.extend([protocol, 64]);
    header.extend(from.octets());
    header.extend(to.octets());
    header
}

/// RFC 1071; all parts but the last must have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    !(sum as u16)
}

/// The address in a `struct sockaddr_in` or `sockaddr_in6`; one that maps IPv4 counts as IPv4, as it does on the
/// wire. `None` when it is neither.
pub fn socket_address(name: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*name.first_chunk()?));
    let port = u16::from_be_bytes([*name.get(2)?, *name.get(3)?]);
    let address: IpAddr = match (family, name.len()) {
        (libc::AF_INET, 16) => Ipv4Addr::from(*name[4..].first_chunk::<4>()?).into(),
        (libc::AF_INET6, 28) => Ipv6Addr::from(*name[8..].first_chunk::<16>()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment<'a>(from: &str, to: &str, data: &'a [u8]) -> Segment<'a> {
        let address = |text: &str| text.parse().expect("an address");
        Segment {
            from: address(from),
            to: address(to),
            sequence: 7,
            acknowledged: 9,
            window: 512,
            timestamp: Some(77),
            end: false,
            data,
        }
    }

    #[test]
    fn a_packet_has_its_lengths_and_checksums() {
        let packet = segment("10.0.0.1:80", "10.0.0.2:4000", b"abc").to_packet();
        assert_eq!(packet.len(), 20 + 32 + 3);
        assert_eq!(packet[2..4], 55_u16.to_be_bytes());
        assert_eq!(checksum(&[&packet[..20]]), 0);
        let pseudo = [&packet[12..20], &[0, TCP, 0, 35]].concat();
        assert_eq!(checksum(&[&pseudo, &packet[20..]]), 0);

        let packet = segment("[fd00::1]:80", "[fd00::2]:4000", b"abcd").to_packet();
        assert_eq!(packet.len(), 40 + 32 + 4);
        let pseudo = [&packet[8..40], &[0, 0, 0, 36, 0, 0, 0, TCP]].concat();
        assert_eq!(checksum(&[&pseudo, &packet[40..]]), 0);
    }

    #[test]
    fn names_are_understood() {
        let mut name = vec![0; 28];
        name[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        name[2..4].copy_from_slice(&80_u16.to_be_bytes());
        name[8..24].copy_from_slice(&Ipv4Addr::new(10, 1, 2, 3).to_ipv6_mapped().octets());
        assert_eq!(socket_address(&name), Some("10.1.2.3:80".parse().expect("an address")));
        assert_eq!(socket_address(&name[..27]), None);
    }

    proptest! {
        #[test]
        fn arbitrary_names_never_panic(name in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = socket_address(&name);
        }
    }
}
