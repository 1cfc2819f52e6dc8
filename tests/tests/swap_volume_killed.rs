//! The agent is killed at every step of moving a volume: the program goes on with exactly one copy, before the next agent comes
//! and with it, nothing is left, and the next try succeeds.

use std::{sync::mpsc, time::Duration};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_tests::{
    hog::{self, Hog},
    reason_to_skip, skip,
    steps::{Follower, Place},
    storage::StorageScene,
    wait_for,
};

const MIB: u64 = 1 << 20;
/// Between two steps at which the agent is killed.
const STRIDE: usize = 23;
/// The same, where only one of two volumes moves.
const STRIDE_OF_TWO: usize = 23;
/// Calls that it has the two processes of the program make: mapping memory, making a task, and taking the memory away again.
const CALLS: usize = 6;
/// How long the program stands still after its guard has begun.
const LATE: Duration = Duration::from_millis(200);
const GUARD_LIMIT: Duration = Duration::from_secs(10);
/// Moments at which it is killed, in milliseconds: in a copy, in the freeze, behind it.
const MOMENTS_MS: [u64; 6] = [20, 150, 240, 270, 290, 320];

#[test]
fn descriptors_outlive_an_agent_that_is_killed() -> anyhow::Result<()> {
    killed("descriptors_outlive_an_agent_that_is_killed", "rehomed", &["0.005"], 0)
}

#[test]
fn sqlite_outlives_an_agent_that_is_killed() -> anyhow::Result<()> {
    killed("sqlite_outlives_an_agent_that_is_killed", "sqlite_wal", &["0.002"], 11)
}

fn killed(test: &str, program: &str, arguments: &[&str], first: usize) -> anyhow::Result<()> {
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let stride = std::env::var("RSWAP_STRIDE").map_or(Ok(STRIDE), |stride| stride.parse())?;
    let mut scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.python(program, arguments)?;
    let descriptors = scene.descriptors()?;
    let mut at = None;
    let mut kills = 0;
    for step in (first..).step_by(stride) {
        let target = if at == Some("one") { "two" } else { "one" };
        let agent = scene.host.agent_pid().context("no agent")?;
        let follower = Follower::start(agent, Place::Step(step), Signal::SIGKILL)?;
        let output = scene.swap(target)?.output()?;
        let struck = follower.has_struck()?;
        if !struck {
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            at = Some(target);
            break;
        }
        kills += 1;
        at = and_then(&mut scene, at, target).with_context(|| format!("killed at step {step}"))?;
        let left = scene.descriptors()?;
        ensure!(left == descriptors, "killed at step {step}: {left} descriptors instead of {descriptors}");
        println!("step {step}: it is on {at:?}");
    }
    ensure!(kills > 5, "only {kills} steps");
    for moment in MOMENTS_MS {
        let target = if at == Some("one") { "two" } else { "one" };
        let mut swap = scene.swap(target)?.stdout(std::process::Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_millis(moment));
        scene.host.kill_agent()?;
        swap.wait()?;
        at = and_then(&mut scene, at, target).with_context(|| format!("killed after {moment} ms"))?;
        println!("after {moment} ms: it is on {at:?}");
    }
    for pool in ["one", "two", "one"] {
        scene.moves(pool)?;
    }
    scene.nothing_is_left()
}

