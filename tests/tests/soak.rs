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
const MOVES: usize = 20;
/// After so many moves an agent has all that it needs for one.
const WARM_UP: usize = 6;
/// What an agent may grow by afterwards, and a little for each move: it remembers the last ones.
const GROWTH_KIB: u64 = 2 << 10;
const GROWTH_PER_MOVE_KIB: u64 = 4;
/// Moves over whose sizes the middle one is taken.
const LOOKS: usize = 5;

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
    // The instance is at the same host after the warm-up and at the end.
    let warm_up = WARM_UP + moves % 2;
    let (mut seen, mut settled) = (Vec::new(), None);
    for number in 0..moves {
        let (from, to) = (&hosts[number % 2], &hosts[(number + 1) % 2]);
        let report = from.migrate("redis", &to.migrate_address())?.succeed()?;
        client.wait_for_acks(20, LIMIT)?;
        pipeline.wait_for(100, LIMIT)?;
        let now = sizes(&hosts)?;
        println!("move {}: unavailable {:.1} ms, {now:?}", number + 1, report.unavailability_ms);
        seen.push(now);
        if seen.len() == warm_up {
            // What a move has open for a moment is not what an agent has open.
            settled = Some(settle(&hosts)?);
        }
    }
    wait_for("every journal to be closed", LIMIT, || {
        Ok([hosts[0].open_journals()?, hosts[1].open_journals()?].concat().is_empty().then_some(()))
    })?;
    if let Some(before) = settled.filter(|_| moves > warm_up) {
        wait_for(
            &format!("no more descriptors to be open than the {before:?} after {warm_up} moves"),
            LIMIT,
            || {
                let now = sizes(&hosts)?.map(|size| size.descriptors);
                Ok((now[0] <= before[0] && now[1] <= before[1]).then_some(()))
            },
        )?;
        for host in [0, 1] {
            let middle = |sizes: &[[Size; 2]]| {
                let mut sizes: Vec<u64> = sizes.iter().map(|size| size[host].resident_kib).collect();
                sizes.sort_unstable();
                sizes[sizes.len() / 2]
            };
            let first = middle(&seen[warm_up..(warm_up + LOOKS).min(seen.len())]);
            let last = middle(&seen[seen.len().saturating_sub(LOOKS).max(warm_up)..]);
            println!("host {host}: {first} KiB after {warm_up} moves, {last} KiB at the end");
            let may_grow = GROWTH_KIB + GROWTH_PER_MOVE_KIB * moves as u64;
            assert!(last <= first + may_grow, "an agent grew from {first} to {last} KiB");
        }
    }
    println!("nothing came for {:?} at most", pipeline.finish()?);
    let written = client.finish(&fleet.client)?;
    println!("{written:?}");
    assert_eq!(written.lost_writes, 0);
    assert_eq!(data.wrong_keys(&fleet.client)?, 0);
    Ok(())
}

#[derive(Clone, Copy, Debug)]
struct Size {
    resident_kib: u64,
    descriptors: usize,
}

fn sizes(hosts: &[Host; 2]) -> anyhow::Result<[Size; 2]> {
    let size = |host: &Host| -> anyhow::Result<Size> {
        let pid = host.agent_pid().context("no agent runs")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let resident_kib = line.split_whitespace().next().unwrap_or_default().parse()?;
        Ok(Size { resident_kib, descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() })
    };
    Ok([size(&hosts[0])?, size(&hosts[1])?])
}

/// How many descriptors each agent has open when nothing is under way: the fewest of some looks.
fn settle(hosts: &[Host; 2]) -> anyhow::Result<[usize; 2]> {
    let mut fewest = [usize::MAX; 2];
    for _ in 0..20 {
        let now = sizes(hosts)?.map(|size| size.descriptors);
        fewest = [fewest[0].min(now[0]), fewest[1].min(now[1])];
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(fewest)
}
