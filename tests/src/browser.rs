//! The page of an agent or a controller in a real browser, which is driven by what is in `rswap-dashboard/check`.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

use crate::{reason_to_skip, skip};

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A browser and what drives it, or why this can't be looked at here.
fn browser() -> Result<PathBuf, &'static str> {
    let found = Command::new("which").arg("chromium").output().ok().filter(|output| output.status.success());
    let path = found.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let path = path.ok_or("there is no chromium on the PATH")?;
    if project().join("rswap-dashboard/node_modules/playwright-core").is_dir() {
        Ok(path)
    } else {
        Err("what drives the browser is not there: `cargo xtask test` fetches it")
    }
}

/// Runs a script of `rswap-dashboard/check` by `command`, which is node on some host. `said` is called for what it asks to be done. With
/// `RSWAP_SCREENSHOTS` it leaves pictures of all views in that directory.
///
/// # Errors
/// What the script found to be wrong.
pub fn look(
    mut command: Command,
    script: &str,
    arguments: &[&str],
    mut said: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    command.arg(project().join("rswap-dashboard/check").join(script)).args(arguments);
    command.args(std::env::var_os("RSWAP_SCREENSHOTS"));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut looking = command.spawn().context("cannot start node")?;
    let lines = BufReader::new(looking.stdout.take().context("node has no output")?).lines();
    let mut wrong = Vec::new();
    for line in lines {
        let line = line?;
        println!("{line}");
        match line.strip_prefix("WRONG: ") {
            Some(what) => wrong.push(what.to_owned()),
            None => said(&line)?,
        }
    }
    let status = looking.wait()?;
    ensure!(status.success() && wrong.is_empty(), "{status}: {wrong:#?}");
    Ok(())
}

/// The browser; `None` if `test` is skipped.
pub fn ready(test: &str) -> Option<String> {
    if reason_to_skip(test).is_some() {
        return None;
    }
    match browser() {
        Ok(path) => Some(path.to_string_lossy().into_owned()),
        Err(reason) => {
            skip(test, reason);
            None
        }
    }
}
