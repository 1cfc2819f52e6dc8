//! `cargo xtask bench profile`: what profiling costs those that are profiled, and the agent.
//!
//! Two processes on one core, real-time, play ping-pong over pipes and then over TCP, in turns with the probes off, on, with exact waits, and
//! with programs at the same events that do nothing. fio reads 4 KiB blocks past the page cache while the kernel measures the
//! block programs, and ones that do nothing in their place. At last an agent has 200 instances that wake ten times a second, and then 2,000 cgroups beside. Figures are medians.
//! Where bpftrace or bcc's tools are installed (Debian: bpftrace, libbpf-tools), they take their turns too.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use rswap_agent::{
    instance::InstanceName,
    profile::{EmptyProgram, ForeignPrograms, ProbeState, ProfileConfig, Profiler, ProgramCost},
    units::UnixMillis,
};
use rswap_tests::{
    Fleet, HostOptions,
    bench::{
        alternatives::{BLOCK, RUN_QUEUE, RunningTool, TCP, Tool},
        median, process,
        turns::{self, OwnCgroup, Players, Role},
    },
    sweep,
};
use serde_json::{Map, Value, json};

const RESULT: &str = "target/rswap/bench-profile.json";
/// A measurement takes about as long: short enough that the machine is the same before and after.
const TURN: Duration = Duration::from_millis(100);
/// And is cut into so many, of which the quickest counts.
const SLICES: u32 = 4;
/// A machine that was so much slower, or faster, after a measurement than before it, has changed meanwhile: a virtual one has two speeds, by who uses the other thread
/// of its core, and keeps each for some seconds.
const STEADY: f64 = 0.03;
/// Until it is steady a measurement is made so many times.
const TRIES: usize = 5;
const FIO_SECONDS: u32 = 3;
/// An agent's window, unless configured otherwise.
const WINDOW: Duration = Duration::from_secs(1);
/// One there, one back.
const MESSAGES_PER_TURN: f64 = 2.0;
/// Turns in which a tool has to see the players.
const SEEN_TURNS: u32 = 20_000;
/// Cgroups beside those of instances, with which the agent is measured again.
const OTHER_CGROUPS: usize = 2000;
/// Before an agent's own cost is measured, its first windows pass.
const SETTLED: Duration = Duration::from_secs(10);

