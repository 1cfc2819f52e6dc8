//! The demo shows what it promises: it checks that itself, and fails otherwise.

use std::{
    fs::{self, File},
    process::Command,
    time::Duration,
};

use anyhow::ensure;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_tests::{binary, reason_to_skip, wait_for};

/// Three days of 24 s, and what comes before and after; five, if it does not move.
const LIMIT: Duration = Duration::from_secs(200);
/// Told to end, it cleans up.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

#[test]
fn each_move_of_the_demo_comes_before_its_need_and_no_write_is_lost() -> anyhow::Result<()> {
    if reason_to_skip("each_move_of_the_demo_comes_before_its_need_and_no_write_is_lost").is_some() {
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let log = scratch.path().join("log");
    let mut demo = Command::new(binary("demo")?)
        .current_dir(scratch.path())
        .stdout(File::create(&log)?)
        .stderr(File::options().append(true).open(&log)?)
        .spawn()?;
    let ended = wait_for("the demo to end", LIMIT, || Ok(demo.try_wait()?));
    if ended.is_err() {
        kill(Pid::from_raw(demo.id() as i32), Signal::SIGINT)?;
        if wait_for("the demo to clean up", ENDS_WITHIN, || Ok(demo.try_wait()?)).is_err() {
            demo.kill()?;
            demo.wait()?;
        }
    }
    let said = fs::read_to_string(&log)?;
    println!("{said}");
    ensure!(ended?.success(), "the demo failed: {}", said.lines().last().unwrap_or_default());
    // What its claims are checked by is shown, too.
    for what in ["storage swap", "core swap", "migration"] {
        let line = said.lines().find(|line| line.contains(&format!("the {what} began")));
        ensure!(line.is_some_and(|line| line.contains("before it was needed")), "{what}: {line:?}");
    }
    ensure!(said.matches("before it is needed").count() >= 3, "the plan's reasons are missing");
    ensure!(said.contains("of them lost"), "nothing is said of lost writes");
    Ok(())
}
