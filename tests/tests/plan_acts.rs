//! In mode `act` a plan is carried out by itself: onto other cores, then to another host. In `observe` nothing moves.
//! An agent that is told to stop ends its moves first.

use std::{fs, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::{
    migrate::wire::Tag,
    plan::{Decision, Outcome, Plan, StayReason},
    pool::{CpuSet, cpu_list},
    status::{InstanceView, MigrationState, MigrationView},
};
use rswap_tests::{
    Fleet, Host, HostOptions, binary,
    proxy::{Fault, Proxy},
    reason_to_skip, wait_for,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
/// One core, kept busy.
const BUSY: &[&str] = &["sh", "-c", "while :; do :; done"];

/// The instance needs a core. "slow" gives half of one; "fast" gives `fast_cores`.
fn pools(fast_cores: f64) -> String {
    format!(
        "[forecast]\nhorizons_ms = [400, 1200]\nmin_seen = 10\n\n\
         [plan]\nhorizon_ms = 2000\ncool_down_ms = 500\n\n\
         [[pool]]\nname = \"slow\"\ncpus = \"1\"\ncapacity_cores = 0.5\ncost_per_core_hour = 0.01\n\n\
         [[pool]]\nname = \"fast\"\ncpus = \"0-1\"\ncapacity_cores = {fast_cores}\n\n\
         [[pool]]\nname = \"b\"\nhost = \"10.88.0.2:7791\"\ncores = 4\nmemory_gib = 8\n"
    )
}

fn options(mode: &'static str, fast_cores: f64) -> HostOptions {
    HostOptions { mode, window_ms: 200, more: pools(fast_cores), ..HostOptions::default() }
}

fn pool_of(host: &Host, name: &str) -> anyhow::Result<Option<String>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    let found = views.into_iter().find(|view| view.instance.name.as_str() == name);
    Ok(found.and_then(|view| view.instance.pool))
}

/// Where every thread of the host's instances may run.
fn allowed(host: &Host, name: &str) -> anyhow::Result<Vec<CpuSet>> {
    let threads = fs::read_to_string(host.cgroup()?.join(name).join("cgroup.threads"))?;
    let mut found = Vec::new();
    for tid in threads.lines() {
        let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        found.extend(line.map(cpu_list::parse).transpose()?);
    }
    Ok(found)
}

#[test]
fn a_need_that_the_cores_cannot_give_is_moved_to_others_and_observe_only_says_so() -> anyhow::Result<()> {
    if reason_to_skip("a_need_that_the_cores_cannot_give_is_moved_to_others_and_observe_only_says_so")
        .is_some()
    {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let watching = fleet.host("o", &options("observe", 2.0))?;
    watching.run("busy", &["--pool", "slow"], BUSY)?;
    wait_for("a plan that moves it", LIMIT, || {
        let plan: Plan = watching.get("/v1/plan")?;
        let moves =
            |d: &Decision| matches!(&d.outcome, Outcome::Move { to, forced: true, .. } if to == "fast");
        Ok(plan.decisions.iter().any(moves).then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(pool_of(&watching, "busy")?.as_deref(), Some("slow"), "observe moved it");
    assert!(allowed(&watching, "busy")?.iter().all(|cpus| *cpus == CpuSet::from([1])));
    drop(watching);

    let acting = fleet.host("a", &options("act", 2.0))?;
    acting.run("busy", &["--pool", "slow"], BUSY)?;
    wait_for("the move to the fast cores", LIMIT, || {
        Ok((pool_of(&acting, "busy")?.as_deref() == Some("fast")).then_some(()))
    })?;
    let cpus = allowed(&acting, "busy")?;
    assert!(cpus.len() >= 2 && cpus.iter().all(|cpus| *cpus == CpuSet::from([0, 1])), "{cpus:?}");
    let status: Value = acting.get("/v1/status")?;
    assert_eq!((&status["swaps_done"], &status["swaps_failed"]), (&1.into(), &0.into()));
    let why = acting.call(&["explain", "busy", "-n", "400"])?;
    assert!(why.contains("moves to fast in") && why.contains("the present one can't meet the need"), "{why}");
    Ok(())
}

#[test]
fn a_need_that_no_cores_here_can_give_is_migrated() -> anyhow::Result<()> {
    if reason_to_skip("a_need_that_no_cores_here_can_give_is_migrated").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let a = fleet.host("a", &options("act", 0.8))?;
    let b = fleet.host("b", &HostOptions::default())?;
    a.run("busy", &["--pool", "slow"], BUSY)?;
    wait_for("the migration that was planned", LIMIT, || {
        let migrations: Vec<MigrationView> = a.get("/v1/migrations")?;
        let state = migrations.into_iter().next().map(|migration| migration.state);
        match state {
            Some(MigrationState::Done { report, .. }) => {
                assert!(report.memory_bytes_per_s > 0.0, "{report:?}");
                Ok(Some(()))
            }
            Some(MigrationState::Running { .. }) | None => Ok(None),
            Some(other) => anyhow::bail!("it did not move: {other:?}"),
        }
    })?;
    assert!(!a.has_instance("busy")?);
    b.wait_for_instance("busy")?;
    wait_for("it to be seen busy at the other host", LIMIT, || {
        let views: Vec<InstanceView> = b.get("/v1/profiles")?;
        let cores = views.first().and_then(|view| view.profile.as_ref()).map(|profile| profile.cpu.cores);
        Ok(cores.filter(|cores| *cores > 0.3))
    })?;
    let why = a.call(&["explain", "busy", "-n", "400"])?;
    assert!(why.contains("moves to b in") && why.contains("dropped: needs"), "{why}");
    Ok(())
}

#[test]
fn an_agent_that_is_told_to_stop_ends_its_migration_first() -> anyhow::Result<()> {
    if reason_to_skip("an_agent_that_is_told_to_stop_ends_its_migration_first").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let mut a = fleet.host("a", &HostOptions::default())?;
    let b = fleet.host("b", &HostOptions::default())?;
    let memcheck = binary("memcheck")?;
    let log = fleet.scratch().join("memcheck.log");
    let command = [&*memcheck.to_string_lossy(), &log.to_string_lossy(), "2", "64", "4"];

    // One that can't go on is rolled back when its link is cut, and the agent ends.
    a.run("memcheck", &[], &command)?;
    let held = Fault::HoldAt { tag: Tag::RoundEnd, nth: 0 };
    let proxy = Proxy::start(&a, &b, held)?;
    let migration = a.migrate("memcheck", &proxy.address())?;
    proxy.wait_for_fault()?;
    terminate(&a)?;
    std::thread::sleep(Duration::from_millis(300));
    proxy.cut();
    assert!(migration.end()?.is_err(), "it was moved over a link that was cut");
    a.wait_for_agent(LIMIT)?;
    a.start_agent()?;
    assert!(a.has_instance("memcheck")?);
    wait_for("what was built at b to go", LIMIT, || Ok((!b.has_processes()?).then_some(())))?;

    // One that goes on is ended.
    let mut migration = a.migrate("memcheck", &b.migrate_address())?;
    migration.wait_until("the transfer", |progress| progress.phase == "transfer")?;
    terminate(&a)?;
    a.wait_for_agent(LIMIT)?;
    assert!(b.has_instance("memcheck")?, "it was not moved");
    assert!(!a.has_processes()?, "two copies run");
    Ok(())
}

#[test]
fn a_new_agent_does_not_repeat_at_once_what_failed() -> anyhow::Result<()> {
    if reason_to_skip("a_new_agent_does_not_repeat_at_once_what_failed").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    // Nobody takes migrations at b.
    let mut host = fleet.host("a", &options("act", 0.8))?;
    host.run("busy", &["--pool", "slow"], BUSY)?;
    let failures = |host: &Host| {
        let plan: Plan = host.get("/v1/plan")?;
        let outcomes = plan.decisions.into_iter().map(|decision| decision.outcome);
        anyhow::Ok(outcomes.into_iter().find_map(|outcome| match outcome {
            Outcome::Stay { reason: StayReason::BackOff { failures, .. } } => Some(failures),
            _ => None,
        }))
    };
    let before =
        wait_for(
            "three failures in a row",
            LIMIT,
            || Ok(failures(&host)?.filter(|failures| *failures >= 3)),
        )?;
    terminate(&host)?;
    host.wait_for_agent(LIMIT)?;
    host.start_agent()?;
    let after = wait_for("the new agent to wait, too", LIMIT, || failures(&host))?;
    assert!(after >= before, "{before} failures, then {after}");
    let migrations: Vec<MigrationView> = host.get("/v1/migrations")?;
    assert!(migrations.len() <= 1, "it did not wait: {migrations:?}");
    Ok(())
}

fn terminate(host: &Host) -> anyhow::Result<()> {
    let pid = host.agent_pid().map(i32::try_from).transpose()?;
    Ok(kill(pid.map(Pid::from_raw).ok_or_else(|| anyhow::anyhow!("no agent runs"))?, Signal::SIGTERM)?)
}
