//! A program of several threads that checks its own memory migrates there and back.

use std::{fs, path::Path, time::Duration};

use anyhow::Context;
use rswap_tests::{Fleet, Host, HostOptions, binary, reason_to_skip, wait_for};

const LIMIT: Duration = Duration::from_secs(20);
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
        wait_for_progress(&log)?;
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
    wait_for_progress(&log)
}

fn start(host: &Host, log: &Path, pages_per_burst: &str) -> anyhow::Result<()> {
    let memcheck = binary("memcheck")?;
    let log_name = log.to_string_lossy();
    host.run("memcheck", &[], &[&memcheck.to_string_lossy(), &log_name, "4", "16", pages_per_burst])?;
    wait_for_progress(log)
}

/// Waits for fifty further heartbeats and many verified pages; a line out of order, or a mismatch, is an error.
fn wait_for_progress(log: &Path) -> anyhow::Result<()> {
    let before = read(log)?;
    wait_for("memcheck to go on", LIMIT, || {
        let now = read(log)?;
        Ok((now.lines >= before.lines + 50 && now.verified > before.verified + 1000).then_some(()))
    })
}

#[derive(Default)]
struct Log {
    lines: u64,
    verified: u64,
}

fn read(path: &Path) -> anyhow::Result<Log> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut log = Log::default();
    // A last line without its end is still being written.
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        let wanted = format!("line={} verified=", log.lines);
        let verified =
            line.strip_prefix(&wanted).with_context(|| format!("{wanted}... was due, not {line:?}"))?;
        let verified: u64 = verified.parse().with_context(|| format!("{line:?} has no count"))?;
        anyhow::ensure!(verified >= log.verified, "it counted backwards in {line:?}");
        log = Log { lines: log.lines + 1, verified };
    }
    Ok(log)
}
