//! The agent is killed while it makes calls in a running program, at every step of it: the program goes on as if nothing had
//! happened, the next agent finds nothing in the way, and a migration succeeds in the end.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rswap_tests::{
    binary,
    moves::program,
    reason_to_skip,
    scene::{Scene, further, lines},
    seeded,
    steps::{Follower, Place},
};

/// The steps of a call, and of what is done before the first and after the last.
const PLACES: [Place; 9] = [
    Place::FrameWritten,
    Place::BeforeMask,
    Place::Entry(0),
    Place::Exit(0),
    // The userfaultfd is there.
    Place::Entry(1),
    Place::BeforeMaskBack,
    Place::BeforeRegistersBack,
    // In the freeze: with a scratch mapping, and behind it.
    Place::Entry(3),
    Place::Exit(8),
];
/// Further kills, at random steps and at random moments, each; `RSWAP_KILLS` says how many otherwise.
const RANDOM: u64 = 1;
/// A migration of these programs has about as many ptrace requests, and takes about as long.
const STEPS: u64 = 250;
const MIGRATION_MS: u64 = 200;
#[test]
fn memory_outlives_its_surgeon() -> anyhow::Result<()> {
    let memcheck = binary("memcheck")?;
    outlives("memory_outlives_its_surgeon", |log| {
        Ok([&memcheck.to_string_lossy(), log, "3", "4", "8"].map(str::to_owned).to_vec())
    })
}

#[test]
fn a_shell_outlives_its_surgeon() -> anyhow::Result<()> {
    outlives("a_shell_outlives_its_surgeon", |log| {
        let script = format!("i=0; while :; do i=$((i+1)); echo line=$i >> {log}; sleep 0.02; done");
        Ok(["sh", "-c", &script].map(str::to_owned).to_vec())
    })
}

#[test]
fn vector_registers_outlive_their_surgeon() -> anyhow::Result<()> {
    compiled("vector_registers_outlive_their_surgeon", "vectors", &["-mavx2"])
}

#[test]
fn restartable_sequences_outlive_their_surgeon() -> anyhow::Result<()> {
    compiled("restartable_sequences_outlive_their_surgeon", "sequences", &[])
}

#[test]
fn python_outlives_its_surgeon() -> anyhow::Result<()> {
    outlives("python_outlives_its_surgeon", |log| {
        let program = program("verify.py");
        Ok(["python3", &program.to_string_lossy(), log].map(str::to_owned).to_vec())
    })
}

fn compiled(test: &str, name: &str, options: &[&str]) -> anyhow::Result<()> {
    outlives(test, |log| {
        let to = Path::new(log).with_extension("bin");
        let made = Command::new("gcc")
            .args(["-O2", "-pthread"])
            .args(options)
            .arg("-o")
            .arg(&to)
            .arg(program(&format!("{name}.c")))
            .status()
            .context("cannot start gcc")?;
        ensure!(made.success(), "gcc: {made}");
        Ok(vec![to.to_string_lossy().into_owned(), log.to_owned()])
    })
}

/// Tries to move a program, kills the agent meanwhile, at all places, and looks how the program does.
fn outlives(test: &str, command: impl FnOnce(&str) -> anyhow::Result<Vec<String>>) -> anyhow::Result<()> {
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let began = Instant::now();
    let mut scene = Scene::set()?;
    let log = scene.log.clone();
    let command = command(&log.to_string_lossy())?;
    scene.run("patient", &[], &command.iter().map(String::as_str).collect::<Vec<_>>())?;
    goes_on(&log)?;
    let kills = std::env::var("RSWAP_KILLS").map_or(Ok(RANDOM), |kills| kills.parse())?;
    let mut random = seeded()?;
    for place in PLACES {
        kill_at(&mut scene, place).with_context(|| format!("at {place:?}"))?;
    }
    for _ in 0..kills {
        let place = Place::Step(random.u64(..STEPS) as usize);
        kill_at(&mut scene, place).with_context(|| format!("at {place:?}"))?;
        let moment = Duration::from_millis(random.u64(..MIGRATION_MS));
        kill_after(&mut scene, moment).with_context(|| format!("after {moment:?}"))?;
    }
    nothing_is_left(&scene)?;
    scene.moved("patient", &scene.a, &scene.b)?;
    goes_on(&log)?;
    println!("{test}: {:?}", began.elapsed());
    Ok(())
}

fn goes_on(log: &Path) -> anyhow::Result<()> {
    further(log, "line", 4)
}

fn kill_at(scene: &mut Scene, place: Place) -> anyhow::Result<()> {
    let agent = scene.a.agent_pid().context("no agent")?;
    let follower = Follower::start(agent, place, Signal::SIGKILL)?;
    let ended = scene.a.migrate("patient", &scene.b.migrate_address())?.end()?;
    let struck = follower.has_struck()?;
    println!("{place:?}: {}", if struck { "killed" } else { "not reached" });
    ensure!(struck || matches!(place, Place::Step(_)), "the agent did not come to it: {ended:?}");
    ensure!(!(struck && ended.is_ok()), "it was moved by an agent that was killed");
    and_then(scene, struck)
}

fn kill_after(scene: &mut Scene, moment: Duration) -> anyhow::Result<()> {
    let migration = scene.a.migrate("patient", &scene.b.migrate_address())?;
    std::thread::sleep(moment);
    scene.a.kill_agent()?;
    let moved = migration.end()?.is_ok();
    println!("killed after {moment:?}, {}", if moved { "too late" } else { "in the migration" });
    and_then(scene, true)
}

/// It runs, without an agent and with the next one.
fn and_then(scene: &mut Scene, killed: bool) -> anyhow::Result<()> {
    if killed {
        scene.a.kill_agent()?;
        // Committed, it may have to stand still until its agent can ask.
        let before = lines(&scene.log, "line")?;
        rswap_tests::wait_for("the program to go on", Duration::from_secs(10), || {
            Ok((lines(&scene.log, "line")? > before + 3).then_some(()))
        })?;
        scene.a.start_agent()?;
    }
    goes_on(&scene.log)?;
    let there = rswap_tests::wait_for("one copy at one host", Duration::from_secs(20), || {
        let lists = [scene.a.has_instance("patient")?, scene.b.has_instance("patient")?];
        let runs = [scene.a.has_processes()?, scene.b.has_processes()?];
        Ok((lists == runs && lists[0] != lists[1]).then_some(lists[1]))
    })?;
    if there {
        scene.moved("patient", &scene.b, &scene.a)?;
        goes_on(&scene.log)?;
    }
    Ok(())
}

/// Neither descriptors nor mappings of an agent's are in the program.
fn nothing_is_left(scene: &Scene) -> anyhow::Result<()> {
    for pid in scene.a.pids("patient")? {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let low =
            |line: &&str| line.split('-').next().is_some_and(|start| start.trim_start_matches('0').len() < 6);
        ensure!(!maps.lines().any(|line| low(&line)), "a scratch mapping is left:\n{maps}");
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let to = fs::read_link(entry.path()).unwrap_or_default();
            ensure!(!to.to_string_lossy().contains("userfaultfd"), "a userfaultfd is left");
        }
    }
    Ok(())
}
