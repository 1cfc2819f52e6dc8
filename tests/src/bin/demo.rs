//! The demo: a Redis under a load that repeats is watched. Its append-only file is moved to a fast disk, it is moved to fast cores, and
//! to another host before its peak, while a client counts what it was promised.
//!
//! Every number shown is measured by the client or told by the agents. It fails if a promise isn't kept.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use comfy_table::{Table, presets};
use nix::sys::signal::{SigSet, Signal};
use rswap_agent::{
    forecast::{Evidence, Resource},
    plan::{self, Decision, MoveKind, Outcome},
    status::{InstanceView, MigrationReport, MigrationState, MigrationView},
    units::UnixMillis,
};
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{ClientReport, DataSet, Manner, REDIS, VerifyingClient},
    load::{self, Load, Pattern},
    loop_device::LoopDevice,
    wait_for,
};
use serde_json::{Value, json};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 40 << 20;
/// Size of each disk.
const DISK_BYTES: u64 = 512 << 20;
/// The days after which the demo has failed, if the instance has not moved.
const DAYS: u32 = 5;
/// Quiet; busy, which is more than the slow cores give; the peak, which is more than the fast ones give.
const PATTERN: Pattern = Pattern {
    day: Duration::from_secs(24),
    cores: &[(0.0, 0.05), (0.54, 0.05), (0.58, 0.35), (0.72, 0.35), (0.76, 0.85), (0.90, 0.85), (0.94, 0.05)],
    peak_from: 0.76,
    peak_to: 0.90,
};
/// Writes of 32 KiB per second: few; then more than the slow disk gives.
const WRITES: Pattern = Pattern {
    cores: &[(0.0, 1.0), (0.44, 1.0), (0.48, 32.0), (0.90, 32.0), (0.94, 1.0)],
    peak_from: 0.48,
    peak_to: 0.90,
    ..PATTERN
};
const WRITE_BYTES: usize = 32 << 10;
/// A move may keep the client waiting for less than this, in milliseconds: the volume goes along.
const PROMISED_MS: f64 = 400.0;
const RESULT: &str = "target/rswap/demo.json";

/// Host a has a share of a core that is cheap and slow, and one that is dear and fast, and two such disks, which follow; host b has
/// more and costs more.
/// A plan may rest on a forecast when it was judged for two days of 48 windows.
const HOST_A: &str = r#"
[this_host]
cores = 0.75
memory_gib = 8
cost_per_core_hour = 0.05

[profile]
measure_program_cost = true

[forecast]
horizons_ms = [1000, 2000, 4000, 6000]
min_seen = 96

[plan]
horizon_ms = 6000
cool_down_ms = 2000

[[pool]]
name = "slow"
cpus = "1"
capacity_cores = 0.35
cost_per_core_hour = 0.01

[[pool]]
name = "fast"
cpus = "0"
capacity_cores = 0.75
cost_per_core_hour = 0.05

[[pool]]
name = "b"
host = "10.88.0.2:7791"
cores = 2
memory_gib = 8
cost_per_core_hour = 0.08

"#;
const SLOW_DISK: &str = "operations_per_s = 300\nmbyte_per_s = 0.6\ncost_per_gib_hour = 0.001";
const FAST_DISK: &str = "operations_per_s = 5000\nmbyte_per_s = 200\ncost_per_gib_hour = 0.02";

