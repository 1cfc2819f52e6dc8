//! The agent is killed at every kind of step of a memory swap: the program has all of its memory before the next agent comes and with it, nothing is left, and
//! the next try succeeds.

use std::{
    collections::BTreeSet,
    fs,
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{libc, sys::signal::Signal};
use rswap_agent::config::MemoryConfig;
use rswap_tests::{
    Fleet, Host,
    cold::{self, ColdScene, Plan},
    moves::program,
    reason_to_skip, skip,
    steps::{Follower, Place},
    swap_device::{self, SwapDevice},
    wait_for,
};

const LIMIT: Duration = Duration::from_secs(40);
const MIB: u64 = 1 << 20;
const DATA_BYTES: u64 = 40 * MIB;
/// include/uapi/asm-generic/mman-common.h
const MADV_COLLAPSE: i32 = 25;
/// When the registry is about to name the pool.
const REGISTERED: Place = Place::RenameTo("/redis.json");

/// Before the agent measures what a fault takes; before the first probe; among the probes; with the first pages, and with many; when all that is cold has gone.
const OUT: [Place; 6] = [
    Place::Advice(libc::MADV_PAGEOUT, 0),
    Place::Advice(libc::MADV_PAGEOUT, 1),
    Place::Advice(libc::MADV_PAGEOUT, 5),
    Place::Advice(libc::MADV_PAGEOUT, 20),
    Place::Advice(libc::MADV_PAGEOUT, 100),
    REGISTERED,
];
/// Before the first page, the second, with many; when all are back.
const BACK: [Place; 4] = [Place::Read(0), Place::Read(1), Place::Read(80), REGISTERED];

fn skipped(test: &str) -> bool {
    if reason_to_skip(test).is_some() {
        return true;
    }
    let reason = swap_device::reason_to_skip();
    reason.inspect(|reason| skip(test, reason)).is_some()
}

/// What becomes cold soon.
fn plan() -> Plan {
    let usual = Plan::default();
    let memory = MemoryConfig { cold_after_s: 1, ..usual.memory.clone() };
    Plan { data_bytes: DATA_BYTES, memory, ..usual }
}

/// Has the agent killed at `place` of a swap to `pool`.
fn killed(host: &mut Host, name: &str, pool: &str, place: Place) -> anyhow::Result<()> {
    let follower = Follower::start(host.agent_pid().context("no agent runs")?, place, Signal::SIGKILL)?;
    let mut call: Child = host
        .rswap(&["swap", name, pool])?
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start rswap")?;
    let ended = wait_for("the call to end", LIMIT, || Ok(call.try_wait()?));
    let struck = follower.has_struck()?;
    ensure!(struck, "it did not come to {place:?}: {ended:?}");
    ensure!(!ended?.success(), "the agent was killed, and answered");
    host.kill_agent()
}

/// Nobody holds the program, and there is nothing of a swap but what the registry says.
fn nothing_is_left(host: &Host, name: &str) -> anyhow::Result<()> {
    let cgroup = host.cgroup()?;
    let mut below = BTreeSet::new();
    for entry in fs::read_dir(&cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            below.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    ensure!(below == BTreeSet::from([name.to_owned()]), "cgroups: {below:?}");
    let events = fs::read_to_string(cgroup.join(name).join("cgroup.events"))?;
    ensure!(events.contains("frozen 0"), "{events}");
    for pid in host.pids(name)? {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        ensure!(status.contains("TracerPid:\t0"), "{status}");
        ensure!(!status.contains("State:\tT") && !status.contains("State:\tt"), "{status}");
    }
    Ok(())
}

#[test]
fn killed_agents_lose_nothing_at_any_step() -> anyhow::Result<()> {
    if skipped("killed_agents_lose_nothing_at_any_step") {
        return Ok(());
    }
    let mut scene = ColdScene::set(&plan())?;
    let memory = scene.memory_pool()?;
    let most = DATA_BYTES * 3 / 5;
    for (number, out) in OUT.into_iter().enumerate() {
        killed(&mut scene.host, "redis", "zram", out)?;
        let swapped = scene.swapped()?;
        println!("out: killed at {out:?} with {} MiB in swap", swapped / MIB);
        match out {
            Place::Advice(_, 0 | 1) => {
                ensure!(swapped < MIB, "{swapped} bytes had gone before any was asked")
            }
            REGISTERED => ensure!(swapped > most, "only {swapped} bytes had gone"),
            _ => {}
        }
        scene.check()?;
        nothing_is_left(&scene.host, "redis")?;
        scene.host.start_agent()?;
        scene.host.wait_for_instance("redis")?;
        ensure!(scene.shown()?.is_none(), "the registry names a pool that it has not come to");
        scene.swap("zram")?;
        ensure!(scene.swapped()? > most, "the next try moved {} bytes", scene.swapped()?);

        let back = BACK[number % BACK.len()];
        killed(&mut scene.host, "redis", &memory, back)?;
        let left = scene.swapped()?;
        println!("back: killed at {back:?} with {} MiB in swap", left / MIB);
        match back {
            REGISTERED => ensure!(left == 0, "{left} bytes were not back"),
            Place::Read(0 | 1) => ensure!(left > most, "only {left} bytes were left"),
            _ => {}
        }
        nothing_is_left(&scene.host, "redis")?;
        scene.host.start_agent()?;
        // Until it is said again that it is to come back, it is on the pool: the next agent goes on with that.
        let shown = scene.wait_for_word("the next agent to go on", |shown| shown.doing == "out")?;
        ensure!(shown.pool == "zram", "{shown:?}");
        scene.check()?;
        scene.swap(&memory)?;
        ensure!(scene.swapped()? == 0, "{} bytes are in swap", scene.swapped()?);
        nothing_is_left(&scene.host, "redis")?;
    }
    scene.check()
}

/// What of the program's memory is in huge pages, and what in swap, in bytes.
fn in_huge_pages(host: &Host) -> anyhow::Result<(u64, u64)> {
    cold::huge_and_swapped(*host.pids("huge")?.first().context("the program has found something wrong")?)
}

/// Among huge pages that are put together again; the program looks at all it reads, and ends where that is wrong.
#[test]
fn a_killed_agent_leaves_huge_pages_that_the_next_one_puts_together() -> anyhow::Result<()> {
    if skipped("a_killed_agent_leaves_huge_pages_that_the_next_one_puts_together") {
        return Ok(());
    }
    const BLOCK: u64 = 16 * MIB;
    let device = SwapDevice::make(256 * MIB)?;
    device.on(100)?;
    let mut fleet = Fleet::new()?;
    let mut host = fleet.host("a", &cold::options(&plan(), &device))?;
    let program = program("huge.py").to_string_lossy().into_owned();
    host.run("huge", &[], &["python3", &program, &(BLOCK / MIB).to_string()])?;
    host.wait_for_instance("huge")?;
    if wait_for("both blocks in huge pages", LIMIT, || {
        Ok((in_huge_pages(&host)?.0 >= 2 * BLOCK).then_some(()))
    })
    .is_err()
    {
        skip(
            "a_killed_agent_leaves_huge_pages_that_the_next_one_puts_together",
            "this machine has no transparent huge pages to give",
        );
        return Ok(());
    }
    killed(&mut host, "huge", "zram", Place::Advice(MADV_COLLAPSE, 3))?;
    let (huge, swapped) = in_huge_pages(&host)?;
    println!("killed with {} MiB in huge pages, {} MiB in swap", huge / MIB, swapped / MIB);
    ensure!(huge < 2 * BLOCK, "nothing was split");
    nothing_is_left(&host, "huge")?;
    host.start_agent()?;
    host.wait_for_instance("huge")?;
    host.call(&["swap", "huge", "zram"])?;
    let done = wait_for("the one to go, and the other to be whole again", LIMIT, || {
        let (huge, swapped) = in_huge_pages(&host)?;
        Ok((swapped >= BLOCK * 9 / 10 && huge >= BLOCK * 9 / 10).then_some(()))
    });
    println!("in huge pages, in swap: {:?}", in_huge_pages(&host)?);
    done
}
