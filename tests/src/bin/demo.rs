//! The demo: a Redis under a load that repeats is watched, moved to fast cores, and moved to another host
//! before its peak, while a client counts what it was promised.
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
use nix::sys::signal::{SigSet, Signal};
use rswap_agent::units::UnixMillis;
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{ClientReport, DataSet, REDIS, VerifyingClient},
    load::{Load, Pattern},
};
use serde_json::{Value, json};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 110 << 20;
const DAYS: u32 = 4;
const PATTERN: Pattern = Pattern {
    day: Duration::from_secs(24),
    quiet_per_s: 20.0,
    peak_per_s: 500.0,
    ramp_from: 0.4,
    peak_from: 0.6,
    peak_to: 0.8,
};
/// A migration may keep the client waiting for less than this, in milliseconds.
const PROMISED_MS: f64 = 100.0;
const RESULT: &str = "target/rswap/demo.json";

/// Host a: slow, cheap cores and fast, dear ones; host b is cheaper than a's fast cores, but another machine.
const HOST_A: &str = r#"
[this_host]
cores = 0.5
memory_gib = 8
cost_per_core_hour = 0.05

[forecast]
horizons_ms = [1000, 3000, 6000]
min_seen = 20

[plan]
horizon_ms = 6000
cool_down_ms = 2000

[[pool]]
name = "slow"
cpus = "1"
capacity_cores = 0.2
cost_per_core_hour = 0.01
performance = 0.5

[[pool]]
name = "fast"
cpus = "0"
capacity_cores = 0.9
cost_per_core_hour = 0.05
performance = 1.0

[[pool]]
name = "b"
host = "10.88.0.2:7791"
cores = 2
memory_gib = 8
cost_per_core_hour = 0.04
performance = 1.0
"#;

