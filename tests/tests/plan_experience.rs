//! Plans reckon with what a disk is really like: a volume leaves one that has become slow, by what its own requests take there; and
//! one that others load.

use std::{process::Child, time::Duration};

use anyhow::{Context, ensure};
use rswap_agent::{
    plan::{Decision, Dropped, MoveKind, Plan, explain},
    pool::{Flow, Inventory, Known, Pool, PoolKind, Source},
    status::InstanceView,
};
use rswap_tests::{
    Host, HostOptions, moves, reason_to_skip,
    served_disk::Speed,
    storage::{Disk, StorageScene},
    wait_for,
};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(40);
/// What a request takes on the disk that has become slow.
const SLOW_REQUEST: Duration = Duration::from_millis(8);

/// What `plan` says besides.
fn options(plan: &str) -> HostOptions {
    let more = format!(
        "[forecast]\nhorizons_ms = [400, 1200]\nmin_seen = 10\n\n[pools]\nlook_every_ms = 200\n\n\
         [plan]\nhorizon_ms = 60000\ncool_down_ms = 500\n{plan}\n\n"
    );
    HostOptions { mode: "act", window_ms: 200, max_unavailability_ms: 500, more, ..HostOptions::default() }
}

fn pool_of(host: &Host) -> anyhow::Result<Option<String>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    Ok(views.first().and_then(|view| view.volume_use.first()).and_then(|seen| seen.pool.clone()))
}

fn decided(host: &Host) -> anyhow::Result<Option<Decision>> {
    let plan: Plan = host.get("/v1/plan")?;
    Ok(plan.decisions.into_iter().find(|decision| decision.kind == MoveKind::Storage))
}

fn measure(host: &Host, pool: &str, what: &str) -> anyhow::Result<Option<Known>> {
    let found: Inventory = host.get("/v1/inventory")?;
    let pool = found.pool(pool).context("the pool is missing")?;
    Ok(pool.performance.iter().find(|measure| measure.what == what).map(|measure| measure.known.clone()))
}

#[test]
fn a_volume_leaves_a_disk_that_has_become_slow() -> anyhow::Result<()> {
    if reason_to_skip("a_volume_leaves_a_disk_that_has_become_slow").is_some() {
        return Ok(());
    }
    let disks = [Disk::of(256 * MIB), Disk::slow(256 * MIB, Speed::default())];
    let scene = StorageScene::set_with(disks, ["", ""], options("io_weight = 100.0\nthreshold = -1000.0"))?;
    for pool in ["one", "two"] {
        scene.host.call(&["calibrate", pool, "--yes"])?;
    }
    let calibrated = wait_for("the agent to know what was measured", LIMIT, || {
        let of = |pool: &str| measure(&scene.host, pool, "write_latency_p50_us");
        Ok(of("one")?.and(of("two")?))
    })?;
    scene.python("synced", &["0.02", "2048"])?;
    // For as long, only the fast one is there for it.
    scene.host.call(&["drain", "one"])?;
    scene.moves("two")?;

    // What its requests take there is counted, and is of the order of what was calibrated.
    let known = |what: &str, is: &dyn Fn(f64) -> bool| {
        wait_for(what, LIMIT, || {
            let p50 = measure(&scene.host, "two", "latency_p50_us")?;
            let enough = |known: &Known| match known.source {
                Source::Experienced { requests, .. } => requests >= 100 && is(known.value),
                _ => false,
            };
            Ok(p50.filter(enough))
        })
    };
    let fast = known("requests to be counted", &|us| us < 2_500.0)?;
    let shown = scene.host.call(&["pools"])?;
    ensure!(shown.contains("latency_p50_us") && shown.contains("^ experienced by instances"), "{shown}");
    let sources = scene.host.call(&["pools", "--sources"])?;
    ensure!(sources.contains("requests of instances until"), "{sources}");

    scene.disks[1].set_speed(Speed::of(SLOW_REQUEST))?;
    let slowed = known("the disk to be known as slow", &|us| us > 3_000.0)?;
    println!("{calibrated:?}, {fast:?}, {slowed:?}");
    ensure!(pool_of(&scene.host)?.as_deref() == Some("two"), "it moved to a pool that is being emptied");
    scene.host.call(&["drain", "one", "--undo"])?;
    let moved = wait_for("the volume to leave the slow disk", LIMIT, || {
        Ok((pool_of(&scene.host)?.as_deref() == Some("one")).then_some(()))
    });
    let explained = scene.host.call(&["explain", "worker", "-n", "400"])?;
    moved.with_context(|| explained.clone())?;
    let why = explained.split("\n\n").filter(|text| text.contains("moves to one in")).last();
    let why = why.with_context(|| format!("no decision to move is kept:\n{explained}"))?;
    println!("{why}");
    ensure!(
        why.contains("its score is better: a request takes") && why.contains("us here (experienced in"),
        "{why}"
    );
    scene.goes_on()?;
    scene.is_on(Some("one"))?;
    scene.nothing_is_left()
}

