//! Instances that come and go leave nothing in the profiler: no entries of maps, no descriptors, no memory. `cargo xtask soak --profile MINUTES` does it for long.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rswap_agent::{profile::Profile, status::InstanceView};
use rswap_tests::{
    Fleet, Host, HostOptions,
    bench::{process, turns::OwnCgroup},
    moves, reason_to_skip, wait_for,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
/// At a time.
const INSTANCES: usize = 8;
/// How long it takes in the suite, in seconds: what is learnt of the first rounds is not a leak.
const SECONDS: u64 = 20;
const WARM_UP_ROUNDS: usize = 3;
/// What an agent may grow by: the allocator keeps some of what was free. By the minute it may be less.
const GROWTH_KIB: u64 = 3 << 10;

/// Who uses disks beside instances, at a time. Of cgroups that have gone nobody is known for long.
const DISK_USERS: u64 = 256;

/// Descriptors of what asks it, which come and go.
const PASSING: usize = 2;

/// Each makes cgroups in its own, and connections with itself, of which one is there already when it is adopted; and sleeps.
const COMES_AND_GOES: &str = r#"
import os, socket, struct, sys, time
root, number = sys.argv[1], 0
server = socket.create_server(("127.0.0.1", 0))
def connection():
    one = socket.create_connection(server.getsockname())
    # Reset at its end, it leaves no port behind that waits.
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return one, server.accept()[0]
kept = connection()
while True:
    path = f"{root}/{number % 4}"
    os.mkdir(path)
    one, two = connection()
    for ends in (one, two), kept:
        ends[0].sendall(b"x")
        ends[1].recv(1)
    time.sleep(0.01)
    one.close()
    two.close()
    os.rmdir(path)
    number += 1
"#;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size {
    /// Of its own: what it maps of files is the program's text, and the programs' records, some of which come with each block device of the host.
    anonymous_kib: u64,
    descriptors: usize,
    known: u64,
    children: u64,
    slots_free: u64,
    connections: u64,
    disk_users: u64,
}

fn size(host: &Host) -> anyhow::Result<Size> {
    let pid = host.agent_pid().context("no agent runs")?;
    let status: Value = host.get("/v1/status")?;
    let number = |of: &str, name: &str| {
        status[of][name].as_u64().with_context(|| format!("no {name} in {of}: {status}"))
    };
    Ok(Size {
        anonymous_kib: process::status_kib(pid, "RssAnon:")?,
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        known: number("cgroups", "known")?,
        children: number("cgroups", "children")?,
        slots_free: number("bookkeeping", "slots_free")?,
        connections: number("bookkeeping", "connections")?,
        disk_users: number("bookkeeping", "disk_users")?,
    })
}

/// Some instances come, are profiled, and go.
fn round(host: &Host, number: usize) -> anyhow::Result<()> {
    let python = moves::python()?;
    let python = python.to_str().context("a path that is no text")?;
    let (mut cgroups, mut children) = (Vec::new(), Vec::new());
    for place in 0..INSTANCES {
        let cgroup = OwnCgroup::new(&format!("soak{number}-{place}"))?;
        let path = cgroup.path().to_str().context("a path that is no text")?.to_owned();
        let command = [python, "-c", COMES_AND_GOES, &path];
        children.push(cgroup.start(&command)?);
        // Half of the names are new ones each time.
        let name = if place % 2 == 0 { format!("i{place}") } else { format!("i{place}-{number}") };
        host.call(&["adopt", &path, "--name", &name])?;
        cgroups.push(cgroup);
    }
    wait_for("all to be profiled", LIMIT, || {
        let views: Vec<InstanceView> = host.get("/v1/profiles")?;
        let profiles = views.iter().filter_map(|view| view.profile.as_ref());
        let has_talked = |profile: &&Profile| !profile.tcp_counted || profile.tcp.bytes_in > 0;
        Ok((profiles.filter(has_talked).count() == INSTANCES).then_some(()))
    })?;
    let during = size(host)?;
    ensure!(during.known >= INSTANCES as u64, "{during:?}");
    ensure!(during.connections >= INSTANCES as u64, "each has one that stays: {during:?}");
    drop(cgroups);
    children.iter_mut().for_each(|child| drop(child.wait()));
    wait_for("none to be left", LIMIT, || {
        let status: Value = host.get("/v1/status")?;
        Ok((status["instances"] == 0).then_some(()))
    })
}

#[test]
fn instances_that_come_and_go_leave_nothing_in_the_profiler() -> anyhow::Result<()> {
    if reason_to_skip("instances_that_come_and_go_leave_nothing_in_the_profiler").is_some() {
        return Ok(());
    }
    let seconds = match std::env::var("RSWAP_SOAK_PROFILE_SECONDS") {
        Ok(seconds) => seconds.parse().context("RSWAP_SOAK_PROFILE_SECONDS is no number")?,
        Err(_) => SECONDS,
    };
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &HostOptions { window_ms: 200, ..HostOptions::default() })?;
    let slots_free = size(&host)?.slots_free;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut seen = Vec::new();
    while seen.len() < WARM_UP_ROUNDS + 2 || Instant::now() < end {
        round(&host, seen.len())?;
        let now = wait_for("nothing to be known", LIMIT, || {
            let now = size(&host)?;
            let nothing = now.known == 0 && now.children == 0 && now.connections == 0;
            Ok((nothing && now.slots_free == slots_free).then_some(now))
        })?;
        println!("round {}: {now:?}", seen.len() + 1);
        ensure!(now.disk_users <= DISK_USERS, "{now:?}");
        seen.push(now);
    }
    let (first, last) = (seen[WARM_UP_ROUNDS - 1], seen.iter().rev().take(2));
    let descriptors = last.clone().map(|size| size.descriptors).min().context("two rounds")?;
    let anonymous_kib = last.map(|size| size.anonymous_kib).min().context("two rounds")?;
    ensure!(
        descriptors <= first.descriptors + PASSING,
        "{} descriptors were open, and are {descriptors}",
        first.descriptors
    );
    ensure!(
        anonymous_kib <= first.anonymous_kib + GROWTH_KIB,
        "it grew from {} to {anonymous_kib} KiB",
        first.anonymous_kib
    );
    Ok(())
}
