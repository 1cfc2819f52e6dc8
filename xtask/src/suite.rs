//! `cargo xtask test`: everything that has to hold, from formatting to migrations of real programs.
//!
//! The programs and their tests are built once, by one cargo call over the whole workspace, and then started
//! from here: a second call with another choice of packages or targets would build dependencies, and the agent, again.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::Deserialize;
use xshell::{Shell, cmd};

use crate::{compile, dashboard, pauses, project_root, rerun, setup, step};

/// No test binary runs longer than this; a migration that hangs must not hang the build.
const BINARY_DEADLINE: Duration = Duration::from_secs(600);
/// As many test binaries are named with their time at the end.
const SLOWEST: usize = 10;

/// Runs the suite, or only the scenario files whose name contains `only`.
pub(crate) fn run(only: Option<&str>) -> anyhow::Result<()> {
    let started = Instant::now();
    setup::run()?;
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    dashboard::ready_to_check()?;
    compile::what_it_carries(false)?;
    let mut failures = Vec::new();
    if only.is_none() {
        checks(&shell, &mut failures);
    }
    let pause_log = pause_log();
    // Those of the last run; there may be none.
    let _ = fs::remove_file(&pause_log);
    step("Building the agent and the tests");
    let binaries = test_binaries()?;
    let bin_dir = compile::target_dir().join("debug");
    if only.is_none() {
        step("Examples in the documentation");
        if let Err(error) = cmd!(shell, "cargo test --workspace --locked --doc --quiet").run() {
            eprintln!("{error}");
            failures.push("examples in the documentation".to_owned());
        }
    }
    let mut total = Counts::default();
    let mut unsteady = Vec::new();
    let mut accounts = Vec::new();
    let mut times = Vec::new();
    for binary in &binaries {
        let chosen = only.is_none_or(|text| binary.scenario && binary.name.contains(text));
        if !chosen {
            continue;
        }
        step(&format!("{} {}", if binary.scenario { "Scenarios:" } else { "Unit tests:" }, binary.name));
        let began = Instant::now();
        let mut outcome = run_binary(binary, &bin_dir, None)?;
        for name in rerun::failed(&outcome.output) {
            let said = rerun::account(name, &outcome.output);
            accounts.push(format!("{}: {name} said last:\n    {}", binary.name, said.join("\n    ")));
        }
        if binary.scenario {
            for name in rerun::worth_a_second_try(&outcome.output) {
                step(&format!("Once more, alone: {} {name}", binary.name));
                if run_binary(binary, &bin_dir, Some(&name))?.counts == Counts::one_passed() {
                    outcome.counts.failed -= 1;
                    outcome.counts.passed += 1;
                    unsteady.push(format!("{}: {name}", binary.name));
                }
            }
        }
        if outcome.counts.failed > 0 {
            failures.push(binary.name.clone());
        }
        total.add(&outcome.counts);
        times.push((began.elapsed().as_secs(), &binary.name));
    }
    times.sort_unstable_by(|a, b| b.cmp(a));
    let slowest: Vec<String> =
        times.iter().take(SLOWEST).map(|(seconds, name)| format!("{name} {seconds} s")).collect();
    let results = compile::target_dir().join("rswap");
    fs::create_dir_all(&results).with_context(|| format!("cannot make {}", results.display()))?;
    pauses::report(&pause_log, &results.join("pauses.json"))?;
    println!("\nslowest: {}", slowest.join(", "));
    // Once more at the end: what shows a long log may leave out the middle.
    for account in &accounts {
        println!("{account}");
    }
    for name in &unsteady {
        println!("UNSTEADY: {name} failed at first and passed when it was run again: find out why");
    }
    if !failures.is_empty() {
        println!("\nfailed: {}", failures.join(", "));
    }
    println!("took {} s", started.elapsed().as_secs());
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    ensure!(failures.is_empty(), "{} of the steps failed", failures.len());
    Ok(())
}

/// Where scenarios note how long their programs stood still.
fn pause_log() -> PathBuf {
    compile::target_dir().join("pauses.log")
}

