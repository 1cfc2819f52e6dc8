//! Measurements: each is a binary of the project that writes its result to `target/rswap/bench-*.json`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;
use xshell::{Shell, cmd};

use crate::{compile, project_root, setup, step};

/// What is measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// The forecast on recorded traces, next to last value, VPA and Autopilot
    Forecast {
        /// Directory with the traces: `*.csv.gz`, and `targets.csv` where there is one
        #[arg(long)]
        traces: PathBuf,
    },
    /// One round of planning a fleet of up to 10,000 instances on 1,000 hosts
    Plan,
}

/// Builds what is needed, optimised, and measures.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Forecast { traces } => {
            let traces =
                traces.canonicalize().with_context(|| format!("cannot find {}", traces.display()))?;
            measure("bench_forecast", Some(&traces))
        }
        Bench::Plan => measure("bench_plan", None),
    }
}

fn measure(binary: &str, traces: Option<&Path>) -> anyhow::Result<()> {
    setup::run()?;
    let binary = compile::everything(true)?.join(binary);
    step("Measuring");
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    Ok(cmd!(shell, "{binary} {traces...}").run()?)
}
