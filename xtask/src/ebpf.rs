//! Builds the eBPF programs to `target/ebpf/rswap-ebpf`, with whichever toolchain this machine has for it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";

/// A compiler that can build `core` for the eBPF target, and why it was taken.
#[derive(Debug, PartialEq, Eq)]
enum Toolchain {
    /// rustup's nightly, with the `rust-src` component.
    RustupNightly,
    /// Debian's `rustc-web`, `cargo-web` and `rust-web-src`.
    Debian,
}

impl Toolchain {
    fn why(&self) -> &'static str {
        match self {
            Self::RustupNightly => "rustup's nightly: it is installed with rust-src",
            Self::Debian => {
                "Debian's rustc-web (with RUSTC_BOOTSTRAP=1): rustup's nightly is absent or has no rust-src"
            }
        }
    }
}

/// Builds the eBPF object and returns its path. `release` is the profile of the agent that will embed it;
/// the programs themselves are always optimised, since the kernel's verifier accepts no others.
pub(crate) fn build(release: bool) -> Result<PathBuf> {
    let root = workspace_root();
    require_linker()?;
    let toolchain = choose(nightly_has_source(), debian_has_source())?;
    let profile = if release { "release" } else { "debug" };
    println!("eBPF programs (for a {profile} agent): built with {}", toolchain.why());

    let build_dir = root.join("target/ebpf/build");
    let mut command = match toolchain {
        Toolchain::RustupNightly => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo"]);
            command
        }
        Toolchain::Debian => {
            let mut command = Command::new(DEBIAN_CARGO);
            command.env("RUSTC_BOOTSTRAP", "1");
            command
        }
    };
    // This runs under another cargo, whose choices of compiler and flags are for the host.
    for variable in [
        "CARGO",
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "RUSTUP_TOOLCHAIN",
        "RUSTDOC",
    ] {
        command.env_remove(variable);
    }
    if toolchain == Toolchain::Debian {
        command.env("RUSTC", DEBIAN_RUSTC);
    }
    command
        .current_dir(root.join("rswap-ebpf"))
        .args(["build", "--quiet", "--locked", "--release", "--target", TARGET, "-Z", "build-std=core"])
        .arg("--target-dir")
        .arg(&build_dir);
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    if !status.success() {
        bail!("the eBPF programs did not compile ({status}): see the compiler's messages above");
    }

    let built = build_dir.join(TARGET).join("release/rswap-ebpf");
    let object = root.join("target/ebpf/rswap-ebpf");
    replace(&built, &object)?;
    Ok(object)
}

/// Replaces `to` by `from` if it differs: what is embedded must not rebuild the agent when it did not change.
pub(crate) fn replace(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    fs::write(to, new).with_context(|| format!("write {}", to.display()))
}

fn choose(nightly: bool, debian: bool) -> Result<Toolchain> {
    match (nightly, debian) {
        (true, _) => Ok(Toolchain::RustupNightly),
        (false, true) => Ok(Toolchain::Debian),
        (false, false) => bail!(
            "no compiler here can build for {TARGET}: run `rustup toolchain install nightly --component rust-src`, \
             or on Debian `apt-get install rustc-web cargo-web rust-web-src` (`cargo xtask setup` does it)"
        ),
    }
}

/// Whether rustup has a nightly compiler with the source of `core`.
pub(crate) fn nightly_has_source() -> bool {
    let output = Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output();
    output.is_ok_and(|output| output.status.success() && sysroot_has_source(&output.stdout))
}

fn debian_has_source() -> bool {
    let output = Command::new(DEBIAN_RUSTC).args(["--print", "sysroot"]).output();
    Path::new(DEBIAN_CARGO).exists()
        && output.is_ok_and(|output| output.status.success() && sysroot_has_source(&output.stdout))
}

fn sysroot_has_source(printed: &[u8]) -> bool {
    let sysroot = String::from_utf8_lossy(printed);
    Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
}

fn require_linker() -> Result<()> {
    let found =
        Command::new("bpf-linker").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        bail!("bpf-linker is not on the PATH: run `cargo xtask setup`, or `cargo install bpf-linker`");
    }
    Ok(())
}

fn workspace_root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rustups_nightly_is_taken_before_debians() {
        assert_eq!(choose(true, true).unwrap(), Toolchain::RustupNightly);
        assert_eq!(choose(false, true).unwrap(), Toolchain::Debian);
        let refusal = choose(false, false).unwrap_err().to_string();
        assert!(refusal.contains("cargo xtask setup"), "{refusal}");
    }
}
