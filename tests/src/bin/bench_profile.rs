//! `cargo xtask bench profile`: what profiling costs those that are profiled, and the agent.
//!
//! Two processes on one core, real-time, play ping-pong over pipes and then over TCP, in turns with the probes off, on, with exact waits, and
//! with a program at every switch that does nothing. fio reads 4 KiB blocks past the page cache while the kernel measures the
//! block programs, and ones that do nothing in their place. At last an agent has 200 instances that wake ten times a second. Figures are medians. Where bcc's tools are
//! installed (Debian: libbpf-tools), they take their turns too.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::{
    instance::InstanceName,
    profile::{EmptyProgram, ProbeState, ProfileConfig, Profiler, ProgramCost},
    units::UnixMillis,
};
use rswap_tests::{
    Fleet, HostOptions,
    bench::{
        median, process,
        turns::{self, OwnCgroup, Players, Role},
    },
    sweep,
};
use serde_json::{Map, Value, json};

const RESULT: &str = "target/rswap/bench-profile.json";
/// A measurement takes about as long: short enough that the machine is the same before and after.
const TURN: Duration = Duration::from_millis(250);
const FIO_SECONDS: u32 = 3;
/// How long bcc's tools take to be attached.
const TOOL_STARTS: Duration = Duration::from_secs(2);
/// Before an agent's own cost is measured, its first windows pass.
const SETTLED: Duration = Duration::from_secs(10);

#[derive(Parser)]
#[command(about = "What profiling costs")]
struct Cli {
    #[command(subcommand)]
    play: Option<Play>,
    /// Measurements of each kind
    #[arg(long, default_value_t = 15)]
    runs: usize,
    /// Only what is called so: ping-pong, tcp, block, agent
    #[arg(long)]
    only: Option<String>,
    /// Instances that the agent has
    #[arg(long, default_value_t = 200)]
    instances: usize,
    /// How long the agent is measured, in seconds
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Where the result goes
    #[arg(long, default_value = RESULT)]
    output: PathBuf,
}

#[derive(Subcommand)]
enum Play {
    /// Plays a role in a measurement (the benchmark starts it)
    #[command(hide = true)]
    Play {
        role: Role,
        #[arg(long)]
        address: Option<String>,
    },
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    if let Some(Play::Play { role, address }) = cli.play {
        return turns::play(role, address.as_deref());
    }
    sweep::stale()?;
    let mut result = Map::new();
    let mut programs = BTreeMap::new();
    let wanted = |what: &str| cli.only.as_deref().is_none_or(|only| only == what);
    if wanted("ping-pong") {
        let kinds = [Kind::Empty, Kind::Probes, Kind::Exact, Kind::Tool("runqlat")];
        let slowed = compare(Role::Pipe, &kinds, cli.runs)?;
        result.extend(slowed.keyed("ping_pong"));
        programs.extend(costs_of(Role::Pipe)?);
    }
    if wanted("tcp") {
        let slowed = compare(Role::Tcp, &[Kind::Probes, Kind::Tool("tcprtt")], cli.runs)?;
        result.extend(slowed.keyed("tcp"));
        programs.extend(costs_of(Role::Tcp)?.into_iter().filter(|(name, _)| {
            name.starts_with("tcp") || name.starts_with("sock") || name.starts_with("inet")
        }));
    }
    if wanted("block") {
        let (figures, costs) = block(cli.runs.min(5))?;
        result.extend(figures);
        programs.extend(costs);
    }
    if wanted("agent") {
        result.extend(agent(cli.instances, Duration::from_secs(cli.seconds))?);
    }
    let list: Vec<Value> = programs
        .into_values()
        .map(|cost| json!({ "name": cost.name, "runs": cost.runs, "ns_per_run": cost.ns_per_run }))
        .collect();
    result.insert("programs".to_owned(), list.into());
    write(&result, &cli.output)
}

fn write(result: &Map<String, Value>, output: &Path) -> anyhow::Result<()> {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    for (name, value) in result.iter().filter(|(_, value)| value.is_number()) {
        table.add_row([name.clone(), format!("{:.2}", value.as_f64().unwrap_or_default())]);
    }
    for program in result.get("programs").and_then(Value::as_array).into_iter().flatten() {
        let ns = program["ns_per_run"].as_f64().unwrap_or_default();
        table.add_row([program["name"].as_str().unwrap_or_default().to_owned(), format!("{ns:.0} ns")]);
    }
    println!("{table}");
    if let Some(directory) = output.parent() {
        fs::create_dir_all(directory).context("cannot make the output's directory")?;
    }
    fs::write(output, serde_json::to_vec_pretty(result)?).context("cannot write the output")?;
    println!("written to {}", output.display());
    Ok(())
}

/// What is attached while two play.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// All probes, with the players' cgroup tracked.
    Probes,
    /// The same, with waits measured from when threads are woken.
    Exact,
    /// A program at every switch that does nothing.
    Empty,
    /// One of bcc's tools.
    Tool(&'static str),
}

