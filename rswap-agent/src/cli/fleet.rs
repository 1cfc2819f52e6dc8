//! `fleet`: what a controller knows, and what is wanted of its fleet.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use rswap_controller::{
    Address,
    link::{self, Connect, Secure, Whereabouts},
};
use rswap_fleet::HostName;
use rswap_trust::{Credentials, Files, Name, Role};
use serde_json::{Value, json};

use super::{
    Output, print_json,
    table::{bytes, or_dash, table},
};
use crate::{
    config::{Config, controller_name},
    units::UnixMillis,
};

/// Ended orders that are shown.
const ENDED_SHOWN: usize = 10;

#[derive(Debug, Args)]
pub(super) struct FleetArguments {
    /// The controller: HOST:PORT, or unix:/PATH [default: fleet.socket of the configuration]
    #[arg(long, global = true, value_name = "ADDRESS")]
    controller: Option<Whereabouts>,
    /// What its certificate names [default: the HOST of its address, if that is no number]
    #[arg(long, global = true, value_name = "NAME")]
    certificate_name: Option<Name>,
    /// The directory of an operator's ca.pem, certificate.pem and key.pem (`rswap pki issue --role operator`)
    #[arg(long, global = true, value_name = "DIRECTORY")]
    identity: Option<PathBuf>,
    #[command(subcommand)]
    command: FleetCommand,
}

#[derive(Debug, Subcommand)]
enum FleetCommand {
    /// Hosts, their pools, instances and where they are, and orders
    Status(Output),
    /// Empty a host: its instances are moved away, and none is moved there
    Drain {
        /// Which
        host: HostName,
        /// It may be used again
        #[arg(long)]
        undo: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Take a host out that does not report any more
    Forget {
        /// Which
        host: HostName,
        /// What ran there when it last reported is lost
        #[arg(long)]
        lost: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Empty host after host, wait until each has been worked on, and use it again; without hosts, show how far that is
    Roll(RollArguments),
}

#[derive(Debug, Args)]
struct RollArguments {
    /// Which, in this order; with --worked-on, --retry or --skip, about which it is decided
    hosts: Vec<HostName>,
    /// How many are emptied or worked on at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    at_once: u32,
    /// How long a host may take to be emptied, and to come back
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// They are empty and have been worked on. A new version of the agent, or a new start of the host, says so by itself
    #[arg(long, group = "decision", requires = "hosts")]
    worked_on: bool,
    /// They are stuck, and are tried again
    #[arg(long, group = "decision", requires = "hosts")]
    retry: bool,
    /// They wait or are stuck, and are left out, as they are
    #[arg(long, group = "decision", requires = "hosts")]
    skip: bool,
    /// End it: hosts that are drained for it may be used again
    #[arg(long, group = "decision", conflicts_with = "hosts")]
    end: bool,
    #[command(flatten)]
    output: Output,
}

/// The way to the controller.
struct To(Box<dyn Connect>);

impl To {
    fn new(config: &Config, arguments: &FleetArguments) -> anyhow::Result<Self> {
        let (host, port) = match arguments.controller.clone() {
            None => return Ok(Self(Box::new(Address(config.fleet.socket.clone())))),
            Some(Whereabouts::Socket(address)) => return Ok(Self(Box::new(address))),
            Some(Whereabouts::Network { host, port }) => (host, port),
        };
        let directory = arguments.identity.as_ref();
        let directory = directory
            .context("over the network an operator's certificate is needed: --identity DIRECTORY")?;
        let file = |name: &str| directory.join(name);
        let files = Files { ca: file("ca.pem"), certificate: file("certificate.pem"), key: file("key.pem") };
        let own = Credentials::open(files).context("cannot use the certificate of --identity")?;
        let identity = own.current().0.identity.clone();
        if identity.role != Role::Operator {
            bail!(
                "{} is {identity}: it is not for an operator (`rswap pki issue --role operator`)",
                directory.display()
            );
        }
        let name = controller_name(&host, arguments.certificate_name.as_ref())
            .with_context(|| format!("no certificate names {host}: say --certificate-name"))?;
        Ok(Self(Box::new(Secure { host, port, name, own: Arc::new(own) })))
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        Ok(link::call(&*self.0, path, None).await?)
    }

    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        Ok(link::call(&*self.0, path, Some(serde_json::to_vec(body)?)).await?)
    }
}

pub(super) async fn fleet(config: &Config, arguments: FleetArguments) -> anyhow::Result<()> {
    let to = To::new(config, &arguments)?;
    match arguments.command {
        FleetCommand::Status(output) => status(&to, output).await,
        FleetCommand::Drain { host, undo, output } => {
            let done = to.post("/v1/drain", &json!({ "host": host, "undo": undo })).await?;
            if output.json {
                return print_json(&done);
            }
            match (undo, done["acts"] == true) {
                (true, _) => println!("{host} may be used again"),
                (false, true) => println!("{host} is being emptied: see `rswap fleet status`"),
                (false, false) => {
                    println!("{host} is to be emptied, but the controller observes only (fleet.mode)")
                }
            }
            Ok(())
        }
        FleetCommand::Forget { host, lost, output } => {
            let done = to.post("/v1/forget", &json!({ "host": host, "lost": lost })).await?;
            if output.json {
                return print_json(&done);
            }
            println!("{host} is not in the fleet any more");
            for instance in rows(&done["instances"]) {
                println!("lost: {}", text(instance));
            }
            Ok(())
        }
        FleetCommand::Roll(arguments) => roll(&to, arguments).await,
    }
}

async fn status(to: &To, output: Output) -> anyhow::Result<()> {
    let [status, hosts, instances, orders, rolling] = [
        to.get("/v1/status").await?,
        to.get("/v1/hosts").await?,
        to.get("/v1/instances").await?,
        to.get("/v1/orders").await?,
        to.get("/v1/roll").await?,
    ];
    if output.json {
        let all = json!({ "controller": status, "hosts": hosts, "instances": instances, "orders": orders, "roll": rolling });
        return print_json(&all);
    }
    println!(
        "controller {}, mode {}, {} hosts",
        text(&status["version"]),
        text(&status["mode"]),
        status["members"]
    );
    for one in rows(&status["unclear"]) {
        let [host, local, fleet] = ["host", "local", "instance"].map(|key| text(&one[key]));
        println!(
            "{local} on {host} may be {fleet}, which its own host has not said to be gone: it is in no plan"
        );
    }
    let now = status["at"].as_u64().unwrap_or_default();
    println!("\n{}\n\n{}", of_hosts(&hosts, &rolling, now), of_pools(&hosts));
    println!("\n{}\n\n{}", of_instances(&instances), of_orders(&orders));
    Ok(())
}

/// A value as it stands in a table.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn ago(at: &Value, now: u64) -> String {
    or_dash(at.as_u64().map(|at| format!("{:.1} s", now.saturating_sub(at) as f64 / 1e3)))
}

