//! The commands that work on the host themselves: `agent`, `run`, and the internal ones.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::ExitCode,
    str::FromStr,
};

use anyhow::bail;
use tracing_subscriber::EnvFilter;

use super::{InitArguments, RunArguments, Session, labels, runtime};
use crate::{
    agent,
    config::Config,
    control::{RegisterRequest, client::ClientError},
    instance::{
        self, Instance, InstanceName, Ipv6Identity, NetworkIdentity,
        init::{InitOptions, Work},
        launch::{self, LaunchSpec},
        network::mac_for,
        volume::Volume,
    },
    migrate::guard,
    pool::{self, PoolKind},
    privilege,
    sys::clock::Clocks,
};

/// `--net ADDRESS/PREFIX[,gw=ADDRESS]`: the gateway is of the address's family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NetworkArgument {
    V4 { address: Ipv4Addr, prefix_len: u8, gateway: Option<Ipv4Addr> },
    V6(Ipv6Identity),
}

impl FromStr for NetworkArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is not ADDRESS/PREFIX[,gw=ADDRESS], such as 10.0.0.5/24,gw=10.0.0.1");
        let (network, gateway) = match text.split_once(",gw=") {
            Some((network, gateway)) => (network, Some(gateway.parse::<IpAddr>().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let (address, prefix) = network.split_once('/').ok_or_else(wrong)?;
        let prefix =
            |most: u8| prefix.parse().ok().filter(|bits| (1..=most).contains(bits)).ok_or_else(wrong);
        match (address.parse().map_err(|_| wrong())?, gateway) {
            (IpAddr::V4(address), None) => Ok(Self::V4 { address, prefix_len: prefix(32)?, gateway: None }),
            (IpAddr::V4(address), Some(IpAddr::V4(gateway))) => {
                Ok(Self::V4 { address, prefix_len: prefix(32)?, gateway: Some(gateway) })
            }
            (IpAddr::V6(address), None) => {
                Ok(Self::V6(Ipv6Identity { address, prefix_len: prefix(128)?, gateway: None }))
            }
            (IpAddr::V6(address), Some(IpAddr::V6(gateway))) => {
                Ok(Self::V6(Ipv6Identity { address, prefix_len: prefix(128)?, gateway: Some(gateway) }))
            }
            _ => Err(wrong()),
        }
    }
}

/// What an instance with these addresses is known by.
pub(super) fn network_of(arguments: Vec<NetworkArgument>) -> anyhow::Result<Option<NetworkIdentity>> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for argument in arguments {
        match argument {
            NetworkArgument::V4 { address, prefix_len, gateway } => v4.push((address, prefix_len, gateway)),
            NetworkArgument::V6(identity) => v6.push(identity),
        }
    }
    if v4.len() > 1 || v6.len() > 1 {
        bail!(
            "an instance has one address of each family: give --net once with an IPv4 address, and once with an IPv6 one"
        );
    }
    match (v4.pop(), v6.pop()) {
        (None, None) => Ok(None),
        (None, Some(_)) => bail!("an IPv6 address comes beside an IPv4 one: give --net with that, too"),
        (Some((address, prefix_len, gateway)), ipv6) => {
            Ok(Some(NetworkIdentity { address, prefix_len, gateway, mac: mac_for(address), ipv6 }))
        }
    }
}

pub(super) fn agent(config: Config) -> anyhow::Result<ExitCode> {
    log();
    agent::run(config)?;
    Ok(ExitCode::SUCCESS)
}

/// What a process in the foreground has to say goes to the standard error output.
pub(super) fn log() {
    let filter = EnvFilter::try_from_env("RSWAP_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Where nobody reads any more nothing can be said about that either: the attempt would be a panic.
    log.with_ansi(colours).log_internal_errors(false).init();
}

/// A status as the shell shows it; what doesn't fit is a failure.
fn exit_code(status: i32) -> ExitCode {
    u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from)
}