fn main() -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    say("two hosts, each a network namespace with an agent; a client on a third");
    let mut fleet = Fleet::new()?;
    let options = HostOptions { mode: "act", window_ms: 500, more: HOST_A.into() };
    let mut a = fleet.host("a", &options)?;
    let mut b = fleet.host("b", &HostOptions { window_ms: 500, ..HostOptions::default() })?;
    (a.show_log, b.show_log) = (false, false);

    say("an unmodified redis-server as an instance on host a, on the slow cores");
    a.run("redis", &["--net", &format!("{SERVER}/24"), "--pool", "slow"], REDIS)?;
    let data = DataSet::load(&fleet.client, SERVER, DATA_BYTES)?;
    say(&format!("{} MiB of data in it", data.used_bytes(&fleet.client)? >> 20));
    let client = VerifyingClient::start(&fleet.client, SERVER, Duration::from_millis(2))?;
    let load = Load::start(&fleet.client, SERVER, PATTERN)?;
    let load_began = UnixMillis::now();

    watch(&a, &b, &client, load.started, &stop)?;

    let answered = load.finish()?;
    let decisions: Value = a.get("/v1/decisions?instance=redis")?;
    let migrations: Value = a.get("/v1/migrations")?;
    let status: Value = a.get("/v1/status")?;
    say("the client reads back every write that was acknowledged");
    let seen = client.finish(&fleet.client)?;
    let wrong_keys = data.wrong_keys(&fleet.client)?;
    let result = summary(&seen, wrong_keys, &decisions, &migrations, &status, load_began)?;
    show(&result, answered, &seen);
    std::fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    std::fs::write(RESULT, serde_json::to_vec_pretty(&result)?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    say(&format!("all of it, with every decision, is in {RESULT}"));
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

/// Shows what happens until the instance has moved and the peak is over, or all days are.
fn watch(
    a: &Host,
    b: &Host,
    client: &VerifyingClient,
    load_began: Instant,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    println!(
        "{:>6} {:>4} {:>9} {:>7} {:>9} {:>9}  where",
        "time", "day", "queries/s", "cores", "p95 soon", "acked"
    );
    let mut moved_on_day = None;
    loop {
        thread::sleep(Duration::from_secs(1));
        ensure!(!stop.load(Ordering::Acquire), "stopped by the user");
        let at = load_began.elapsed();
        let day = (at.as_secs_f64() / PATTERN.day.as_secs_f64()) as u32;
        let moved = !a.has_instance("redis")?;
        let host = if moved { b } else { a };
        let views: Value = host.get("/v1/profiles")?;
        let view = &views[0];
        let cores = view["profile"]["cpu"]["cores"].as_f64();
        let soon = view["demand"]["points"].as_array().and_then(|points| {
            let cpu = points.iter().filter(|point| point["resource"] == "cpu");
            cpu.filter(|point| point["evidence"]["state"] == "enough")
                .filter_map(|p| p["need"]["p95"].as_f64())
                .reduce(f64::max)
        });
        let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.2}"));
        let place = if moved { "host b".into() } else { format!("host a, {}", text(&view["pool"])) };
        let (rate, acked) = (PATTERN.rate_per_s(at), client.acked());
        println!(
            "{:>5.0}s {:>4} {rate:>9.0} {:>7} {:>9} {acked:>9}  {place}",
            at.as_secs_f64(),
            day + 1,
            number(cores),
            number(soon)
        );
        if moved && moved_on_day.is_none() {
            moved_on_day = Some(day);
        }
        let over = moved_on_day.is_some_and(|day| at > PATTERN.peak_start(day) + PATTERN.day / 3);
        if over || day >= DAYS {
            return Ok(());
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("-").to_owned()
}

fn summary(
    seen: &ClientReport,
    wrong_keys: u64,
    decisions: &Value,
    migrations: &Value,
    status: &Value,
    load_began: UnixMillis,
) -> anyhow::Result<Value> {
    let moves: Vec<&Value> = decisions
        .as_array()
        .context("no list of decisions")?
        .iter()
        .filter(|d| d["outcome"]["outcome"] == "move")
        .collect();
    let done: Vec<&Value> = migrations
        .as_array()
        .context("no list of migrations")?
        .iter()
        .filter(|m| m["state"] == "done")
        .collect();
    let report = done.last().map(|migration| &migration["report"]).unwrap_or(&Value::Null);
    let started = done.last().and_then(|migration| migration["started"].as_u64());
    let before_peak = started.map(|started| {
        let at = Duration::from_millis(UnixMillis(started).since(load_began));
        let day = (at.as_secs_f64() / PATTERN.day.as_secs_f64()) as u32;
        at < PATTERN.peak_start(day)
    });
    Ok(json!({
        "acked_writes": seen.acked_writes,
        "lost_writes": seen.lost_writes + wrong_keys,
        "core_swaps": status["swaps_done"],
        "migrations": done.len(),
        "unavailability_ms": seen.largest_gap_ms,
        "freeze_ms": report["unavailability_ms"],
        "rounds": report["rounds"],
        "bytes_sent": report["bytes_sent"],
        "pages_dirtied": report["pages_dirtied"],
        "moved_before_peak": before_peak.unwrap_or(false),
        "programs": status["programs"],
        "decisions": moves,
    }))
}

fn show(result: &Value, answered: u64, seen: &ClientReport) {
    println!();
    for key in [
        "acked_writes",
        "lost_writes",
        "core_swaps",
        "migrations",
        "unavailability_ms",
        "freeze_ms",
        "rounds",
        "bytes_sent",
        "pages_dirtied",
        "moved_before_peak",
    ] {
        println!("{key:>20}  {}", result[key]);
    }
    println!("{:>20}  {answered}", "queries answered");
    println!("{:>20}  {}", "reconnects", seen.reconnects);
    println!();
}

fn promises_kept(result: &Value, on_b: bool) -> anyhow::Result<()> {
    ensure!(result["lost_writes"] == 0, "acknowledged writes were lost");
    ensure!(result["migrations"].as_u64() >= Some(1) && on_b, "the instance did not move to host b");
    ensure!(result["core_swaps"].as_u64() >= Some(1), "the instance was not moved between core pools");
    ensure!(result["moved_before_peak"] == true, "the migration began after the peak had come");
    let gap_ms = result["unavailability_ms"].as_f64().unwrap_or(f64::MAX);
    ensure!(gap_ms < PROMISED_MS, "the client waited {gap_ms} ms");
    Ok(())
}
