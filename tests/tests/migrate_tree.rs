//! Trees of processes migrate: a ring that checks itself, and a shell whose jobs come and go all the time.

use std::{fs, path::Path};

use anyhow::Context;
use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    proxy::{Fault, Proxy},
    reason_to_skip, rounds,
    scene::{LIMIT, Scene},
    wait_for,
};

fn ring(scene: &Scene, processes: &str, pause_s: &str) -> anyhow::Result<()> {
    scene.python("tree", &[], &[processes, pause_s])?;
    more_rounds(&scene.log)
}

/// Waits for a hundred further rounds of the ring, and for its zombie to be collected with its status.
fn more_rounds(log: &Path) -> anyhow::Result<()> {
    let before = rounds::read(log)?;
    let reap = log.with_extension("log.reap");
    fs::write(&reap, "")?;
    wait_for("a hundred rounds, and the zombie's status", LIMIT, || {
        let now = rounds::read(log)?;
        Ok((now.made >= before.made + 100 && now.reaped > before.reaped).then_some(()))
    })
}

#[test]
fn a_ring_of_processes_goes_round_without_a_break() -> anyhow::Result<()> {
    if reason_to_skip("a_ring_of_processes_goes_round_without_a_break").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    ring(&scene, "4", "0.002")?;
    scene.three_moves("tree", more_rounds)
}

#[test]
fn a_tree_whose_copy_is_lost_goes_on_and_moves_at_the_second_try() -> anyhow::Result<()> {
    if reason_to_skip("a_tree_whose_copy_is_lost_goes_on_and_moves_at_the_second_try").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    ring(&scene, "3", "0.002")?;
    for fault in [Fault::HoldAt { tag: Tag::RoundEnd, nth: 1 }, Fault::HoldAt { tag: Tag::Verified, nth: 0 }]
    {
        let proxy = Proxy::start(&scene.a, &scene.b, fault)?;
        let migration = scene.a.migrate("tree", &proxy.address())?;
        proxy.wait_for_fault()?;
        proxy.cut();
        assert!(migration.end()?.is_err(), "it was moved over a link that was cut");
        assert!(scene.a.has_instance("tree")?);
        more_rounds(&scene.log)?;
        wait_for("what was built at b to go", LIMIT, || Ok((!scene.b.has_processes()?).then_some(())))?;
    }
    scene.three_moves("tree", more_rounds)
}

#[test]
fn fifty_processes_move() -> anyhow::Result<()> {
    if reason_to_skip("fifty_processes_move").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    ring(&scene, "50", "0.05")?;
    scene.three_moves("tree", more_rounds)
}

#[test]
fn orphans_keep_their_sessions_and_groups() -> anyhow::Result<()> {
    if reason_to_skip("orphans_keep_their_sessions_and_groups").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.python("orphans", &[], &[])?;
    let goes_on = |log: &Path| rswap_tests::scene::further(log, "checked", 3);
    goes_on(&scene.log)?;
    scene.three_moves("orphans", goes_on)
}

/// Writes its clocks, monotonic and since the boot, over and over, and a line whenever one of them went back or jumped.
const CLOCK: &str = "
import sys, time
log = open(sys.argv[1], 'a', buffering=1)
def tell():
    return [time.clock_gettime(clock) for clock in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)]
last = tell()
count = 0
while True:
    now = tell()
    if any(new < old or new > old + 5 for new, old in zip(now, last)):
        log.write(f'JUMPED from {last} to {now}\\n')
    last = now
    count += 1
    log.write(f'{count} {now[0]} {now[1]}\\n')
    time.sleep(0.01)
";

#[test]
fn the_clock_goes_on_where_the_kernel_has_another_time() -> anyhow::Result<()> {
    if reason_to_skip("the_clock_goes_on_where_the_kernel_has_another_time").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    // In a time namespace an instance has another clock than the host, as one has that comes from another host.
    let mut run = std::process::Command::new("unshare");
    run.args(["--time", "--monotonic", "1000000", "--boottime", "3000000", "--fork", "--", "sh", "-c"]);
    let (log, line) = (scene.log.to_string_lossy().into_owned(), scene.a.command_line()?);
    run.arg(format!("exec {line} run --detach --name clock -- python3 -c \"$1\" \"$2\""))
        .args(["sh", CLOCK, &log]);
    assert!(run.stdin(std::process::Stdio::null()).status()?.success());
    let goes_on = |log: &Path| -> anyhow::Result<()> {
        let before = fs::read_to_string(log).unwrap_or_default().lines().count();
        wait_for("fifty further ticks", LIMIT, || {
            let text = fs::read_to_string(log).unwrap_or_default();
            anyhow::ensure!(
                !text.contains("JUMPED"),
                "{}",
                text.lines().find(|l| l.contains("JUMPED")).unwrap_or("")
            );
            Ok((text.lines().count() >= before + 50).then_some(()))
        })
    };
    goes_on(&scene.log)?;
    let first = fs::read_to_string(&scene.log)?;
    let first: Vec<f64> =
        first.lines().next().context("no time")?.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    assert!(first[1] > 1_000_000.0 && first[2] > 3_000_000.0, "the clocks are not ahead: {first:?}");
    scene.three_moves("clock", goes_on)
}

/// Numbers lines, each made by a process of its own, through a pipeline of three.
const JOBS: &str =
    "i=0; while :; do i=$((i+1)); /bin/echo $i; sleep 0.01; done | cat | while read n; do echo $n; done";

#[test]
fn a_shell_whose_jobs_come_and_go_loses_no_line() -> anyhow::Result<()> {
    if reason_to_skip("a_shell_whose_jobs_come_and_go_loses_no_line").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let script = format!("({JOBS}) >> {}", scene.log.display());
    scene.a.run("jobs", &[], &["bash", "-c", &script])?;
    more_lines(&scene.log)?;
    scene.three_moves("jobs", more_lines)?;
    assert!(scene.fleet.scratch().exists());
    Ok(())
}

fn more_lines(log: &Path) -> anyhow::Result<()> {
    let before = lines(log)?;
    wait_for("fifty further lines", LIMIT, || Ok((lines(log)? >= before + 50).then_some(())))
}

fn lines(log: &Path) -> anyhow::Result<u64> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let mut count = 0;
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        count += 1;
        anyhow::ensure!(line == count.to_string(), "line {count} was due, not {line:?}");
    }
    Ok(count)
}
