//! Cores and disk of one instance get too small at once, and the disk that its volume is to go to fails: it keeps the cores that it was given, stays on its disk,
//! and nothing only saves meanwhile; with another disk in its place the rest is done.

use std::{fs, time::Duration};

use anyhow::{Context, ensure};
use rswap_agent::{
    plan::{Decision, MoveKind, Outcome, Plan, StayReason, explain},
    status::InstanceView,
};
use rswap_tests::{
    Host, HostOptions, reason_to_skip,
    storage::{Disk, StorageScene},
    wait_for,
};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(40);
/// Blocks per second, each of which the program syncs, and cores: less than the slow disk and the few cores give; more than both; more than the disk only.
const IDLE: &str = "15 0.02";
const BUSY: &str = "150 0.6";
const WRITING: &str = "150 0.02";
const SLOW: &str = "operations_per_s = 60\nmbyte_per_s = 100\ncost_per_gib_hour = 0.1";
const FAST: &str = "operations_per_s = 5000\nmbyte_per_s = 500\ncost_per_gib_hour = 0.2";
const MORE: &str = r#"
[forecast]
horizons_ms = [400, 1200]
min_seen = 10

[plan]
horizon_ms = 20000
cool_down_ms = 500
unavailability_cost_per_hour = 0.1

[pools]
look_every_ms = 200

[[pool]]
name = "few"
cpus = "1"
capacity_cores = 0.4
cost_per_core_hour = 0.1

[[pool]]
name = "many"
cpus = "0-1"
cost_per_core_hour = 5

"#;

/// The pools of its cores and of its volume, where the agent knows them already.
fn places(host: &Host) -> anyhow::Result<Option<(String, String)>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    let Some(view) = views.into_iter().next() else { return Ok(None) };
    let volume = view.volume_use.first().and_then(|seen| seen.pool.clone());
    Ok(view.instance.pool.zip(volume))
}

/// The last decisions about its cores and its volume.
fn decided(host: &Host) -> anyhow::Result<Option<(Decision, Decision)>> {
    let plan: Plan = host.get("/v1/plan")?;
    let of = |kind| plan.decisions.iter().find(|decision| decision.kind == kind).cloned();
    Ok(of(MoveKind::Cpu).zip(of(MoveKind::Storage)))
}

fn is_short(decision: &Decision) -> bool {
    decision.current.as_ref().is_some_and(|current| current.dropped.is_some())
}

fn waits_after_failure(decision: &Decision) -> bool {
    matches!(decision.outcome, Outcome::Stay { reason: StayReason::BackOff { .. } })
}

/// Waits for decisions about both that are as they should be; `on` is where the instance has to be at each look.
fn wait_for_both(
    host: &Host,
    what: &str,
    on: impl Fn(&str, &str) -> anyhow::Result<()>,
    fits: impl Fn(&Decision, &Decision) -> bool,
) -> anyhow::Result<(Decision, Decision)> {
    let found = wait_for(what, LIMIT, || {
        if let Some((cores, volume)) = places(host)? {
            on(&cores, &volume)?;
        }
        Ok(decided(host)?.filter(|(cores, volume)| fits(cores, volume)))
    });
    match found {
        Ok(both) => Ok(both),
        Err(error) => Err(error.context(host.call(&["plan"])?)),
    }
}