/// What is attached, as long as it is.
enum Attached {
    Probes { _profiler: Box<Profiler> },
    Empty { _program: EmptyProgram },
    Tool(Child),
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Self::Tool(child) = self {
            let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGINT);
            let _ = child.wait();
        }
    }
}

impl Kind {
    fn key(self, of: &str) -> String {
        match self {
            Self::Probes => format!("{of}_pct"),
            Self::Exact => format!("{of}_exact_pct"),
            Self::Empty => format!("{of}_empty_pct"),
            Self::Tool(name) => format!("{of}_{name}_pct"),
        }
    }

    fn is_there(self) -> bool {
        match self {
            Self::Tool(name) => {
                if !installed(name) {
                    println!("  {name} is not installed: not compared");
                    return false;
                }
                // It may need what this kernel does not have: kprobes, mostly.
                let tried = self.attach(Path::new("/")).map(drop);
                if let Err(error) = &tried {
                    println!("  {name} does not run here: {error:#}");
                }
                tried.is_ok()
            }
            _ => true,
        }
    }

    fn attach(self, cgroup: &Path) -> anyhow::Result<Attached> {
        Ok(match self {
            Self::Probes | Self::Exact => {
                let config = ProfileConfig { exact: self == Self::Exact, ..ProfileConfig::default() };
                Attached::Probes { _profiler: Box::new(profiler(cgroup, &config)?) }
            }
            Self::Empty => Attached::Empty { _program: EmptyProgram::attach().map_err(anyhow::Error::msg)? },
            Self::Tool(name) => {
                let mut command = Command::new(name);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
                thread::sleep(TOOL_STARTS);
                ensure!(child.try_wait()?.is_none(), "{name} ended at once");
                Attached::Tool(child)
            }
        })
    }
}

/// Whether a program is on the path.
fn installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(name).exists())
}

/// A profiler that tracks `cgroup`. All of its probes must count: otherwise something else would be measured.
fn profiler(cgroup: &Path, config: &ProfileConfig) -> anyhow::Result<Profiler> {
    let profiler = Profiler::start(config);
    for probe in profiler.probes() {
        if let ProbeState::Unavailable { reason } = probe.state {
            println!("  the probe {} is not measured: {reason}", probe.name);
        }
    }
    let name: InstanceName = "measured".parse()?;
    profiler.track(&name, cgroup)?;
    profiler.sample(UnixMillis::now());
    Ok(profiler)
}

/// The kernel measures the programs.
fn measured() -> ProfileConfig {
    ProfileConfig { measure_program_cost: true, ..ProfileConfig::default() }
}

/// By how much each kind slows two that play.
struct Slowed {
    turn_ns: f64,
    by: Vec<(Kind, Vec<f64>)>,
}

impl Slowed {
    fn keyed(self, of: &str) -> Vec<(String, Value)> {
        let mut keyed = vec![(format!("{of}_turn_ns"), json!(self.turn_ns))];
        let own = self.by.iter().find(|(kind, _)| *kind == Kind::Probes);
        let own = own.map(|(_, pct)| median(pct.clone())).filter(|pct| *pct > 0.0);
        for (kind, pct) in self.by {
            if let (Kind::Tool(name), Some(own)) = (kind, own) {
                keyed.push((format!("{of}_{name}_ratio"), json!(median(pct.clone()) / own)));
            }
            keyed.push((format!("{}_runs", kind.key(of)), json!(pct)));
            keyed.push((kind.key(of), json!(median(pct))));
        }
        keyed
    }
}

fn compare(role: Role, kinds: &[Kind], runs: usize) -> anyhow::Result<Slowed> {
    println!("{role:?}");
    let mut players = Players::start(role, last_core())?;
    let count = (TURN.as_nanos() as f64 / players.turn_ns(10_000)?) as u32;
    let mut plain = Vec::new();
    let kinds = kinds.iter().filter(|kind| kind.is_there());
    let mut by: Vec<(Kind, Vec<f64>)> = kinds.map(|kind| (*kind, Vec::new())).collect();
    for run in 0..runs {
        let length = by.len();
        for place in 0..length {
            let (kind, pct) = &mut by[(run + place) % length];
            // Without before and after: what drifts meanwhile is in both.
            let before = players.turn_ns(count)?;
            let attached = kind.attach(players.cgroup())?;
            players.turn_ns(1000)?;
            let with = players.turn_ns(count)?;
            drop(attached);
            let after = players.turn_ns(count)?;
            let without = (before + after) / 2.0;
            pct.push((with / without - 1.0) * 100.0);
            plain.push(without);
        }
    }
    Ok(Slowed { turn_ns: median(plain), by })
}

/// What each program costs while two play.
fn costs_of(role: Role) -> anyhow::Result<BTreeMap<String, ProgramCost>> {
    let mut players = Players::start(role, last_core())?;
    let profiler = profiler(players.cgroup(), &measured())?;
    players.turn_ns(20_000)?;
    let costs = profiler.program_costs().into_iter().filter(|cost| cost.runs > 1000);
    Ok(costs.map(|cost| (cost.name.clone(), cost)).collect())
}

fn last_core() -> usize {
    thread::available_parallelism().map_or(0, |count| count.get() - 1)
}

