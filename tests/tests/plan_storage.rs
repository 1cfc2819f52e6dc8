//! Plans move volumes between disks: to the fast one before a load that repeats needs it, and back where it is cheap; off a pool that
//! is drained; and not where it does not fit or fails, which is said and tried again.

use std::{
    fs,
    ops::Range,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rswap_agent::{
    plan::{Decision, MoveKind, Outcome, Plan, StayReason},
    pool::{Pool, PoolKind},
    status::InstanceView,
};
use rswap_tests::{
    Host, HostOptions,
    load::Pattern,
    moves::program,
    reason_to_skip,
    served_disk::Speed,
    storage::{Disk, StorageScene},
    wait_for,
};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(30);
/// The days of `programs/direct_writes.py`.
const PATTERN: Pattern = Pattern {
    day: Duration::from_secs(12),
    cores: &[(0.0, LOW), (0.45, LOW), (0.57, PEAK), (0.90, PEAK), (0.95, LOW)],
    peak_from: 0.57,
    peak_to: 0.90,
};
/// Writes per second, each of which the program waits for: few, then more than the slow disk can do.
const LOW: f64 = 4.0;
const PEAK: f64 = 200.0;
/// What a request takes on the slow disk: no more than 125 per second.
const SLOW_REQUEST: Duration = Duration::from_millis(8);
/// The days after which it has failed, if the volume has not moved.
const DAYS: u32 = 6;
/// Of so many days after the first move, it moves before the load on all but one: what few days have taught may not be enough for the
/// first of them, on a machine that does something else as well.
const DAYS_AFTER: u32 = 4;
const SLOW: &str = "operations_per_s = 60\nmbyte_per_s = 100\ncost_per_gib_hour = 1.0";
const FAST: &str = "operations_per_s = 5000\nmbyte_per_s = 500\ncost_per_gib_hour = 60.0";
const CHEAP: &str = "cost_per_gib_hour = 1.0";
const DEAR: &str = "cost_per_gib_hour = 60.0";
const PLANS: &str = "[pools]\nlook_every_ms = 250\n\n[forecast]\nhorizons_ms = [250, 500, 1000, 2000, 3000]\nmin_seen = 96\n\n\
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

/// Both pools are measured; what they give, in requests per second.
fn calibrate(host: &Host) -> anyhow::Result<[f64; 2]> {
    for pool in ["one", "two"] {
        host.call(&["calibrate", pool, "--yes"])?;
    }
    wait_for("the agent to use what was measured", LIMIT, || {
        let pools: Vec<Pool> = host.get("/v1/pools")?;
        let gives = |name: &str| {
            let pool = pools.iter().find(|pool| pool.name == name)?;
            pool.gives().map(|flow| flow.operations_per_s)
        };
        Ok(gives("one").zip(gives("two")).map(|(one, two)| [one, two]))
    })
}

/// The median of how long the program waited for its writes that began within `times`.
fn median_wait(scene: &StorageScene, times: Range<Duration>) -> anyhow::Result<Duration> {
    let text = fs::read_to_string(&scene.log)?;
    ensure!(!text.contains("WRONG"), "{}", text.lines().last().unwrap_or_default());
    let mut waits = Vec::new();
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        let (at, wait_us) = line.split_once(' ').with_context(|| format!("{line:?} in the log"))?;
        if times.contains(&Duration::from_secs_f64(at.parse()?)) {
            waits.push(Duration::from_micros(wait_us.parse()?));
        }
    }
    waits.sort();
    waits.get(waits.len() / 2).copied().context("nothing was written")
}

