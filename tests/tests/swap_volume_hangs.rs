//! A disk that answers nothing while a volume moves to it, and two failures at once: the instance goes on with the old copy, which is whole, and with
//! all that it had.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rswap_tests::{
    reason_to_skip, rounds,
    steps::{Follower, Place},
    storage::{Disk, End, StorageScene},
    wait_for,
};

const MIB: u64 = 1 << 20;
/// A step in the freeze at which threads are being stopped, and nothing was copied there yet.
const STEP_BEFORE_LAST_DELTA: usize = 2;
/// Longer than a disk is waited for, which is half of the longest freeze; and that, with what the guard needs to end an agent.
const HANGS_LIMIT: Duration = Duration::from_secs(12);
const GUARD_LIMIT: Duration = Duration::from_secs(17);
/// For a guard's five seconds, and what it does before and after them.
const STOOD_LIMIT: Duration = Duration::from_secs(9);
/// Between two looks at a thread that waits.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// What a guard says, and who brings a swap to its end.
const TAKEN: &str = "its guard does";
const BROUGHT: &str = "a storage swap that was broken off is brought to its end";
/// Steps on the way to a new directory: some descriptors are there, and all are.
const STEPS_THERE: [usize; 2] = [25, 80];
/// Between two steps of a way back at which the agent is killed: a call takes three.
const STRIDE_BACK: usize = 3;

/// Wherever it is in the freeze that the new disk does not answer: the instance goes on where it was, and nobody touches the disk for that. The agent
/// lives on, and a further move is refused until the disk answers.
#[test]
fn a_disk_that_hangs_in_the_freeze_is_not_waited_for_without_bound() -> anyhow::Result<()> {
    if reason_to_skip("a_disk_that_hangs_in_the_freeze_is_not_waited_for_without_bound").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set_on([Disk::of(128 * MIB), Disk::that_can_fail(128 * MIB)], 3000)?;
    scene.python("rehomed", &["0.005"])?;
    scene.moves("one")?;
    let descriptors = scene.descriptors()?;
    let place = Place::RenameInto("/rswap/worker/.data-");
    for place in [Place::Step(STEP_BEFORE_LAST_DELTA), place, Place::Exchange] {
        let is_made = place == Place::Exchange;
        let swap = scene.stopped_before("two", place)?;
        let agent = scene.host.agent_pid();
        if is_made {
            hang_with_work(&scene)?;
        } else {
            scene.disks[1].hold()?;
        }
        scene.host.signal_agent(Signal::SIGCONT)?;
        let began = Instant::now();
        let (told, tells) = std::sync::mpsc::channel();
        thread::spawn(move || told.send(swap.wait_with_output()));
        let output =
            tells.recv_timeout(HANGS_LIMIT).with_context(|| format!("{place:?}: the swap hangs"))??;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{place:?}: after {:?}: {}", began.elapsed(), said.lines().last().unwrap_or_default());
        ensure!(
            said.contains("it hangs, or others keep it busy") && !said.contains("stands still"),
            "{said}"
        );
        scene.goes_on()?;
        scene.is_in("one")?;
        scene.nothing_is_left()?;
        ensure!(scene.descriptors()? == descriptors, "descriptors are left");
        scene.is_refused_meanwhile("one", "two")?;
        // The guard counts nothing of what still waits for the disk.
        thread::sleep((began + GUARD_LIMIT).saturating_duration_since(Instant::now()));
        ensure!(scene.host.agent_pid() == agent && scene.host.get::<serde_json::Value>("/v1/status").is_ok());
        let log = scene.host.log()?;
        ensure!(!log.contains("is frozen for too long"), "{log}");
        if is_made {
            scene.disks[1].vanish()?;
            scene.disks[1].replace()?;
        } else {
            scene.disks[1].release()?;
            // What it was about to write it leaves, now that it can.
            scene.is_on(Some("one"))?;
        }
        scene.moves("two")?;
        scene.moves("one")?;
    }
    Ok(())
}

/// The guard lets the instance go, and the next agent serves it, while what was copied can't be removed.
#[test]
fn an_agent_that_is_killed_beside_a_disk_that_hangs_is_followed_by_the_next() -> anyhow::Result<()> {
    if reason_to_skip("an_agent_that_is_killed_beside_a_disk_that_hangs_is_followed_by_the_next").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.python("rehomed", &["0.005"])?;
    scene.moves("one")?;
    let swap = scene.stopped_before("two", Place::Exchange)?;
    scene.disks[1].hold()?;
    scene.host.kill_agent()?;
    swap.wait_with_output()?;
    scene.goes_on()?;
    scene.host.start_agent()?;
    scene.goes_on()?;
    scene.is_in("one")?;
    scene.is_refused_meanwhile("one", "two")?;
    scene.disks[1].release()?;
    scene.is_on(Some("one"))?;
    scene.nothing_is_left()?;
    for pool in ["two", "one"] {
        scene.moves(pool)?;
    }
    Ok(())
}

