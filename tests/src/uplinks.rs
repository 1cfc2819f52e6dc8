//! A host with two uplinks to one network, and pools for them.

use std::time::Duration;

use crate::{Fleet, Host, HostOptions, wait_for};

const LIMIT: Duration = Duration::from_secs(20);

/// `elsewhere` and `plain` are not there at first.
const POOLS: &str = r#"
[pools]
look_every_ms = 100

[[pool]]
name = "first"
link = "br0"

[[pool]]
name = "second"
link = "up1"

[[pool]]
name = "slow"
link = "br1"
instance_mbit_per_s = 40

[[pool]]
name = "elsewhere"
link = "br2"

[[pool]]
name = "plain"
link = "plain0"
"#;

/// Adds the host, and waits until its agent knows both uplinks.
pub fn host(fleet: &mut Fleet) -> anyhow::Result<Host> {
    let options = HostOptions { more: POOLS.to_owned(), own_links: true, ..HostOptions::default() };
    let host = fleet.host("a", &options)?;
    fleet.second_uplink(&host)?;
    wait_for("the second uplink", LIMIT, || {
        let pools = host.call(&["pools"])?;
        let is_online = |name: &str| pools.lines().any(|line| line.contains(name) && line.contains("online"));
        Ok((is_online("second") && is_online("slow")).then_some(()))
    })?;
    Ok(host)
}
