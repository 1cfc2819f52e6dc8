//! Plans move volumes between disks: to the fast one before a load that repeats needs it, and back where it is cheap; off a pool that
//! is drained; and not where it does not fit or fails, which is said and tried again.

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::{Context, ensure};
use rswap_agent::{
    plan::{Decision, MoveKind, Outcome, Plan, StayReason},
    pool::{Pool, PoolKind},
    status::InstanceView,
};
use rswap_tests::{
    Host, HostOptions,
    client::VerifyingClient,
    load::{Load, Pattern},
    moves::START_LIMIT,
    reason_to_skip,
    storage::{Disk, StorageScene},
    wait_for,
};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(30);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
/// Writes of 8 KiB per second, each of which the server syncs: few, then more than the slow pool is configured to give.
const PATTERN: Pattern = Pattern {
    day: Duration::from_secs(12),
    cores: &[(0.0, 2.0), (0.45, 2.0), (0.57, 80.0), (0.90, 80.0), (0.95, 2.0)],
    peak_from: 0.57,
    peak_to: 0.90,
};
/// The days after which it has failed, if the volume has not moved.
const DAYS: u32 = 6;
const SLOW: &str = "operations_per_s = 60\nmbyte_per_s = 100\ncost_per_gib_hour = 1.0";
const FAST: &str = "operations_per_s = 5000\nmbyte_per_s = 500\ncost_per_gib_hour = 60.0";
const PLANS: &str = "[forecast]\nhorizons_ms = [250, 500, 1000, 2000, 3000]\nmin_seen = 96\n\n\
                     [plan]\nhorizon_ms = 3000\ncool_down_ms = 300\nunavailability_cost_per_hour = 0.1\n\n";
/// Idle; for what has to move at once.
const SOON: &str = "[forecast]\nhorizons_ms = [400, 1200]\nmin_seen = 10\n\n\
                    [plan]\nhorizon_ms = 2000\ncool_down_ms = 500\nhysteresis = 1000.0\n\n";

fn options(window_ms: u64, more: &str) -> HostOptions {
    HostOptions {
        mode: "act",
        window_ms,
        max_unavailability_ms: 300,
        more: more.to_owned(),
        ..HostOptions::default()
    }
}

fn pool_of(host: &Host) -> anyhow::Result<Option<String>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    Ok(views.first().and_then(|view| view.volume_use.first()).and_then(|seen| seen.pool.clone()))
}

fn wait_until_on(host: &Host, pool: &str) -> anyhow::Result<()> {
    let on = || Ok((pool_of(host)?.as_deref() == Some(pool)).then_some(()));
    wait_for(&format!("the volume to be on {pool}"), LIMIT, on)
}

/// The last decision about storage.
fn decided(host: &Host) -> anyhow::Result<Option<Decision>> {
    let plan: Plan = host.get("/v1/plan")?;
    Ok(plan.decisions.into_iter().find(|decision| decision.kind == MoveKind::Storage))
}

fn start_redis(scene: &StorageScene) -> anyhow::Result<()> {
    let path = scene.path.to_string_lossy().into_owned();
    let server = ["redis-server", "--dir", &path, "--appendonly", "yes", "--appendfsync", "always"];
    let options = [
        "--save",
        "",
        "--protected-mode",
        "no",
        "--auto-aof-rewrite-percentage",
        "0",
        "--loglevel",
        "warning",
    ];
    scene.run_with(&["--net", &format!("{SERVER}/24")], &[&server[..], &options[..]].concat())?;
    let knock = || {
        let limit = Duration::from_secs(1);
        wait_for("Redis", START_LIMIT, || {
            Ok(std::net::TcpStream::connect_timeout(&(SERVER, 6379).into(), limit).ok().map(drop))
        })
    };
    let knocking = scene.fleet.client.spawn("knock", knock)?;
    knocking.join().map_err(|_| anyhow::anyhow!("the one who knocked panicked"))?
}

