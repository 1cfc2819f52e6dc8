//! Moves in a row, under load: nothing is lost, and the agents don't grow. `cargo xtask soak` makes 200 of them.

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::Context;
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{DataSet, REDIS, VerifyingClient},
    persistent, reason_to_skip, wait_for,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 8 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// In the suite.
const MOVES: u32 = 8;
/// After so many moves an agent has all that it needs for one.
const WARM_UP: u32 = 4;
/// What an agent may grow by afterwards: its allocator's caches come and go with threads.
const GROWTH_KIB: u64 = 48 << 10;
const GROWTH_DESCRIPTORS: usize = 8;

#[test]
fn moves_in_a_row_lose_nothing_and_leave_nothing() -> anyhow::Result<()> {
    if reason_to_skip("moves_in_a_row_lose_nothing_and_leave_nothing").is_some() {
        return Ok(());
    }
    let moves = match std::env::var("RSWAP_SOAK_MOVES") {
        Ok(moves) => moves.parse().context("RSWAP_SOAK_MOVES is no number")?,
        Err(_) => MOVES,
    };
    let mut fleet = Fleet::new()?;
    let options = HostOptions { max_unavailability_ms: 3000, ..HostOptions::default() };
    let hosts = [fleet.host("a", &options)?, fleet.host("b", &options)?];
    hosts[0].run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
    let data = DataSet::load(&fleet.client, SERVER, DATA_BYTES)?;
    let client = VerifyingClient::start(&fleet.client, SERVER, Duration::from_millis(1))?;
    let pipeline = persistent::pipeline(&fleet.client, SERVER)?;
    client.wait_for_acks(50, LIMIT)?;
    let mut before = Vec::new();
    for number in 0..moves {
        if number == WARM_UP {
            before = sizes(&hosts)?;
        }
        let (from, to) = (&hosts[number as usize % 2], &hosts[(number as usize + 1) % 2]);
        let report = from.migrate("redis", &to.migrate_address())?.succeed()?;
        client.wait_for_acks(20, LIMIT)?;
        pipeline.wait_for(100, LIMIT)?;
        println!("move {}: unavailable {:.1} ms, {:?}", number + 1, report.unavailability_ms, sizes(&hosts)?);
    }
    wait_for("every journal to be closed", LIMIT, || {
        Ok([hosts[0].open_journals()?, hosts[1].open_journals()?].concat().is_empty().then_some(()))
    })?;
    for (before, after) in before.iter().zip(sizes(&hosts)?) {
        let within = |name: &str, before: u64, after: u64, more: u64| {
            assert!(after <= before + more, "an agent's {name} grew from {before} to {after}");
        };
        within("memory (KiB)", before.resident_kib, after.resident_kib, GROWTH_KIB);
        let more = GROWTH_DESCRIPTORS;
        within("descriptors", before.descriptors as u64, after.descriptors as u64, more as u64);
    }
    println!("nothing came for {:?} at most", pipeline.finish()?);
    let seen = client.finish(&fleet.client)?;
    println!("{seen:?}");
    assert_eq!(seen.lost_writes, 0);
    assert_eq!(data.wrong_keys(&fleet.client)?, 0);
    Ok(())
}

#[derive(Clone, Copy, Debug)]
struct Size {
    resident_kib: u64,
    descriptors: usize,
}

fn sizes(hosts: &[Host]) -> anyhow::Result<Vec<Size>> {
    let size = |host: &Host| -> anyhow::Result<Size> {
        let pid = host.agent_pid().context("no agent runs")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let resident_kib = line.split_whitespace().next().unwrap_or_default().parse()?;
        Ok(Size { resident_kib, descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() })
    };
    hosts.iter().map(size).collect()
}
