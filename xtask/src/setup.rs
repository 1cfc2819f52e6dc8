//! Makes a new machine ready. Each step is said, and a step that is already done is left out.

use std::fs;

use anyhow::{Context, bail, ensure};
use xshell::{Shell, cmd};

use crate::{ebpf, project_root, step};

/// What the project needs at run time and in its scenarios.
const SYSTEM_PACKAGES: &[&str] = &[
    "redis-server",
    "redis-tools",
    "fio",
    "python3",
    "iproute2",
    "bpftool",
    "procps",
    "util-linux",
    "e2fsprogs",
    "xfsprogs",
    "btrfs-progs",
    "binutils",
    "curl",
    "openssh-client",
    "openssh-server",
    "systemd",
];
/// Programs that the scenarios move.
const MOVED_PACKAGES: &[&str] = &["memcached", "nginx-light", "nodejs", "default-jdk-headless", "golang-go"];
/// What bpf-linker is built against.
const LINKER_PACKAGES: &[&str] =
    &["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev", "libzstd-dev", "build-essential"];
/// A compiler and the source of its `core`, of one version: what `-Z build-std` needs.
const DEBIAN_RUST: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];

const BPF_LINKER_VERSION: &str = "0.13.0";
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// Services that the packages of this list start by themselves when they are installed.
const SERVICES: &[(&str, &str)] = &[
    ("redis-server", "redis-server.service"),
    ("memcached", "memcached.service"),
    ("nginx-light", "nginx.service"),
    ("openssh-server", "ssh.service"),
];

/// Installs what is missing.
pub(crate) fn run() -> anyhow::Result<()> {
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    let mut wanted: Vec<&str> = [SYSTEM_PACKAGES, MOVED_PACKAGES].concat();
    if ebpf::nightly_has_source() {
        step("eBPF compiler: rustup's nightly with rust-src (it is there)");
    } else {
        step("eBPF compiler: Debian's rustc-web, since rustup has no nightly with rust-src here");
        wanted.extend(DEBIAN_RUST);
    }
    let linker_missing = !has_bpf_linker(&shell);
    if linker_missing {
        wanted.extend(LINKER_PACKAGES);
    }
    // Other packages of nodejs than Debian's bring it along, and can't be there next to Debian's npm.
    if !is_found(&shell, "npm") {
        wanted.push("npm");
    }
    install_packages(&shell, &wanted)?;
    install_browser(&shell)?;
    if linker_missing {
        install_bpf_linker(&shell)?;
    } else {
        step(&format!("bpf-linker {BPF_LINKER_VERSION}: there"));
    }
    mount_if_missing("tracefs", "/sys/kernel/tracing")?;
    mount_if_missing("bpf", "/sys/fs/bpf")
}

/// The browser in which the dashboard is checked. Not every release that has the other packages has it: without it, that scenario
/// is skipped.
fn install_browser(shell: &Shell) -> anyhow::Result<()> {
    if is_found(shell, "chromium") || !is_debian_like()? {
        return Ok(());
    }
    step("Installing a browser for the dashboard's scenario: chromium");
    let installed =
        cmd!(shell, "apt-get install --yes --no-install-recommends chromium fonts-dejavu-core").run();
    if installed.is_err() {
        step(
            "No chromium: the dashboard's scenario will be skipped (install one, and see that `chromium` is on the PATH)",
        );
    }
    Ok(())
}

fn is_found(shell: &Shell, program: &str) -> bool {
    cmd!(shell, "which {program}").quiet().ignore_stdout().ignore_stderr().run().is_ok()
}

/// Whether the bpf-linker that is found first is of the version that the project is built with.
fn has_bpf_linker(shell: &Shell) -> bool {
    cmd!(shell, "bpf-linker --version")
        .quiet()
        .ignore_stderr()
        .read()
        .is_ok_and(|version| version.split_whitespace().any(|word| word == BPF_LINKER_VERSION))
}

