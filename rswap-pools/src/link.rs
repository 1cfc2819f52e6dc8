//! Network links.

use crate::{Known, LocalKind, State, root::Root};

const NET: &str = "/sys/class/net";
/// ARPHRD_LOOPBACK.
const LOOPBACK: u32 = 772;

/// A link as it was found.
pub(crate) struct Link {
    pub(crate) interface: String,
    pub(crate) kind: LocalKind,
    pub(crate) capacity: Option<Known>,
    pub(crate) state: State,
}

/// All interfaces but loopback and the instances' ends: veths that are ports of a bridge.
pub(crate) fn links(root: &Root<'_>) -> Vec<Link> {
    root.names(NET).into_iter().filter_map(|interface| link(root, interface)).collect()
}

fn link(root: &Root<'_>, interface: String) -> Option<Link> {
    let at = |file: &str| format!("{NET}/{interface}/{file}");
    // Files such as bonding_masters are in the directory, too.
    let kind_number: u32 = root.number(&at("type"))?;
    let master = root.link_name(&at("master"));
    let paired = root.number::<u32>(&at("iflink")) != root.number::<u32>(&at("ifindex"));
    let device_type = uevent_type(&root.text(&at("uevent")).unwrap_or_default());
    let what = match device_type {
        Some(named) => named,
        None if root.has(&at("bridge")) => "bridge".to_owned(),
        None if root.has(&at("bonding")) => "bond".to_owned(),
        None if root.has(&at("device")) => "physical".to_owned(),
        None if root.has(&at("tun_flags")) => "tun".to_owned(),
        None if paired => "veth".to_owned(),
        None => "virtual".to_owned(),
    };
    if kind_number == LOOPBACK || (what == "veth" && master.is_some()) {
        return None;
    }
    let mut members = root.names(&at("brif"));
    members
        .extend(root.text(&at("bonding/slaves")).iter().flat_map(|text| text.split(' ')).map(str::to_owned));
    members.retain(|member| !member.is_empty());
    // Mbit/s; -1 or an error where the driver doesn't know, or the link is down.
    let speed = root.number::<i64>(&at("speed")).filter(|&speed| speed > 0);
    let state = state(root.text(&at("operstate")).as_deref(), root.number(&at("carrier")));
    let kind = LocalKind::Link {
        what,
        members,
        master,
        mtu: root.number(&at("mtu")),
        interface: interface.clone(),
        instance_rate: None,
    };
    let capacity = speed.map(|speed| Known::found(speed as f64 * 1e6, at("speed")));
    Some(Link { kind, capacity, state, interface })
}

/// Drivers that don't keep `operstate` say `unknown`: then the carrier counts.
fn state(operstate: Option<&str>, carrier: Option<u8>) -> State {
    match (operstate, carrier) {
        (Some("up"), _) | (Some("unknown"), None | Some(1..)) | (None, _) => State::Online,
        (Some("unknown"), Some(0)) => State::Degraded { reason: "it has no carrier".to_owned() },
        (Some(other), _) => State::Degraded { reason: format!("it is {other}") },
    }
}

/// DEVTYPE of a uevent file: bridge, bond, vlan, wlan, ...
fn uevent_type(text: &str) -> Option<String> {
    text.lines()
        .find_map(|line| line.strip_prefix("DEVTYPE="))
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
}

/// Bytes (received, sent) since the interface was made.
pub(crate) fn bytes(root: &Root<'_>, interface: &str) -> Option<(u64, u64)> {
    let at = |file: &str| root.number(&format!("{NET}/{interface}/statistics/{file}"));
    Some((at("rx_bytes")?, at("tx_bytes")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_up_or_says_why_not() {
        assert_eq!(state(Some("up"), None), State::Online);
        assert_eq!(state(Some("unknown"), Some(1)), State::Online);
        assert_eq!(state(None, None), State::Online);
        for (operstate, carrier) in [("down", None), ("lowerlayerdown", Some(0)), ("unknown", Some(0))] {
            assert!(state(Some(operstate), carrier).reason().is_some(), "{operstate}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read(text in proptest::prelude::any::<String>(), carrier: Option<u8>) {
            let _ = (state(Some(&text), carrier), uevent_type(&text));
        }
    }
}
