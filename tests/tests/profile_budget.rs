//! A tier of the profile that costs more than it may goes, says so, and comes back; all else goes on.

use std::{fs, path::Path, process::Child, time::Duration};

use anyhow::{Context, ensure};
use rswap_agent::status::InstanceView;
use rswap_tests::{Fleet, Host, HostOptions, bench::turns::OwnCgroup, moves, reason_to_skip, skip, wait_for};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(40);

/// Two that answer each other over pipes, and wait for each other all the time.
const PING_PONG: &str = r#"
import os
a, b = os.pipe(), os.pipe()
if os.fork() == 0:
    while os.read(a[0], 1): os.write(b[1], b"x")
    os._exit(0)
while True:
    os.write(a[1], b"x"); os.read(b[0], 1)
"#;

fn view(host: &Host) -> anyhow::Result<InstanceView> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    views.into_iter().next().context("no instance")
}

fn start(cgroup: &OwnCgroup) -> anyhow::Result<Child> {
    let python = moves::python()?;
    let python = python.to_str().context("a path that is no text")?;
    cgroup.start(&[python, "-c", PING_PONG])
}

fn scheduler(status: &Value) -> &Value {
    &status["profile_cost"]["tiers"][0]
}

#[test]
fn what_costs_more_than_it_may_goes_says_so_and_comes_back() -> anyhow::Result<()> {
    let test = "what_costs_more_than_it_may_goes_says_so_and_comes_back";
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let more = "[profile]\nbudget = 0.0005\nbudget_retry_s = 4\n";
    let options = HostOptions { window_ms: 250, more: more.to_owned(), ..HostOptions::default() };
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &options)?;
    let status: Value = host.get("/v1/status")?;
    let has = |status: &Value, name: &str, state: &str| {
        let probes = status["probes"].as_array().into_iter().flatten();
        probes.clone().any(|probe| probe["name"] == name && probe["state"] == state)
    };
    if !has(&status, "sched_switch", "active") && !has(&status, "sched_switch", "dropped") {
        skip(test, "this kernel does not take the program");
        return Ok(());
    }
    let cgroup = OwnCgroup::new("pong")?;
    let mut load = start(&cgroup)?;
    host.call(&["adopt", cgroup.path().to_str().context("a path that is no text")?, "--name", "pong"])?;
    let dropped = wait_for("the scheduler's tier to go", LIMIT, || {
        let status: Value = host.get("/v1/status")?;
        Ok(scheduler(&status)["dropped_until"].is_number().then_some(status))
    })?;
    println!("{}", dropped["profile_cost"]);
    ensure!(scheduler(&dropped)["core_share"].as_f64() > Some(0.0005), "{dropped}");
    let switch = dropped["programs"].as_array().into_iter().flatten().find(|of| of["name"] == "sched_switch");
    let share = switch.and_then(|switch| switch["core_share"].as_f64());
    ensure!(share.is_some_and(|share| share > 0.0005 && share < 1.0), "{switch:?}");
    for (name, state) in [
        ("sched_switch", "dropped"),
        ("sched_switch.prev_state", "dropped"),
        ("block_rq_complete", "active"),
        ("tcp_connections", "active"),
    ] {
        ensure!(has(&dropped, name, state), "{name} is not {state}: {}", dropped["probes"]);
    }
    // The kernel runs it no more, and what is counted otherwise goes on.
    let without = wait_for("a window without it", LIMIT, || {
        let profile = view(&host)?.profile;
        Ok(profile.filter(|profile| !profile.cpu.counted && profile.cpu.cores > 0.1))
    })?;
    ensure!(without.cpu.off_cpu.is_none() && without.cpu.run_queue_ns.count == 0, "{without:?}");
    ensure!(without.block_counted && without.tcp_counted && without.memory.faults.is_some(), "{without:?}");
    let scrape = host.command(Path::new("curl")).args(["-s", "http://127.0.0.1:7790/metrics"]).output()?;
    let metrics = String::from_utf8_lossy(&scrape.stdout);
    ensure!(metrics.contains("rswap_profile_tier_dropped{name=\"scheduler\"} 1"), "{metrics}");
    ensure!(metrics.contains("rswap_profile_tier_dropped{name=\"tcp\"} 0"), "{metrics}");
    ensure!(metrics.contains("# TYPE rswap_profile_untiered_core_share gauge\n"), "{metrics}");
    // Programs that know cgroups go on, and what they take is said.
    let below = cgroup.path().join("below");
    wait_for("the cost of knowing cgroups", LIMIT, || {
        for _ in 0..200 {
            fs::create_dir(&below)?;
            fs::remove_dir(&below)?;
        }
        let status: Value = host.get("/v1/status")?;
        ensure!(has(&status, "cgroup_mkdir", "active") == has(&status, "cgroup_release", "active"));
        let untiered = status["profile_cost"]["untiered_share"].as_f64();
        Ok((!has(&status, "cgroup_mkdir", "active") || untiered > Some(0.0)).then_some(()))
    })?;
    // Without the load there is room.
    load.kill()?;
    load.wait()?;
    drop(cgroup);
    let back = wait_for("it to come back", LIMIT, || {
        let status: Value = host.get("/v1/status")?;
        Ok(has(&status, "sched_switch", "active").then_some(status))
    })?;
    ensure!(has(&back, "sched_switch.prev_state", "active") && scheduler(&back)["dropped_until"].is_null());
    // It counts again.
    let cgroup = OwnCgroup::new("calm")?;
    let mut calm = cgroup.start(&["sleep", "100"])?;
    host.call(&["adopt", cgroup.path().to_str().context("a path that is no text")?, "--name", "calm"])?;
    wait_for("a window that is counted", LIMIT, || {
        let views: Vec<InstanceView> = host.get("/v1/profiles")?;
        let profile =
            views.into_iter().find(|view| view.instance.name.as_str() == "calm").and_then(|v| v.profile);
        Ok(profile.filter(|profile| profile.cpu.counted))
    })?;
    drop((host, cgroup));
    calm.wait()?;
    Ok(())
}
