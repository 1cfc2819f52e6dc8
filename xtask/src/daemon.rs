//! Commands that hand over to a binary of the project: the daemon, its doctor, the demo.

use std::{os::unix::process::CommandExt, process::Command};

use anyhow::Context;

use crate::{compile, setup, step};

/// Runs the daemon on this host.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    need_root("the daemon stops, reads and moves processes of every user")?;
    setup::run()?;
    let rswap = compile::everything(true)?.join("rswap");
    step("Starting the daemon; stop it with Ctrl-C");
    hand_over(Command::new(rswap).arg("agent").args(arguments))
}

/// Asks the agent which kernel features are there.
pub(crate) fn doctor() -> anyhow::Result<()> {
    let rswap = compile::everything(false)?.join("rswap");
    hand_over(Command::new(rswap).arg("doctor"))
}

/// Runs the demo, or that of a fleet, which may `stay`.
pub(crate) fn demo(fleet: bool, stay: bool) -> anyhow::Result<()> {
    need_root("the demo makes network namespaces and cgroups, and runs agents in them")?;
    setup::run()?;
    let bin = compile::everything(true)?;
    let mut demo = Command::new(bin.join(if fleet { "demo_fleet" } else { "demo" }));
    hand_over(demo.args(stay.then_some("--stay")).current_dir(crate::project_root()))
}

/// Says in one sentence that root is needed and why, before anything was touched.
pub(crate) fn need_root(why: &str) -> anyhow::Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "run this as root: {why}");
    Ok(())
}

/// Becomes `command`, so that signals and the exit status are its own.
fn hand_over(command: &mut Command) -> anyhow::Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", command.get_program().display()))
}
