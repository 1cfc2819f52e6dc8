//! Plans move instances between links: to the wide one before a load that repeats needs it, and back to the cheap one; the connections stay.

use std::{
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use anyhow::{Context, ensure};
use rswap_agent::status::InstanceView;
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{Manner, REDIS, VerifyingClient},
    load::{Load, Pattern},
    reason_to_skip, wait_for,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const LIMIT: Duration = Duration::from_secs(20);
/// Values of 64 KiB per second: few, then half as much again as the narrow link is configured to give.
const PATTERN: Pattern = Pattern {
    day: Duration::from_secs(12),
    cores: &[(0.0, 1.0), (0.45, 1.0), (0.57, 60.0), (0.90, 60.0), (0.95, 1.0)],
    peak_from: 0.57,
    peak_to: 0.90,
};
/// The days after which it has failed, if the instance has not moved.
const DAYS: u32 = 6;
const MORE: &str = r#"
[forecast]
horizons_ms = [250, 500, 1000, 2000, 3000]
min_seen = 96

[plan]
horizon_ms = 3000
cool_down_ms = 300
unavailability_cost_per_hour = 0.1

[pools]
look_every_ms = 200

[[pool]]
name = "narrow"
link = "br0"
capacity_gbit_per_s = 0.02
cost_per_gbit_hour = 0.1

[[pool]]
name = "wide"
link = "br1"
capacity_gbit_per_s = 1
cost_per_gbit_hour = 100
"#;

fn link_of(host: &Host) -> anyhow::Result<Option<String>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    Ok(views.into_iter().next().and_then(|view| view.instance.uplink))
}

#[test]
fn an_instance_is_on_the_wide_link_when_the_load_comes_and_on_the_cheap_one_otherwise() -> anyhow::Result<()>
{
    if reason_to_skip("an_instance_is_on_the_wide_link_when_the_load_comes_and_on_the_cheap_one_otherwise")
        .is_some()
    {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let options = HostOptions {
        mode: "act",
        window_ms: 250,
        more: MORE.to_owned(),
        own_links: true,
        ..HostOptions::default()
    };
    let host = fleet.host("a", &options)?;
    fleet.second_uplink(&host)?;
    wait_for("the second uplink", LIMIT, || {
        let pools = host.call(&["pools"])?;
        Ok(pools.lines().any(|line| line.contains("wide") && line.contains("online")).then_some(()))
    })?;
    host.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
    let knock = || {
        wait_for("Redis", LIMIT, || {
            Ok(TcpStream::connect_timeout(&(SERVER, 6379).into(), LIMIT).ok().map(drop))
        })
    };
    let knocking = fleet.client.spawn("knock", knock)?;
    knocking.join().map_err(|_| anyhow::anyhow!("the one who knocked panicked"))??;
    let client =
        VerifyingClient::start_in(Manner::Patient, &fleet.client, SERVER, Duration::from_millis(20))?;
    let load = Load::start_writes(&fleet.client, SERVER, PATTERN, 64 << 10)?;

    let on = |link: &str| Ok((link_of(&host)?.as_deref() == Some(link)).then_some(()));
    let moved = wait_for("the instance to be on the wide link", PATTERN.day * DAYS, || on("wide"));
    moved.or_else(|error| Err(error.context(host.call(&["plan"])?)))?;
    let at = load.started.elapsed();
    let peak = PATTERN.peak_start(PATTERN.day_at(at));
    println!("on the wide link after {at:?}, the peak is at {peak:?}");
    let explained = host.call(&["explain", "redis", "-n", "400"])?;
    wait_for("the instance to be on the cheap link again", PATTERN.day, || on("narrow"))?;
    println!("on the cheap link again after {:?}", load.started.elapsed());

    load.finish()?;
    let seen = client.finish(&fleet.client)?;
    println!(
        "{} writes acknowledged, {} lost, {} reconnects",
        seen.acked_writes, seen.lost_writes, seen.reconnects
    );
    ensure!(seen.lost_writes == 0 && seen.reconnects == 0, "a connection broke, or a write is lost");
    let why = explained.split("\n\n").filter(|text| text.contains("moves to wide in")).last();
    let why = why.with_context(|| format!("no decision to move is kept:\n{explained}"))?;
    println!("{why}");
    ensure!(why.contains("redis (link) moves to wide in") && why.contains("Mbit/s expected"), "{why}");
    ensure!(at < peak, "it came after the load");
    Ok(())
}