fn main() -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    say("two hosts, each a network namespace with an agent; the clients are on a third");
    let mut fleet = Fleet::new()?;
    let scratch = fleet.scratch().to_owned();
    let disk = |name: &str| LoopDevice::create_below(&scratch, name, DISK_BYTES);
    let (slow, fast) = (disk("disk")?, disk("ssd")?);
    let more = format!("{HOST_A}{}{}", slow.pool("disk", SLOW_DISK), fast.pool("ssd", FAST_DISK));
    let options = HostOptions { mode: "act", window_ms: 500, more, ..HostOptions::default() };
    let mut a = fleet.host("a", &options)?;
    let mut b = fleet.host("b", &HostOptions { window_ms: 500, ..HostOptions::default() })?;
    (a.show_log, b.show_log) = (false, false);
    say(
        "host a's pools; b is the other host; the instance starts on the cores \"slow\", its volume on the disk \"disk\"",
    );
    print!("{}", a.call(&["pools"])?);

    say("an unmodified redis-server as an instance on host a, its append-only file in a volume");
    let path = scratch.join("data").to_string_lossy().into_owned();
    let append = ["--dir", &path, "--appendonly", "yes", "--auto-aof-rewrite-percentage", "0"];
    let volume = format!("data:{path}");
    let options = ["--net", &format!("{SERVER}/24"), "--pool", "slow", "--volume", &volume];
    a.run("redis", &options, &[REDIS, &append[..]].concat())?;
    wait_for("the agent to watch it", Duration::from_secs(10), || {
        Ok(a.has_instance("redis")?.then_some(()))
    })?;
    a.call(&["swap", "redis", "disk", "--volume", "data"])?;
    let data = DataSet::load(&fleet.client, SERVER, DATA_BYTES)?;
    let cost = load::query_cost(&fleet.client, SERVER, &a.cgroup()?.join("redis"))?;
    say(&format!(
        "{} MiB of data in it; a query takes it {:.2} ms of CPU time",
        data.used_bytes(&fleet.client)? >> 20,
        cost.as_secs_f64() * 1e3
    ));
    wait_for("the agent to watch it", Duration::from_secs(10), || {
        Ok(a.has_instance("redis")?.then_some(()))
    })?;
    a.call(&["swap", "redis", "disk", "--volume", "data"])?;
    say(&format!(
        "a load that repeats every {} s (a \"day\"), and a client that remembers every acknowledged write",
        PATTERN.day.as_secs()
    ));
    let pause = Duration::from_millis(2);
    let client = VerifyingClient::start_in(Manner::Patient, &fleet.client, SERVER, pause)?;
    let load = Load::start(&fleet.client, SERVER, PATTERN, cost)?;
    let writes = Load::start_writes(&fleet.client, SERVER, WRITES, WRITE_BYTES)?;
    let load_began = UnixMillis::now();

    let seen_moves = watch(&a, &b, &client, load.started, &stop)?;

    let answered = load.finish()? + writes.finish()?;
    let told = Told::by(&a)?;
    say("the client reads back every write that was acknowledged");
    let seen = client.finish(&fleet.client)?;
    let lost = seen.lost_writes + data.wrong_keys(&fleet.client)?;
    for decision in &told.moves {
        say(&format!("why did it move? `rswap explain redis` on host a, {:?} pools:", decision.kind));
        print!("{}", plan::explain(decision));
    }
    let result = told.summary(&seen, lost, load_began, seen_moves)?;
    show(&result, &told, answered);
    std::fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    std::fs::write(RESULT, serde_json::to_vec_pretty(&result)?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    say(&format!("all of it, with the decisions, is in {RESULT}"));
    promises_kept(&result, b.has_instance("redis")?)
}

fn say(what: &str) {
    println!("==> {what}");
}

/// Set when the user wants it to end: then everything is cleaned up, as at the end.
fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("cannot block signals")?;
    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    thread::spawn(move || {
        if signals.wait().is_ok() {
            set.store(true, Ordering::Release);
        }
    });
    Ok(stop)
}

/// Which moves were seen on host a.
#[derive(Clone, Copy, Debug, Default)]
struct SeenMoves {
    cores: u32,
    storage: u32,
}

