//! What a program changes in its own network namespace: sysctls go along, all else is refused by its name until it is undone.

use std::process::Command;

use anyhow::{Context, ensure};
use rswap_tests::{Host, reason_to_skip, scene::Scene};
use serde_json::Value;

const ADDRESSES: [&str; 4] = ["--net", "10.88.0.10/24,gw=10.88.0.1", "--net", "fd88::10/64,gw=fd88::1"];

/// Sysctls, and what they are set to. The first changes others, which are set back after it, and the last can't be read
/// before it was set.
const SYSCTLS: [(&str, &str); 8] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/eth0/forwarding", "0"),
    ("net/core/somaxconn", "777"),
    ("net/ipv4/ip_local_port_range", "20000\t30000"),
    ("net/ipv4/ip_local_reserved_ports", "20001,20005-20009"),
    ("net/ipv4/ping_group_range", "0\t2147483647"),
    ("net/ipv6/conf/all/hop_limit", "9"),
    ("net/ipv6/conf/default/stable_secret", "0001:0002:0003:0004:0005:0006:0007:0008"),
];

/// Runs a command in the network namespace of instance `name`, as any program in it could.
fn inside(host: &Host, name: &str, words: &[&str]) -> anyhow::Result<String> {
    let pids = host.pids(name)?;
    let pid = pids.last().context("the instance has no process")?;
    let namespace = format!("--net=/proc/{pid}/ns/net");
    let output = Command::new("nsenter").arg(namespace).args(words).output()?;
    ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn set(host: &Host, name: &str, sysctl: &str, value: &str) -> anyhow::Result<()> {
    let write = format!("printf '%s' '{value}' > /proc/sys/{sysctl}");
    inside(host, name, &["sh", "-c", &write]).map(drop)
}

fn value(host: &Host, name: &str, sysctl: &str) -> anyhow::Result<String> {
    Ok(inside(host, name, &["cat", &format!("/proc/sys/{sysctl}")])?.trim_end().to_owned())
}

#[test]
fn sysctls_of_its_network_go_along() -> anyhow::Result<()> {
    if reason_to_skip("sysctls_of_its_network_go_along").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.run("forwarder", &ADDRESSES, &["sleep", "1000"])?;
    let untouched = "net/ipv4/tcp_syn_retries";
    let usual = value(&scene.a, "forwarder", untouched)?;
    for (sysctl, value) in SYSCTLS {
        set(&scene.a, "forwarder", sysctl, value)?;
    }
    let mut last = "777".to_owned();
    for (turn, (from, to)) in
        [(&scene.a, &scene.b), (&scene.b, &scene.a), (&scene.a, &scene.b)].iter().enumerate()
    {
        let host_before = std::fs::read_to_string("/proc/sys/net/core/somaxconn")?;
        scene.moved("forwarder", from, to)?;
        for (sysctl, wanted) in SYSCTLS {
            let wanted = if sysctl == "net/core/somaxconn" { last.as_str() } else { wanted };
            let is = value(to, "forwarder", sysctl)?;
            ensure!(is == wanted, "{sysctl} is {is:?} and was {wanted:?} before move {turn}");
        }
        ensure!(value(to, "forwarder", "net/ipv4/conf/lo/forwarding")? == "1", "ip_forward changes it");
        ensure!(value(to, "forwarder", untouched)? == usual, "{untouched} was changed");
        let host_now = std::fs::read_to_string("/proc/sys/net/core/somaxconn")?;
        ensure!(host_now == host_before, "the host's own was changed");
        // Changed again where it is, and back to what it is in a new namespace.
        last = (800 + turn).to_string();
        set(to, "forwarder", "net/core/somaxconn", &last)?;
    }
    Ok(())
}

/// Makes a table of nftables (`linux/netfilter/nf_tables.h`), or removes it: there may be no tool for it.
const NFT: &str = r"
import socket, struct, sys
def message(kind, flags, body):
    return struct.pack('=IHHII', 16 + len(body), kind, flags, 0, 0) + body
name = b'ours\0\0\0\0'
batch = lambda kind: message(kind, 1, struct.pack('=BBH', 0, 0, socket.htons(10)))
table = struct.pack('=BBH', 2, 0, 0) + struct.pack('=HH', 4 + 5, 1) + name
kind = 10 << 8 | (0 if sys.argv[1] == 'add' else 2)
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
netlink.send(batch(16) + message(kind, 1 | 4 | 0x400, table) + batch(17))
netlink.settimeout(5)
answer = netlink.recv(4096)
assert struct.unpack('=i', answer[16:20])[0] == 0, answer
";

/// How each change is made and undone, and what `rswap check` says of it. `nft` stands for the script.
const CHANGES: [(&str, &str, &str); 12] = [
    ("ip link add one type veth peer name two", "ip link del one", "interface one"),
    ("ip link set dev lo mtu 9000", "ip link set dev lo mtu 65536", "interface lo (mtu 9000"),
    ("ip link set dev eth0 promisc on", "ip link set dev eth0 promisc off", "promisc"),
    ("ip addr add 10.99.0.1/24 dev lo", "ip addr del 10.99.0.1/24 dev lo", "address 10.99.0.1/24 on lo"),
    ("ip addr add fe80::99/64 dev eth0", "ip addr del fe80::99/64 dev eth0", "address fe80::99/64 on eth0"),
    (
        "ip route add 10.77.0.0/16 via 10.88.0.2",
        "ip route del 10.77.0.0/16",
        "route to 10.77.0.0/16 on eth0, via 10.88.0.2",
    ),
    (
        "ip -6 route del default",
        "ip -6 route add default via fd88::1 dev eth0 proto static",
        "no longer: route to all of Inet6/0",
    ),
    ("ip rule add from 10.1.2.3 table 99", "ip rule del from 10.1.2.3 table 99", "10.1.2.3"),
    (
        "ip neigh add 10.88.0.77 lladdr 02:00:00:00:00:77 dev eth0",
        "ip neigh del 10.88.0.77 dev eth0",
        "neighbour on eth0, Destination(Inet(10.88.0.77))",
    ),
    ("ip neigh add proxy 10.88.0.78 dev eth0", "ip neigh del proxy 10.88.0.78 dev eth0", "proxy on eth0"),
    ("nft add", "nft delete", "nftables table ours of family 2"),
    (
        "ip xfrm policy add dir out src 10.66.0.0/24 dst 10.67.0.0/24",
        "ip xfrm policy delete dir out src 10.66.0.0/24 dst 10.67.0.0/24",
        "IPsec policy",
    ),
];

fn change(host: &Host, words: &str) -> anyhow::Result<()> {
    match words.strip_prefix("nft ") {
        Some(what) => inside(host, "changer", &["python3", "-c", NFT, what]).map(drop),
        None => inside(host, "changer", &words.split(' ').collect::<Vec<_>>()).map(drop),
    }
}

/// What `rswap check` refuses.
fn refused(host: &Host) -> anyhow::Result<Vec<String>> {
    let output = host.rswap(&["check", "--json", "changer"])?.output()?;
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(rows.iter().filter(|row| row["severity"] == "refused").map(|row| row["item"].to_string()).collect())
}

#[test]
fn other_changes_of_its_network_are_refused_until_they_are_undone() -> anyhow::Result<()> {
    if reason_to_skip("other_changes_of_its_network_are_refused_until_they_are_undone").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.run("changer", &ADDRESSES, &["sleep", "1000"])?;
    let (mut here, mut there) = (&scene.a, &scene.b);
    ensure!(refused(here)?.is_empty(), "nothing was changed yet: {:?}", refused(here)?);
    // Where it was started, and where it has arrived.
    for _ in 0..2 {
        for (made, undone, named) in CHANGES {
            change(here, made)?;
            let found = refused(here)?;
            ensure!(found.iter().any(|item| item.contains(named)), "{made} is not refused: {found:?}");
            change(here, undone)?;
            let found = refused(here)?;
            ensure!(found.is_empty(), "after {undone}: {found:?}");
        }
        let (made, undone, named) = CHANGES[3];
        change(here, made)?;
        let Err(reason) = here.migrate("changer", &there.migrate_address())?.end()? else {
            anyhow::bail!("it was moved all the same");
        };
        ensure!(reason.contains(named), "{reason}");
        ensure!(here.has_instance("changer")? && !there.has_processes()?, "something was touched");
        change(here, undone)?;
        scene.moved("changer", here, there)?;
        (here, there) = (there, here);
    }
    Ok(())
}
