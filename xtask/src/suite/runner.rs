//! One test binary at work.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::{binaries::TestBinary, pause_log};
use crate::{compile, step};

/// No test binary runs longer than this; a migration that hangs must not hang the build.
const BINARY_DEADLINE: Duration = Duration::from_secs(600);

/// What a test binary's own summary said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) passed: u64,
    pub(super) failed: u64,
    pub(super) skipped: u64,
}

impl Counts {
    /// What a runner says of a single test that passed.
    pub(super) fn one_passed() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    pub(super) fn add(&mut self, other: &Self) {
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
pub(super) struct Outcome {
    pub(super) counts: Counts,
    pub(super) output: Vec<String>,
    /// It came to its summary: it did not hang, and was not killed.
    pub(super) complete: bool,
}

/// When what a test binary says is passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Voice {
    /// At once.
    Live,
    /// When it has ended, as others run beside it.
    AtTheEnd,
}

/// Runs one test binary (or only its test `only`), and stops it if it hangs.
pub(super) fn run_binary(
    binary: &TestBinary,
    bin_dir: &Path,
    only: Option<&str>,
    voice: Voice,
) -> anyhow::Result<Outcome> {
    let kind = if binary.scenario { "Scenarios:" } else { "Unit tests:" };
    let headline = match only {
        Some(test) => format!("Once more, alone: {} {test}", binary.name),
        None => format!("{kind} {}", binary.name),
    };
    if voice == Voice::Live {
        step(&headline);
    }
    // A name of its own: others may run beside it.
    let skip_log = compile::target_dir().join(format!("skipped-{}.log", binary.name.replace('/', "-")));
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
                if voice == Voice::Live {
                    println!("{line}");
                }
                output.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                output.push(format!(
                    "{} did not end within {} s: killed",
                    binary.name,
                    BINARY_DEADLINE.as_secs()
                ));
                if voice == Voice::Live {
                    println!("{}", output[output.len() - 1]);
                }
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
    let complete = summary.is_some();
    let mut counts = summary.unwrap_or_default();
    if !status.success() && counts.failed == 0 {
        counts.failed = 1;
    }
    let skips = fs::read_to_string(&skip_log).unwrap_or_default();
    let _ = fs::remove_file(&skip_log);
    if voice == Voice::AtTheEnd {
        // One after the other, not line by line among each other.
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "\n==> {headline}\n{}", output.join("\n")).context("cannot print")?;
    }
    for skip in skips.lines() {
        println!("skipped: {skip}");
        // The test itself could only return, so its runner counted it among those that passed.
        counts.skipped += 1;
        counts.passed = counts.passed.saturating_sub(1);
    }
    Ok(Outcome { counts, output, complete })
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
