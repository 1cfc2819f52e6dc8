//! `ps`, `plan`, `explain`: what the agent knows, as tables.

use super::{
    ExplainArguments, Output, print_json,
    table::{bytes, nanoseconds, or_dash, table},
};
use crate::{
    control::client::Client,
    instance::{InstanceName, NetworkIdentity},
    plan::{self, Decision, Plan, VolumeView},
    profile::Profile,
    status::InstanceView,
    swap::memory::InSwap,
};

pub(super) async fn ps(client: &Client, output: Output) -> anyhow::Result<()> {
    let views: Vec<InstanceView> = client.get("/v1/profiles").await?;
    if output.json {
        return print_json(&views);
    }
    let mut rows = table(&[
        "NAME",
        "ORIGIN",
        "PID",
        "POOL",
        "ADDRESS",
        "CORES",
        "RESIDENT",
        "WAIT",
        "DIRTY/S",
        "I/O/S",
        "I/O P99",
        "NET IN/S",
        "NET OUT/S",
        "COMMAND",
    ]);
    for view in &views {
        let instance = &view.instance;
        let profile = view.profile.as_ref();
        let net = profile.and_then(Profile::net_bytes_per_s);
        let wait = profile.map(|p| &p.cpu.run_queue_ns).filter(|queue| queue.count > 0);
        rows.add_row([
            instance.name.to_string(),
            format!("{:?}", instance.origin).to_lowercase(),
            or_dash(instance.init_pid.map(|pid| pid.to_string())),
            or_dash(instance.pool.clone()),
            or_dash(instance.network.as_ref().map(|network| reached(network, instance.uplink.as_deref()))),
            or_dash(profile.map(|p| format!("{:.2}", p.cpu.cores))),
            or_dash(profile.map(|p| bytes(p.memory.resident_bytes as f64))),
            or_dash(wait.map(|queue| nanoseconds(queue.sum as f64 / queue.count as f64))),
            or_dash(profile.and_then(|p| p.memory.dirty_bytes_per_s).map(bytes)),
            or_dash(profile.and_then(Profile::io_bytes_per_s).map(bytes)),
            or_dash(profile.and_then(|p| p.io_latency_ns().quantile(0.99)).map(|ns| nanoseconds(ns as f64))),
            or_dash(net.map(|(inwards, _)| bytes(inwards))),
            or_dash(net.map(|(_, outwards)| bytes(outwards))),
            one_line(&instance.command),
        ]);
    }
    println!("{rows}");
    for view in &views {
        for (volume, directory) in &view.volume_directories {
            let seen = view.volume_use.iter().find(|seen| seen.name == volume.as_str());
            println!("volume {volume} of {}: {}{}", view.instance.name, directory.display(), on_pool(seen));
        }
    }
    for (name, in_swap) in views.iter().filter_map(|view| Some((&view.instance.name, view.in_swap.as_ref()?)))
    {
        println!("{}", swapped(name, in_swap));
    }
    for (name, volume) in
        views.iter().filter_map(|view| Some((&view.instance.name, view.stands_for.as_ref()?)))
    {
        println!(
            "{name} STANDS STILL: a swap of its volume {volume} failed, and so did the way back. It is whole. \
             `rswap swap {name} POOL --volume {volume}` tries to bring it to an end, and so does an agent that is started anew"
        );
    }
    for (view, peer) in views.iter().filter_map(|view| Some((view, view.in_doubt.as_ref()?))) {
        println!(
            "{0} is IN DOUBT: it is frozen here, and may run at {peer}, which is asked until it answers. If that host is \
             gone for good: `rswap recover {0} --here` or `--there`",
            view.instance.name
        );
    }
    Ok(())
}

/// How much of an instance is in swap, and what the agent does about it.
fn swapped(name: &InstanceName, of: &InSwap) -> String {
    let size = |size: u64| bytes(size as f64);
    let reason = of.reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
    format!(
        "memory of {name} on {}: {} in swap, {} in memory; {} went, {} came back by use; it waits {:.2} % of the time; {}{reason}",
        of.pool,
        size(of.swapped_bytes),
        size(of.present_bytes),
        size(of.out_bytes),
        size(of.returned_bytes),
        of.pressure.share * 100.0,
        of.doing,
    )
}

/// What plans know of a volume.
fn on_pool(seen: Option<&VolumeView>) -> String {
    let Some(seen) = seen else { return String::new() };
    let pool = seen.pool.as_deref().map_or_else(|| "on no pool".to_owned(), |pool| format!("pool {pool}"));
    let (now, size) = (seen.now, bytes(seen.size_bytes as f64));
    format!(" ({pool}, {size}, {:.0} requests/s, {}/s)", now.operations_per_s, bytes(now.bytes_per_s))
}

/// The command, short enough for a table.
fn one_line(command: &[String]) -> String {
    const WIDTH: usize = 48;
    let words = command.join(" ");
    let plain = words.split_whitespace().collect::<Vec<_>>().join(" ");
    match plain.char_indices().nth(WIDTH) {
        Some((cut, _)) => format!("{}…", &plain[..cut]),
        None => plain,
    }
}

pub(super) async fn plan(client: &Client, output: Output) -> anyhow::Result<()> {
    let made: Plan = client.get("/v1/plan").await?;
    if output.json {
        return print_json(&made);
    }
    if made.decisions.is_empty() {
        println!("nothing to decide yet: no instance has a forecast (see `rswap ps`)");
    }
    for decision in &made.decisions {
        println!("{}", plan::explain(decision));
    }
    Ok(())
}

pub(super) async fn explain(client: &Client, arguments: &ExplainArguments) -> anyhow::Result<()> {
    let path = format!("/v1/decisions?instance={}", arguments.instance);
    let kept: Vec<Decision> = client.get(&path).await?;
    let last = &kept[kept.len().saturating_sub(arguments.last)..];
    if arguments.output.json {
        return print_json(&last);
    }
    if last.is_empty() {
        println!("nothing was decided about {} yet: it needs a forecast first", arguments.instance);
    }
    for decision in last {
        println!("{}", plan::explain(decision));
    }
    Ok(())
}

/// An instance's addresses, and the link that it was moved to.
fn reached(network: &NetworkIdentity, uplink: Option<&str>) -> String {
    match uplink {
        Some(uplink) => format!("{} via {uplink}", addresses(network)),
        None => addresses(network),
    }
}

/// An instance's addresses, for people.
fn addresses(network: &NetworkIdentity) -> String {
    match &network.ipv6 {
        Some(ipv6) => format!("{} {}", network.address, ipv6.address),
        None => network.address.to_string(),
    }
}
