//! The demo: a Redis under a load that repeats is watched. Before what it needs is there, its append-only file is moved to a fast disk, it is
//! moved to fast cores, and to another host, while a client counts what it was promised.
//!
//! Every number shown is measured by the client or told by the agents. It fails if a promise isn't kept, and if a move was not made for a
//! forecast, or not done before the load that it was made for.

use std::{
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use comfy_table::{Table, presets};
use rswap_agent::{
    forecast::{Evidence, Resource},
    status::{InstanceView, MigrationReport, MigrationState, MigrationView},
    units::UnixMillis,
};
use rswap_tests::{
    Fleet, Host, HostOptions,
    claims::{Claim, Made},
    client::{ClientReport, DataSet, Manner, REDIS, VerifyingClient},
    load::{self, Load, Pattern},
    loop_device::LoopDevice,
    stopping::Stop,
    wait_for,
};
use serde_json::{Value, json};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 40 << 20;
/// Size of each disk.
const DISK_BYTES: u64 = 512 << 20;
/// The days after which the demo has failed, if the instance has not moved.
const DAYS: u32 = 4;
/// Quiet; busy, which is more than the slow cores give; the peak, which is more than the fast ones give. From one step to the next it is longer
/// than plans look ahead, so that each is seen by itself.
const PATTERN: Pattern = Pattern {
    day: Duration::from_secs(36),
    cores: &[(0.0, 0.05), (0.56, 0.05), (0.59, 0.40), (0.78, 0.40), (0.81, 0.85), (0.95, 0.85), (0.97, 0.05)],
    peak_from: 0.81,
    peak_to: 0.95,
};
/// Writes of 32 KiB per second: few; then more than the slow disk gives.
const WRITES: Pattern = Pattern {
    cores: &[(0.0, 0.25), (0.42, 0.25), (0.45, 48.0), (0.95, 48.0), (0.97, 0.25)],
    peak_from: 0.45,
    peak_to: 0.95,
    ..PATTERN
};
const WRITE_BYTES: usize = 32 << 10;
/// A move may keep the client waiting for less than this, in milliseconds: the volume goes along.
const PROMISED_MS: f64 = 400.0;
const RESULT: &str = "target/rswap/demo.json";
/// What the pools give that it begins on, and the fast cores: `HOST_A` and `SLOW_DISK` say the same.
const SLOW_CORES: f64 = 0.3;
const FAST_CORES: f64 = 0.7;
const SLOW_BYTES_PER_S: f64 = 0.5e6;
/// Each move comes before what is needed of its pool.
const CLAIMS: [Claim; 3] = [
    Claim {
        what: "storage swap",
        kind: "storage",
        to: "ssd",
        pattern: WRITES,
        more_than: SLOW_BYTES_PER_S / WRITE_BYTES as f64,
    },
    Claim { what: "core swap", kind: "cpu", to: "fast", pattern: PATTERN, more_than: SLOW_CORES },
    Claim { what: "migration", kind: "host", to: "b", pattern: PATTERN, more_than: FAST_CORES },
];

/// Host a has a share of a core that is cheap and slow, and one that is dear and fast, and two such disks, which follow; host b has
/// more and costs more.
/// A plan may rest on a forecast when it was judged for two days of 72 windows and a bit of the third: then it is quiet, and the forecasts have seen that the
/// peak before is over. Those that look farthest are believed some seconds later.
const HOST_A: &str = r#"
[this_host]
cores = 0.75
memory_gib = 8
cost_per_core_hour = 0.05

[profile]
measure_program_cost = true

[forecast]
horizons_ms = [500, 1000, 2000, 3000, 4000]
min_seen = 154

[plan]
horizon_ms = 4000
cool_down_ms = 2000

[[pool]]
name = "slow"
cpus = "1"
capacity_cores = 0.3
cost_per_core_hour = 0.01

[[pool]]
name = "fast"
cpus = "0"
capacity_cores = 0.7
cost_per_core_hour = 0.05

[[pool]]
name = "b"
host = "10.88.0.2:7791"
cores = 2
memory_gib = 8
cost_per_core_hour = 0.08

"#;
const SLOW_DISK: &str = "operations_per_s = 300\nmbyte_per_s = 0.5\ncost_per_gib_hour = 0.001";
const FAST_DISK: &str = "operations_per_s = 5000\nmbyte_per_s = 200\ncost_per_gib_hour = 0.02";

fn main() -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
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
    let cgroups = vec![a.cgroup()?.join("redis"), b.cgroup()?.join("redis")];
    let cost = load::query_cost(&fleet.client, SERVER, &cgroups[0])?;
    say(&format!(
        "{} MiB of data in it; a query takes it {:.2} ms of CPU time",
        data.used_bytes(&fleet.client)? >> 20,
        cost.as_secs_f64() * 1e3
    ));
    say(&format!(
        "a load that repeats every {} s (a \"day\"), and a client that remembers every acknowledged write",
        PATTERN.day.as_secs()
    ));
    let pause = Duration::from_millis(5);
    let client = VerifyingClient::start_in(Manner::Patient, &fleet.client, SERVER, pause)?;
    let load = Load::start(&fleet.client, SERVER, PATTERN, cost, cgroups)?;
    let writes = Load::start_writes(&fleet.client, SERVER, WRITES, WRITE_BYTES)?;
    let load_began = UnixMillis::now();

    watch(&a, &b, &client, load.started, &stop)?;

    let answered = load.finish()? + writes.finish()?;
    let told = Told::by(&a)?;
    say("the client reads back every write that was acknowledged");
    let seen = client.finish(&fleet.client)?;
    let lost = seen.lost_writes + data.wrong_keys(&fleet.client)?;
    say("why did it move? `rswap explain redis` on host a:");
    let made: Vec<anyhow::Result<Made>> =
        CLAIMS.iter().map(|claim| claim.find(&told.moves, load_began)).collect();
    for made in made.iter().flatten() {
        println!("{}\n", made.why.join("\n"));
    }
    let result = told.summary(&seen, lost)?;
    show(&result, &told, &made, answered);
    std::fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    std::fs::write(RESULT, serde_json::to_vec_pretty(&result)?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    say(&format!("all of it, with the decisions, is in {RESULT}"));
    for claim in &CLAIMS {
        claim.check(&told.moves, load_began)?;
    }
    promises_kept(&result, b.has_instance("redis")?)
}

fn say(what: &str) {
    println!("==> {what}");
}

/// Shows what happens until the instance has moved and the peak is over, or all days are.
fn watch(
    a: &Host,
    b: &Host,
    client: &VerifyingClient,
    load_began: Instant,
    stop: &Stop,
) -> anyhow::Result<()> {
    println!(
        "{:>5} {:>3} {:>7} {:>5} {:>19} {:>8} {:>6}  it runs on",
        "time", "day", "offered", "used", "p95 within 4 s", "wait", "acked"
    );
    let mut moved_on_day = None;
    loop {
        thread::sleep(Duration::from_secs(1));
        stop.check()?;
        let at = load_began.elapsed();
        let day = PATTERN.day_at(at);
        let moved = !a.has_instance("redis")?;
        let views: Vec<InstanceView> = if moved { b } else { a }.get("/v1/profiles")?;
        let view = views.iter().find(|view| view.instance.name.as_str() == "redis");
        let pool = view.and_then(|view| view.instance.pool.clone());
        let volume = view.and_then(|view| view.volume_use.first());
        let disk = volume.and_then(|volume| volume.pool.clone());
        let place = match moved {
            true => "host b".to_owned(),
            false => {
                format!("host a, {}, {}", pool.as_deref().unwrap_or("-"), disk.as_deref().unwrap_or("-"))
            }
        };
        let profile = view.and_then(|view| view.profile.as_ref());
        let wait_us = profile.and_then(|p| p.cpu.run_queue_ns.mean()).map(|ns| ns / 1e3);
        println!(
            "{:>4.0}s {:>3} {:>7.2} {:>5} {:>19} {:>8} {:>6}  {place}",
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
            return Ok(());
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
    /// All moves, oldest first, each with the decision that it came from, in words.
    moves: Vec<Value>,
    migrations: Vec<(MigrationReport, UnixMillis, UnixMillis)>,
    status: Value,
}

impl Told {
    fn by(a: &Host) -> anyhow::Result<Self> {
        let migrations: Vec<MigrationView> = a.get("/v1/migrations")?;
        let done = migrations.into_iter().filter_map(|migration| match migration.state {
            MigrationState::Done { report, ended } => Some((report, migration.started, ended)),
            _ => None,
        });
        Ok(Self { moves: a.get("/v1/moves")?, migrations: done.collect(), status: a.get("/v1/status")? })
    }

    fn summary(&self, seen: &ClientReport, lost: u64) -> anyhow::Result<Value> {
        let (report, started, ended) = self.migrations.last().context("the instance was not migrated")?;
        Ok(json!({
            "acked_writes": seen.acked_writes,
            "lost_writes": lost,
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
            "programs": self.status["programs"],
            "moves": self.moves,
        }))
    }
}

fn show(result: &Value, told: &Told, made: &[anyhow::Result<Made>], answered: u64) {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mib = |value: &Value| format!("{:.1} MiB", value.as_f64().unwrap_or(0.0) / f64::from(1 << 20));
    let ms = |value: &Value| format!("{:.1} ms", value.as_f64().unwrap_or(0.0));
    let row = |table: &mut Table, what: &str, value: String| {
        table.add_row([what.to_owned(), value]);
    };
    row(&mut table, "acknowledged writes", result["acked_writes"].to_string());
    row(&mut table, "of them lost", result["lost_writes"].to_string());
    for (claim, made) in CLAIMS.iter().zip(made) {
        let ahead = match made {
            Ok(made) => {
                format!("{:.1} s before it was needed, took {:.1} s", made.ahead_s, made.took.as_secs_f64())
            }
            Err(error) => error.to_string(),
        };
        row(&mut table, &format!("the {} began", claim.what), ahead);
    }
    for (what, value) in [
        ("in the migration, the client waited at most", ms(&result["unavailability_ms"])),
        ("the instance stood still", ms(&result["freeze_ms"])),
        ("rounds", result["rounds"].to_string()),
        ("bytes sent", mib(&result["bytes_sent"])),
        ("pages dirtied meanwhile", result["pages_dirtied"].to_string()),
        ("queries answered", answered.to_string()),
        ("the client's new connections", result["reconnects"].to_string()),
    ] {
        row(&mut table, what, value);
    }
    for program in told.status["programs"].as_array().into_iter().flatten() {
        let ns = program["ns_per_run"].as_f64().unwrap_or(0.0);
        let name = program["name"].as_str().unwrap_or_default();
        row(&mut table, &format!("eBPF {name}"), format!("{ns:.0} ns, {} times", program["runs"]));
    }
    println!("{table}");
}

fn promises_kept(result: &Value, on_b: bool) -> anyhow::Result<()> {
    ensure!(result["lost_writes"] == 0, "acknowledged writes were lost");
    ensure!(result["migrations"].as_u64() >= Some(1) && on_b, "the instance did not move to host b");
    ensure!(result["reconnects"] == 0, "the client's connection was broken");
    let gap_ms = result["unavailability_ms"].as_f64().unwrap_or(f64::MAX);
    ensure!(gap_ms < PROMISED_MS, "the client waited {gap_ms} ms");
    Ok(())
}