/// Of two amounts, how much of the second is the first.
fn of(used: &Value, all: &Value, shown: impl Fn(f64) -> String) -> String {
    match (used.as_f64(), all.as_f64()) {
        (Some(used), Some(all)) => format!("{} of {}", shown(used), shown(all)),
        _ => "-".to_owned(),
    }
}

fn state_of(pool: &Value) -> String {
    text(&pool["state"]["state"])
}

fn of_hosts(hosts: &Value, rolling: &Value, now: u64) -> comfy_table::Table {
    let mut shown = table(&[
        "HOST",
        "STATE",
        "WANTED",
        "ROLL",
        "INSTANCES",
        "CORES",
        "MEMORY",
        "HEARD",
        "AGENT",
        "ADDRESS",
    ]);
    for host in rows(hosts) {
        let whole = &host["whole"];
        let state = if host["away"] == true { "away".to_owned() } else { state_of(whole) };
        let stage = rows(&rolling["hosts"]).iter().find(|of| of["host"] == host["host"]);
        shown.add_row([
            text(&host["host"]),
            state,
            if host["drained"] == true { "empty" } else { "used" }.to_owned(),
            or_dash(stage.map(|stage| text(&stage["stage"]))),
            text(&host["instances"]),
            of(&whole["used"]["cores"], &whole["capacity"]["cores"], |cores| format!("{cores:.2}")),
            of(&whole["used"]["memory_bytes"], &whole["capacity"]["memory_bytes"], bytes),
            ago(&host["heard"], now),
            text(&host["running"]["version"]),
            text(&host["address"]),
        ]);
    }
    shown
}

