//! `cargo xtask test`: everything that has to hold, from formatting to migrations of real programs.
//!
//! The programs and their tests are built once, by one cargo call over the whole workspace, and then started
//! from here: a second call with another choice of packages or targets would build dependencies, and the agent, again.

mod binaries;
mod runner;
mod turns;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, ensure};
use xshell::{Shell, cmd};

use self::{
    binaries::{TestBinary, test_binaries},
    runner::{Counts, Outcome, Voice, run_binary},
};
use crate::{compile, dashboard, pauses, project_root, rerun, setup, step};

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
    let mut results = Results::default();
    if only.is_none() {
        checks(&shell, &mut results.failures);
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
            results.failures.push("examples in the documentation".to_owned());
        }
    }
    let chosen = |binary: &&TestBinary| only.is_none_or(|text| binary.scenario && binary.name.contains(text));
    let (beside, alone): (Vec<_>, Vec<_>) = binaries
        .iter()
        .filter(chosen)
        .partition(|binary| binary.scenario && turns::may_run_beside(&binary.name));
    // Unit tests are among those that run alone, and come first, since they fail fastest.
    for binary in alone {
        let began = Instant::now();
        let outcome = run_binary(binary, &bin_dir, None, Voice::Live)?;
        results.note(binary, &outcome, began.elapsed().as_secs());
        results.try_again(binary, &bin_dir, &outcome)?;
    }
    step(&format!("Scenarios that run beside each other: {}", beside.len()));
    let outcomes = turns::side_by_side(&beside, |binary| {
        let began = Instant::now();
        let outcome = run_binary(binary, &bin_dir, None, Voice::AtTheEnd)?;
        Ok((outcome, began.elapsed().as_secs()))
    })?;
    for (binary, (outcome, seconds)) in beside.iter().zip(&outcomes) {
        results.note(binary, outcome, *seconds);
    }
    // Alone: all of them have ended.
    for (binary, (outcome, _)) in beside.iter().zip(&outcomes) {
        results.try_again(binary, &bin_dir, outcome)?;
    }
    let directory = compile::target_dir().join("rswap");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    pauses::report(&pause_log, &directory.join("pauses.json"))?;
    results.print();
    println!("took {} s", started.elapsed().as_secs());
    let total = results.total;
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    ensure!(results.failures.is_empty(), "{} of the steps failed", results.failures.len());
    Ok(())
}

/// What all of it came to.
#[derive(Default)]
struct Results {
    total: Counts,
    failures: Vec<String>,
    unsteady: Vec<String>,
    /// What those that failed said last.
    accounts: Vec<String>,
    /// Seconds and names.
    times: Vec<(u64, String)>,
}

impl Results {
    fn note(&mut self, binary: &TestBinary, outcome: &Outcome, seconds: u64) {
        for name in rerun::failed(&outcome.output) {
            let said = rerun::account(name, &outcome.output);
            self.accounts.push(format!("{}: {name} said last:\n    {}", binary.name, said.join("\n    ")));
        }
        self.times.push((seconds, binary.name.clone()));
    }

    /// Counts what `binary` came to, after what failed in a scenario has had its second try.
    fn try_again(&mut self, binary: &TestBinary, bin_dir: &Path, outcome: &Outcome) -> anyhow::Result<()> {
        let mut counts = outcome.counts;
        // Of one that did not come to its end, nobody knows what else would have failed.
        if binary.scenario && outcome.complete {
            for name in rerun::worth_a_second_try(&outcome.output) {
                if run_binary(binary, bin_dir, Some(&name), Voice::Live)?.counts == Counts::one_passed() {
                    counts.failed -= 1;
                    counts.passed += 1;
                    self.unsteady.push(format!("{}: {name}", binary.name));
                }
            }
        }
        if counts.failed > 0 {
            self.failures.push(binary.name.clone());
        }
        self.total.add(&counts);
        Ok(())
    }

    fn print(&mut self) {
        self.times.sort_unstable_by(|a, b| b.cmp(a));
        let slowest: Vec<String> =
            self.times.iter().take(SLOWEST).map(|(seconds, name)| format!("{name} {seconds} s")).collect();
        println!("\nslowest: {}", slowest.join(", "));
        // Once more at the end: what shows a long log may leave out the middle.
        for account in &self.accounts {
            println!("{account}");
        }
        for name in &self.unsteady {
            println!("UNSTEADY: {name} failed at first and passed when it was run again: find out why");
        }
        if !self.failures.is_empty() {
            println!("\nfailed: {}", self.failures.join(", "));
        }
    }
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