/// Two failures at once: the agent is killed while it brings descriptors to the new directory, and the disk of that is gone, or hangs. The old one, which is the same,
/// becomes the volume again.
#[test]
fn an_agent_and_the_disk_that_it_moves_to_may_both_fail() -> anyhow::Result<()> {
    if reason_to_skip("an_agent_and_the_disk_that_it_moves_to_may_both_fail").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set_on([Disk::of(128 * MIB), Disk::that_can_fail(128 * MIB)], 3000)?;
    scene.python("locked", &[])?;
    fs::write(scene.log.with_extension("log.free"), "")?;
    scene.moves("one")?;
    let descriptors = scene.descriptors()?;
    for end in [End::Vanishes, End::Fails(0), End::Hangs] {
        for step in STEPS_THERE {
            let swap = scene.stopped_before("two", Place::WayThere(step))?;
            end.strike(&scene.disks[1])?;
            scene.host.kill_agent()?;
            swap.wait_with_output()?;
            scene.goes_on().with_context(|| format!("{end:?} at step {step}"))?;
            scene.host.start_agent()?;
            scene.goes_on()?;
            scene.is_in("one")?;
            scene.nothing_is_left()?;
            ensure!(scene.descriptors()? == descriptors, "{end:?} at step {step}: descriptors are left");
            if matches!(end, End::Hangs) {
                scene.disks[1].vanish()?;
            }
            scene.disks[1].replace()?;
            scene.moves("two")?;
            scene.moves("one")?;
        }
    }
    Ok(())
}

/// The guard of an agent that was killed waits for the disk when the next agent is started: that waits for the guard, and does nothing of the guard's
/// work.
#[test]
fn the_next_agent_leaves_to_a_guard_what_the_guard_is_at() -> anyhow::Result<()> {
    if reason_to_skip("the_next_agent_leaves_to_a_guard_what_the_guard_is_at").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set_on([Disk::of(128 * MIB), Disk::that_can_fail(128 * MIB)], 3000)?;
    scene.python("locked", &[])?;
    fs::write(scene.log.with_extension("log.free"), "")?;
    scene.moves("one")?;
    let descriptors = scene.descriptors()?;
    for step in STEPS_THERE {
        let swap = scene.stopped_before("two", Place::WayThere(step))?;
        let (guards, ends) = (times(&scene, TAKEN)?, times(&scene, BROUGHT)?);
        End::Hangs.strike(&scene.disks[1])?;
        let began = Instant::now();
        scene.host.kill_agent()?;
        swap.wait_with_output()?;
        wait_for("the guard", GUARD_LIMIT, || Ok((times(&scene, TAKEN)? > guards).then_some(())))?;
        let log = scene.log.clone();
        let goes_on =
            thread::spawn(move || rounds::wait_for_more(&log, 50, GUARD_LIMIT).map(|()| began.elapsed()));
        scene.host.start_agent()?;
        let stood = goes_on.join().map_err(|_| anyhow::anyhow!("who waits panicked"))??;
        println!(
            "step {step}: it went on after {stood:?}, and the agent was there after {:?}",
            began.elapsed()
        );
        // The guard gives the disk five seconds.
        ensure!(stood < STOOD_LIMIT, "it stood still for {stood:?}");
        scene.goes_on()?;
        scene.is_in("one")?;
        scene.nothing_is_left()?;
        ensure!(scene.descriptors()? == descriptors, "step {step}: descriptors are left");
        let (guards, ends) = (times(&scene, TAKEN)? - guards, times(&scene, BROUGHT)? - ends);
        ensure!((guards, ends) == (1, 1), "{guards} guards, and it was brought to its end {ends} times");
        scene.disks[1].vanish()?;
        scene.disks[1].replace()?;
        scene.moves("two")?;
        scene.moves("one")?;
    }
    Ok(())
}

