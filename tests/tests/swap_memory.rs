//! Cold pages of a Redis go to swap and come back while it answers; whatever goes wrong, its data is right and the next try succeeds.

use std::{
    collections::BTreeSet,
    fs,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rswap_agent::{config::MemoryConfig, status::InstanceView};
use rswap_tests::{
    Fleet,
    cold::{self, ColdScene, Plan},
    hot::HotReader,
    moves::program,
    reason_to_skip, skip,
    swap_device::{self, SwapDevice},
    wait_for,
};

const LIMIT: Duration = Duration::from_secs(40);
const MIB: u64 = 1 << 20;
/// The tenth that is read all the time is read in whole within less than a second.
const HOT_SHARE: f64 = 0.1;
const PAUSE: Duration = Duration::from_millis(1);

fn skipped(test: &str) -> bool {
    if reason_to_skip(test).is_some() {
        return true;
    }
    let reason = swap_device::reason_to_skip();
    reason.inspect(|reason| skip(test, reason)).is_some()
}

#[test]
fn what_is_cold_goes_what_is_hot_stays_and_all_comes_back() -> anyhow::Result<()> {
    if skipped("what_is_cold_goes_what_is_hot_stays_and_all_comes_back") {
        return Ok(());
    }
    let scene = ColdScene::set(&Plan { data_bytes: 200 * MIB, ..Plan::default() })?;
    let hot = HotReader::start(&scene.fleet.client, scene.set, HOT_SHARE, PAUSE)?;
    wait_for("the hot keys to be read", LIMIT, || Ok((hot.rounds() >= 2).then_some(())))?;
    let before = scene.resident()?;
    let report = scene.swap("zram")?;
    let swapped = scene.swapped()?;
    println!("{} MiB of {} MiB went", swapped / MIB, before / MIB);
    ensure!(swapped > before * 7 / 10, "only {swapped} of {before} bytes are in swap");
    ensure!(scene.resident()? < before * 3 / 10, "{} bytes stayed", scene.resident()?);
    ensure!(
        report.swapped_bytes.abs_diff(swapped) < 2 * MIB,
        "the report says something else than the kernel: {report:?}"
    );
    // Those that are used are not written out to be fetched again, now or by the looks that follow.
    let (rounds, faults) = (hot.rounds(), scene.faults()?);
    wait_for("the hot keys to be read", LIMIT, || Ok((hot.rounds() >= rounds + 5).then_some(())))?;
    let faults = scene.faults()? - faults;
    println!("{faults} faults while the hot keys were read five times");
    let hot_pages = (before as f64 * HOT_SHARE) as u64 / 4096;
    ensure!(faults < hot_pages / 2, "{faults} faults with {hot_pages} hot pages");
    let shown = scene.wait_for_word("the agent to look on", |shown| shown.doing == "out")?;
    ensure!(shown.pool == "zram" && shown.swapped_bytes > before / 2, "{shown:?}");
    let listed = scene.host.call(&["ps"])?;
    ensure!(listed.contains("memory of redis on zram: "), "{listed}");

    let back = scene.swap(&scene.memory_pool()?)?;
    ensure!(scene.swapped()? == 0 && back.moved_bytes > before / 2, "{back:?}, {} in swap", scene.swapped()?);
    ensure!(scene.resident()? > before * 9 / 10, "{} of {before} bytes are back", scene.resident()?);
    // Nobody pages anything out any more.
    wait_for("the agent to let go", LIMIT, || Ok(scene.shown()?.is_none().then_some(())))?;
    thread::sleep(Duration::from_secs(3));
    ensure!(scene.swapped()? == 0, "{} bytes went again", scene.swapped()?);
    hot.finish()?;
    scene.check()
}

/// A swap that is under way.
fn begin(scene: &ColdScene, pool: &str) -> anyhow::Result<Child> {
    let mut call = scene.host.rswap(&["swap", "redis", pool])?;
    call.stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start rswap")
}

#[test]
fn an_agent_that_is_stopped_within_a_swap_brings_all_back() -> anyhow::Result<()> {
    if skipped("an_agent_that_is_stopped_within_a_swap_brings_all_back") {
        return Ok(());
    }
    let usual = Plan::default();
    let memory = MemoryConfig { cold_after_s: 40, ..usual.memory.clone() };
    let mut scene = ColdScene::set(&Plan { memory, ..usual })?;
    let call = begin(&scene, "zram")?;
    wait_for("the probes", LIMIT, || Ok((scene.swapped()? >= MIB).then_some(())))?;
    scene.host.signal_agent(Signal::SIGTERM)?;
    scene.host.wait_for_agent(Duration::from_secs(10))?;
    let said = call.wait_with_output()?;
    ensure!(!said.status.success(), "it was moved");
    ensure!(scene.swapped()? == 0, "{} bytes are in swap", scene.swapped()?);
    scene.check()
}

#[test]
fn a_pool_that_is_taken_away_gives_all_back() -> anyhow::Result<()> {
    if skipped("a_pool_that_is_taken_away_gives_all_back") {
        return Ok(());
    }
    let scene = ColdScene::set(&Plan::default())?;
    let call = begin(&scene, "zram")?;
    wait_for("pages to go", LIMIT, || Ok((scene.swapped()? >= 10 * MIB).then_some(())))?;
    scene.device.off()?;
    let ended = call.wait_with_output()?;
    let said = String::from_utf8_lossy(&ended.stderr);
    println!("{said}");
    ensure!(!ended.status.success() && said.contains("is not in /proc/swaps"), "{said}");
    ensure!(scene.swapped()? == 0, "{} bytes are in swap that is not there", scene.swapped()?);
    scene.check()?;
    // Or what was seen before would be taken for what is there again.
    wait_for("the pool to be gone", LIMIT, || Ok(pool_is(&scene, "gone")?.then_some(())))?;
    scene.device.on(100)?;
    wait_for("the pool", LIMIT, || Ok(pool_is(&scene, "online")?.then_some(())))?;
    scene.swap("zram")?;
    ensure!(scene.swapped()? > 60 * MIB, "the next try moved {} bytes", scene.swapped()?);
    // While it sits there.
    scene.device.off()?;
    let shown = scene.wait_for_word("the agent to notice", |shown| shown.doing == "hold")?;
    let reason = shown.reason.as_deref().unwrap_or_default();
    ensure!(reason.contains("is not in /proc/swaps") && scene.swapped()? == 0, "{shown:?}");
    scene.check()?;
    ensure!(pool_is(&scene, "gone")?, "{}", scene.host.call(&["pools"])?);
    // It is still its pool.
    scene.device.on(100)?;
    wait_for("its cold pages to go again", LIMIT, || Ok((scene.swapped()? > 60 * MIB).then_some(())))?;
    scene.check()
}

fn pool_is(scene: &ColdScene, state: &str) -> anyhow::Result<bool> {
    is(scene, "zram ", state)
}

fn is(scene: &ColdScene, pool: &str, state: &str) -> anyhow::Result<bool> {
    let pools = scene.host.call(&["pools"])?;
    Ok(pools.lines().any(|line| line.contains(pool) && line.contains(state)))
}

#[test]
fn without_room_all_stays_and_the_next_try_succeeds() -> anyhow::Result<()> {
    if skipped("without_room_all_stays_and_the_next_try_succeeds") {
        return Ok(());
    }
    let scene = ColdScene::set(&Plan { swap_bytes: 24 * MIB, ..Plan::default() })?;
    let before = scene.resident()?;
    let said = scene.refused("zram")?;
    ensure!(said.contains("has no room for what is cold"), "{said}");
    ensure!(
        scene.swapped()? == 0 && scene.resident()? > before * 9 / 10,
        "{} bytes are in swap",
        scene.swapped()?
    );
    scene.check()?;
    scene.device.off()?;
    // Or what was seen before would be taken for what is there again.
    wait_for("the pool to be gone", LIMIT, || Ok(pool_is(&scene, "gone")?.then_some(())))?;
    scene.device.resize(512 * MIB)?;
    scene.device.on(100)?;
    wait_for("the pool", LIMIT, || Ok(pool_is(&scene, "online")?.then_some(())))?;
    scene.swap("zram")?;
    ensure!(scene.swapped()? > 60 * MIB, "the next try moved {} bytes", scene.swapped()?);
    scene.check()
}

#[test]
fn what_can_t_be_done_is_refused_by_name_before_anything_is_touched() -> anyhow::Result<()> {
    if skipped("what_can_t_be_done_is_refused_by_name_before_anything_is_touched") {
        return Ok(());
    }
    let scene = ColdScene::set(&Plan { data_bytes: 10 * MIB, ..Plan::default() })?;
    let said = scene.refused(&scene.memory_pool()?)?;
    ensure!(said.contains("nothing of it is in swap, and this host has one memory node"), "{said}");
    let said = scene.refused("nowhere")?;
    ensure!(said.contains("no set of cores, no memory, swap or link"), "{said}");
    let other = swap_device::SwapDevice::make(64 * MIB)?;
    for priority in [100, 101] {
        other.on(priority)?;
        let said = scene.refused("zram")?;
        let named = format!("pages would go to {} (priority {priority})", other.path().display());
        ensure!(said.contains(&named), "{said}");
        other.off()?;
    }
    // From one swap pool to another.
    scene.swap("zram")?;
    other.on(101)?;
    let pool = format!("swap:{}", other.path().display());
    wait_for("the other area", LIMIT, || Ok(is(&scene, &pool, "online")?.then_some(())))?;
    let said = scene.refused(&pool)?;
    ensure!(said.contains("it is on zram: bring it back"), "{said}");
    other.off()?;
    scene.swap(&scene.memory_pool()?)?;
    scene.device.off()?;
    let said = scene.refused("zram")?;
    ensure!(said.contains("is not in /proc/swaps"), "{said}");
    ensure!(scene.swapped()? == 0, "{} bytes are in swap", scene.swapped()?);
    scene.check()
}

#[test]
fn what_is_in_swap_goes_along_to_another_host() -> anyhow::Result<()> {
    if skipped("what_is_in_swap_goes_along_to_another_host") {
        return Ok(());
    }
    let plan = Plan::default();
    let mut scene = ColdScene::set(&plan)?;
    let other = scene.fleet.host("b", &cold::options(&plan, &scene.device))?;
    scene.swap("zram")?;
    let swapped = scene.swapped()?;
    ensure!(swapped > 60 * MIB, "{swapped} bytes are in swap");
    let said = scene.host.call(&["migrate", "redis", &other.migrate_address()])?;
    println!("{said}");
    other.wait_for_instance("redis")?;
    ensure!(!scene.host.has_instance("redis")?, "it is on both hosts");
    scene.check()?;
    // On no swap pool there: nobody has put it on one.
    let views: Vec<InstanceView> = other.get("/v1/profiles")?;
    ensure!(views.iter().all(|view| view.in_swap.is_none() && view.instance.memory.is_none()), "{views:?}");
    Ok(())
}

/// Whoever waits for its memory is left alone, and says why.
#[test]
fn nothing_goes_while_the_program_waits_for_its_memory() -> anyhow::Result<()> {
    if skipped("nothing_goes_while_the_program_waits_for_its_memory") {
        return Ok(());
    }
    // A fault of a hundred microseconds in a second is more than is allowed. Of each look a few windows tell: none is missed.
    let usual = Plan::default();
    let scene = ColdScene::set(&Plan {
        memory: MemoryConfig { pressure_limit: 0.0001, look_every_ms: 1000, ..usual.memory.clone() },
        ..usual
    })?;
    scene.swap("zram")?;
    ensure!(scene.swapped()? > 60 * MIB, "{} bytes are in swap", scene.swapped()?);
    // Now all of it is wanted, a bit at a time, for longer than pages need to become cold again.
    let reader = HotReader::start(&scene.fleet.client, scene.set, 1.0, Duration::from_millis(3))?;
    let shown = scene.wait_for_word("the agent to hold", |shown| shown.doing == "hold")?;
    ensure!(
        shown.reason.as_ref().is_some_and(|reason| reason.contains("it waits for its memory")),
        "{shown:?}"
    );
    let mut went = None;
    let done = wait_for("all to be read", LIMIT, || {
        let shown = scene.shown()?.context("it is on no swap pool")?;
        let before = *went.get_or_insert(shown.out_bytes);
        ensure!(
            shown.out_bytes == before || shown.doing == "out",
            "{} bytes went: {shown:?}",
            shown.out_bytes - before
        );
        went = Some(shown.out_bytes);
        Ok((reader.rounds() >= 1).then_some(()))
    });
    reader.finish()?;
    done?;
    // And when it waits no longer, it goes on.
    scene.wait_for_word("the agent to go on", |shown| shown.doing == "out")?;
    scene.check()
}

/// Of two blocks in huge pages the one that is used stays, in huge pages; the other goes.
#[test]
fn huge_pages_that_are_used_stay_huge() -> anyhow::Result<()> {
    if skipped("huge_pages_that_are_used_stay_huge") {
        return Ok(());
    }
    const BLOCK: u64 = 32 * MIB;
    let device = SwapDevice::make(256 * MIB)?;
    device.on(100)?;
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &cold::options(&Plan::default(), &device))?;
    let program = program("huge.py").to_string_lossy().into_owned();
    host.run("huge", &[], &["python3", &program, &(BLOCK / MIB).to_string()])?;
    host.wait_for_instance("huge")?;
    let huge = || cold::huge_and_swapped(host.pids("huge")?.first().copied().context("no process")?);
    if wait_for("both blocks in huge pages", LIMIT, || Ok((huge()?.0 >= 2 * BLOCK).then_some(()))).is_err() {
        skip("huge_pages_that_are_used_stay_huge", "this machine has no transparent huge pages to give");
        return Ok(());
    }
    host.call(&["swap", "huge", "zram"])?;
    let found = wait_for("the one to go, and the other to be whole again", LIMIT, || {
        let found = huge()?;
        Ok((found.1 >= BLOCK * 9 / 10 && found.0 >= BLOCK * 9 / 10).then_some(found))
    });
    println!("in huge pages, in swap: {:?} MiB", huge().map(|(huge, swapped)| (huge / MIB, swapped / MIB))?);
    found?;
    // The program looks at all it reads, and ends where that is wrong.
    ensure!(host.has_instance("huge")?, "it has ended");
    Ok(())
}

