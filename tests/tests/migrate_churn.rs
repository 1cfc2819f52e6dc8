//! A program that writes all over its memory and gives stretches of it back migrates there and back: the tracker is told of
//! thousands of regions at a look, while more come.

use std::path::Path;

use rswap_tests::{Fleet, HostOptions, heartbeat, reason_to_skip};

#[test]
fn scattered_writes_and_memory_given_back_are_all_carried() -> anyhow::Result<()> {
    if reason_to_skip("scattered_writes_and_memory_given_back_are_all_carried").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    // It is about what is carried, not how fast.
    let options = HostOptions { max_unavailability_ms: 5000, ..HostOptions::default() };
    let (a, b) = (fleet.host("a", &options)?, fleet.host("b", &options)?);
    let log = fleet.scratch().join("churn.log");
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/churn.py");
    a.run("churn", &[], &["python3", &program.to_string_lossy(), &log.to_string_lossy(), "192", "400"])?;
    heartbeat::wait_for_progress(&log)?;
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        let report = from.migrate("churn", &to.migrate_address())?.succeed()?;
        println!("{report:?}");
        // Long enough for the program to look at all its memory.
        for _ in 0..3 {
            heartbeat::wait_for_progress(&log)?;
        }
    }
    assert!(!a.log()?.contains("that no look had reported"), "the last look had to repair the others");
    Ok(())
}