fn of_pools(hosts: &Value) -> comfy_table::Table {
    let mut shown = table(&["HOST", "POOL", "KIND", "CORES", "MEMORY", "STATE"]);
    for host in rows(hosts) {
        for pool in rows(&host["pools"]) {
            shown.add_row([
                text(&host["host"]),
                text(&pool["name"]),
                text(&pool["kind"]["kind"]),
                of(&pool["used"]["cores"], &pool["capacity"]["cores"], |cores| format!("{cores:.2}")),
                of(&pool["used"]["memory_bytes"], &pool["capacity"]["memory_bytes"], bytes),
                state_of(pool),
            ]);
        }
    }
    shown
}

fn of_instances(instances: &Value) -> comfy_table::Table {
    let mut shown = table(&["INSTANCE", "HOST", "THERE", "SINCE", "CORES", "RESIDENT"]);
    for instance in rows(instances) {
        let since = instance["since"].as_u64().map(|at| ago(&json!(at), UnixMillis::now().0));
        shown.add_row([
            text(&instance["instance"]),
            text(&instance["host"]),
            text(&instance["local"]),
            or_dash(since),
            or_dash(instance["cores"].as_f64().map(|cores| format!("{cores:.2}"))),
            or_dash(instance["resident_bytes"].as_f64().map(bytes)),
        ]);
    }
    shown
}

fn of_orders(orders: &Value) -> comfy_table::Table {
    let mut shown = table(&["ORDER", "HOST", "WHAT", "OUTCOME"]);
    let ended = rows(&orders["ended"]);
    let ended = ended[ended.len().saturating_sub(ENDED_SHOWN)..].iter();
    let ended = ended.map(|ended| {
        let outcome = &ended["outcome"];
        let error = outcome["error"].as_str().map(|error| format!(": {error}")).unwrap_or_default();
        let result =
            if outcome.is_null() { "not begun in time".to_owned() } else { text(&outcome["result"]) };
        (&ended["order"], result + &error)
    });
    let waiting = rows(&orders["waiting"]).iter().map(|order| (order, "waiting".to_owned()));
    for (order, outcome) in ended.chain(waiting) {
        let action = &order["action"];
        let what = match action["action"].as_str() {
            Some("drain") if action["undo"] == true => format!("use {} again", text(&action["pool"])),
            Some("drain") => format!("empty {}", text(&action["pool"])),
            Some("migrate") => format!("migrate {} to {}", text(&action["instance"]), text(&action["to"])),
            _ => action.to_string(),
        };
        shown.add_row([text(&order["token"]["number"]), text(&order["host"]), what, outcome]);
    }
    shown
}

async fn roll(to: &To, arguments: RollArguments) -> anyhow::Result<()> {
    let RollArguments { hosts, at_once, limit, worked_on, retry, skip, end, output } = arguments;
    let decision = [(worked_on, "worked_on"), (retry, "retry"), (skip, "skip")];
    let decision = decision.into_iter().find(|(is, _)| *is).map(|(_, decision)| decision);
    let roll = match decision {
        Some(decision) => {
            let mut roll = Value::Null;
            for host in hosts {
                roll = to.post("/v1/roll/decide", &json!({ "host": host, "decision": decision })).await?;
            }
            roll
        }
        None if end => to.post("/v1/roll/end", &json!({})).await?,
        None if hosts.is_empty() => to.get("/v1/roll").await?,
        None => {
            let limit_ms = limit.saturating_mul(1000);
            to.post("/v1/roll", &json!({ "hosts": hosts, "at_once": at_once, "limit_ms": limit_ms })).await?
        }
    };
    if output.json {
        return print_json(&roll);
    }
    if roll.is_null() {
        println!("no roll is under way");
        return Ok(());
    }
    let now = UnixMillis::now().0;
    let mut shown = table(&["HOST", "STAGE", "SINCE", "WHY"]);
    for host in rows(&roll["hosts"]) {
        shown.add_row([
            text(&host["host"]),
            text(&host["stage"]),
            ago(&host["since"], now),
            text(&host["reason"]),
        ]);
    }
    println!("{shown}");
    Ok(())
}
