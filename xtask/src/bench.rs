//! Measurements: each is a binary of the project that writes its result to `target/rswap/bench-*.json`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;
use xshell::{Shell, cmd};

use crate::{compile, daemon::need_root, project_root, setup, step};

/// What is measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// The forecast on recorded traces, next to last value, VPA and Autopilot
    Forecast {
        /// Directory with the traces: `*.csv.gz`, and `targets.csv` where there is one
        #[arg(long)]
        traces: PathBuf,
    },
    /// What a migration costs, with and without pre-copy: Redis, threads, processes
    Migrate {
        /// Passed on to the benchmark: `--runs N`, `--only TEXT`, `--clear-text`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A controller on one core with 2,000 agents of 50 instances each
    Fleet {
        /// Passed on to the benchmark: `--agents N`, `--seconds N`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// One round of planning a fleet of up to 10,000 instances on 1,000 hosts
    Plan,
    /// What profiling costs those that are profiled, and the agent; next to bpftrace and bcc's tools, where they are
    Profile {
        /// Passed on to the benchmark: `--runs N`, `--only TEXT`, `--instances N`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A migration over a long way: several connections, next to one
    Streams {
        /// Passed on to the benchmark: `--runs N`, `--round-trips-ms 0,20`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// What a swap on one host costs: volumes of 100 MB and 1 GB between disks, 1000 threads between core sets
    Swap {
        /// Passed on to the benchmark: `--runs N`, `--only TEXT`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Fast and slow tiers with recorded demand: what forecasts save next to static placement, thresholds and the oracle
    Tiers {
        /// Directory with bitbrains.csv.gz
        #[arg(long)]
        traces: PathBuf,
    },
    /// Placement policies on recorded days of virtual machines, on the model that the literature compares them on
    Placement {
        /// Directory with planetlab.csv.gz
        #[arg(long)]
        traces: PathBuf,
    },
}

/// Builds what is needed, optimised, and measures.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Forecast { traces } => measure("bench_forecast", &[found(traces)?]),
        Bench::Migrate { arguments } => {
            need_root("the benchmark makes network namespaces and cgroups, and runs two agents in them")?;
            measure("bench_migrate", arguments)
        }
        Bench::Fleet { arguments } => measure("bench_fleet", arguments),
        Bench::Plan => measure("bench_plan", &[]),
        Bench::Profile { arguments } => {
            need_root(
                "the benchmark loads eBPF programs, makes cgroups and network namespaces, and runs an agent",
            )?;
            measure("bench_profile", arguments)
        }
        Bench::Streams { arguments } => {
            need_root("the benchmark makes network namespaces and cgroups, and runs three agents in them")?;
            measure("bench_streams", arguments)
        }
        Bench::Swap { arguments } => {
            need_root("the benchmark makes network namespaces, cgroups and loop devices, and runs an agent")?;
            measure("bench_swap", arguments)
        }
        Bench::Tiers { traces } => measure("bench_tiers", &["--traces".to_owned(), found(traces)?]),
        Bench::Placement { traces } => measure("bench_placement", &["--traces".to_owned(), found(traces)?]),
    }
}

/// The directory as it is called from anywhere.
fn found(traces: &Path) -> anyhow::Result<String> {
    let found = traces.canonicalize().with_context(|| format!("cannot find {}", traces.display()))?;
    Ok(found.display().to_string())
}

fn measure(binary: &str, arguments: &[String]) -> anyhow::Result<()> {
    setup::run()?;
    let binary = compile::everything(true)?.join(binary);
    step("Measuring");
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    Ok(cmd!(shell, "{binary} {arguments...}").run()?)
}
