//! The demo shows what it promises: it checks that itself, and fails otherwise.

use anyhow::ensure;
use rswap_tests::{reason_to_skip, shown};

#[test]
fn each_move_of_the_demo_comes_before_its_need_and_no_write_is_lost() -> anyhow::Result<()> {
    if reason_to_skip("each_move_of_the_demo_comes_before_its_need_and_no_write_is_lost").is_some() {
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let said = shown::run("demo", scratch.path())?;
    // What its claims are checked by is shown, too.
    for what in ["storage swap", "core swap", "migration"] {
        let line = said.lines().find(|line| line.contains(&format!("the {what} began")));
        ensure!(line.is_some_and(|line| line.contains("before it was needed")), "{what}: {line:?}");
    }
    ensure!(said.matches("before it is needed").count() >= 3, "the plan's reasons are missing");
    ensure!(said.contains("of them lost"), "nothing is said of lost writes");
    Ok(())
}