#[derive(Parser)]
#[command(about = "What profiling costs")]
struct Cli {
    #[command(subcommand)]
    play: Option<Play>,
    /// Measurements of each kind
    #[arg(long, default_value_t = 31)]
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
    tell_what_is_missing();
    let (mut result, mut programs, mut others) = (Map::new(), BTreeMap::new(), Alternatives::default());
    let wanted = |what: &str| cli.only.as_deref().is_none_or(|only| only == what);
    if wanted("ping-pong") {
        let kinds = [Kind::Empty, Kind::Probes, Kind::Measured, Kind::EmptyExact, Kind::Exact];
        result.extend(compare("ping_pong", Role::Pipe, &kinds, &RUN_QUEUE, cli.runs, &mut others)?);
        let costs = costs_of(Role::Pipe)?;
        others.compare_programs("ping_pong", per_event(costs.values(), 1000));
        programs.extend(costs);
    }
    if wanted("tcp") {
        result.extend(compare(
            "tcp",
            Role::Tcp,
            &[Kind::Empty, Kind::Probes, Kind::Measured],
            &TCP,
            cli.runs,
            &mut others,
        )?);
        let (own_ns, costs) = tcp_in_a_window()?;
        others.compare_programs("tcp", own_ns);
        result.insert("tcp_programs_ns".to_owned(), json!(own_ns));
        programs.extend(costs);
    }
    if wanted("block") {
        let (figures, costs) = block(cli.runs.min(5), &mut others)?;
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
    result.insert("alternatives".to_owned(), others.listed().into());
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
    for alternative in result.get("alternatives").and_then(Value::as_array).into_iter().flatten() {
        let name = alternative["name"].as_str().unwrap_or_default();
        for (key, value) in alternative.as_object().into_iter().flatten().filter(|(key, _)| *key != "name") {
            match value {
                Value::Number(number) => {
                    let number = number.as_f64().unwrap_or_default();
                    table.add_row([format!("{name}: {key}"), format!("{number:.2}")]);
                }
                Value::String(text) => _ = table.add_row([format!("{name}: {key}"), text.clone()]),
                _ => {}
            }
        }
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
    /// The same in a window in which the kernel measures the programs.
    Measured,
    /// As the first, with waits measured from when threads are woken.
    Exact,
    /// A program at every switch that does nothing.
    Empty,
    /// The same, and one at every wake-up.
    EmptyExact,
    /// What others have.
    Tool(&'static Tool),
}

/// What is attached, as long as it is.
enum Attached {
    Probes { _profiler: Box<Profiler> },
    Empty { _program: EmptyProgram },
    Tool { _running: RunningTool },
}

impl Kind {
    /// What its figure is called in the result.
    fn key(self, measurement: &str) -> String {
        match self {
            Self::Probes => format!("{measurement}_pct"),
            Self::Measured => format!("{measurement}_measured_pct"),
            Self::Exact => format!("{measurement}_exact_pct"),
            Self::Empty => format!("{measurement}_empty_pct"),
            Self::EmptyExact => format!("{measurement}_exact_empty_pct"),
            Self::Tool(tool) => format!("{measurement} with {}", tool.programs()),
        }
    }

    fn attach(self, cgroup: &Path) -> anyhow::Result<Attached> {
        Ok(match self {
            Self::Probes | Self::Measured | Self::Exact => {
                let config = ProfileConfig {
                    exact: self == Self::Exact,
                    measure_program_cost: self == Self::Measured,
                    ..ProfileConfig::default()
                };
                Attached::Probes { _profiler: Box::new(profiler(cgroup, &config)?) }
            }
            Self::Empty => empty(EmptyProgram::attach())?,
            Self::EmptyExact => empty(EmptyProgram::attach_exact())?,
            Self::Tool(tool) => Attached::Tool { _running: tool.start(cgroup)? },
        })
    }
}

fn empty(attached: Result<EmptyProgram, String>) -> anyhow::Result<Attached> {
    Ok(Attached::Empty { _program: attached.map_err(anyhow::Error::msg)? })
}

/// What others' tools need for the same, by alternative.
#[derive(Default)]
struct Alternatives(BTreeMap<&'static str, Map<String, Value>>);

impl Alternatives {
    /// Whether a tool is there and does what it is compared for, and if so what its programs take for one event, in nanoseconds; if not it is said why.
    fn has(
        &mut self,
        measurement: &str,
        tool: &Tool,
        try_it: impl FnOnce() -> anyhow::Result<f64>,
    ) -> Option<f64> {
        let tried = if tool.is_installed() {
            try_it().map_err(|error| format!("does not run here: {error:#}"))
        } else {
            Err(format!("not installed (Debian: {})", tool.package))
        };
        let why = match tried {
            Ok(ns) => return Some(ns),
            Err(why) => why,
        };
        println!("  {}: {} {why}", tool.of, tool.programs());
        self.put(tool, format!("{measurement}_missing"), format!("{} {why}", tool.programs()).into());
        None
    }

    fn put(&mut self, tool: &Tool, key: String, value: Value) {
        self.0.entry(tool.of).or_default().insert(key, value);
    }

    /// Notes what was measured of a tool, and how many times as much that is as `own`.
    fn note(&mut self, measurement: &str, unit: &str, tool: &Tool, runs: Vec<f64>, own: f64) {
        let of_tool = median(runs.clone());
        self.put(tool, format!("{measurement}_program"), tool.programs().into());
        self.put(tool, format!("{measurement}_{unit}"), json!(of_tool));
        self.put(tool, format!("{measurement}_{unit}_runs"), json!(runs));
        if own > 0.0 {
            self.put(tool, format!("{measurement}_ratio"), json!(of_tool / own));
        }
    }

    /// How many times as much their programs take for one event as ours, by the kernel's statistics.
    fn compare_programs(&mut self, measurement: &str, own_ns: f64) {
        for figures in self.0.values_mut() {
            let ns = figures.get(&format!("{measurement}_programs_ns")).and_then(Value::as_f64);
            if let Some(ns) = ns.filter(|_| own_ns > 0.0) {
                figures.insert(format!("{measurement}_programs_ratio"), json!(ns / own_ns));
            }
        }
    }

    fn listed(self) -> Vec<Value> {
        let with_name = |(name, mut figures): (&str, Map<String, Value>)| {
            figures.insert("name".to_owned(), name.into());
            figures.into()
        };
        self.0.into_iter().map(with_name).collect()
    }
}

/// Says what this machine does not have of what is measured elsewhere.
fn tell_what_is_missing() {
    // One slot, and no looks at memory.
    let config = ProfileConfig { slots: 1, memory_budget: 0.0, ..ProfileConfig::default() };
    for probe in Profiler::start(&config).probes() {
        if let ProbeState::Unavailable { reason } = probe.state {
            println!("Not here: {} ({reason})", probe.name);
        }
    }
}

/// A profiler that tracks `cgroup`.
fn profiler(cgroup: &Path, config: &ProfileConfig) -> anyhow::Result<Profiler> {
    let profiler = Profiler::start(config);
    let name: InstanceName = "measured".parse()?;
    profiler.track(&name, cgroup)?;
    // In the first window, and then in one of sixteen, the kernel measures the programs, for the budget: the second is as most are.
    profiler.sample(UnixMillis::now());
    profiler.sample(UnixMillis::now());
    Ok(profiler)
}

/// The kernel measures the programs.
fn measured() -> ProfileConfig {
    ProfileConfig { measure_program_cost: true, ..ProfileConfig::default() }
}

/// By how much each kind, and each tool of others', slows two that play.
fn compare(
    measurement: &str,
    role: Role,
    kinds: &[Kind],
    tools: &'static [Tool],
    runs: usize,
    others: &mut Alternatives,
) -> anyhow::Result<Map<String, Value>> {
    println!("{role:?}");
    let mut players = Players::start(role, last_core())?;
    let count = (TURN.as_nanos() as f64 / players.turn_ns(10_000)?) as u32;
    let mut plain = Vec::new();
    let here = tools.iter().filter_map(|tool| {
        let ns = others.has(measurement, tool, || sees(tool, &mut players))?;
        others.put(tool, format!("{measurement}_programs_ns"), json!(ns));
        Some(Kind::Tool(tool))
    });
    let here: Vec<Kind> = here.collect();
    let kinds = kinds.iter().copied().filter(|kind| match kind.attach(players.cgroup()) {
        Ok(_) => true,
        Err(error) => {
            println!("  {} is not measured: {error:#}", kind.key(measurement));
            false
        }
    });
    let mut by: Vec<(Kind, Vec<f64>)> = kinds.chain(here).map(|kind| (kind, Vec::new())).collect();
    for run in 0..runs {
        let length = by.len();
        for place in 0..length {
            let (kind, pct) = &mut by[(run + place) % length];
            let (with, without) = with_and_without(*kind, &mut players, count)?;
            pct.push((with / without - 1.0) * 100.0);
            plain.push(without);
        }
    }
    let own = by.iter().find(|(kind, _)| *kind == Kind::Probes).map_or(0.0, |(_, pct)| median(pct.clone()));
    let mut figures = Map::new();
    figures.insert(format!("{measurement}_turn_ns"), json!(median(plain)));
    for (kind, pct) in by {
        if let Kind::Tool(tool) = kind {
            others.note(measurement, "pct", tool, pct, own);
            continue;
        }
        let key = kind.key(measurement);
        figures.insert(format!("{key}_runs"), json!(pct));
        figures.insert(key, json!(median(pct)));
    }
    Ok(figures)
}

/// How long a turn takes with programs of this kind, and without any, in nanoseconds.
fn with_and_without(kind: Kind, players: &mut Players, count: u32) -> anyhow::Result<(f64, f64)> {
    let mut before = players.quickest_turn_ns(count, SLICES)?;
    let mut tries = 1;
    loop {
        let attached = kind.attach(players.cgroup())?;
        players.turn_ns(1000)?;
        let with = players.quickest_turn_ns(count, SLICES)?;
        drop(attached);
        // Without before and after: what drifts meanwhile is in both.
        let after = players.quickest_turn_ns(count, SLICES)?;
        if (after / before - 1.0).abs() <= STEADY || tries == TRIES {
            return Ok((with, (before + after) / 2.0));
        }
        before = after;
        tries += 1;
    }
}

/// What a tool's programs take for each turn of two that play, if they run then.
fn sees(tool: &Tool, players: &mut Players) -> anyhow::Result<f64> {
    let running = tool.start(players.cgroup())?;
    let measuring = ForeignPrograms::measure().map_err(anyhow::Error::msg)?;
    players.turn_ns(SEEN_TURNS)?;
    let costs = running.costs(&measuring);
    let ns = per_event(&costs, SEEN_TURNS.into());
    ensure!(ns > 0.0, "its programs do not run: {costs:?}");
    Ok(ns)
}

/// Nanoseconds in the programs for each of so many events: in those that run for each. The tools have some that run once, and for what is rare.
fn per_event<'c>(costs: impl IntoIterator<Item = &'c ProgramCost>, events: u64) -> f64 {
    costs.into_iter().filter(|cost| cost.runs * 100 > events * 98).map(|cost| cost.ns_per_run).sum()
}

/// What each program costs while two play.
fn costs_of(role: Role) -> anyhow::Result<BTreeMap<String, ProgramCost>> {
    let mut players = Players::start(role, last_core())?;
    let profiler = profiler(players.cgroup(), &measured())?;
    players.turn_ns(20_000)?;
    let costs = profiler.program_costs().into_iter().filter(|cost| cost.runs > 1000);
    Ok(costs.map(|cost| (cost.name.clone(), cost)).collect())
}

/// Nanoseconds in our TCP programs for each message of two that play, and what they cost. None runs for each message: they walk over the connections when
/// a window ends, and that is divided among all that went in it.
fn tcp_in_a_window() -> anyhow::Result<(f64, BTreeMap<String, ProgramCost>)> {
    let mut players = Players::start(Role::Tcp, last_core())?;
    let profiler = profiler(players.cgroup(), &measured())?;
    let count = (WINDOW.as_nanos() as f64 / players.turn_ns(10_000)?) as u32;
    profiler.sample(UnixMillis::now());
    let costs = || {
        let is_of_tcp = |cost: &ProgramCost| cost.name.starts_with("tcp") || cost.name.starts_with("inet");
        profiler.program_costs().into_iter().filter(is_of_tcp)
    };
    let ran_ns = || -> f64 { costs().map(|cost| cost.runs as f64 * cost.ns_per_run).sum() };
    let before = ran_ns();
    players.turn_ns(count)?;
    profiler.sample(UnixMillis::now());
    let ns = (ran_ns() - before) / f64::from(count) / MESSAGES_PER_TURN;
    let ran = costs().filter(|cost| cost.runs > 0);
    Ok((ns, ran.map(|cost| (cost.name.clone(), cost)).collect()))
}

fn last_core() -> usize {
    thread::available_parallelism().map_or(0, |count| count.get() - 1)
}

/// Nanoseconds in the block programs for each request of fio's, and what they cost.
fn block(
    runs: usize,
    others: &mut Alternatives,
) -> anyhow::Result<(Map<String, Value>, BTreeMap<String, ProgramCost>)> {
    println!("Block");
    let directory = tempfile::tempdir_in("target").context("cannot make a directory")?;
    let file = directory.path().join("data");
    let file = file.to_str().context("a path that is no text")?;
    fio(Command::new("fio"), file, &["--rw=write", "--bs=1m", "--end_fsync=1"])?;
    let cgroup = OwnCgroup::new("fio")?;
    let runtime = format!("--runtime={FIO_SECONDS}");
    let read = ["--rw=randread", "--bs=4k", "--time_based", runtime.as_str(), "--allow_file_create=0"];
    let (mut per_io, mut costs) = (Vec::new(), BTreeMap::new());
    let (mut plain, mut empty) = (Vec::new(), Vec::new());
    let of_tool = |tool: &Tool| {
        let running = tool.start(cgroup.path())?;
        let measuring = ForeignPrograms::measure().map_err(anyhow::Error::msg)?;
        let (_, requests) = fio(cgroup.command(&["fio"]), file, &read)?;
        let costs = running.costs(&measuring);
        let per_io = per_event(&costs, requests);
        ensure!(per_io > 0.0, "its programs do not run: {costs:?}");
        Ok(per_io)
    };
    let here = BLOCK.iter().filter(|tool| others.has("block", tool, || of_tool(tool)).is_some());
    let mut by_tool: Vec<(&Tool, Vec<f64>)> = here.map(|tool| (tool, Vec::new())).collect();
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
        for (tool, per_io) in &mut by_tool {
            per_io.push(of_tool(tool)?);
        }
    }
    let own = median(per_io.clone());
    by_tool.into_iter().for_each(|(tool, runs)| others.note("block", "ns_per_io", tool, runs, own));
    let mut figures = Map::new();
    figures.insert("block_ns_per_io".to_owned(), json!(own));
    figures.insert("block_ns_per_io_runs".to_owned(), json!(per_io));
    figures.insert("block_empty_ns_per_io".to_owned(), json!(median(empty.clone())));
    figures.insert("block_empty_ns_per_io_runs".to_owned(), json!(empty));
    figures.insert("block_fio_mean_ns".to_owned(), json!(median(plain)));
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
    let mut host = fleet.host("a", &HostOptions::default())?;
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
    let share = || -> anyhow::Result<f64> {
        thread::sleep(SETTLED);
        let (before, began) = (process::cpu_time(pid)?, Instant::now());
        thread::sleep(seconds);
        let used = process::cpu_time(pid)?.saturating_sub(before);
        Ok(used.as_secs_f64() / began.elapsed().as_secs_f64())
    };
    let alone = share()?;
    let resident = process::status_kib(pid, "VmRSS:")? as f64 / 1024.0;
    let status: Value = host.get("/v1/status")?;
    ensure!(status["instances"] == instances, "{instances} instances: {}", status["instances"]);
    // Half of them are an instance's, the others nobody's.
    let first = cgroups.first().context("no instances")?.path().to_owned();
    let below = || (0..OTHER_CGROUPS / 2).map(|number| first.join(format!("below{number}")));
    below().try_for_each(fs::create_dir)?;
    let foreign = (0..OTHER_CGROUPS / 2).map(|number| OwnCgroup::new(&format!("other{number}")));
    let foreign = foreign.collect::<anyhow::Result<Vec<_>>>()?;
    let among_many = share()?;
    drop(foreign);
    below().try_for_each(fs::remove_dir)?;
    host.show_log = false;
    drop((host, cgroups));
    nappers.iter_mut().for_each(|napper| drop(napper.wait()));
    let mut figures = Map::new();
    figures.insert(format!("agent_core_pct_{instances}"), json!(alone * 100.0));
    figures.insert(
        format!("agent_core_pct_{instances}_beside_{OTHER_CGROUPS}_cgroups"),
        json!(among_many * 100.0),
    );
    figures.insert(format!("agent_rss_mb_{instances}"), json!(resident));
    figures.insert("agent_last_window_work_us".to_owned(), status["last_window_work_us"].clone());
    Ok(figures)
}
