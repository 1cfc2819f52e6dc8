//! The agent is killed at every step of moving a volume: the program goes on with exactly one copy, before the next agent comes
//! and with it, nothing is left, and the next try succeeds.

use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rswap_tests::{
    reason_to_skip,
    steps::{Follower, Place},
    storage::StorageScene,
};

const MIB: u64 = 1 << 20;
/// Between two steps at which the agent is killed.
const STRIDE: usize = 23;
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