/// The two disks differ in nothing but how long a request takes, and nobody has told the agent.
#[test]
fn a_volume_is_on_the_fast_disk_when_the_load_comes_and_on_the_cheap_one_otherwise() -> anyhow::Result<()> {
    if reason_to_skip("a_volume_is_on_the_fast_disk_when_the_load_comes_and_on_the_cheap_one_otherwise")
        .is_some()
    {
        return Ok(());
    }
    let disks = [Disk::slow(256 * MIB, Speed::of(SLOW_REQUEST)), Disk::slow(256 * MIB, Speed::default())];
    let scene = StorageScene::set_with(disks, [CHEAP, DEAR], options(250, PLANS))?;
    let [slow, fast] = calibrate(&scene.host)?;
    println!("measured: {slow:.0} and {fast:.0} requests per second");
    ensure!(slow > LOW && slow <= 1.0 / SLOW_REQUEST.as_secs_f64() && fast > PEAK * 2.0, "{slow} and {fast}");
    let program = program("direct_writes.py").to_string_lossy().into_owned();
    let [log, path] = [&scene.log, &scene.path].map(|path| path.to_string_lossy().into_owned());
    let day_s = PATTERN.day.as_secs().to_string();
    scene.run(&["python3", &program, &log, &path, &day_s, &LOW.to_string(), &PEAK.to_string()])?;
    wait_for("the first write", LIMIT, || {
        Ok(fs::read_to_string(&scene.log).is_ok_and(|text| text.contains('\n')).then_some(()))
    })?;
    // Some milliseconds after the program's own clock.
    let started = Instant::now();
    scene.moved("one")?.map_err(anyhow::Error::msg)?;

    let on = |pool: &str| Ok((pool_of(&scene.host)?.as_deref() == Some(pool)).then_some(()));
    wait_for("the volume to be on the cheap disk", LIMIT, || on("one"))?;
    let on_slow = started.elapsed();
    wait_for("the volume to be on the fast disk", PATTERN.day * DAYS, || on("two"))?;
    // Perhaps late: few days were seen, and the slow disk lets nobody see more of a peak than it can do.
    let at = started.elapsed();
    println!("on the fast disk after {at:?}");
    let explained = scene.host.call(&["explain", "worker", "-n", "400"])?;
    // How long such a move takes while the disk is in use is known now, too.
    let mut peaks_met = Vec::new();
    for day in 0..DAYS_AFTER {
        wait_for("the volume to be on the cheap disk again", PATTERN.day * 2, || on("one"))?;
        println!("on the cheap disk again after {:?}", started.elapsed());
        wait_for("the volume to be on the fast disk once more", PATTERN.day * 2, || on("two"))?;
        let again = started.elapsed();
        let peak = PATTERN.peak_start(PATTERN.day_at(again));
        println!("on the fast disk after {again:?}, the peak is at {peak:?}");
        std::thread::sleep(peak.saturating_sub(started.elapsed()));
        if again < peak && on("two")?.is_some() {
            peaks_met.push(peak);
        }
        ensure!(peaks_met.len() as u32 >= day, "it came after the load, or was gone again then, on two days");
    }
    let again_peak = *peaks_met.last().context("no peak was met")?;
    let into_peak = again_peak + Duration::from_secs(1);
    std::thread::sleep(into_peak.saturating_sub(started.elapsed()));

    scene.nothing_is_left()?;
    let status: Value = scene.host.get("/v1/status")?;
    println!("swaps: {} done, {} failed", status["swaps_done"], status["swaps_failed"]);
    let why = explained.split("\n\n").filter(|text| text.contains("moves to two in")).last();
    let why = why.with_context(|| format!("no decision to move is kept:\n{explained}"))?;
    println!("{why}");
    ensure!(why.contains("worker (storage pool of its volume data) moves to two in"), "{why}");
    ensure!(why.contains("the present one can't meet the need") && why.contains("requests/s and"), "{why}");
    let again = scene.host.call(&["explain", "worker", "-n", "400"])?;
    let measured = again.lines().rfind(|line| line.contains("before it is needed"));
    ensure!(measured.is_some_and(|line| line.contains("such moves took up to")), "{measured:?}:\n{again}");
    let (slow_wait, fast_wait) =
        (median_wait(&scene, on_slow..at)?, median_wait(&scene, again_peak..into_peak)?);
    println!(
        "the program waited {slow_wait:?} for a write on the slow disk, {fast_wait:?} in the peak on the fast one"
    );
    ensure!(slow_wait >= SLOW_REQUEST && fast_wait < SLOW_REQUEST / 2, "{slow_wait:?} and {fast_wait:?}");
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
    scene.disks[1].fail_after(0)?;
    scene.host.call(&["drain", "one"])?;
    let waits = |decision: &Decision| {
        matches!(decision.outcome, Outcome::Stay { reason: StayReason::BackOff { .. } })
    };
    let failed = stays(&scene.host, "a plan that waits after a failure", &waits)?;
    let why = rswap_agent::plan::explain(&failed);
    ensure!(why.contains("failed move(s) (cannot move the volume data of worker to"), "{why}");
    ensure!(why.contains("Input/output error") || why.contains("Read-only file system"), "{why}");
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
