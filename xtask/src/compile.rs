//! What the agent carries in itself first (the eBPF programs, the dashboard's libraries), then the host-side crates.

use std::path::PathBuf;

use xshell::{Shell, cmd};

use crate::{dashboard, ebpf, project_root, step};

/// Builds every binary and returns the directory that they are in.
///
/// All of the workspace at once, also where only the agent is needed: another choice of packages is
/// another choice of features to cargo, and would build the dependencies a second time.
pub(crate) fn everything(release: bool) -> anyhow::Result<PathBuf> {
    what_it_carries(release)?;
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    step(if release { "Building the agent, optimised" } else { "Building the agent" });
    let profile = release.then_some("--release");
    cmd!(shell, "cargo build --workspace --bins --locked {profile...}").run()?;
    Ok(target_dir().join(if release { "release" } else { "debug" }))
}

/// Builds what the agent carries in itself.
pub(crate) fn what_it_carries(release: bool) -> anyhow::Result<()> {
    step("Building the eBPF programs");
    ebpf::build(release)?;
    dashboard::build()
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => project_root().join(dir),
        None => project_root().join("target"),
    }
}