#[test]
fn a_volume_is_on_the_fast_disk_when_the_load_comes_and_on_the_cheap_one_otherwise() -> anyhow::Result<()> {
    if reason_to_skip("a_volume_is_on_the_fast_disk_when_the_load_comes_and_on_the_cheap_one_otherwise")
        .is_some()
    {
        return Ok(());
    }
    let disks = [Disk::of(256 * MIB), Disk::of(256 * MIB)];
    let scene = StorageScene::set_with(disks, [SLOW, FAST], options(250, PLANS))?;
    start_redis(&scene)?;
    scene.moved("one")?.map_err(anyhow::Error::msg)?;
    let client = VerifyingClient::start(&scene.fleet.client, SERVER, Duration::from_millis(200))?;
    let load = Load::start_writes(&scene.fleet.client, SERVER, PATTERN, 8 << 10)?;

    let on = |pool: &str| Ok((pool_of(&scene.host)?.as_deref() == Some(pool)).then_some(()));
    wait_for("the volume to be on the fast disk", PATTERN.day * DAYS, || on("two"))?;
    let at = load.started.elapsed();
    let peak = PATTERN.peak_start(PATTERN.day_at(at));
    println!("on the fast disk after {at:?}, the peak is at {peak:?}");
    let explained = scene.host.call(&["explain", "worker", "-n", "400"])?;
    wait_for("the volume to be on the cheap disk again", PATTERN.day, || on("one"))?;
    println!("on the cheap disk again after {:?}", load.started.elapsed());
    wait_for("the volume to be on the fast disk once more", PATTERN.day * 2, || on("two"))?;
    let again = load.started.elapsed();
    let again_peak = PATTERN.peak_start(PATTERN.day_at(again));
    println!("on the fast disk after {again:?}, the peak is at {again_peak:?}");

    load.finish()?;
    let seen = client.finish(&scene.fleet.client)?;
    println!("{} writes acknowledged, {} lost", seen.acked_writes, seen.lost_writes);
    ensure!(seen.lost_writes == 0, "{} writes are lost", seen.lost_writes);
    scene.nothing_is_left()?;
    let status: Value = scene.host.get("/v1/status")?;
    println!("swaps: {} done, {} failed", status["swaps_done"], status["swaps_failed"]);
    let why = explained.split("\n\n").filter(|text| text.contains("moves to two in")).last();
    let why = why.with_context(|| format!("no decision to move is kept:\n{explained}"))?;
    println!("{why}");
    ensure!(why.contains("worker (storage pool of its volume data) moves to two in"), "{why}");
    ensure!(why.contains("the present one can't meet the need") && why.contains("requests/s and"), "{why}");
    ensure!(at < peak && again < again_peak, "it came after the load");
    Ok(())
}

#[test]
fn a_drained_disk_is_left_and_what_does_not_fit_or_fails_stays_and_is_tried_again() -> anyhow::Result<()> {
    if reason_to_skip("a_drained_disk_is_left_and_what_does_not_fit_or_fails_stays_and_is_tried_again")
        .is_some()
    {
        return Ok(());
    }
    let disks = [Disk::of(256 * MIB), Disk::that_can_fail(256 * MIB)];
    let mut scene = StorageScene::set_with(disks, [SLOW, FAST], options(200, SOON))?;
    scene.python("volume", &["0.01", "2000000"])?;
    scene.moves("one")?;
    let stays = |host: &Host, what: &str, is: &dyn Fn(&Decision) -> bool| {
        wait_for(what, LIMIT, || Ok(decided(host)?.filter(|decision| is(decision))))
    };
    stays(&scene.host, "a forecast", &|decision| decision.flow.is_some())?;

    // It does not fit.
    let filler = scene.disks[1].mount_point().join("filler");
    fs::write(&filler, vec![1u8; 216 << 20])?;
    wait_for("a look that finds the disk filled", LIMIT, || {
        let pools: Vec<Pool> = scene.host.get("/v1/pools")?;
        let room = |pool: &Pool| match pool.kind {
            PoolKind::Storage { free_bytes, .. } => free_bytes < 22 * MIB,
            _ => false,
        };
        Ok(pools.iter().any(room).then_some(()))
    })?;
    scene.host.call(&["drain", "one"])?;
    let no_room = stays(&scene.host, "a plan that finds no room", &|decision| {
        decision.outcome == Outcome::Stay { reason: StayReason::NoPoolFits }
    })?;
    let why = rswap_agent::plan::explain(&no_room);
    ensure!(why.contains("MiB of room, has") || why.contains("is available, less than"), "{why}");
    std::thread::sleep(Duration::from_secs(1));
    ensure!(pool_of(&scene.host)?.as_deref() == Some("one"), "it moved");
    scene.host.call(&["drain", "one", "--undo"])?;
    fs::remove_file(&filler)?;

    // It fails.
    scene.disks[1].fail()?;
    scene.host.call(&["drain", "one"])?;
    let waits = |decision: &Decision| {
        matches!(decision.outcome, Outcome::Stay { reason: StayReason::BackOff { .. } })
    };
    let failed = stays(&scene.host, "a plan that waits after a failure", &waits)?;
    let why = rswap_agent::plan::explain(&failed);
    ensure!(why.contains("failed move(s) (cannot move the volume data of worker to"), "{why}");
    ensure!(why.contains("Input/output error"), "{why}");
    scene.goes_on()?;
    scene.is_in("one")?;
    scene.nothing_is_left()?;

    // With another disk in its place the next try succeeds.
    scene.disks[1].replace()?;
    wait_until_on(&scene.host, "two")?;
    scene.goes_on()?;
    scene.is_in("two")?;
    let why = scene.host.call(&["explain", "worker", "-n", "400"])?;
    ensure!(why.contains("the present one won't do: it is being emptied"), "{why}");
    let shown = scene.host.call(&["ps"])?;
    ensure!(shown.contains("(pool two, "), "{shown}");
    Ok(())
}
