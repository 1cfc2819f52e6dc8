//! `cargo xtask bench migrate`: what a move costs, next to the same move without pre-copy.
//!
//! Two hosts as network namespaces, an instance that moves there and back, and a client that notes every answer's time.
//! Moves with and without pre-copy take turns; figures are medians.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use comfy_table::Table;
use rswap_agent::status::MigrationReport;
use rswap_tests::{
    Fleet, Host, HostOptions,
    bench::{
        AFTER, BEFORE, Seen, cases,
        many::Many,
        median,
        paced::{Keys, Paced, Work},
    },
    client::REDIS,
};
use serde::Serialize;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const PORT: u16 = 7000;
const READS_PER_S: u32 = 1000;
const WRITES_PER_S: u32 = 20_000;

#[derive(Parser)]
#[command(about = "What a migration costs")]
struct Cli {
    /// Moves of each kind per case
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only the cases whose name contains this text
    #[arg(long)]
    only: Option<String>,
    /// Without TLS between the hosts, to see what it costs
    #[arg(long)]
    clear_text: bool,
    /// Where the result goes
    #[arg(long, default_value = "target/rswap/bench-migrate.json")]
    output: PathBuf,
}

#[derive(Clone, Copy)]
enum Program {
    Redis { mb: u64, work: Work },
    Many { kind: &'static str, number: usize },
}

const CASES: &[(&str, Program)] = &[
    ("redis-100mb-idle", Program::Redis { mb: 100, work: Work::Read }),
    ("redis-100mb-load-tcp", Program::Redis { mb: 100, work: Work::Write }),
    ("redis-1000mb-idle", Program::Redis { mb: 1000, work: Work::Read }),
    ("redis-1000mb-load-tcp", Program::Redis { mb: 1000, work: Work::Write }),
    ("threads-100", Program::Many { kind: "threads", number: 100 }),
    ("processes-50", Program::Many { kind: "processes", number: 50 }),
];

/// Medians of a case. Times are in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
struct Case {
    /// Longest time in which the client got no answer.
    gap_ms: f64,
    /// From the freeze until the destination's word that it runs.
    freeze_ms: f64,
    total_ms: f64,
    bytes_sent: f64,
    bytes_dirtied: f64,
    /// By how much the client had fewer answers before the freeze than before the move.
    slowdown_pct: f64,
    stop_and_copy_gap_ms: f64,
    gaps_ms: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let Cli { runs, only, clear_text, output } = Cli::parse();
    cases::measure(CASES, only.as_deref(), &output, |program| run(program, runs, clear_text), table)
}

/// What one move came to.
struct Move {
    report: MigrationReport,
    seen: Seen,
}

fn run(program: Program, runs: usize, clear_text: bool) -> anyhow::Result<Case> {
    let mut fleet = Fleet::new()?;
    // A stop that is too long is a figure here, and no reason to give up.
    let more = if clear_text { "[tls]\ninsecure_clear_text = true\n" } else { "" }.to_owned();
    let options = HostOptions { max_unavailability_ms: 2000, more, ..HostOptions::default() };
    let (a, b) = (fleet.host("a", &options)?, fleet.host("b", &options)?);
    let net = ["--net".to_owned(), format!("{SERVER}/24")];
    let net = [net[0].as_str(), net[1].as_str()];
    let mut client = match program {
        Program::Redis { mb, work } => {
            a.run("case", &net, REDIS)?;
            answers(&fleet, 6379)?;
            Client::Redis { keys: Keys::load(&fleet.client, SERVER, mb * 1_000_000)?, work }
        }
        Program::Many { kind, number } => {
            let server = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/many.py");
            let (server, number_text) = (server.to_string_lossy().into_owned(), number.to_string());
            a.run("case", &net, &["python3", &server, kind, &number_text, &PORT.to_string()])?;
            answers(&fleet, PORT)?;
            Client::Many { number }
        }
    };
    // Its threads and processes have started, and its allocator has settled.
    thread::sleep(BEFORE);
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let (mut here, mut there) = (&a, &b);
    for turn in 0..2 * runs {
        let stop_and_copy = turn % 2 == 1;
        let moved = client.watch(&fleet, || migrate(here, there, stop_and_copy))?;
        println!(
            "  {} gap {:.1} ms, still {:.1} ms, total {} ms, steps {:?}",
            if stop_and_copy { "stop-and-copy:" } else { "pre-copy:" },
            moved.seen.gap.as_secs_f64() * 1e3,
            moved.report.unavailability_ms,
            moved.report.duration_ms,
            moved
                .report
                .freeze_steps_ms
                .iter()
                .map(|(step, ms)| format!("{step} {ms:.1}"))
                .collect::<Vec<_>>(),
        );
        if stop_and_copy {
            without.push(moved)
        } else {
            with.push(moved)
        }
        (here, there) = (there, here);
    }
    client.check(&fleet)?;
    let of = |moves: &[Move], figure: &dyn Fn(&Move) -> f64| median(moves.iter().map(figure).collect());
    let gap = |moved: &Move| moved.seen.gap.as_secs_f64() * 1e3;
    Ok(Case {
        gap_ms: of(&with, &gap),
        freeze_ms: of(&with, &|moved| moved.report.unavailability_ms),
        total_ms: of(&with, &|moved| moved.report.duration_ms as f64),
        bytes_sent: of(&with, &|moved| moved.report.bytes_sent as f64),
        bytes_dirtied: of(&with, &|moved| moved.report.pages_dirtied as f64 * 4096.0),
        slowdown_pct: of(&with, &|moved| moved.seen.slowdown_pct),
        stop_and_copy_gap_ms: of(&without, &gap),
        gaps_ms: with.iter().map(gap).collect(),
    })
}

/// Who notes what the instance's users see. Each move has a client of its own.
enum Client {
    Redis { keys: Keys, work: Work },
    Many { number: usize },
}

impl Client {
    fn watch(
        &mut self,
        fleet: &Fleet,
        migrate: impl FnOnce() -> anyhow::Result<MigrationReport>,
    ) -> anyhow::Result<Move> {
        let during = || -> anyhow::Result<_> {
            thread::sleep(BEFORE);
            let began = Instant::now();
            let report = migrate()?;
            let ended = Instant::now();
            thread::sleep(AFTER);
            Ok((report, began, ended))
        };
        let ((report, began, ended), times) = match self {
            Self::Redis { keys, work } => {
                let per_s = if *work == Work::Write { WRITES_PER_S } else { READS_PER_S };
                let paced = Paced::start(&fleet.client, keys.clone(), *work, per_s)?;
                let seen = during();
                let (written, times) = paced.finish()?;
                *keys = written;
                (seen?, times)
            }
            Self::Many { number } => {
                let many = Many::start(&fleet.client, (SERVER, PORT).into(), *number)?;
                let seen = during();
                let times = many.finish()?;
                (seen?, times)
            }
        };
        Ok(Move { report, seen: times.of_move(began, ended) })
    }