/// Shows what happens until the instance has moved and the peak is over, or all days are.
fn watch(
    a: &Host,
    b: &Host,
    client: &VerifyingClient,
    load_began: Instant,
    stop: &AtomicBool,
) -> anyhow::Result<SeenMoves> {
    println!(
        "{:>5} {:>3} {:>7} {:>5} {:>18} {:>8} {:>6}  it runs on",
        "time", "day", "offered", "used", "p95 within 6 s", "wait", "acked"
    );
    let mut moved_on_day = None;
    let mut seen = SeenMoves::default();
    let mut before: Option<(Option<String>, Option<String>)> = None;
    loop {
        thread::sleep(Duration::from_secs(1));
        ensure!(!stop.load(Ordering::Acquire), "stopped by the user");
        let at = load_began.elapsed();
        let day = PATTERN.day_at(at);
        let moved = !a.has_instance("redis")?;
        let views: Vec<InstanceView> = if moved { b } else { a }.get("/v1/profiles")?;
        let view = views.iter().find(|view| view.instance.name.as_str() == "redis");
        let pool = view.and_then(|view| view.instance.pool.clone());
        let volume = view.and_then(|view| view.volume_use.first());
        let disk = volume.and_then(|volume| volume.pool.clone());
        if let (false, Some(_)) = (moved, view) {
            if let Some((pool_before, disk_before)) = &before {
                seen.cores += u32::from(*pool_before != pool);
                seen.storage += u32::from(disk_before.is_some() && disk.is_some() && *disk_before != disk);
            }
            // Where it has just come, its size is not known yet.
            before = Some((pool.clone(), disk.clone().or_else(|| before.and_then(|(_, disk)| disk))));
        }
        let place = match moved {
            true => "host b".to_owned(),
            false => {
                format!("host a, {}, {}", pool.as_deref().unwrap_or("-"), disk.as_deref().unwrap_or("-"))
            }
        };
        let profile = view.and_then(|view| view.profile.as_ref());
        let wait_us = profile.and_then(|p| p.cpu.run_queue_ns.mean()).map(|ns| ns / 1e3);
        println!(
            "{:>4.0}s {:>3} {:>7.2} {:>5} {:>18} {:>8} {:>6}  {place}",
            at.as_secs_f64(),
            day + 1,
            PATTERN.cores_at(at),
            profile.map_or("-".into(), |p| format!("{:.2}", p.cpu.cores)),
            view.map_or("-".into(), forecast_in_words),
            wait_us.map_or("-".into(), |us| format!("{us:.0} us")),
            client.acked(),
        );
        if moved && moved_on_day.is_none() {
            moved_on_day = Some(day);
        }
        if moved_on_day.is_some_and(|day| at > PATTERN.peak_end(day)) || day >= DAYS {
            return Ok(seen);
        }
    }
}

/// The highest p95 of the need for CPU over the horizons, or why there is none yet.
fn forecast_in_words(view: &InstanceView) -> String {
    let points = view.demand.iter().flat_map(|demand| &demand.points);
    let mut highest: Option<f64> = None;
    let mut waiting = None;
    for point in points.filter(|point| point.resource == Resource::Cpu) {
        match point.evidence {
            Evidence::Enough { .. } => {
                highest = Some(highest.map_or(point.need.p95, |other| other.max(point.need.p95)));
            }
            Evidence::TooLittle { seen, needed } => waiting = Some((seen, needed)),
        }
    }
    match (highest, waiting) {
        (Some(cores), _) => format!("{cores:.2} cores"),
        (None, Some((seen, needed))) => format!("{seen} of {needed} outcomes"),
        (None, None) => "-".into(),
    }
}

/// What host a's agent says of the moves.
struct Told {
    /// The last decision before each move.
    moves: Vec<Decision>,
    migrations: Vec<(MigrationReport, UnixMillis, UnixMillis)>,
    status: Value,
}

impl Told {
    fn by(a: &Host) -> anyhow::Result<Self> {
        let decisions: Vec<Decision> = a.get("/v1/decisions?instance=redis")?;
        let moves = [MoveKind::Storage, MoveKind::Cpu, MoveKind::Host].into_iter().filter_map(|kind| {
            let last = decisions.iter().rev().filter(|decision| decision.kind == kind);
            last.clone().find(|decision| matches!(decision.outcome, Outcome::Move { .. })).cloned()
        });
        let moves = moves.collect();
        let migrations: Vec<MigrationView> = a.get("/v1/migrations")?;
        let done = migrations.into_iter().filter_map(|migration| match migration.state {
            MigrationState::Done { report, ended } => Some((report, migration.started, ended)),
            _ => None,
        });
        Ok(Self { moves, migrations: done.collect(), status: a.get("/v1/status")? })
    }

