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
}

/// Builds what is needed, optimised, and measures.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Forecast { traces } => measure("bench_forecast", traces),
    }
}

fn measure(binary: &str, traces: &Path) -> anyhow::Result<()> {
    let traces = traces.canonicalize().with_context(|| format!("cannot find {}", traces.display()))?;
    setup::run()?;
    let binary = compile::everything(true)?.join(binary);
    step(&format!("Measuring on the traces in {}", traces.display()));
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    Ok(cmd!(shell, "{binary} {traces}").run()?)
}
