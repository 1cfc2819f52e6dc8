//! The programs and tests of the workspace, as one cargo call builds them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use serde::Deserialize;

use crate::project_root;

/// A compiled test binary.
pub(super) struct TestBinary {
    /// Its name; a unit test's has its package before it.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) package_dir: PathBuf,
    /// Whether it runs real programs.
    pub(super) scenario: bool,
}

#[derive(Deserialize)]
struct CargoMessage {
    reason: String,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<CargoTarget>,
    profile: Option<CargoProfile>,
}

#[derive(Deserialize)]
struct CargoTarget {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct CargoProfile {
    test: bool,
}

/// Compiles all programs and all tests; unit tests come first, since they fail fastest.
pub(super) fn test_binaries() -> anyhow::Result<Vec<TestBinary>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--workspace",
            "--locked",
            "--bins",
            "--tests",
            "--message-format=json-render-diagnostics",
        ])
        .current_dir(project_root())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(output.status.success(), "the programs or their tests do not compile");
    let mut binaries = Vec::new();
    for line in output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let message: CargoMessage =
            serde_json::from_slice(line).context("cargo said something unexpected")?;
        let (Some(path), Some(manifest), Some(target), Some(profile)) =
            (message.executable, message.manifest_path, message.target, message.profile)
        else {
            continue;
        };
        if message.reason != "compiler-artifact" || !profile.test {
            continue;
        }
        let package_dir = manifest.parent().unwrap_or(Path::new(".")).to_owned();
        let scenario =
            package_dir == project_root().join("tests") && target.kind.iter().any(|kind| kind == "test");
        let package = package_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = if scenario { target.name } else { format!("{package}/{}", target.name) };
        binaries.push(TestBinary { name, path, package_dir, scenario });
    }
    ensure!(!binaries.is_empty(), "cargo named no test binary");
    binaries.sort_by(|a, b| (a.scenario, &a.name).cmp(&(b.scenario, &b.name)));
    Ok(binaries)
}
