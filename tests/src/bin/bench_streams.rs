//! `cargo xtask bench streams`: a migration over one connection, next to one over as many as its way is worth.
//!
//! Two hosts, between which a way of the given round trip is laid. An instance that is nearly idle moves over it; moves over one
//! connection and over several take turns; figures are medians.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use clap::Parser;
use comfy_table::Table;
use rswap_agent::status::MigrationReport;
use rswap_tests::{Fleet, Host, HostOptions, bench::median, binary, heartbeat, long_way::LongWay};
use serde::Serialize;

#[derive(Parser)]
#[command(about = "What several connections per migration gain")]
struct Cli {
    /// Moves of each kind per round trip
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Round trips, in milliseconds; 0 is a cable between the hosts
    #[arg(long, value_delimiter = ',', default_values_t = [0, 5, 20, 80])]
    round_trips_ms: Vec<u64>,
    /// Memory of the instance, in MiB
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// Connections of the second kind; as many as the way is worth if not set
    #[arg(long)]
    streams: Option<u8>,
    /// Where the result goes
    #[arg(long, default_value = "target/rswap/bench-streams.json")]
    output: PathBuf,
}

/// Medians of one round trip.
#[derive(Debug, Serialize)]
struct Case {
    /// Connections that were used.
    streams: u8,
    one_ms: f64,
    several_ms: f64,
    one_freeze_ms: f64,
    several_freeze_ms: f64,
    /// Sent by one of those over several connections.
    mb_sent: f64,
    /// How many times as fast.
    ratio: f64,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let mut cases = BTreeMap::new();
    let mut table = Table::new();
    table.set_header([
        "round trip",
        "streams",
        "one, ms",
        "several, ms",
        "times as fast",
        "still: one, several, ms",
    ]);
    for &ms in &cli.round_trips_ms {
        let case = measure(&cli, ms)?;
        table.add_row([
            format!("{ms} ms"),
            case.streams.to_string(),
            format!("{:.0}", case.one_ms),
            format!("{:.0}", case.several_ms),
            format!("{:.2}", case.ratio),
            format!("{:.1}, {:.1}", case.one_freeze_ms, case.several_freeze_ms),
        ]);
        cases.insert(format!("{ms}ms"), case);
    }
    println!("{table}");
    if let Some(directory) = cli.output.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    std::fs::write(&cli.output, serde_json::to_vec_pretty(&serde_json::json!({ "cases": cases }))?)?;
    println!("{}", cli.output.display());
    Ok(())
}

fn measure(cli: &Cli, round_trip_ms: u64) -> anyhow::Result<Case> {
    let mut fleet = Fleet::new()?;
    // A stop that is too long is a figure here, and no reason to give up.
    let options = |streams| HostOptions { max_unavailability_ms: 5_000, streams, ..HostOptions::default() };
    let there = fleet.host("there", &options(Some(1)))?;
    let (one, several) =
        (fleet.host("one", &options(Some(1)))?, fleet.host("several", &options(cli.streams))?);
    let logs = ["one", "several"].map(|name| fleet.scratch().join(format!("{name}.memcheck")));
    for (host, log) in [(&one, &logs[0]), (&several, &logs[1])] {
        let (memcheck, mib) = (binary("memcheck")?, cli.mib.to_string());
        let command = [&*memcheck.to_string_lossy(), &log.to_string_lossy(), "1", &mib, "1"];
        host.run("case", &[], &command)?;
        heartbeat::wait_for_more(log, 50, 50)?;
    }
    let (mut of_one, mut of_several) = (Vec::new(), Vec::new());
    for _ in 0..cli.runs {
        of_one.push(there_and_back(&one, &there, &logs[0], round_trip_ms)?);
        of_several.push(there_and_back(&several, &there, &logs[1], round_trip_ms)?);
    }
    let of = |moves: &[MigrationReport], figure: &dyn Fn(&MigrationReport) -> f64| {
        median(moves.iter().map(figure).collect())
    };
    let total = |report: &MigrationReport| report.duration_ms as f64;
    let freeze = |report: &MigrationReport| report.unavailability_ms;
    let (one_ms, several_ms) = (of(&of_one, &total), of(&of_several, &total));
    Ok(Case {
        streams: of_several.iter().map(|report| report.streams).max().unwrap_or_default(),
        one_ms,
        several_ms,
        one_freeze_ms: of(&of_one, &freeze),
        several_freeze_ms: of(&of_several, &freeze),
        mb_sent: of(&of_several, &|report| report.bytes_sent as f64 / 1e6),
        ratio: one_ms / several_ms,
    })
}

/// There over the way, which is what is measured, and back over the cable.
fn there_and_back(
    here: &Host,
    there: &Host,
    log: &Path,
    round_trip_ms: u64,
) -> anyhow::Result<MigrationReport> {
    let round_trip = Duration::from_millis(round_trip_ms);
    let way = (round_trip_ms > 0).then(|| LongWay::lay(here, there, round_trip)).transpose()?;
    let report = here.migrate("case", &there.migrate_address())?.succeed()?;
    drop(way);
    there.wait_for_instance("case")?;
    heartbeat::wait_for_more(log, 5, 5)?;
    there.migrate("case", &here.migrate_address())?.succeed()?;
    here.wait_for_instance("case")?;
    println!(
        "  {round_trip_ms} ms: {} streams, {} ms, still {:.1} ms, {} MB sent",
        report.streams,
        report.duration_ms,
        report.unavailability_ms,
        report.bytes_sent / 1_000_000
    );
    Ok(report)
}
