//! PostgreSQL moves with its data directory while money goes to and fro: the sum holds, and nothing acknowledged is lost.

use std::{fs, net::Ipv4Addr};

use rswap_tests::{
    Host,
    converse::converse,
    huge_pages::HugePages,
    moves::{LIMIT, Pair, finish},
    postgres, reason_to_skip, skip,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
/// Moves a server three times while money goes to and fro.
fn the_sum_holds(huge_pages: &str) -> anyhow::Result<()> {
    let pair = Pair::new()?;
    let mounted = pair.fleet.scratch().join("pgdata");
    let volume = format!("data:{}", mounted.display());
    let net = format!("{SERVER}/24");
    let command = postgres::command(&mounted, huge_pages)?;
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    pair.a.run("postgres", &["--net", &net, "--volume", &volume], &words)?;
    postgres::make_tables(&pair.fleet.client, SERVER)?;
    let client = converse(&pair.fleet.client, (SERVER, postgres::PORT).into(), 4, postgres::transfer)?;
    client.wait_for(50, LIMIT)?;
    let moved = pair.three_moves_and("postgres", || {
        client.wait_for(50, LIMIT)?;
        let uses = [&pair.a, &pair.b].into_iter().try_fold(false, |any, host| -> anyhow::Result<bool> {
            Ok(any || host.has_instance("postgres")? && uses_huge_pages(host)?)
        })?;
        anyhow::ensure!(uses == (huge_pages == "on"), "its memory being in huge pages is {uses}");
        Ok(())
    });
    let talked = finish("postgres", client);
    moved.and(talked)?;
    assert!(!pair.fleet.scratch().join("a/volumes/postgres").exists());
    Ok(())
}

/// Whether a process of the server has mapped huge pages that were set aside.
fn uses_huge_pages(host: &Host) -> anyhow::Result<bool> {
    let has = |pid: i32| {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
        smaps.lines().any(|line| line.split_whitespace().eq(["KernelPageSize:", "2048", "kB"]))
    };
    Ok(host.pids("postgres")?.into_iter().any(has))
}

#[test]
fn the_sum_holds_through_three_moves() -> anyhow::Result<()> {
    if reason_to_skip("the_sum_holds_through_three_moves").is_some() {
        return Ok(());
    }
    the_sum_holds("off")
}

#[test]
fn the_sum_holds_in_huge_pages() -> anyhow::Result<()> {
    const TEST: &str = "the_sum_holds_in_huge_pages";
    if reason_to_skip(TEST).is_some() {
        return Ok(());
    }
    // Two copies for the time of a move.
    let huge = HugePages::reserve(48)?;
    if !huge.enough {
        skip(TEST, "this machine has no 96 MiB in huge pages");
        return Ok(());
    }
    the_sum_holds("on")
}
