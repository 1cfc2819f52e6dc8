//! What passes a network, besides data: announcements and resets.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::Context;

use crate::{moves::program, netns::Netns, wait_for};

/// How long an announcement may take until it is seen.
const LIMIT: Duration = Duration::from_secs(10);

/// Somebody who watches an interface, until it is dropped.
#[derive(Debug)]
pub struct Wire {
    watcher: Child,
    log: PathBuf,
}

impl Wire {
    /// Watches `interface` of a namespace, and notes what it sees in `log`. Returns when it watches.
    pub fn watch(netns: &Netns, interface: &str, log: &Path) -> anyhow::Result<Self> {
        let output = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut command = netns.command(Path::new("python3"));
        command.arg(program("wire.py")).arg(interface).stdout(output).stdin(Stdio::null());
        let watcher = command.spawn().context("cannot watch the network")?;
        let wire = Self { watcher, log: log.to_owned() };
        wire.wait_for("ready", 1)?;
        Ok(wire)
    }

    /// How often this was seen.
    pub fn seen(&self, line: &str) -> anyhow::Result<usize> {
        Ok(fs::read_to_string(&self.log)?.lines().filter(|seen| *seen == line).count())
    }

    /// Waits until it was seen so often.
    pub fn wait_for(&self, line: &str, times: usize) -> anyhow::Result<()> {
        wait_for(&format!("{line:?} on the network, {times} times"), LIMIT, || {
            Ok((self.seen(line)? >= times).then_some(()))
        })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = self.watcher.kill();
        let _ = self.watcher.wait();
    }
}
