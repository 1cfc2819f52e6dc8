//! A demo, run as its user runs it.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{binary, wait_for};

/// Longer than a demo takes that does not find what it shows: it gives up by itself.
const LIMIT: Duration = Duration::from_secs(240);
/// Told to end, it cleans up.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// Runs this demo to its end, and returns what it said. It leaves its result below `directory`.
///
/// # Errors
/// What it shows is not true, or it did not end.
pub fn run(demo: &str, directory: &Path) -> anyhow::Result<String> {
    let log = directory.join("log");
    let mut demo = Command::new(binary(demo)?)
        .current_dir(directory)
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
    Ok(said)
}