    /// Nothing that was acknowledged is lost.
    fn check(&self, fleet: &Fleet) -> anyhow::Result<()> {
        match self {
            Self::Redis { keys, .. } => keys.check(&fleet.client),
            // Every line was compared when it came.
            Self::Many { .. } => Ok(()),
        }
    }
}

fn migrate(from: &Host, to: &Host, stop_and_copy: bool) -> anyhow::Result<MigrationReport> {
    let options: &[&str] = if stop_and_copy { &["--stop-and-copy"] } else { &[] };
    from.migrate_with("case", &to.migrate_address(), options)?.succeed()
}

/// Waits until the instance takes connections.
fn answers(fleet: &Fleet, port: u16) -> anyhow::Result<()> {
    let knock = fleet.client.spawn("knock", move || {
        rswap_tests::wait_for("the program to listen", Duration::from_secs(30), || {
            Ok(std::net::TcpStream::connect((SERVER, port)).ok().map(drop))
        })
    })?;
    knock.join().map_err(|_| anyhow::anyhow!("the knocking thread panicked"))?
}

fn table(cases: &BTreeMap<String, Case>) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "case",
        "gap ms",
        "still ms",
        "total ms",
        "sent MB",
        "dirtied MB",
        "slower %",
        "stop-and-copy gap ms",
    ]);
    for (name, case) in cases {
        table.add_row([
            name.clone(),
            format!("{:.1}", case.gap_ms),
            format!("{:.1}", case.freeze_ms),
            format!("{:.0}", case.total_ms),
            format!("{:.1}", case.bytes_sent / 1e6),
            format!("{:.1}", case.bytes_dirtied / 1e6),
            format!("{:.1}", case.slowdown_pct),
            format!("{:.1}", case.stop_and_copy_gap_ms),
        ]);
    }
    table
}