#[test]
fn a_step_that_fails_takes_nothing_away_and_holds_back_what_only_saves() -> anyhow::Result<()> {
    if reason_to_skip("a_step_that_fails_takes_nothing_away_and_holds_back_what_only_saves").is_some() {
        return Ok(());
    }
    // Until both are short it only observes.
    let options = HostOptions {
        mode: "observe",
        window_ms: 200,
        max_unavailability_ms: 500,
        more: MORE.to_owned(),
        ..HostOptions::default()
    };
    let disks = [Disk::that_can_fail(64 * MIB), Disk::that_can_fail(64 * MIB)];
    let mut scene = StorageScene::set_with(disks, [SLOW, FAST], options)?;
    let rates = scene.log.with_extension("log.rates");
    let tell = |text: &str| {
        let new = rates.with_extension("new");
        fs::write(&new, text).and_then(|()| fs::rename(&new, &rates))
    };
    tell(IDLE)?;
    let program = rswap_tests::moves::program("needs.py").to_string_lossy().into_owned();
    let [log, path] = [&scene.log, &scene.path].map(|path| path.to_string_lossy().into_owned());
    scene.run_with(&["--pool", "few"], &["python3", &program, &log, &path])?;
    scene.moves("one")?;
    let on = |cores: &'static str, volume: &'static str| {
        move |at: &str, on: &str| {
            ensure!((at, on) == (cores, volume), "it is on {at} and {on}, not on {cores} and {volume}");
            Ok(())
        }
    };
    wait_for_both(&scene.host, "forecasts of both", on("few", "one"), |cores, volume| {
        let known = |decision: &Decision| decision.current.is_some() && !is_short(decision);
        known(cores) && known(volume)
    })?;

    // Both get too small: the plan puts their moves in order, the cores first once both are needed at once. Then the disk fails, and the agent begins to act.
    tell(BUSY)?;
    let (cores, volume) =
        wait_for_both(&scene.host, "two moves, the cores first", on("few", "one"), |cores, volume| {
            let in_order = cores.steps.iter().map(|step| (step.kind, step.to.as_str()));
            is_short(cores)
                && is_short(volume)
                && in_order.eq([(MoveKind::Cpu, "many"), (MoveKind::Storage, "two")])
        })?;
    println!("{}", explain(&cores));
    ensure!(cores.steps == volume.steps, "{:?}, but {:?}", cores.steps, volume.steps);
    ensure!(cores.steps.iter().all(|step| step.due_ms.is_some()), "{:?}", cores.steps);
    scene.disks[1].fail_after(0)?;
    scene.host.restart_in("act")?;
    let has_many = std::cell::Cell::new(false);
    let (_, volume) = wait_for_both(
        &scene.host,
        "the cores to be moved, and the volume to wait",
        |cores, volume| {
            ensure!(volume == "one", "its volume is on {volume}");
            ensure!(cores == "many" || !has_many.get(), "what it was given was taken away again");
            has_many.set(cores == "many");
            Ok(())
        },
        |_, volume| has_many.get() && waits_after_failure(volume) && is_short(volume),
    )?;
    let why = explain(&volume);
    println!("{why}");
    ensure!(why.contains("failed move(s) (cannot move the volume data of worker to"), "{why}");
    ensure!(why.contains("Input/output error") || why.contains("Read-only"), "{why}");
    scene.goes_on()?;
    scene.is_in("one")?;
    scene.nothing_is_left()?;
    let status: Value = scene.host.get("/v1/status")?;
    ensure!(
        status["swaps_done"].as_u64() >= Some(1) && status["swaps_failed"].as_u64() >= Some(1),
        "{status}"
    );
    let listed = scene.host.call(&["ps"])?;
    ensure!(listed.contains("many") && listed.contains("(pool one, "), "{listed}");

    // It would be cheaper on few cores now. That only saves, and the volume must move and can't: it waits.
    tell(WRITING)?;
    let (cores, _) = wait_for_both(
        &scene.host,
        "a saving that waits for the volume",
        on("many", "one"),
        |cores, volume| {
            let saves = cores.candidates.iter().any(|few| {
                let score = cores.current.as_ref().map_or(0.0, |current| current.score);
                few.pool == "few" && few.dropped.is_none() && score - few.total > cores.hysteresis
            });
            let waits = cores.outcome == Outcome::Stay { reason: StayReason::OtherMoveFirst };
            waits && saves && !is_short(cores) && is_short(volume) && waits_after_failure(volume)
        },
    )?;
    let why = explain(&cores);
    ensure!(why.contains("stays: another kind of move comes first"), "{why}");
    let explained = scene.host.call(&["explain", "worker"])?;
    ensure!(explained.contains("failed move(s) (cannot move the volume data"), "{explained}");

    // With another disk in its place, the rest is done, and the saving after it. In between, for some seconds, there is no disk: it
    // goes on waiting then.
    wait_for_both(&scene.host, "a longer wait", on("many", "one"), |_, volume| {
        matches!(volume.outcome, Outcome::Stay { reason: StayReason::BackOff { left_ms: 6500.., .. } })
    })?;
    scene.disks[1].replace()?;
    let done = wait_for("the volume to be on the other disk, and the cores to be few", LIMIT, || {
        let Some((cores, volume)) = places(&scene.host)? else { return Ok(None) };
        // Of the cores the agent tells at once, of the volume in its next window: but it is in its place by then.
        let has_moved = scene.is_in("two").is_ok();
        ensure!(cores == "many" || has_moved, "it was moved to save before its volume could move");
        Ok((cores == "few" && volume == "two").then_some(()))
    });
    if let Err(error) = done {
        return Err(error.context(scene.host.call(&["plan"])?));
    }
    scene.goes_on()?;
    scene.is_in("two")?;
    let text = fs::read_to_string(&scene.log).context("no log")?;
    ensure!(!text.contains("WRONG"), "{}", text.lines().last().unwrap_or_default());
    scene.nothing_is_left()
}
