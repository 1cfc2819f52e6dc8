//! What threads chose for themselves (sched_setaffinity(2)) holds within a pool and comes back after it, whoever is killed meanwhile.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::pool::{CpuSet, cpu_list};
use rswap_tests::{
    Fleet, Host, HostOptions,
    moves::program,
    reason_to_skip, skip,
    steps::{Follower, Place},
    wait_for,
};

const LIMIT: Duration = Duration::from_secs(20);
/// Threads that sleep.
const MANY: usize = 40;
const POOLS: &str = "[[pool]]\nname = \"one\"\ncpus = \"0\"\n\n\
                     [[pool]]\nname = \"two\"\ncpus = \"1\"\n\n\
                     [[pool]]\nname = \"both\"\ncpus = \"0-1\"\n";

fn skipped(test: &str) -> bool {
    if reason_to_skip(test).is_some() {
        return true;
    }
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let few = cpu_list::parse(online.trim()).is_ok_and(|online| !online.is_superset(&CpuSet::from([0, 1])));
    if few {
        skip(test, "it needs the CPUs 0 and 1");
    }
    few
}

fn options() -> HostOptions {
    HostOptions { window_ms: 200, more: POOLS.to_owned(), ..HostOptions::default() }
}

fn start(host: &Host) -> anyhow::Result<()> {
    let path = program("chooses.py");
    let path = path.to_str().context("a path that is no text")?;
    host.run("chooses", &[], &["python3", path, &MANY.to_string()])?;
    let first = ("first", CpuSet::from([0]));
    wait_until(host, "the threads to have chosen", |found| {
        found.get(first.0) == Some(&vec![first.1.clone()])
            && found.get("heir").is_some_and(|cpus| *cpus == [CpuSet::from([1])])
            && found.get("many").is_some_and(|cpus| cpus.len() == MANY)
    })
}

/// `Cpus_allowed_list` of every thread, by the threads' names.
fn allowed(host: &Host) -> anyhow::Result<BTreeMap<String, Vec<CpuSet>>> {
    let mut found: BTreeMap<String, Vec<CpuSet>> = BTreeMap::new();
    for pid in host.pids("chooses")? {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            // Some live for a moment.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let line = |name| status.lines().find_map(|line: &str| line.strip_prefix(name)).map(str::trim);
            let (Some(name), Some(cpus)) = (line("Name:"), line("Cpus_allowed_list:")) else { continue };
            found.entry(name.to_owned()).or_default().push(cpu_list::parse(cpus)?);
        }
    }
    Ok(found)
}

fn wait_until(
    host: &Host,
    what: &str,
    is_so: impl Fn(&BTreeMap<String, Vec<CpuSet>>) -> bool,
) -> anyhow::Result<()> {
    let waited = wait_for(what, LIMIT, || Ok(is_so(&allowed(host)?).then_some(())));
    waited.with_context(|| format!("{:?}", allowed(host)))
}

/// All threads are on `pool`, but for these.
fn are_on(found: &BTreeMap<String, Vec<CpuSet>>, pool: &[usize], others: &[(&str, usize)]) -> bool {
    let pool: CpuSet = pool.iter().copied().collect();
    found.len() > 5
        && found.iter().all(|(name, cpus)| {
            let own = others.iter().find(|(other, _)| other == name);
            let wanted = own.map_or_else(|| pool.clone(), |(_, cpu)| CpuSet::from([*cpu]));
            cpus.iter().all(|cpus| *cpus == wanted)
        })
}

fn expect(host: &Host, pool: &[usize], others: &[(&str, usize)]) -> anyhow::Result<()> {
    let found = allowed(host)?;
    ensure!(are_on(&found, pool, others), "wanted {pool:?} but for {others:?}, found {found:?}");
    Ok(())
}

fn tell(host: &Host, signal: Signal) -> anyhow::Result<()> {
    let pids = host.pids("chooses")?;
    let is_ours = |pid: &&i32| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        program.to_string_lossy().contains("python")
    };
    let pid = pids.iter().find(is_ours).context("the program is gone")?;
    Ok(kill(Pid::from_raw(*pid), signal)?)
}

