//! The command line: what a person types, and how the answers look.
//!
//! `run`, `check`, `calibrate` and `doctor` work on the host themselves; the other commands ask the agent over its control
//! socket. Whatever a script would want is there as `--json` too.

mod calibrate;
mod change;
mod check;
mod controller;
mod doctor;
mod fleet;
mod forecast;
mod health;
mod labels;
mod local;
mod migrate;
mod pki;
mod pools;
mod show;
mod simulate;
mod table;
mod top;
mod volume;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::{
    config::Config,
    control::client::{Client, Target},
    instance::{InstanceName, volume::Volume},
};
use labels::Label;
use local::NetworkArgument;

/// Watches running Linux work with eBPF, forecasts its need, and moves it before the need arrives.
#[derive(Debug, Parser)]
#[command(name = "rswap", version, about, propagate_version = true)]
struct Cli {
    /// Configuration file [default: /etc/rswap/rswap.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The agent's control socket [default: agent.control_socket of the configuration]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent, in the foreground
    Agent,
    /// Run the controller of a fleet, in the foreground
    Controller,
    /// Ask a fleet's controller, and tell it what is wanted: over its socket, or over the network as an operator
    Fleet(fleet::FleetArguments),
    /// Start a command as an instance; its exit status is the command's
    Run(RunArguments),
    /// Take over an existing cgroup v2 as an instance
    Adopt(AdoptArguments),
    /// List the instances, with their last window
    Ps(Output),
    /// Watch the instances: a live view of how they fare, with what each waits for
    Top(top::TopArguments),
    /// List the pools: what there is, what is used and left of it, what it costs, and how well it works
    Pools(PoolsArguments),
    /// Measure a pool of this host: a short benchmark, bounded in time and bytes; asks before it loads a busy pool
    Calibrate(CalibrateArguments),
    /// Show the last plan
    Plan(Output),
    /// Show why an instance is where it is: each kept decision, with all its numbers
    Explain(ExplainArguments),
    /// Show what is forecast of an instance; carry what was learnt from one host to another
    Forecast(forecast::ForecastArguments),
    /// Move an instance to a CPU pool, or a volume of it to a storage pool
    Swap(SwapArguments),
    /// Migrate an instance to another host
    Migrate(MigrateArguments),
    /// Empty a pool or a host: what is on it is moved away, and nothing is moved there
    Drain(DrainArguments),
    /// Decide about an instance whose migration is in doubt: its other host does not answer
    Recover(RecoverArguments),
    /// Name what a migration would not carry, without touching anything
    Check(CheckArguments),
    /// Play recorded demand on described pools: what would have been done, and what it would have cost
    Simulate(simulate::SimulateArguments),
    /// Make an authority and certificates for the links between hosts
    Pki(pki::PkiArguments),
    /// Print the HTTP routes of an agent or a controller as an OpenAPI document
    Openapi(OpenapiArguments),
    /// Show which kernel features are there, what the agent may, and what each lack costs
    Doctor(Output),
    /// Wait until the agent answers and does its work; exit status 1 if it does not
    Health(health::HealthArguments),
    /// The first process of an instance's PID namespace
    #[command(name = "__init", hide = true)]
    Init(InitArguments),
    /// The watchdog of a migration's freeze
    #[command(name = "__guard", hide = true)]
    Guard(GuardArguments),
}

