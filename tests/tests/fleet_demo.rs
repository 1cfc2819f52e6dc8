//! The demo of a fleet, as a newcomer runs it: it ends well only if what it shows is true.

use std::fs;

use anyhow::ensure;
use rswap_tests::{reason_to_skip, shown};
use serde_json::Value;

#[test]
fn the_demo_of_a_fleet_keeps_its_promises() -> anyhow::Result<()> {
    if reason_to_skip("the_demo_of_a_fleet_keeps_its_promises").is_some() {
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let said = shown::run("demo_fleet", scratch.path())?;
    let result: Value =
        serde_json::from_slice(&fs::read(scratch.path().join("target/rswap/demo-fleet.json"))?)?;
    ensure!(
        result["drain"]["acked_writes"].as_u64() > Some(400),
        "the client wrote next to nothing: {result}"
    );
    ensure!(result["loss"]["reports_taken"].as_u64() > Some(30), "next to nothing was reported: {result}");
    ensure!(
        said.contains("the controller's dashboard") && said.contains("http://127.0.0.1:"),
        "no address is shown"
    );
    Ok(())
}
