//! A swap fails, and so does the way back: the instance stands still with both copies, which is said, and the next try brings it to an end.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rswap_agent::status::InstanceView;
use rswap_tests::{browser, reason_to_skip, rounds, steps::Place, storage::StorageScene, wait_for};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(10);
/// Rounds take five milliseconds.
const MANY_ROUNDS: Duration = Duration::from_millis(500);

/// Who tries next.
#[derive(Clone, Copy, Debug)]
enum Next {
    Swap,
    Agent,
}

/// The way there fails at a mapping that the program has no room for; and on the way back no descriptor can be given to it.
#[test]
fn a_way_back_that_fails_is_said_and_the_next_try_makes_it_good() -> anyhow::Result<()> {
    if reason_to_skip("a_way_back_that_fails_is_said_and_the_next_try_makes_it_good").is_some() {
        return Ok(());
    }
    let mut scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.add_volume("more");
    scene.python("locked", &[])?;
    let descriptors = scene.descriptors()?;
    let chromium = browser::ready("a_way_back_that_fails_is_said_and_the_next_try_makes_it_good");
    for (number, next) in [Next::Swap, Next::Agent, Next::Swap].into_iter().enumerate() {
        stands(&scene)?;
        if let Some(chromium) = chromium.as_ref().filter(|_| number == 0) {
            let node = scene.host.command(Path::new("node"));
            let arguments = ["http://127.0.0.1:7790/", chromium.as_str(), "worker", "data"];
            browser::look(node, "standing.mjs", &arguments, |_| Ok(()))?;
        }
        match next {
            // The try itself fails as the first one did, and its way back does not.
            Next::Swap => {
                let reason = scene.moved("one")?.expect_err("there is no room for the mapping");
                ensure!(reason.contains("mmap") && !reason.contains("way back failed"), "{reason}");
            }
            Next::Agent => {
                scene.host.kill_agent()?;
                // There is no guard that would do it.
                thread::sleep(MANY_ROUNDS);
                ensure!(scene.is_frozen()?, "who has let it go on?");
                scene.host.start_agent()?;
            }
        }
        scene.goes_on().with_context(|| format!("{next:?}"))?;
        scene.are_on(&[None, None])?;
        scene.nothing_is_left()?;
        ensure!(scene.descriptors()? == descriptors, "{next:?}: descriptors are left");
        wait_for("the agent to see it", LIMIT, || Ok((view(&scene)?.stands_for.is_none()).then_some(())))?;
    }
    fs::write(scene.log.with_extension("log.free"), "")?;
    scene.goes_on()?;
    for pool in ["one", "two"] {
        scene.moves_of("data", pool)?;
        scene.are_on(&[Some(pool), None])?;
    }
    scene.nothing_is_left()
}

/// A swap whose way back fails.
fn stands(scene: &StorageScene) -> anyhow::Result<()> {
    let swap = scene.stopped_before("one", Place::WayBack(0))?;
    // The tasks that make calls beside its processes: it is them that have too few numbers for descriptors.
    let tasks = fs::read_to_string(scene.host.cgroup()?.join(".hands/cgroup.procs"))?;
    ensure!(tasks.lines().count() > 0, "no task makes calls for the program");
    for task in tasks.lines() {
        let limited = Command::new("prlimit").args(["--nofile=0:", "--pid", task]).status()?;
        ensure!(limited.success(), "prlimit: {limited}");
    }
    scene.host.signal_agent(Signal::SIGCONT)?;
    let output = swap.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{}", said.lines().last().unwrap_or_default());
    ensure!(!output.status.success(), "{said}");
    for words in ["mmap", "the way back failed, too", "stands still", "was given no descriptor"] {
        ensure!(said.contains(words), "{words:?} is missing: {said}");
    }
    // It stands still, and both copies are there, with what is needed to bring it to an end.
    let made = rounds::read(&scene.log)?.made;
    thread::sleep(MANY_ROUNDS);
    ensure!(scene.is_frozen()? && rounds::read(&scene.log)?.made == made, "it runs");
    let place = scene.place();
    ensure!(fs::canonicalize(&place)? == place, "the exchange was not taken back");
    let copies = fs::read_dir(scene.disks[0].mount_point().join("rswap/worker"))?;
    let copy = copies.flatten().next().context("the new copy was removed")?.path();
    for directory in [&place, &copy] {
        ensure!(fs::read_dir(directory)?.count() > 3, "{} is not whole", directory.display());
    }
    let record = scene.fleet.scratch().join("a/volume-swaps/worker.data.json");
    ensure!(record.exists() && record.with_extension("plan").exists(), "nobody knows any more what is where");
    // Whoever looks is told so.
    wait_for("the agent to see it", LIMIT, || {
        Ok(view(scene)?.stands_for.is_some_and(|volume| volume.as_str() == "data").then_some(()))
    })?;
    let listed = scene.host.call(&["ps"])?;
    ensure!(listed.contains("worker STANDS STILL: a swap of its volume data failed"), "{listed}");
    let moves: serde_json::Value = scene.host.get("/v1/moves")?;
    let last = moves.as_array().and_then(|moves| moves.last()).context("no move")?;
    let is_said = last["error"].as_str().is_some_and(|error| error.contains("the way back failed, too"));
    ensure!(last["state"] == "failed" && is_said, "{last}");
    ensure!(scene.host.log()?.contains("not moved, and it stands still"), "the log does not say it");
    // Nobody is told to let it go on by hand.
    let refused = scene.moved_of("more", "two")?.expect_err("it stands still");
    ensure!(
        refused.contains("stands still until a swap of its volume data is brought to its end"),
        "{refused}"
    );
    ensure!(scene.is_frozen()?, "the other volume's swap has let it go on");
    Ok(())
}

/// What the agent shows of it.
fn view(scene: &StorageScene) -> anyhow::Result<InstanceView> {
    let views: Vec<InstanceView> = scene.host.get("/v1/instances")?;
    views.into_iter().find(|view| view.instance.name.as_str() == "worker").context("it is not listed")
}
