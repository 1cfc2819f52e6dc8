//! A program of several threads that checks its own memory migrates there and back.

use std::path::Path;

use rswap_tests::{Fleet, Host, HostOptions, binary, heartbeat, reason_to_skip};

/// Pages that each thread rewrites between two rests of 5 ms.
const MODERATE: &str = "8";
const TOO_FAST: &str = "2048";

#[test]
fn every_thread_finds_its_memory_as_it_left_it() -> anyhow::Result<()> {
    if reason_to_skip("every_thread_finds_its_memory_as_it_left_it").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let a = fleet.host("a", &HostOptions::default())?;
    let b = fleet.host("b", &HostOptions::default())?;
    let log = fleet.scratch().join("memcheck.log");
    start(&a, &log, MODERATE)?;

    for (from, to) in [(&a, &b), (&b, &a)] {
        let report = from.migrate("memcheck", &to.migrate_address())?.succeed()?;
        println!("{report:?}");
        assert!(!from.has_instance("memcheck")?, "it is still listed at the source");
        assert!(to.has_instance("memcheck")?, "it is not listed at the destination");
        heartbeat::wait_for_progress(&log)?;
    }
    Ok(())
}

#[test]
fn one_that_writes_faster_than_can_be_sent_stays_and_runs_on() -> anyhow::Result<()> {
    if reason_to_skip("one_that_writes_faster_than_can_be_sent_stays_and_runs_on").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let a = fleet.host("a", &HostOptions::default())?;
    let b = fleet.host("b", &HostOptions::default())?;
    let log = fleet.scratch().join("memcheck.log");
    start(&a, &log, TOO_FAST)?;
    let refusal = a.migrate("memcheck", &b.migrate_address())?.end()?;
    let Err(reason) = refusal else { panic!("it was moved: {refusal:?}") };
    assert!(reason.contains("does not converge"), "{reason}");
    assert!(a.has_instance("memcheck")? && !b.has_instance("memcheck")?);
    heartbeat::wait_for_progress(&log)
}

fn start(host: &Host, log: &Path, pages_per_burst: &str) -> anyhow::Result<()> {
    let memcheck = binary("memcheck")?;
    let log_name = log.to_string_lossy();
    host.run("memcheck", &[], &[&memcheck.to_string_lossy(), &log_name, "4", "16", pages_per_burst])?;
    heartbeat::wait_for_progress(log)
}