/// The agent is killed in a call that the program makes for it, and the program gets no processor for a while: whoever looks for what is left finds
/// nothing yet, and the call is made afterwards.
#[test]
fn what_a_program_does_late_for_an_agent_that_was_killed_is_taken_away() -> anyhow::Result<()> {
    let test = "what_a_program_does_late_for_an_agent_that_was_killed_is_taken_away";
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let cpus = std::thread::available_parallelism()?.get();
    if cpus < 2 {
        skip(test, "it needs two processors");
        return Ok(());
    }
    if !hog::may_run_before_all()? {
        skip(test, "it needs a share of real time (chrt --fifo)");
        return Ok(());
    }
    let mut scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.python("rehomed", &["0.005"])?;
    scene.moves("one")?;
    let descriptors = scene.descriptors()?;
    let program = scene.host.pids("worker")?;
    let program_runs_on =
        |cpus: &str| program.iter().try_for_each(|pid| hog::run_on(cpus, u32::try_from(*pid)?));
    for call in 0..CALLS {
        let agent = scene.host.agent_pid().context("no agent")?;
        // With the guard, which it starts later.
        hog::run_on("0", agent)?;
        program_runs_on("1")?;
        let said = || -> anyhow::Result<usize> { Ok(scene.host.log()?.matches("its guard does").count()) };
        let before = said()?;
        let (give, given) = mpsc::channel();
        let strike = move || {
            give.send(Hog::before_all(1)?)?;
            kill(Pid::from_raw(i32::try_from(agent)?), Signal::SIGKILL).context("cannot strike")
        };
        let follower = Follower::start_with(agent, Place::Entry(call), strike)?;
        let swap = scene.begin("two")?;
        let hog =
            given.recv_timeout(GUARD_LIMIT).with_context(|| format!("it does not come to call {call}"))?;
        let guarded = wait_for("the guard", GUARD_LIMIT, || Ok((said()? > before).then_some(())));
        std::thread::sleep(LATE);
        drop(hog);
        ensure!(follower.has_struck()? && guarded.is_ok(), "call {call}: {guarded:?}");
        swap.wait_with_output()?;
        program_runs_on(&format!("0-{}", cpus - 1))?;
        let at =
            and_then(&mut scene, Some("one"), "two").with_context(|| format!("killed in call {call}"))?;
        ensure!(at == Some("one"), "it is on {at:?}");
        let left = scene.descriptors()?;
        ensure!(left == descriptors, "killed in call {call}: {left} descriptors instead of {descriptors}");
    }
    for pool in ["two", "one"] {
        scene.moves(pool)?;
    }
    scene.nothing_is_left()
}

/// The other volume, which nobody moves, is none of that swap's affairs; and both have what was written to them.
#[test]
fn one_of_two_volumes_outlives_an_agent_that_is_killed_and_so_does_the_other() -> anyhow::Result<()> {
    if reason_to_skip("one_of_two_volumes_outlives_an_agent_that_is_killed_and_so_does_the_other").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.add_volume("more");
    scene.python("two_volumes", &["0.005"])?;
    scene.moves_of("data", "one")?;
    scene.moves_of("more", "two")?;
    scene.are_on(&[Some("one"), Some("two")])?;
    let descriptors = scene.descriptors()?;
    let mut at = ["one", "two"];
    let mut kills = 0;
    for (number, step) in (0..).step_by(STRIDE_OF_TWO).enumerate() {
        // Either of them, in turn.
        let moving = number % 2;
        let target = if at[moving] == "one" { "two" } else { "one" };
        let volume = ["data", "more"][moving];
        let agent = scene.host.agent_pid().context("no agent")?;
        let follower = Follower::start(agent, Place::Step(step), Signal::SIGKILL)?;
        let output = scene.swap_of(volume, target)?.output()?;
        if !follower.has_struck()? {
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            at[moving] = target;
            break;
        }
        kills += 1;
        let and_then = |scene: &mut StorageScene| -> anyhow::Result<bool> {
            scene.host.kill_agent()?;
            scene.goes_on()?;
            scene.host.start_agent()?;
            scene.goes_on()?;
            scene.nothing_is_left()?;
            let left = scene.descriptors()?;
            ensure!(left == descriptors, "{left} descriptors instead of {descriptors}");
            let real = std::fs::canonicalize(scene.place_of(volume))?;
            Ok(real.starts_with(scene.fleet.scratch().join(target)))
        };
        if and_then(&mut scene).with_context(|| format!("killed at step {step} of {volume}"))? {
            at[moving] = target;
        }
        println!("step {step} of {volume}: they are on {at:?}");
        scene.are_on(&at.map(Some)).with_context(|| format!("killed at step {step} of {volume}"))?;
    }
    ensure!(kills > 4, "only {kills} steps");
    for _ in 0..2 {
        for (moving, volume) in ["data", "more"].into_iter().enumerate() {
            at[moving] = if at[moving] == "one" { "two" } else { "one" };
            scene.moves_of(volume, at[moving])?;
            scene.are_on(&at.map(Some))?;
        }
    }
    scene.nothing_is_left()
}

/// It runs, without an agent and with the next one, with one of the two copies.
fn and_then<'a>(
    scene: &mut StorageScene,
    before: Option<&'a str>,
    target: &'a str,
) -> anyhow::Result<Option<&'a str>> {
    scene.host.kill_agent()?;
    scene.goes_on()?;
    scene.host.start_agent()?;
    scene.goes_on()?;
    scene.nothing_is_left()?;
    let real = std::fs::canonicalize(scene.place())?;
    let moved = real.starts_with(scene.fleet.scratch().join(target));
    let at = if moved { Some(target) } else { before };
    scene.is_on(at)?;
    Ok(at)
}