pub(super) fn init(arguments: InitArguments) -> anyhow::Result<ExitCode> {
    let offsets = arguments.monotonic_ns.zip(arguments.boottime_ns);
    let offsets = offsets.map(|(monotonic_ns, boottime_ns)| Clocks { monotonic_ns, boottime_ns });
    let work = match (arguments.stub, arguments.link) {
        (Some(pid), Some(link)) => Work::Stub { pid, link, offsets },
        _ => Work::Command(arguments.command),
    };
    let volumes = arguments.volume_from.into_iter().zip(arguments.volume_at).collect();
    let options =
        InitOptions { go: arguments.go, detach: arguments.detach, log: arguments.log, volumes, work };
    Ok(exit_code(instance::init::run(options)?))
}

pub(super) fn guard(word: i32, life: i32) -> anyhow::Result<ExitCode> {
    log();
    // It does what the agent would do, by the same means.
    privilege::keep_what_is_needed()?;
    guard::run(word, life).map_err(|error| anyhow::anyhow!("the guard of a freeze: {error}"))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn run(session: &Session, arguments: RunArguments) -> anyhow::Result<ExitCode> {
    let config = &session.config;
    let name = match arguments.name {
        Some(name) => name,
        None => default_name(&arguments.command[0]),
    };
    let pool = arguments.pool.map(|pool| cpu_pool(config, pool)).transpose()?;
    let place = agent::place(config);
    let directory = |volume: &Volume| place.volume(&name, volume);
    let volumes = arguments.volumes.into_iter().map(|volume| (volume.clone(), directory(&volume))).collect();
    let spec = LaunchSpec {
        name: name.clone(),
        labels: labels::by_key(arguments.labels),
        pool,
        network: network_of(arguments.net)?,
        volumes,
        detach: arguments.detach,
        log: arguments.log,
        command: arguments.command,
    };
    let status = launch::run(&place, &spec)?;
    if spec.detach {
        tell_agent(session, name)?;
    }
    Ok(exit_code(status))
}

/// Lets the agent look at once. Without an agent the instance runs all the same, and is found when one starts.
fn tell_agent(session: &Session, instance: InstanceName) -> anyhow::Result<()> {
    let told =
        runtime()?.block_on(session.client.post::<Instance>("/v1/register", &RegisterRequest { instance }));
    match told {
        Ok(_) => {}
        Err(ClientError::Connect { .. }) => {
            eprintln!("rswap: it runs, but no agent watches it: start `rswap agent`")
        }
        Err(error) => eprintln!("rswap: it runs, but the agent does not watch it yet: {error}"),
    }
    Ok(())
}

/// The command's file name as far as it can be a name, and our pid.
fn default_name(command: &str) -> InstanceName {
    let file = command.rsplit('/').next().unwrap_or_default().to_lowercase();
    let plain: String =
        file.chars().filter(|c| c.is_ascii_alphanumeric() || "._-".contains(*c)).take(40).collect();
    let stem = plain.trim_start_matches(['.', '_', '-']);
    let stem = if stem.is_empty() { "instance" } else { stem };
    format!("{stem}-{}", std::process::id())
        .parse()
        .expect("only allowed characters are left, in an allowed order")
}

fn cpu_pool(config: &Config, name: String) -> anyhow::Result<(String, pool::CpuSet)> {
    let pools = pool::discover(config);
    match pools.iter().find(|pool| pool.name == name).map(|pool| &pool.kind) {
        Some(PoolKind::Cpu { cpus, .. }) => Ok((name, cpus.clone())),
        Some(_) => bail!("{name:?} is not a CPU pool: start it here, and use `rswap migrate`"),
        None => {
            let known: Vec<_> =
                pools.iter().filter(|p| p.cpus().is_some()).map(|p| p.name.as_str()).collect();
            bail!("there is no pool {name:?}: the CPU pools of this host are {}", known.join(", "))
        }
    }
}