/// Formatting, lints and licences. All are run, so that one run says everything that is wrong.
fn checks(shell: &Shell, failures: &mut Vec<String>) {
    let mut check = |name: &str, command: xshell::Cmd<'_>| {
        step(name);
        if let Err(error) = command.run() {
            eprintln!("{error}");
            failures.push(name.to_owned());
        }
    };
    check("Formatting", cmd!(shell, "cargo fmt --all --check"));
    if project_root().join("rswap-ebpf/Cargo.toml").exists() {
        check(
            "Formatting of the eBPF programs",
            cmd!(shell, "cargo fmt --manifest-path rswap-ebpf/Cargo.toml --check"),
        );
    }
    check("Formatting of the dashboard", cmd!(shell, "npm --prefix rswap-dashboard run check-format"));
    check("Lints", cmd!(shell, "cargo clippy --workspace --all-targets --locked -- -D warnings"));
    if cmd!(shell, "cargo deny --version").quiet().ignore_stderr().read().is_ok() {
        check(
            "Licences and sources of the dependencies",
            cmd!(shell, "cargo deny check licenses bans sources"),
        );
    } else {
        step(
            "Licences and sources of the dependencies: not checked, cargo-deny is not installed (cargo install cargo-deny)",
        );
    }
}

/// A compiled test binary.
struct TestBinary {
    name: String,
    path: PathBuf,
    package_dir: PathBuf,
    scenario: bool,
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
fn test_binaries() -> anyhow::Result<Vec<TestBinary>> {
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

/// What a test binary's own summary said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    /// What a runner says of a single test that passed.
    fn one_passed() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
fn parse_summary(line: &str) -> Option<Counts> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = Counts::default();
    for part in numbers.split("; ") {
        match part.split_once(' ') {
            Some((number, "passed")) => counts.passed = number.parse().ok()?,
            Some((number, "failed")) => counts.failed = number.parse().ok()?,
            Some((number, "ignored")) => counts.skipped = number.parse().ok()?,
            _ => {}
        }
    }
    Some(counts)
}

/// What a test binary came to.
struct Outcome {
    counts: Counts,
    output: Vec<String>,
}

/// Runs one test binary (or only its test `only`), passing its output on, and stops it if it hangs.
fn run_binary(binary: &TestBinary, bin_dir: &Path, only: Option<&str>) -> anyhow::Result<Outcome> {
    use std::os::unix::process::CommandExt;
    let skip_log = compile::target_dir().join("skipped.log");
    fs::write(&skip_log, "").with_context(|| format!("cannot write {}", skip_log.display()))?;
    // A shell without job control leaves these ignored for what it starts in the background, and so they would be for every
    // program of a test that ends one by Ctrl-C.
    let mut command = Command::new("env");
    command
        .arg("--default-signal=INT,QUIT")
        .arg(&binary.path)
        .current_dir(&binary.package_dir)
        .env("RSWAP_BIN_DIR", bin_dir)
        // A test that finds that it cannot run here writes a line to this file.
        .env("RSWAP_SKIP_LOG", &skip_log)
        .env("RSWAP_PAUSE_LOG", pause_log())
        .stdout(Stdio::piped())
        .process_group(0);
    if binary.scenario {
        // Scenarios measure time and use the machine's cores and cgroups: one at a time.
        command.arg("--test-threads=1");
    }
    if let Some(name) = only {
        command.args(["--exact", name]);
    }
    let mut child = command.spawn().with_context(|| format!("cannot start {}", binary.path.display()))?;
    let stdout = child.stdout.take().context("the test binary has no output")?;
    let (sender, lines) = mpsc::channel();
    let reader = thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + BINARY_DEADLINE;
    let mut summary = None;
    let mut output = Vec::new();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                summary = parse_summary(&line).or(summary);
                println!("{line}");
                output.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                println!("{} did not end within {} s: killed", binary.name, BINARY_DEADLINE.as_secs());
                let group = Pid::from_raw(i32::try_from(child.id()).context("a pid that is no pid")?);
                killpg(group, Signal::SIGKILL).context("cannot kill the test that hangs")?;
                break;
            }
        }
    }
    let status = child.wait().context("cannot wait for the test binary")?;
    // What the killed test left running may hold the pipe open: the reader is not waited for then.
    if summary.is_some() {
        reader.join().ok();
    }
    let mut counts = summary.unwrap_or_default();
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
    }
    let skips = fs::read_to_string(&skip_log).unwrap_or_default();
    for skip in skips.lines() {
        println!("skipped: {skip}");
        // The test itself could only return, so its runner counted it among those that passed.
        counts.skipped += 1;
        counts.passed = counts.passed.saturating_sub(1);
    }
    Ok(Outcome { counts, output })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_runners_summary() {
        let line = "test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 3 filtered out; finished in 0.01s";
        assert_eq!(parse_summary(line), Some(Counts { passed: 12, failed: 1, skipped: 2 }));
        assert_eq!(parse_summary("test tests::it ... ok"), None);
    }
}
