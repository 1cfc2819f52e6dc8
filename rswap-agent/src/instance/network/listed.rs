//! What the calling thread's network namespace holds beside its sysctls, each thing as a text that says the same in every
//! namespace that has the same: interfaces by their names, and nothing that the kernel made of something else, or that
//! changes by itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv6Addr},
};

use rtnetlink::{
    packet_core::{NetlinkDeserializable, NetlinkHeader},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage, AddressProtocol},
        link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp},
        neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol},
        tc::{TcAttribute, TcMessage},
    },
};

use super::INNER;
use crate::sys::netlink::{Message, dump};

/// Requests of `NETLINK_ROUTE` (`linux/rtnetlink.h`): type, and size of the fixed part.
const RTM_GETLINK: (u16, usize) = (18, 16);
const RTM_GETADDR: (u16, usize) = (22, 8);
const RTM_GETROUTE: (u16, usize) = (26, 12);
const RTM_GETNEIGH: (u16, usize) = (30, 12);
const RTM_GETRULE: (u16, usize) = (34, 12);
const RTM_GETQDISC: (u16, usize) = (38, 20);
/// Where `struct ndmsg` has its flags, and the flag that asks for proxies.
const NDM_FLAGS_AT: usize = 10;
const NTF_PROXY: u8 = 8;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE`, with a `struct nfgenmsg` for all families.
const NFT_GETTABLE: (u16, usize) = (10 << 8 | 1, 4);
const NFTA_TABLE_NAME: u16 = 1;
/// `linux/xfrm.h`.
const XFRM_MSG_GETSA: u16 = 0x12;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const RT_TABLE_MAIN: u32 = 254;

/// All of it, but for the interface `except` and what belongs to it.
pub(super) fn all(except: Option<&str>) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeMap::new();
    let mut left_out = None;
    let mut found = BTreeSet::new();
    for message in ask(RTM_GETLINK)? {
        let RouteNetlinkMessage::NewLink(link) = message else { continue };
        let Some(name) = name_of(&link) else { continue };
        if except == Some(name.as_str()) {
            left_out = Some(link.header.index);
            continue;
        }
        found.insert(interface(&name, &link));
        names.insert(link.header.index, name);
    }
    let name = |index: u32| names.get(&index).cloned().unwrap_or_else(|| format!("interface {index}"));
    let mut add = |index: u32, text: Option<String>| {
        if Some(index) != left_out {
            found.extend(text);
        }
    };
    for message in [RTM_GETADDR, RTM_GETROUTE, RTM_GETNEIGH, RTM_GETRULE, RTM_GETQDISC].map(ask) {
        for message in message? {
            match message {
                RouteNetlinkMessage::NewAddress(one) => add(one.header.index, address(&one, &name)),
                RouteNetlinkMessage::NewRoute(one) => add(0, route(&one, &name)),
                RouteNetlinkMessage::NewNeighbour(one) => add(one.header.ifindex, neighbour(&one, &name)),
                RouteNetlinkMessage::NewRule(one) => {
                    add(0, Some(format!("rule {:?} {:?}", one.header, one.attributes)))
                }
                RouteNetlinkMessage::NewQueueDiscipline(one) => {
                    add(one.header.index as u32, discipline(&one, &name))
                }
                _ => {}
            }
        }
    }
    let mut proxies = vec![0; RTM_GETNEIGH.1];
    proxies[NDM_FLAGS_AT] = NTF_PROXY;
    for message in routing(Message { kind: RTM_GETNEIGH.0, body: proxies })? {
        if let RouteNetlinkMessage::NewNeighbour(one) = message {
            add(one.header.ifindex, neighbour(&one, &name));
        }
    }
    found.extend(filters()?);
    found.extend(transformations()?);
    Ok(found)
}

fn ask((kind, size): (u16, usize)) -> io::Result<Vec<RouteNetlinkMessage>> {
    routing(Message { kind, body: vec![0; size] })
}

fn routing(request: Message) -> io::Result<Vec<RouteNetlinkMessage>> {
    let parse = |message: Message| {
        let mut header = NetlinkHeader::default();
        header.message_type = message.kind;
        RouteNetlinkMessage::deserialize(&header, &message.body).map_err(io::Error::other)
    };
    dump(libc::NETLINK_ROUTE, request)?.into_iter().map(parse).collect()
}

fn name_of(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn interface(name: &str, link: &LinkMessage) -> String {
    // Others follow from the kind of interface, or from the other end of it.
    let flags = [
        (LinkFlags::Up, "up"),
        (LinkFlags::Noarp, "noarp"),
        (LinkFlags::Promisc, "promisc"),
        (LinkFlags::Allmulti, "allmulti"),
    ];
    let set = flags.iter().filter(|(flag, _)| link.header.flags.contains(*flag));
    let mut parts: Vec<String> = set.map(|(_, name)| (*name).to_owned()).collect();
    for attribute in &link.attributes {
        parts.extend(match attribute {
            LinkAttribute::Mtu(bytes) => Some(format!("mtu {bytes}")),
            LinkAttribute::Address(bytes) if bytes.iter().any(|byte| *byte != 0) => {
                let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                Some(format!("address {}", bytes.join(":")))
            }
            LinkAttribute::TxQueueLen(frames) => Some(format!("txqueuelen {frames}")),
            LinkAttribute::IfAlias(alias) => Some(format!("alias {alias}")),
            LinkAttribute::LinkInfo(all) => all.iter().find_map(|info| match info {
                LinkInfo::Kind(kind) => Some(format!("kind {kind}")),
                _ => None,
            }),
            LinkAttribute::Xdp(parts) => {
                parts.iter().any(|part| matches!(part, LinkXdp::ProgId(_))).then(|| "xdp".to_owned())
            }
            _ => None,
        });
    }
    parts.sort();
    format!("interface {name} ({})", parts.join(", "))
}

fn address(one: &AddressMessage, name: &impl Fn(u32) -> String) -> Option<String> {
    let mut address = None;
    let mut is_made = false;
    let mut rest = String::new();
    for attribute in &one.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) => {
                address.get_or_insert(*other);
            }
            AddressAttribute::Broadcast(to) => rest += &format!(", broadcast {to}"),
            AddressAttribute::Protocol(AddressProtocol::LinkLocal) => is_made = true,
            AddressAttribute::CacheInfo(life) if life.ifa_valid != u32::MAX => rest += ", for a time",
            _ => {}
        }
    }
    let address = address?;
    // The kernel gives one to each interface that has a line, and says so since Linux 5.18.
    if is_made || matches!(address, IpAddr::V6(address) if is_of_the_kernel(address)) {
        return None;
    }
    let (prefix, at) = (one.header.prefix_len, name(one.header.index));
    Some(format!("address {address}/{prefix} on {at}, scope {:?}{rest}", one.header.scope))
}

/// Link-local, and made of an Ethernet address (RFC 4291, appendix A).
fn is_of_the_kernel(address: Ipv6Addr) -> bool {
    let bytes = address.octets();
    address.is_unicast_link_local() && bytes[11..13] == [0xff, 0xfe]
}

fn route(one: &RouteMessage, name: &impl Fn(u32) -> String) -> Option<String> {
    // Those of the kernel follow from the addresses; others are what it has learnt of single peers.
    let derived = matches!(one.header.protocol, RouteProtocol::Kernel | RouteProtocol::IcmpRedirect);
    if derived || one.header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let of = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => address.to_string(),
        RouteAddress::Inet6(address) => address.to_string(),
        other => format!("{other:?}"),
    };
    let mut to = format!("all of {:?}", one.header.address_family);
    let mut parts = Vec::new();
    for attribute in &one.attributes {
        match attribute {
            RouteAttribute::Destination(address) => to = of(address),
            RouteAttribute::Gateway(address) => parts.push(format!("via {}", of(address))),
            RouteAttribute::PrefSource(address) => parts.push(format!("from {}", of(address))),
            RouteAttribute::Oif(index) => parts.push(format!("on {}", name(*index))),
            RouteAttribute::Table(RT_TABLE_MAIN) | RouteAttribute::CacheInfo(_) => {}
            other => parts.push(format!("{other:?}")),
        }
    }
    parts.sort();
    let header = &one.header;
    Some(format!(
        "route to {to}/{} {} ({:?}, {:?}, {:?}, TOS {})",
        header.destination_prefix_length,
        parts.join(", "),
        header.kind,
        header.protocol,
        header.scope,
        header.tos,
    ))
}

/// Those that the kernel asks for by itself are no setting.
fn neighbour(one: &NeighbourMessage, name: &impl Fn(u32) -> String) -> Option<String> {
    let is_proxy = one.header.flags.contains(NeighbourFlags::Proxy);
    if !is_proxy && one.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut text =
        format!("{} on {}", if is_proxy { "proxy" } else { "neighbour" }, name(one.header.ifindex));
    for attribute in &one.attributes {
        if let NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_) = attribute {
            text += &format!(", {attribute:?}");
        }
    }
    Some(text)
}

/// That of the instance's interface is its pool's (`super::rate`).
fn discipline(one: &TcMessage, name: &impl Fn(u32) -> String) -> Option<String> {
    let kind = one.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    })?;
    let at = name(one.header.index as u32);
    let of_the_pool = at == INNER && matches!(kind, "tbf" | "noqueue");
    (!of_the_pool).then(|| format!("queueing discipline {kind} on {at}"))
}

/// Tables of nftables, and of the iptables before them. Those that are empty as well: whoever makes one means to use it.
fn filters() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let (kind, size) = NFT_GETTABLE;
    for table in if_known(dump(libc::NETLINK_NETFILTER, Message { kind, body: vec![0; size] }))? {
        let family = table.body.first().copied().unwrap_or_default();
        let name = text_attribute(table.body.get(size..).unwrap_or_default(), NFTA_TABLE_NAME);
        found.push(format!("nftables table {} of family {family}", name.unwrap_or_default()));
    }
    for (family, file) in
        [("ip", "ip_tables_names"), ("ip6", "ip6_tables_names"), ("arp", "arp_tables_names")]
    {
        let tables = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        found.extend(tables.lines().map(|table| format!("{family}tables table {table}")));
    }
    Ok(found)
}

/// IPsec.
fn transformations() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for (kind, what) in [(XFRM_MSG_GETSA, "state"), (XFRM_MSG_GETPOLICY, "policy")] {
        let all = if_known(dump(libc::NETLINK_XFRM, Message { kind, body: Vec::new() }))?;
        found.extend((1..=all.len()).map(|number| format!("IPsec {what} {number}")));
    }
    Ok(found)
}

/// What a kernel doesn't know, nobody has.
fn if_known(found: io::Result<Vec<Message>>) -> io::Result<Vec<Message>> {
    let unknown = [libc::EPROTONOSUPPORT, libc::EOPNOTSUPP, libc::EINVAL, libc::ENOENT];
    match found {
        Err(error) if error.raw_os_error().is_some_and(|number| unknown.contains(&number)) => Ok(Vec::new()),
        found => found,
    }
}

/// The attribute `wanted` (`struct nlattr`) as text.
fn text_attribute(mut rest: &[u8], wanted: u16) -> Option<String> {
    while let Some(header) = rest.first_chunk::<4>() {
        let [a, b, c, d] = *header;
        let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let value = rest.get(4..length)?;
        if kind == wanted {
            return Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tables_are_found_and_damage_is_none() {
        let attribute = [8, 0, 2, 0, 1, 2, 3, 4, 9, 0, 1, 0, b'n', b'a', b't', b's', 0, 0, 0, 0];
        assert_eq!(text_attribute(&attribute, NFTA_TABLE_NAME).as_deref(), Some("nats"));
        for cut in 0..17 {
            assert_eq!(text_attribute(&attribute[..cut], NFTA_TABLE_NAME), None, "{cut}");
        }
        assert_eq!(text_attribute(&[0; 8], NFTA_TABLE_NAME), None);
    }

    #[test]
    fn the_kernels_own_addresses_are_known() {
        assert!(is_of_the_kernel("fe80::72:aff:fe58:a".parse().expect("an address")));
        assert!(!is_of_the_kernel("fe80::1".parse().expect("an address")));
        assert!(!is_of_the_kernel("fd00::72:aff:fe58:a".parse().expect("an address")));
    }
}