#[derive(Clone, Copy, Debug, Args)]
struct Output {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Args)]
struct PoolsArguments {
    /// Print a line per number: its value, its unit, and the file, key or measurement that it comes from
    #[arg(long, conflicts_with = "json")]
    sources: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct CalibrateArguments {
    /// Which pool: `rswap pools` names them
    #[arg(required_unless_present = "serve")]
    pool: Option<String>,
    /// Measure it although it is busy
    #[arg(long, short = 'y')]
    yes: bool,
    /// Links: where `rswap calibrate --serve` runs on another host
    #[arg(long, value_name = "ADDRESS:PORT")]
    peer: Option<std::net::SocketAddr>,
    /// Be the other end of a link's benchmark, until Ctrl-C
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["pool", "yes", "peer"])]
    serve: Option<std::net::SocketAddr>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct RunArguments {
    /// Its name, unique on the host [default: the command's name and the pid]
    #[arg(long)]
    name: Option<InstanceName>,
    /// A label; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<Label>,
    /// The CPU pool to start on
    #[arg(long)]
    pool: Option<String>,
    /// Give it a network namespace with this address on the host's bridge; may be given again for an IPv6 address beside the
    /// IPv4 one
    #[arg(long, value_name = "ADDRESS/PREFIX[,gw=ADDRESS]")]
    net: Vec<NetworkArgument>,
    /// A directory that belongs to it and moves with it; may be repeated. It is made if it is missing, and seen at PATH
    #[arg(long = "volume", value_name = "NAME:PATH")]
    volumes: Vec<Volume>,
    /// Return when it runs
    #[arg(long)]
    detach: bool,
    /// Where its output goes
    #[arg(long, value_name = "FILE", requires = "detach")]
    log: Option<PathBuf>,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

#[derive(Debug, Args)]
struct AdoptArguments {
    /// The cgroup: an absolute path, or as `/proc/PID/cgroup` shows it
    cgroup: PathBuf,
    /// What to call it
    #[arg(long)]
    name: InstanceName,
    /// A label; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<Label>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct ExplainArguments {
    /// Which instance
    instance: InstanceName,
    /// How many decisions, the latest last
    #[arg(long, short = 'n', default_value_t = 3)]
    last: usize,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct SwapArguments {
    /// Which instance
    instance: InstanceName,
    /// To which set of cores or link; with --volume, to which storage pool
    pool: String,
    /// Move this volume, while the instance runs; with --json an event per line is printed
    #[arg(long, value_name = "NAME")]
    volume: Option<InstanceName>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct MigrateArguments {
    /// Which instance
    instance: InstanceName,
    /// To which host: a host pool's name, or ADDRESS:PORT
    host: String,
    /// Stop it, copy it, and start it there: it stands still for as long as copying takes
    #[arg(long)]
    stop_and_copy: bool,
    /// Print JSON, one event per line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct DrainArguments {
    /// Which pool: `rswap pools` names them; this-host for this host
    pool: String,
    /// It may be used again
    #[arg(long)]
    undo: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct RecoverArguments {
    /// Which instance; `rswap ps` names those in doubt
    instance: InstanceName,
    /// The copy here is the instance: let it go on. Only when it is certain that none runs, nor ever will, at the other
    /// host: two copies with one address would both take writes
    #[arg(long, conflicts_with = "there", required_unless_present = "there")]
    here: bool,
    /// The copy at the other host is the instance: remove the one here, memory and all. Only when it is certain that it
    /// runs there: nothing can bring the one here back
    #[arg(long)]
    there: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct CheckArguments {
    /// Which instance
    instance: InstanceName,
    /// The host that is asked as well what it would refuse: a host pool's name, or ADDRESS:PORT
    host: Option<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Args)]
struct OpenapiArguments {
    /// Whose routes
    of: Serving,
}

/// What serves HTTP.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Serving {
    /// The agent's, those of its control socket included
    Agent,
    /// The controller's
    Controller,
}

impl Serving {
    fn document(self) -> serde_json::Value {
        match self {
            Self::Agent => crate::control::document(),
            Self::Controller => rswap_controller::document(),
        }
    }
}

#[derive(Debug, Args)]
struct GuardArguments {
    #[arg(long)]
    word: i32,
    #[arg(long)]
    life: i32,
}

#[derive(Debug, Args)]
struct InitArguments {
    #[arg(long)]
    go: i32,
    #[arg(long)]
    detach: bool,
    #[arg(long)]
    log: Option<PathBuf>,
    #[arg(long)]
    volume_from: Vec<PathBuf>,
    #[arg(long)]
    volume_at: Vec<PathBuf>,
    #[arg(long, conflicts_with = "command", requires = "link")]
    stub: Option<i32>,
    #[arg(long)]
    link: Option<i32>,
    #[arg(long, allow_hyphen_values = true, requires = "boottime_ns")]
    monotonic_ns: Option<i64>,
    #[arg(long, allow_hyphen_values = true)]
    boottime_ns: Option<i64>,
    #[arg(last = true)]
    command: Vec<String>,
}

/// What every command needs.
struct Session {
    config: Config,
    client: Client,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rswap: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    // The init must stay as small as it can: no configuration, no runtime, no log.
    match cli.command {
        Command::Init(arguments) => return local::init(arguments),
        Command::Guard(GuardArguments { word, life }) => return local::guard(word, life),
        Command::Pki(arguments) => return pki::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Simulate(arguments) => return simulate::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Openapi(OpenapiArguments { of }) => {
            return print_json(&of.document()).map(|()| ExitCode::SUCCESS);
        }
        _ => {}
    }
    let config = Config::load(cli.config.as_deref())?;
    let socket = cli.socket.unwrap_or_else(|| config.agent.control_socket.clone());
    let session = Session { client: Client::new(Target::Socket(socket)), config };
    match cli.command {
        Command::Agent => local::agent(session.config),
        Command::Controller => controller::run(&session.config),
        Command::Run(arguments) => local::run(&session, arguments),
        Command::Check(arguments) => check::check(&session, &arguments),
        Command::Calibrate(arguments) => calibrate::calibrate(&session, &arguments),
        Command::Doctor(output) => doctor::doctor(&session, output),
        other => runtime()?.block_on(ask(&session, other)),
    }
}

async fn ask(session: &Session, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Ps(output) => show::ps(&session.client, output).await?,
        Command::Top(arguments) => top::top(&session.client, arguments).await?,
        Command::Pools(arguments) => pools::pools(&session.client, arguments).await?,
        Command::Plan(output) => show::plan(&session.client, output).await?,
        Command::Explain(arguments) => show::explain(&session.client, &arguments).await?,
        Command::Adopt(arguments) => change::adopt(&session.client, arguments).await?,
        Command::Fleet(arguments) => fleet::fleet(&session.config, arguments).await?,
        Command::Forecast(arguments) => forecast::forecast(session, arguments).await?,
        Command::Swap(arguments) => match arguments.volume.clone() {
            Some(volume) => return volume::swap(&session.client, arguments, volume).await,
            None => change::swap(&session.client, arguments).await?,
        },
        Command::Drain(arguments) => change::drain(&session.client, arguments).await?,
        Command::Recover(arguments) => change::recover(&session.client, arguments).await?,
        Command::Migrate(arguments) => return migrate::migrate(&session.client, arguments).await,
        Command::Health(arguments) => return health::health(session, arguments).await,
        Command::Agent
        | Command::Controller
        | Command::Run(_)
        | Command::Check(_)
        | Command::Calibrate(_)
        | Command::Simulate(_)
        | Command::Openapi(_)
        | Command::Pki(_)
        | Command::Doctor(_)
        | Command::Init(_)
        | Command::Guard(_) => unreachable!("handled without the agent"),
    }
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

#[cfg(test)]
mod tests;
