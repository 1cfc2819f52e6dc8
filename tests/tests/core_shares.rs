//! A core pool that is a share limits what is on it, by the cpu controller of whichever cgroup version the host has.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rswap_tests::{
    Fleet, Host, HostOptions, reason_to_skip,
    steps::{Follower, Place},
    sweep, wait_for,
};

const LIMIT: Duration = Duration::from_secs(20);
const BUSY: &[&str] = &["sh", "-c", "while :; do :; done"];
const POOLS: &str = "[[pool]]\nname = \"half\"\ncpus = \"0\"\ninstance_cores = 0.5\n\n\
                     [[pool]]\nname = \"light\"\ncpus = \"0\"\ninstance_weight = 10\n\n\
                     [[pool]]\nname = \"whole\"\ncpus = \"0\"\n\n\
                     [[pool]]\nname = \"both\"\ncpus = \"0-1\"\n";

fn options() -> HostOptions {
    HostOptions { window_ms: 200, more: POOLS.to_owned(), ..HostOptions::default() }
}

/// CPU time of an instance until now.
fn used(host: &Host, name: &str) -> anyhow::Result<Duration> {
    let text = fs::read_to_string(host.cgroup()?.join(name).join("cpu.stat"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec")?;
    Ok(Duration::from_micros(line.trim().parse()?))
}

/// Cores that instances use, over a while.
fn cores<const N: usize>(host: &Host, names: [&str; N]) -> anyhow::Result<[f64; N]> {
    let all = || -> anyhow::Result<Vec<Duration>> { names.iter().map(|name| used(host, name)).collect() };
    let (began, before) = (Instant::now(), all()?);
    thread::sleep(Duration::from_secs(2));
    let (after, took) = (all()?, began.elapsed());
    let mut cores = [0.0; N];
    for (at, cores) in cores.iter_mut().enumerate() {
        *cores = (after[at] - before[at]).as_secs_f64() / took.as_secs_f64();
    }
    println!("{names:?} use {cores:.2?} cores");
    Ok(cores)
}

fn is_held(host: &Host, name: &str) -> anyhow::Result<()> {
    let [cores] = cores(host, [name])?;
    ensure!((0.2..0.6).contains(&cores), "half a core was allowed, {cores:.2} are used");
    Ok(())
}

/// It has more than the share would let it have, whatever else this machine does.
fn is_free(host: &Host, name: &str) -> anyhow::Result<()> {
    wait_for("more than half a core to be used", LIMIT, || {
        let [cores] = cores(host, [name])?;
        Ok((cores > 0.65).then_some(()))
    })
}

/// What is left in v1's hierarchy of what the agent of `host` made.
fn is_clean(host: &Host) -> anyhow::Result<()> {
    let Some(mount) = sweep::legacy_cpu()? else { return Ok(()) };
    let parent = host.cgroup()?;
    let prefix = format!("{}.", parent.file_name().context("a cgroup without a name")?.to_string_lossy());
    wait_for(&format!("{prefix}* to be gone"), LIMIT, || {
        let mut left = fs::read_dir(&mount)?.flatten();
        let is_left = left.any(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        Ok((!is_left).then_some(()))
    })
}

/// Its agent is killed before the first thread is moved, and another one started.
fn kill_on_the_way(host: &mut Host, to: &str) -> anyhow::Result<()> {
    let agent = host.agent_pid().context("no agent runs")?;
    let follower = Follower::start(agent, Place::Affinity(0), Signal::SIGKILL)?;
    let swapped = host.call(&["swap", "busy", to]);
    ensure!(follower.has_struck()? && swapped.is_err(), "nothing was moved: {swapped:?}");
    host.kill_agent()?;
    host.start_agent()?;
    host.wait_for_instance("busy")
}

#[test]
fn an_instance_has_its_share_and_no_more() -> anyhow::Result<()> {
    if reason_to_skip("an_instance_has_its_share_and_no_more").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let (mut host, other) = (fleet.host("a", &options())?, fleet.host("b", &options())?);
    host.run("busy", &[], BUSY)?;
    host.call(&["swap", "busy", "half"])?;
    is_held(&host, "busy")?;
    let shown = host.call(&["pools"])?;
    ensure!(shown.contains("0.50 cores an instance"), "{shown}");
    // The share outlives the agent, and the next one knows how to lift it.
    host.kill_agent()?;
    host.start_agent()?;
    host.wait_for_instance("busy")?;
    is_held(&host, "busy")?;
    host.call(&["swap", "busy", "whole"])?;
    is_free(&host, "busy")?;
    // Killed on the way, it has what the registry says: nothing less, and then nothing more.
    host.call(&["swap", "busy", "both"])?;
    kill_on_the_way(&mut host, "half")?;
    is_free(&host, "busy")?;
    host.call(&["swap", "busy", "half"])?;
    kill_on_the_way(&mut host, "both")?;
    is_held(&host, "busy")?;
    // Started there, it is held as well.
    host.run("second", &["--pool", "half"], BUSY)?;
    wait_for("the second one to be held", LIMIT, || Ok(is_held(&host, "second").ok()))?;
    // What limits it here does not go along.
    host.migrate("busy", &other.migrate_address())?.succeed()?;
    is_free(&other, "busy")?;
    sweep::remove_cgroup(&host.cgroup()?.join("second"))?;
    is_clean(&host)
}

#[test]
fn who_weighs_less_has_less_when_there_is_not_enough() -> anyhow::Result<()> {
    if reason_to_skip("who_weighs_less_has_less_when_there_is_not_enough").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &options())?;
    for name in ["usual", "less"] {
        host.run(name, &["--pool", "whole"], BUSY)?;
    }
    host.call(&["swap", "less", "light"])?;
    let [usual, less] = cores(&host, ["usual", "less"])?;
    ensure!(usual > 3.0 * less, "by weight it is 10 to 1: {usual:.2} and {less:.2}");
    host.call(&["swap", "less", "whole"])?;
    let [usual, less] = cores(&host, ["usual", "less"])?;
    ensure!(usual < 2.0 * less, "by weight it is 1 to 1: {usual:.2} and {less:.2}");
    Ok(())
}

#[test]
fn what_somebody_else_limits_is_refused() -> anyhow::Result<()> {
    if reason_to_skip("what_somebody_else_limits_is_refused").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &options())?;
    host.run("held", &["--pool", "whole"], &["sleep", "1000"])?;
    // Only v1 has cgroups that are not the instance's own.
    let Some(mount) = sweep::legacy_cpu()? else { return Ok(()) };
    let own = Own::make(&mount)?;
    let pids = host.pids("held")?;
    let sleeper = pids.last().context("no process")?;
    fs::write(own.0.join("cgroup.procs"), sleeper.to_string())?;
    let said = host.call(&["swap", "held", "half"]).unwrap_err().to_string();
    ensure!(said.contains(&format!("process {sleeper} is in the cgroup /{}", own.name())), "{said}");
    let still = fs::read_to_string(own.0.join("cgroup.procs"))?;
    ensure!(still.trim() == sleeper.to_string(), "it was moved: {still}");
    fs::write(mount.join("cgroup.procs"), sleeper.to_string())?;
    host.call(&["swap", "held", "half"]).map(drop)
}

/// A cgroup of v1.
struct Own(PathBuf);

impl Own {
    fn make(mount: &Path) -> anyhow::Result<Self> {
        let path = mount.join(sweep::own_name("limited"));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn name(&self) -> String {
        self.0.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // What is still in it goes back to where it was.
        for pid in fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let parent = self.0.parent().unwrap_or(Path::new("/")).join("cgroup.procs");
            drop(fs::write(parent, pid));
        }
        drop(Command::new("rmdir").arg(&self.0).status());
    }
}
