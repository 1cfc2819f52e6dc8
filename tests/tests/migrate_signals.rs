//! Signals, timers, waits and stops migrate: none is lost, and none comes twice.

use std::{fs, path::Path};

use anyhow::Context;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_tests::{
    Host, binary, reason_to_skip,
    scene::{LIMIT, Scene, further, lines},
    wait_for,
};

#[test]
fn signals_timers_and_waits_go_on_there_and_back() -> anyhow::Result<()> {
    if reason_to_skip("signals_timers_and_waits_go_on_there_and_back").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let (program, log) = (binary("signals")?, scene.log.to_string_lossy());
    scene.a.run("signals", &[], &[&program.to_string_lossy(), &log])?;
    let goes_on = |log: &Path| further(log, "line", 20);
    goes_on(&scene.log)?;
    scene.three_moves("signals", goes_on)?;
    // Waits that were moved up to three times end as they should.
    for wait in ["nanosleep", "poll", "futex"] {
        wait_for(&format!("{wait} to end"), LIMIT, || Ok((lines(&scene.log, wait)? > 0).then_some(())))?;
    }
    Ok(())
}

/// Calls that Linux never goes on with.
const NEVER_CONTINUED: [&str; 6] =
    ["epoll_wait", "epoll_pwait2", "sigtimedwait", "semtimedop", "recvmsg", "accept"];

#[test]
fn calls_that_linux_never_goes_on_with_return_eintr_only_if_they_have_a_limit() -> anyhow::Result<()> {
    if reason_to_skip("calls_that_linux_never_goes_on_with_return_eintr_only_if_they_have_a_limit").is_some()
    {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.python("waits", &[], &[])?;
    further(&scene.log, "waiting", 1)?;
    for (from, to) in [(&scene.a, &scene.b), (&scene.b, &scene.a), (&scene.a, &scene.b)] {
        let before = NEVER_CONTINUED.map(|name| lines(&scene.log, name));
        scene.moved("waits", from, to)?;
        for (name, before) in NEVER_CONTINUED.into_iter().zip(before) {
            let before = before?;
            // Long before its own limit, which is ten minutes.
            wait_for(&format!("{name} to be interrupted"), LIMIT, || {
                Ok((lines(&scene.log, name)? > before).then_some(()))
            })?;
        }
        anyhow::ensure!(lines(&scene.log, "woken")? == 0, "a wait is over without what it waits for");
    }
    fs::write(scene.log.with_extension("log.wake"), "")?;
    wait_for("all to be woken", LIMIT, || Ok((lines(&scene.log, "done")? > 0).then_some(())))?;
    anyhow::ensure!(lines(&scene.log, "woken")? == 2 * NEVER_CONTINUED.len(), "some were not woken");
    Ok(())
}

#[test]
fn what_is_stopped_stays_so_and_the_parent_is_told_once() -> anyhow::Result<()> {
    if reason_to_skip("what_is_stopped_stays_so_and_the_parent_is_told_once").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.python("stopped", &[], &[])?;
    let goes_on = |log: &Path| {
        further(log, "stopped", 5)?;
        fs::write(log.with_extension("log.go"), "")?;
        further(log, "continued", 1)
    };
    goes_on(&scene.log)?;
    scene.three_moves("stopped", goes_on)
}

#[test]
fn a_stopped_instance_arrives_stopped() -> anyhow::Result<()> {
    if reason_to_skip("a_stopped_instance_arrives_stopped").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let script = format!("while :; do echo line=1 >> {}; sleep 0.05; done", scene.log.display());
    scene.a.run("loop", &[], &["bash", "-c", &script])?;
    further(&scene.log, "line", 5)?;
    for pid in processes(&scene.a)? {
        kill(pid, Signal::SIGSTOP)?;
    }
    wait_for("all to stop", LIMIT, || Ok(all_stopped(&scene.a)?.then_some(())))?;
    for (from, to) in [(&scene.a, &scene.b), (&scene.b, &scene.a)] {
        from.migrate("loop", &to.migrate_address())?.succeed()?;
        anyhow::ensure!(all_stopped(to)?, "it goes on after the move");
    }
    for pid in processes(&scene.a)? {
        kill(pid, Signal::SIGCONT)?;
    }
    further(&scene.log, "line", 20)
}

/// The instance's processes without its init.
fn processes(host: &Host) -> anyhow::Result<Vec<Pid>> {
    let text = fs::read_to_string(host.cgroup()?.join("loop/cgroup.procs"))?;
    let pids = text.lines().map(|line| line.parse().context("no pid"));
    let pids = pids.collect::<anyhow::Result<Vec<i32>>>()?;
    let is_init = |pid: i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("NSpid:") && line.ends_with("\t1"))
    };
    Ok(pids.into_iter().filter(|pid| !is_init(*pid)).map(Pid::from_raw).collect())
}

fn all_stopped(host: &Host) -> anyhow::Result<bool> {
    let pids = processes(host)?;
    let is_stopped = |pid: &Pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains("State:\tT (stopped)")
    };
    Ok(!pids.is_empty() && pids.iter().all(is_stopped))
}