fn install_packages(shell: &Shell, wanted: &[&str]) -> anyhow::Result<()> {
    if !is_debian_like()? {
        return check_elsewhere(shell);
    }
    let missing: Vec<&str> = wanted.iter().copied().filter(|name| !is_installed(shell, name)).collect();
    if missing.is_empty() {
        step("System packages: all there");
        return Ok(());
    }
    step(&format!("Installing system packages: {}", missing.join(" ")));
    ensure!(
        nix::unistd::geteuid().is_root(),
        "these packages are missing: {0}\nrun `cargo xtask setup` as root, or install them with: apt-get install {0}",
        missing.join(" ")
    );
    let services_before: Vec<bool> = SERVICES.iter().map(|(_, unit)| is_active(shell, unit)).collect();
    shell.set_var("DEBIAN_FRONTEND", "noninteractive");
    let packages = &missing;
    let install = || cmd!(shell, "apt-get install --yes --no-install-recommends {packages...}").run();
    // The lists of a machine that is up to date are good enough; those of a new machine are empty.
    if install().is_err() {
        step("Fetching the package lists, and once more");
        cmd!(shell, "apt-get update").run()?;
        install().with_context(|| no_such_packages(&missing))?;
    }
    for ((package, unit), ran_before) in SERVICES.iter().zip(services_before) {
        if missing.contains(package) && !ran_before && is_active(shell, unit) {
            step(&format!("Stopping {unit}, which its installation started"));
            cmd!(shell, "systemctl disable --now {unit}").run()?;
        }
    }
    Ok(())
}

fn no_such_packages(missing: &[&str]) -> String {
    format!(
        "apt-get could not install {}. If this release does not have llvm-22-dev or rustc-web: use rustup \
         (`rustup toolchain install nightly --component rust-src`) and an LLVM 22 from apt.llvm.org",
        missing.join(" ")
    )
}

/// Anything whose packages are named and installed as Debian's are.
fn is_debian_like() -> anyhow::Result<bool> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    Ok(release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .any(|ids| ids.trim_matches('"').split(' ').any(|id| id == "debian" || id == "ubuntu")))
}

/// Another distribution: nothing is installed, and what is needed is printed if any of it is missing.
fn check_elsewhere(shell: &Shell) -> anyhow::Result<()> {
    let programs =
        ["redis-server", "redis-cli", "fio", "python3", "ip", "bpftool", "nsenter", "bpf-linker", "npm"];
    let missing: Vec<&str> = programs.into_iter().filter(|name| !is_found(shell, name)).collect();
    let nightly = ebpf::nightly_has_source();
    if missing.is_empty() && nightly {
        step("Not Debian or Ubuntu, but all that is needed is there");
        return Ok(());
    }
    bail!(
        "this is neither Debian nor Ubuntu, so nothing was installed. Needed:\n\
         - programs: {} (missing: {})\n\
         - a Rust compiler with the source of core: rustup toolchain install nightly --component rust-src (found: {nightly})\n\
         - LLVM 22 with headers, Polly, zlib and zstd, then: LLVM_PREFIX=<where it is> cargo install bpf-linker \
         --version {BPF_LINKER_VERSION} --no-default-features --features llvm-22 --locked\n\
         then run this again",
        programs.join(", "),
        if missing.is_empty() { "none".to_owned() } else { missing.join(", ") }
    )
}

fn is_installed(shell: &Shell, package: &str) -> bool {
    let format = "${db:Status-Status}";
    cmd!(shell, "dpkg-query --show --showformat={format} {package}")
        .quiet()
        .ignore_stderr()
        .read()
        .is_ok_and(|status| status == "installed")
}

fn is_active(shell: &Shell, unit: &str) -> bool {
    cmd!(shell, "systemctl is-active --quiet {unit}").quiet().ignore_stderr().run().is_ok()
}

fn install_bpf_linker(shell: &Shell) -> anyhow::Result<()> {
    step(&format!("Installing bpf-linker {BPF_LINKER_VERSION} (about a minute)"));
    // Whoever has an LLVM 22 elsewhere says so in the environment.
    if std::env::var_os("LLVM_PREFIX").is_none() {
        shell.set_var("LLVM_PREFIX", LLVM_PREFIX);
    }
    cmd!(
        shell,
        "cargo install bpf-linker --version {BPF_LINKER_VERSION} --no-default-features --features llvm-22 --locked"
    )
    .run()?;
    ensure!(
        has_bpf_linker(shell),
        "bpf-linker {BPF_LINKER_VERSION} was installed, but another or none is found: put cargo's bin directory first in PATH"
    );
    Ok(())
}

/// Mounts a kernel file system where the system did not do it. Without privileges it is only said.
fn mount_if_missing(kind: &str, target: &str) -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    // Everything behind " - " is the kind, the source and the options; tracefs may be elsewhere too.
    if mounts
        .lines()
        .any(|line| line.split_once(" - ").is_some_and(|(_, fs)| fs.split(' ').next() == Some(kind)))
    {
        step(&format!("{kind}: mounted"));
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        step(&format!("{kind} is not mounted; as root: mount -t {kind} {kind} {target}"));
        return Ok(());
    }
    step(&format!("Mounting {kind} at {target}"));
    nix::mount::mount(Some(kind), target, Some(kind), nix::mount::MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount {kind} at {target}"))
}