/// The agent itself does not end, as a thread of it waits for the disk: the guard waits for that, and the next agent can't be started. When the disk
/// ends, all goes on by itself.
#[test]
fn an_agent_that_can_not_end_before_its_disk_does_is_waited_for() -> anyhow::Result<()> {
    if reason_to_skip("an_agent_that_can_not_end_before_its_disk_does_is_waited_for").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set_on([Disk::of(128 * MIB), Disk::that_can_fail(128 * MIB)], 3000)?;
    scene.python("rehomed", &["0.005"])?;
    scene.moves("one")?;
    let descriptors = scene.descriptors()?;
    let swap = scene.stopped_before("two", Place::Exchange)?;
    hang_with_work(&scene)?;
    scene.host.signal_agent(Signal::SIGCONT)?;
    let agent = scene.host.agent_pid().context("no agent")?;
    wait_for("a thread that waits for the disk", HANGS_LIMIT, || {
        Ok((scene.is_frozen()? && waits_for_a_disk(agent)?).then_some(()))
    })?;
    let mut killed = scene.host.strike_agent()?;
    // Longer than the guard waits before it says so.
    let waits = "does not end, a disk does not answer it";
    wait_for("the guard to say so", 2 * GUARD_LIMIT, || Ok((times(&scene, waits)? > 0).then_some(())))?;
    ensure!(killed.try_wait()?.is_none() && scene.is_frozen()?, "nobody waits for the disk");
    let made = rounds::read(&scene.log)?.made;
    // The one that is killed has its sockets, to the end.
    let refused = scene.host.rswap(&["agent"])?.output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("Address already in use"), "{said}");
    ensure!(rounds::read(&scene.log)?.made == made && scene.is_frozen()?, "somebody has let it go on");
    let ended = Instant::now();
    scene.disks[1].vanish()?;
    killed.wait()?;
    swap.wait_with_output()?;
    let log = scene.log.clone();
    let goes_on =
        thread::spawn(move || rounds::wait_for_more(&log, 50, GUARD_LIMIT).map(|()| ended.elapsed()));
    scene.host.start_agent()?;
    let stood = goes_on.join().map_err(|_| anyhow::anyhow!("who waits panicked"))??;
    println!("it went on {stood:?} after its disk had ended");
    ensure!(stood < STOOD_LIMIT, "it stood still for {stood:?}");
    scene.goes_on()?;
    scene.is_in("one")?;
    scene.nothing_is_left()?;
    ensure!(scene.descriptors()? == descriptors, "descriptors are left");
    ensure!(times(&scene, BROUGHT)? == 1, "it was brought to its end {} times", times(&scene, BROUGHT)?);
    scene.disks[1].replace()?;
    scene.moves("two")?;
    scene.moves("one").map(drop)
}

/// The disk of pool `two` hangs, and has something to write.
fn hang_with_work(scene: &StorageScene) -> anyhow::Result<()> {
    let copies = fs::read_dir(scene.disks[1].mount_point().join("rswap/worker"))?;
    let copy = copies.flatten().next().context("there is no copy")?;
    let permissions = copy.metadata()?.permissions();
    End::Hangs.strike(&scene.disks[1])?;
    // What the agent asks of it afterwards it has to write, and to give files up that have no name.
    Ok(fs::set_permissions(copy.path(), permissions)?)
}

/// Whether a thread of the process is in a wait that no signal ends, at two looks: a disk that answers has one there for a moment only.
fn waits_for_a_disk(pid: u32) -> anyhow::Result<bool> {
    let waiting = || -> anyhow::Result<Vec<PathBuf>> {
        let threads = fs::read_dir(format!("/proc/{pid}/task"))?.flatten().map(|thread| thread.path());
        let waits = |thread: &PathBuf| {
            let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" D"))
        };
        Ok(threads.filter(waits).collect())
    };
    let before = waiting()?;
    if before.is_empty() {
        return Ok(false);
    }
    thread::sleep(LOOK_AGAIN);
    Ok(waiting()?.iter().any(|thread| before.contains(thread)))
}

/// How often this is in the log of the agents and guards.
fn times(scene: &StorageScene, words: &str) -> anyhow::Result<usize> {
    Ok(scene.host.log()?.matches(words).count())
}

/// Descriptors are on the new copy already when it fails; the agent is killed at each step of the way back. Whatever was set for them and what must be
/// set behind the last of them, is there when the instance goes on.
#[test]
fn a_way_back_that_is_broken_off_loses_no_lock() -> anyhow::Result<()> {
    if reason_to_skip("a_way_back_that_is_broken_off_loses_no_lock").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.python("locked", &[])?;
    let descriptors = scene.descriptors()?;
    let mut kills = 0;
    for step in (0..).step_by(STRIDE_BACK) {
        let agent = scene.host.agent_pid().context("no agent")?;
        let follower = Follower::start(agent, Place::WayBack(step), Signal::SIGKILL)?;
        let output = scene.swap("one")?.output()?;
        ensure!(!output.status.success(), "there is room for the mapping");
        if !follower.has_struck()? {
            break;
        }
        kills += 1;
        let and_then = |scene: &mut StorageScene| -> anyhow::Result<()> {
            scene.host.kill_agent()?;
            scene.goes_on()?;
            scene.host.start_agent()?;
            scene.goes_on()?;
            scene.nothing_is_left()?;
            let left = scene.descriptors()?;
            ensure!(left == descriptors, "{left} descriptors instead of {descriptors}");
            scene.is_on(None)
        };
        and_then(&mut scene).with_context(|| format!("killed at step {step} of the way back"))?;
    }
    println!("{kills} steps of the way back");
    ensure!(kills > 5, "only {kills} steps");
    fs::write(scene.log.with_extension("log.free"), "")?;
    scene.goes_on()?;
    // One of the locks is on a file that is mapped, too.
    for pool in ["one", "two"] {
        scene.moves(pool)?;
    }
    scene.nothing_is_left()
}
