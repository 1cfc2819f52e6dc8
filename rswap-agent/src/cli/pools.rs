//! `pools`: what there is to sit on, and where each number comes from.

use serde::Serialize;

use super::{
    PoolsArguments, print_json,
    table::{bytes, or_dash, table},
};
use crate::{
    control::client::Client,
    pool::{Inventory, Known, LocalKind, LocalPool, Pool, PoolKind, PoolState, Source, cpu_list},
};

/// What `--json` prints.
#[derive(Serialize)]
struct Shown {
    /// What plans see: core sets, this host, other hosts. `used` is what instances use.
    planned: Vec<Pool>,
    /// What this host has: `used` is what anybody uses.
    #[serde(flatten)]
    inventory: Inventory,
}

pub(super) async fn pools(client: &Client, arguments: PoolsArguments) -> anyhow::Result<()> {
    let planned: Vec<Pool> = client.get("/v1/pools").await?;
    let inventory: Inventory = client.get("/v1/inventory").await?;
    if arguments.output.json {
        return print_json(&Shown { planned, inventory });
    }
    if arguments.sources {
        sources(&inventory);
        return Ok(());
    }
    let mut rows =
        table(&["NAME", "KIND", "CAPACITY", "USED", "FREE", "BUSY", "COST/H", "PERFORMANCE", "STATE"]);
    for pool in &inventory.pools {
        let amount = |known: &Option<Known>| {
            or_dash(known.as_ref().map(|known| marked(amount(pool, known.value), known)))
        };
        let draining = planned.iter().any(|seen| seen.name == pool.name && seen.state == PoolState::Draining);
        rows.add_row([
            pool.name.clone(),
            kind(pool, &inventory),
            amount(&pool.capacity),
            amount(&pool.used),
            amount(&pool.free),
            or_dash(pool.busy.as_ref().map(|busy| format!("{:.0} %", busy.value * 100.0))),
            or_dash(
                pool.cost_per_hour
                    .as_ref()
                    .map(|cost| marked(format!("{}/{}", cost.value, unit(pool)), cost)),
            ),
            or_dash(performance(pool)),
            match pool.state.reason() {
                Some(reason) => format!("{}: {reason}", pool.state.word()),
                None if draining => "draining".to_owned(),
                None => pool.state.word().to_owned(),
            },
        ]);
    }
    for pool in planned.iter().filter(|pool| pool.cpus().is_none() && !pool.kind.is_for_flows()) {
        rows.add_row(host_row(pool));
    }
    println!("{rows}");
    println!(
        "= configured, * measured, ^ experienced by instances, ~ by default, others found in the kernel's files (see --sources); - unknown"
    );
    Ok(())
}

/// This host as a whole, or another one: what plans know of it.
fn host_row(pool: &Pool) -> [String; 9] {
    let both = |cores: f64, memory: u64| format!("{cores:.2} cores, {}", bytes(memory as f64));
    let (capacity, used) = (&pool.capacity, &pool.used);
    let left = capacity.memory_bytes.saturating_sub(used.memory_bytes);
    [
        pool.name.clone(),
        match &pool.kind {
            PoolKind::Host { address } => format!("host {address}"),
            _ => "this host".to_owned(),
        },
        both(capacity.cores, capacity.memory_bytes),
        both(used.cores, used.memory_bytes),
        both((capacity.cores - used.cores).max(0.0), left),
        "-".to_owned(),
        format!("{}/core {}/GiB", pool.cost_per_core_hour, pool.cost_per_gib_hour),
        format!("speed {}", pool.performance),
        match &pool.state {
            PoolState::Ready => "ready".to_owned(),
            PoolState::Draining => "draining".to_owned(),
            PoolState::Unavailable { reason } => reason.clone(),
        },
    ]
}

