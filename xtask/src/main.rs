//! The project's own commands: set up, build, run, demonstrate, test.
//!
//! `cargo xtask setup` makes a new machine ready; `build`, `demo` and `test` call it themselves, so
//! that one command is enough on a new machine. Every step is said before it is taken.

mod bench;
mod compile;
mod daemon;
mod dashboard;
mod deploy;
mod ebpf;
mod long;
mod pauses;
mod rerun;
mod setup;
mod suite;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "rswap's own commands")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing: system packages, eBPF toolchain, bpf-linker, the demo's Redis
    Setup,
    /// Build the eBPF programs and the agent
    Build {
        /// Optimised
        #[arg(long)]
        release: bool,
    },
    /// Run the daemon on this host, with the default configuration unless arguments say otherwise
    Run {
        /// Passed on to `rswap agent`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Which kernel features are there, and what each lack costs
    Doctor,
    /// Formatting, lints, unit tests and the scenarios on real programs
    Test {
        /// Only the scenario files whose name contains this text (no formatting, no lints, no unit tests)
        #[arg(long)]
        only: Option<String>,
    },
    /// Many moves of a Redis under load in a row; not part of `test`, which makes some
    Soak {
        /// How many
        #[arg(long, default_value_t = 200)]
        moves: u32,
        /// Instead: so many minutes of instances that come and go, and what the profiler keeps of them
        #[arg(long, value_name = "MINUTES", conflicts_with = "moves")]
        profile: Option<u32>,
    },
    /// Random inputs for every decoder; `test` tries 256 each
    Fuzz {
        /// How many for each
        #[arg(long, default_value_t = 200_000)]
        cases: u32,
    },
    /// Measure, and write the result to target/rswap/bench-*.json
    Bench {
        /// What
        #[command(subcommand)]
        what: bench::Bench,
    },
    /// Bring binary, unit, configuration and certificates to hosts over ssh, one after the other; one that does not work goes back
    Deploy(deploy::Deploy),
    /// Two hosts, a Redis under load, a core swap and a migration before the peak: live, then checked
    Demo {
        /// Three hosts and a controller instead: what one host teaches another, a controller that is lost, a drain
        #[arg(long)]
        fleet: bool,
        /// With --fleet: go on until Ctrl-C, so that the dashboard can be looked at
        #[arg(long, requires = "fleet")]
        stay: bool,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Setup => setup::run(),
        Command::Build { release } => {
            setup::run()?;
            compile::everything(release).map(drop)
        }
        Command::Run { arguments } => daemon::run(&arguments),
        Command::Doctor => daemon::doctor(),
        Command::Test { only } => suite::run(only.as_deref()),
        Command::Soak { profile: Some(minutes), .. } => long::soak_profile(minutes),
        Command::Soak { moves, profile: None } => long::soak(moves),
        Command::Fuzz { cases } => long::fuzz(cases),
        Command::Bench { what } => bench::run(&what),
        Command::Deploy(deploy) => deploy::run(&deploy),
        Command::Demo { fleet, stay } => daemon::demo(fleet, stay),
    }
}

/// The workspace's directory: where every path of the project starts.
pub(crate) fn project_root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Says a step before it is taken.
pub(crate) fn step(what: &str) {
    println!("==> {what}");
}