/// A program of which a part is used at the end of each day only: that is in swap for most of the day, and back before it is used.
#[test]
fn what_will_be_needed_is_back_before() -> anyhow::Result<()> {
    if skipped("what_will_be_needed_is_back_before") {
        return Ok(());
    }
    const BLOCK: u64 = 64 * MIB;
    let device = SwapDevice::make(512 * MIB)?;
    device.on(100)?;
    let plan = Plan::default();
    let plan = Plan { memory: MemoryConfig { cold_after_s: 1, ..plan.memory.clone() }, ..plan };
    let mut options = cold::options(&plan, &device);
    // Two days of fifty windows.
    options.more += "[forecast]\nhorizons_ms = [1000, 2000]\nmin_seen = 100\n";
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &options)?;
    let log = fleet.scratch().join("days");
    let program = program("daily.py");
    let words = [&program, &log].map(|path| path.to_string_lossy().into_owned());
    host.run("daily", &[], &["python3", &words[0], &words[1], "10", "2", &(BLOCK / MIB).to_string()])?;
    host.wait_for_instance("daily")?;
    host.call(&["swap", "daily", "zram"])?;
    let pages = BLOCK / 4096;
    let (mut cold_peaks, mut reasons) = (0, BTreeSet::new());
    // Of the day under way.
    let mut most_swapped = 0;
    let mut days = 0;
    wait_for("a day on which the block was back in time", Duration::from_secs(240), || {
        let views: Vec<InstanceView> = host.get("/v1/profiles")?;
        let in_swap = views.first().and_then(|view| view.in_swap.clone());
        if let Some(shown) = in_swap {
            most_swapped = most_swapped.max(shown.swapped_bytes);
            if shown.doing == "back" {
                reasons.insert(shown.reason.unwrap_or_default());
            }
        }
        let text = fs::read_to_string(&log).unwrap_or_default();
        let Some((day, faults)) = text.lines().nth(days).and_then(|line| line.split_once(' ')) else {
            return Ok(None);
        };
        days += 1;
        let faults: u64 = faults.parse()?;
        println!(
            "day {day}: {} MiB were in swap, {faults} of {pages} pages had to be fetched",
            most_swapped / MIB
        );
        let was_out = std::mem::take(&mut most_swapped) > BLOCK * 7 / 10;
        cold_peaks += u64::from(was_out && faults > pages * 7 / 10);
        Ok((cold_peaks > 0 && was_out && faults < pages / 10).then_some(()))
    })?;
    println!("brought back because {reasons:?}");
    ensure!(reasons.iter().any(|reason| reason.contains("by the forecast")), "{reasons:?}");
    Ok(())
}