/// Waits while the agent brings back what had left its pool.
fn swap(host: &Host, pool: &str) -> anyhow::Result<()> {
    wait_for("the agent to be done with it", LIMIT, || match host.call(&["swap", "chooses", pool]) {
        Err(error) if error.to_string().contains("is on its way") => Ok(None),
        swapped => swapped.map(|_| Some(())),
    })
}

const CHOSEN: [(&str, usize); 3] = [("first", 0), ("second", 1), ("heir", 1)];

#[test]
fn choices_hold_within_a_pool_and_come_back() -> anyhow::Result<()> {
    if skipped("choices_hold_within_a_pool_and_come_back") {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let (host, other) = (fleet.host("a", &options())?, fleet.host("b", &options())?);
    start(&host)?;
    swap(&host, "one")?;
    expect(&host, &[0], &[])?;
    swap(&host, "two")?;
    expect(&host, &[1], &[])?;
    swap(&host, "both")?;
    expect(&host, &[0, 1], &CHOSEN)?;
    // Chosen within a pool that has it, and while another one doesn't.
    swap(&host, "one")?;
    tell(&host, Signal::SIGUSR1)?;
    wait_until(&host, "the thread to choose", |found| found["free"] == [CpuSet::from([1])])
        .or_else(|_| host.log().map(|log| ensure_noticed(&log)).and_then(|noticed| noticed))?;
    wait_until(&host, "the thread to be brought back", |found| are_on(found, &[0], &[]))?;
    swap(&host, "both")?;
    let with_free = [CHOSEN.as_slice(), &[("free", 1)]].concat();
    expect(&host, &[0, 1], &with_free)?;
    tell(&host, Signal::SIGUSR2)?;
    wait_until(&host, "the thread to be free again", |found| are_on(found, &[0, 1], &CHOSEN))?;
    // They are known at another host, which limits nothing, though the pool here hides them.
    swap(&host, "one")?;
    expect(&host, &[0], &[])?;
    host.migrate("chooses", &other.migrate_address())?.succeed()?;
    wait_until(&other, "the choices at the other host", |found| are_on(found, &[0, 1], &CHOSEN))
}

/// It was brought back sooner than it was looked at.
fn ensure_noticed(log: &str) -> anyhow::Result<()> {
    ensure!(log.contains("threads are on other cores"), "the thread did not choose");
    Ok(())
}

#[test]
fn an_agent_that_is_killed_leaves_nobody_between_two_pools() -> anyhow::Result<()> {
    if skipped("an_agent_that_is_killed_leaves_nobody_between_two_pools") {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let mut host = fleet.host("a", &options())?;
    start(&host)?;
    // Among the threads, from no pool; before the first one, among them, and at the end, from one.
    let from_two = [0, 1, MANY / 2, MANY + 2].map(|nth| (Some("two"), nth));
    for (from, nth) in [(None, MANY / 2)].into_iter().chain(from_two) {
        if let Some(from) = from {
            swap(&host, from)?;
        }
        let registered: &[usize] = if from.is_none() { &[0, 1] } else { &[1] };
        let agent = host.agent_pid().context("no agent runs")?;
        let follower = Follower::start(agent, Place::Affinity(nth), Signal::SIGKILL)?;
        let swapped = host.call(&["swap", "chooses", "one"]);
        ensure!(follower.has_struck()?, "no {nth}th thread was moved: {swapped:?}");
        ensure!(swapped.is_err(), "the agent was killed, and answered");
        host.kill_agent()?;
        let moved = allowed(&host)?.values().flatten().filter(|cpus| **cpus == CpuSet::from([0])).count();
        println!("killed before thread {nth}: {moved} are on the new pool");
        host.start_agent()?;
        host.wait_for_instance("chooses")?;
        let chosen: &[(&str, usize)] = if from.is_none() { &CHOSEN } else { &[] };
        wait_until(&host, "all to be where the registry says", |found| are_on(found, registered, chosen))?;
        // The next try succeeds, and what was chosen is known.
        swap(&host, "one")?;
        expect(&host, &[0], &[])?;
        swap(&host, "both")?;
        expect(&host, &[0, 1], &CHOSEN)?;
    }
    Ok(())
}