    fn summary(
        &self,
        seen: &ClientReport,
        lost: u64,
        load_began: UnixMillis,
        moves: SeenMoves,
    ) -> anyhow::Result<Value> {
        let (report, started, ended) = self.migrations.last().context("the instance was not migrated")?;
        let began_at = Duration::from_millis(started.since(load_began));
        let peak_at = PATTERN.peak_start(PATTERN.day_at(began_at));
        let storage = self.moves.iter().find(|decision| decision.kind == MoveKind::Storage);
        let storage_before_s = storage.map(|decision| {
            let decided_at = Duration::from_millis(decision.at.since(load_began));
            WRITES.peak_start(WRITES.day_at(decided_at)).as_secs_f64() - decided_at.as_secs_f64()
        });
        Ok(json!({
            "storage_moved_before_writes_s": storage_before_s,
            "acked_writes": seen.acked_writes,
            "lost_writes": lost,
            "core_swaps": moves.cores,
            "storage_swaps": moves.storage,
            "migrations": self.migrations.len(),
            "unavailability_ms": seen.largest_gap_between_ms(*started, UnixMillis(ended.0 + 1000)),
            "largest_gap_ms": seen.largest_gap_ms,
            "reconnects": seen.reconnects,
            "freeze_ms": report.unavailability_ms,
            "freeze_steps_ms": report.freeze_steps_ms,
            "migration_ms": report.duration_ms,
            "rounds": report.rounds,
            "bytes_sent": report.bytes_sent,
            "pages_sent": report.pages_sent,
            "pages_dirtied": report.pages_dirtied,
            "moved_before_peak": began_at < peak_at,
            "moved_before_peak_s": peak_at.as_secs_f64() - began_at.as_secs_f64(),
            "programs": self.status["programs"],
            "decisions": self.moves,
        }))
    }
}

fn show(result: &Value, told: &Told, answered: u64) {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mib = |value: &Value| format!("{:.1} MiB", value.as_f64().unwrap_or(0.0) / f64::from(1 << 20));
    let ms = |value: &Value| format!("{:.1} ms", value.as_f64().unwrap_or(0.0));
    for (what, value) in [
        ("acknowledged writes", result["acked_writes"].to_string()),
        ("of them lost", result["lost_writes"].to_string()),
        (
            "storage swaps, core swaps, migrations",
            format!("{}, {}, {}", result["storage_swaps"], result["core_swaps"], result["migrations"]),
        ),
        (
            "the storage swap began",
            format!(
                "{:.1} s before the writes",
                result["storage_moved_before_writes_s"].as_f64().unwrap_or(f64::NAN)
            ),
        ),
        (
            "the migration began",
            format!("{:.1} s before the peak", result["moved_before_peak_s"].as_f64().unwrap_or(0.0)),
        ),
        ("it took", ms(&result["migration_ms"])),
        ("the client waited at most", ms(&result["unavailability_ms"])),
        ("the instance stood still", ms(&result["freeze_ms"])),
        ("rounds", result["rounds"].to_string()),
        ("bytes sent", mib(&result["bytes_sent"])),
        ("pages dirtied meanwhile", result["pages_dirtied"].to_string()),
        ("queries answered", answered.to_string()),
        ("the client's new connections", result["reconnects"].to_string()),
    ] {
        table.add_row([what, value.as_str()]);
    }
    for program in told.status["programs"].as_array().into_iter().flatten() {
        let ns = program["ns_per_run"].as_f64().unwrap_or(0.0);
        let name = program["name"].as_str().unwrap_or_default();
        table.add_row([format!("eBPF {name}"), format!("{ns:.0} ns, {} times", program["runs"])]);
    }
    println!("{table}");
}

fn promises_kept(result: &Value, on_b: bool) -> anyhow::Result<()> {
    ensure!(result["lost_writes"] == 0, "acknowledged writes were lost");
    ensure!(result["migrations"].as_u64() >= Some(1) && on_b, "the instance did not move to host b");
    ensure!(result["core_swaps"].as_u64() >= Some(1), "the instance was not moved between core pools");
    ensure!(result["storage_swaps"].as_u64() >= Some(1), "its volume was not moved between disks");
    ensure!(result["moved_before_peak"] == true, "the migration began after the peak had come");
    ensure!(result["reconnects"] == 0, "the client's connection was broken");
    let gap_ms = result["unavailability_ms"].as_f64().unwrap_or(f64::MAX);
    ensure!(gap_ms < PROMISED_MS, "the client waited {gap_ms} ms");
    Ok(())
}
