//! What goes wrong while a volume moves: a disk that fails, a program that writes too fast, a guard that is killed. There is one copy
//! afterwards, the program finds in it what it wrote, and the next try succeeds.

use std::{
    fs,
    os::unix::fs::FileExt,
    process::Child,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_tests::{
    loop_device::FileSystem,
    moves::program,
    reason_to_skip, rounds,
    served_disk::Speed,
    steps::Place,
    storage::{Disk, End, StorageScene},
    wait_for,
};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(30);
/// A step in the freeze at which threads are being stopped, and nothing was copied there yet.
const STEP_BEFORE_LAST_DELTA: usize = 2;
/// A step in the freeze at which the plan is not yet written, and one at which the instance is held by its cgroup.
const STEPS_IN_FREEZE: [usize; 2] = [40, 120];

/// In the middle of the copy, and when the instance stands still already.
#[test]
fn a_disk_that_fails_or_vanishes_leaves_the_volume_where_it_was() -> anyhow::Result<()> {
    if reason_to_skip("a_disk_that_fails_or_vanishes_leaves_the_volume_where_it_was").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set_on([Disk::of(256 * MIB), Disk::that_can_fail(256 * MIB)], 3000)?;
    scene.python("volume", &["0.005", "30000000"])?;
    scene.moves("one")?;
    for end in [End::Fails(0), End::Fails(20), End::Vanishes] {
        for in_freeze in [false, true] {
            let swap = if in_freeze {
                let swap = stopped_at(&scene, "two", STEP_BEFORE_LAST_DELTA)?;
                end.strike(&scene.disks[1])?;
                scene.host.signal_agent(Signal::SIGCONT)?;
                swap
            } else {
                let swap = scene.begin("two")?;
                scene.wait_for_copy("two")?;
                end.strike(&scene.disks[1])?;
                swap
            };
            let output = swap.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            println!("{end:?}, in the freeze: {in_freeze}: {}", said.lines().last().unwrap_or_default());
            ensure!(!output.status.success() && said.contains("cannot move the volume"), "{said}");
            scene.goes_on()?;
            // What is on the broken disk can't be removed.
            scene.is_in("one")?;
            scene.nothing_is_left()?;
            // As it is, and with another in its place.
            let again = scene.moved("two")?.expect_err("the disk is broken");
            println!("and then: {again}");
            ensure!(
                matches!(end, End::Fails(_)) || again.contains("no file system is mounted there"),
                "{again}"
            );
            scene.goes_on()?;
            scene.is_in("one")?;
            scene.disks[1].replace()?;
        }
    }
    scene.moves("two")?;
    scene.moves("one").map(drop)
}

/// The instance is held by its cgroup already, and nothing of it was re-homed, when the disk ends: it simply goes on, whether the agent lets it go
/// or, because it is killed then, the guard.
#[test]
fn a_disk_that_fails_while_the_last_delta_is_written_through_leaves_nobody_frozen() -> anyhow::Result<()> {
    if reason_to_skip("a_disk_that_fails_while_the_last_delta_is_written_through_leaves_nobody_frozen")
        .is_some()
    {
        return Ok(());
    }
    let mut scene = StorageScene::set_on([Disk::of(128 * MIB), Disk::that_can_fail(128 * MIB)], 3000)?;
    scene.python("volume", &["0.005", "1000000"])?;
    scene.moves("one")?;
    let fails =
        [(End::Fails(0), false), (End::Fails(0), true), (End::Vanishes, false), (End::Vanishes, true)];
    for (end, killed) in fails.into_iter().chain([(End::Hangs, false)]) {
        // The last delta is in the page cache, and the copy is about to be put to its place.
        let mut swap = scene.stopped_before("two", Place::RenameInto("/rswap/worker/.data-"))?;
        // What is written through waits for the disk, and so does the instance; but not for as long as it would be waited for.
        scene.disks[1].set_speed(Speed::of(Duration::from_millis(400)))?;
        scene.host.signal_agent(Signal::SIGCONT)?;
        wait_for("the instance to be held by its cgroup", LIMIT, || {
            ensure!(swap.try_wait()?.is_none(), "it has not waited for its disk");
            Ok(scene.is_frozen()?.then_some(()))
        })?;
        scene.host.signal_agent(Signal::SIGSTOP)?;
        scene.disks[1].set_speed(Speed::default())?;
        end.strike(&scene.disks[1])?;
        if killed {
            scene.host.kill_agent()?;
        } else {
            scene.host.signal_agent(Signal::SIGCONT)?;
        }
        let output = swap.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{end:?}, killed: {killed}: {}", said.lines().last().unwrap_or_default());
        ensure!(!output.status.success(), "{said}");
        ensure!(
            killed || said.contains("cannot move the volume") && !said.contains("stands still"),
            "{said}"
        );
        scene.goes_on()?;
        if killed {
            scene.host.start_agent()?;
            scene.goes_on()?;
        }
        scene.is_in("one")?;
        scene.nothing_is_left()?;
        if matches!(end, End::Hangs) {
            scene.is_refused_meanwhile("one", "two")?;
            // Whoever waits for it is told now.
            scene.disks[1].vanish()?;
        }
        scene.disks[1].replace()?;
        scene.moves("two")?;
        scene.moves("one")?;
    }
    Ok(())
}

/// The new directory has just become the volume: nothing can be opened there any more, and the old one, which is whole, becomes it again.
#[test]
fn a_disk_that_fails_before_anything_is_re_homed_to_it_gives_the_volume_back() -> anyhow::Result<()> {
    if reason_to_skip("a_disk_that_fails_before_anything_is_re_homed_to_it_gives_the_volume_back").is_some() {
        return Ok(());
    }
    let xfs = Disk { file_system: FileSystem::Xfs, ..Disk::that_can_fail(320 * MIB) };
    let disks = [Disk::of(320 * MIB), Disk::that_can_fail(320 * MIB), xfs];
    let mut scene = StorageScene::set_on(disks, 3000)?;
    scene.python("rehomed", &["0.005"])?;
    scene.moves("one")?;
    for (number, pool) in [(1, "two"), (2, "three")] {
        for end in [End::Fails(0), End::Vanishes] {
            let swap = scene.stopped_before(pool, Place::Exchange)?;
            let disk = &scene.disks[number];
            let written = fs::File::create(disk.mount_point().join("written"))?;
            end.strike(disk)?;
            // So that its file system notices: its journal can't be written.
            let noticed = written.set_len(4096).and_then(|()| written.sync_all());
            ensure!(noticed.is_err(), "the disk works");
            scene.host.signal_agent(Signal::SIGCONT)?;
            let output = swap.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            println!("{pool}, {end:?}: {}", said.lines().last().unwrap_or_default());
            ensure!(!output.status.success() && said.contains("cannot move the volume"), "{said}");
            ensure!(!said.contains("stands still"), "{said}");
            scene.goes_on()?;
            scene.is_in("one")?;
            scene.nothing_is_left()?;
            drop(written);
            scene.disks[number].replace()?;
            scene.moves(pool)?;
            scene.moves("one")?;
        }
    }
    Ok(())
}

/// What is on it is lost; nothing else is.
#[test]
fn a_disk_that_fails_with_the_volume_on_it_stops_nobody_else() -> anyhow::Result<()> {
    if reason_to_skip("a_disk_that_fails_with_the_volume_on_it_stops_nobody_else").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set_on([Disk::of(256 * MIB), Disk::that_can_fail(256 * MIB)], 3000)?;
    scene.python("volume", &["0.005", "30000000"])?;
    scene.moves("two")?;
    let swap = scene.begin("one")?;
    scene.wait_for_copy("one")?;
    End::Fails(0).strike(&scene.disks[1])?;
    let (told, tells) = std::sync::mpsc::channel();
    std::thread::spawn(move || told.send(swap.wait_with_output()));
    let output = tells.recv_timeout(LIMIT).context("the swap hangs")??;
    println!("{}", String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default());
    scene.disks[1].vanish()?;
    // Whether the program outlives that is its own affair; nobody waits for it.
    for pid in scene.host.pids("worker")? {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    wait_for("the instance to be gone", LIMIT, || Ok((!scene.host.has_instance("worker")?).then_some(())))?;
    // The agent and its other disk serve the next one.
    let log = scene.host.log()?;
    ensure!(!log.contains("panicked"), "{log}");
    scene.disks[1].replace()?;
    let next = ["log", "next"].map(|name| scene.fleet.scratch().join(name).to_string_lossy().into_owned());
    let program = program("volume.py").to_string_lossy().into_owned();
    let command = ["python3", &program, &next[0], &next[1], "0.005", "1000000"];
    scene.host.run("next", &["--volume", &format!("data:{}", next[1])], &command)?;
    scene.host.wait_for_instance("next")?;
    for pool in ["one", "two"] {
        scene.host.call(&["swap", "next", pool, "--volume", "data"])?;
        rounds::wait_for_more(next[0].as_ref(), 50, LIMIT)?;
    }
    Ok(())
}

#[test]
fn a_program_that_writes_too_fast_keeps_its_volume() -> anyhow::Result<()> {
    if reason_to_skip("a_program_that_writes_too_fast_keeps_its_volume").is_some() {
        return Ok(());
    }
    let scene = StorageScene::set_on([Disk::of(512 * MIB); 2], 100)?;
    scene.python("fast_writer", &[&(96 * MIB).to_string()])?;
    let reason = scene.moved("one")?.expect_err("it is too fast");
    ensure!(reason.contains("it changes too fast") && reason.contains("max_unavailability_ms"), "{reason}");
    scene.goes_on()?;
    scene.is_on(None)?;
    scene.nothing_is_left()?;
    fs::write(scene.log.with_extension("log.slow"), "")?;
    scene.goes_on()?;
    scene.moves("one").map(drop)
}

/// What others have written to the pool's file system, and nobody waits for, takes its disk longer than a swap may take in all.
#[test]
fn what_others_write_to_the_pool_is_not_waited_for() -> anyhow::Result<()> {
    if reason_to_skip("what_others_write_to_the_pool_is_not_waited_for").is_some() {
        return Ok(());
    }
    let slow = Speed { per_request: Duration::from_micros(200), bytes_per_s: Some(40_000_000) };
    let disks = [Disk::of(128 * MIB), Disk::that_can_fail(768 * MIB)];
    let scene = StorageScene::set_on(disks, 2000)?;
    scene.python("volume", &["0.005", "1000000"])?;
    scene.moves("one")?;
    let others = fs::File::create(scene.disks[1].mount_point().join("others"))?;
    let over = AtomicBool::new(false);
    let write_all = || -> anyhow::Result<()> {
        let chunk = vec![7; MIB as usize];
        (0..200).try_for_each(|at| Ok(others.write_all_at(&chunk, at * MIB)?))
    };
    write_all()?;
    scene.disks[1].set_speed(slow)?;
    let report = thread::scope(|scope| {
        let writes = scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                write_all()?;
                thread::sleep(Duration::from_millis(100));
            }
            anyhow::Ok(())
        });
        let moved = scene.moves("two");
        over.store(true, Ordering::Release);
        writes.join().map_err(|_| anyhow::anyhow!("who writes panicked"))?.and(moved)
    })?;
    ensure!(report.unavailability_ms < 2000.0, "{report:?}");
    scene.disks[1].set_speed(Speed::default())?;
    scene.moves("one").map(drop)
}

