//! The demo of a fleet, as a newcomer runs it: it ends well only if what it shows is true.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use rswap_tests::{binary, reason_to_skip};
use serde_json::Value;

#[test]
fn the_demo_of_a_fleet_keeps_its_promises() -> anyhow::Result<()> {
    if reason_to_skip("the_demo_of_a_fleet_keeps_its_promises").is_some() {
        return Ok(());
    }
    // It leaves its result below the directory that it is started in.
    let scratch = tempfile::tempdir()?;
    let mut demo = Command::new(binary("demo_fleet")?);
    let output =
        demo.current_dir(scratch.path()).stdin(Stdio::null()).output().context("cannot start the demo")?;
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    let result: Value =
        serde_json::from_slice(&std::fs::read(scratch.path().join("target/rswap/demo-fleet.json"))?)?;
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