/// Nanoseconds in the block programs for each request of fio's, and what they cost.
fn block(runs: usize) -> anyhow::Result<(Map<String, Value>, BTreeMap<String, ProgramCost>)> {
    println!("Block");
    let directory = tempfile::tempdir_in("target").context("cannot make a directory")?;
    let file = directory.path().join("data");
    let file = file.to_str().context("a path that is no text")?;
    fio(Command::new("fio"), file, &["--rw=write", "--bs=1m", "--end_fsync=1"])?;
    let cgroup = OwnCgroup::new("fio")?;
    let runtime = format!("--runtime={FIO_SECONDS}");
    let read = ["--rw=randread", "--bs=4k", "--time_based", runtime.as_str(), "--allow_file_create=0"];
    let (mut per_io, mut costs) = (Vec::new(), BTreeMap::new());
    let (mut plain, mut tool, mut empty) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let programs = EmptyProgram::attach_block().map_err(anyhow::Error::msg)?;
        fio(cgroup.command(&["fio"]), file, &read)?;
        empty.push(programs.ns_per_run());
        drop(programs);
        plain.push(fio(cgroup.command(&["fio"]), file, &read)?.0);
        let profiler = profiler(cgroup.path(), &measured())?;
        let (_, requests) = fio(cgroup.command(&["fio"]), file, &read)?;
        let of_block = |cost: &ProgramCost| cost.name.starts_with("block");
        costs = profiler
            .program_costs()
            .into_iter()
            .filter(of_block)
            .map(|cost| (cost.name.clone(), cost))
            .collect();
        ensure!(
            costs.values().all(|cost| cost.runs * 100 > requests * 98),
            "requests were not seen: {costs:?}"
        );
        // Each program runs once for a request. They also run for what others do on the machine, which is not for fio.
        per_io.push(costs.values().map(|cost| cost.ns_per_run).sum::<f64>());
        drop(profiler);
        let kind = Kind::Tool("biolatency");
        if kind.is_there() {
            let _attached = kind.attach(cgroup.path())?;
            tool.push(fio(cgroup.command(&["fio"]), file, &read)?.0);
        }
    }
    let mut figures = Map::new();
    figures.insert("block_ns_per_io".to_owned(), json!(median(per_io.clone())));
    figures.insert("block_ns_per_io_runs".to_owned(), json!(per_io));
    figures.insert("block_empty_ns_per_io".to_owned(), json!(median(empty.clone())));
    figures.insert("block_empty_ns_per_io_runs".to_owned(), json!(empty));
    figures.insert("block_fio_mean_ns".to_owned(), json!(median(plain.clone())));
    if !tool.is_empty() {
        let added = median(tool) - median(plain);
        figures.insert("block_biolatency_added_ns".to_owned(), json!(added));
    }
    Ok((figures, costs))
}

/// The mean time of a request in nanoseconds, and how many there were.
fn fio(mut command: Command, file: &str, arguments: &[&str]) -> anyhow::Result<(f64, u64)> {
    command.args(["--name=measured", "--direct=1", "--ioengine=psync", "--size=64m", "--output-format=json"]);
    let output = command.arg(format!("--filename={file}")).args(arguments).output().context("fio")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or_default())?;
    let read = &report["jobs"][0]["read"];
    Ok((read["clat_ns"]["mean"].as_f64().unwrap_or(0.0), read["total_ios"].as_u64().unwrap_or(0)))
}

/// The agent's own cost: its share of a core, and its memory.
fn agent(instances: usize, seconds: Duration) -> anyhow::Result<Map<String, Value>> {
    println!("Agent");
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &HostOptions::default())?;
    let pid = host.agent_pid().context("no agent")?;
    let (mut cgroups, mut nappers) = (Vec::new(), Vec::new());
    for number in 0..instances {
        let cgroup = OwnCgroup::new(&format!("nap{number}"))?;
        let nap = "import time\nwhile True: time.sleep(0.1)";
        nappers.push(cgroup.start(&["python3", "-c", nap])?);
        let path = cgroup.path().to_str().context("a path that is no text")?;
        host.call(&["adopt", path, "--name", &format!("nap{number}")])?;
        cgroups.push(cgroup);
    }
    thread::sleep(SETTLED);
    let (before, began) = (process::cpu_time(pid)?, Instant::now());
    thread::sleep(seconds);
    let share =
        (process::cpu_time(pid)?.saturating_sub(before)).as_secs_f64() / began.elapsed().as_secs_f64();
    let resident = process::status_kib(pid, "VmRSS:")? as f64 / 1024.0;
    let status: Value = host.get("/v1/status")?;
    ensure!(status["instances"] == instances, "{instances} instances: {}", status["instances"]);
    drop((host, cgroups));
    nappers.iter_mut().for_each(|napper| drop(napper.wait()));
    let mut figures = Map::new();
    figures.insert(format!("agent_core_pct_{instances}"), json!(share * 100.0));
    figures.insert(format!("agent_rss_mb_{instances}"), json!(resident));
    figures.insert("agent_last_window_work_us".to_owned(), status["last_window_work_us"].clone());
    Ok(figures)
}