struct Others(Vec<Child>);

impl Drop for Others {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_volume_leaves_a_disk_that_others_load() -> anyhow::Result<()> {
    if reason_to_skip("a_volume_leaves_a_disk_that_others_load").is_some() {
        return Ok(());
    }
    let disks = [Disk::of(256 * MIB), Disk::of(256 * MIB)];
    let lines = ["operations_per_s = 150\nmbyte_per_s = 500", "operations_per_s = 5000\nmbyte_per_s = 500"];
    let scene = StorageScene::set_with(disks, lines, options("hysteresis = 1000.0"))?;
    scene.python("synced", &["0.05", "512"])?;
    scene.moves("one")?;
    let others = |pool: &str| -> anyhow::Result<Flow> {
        let pools: Vec<Pool> = scene.host.get("/v1/pools")?;
        match pools.iter().find(|seen| seen.name == pool).map(|pool| &pool.kind) {
            Some(PoolKind::Storage { foreign, .. }) => Ok(*foreign),
            other => anyhow::bail!("{other:?}"),
        }
    };
    let fits = |what: &str| {
        wait_for(what, LIMIT, || {
            let fits = |decision: &Decision| {
                decision.current.as_ref().is_some_and(|current| current.dropped.is_none())
            };
            Ok(decided(&scene.host)?.filter(fits))
        })
    };
    fits("a plan that finds room for it")?;
    ensure!(others("one")?.operations_per_s < 60.0, "{:?}", others("one")?);
    std::thread::sleep(Duration::from_secs(2));
    ensure!(pool_of(&scene.host)?.as_deref() == Some("one"), "it moved for no reason");

    // Two that are no instances write there.
    let mut load = Others(Vec::new());
    for name in ["first", "second"] {
        let at = scene.disks[0].mount_point().join(name);
        std::fs::create_dir(&at)?;
        let program = moves::program("synced.py");
        let log = scene.fleet.scratch().join(name);
        let mut other = scene.host.command("python3".as_ref());
        other.arg(program).args([log, at]).args(["0.004", "64"]);
        load.0.push(other.spawn()?);
    }
    wait_for("the volume to leave the disk", LIMIT, || {
        Ok((pool_of(&scene.host)?.as_deref() == Some("two")).then_some(()))
    })?;
    let loaded = others("one")?;
    let explained = scene.host.call(&["explain", "worker", "-n", "400"])?;
    let why = explained.split("\n\n").filter(|text| text.contains("moves to two in")).last();
    let why = why.with_context(|| format!("no decision to move is kept:\n{explained}"))?;
    println!("{why}\n{loaded:?}");
    ensure!(why.contains("the present one can't meet the need"), "{why}");
    ensure!(loaded.operations_per_s > 80.0, "{loaded:?}");
    let shown = measure(&scene.host, "one", "others_operations_per_s")?.context("it is not shown")?;
    ensure!(shown.source == Source::found("/proc/diskstats") && shown.value > 80.0, "{shown:?}");
    scene.goes_on()?;
    scene.is_on(Some("two"))?;

    // While they write, nobody fits there who is told to go; when they have ended, it is free again.
    scene.host.call(&["drain", "two"])?;
    let kept = wait_for("a plan that finds no room", LIMIT, || {
        let finds_none = |decision: &Decision| {
            let one = decision.candidates.iter().find(|candidate| candidate.pool == "one");
            one.is_some_and(|one| matches!(one.dropped, Some(Dropped::Flow { .. })))
        };
        Ok(decided(&scene.host)?.filter(finds_none))
    })?;
    println!("{}", explain(&kept));
    drop(load);
    wait_for("the volume to be where there is room again", LIMIT, || {
        Ok((pool_of(&scene.host)?.as_deref() == Some("one")).then_some(()))
    })?;
    scene.goes_on()?;
    scene.is_on(Some("one"))?;
    ensure!(others("one")?.operations_per_s < 60.0, "{:?}", others("one")?);
    Ok(())
}