#[test]
fn a_guard_that_is_killed_costs_at_most_the_swap() -> anyhow::Result<()> {
    if reason_to_skip("a_guard_that_is_killed_costs_at_most_the_swap").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.python("rehomed", &["0.005"])?;
    scene.moves("one")?;
    // While it is copied: nothing is frozen without a guard.
    let swap = scene.begin("two")?;
    scene.wait_for_copy("two")?;
    kill_guard(&scene)?;
    let output = swap.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(!output.status.success() && said.contains("the guard of the freeze has ended"), "{said}");
    scene.goes_on()?;
    scene.is_on(Some("one"))?;
    scene.moves("two")?;
    let mut at = "two";
    for step in STEPS_IN_FREEZE {
        let to = if at == "one" { "two" } else { "one" };
        // In the freeze: the agent needs it for nothing.
        let swap = in_freeze(&scene, to, step)?;
        scene.host.signal_agent(Signal::SIGCONT)?;
        let output = swap.wait_with_output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        scene.goes_on()?;
        scene.is_on(Some(to))?;
        at = to;
        // And then the agent, too: the next one brings it to an end.
        let to = if at == "one" { "two" } else { "one" };
        let swap = in_freeze(&scene, to, step)?;
        scene.host.kill_agent()?;
        swap.wait_with_output()?;
        scene.host.start_agent()?;
        scene.goes_on()?;
        scene.nothing_is_left()?;
        let moved = fs::canonicalize(scene.place())?.starts_with(scene.fleet.scratch().join(to));
        at = if moved { to } else { at };
        println!("step {step}: it is on {at}");
        scene.is_on(Some(at))?;
    }
    for pool in if at == "one" { ["two", "one"] } else { ["one", "two"] } {
        scene.moves(pool)?;
    }
    scene.nothing_is_left()
}

/// A swap whose agent stands still at `step`, and whose guard is gone.
fn in_freeze(scene: &StorageScene, pool: &str, step: usize) -> anyhow::Result<Child> {
    let swap = stopped_at(scene, pool, step)?;
    kill_guard(scene)?;
    Ok(swap)
}

/// A swap whose agent stands still at `step`.
fn stopped_at(scene: &StorageScene, pool: &str, step: usize) -> anyhow::Result<Child> {
    scene.stopped_before(pool, Place::Step(step))
}

/// Kills the guard that the agent has started, when there is one.
fn kill_guard(scene: &StorageScene) -> anyhow::Result<()> {
    let agent = scene.host.agent_pid().context("no agent")?;
    let guard = wait_for("the guard", LIMIT, || {
        let mut children = String::new();
        for thread in fs::read_dir(format!("/proc/{agent}/task"))?.flatten() {
            children += &fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        }
        let is_guard = |pid: &&str| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.contains("__guard")
        };
        Ok(children.split_whitespace().find(is_guard).map(str::to_owned))
    })?;
    Ok(kill(Pid::from_raw(guard.parse()?), Signal::SIGKILL)?)
}