fn kind(pool: &LocalPool, inventory: &Inventory) -> String {
    match &pool.kind {
        LocalKind::Cores { cpus, instance_cores, instance_weight, .. } => {
            let most =
                instance_cores.as_ref().map(|most| format!(", {} an instance", amount(pool, most.value)));
            let weight = instance_weight.as_ref().map(|weight| format!(", weight {}", weight.value));
            let (most, weight) = (most.unwrap_or_default(), weight.unwrap_or_default());
            format!("cpus {}{most}{weight}", cpu_list::format(cpus))
        }
        LocalKind::Memory { nodes, tier, .. } => {
            let tier = tier.map_or_else(String::new, |tier| format!(", tier {tier}"));
            if nodes.is_empty() {
                "memory".to_owned()
            } else {
                format!("node {}{tier}", cpu_list::format(nodes))
            }
        }
        LocalKind::Swap { what, compression, .. } => match compression {
            Some(compression) => format!("swap on {what} ({compression})"),
            None => format!("swap on {what}"),
        },
        LocalKind::Storage { fs_type, devices, remote, .. } => {
            let device =
                devices.first().and_then(|name| inventory.devices.iter().find(|device| device.name == *name));
            match device {
                Some(device) => {
                    format!("{fs_type} on {} ({})", device.name, format!("{:?}", device.what).to_lowercase())
                }
                None if *remote => format!("{fs_type} (remote)"),
                None => fs_type.clone(),
            }
        }
        LocalKind::Link { what, members, instance_rate, .. } => {
            let what = match members.is_empty() {
                true => format!("{what} link"),
                false => format!("{what} of {}", members.join(", ")),
            };
            match instance_rate {
                Some(rate) => format!("{what}, {} an instance", amount(pool, rate.value)),
                None => what,
            }
        }
    }
}

/// In the pool's unit.
fn amount(pool: &LocalPool, value: f64) -> String {
    match pool.kind {
        LocalKind::Cores { .. } => format!("{value:.2} cores"),
        LocalKind::Memory { .. } | LocalKind::Swap { .. } | LocalKind::Storage { .. } => bytes(value),
        LocalKind::Link { .. } => format!("{:.1} Mbit/s", value / 1e6),
    }
}

/// What an hour is paid for.
fn unit(pool: &LocalPool) -> &'static str {
    match pool.kind {
        LocalKind::Cores { .. } => "core",
        LocalKind::Memory { .. } | LocalKind::Swap { .. } | LocalKind::Storage { .. } => "GiB",
        LocalKind::Link { .. } => "Gbit/s",
    }
}

fn performance(pool: &LocalPool) -> Option<String> {
    let measures: Vec<String> = pool
        .performance
        .iter()
        .map(|measure| marked(format!("{} {}", measure.what, rounded(measure.known.value)), &measure.known))
        .collect();
    (!measures.is_empty()).then(|| measures.join("\n"))
}

/// As many digits as mean something.
pub(super) fn rounded(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

fn marked(text: String, known: &Known) -> String {
    let mark = match known.source {
        Source::Found { .. } => "",
        Source::Configured { .. } => "=",
        Source::Measured { .. } => "*",
        Source::Experienced { .. } => "^",
        Source::Default => "~",
    };
    text + mark
}

fn sources(inventory: &Inventory) {
    let mut rows = table(&["POOL", "NUMBER", "VALUE", "FROM"]);
    for pool in &inventory.pools {
        let amounts = [("capacity", &pool.capacity), ("used", &pool.used), ("free", &pool.free)];
        let mut numbers: Vec<(String, Option<&Known>)> = amounts
            .into_iter()
            .map(|(name, known)| (format!("{name}_{}", amount_unit(pool)), known.as_ref()))
            .collect();
        numbers.push(("busy_share".to_owned(), pool.busy.as_ref()));
        numbers.push((
            format!("cost_per_{}_hour", unit(pool).to_lowercase().replace("/s", "")),
            pool.cost_per_hour.as_ref(),
        ));
        numbers.extend(pool.performance.iter().map(|measure| (measure.what.clone(), Some(&measure.known))));
        for (name, known) in numbers {
            let from = match known.map(|known| &known.source) {
                Some(Source::Found { file }) => file.clone(),
                Some(Source::Configured { key }) => format!("configuration: {key}"),
                Some(Source::Measured { at }) => format!("measured at {} ms since the epoch", at.0),
                Some(Source::Experienced { at, requests }) => {
                    format!(
                        "experienced in {requests} requests of instances until {} ms since the epoch",
                        at.0
                    )
                }
                Some(Source::Default) => "default".to_owned(),
                None => "unknown".to_owned(),
            };
            rows.add_row([pool.name.clone(), name, or_dash(known.map(|known| rounded(known.value))), from]);
        }
    }
    println!("{rows}");
}

fn amount_unit(pool: &LocalPool) -> &'static str {
    match pool.kind {
        LocalKind::Cores { .. } => "cores",
        LocalKind::Memory { .. } | LocalKind::Swap { .. } | LocalKind::Storage { .. } => "bytes",
        LocalKind::Link { .. } => "bits_per_s",
    }
}
