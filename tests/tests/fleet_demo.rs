//! The demo of a fleet, as a newcomer runs it: it ends well only if what it shows is true.

use std::{
    fs::{self, File},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_tests::{binary, reason_to_skip, wait_for};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(200);
/// Told to end, it cleans up.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

#[test]
fn the_demo_of_a_fleet_keeps_its_promises() -> anyhow::Result<()> {
    if reason_to_skip("the_demo_of_a_fleet_keeps_its_promises").is_some() {
        return Ok(());
    }
    // It leaves its result below the directory that it is started in.
    let scratch = tempfile::tempdir()?;
    let log = scratch.path().join("log");
    let mut demo = Command::new(binary("demo_fleet")?)
        .current_dir(scratch.path())
        .stdin(Stdio::null())
        .stdout(File::create(&log)?)
        .stderr(File::options().append(true).open(&log)?)
        .spawn()
        .context("cannot start the demo")?;
    let ended = wait_for("the demo to end", LIMIT, || Ok(demo.try_wait()?));
    if ended.is_err() {
        kill(Pid::from_raw(i32::try_from(demo.id())?), Signal::SIGINT)?;
        if wait_for("the demo to clean up", ENDS_WITHIN, || Ok(demo.try_wait()?)).is_err() {
            demo.kill()?;
            demo.wait()?;
        }
    }
    let said = fs::read_to_string(&log)?;
    println!("{said}");
    ensure!(ended?.success(), "the demo failed: {}", said.lines().last().unwrap_or_default());
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
