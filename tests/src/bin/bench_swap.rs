//! `cargo xtask bench swap`: what a swap on one host costs.
//!
//! Volumes move there and back between two file systems on loop devices, next to `cp -a` of the same volume between the same
//! two, while a client has the program make 1000 writes a second; a program of 1000 threads goes from one core set to the
//! other; a program with connections goes from one uplink to the other; a Redis of which a
//! tenth is in use goes to compressed memory and comes back. Figures are medians. Loop devices are files in the temporary directory (`TMPDIR`): its disk is what is measured.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::Parser;
use comfy_table::Table;
use rswap_agent::control::SwapDone;
use rswap_tests::{
    Fleet, Host, HostOptions,
    bench::{
        AFTER, BEFORE, Seen, cases,
        cold::{self, ColdCase},
        many::Many,
        median,
    },
    netns::Netns,
    storage::StorageScene,
    uplinks, wait_for,
};
use serde::Serialize;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const PORT: u16 = 7000;
/// How long a program may take to fill its volume, or to start its threads.
const START_LIMIT: Duration = Duration::from_secs(120);
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(about = "What a swap on one host costs")]
struct Cli {
    /// Swaps per case
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only the cases whose name contains this text
    #[arg(long)]
    only: Option<String>,
    /// Where the result goes
    #[arg(long, default_value = "target/rswap/bench-swap.json")]
    output: PathBuf,
}

#[derive(Clone, Copy)]
enum Subject {
    Storage { mb: u64 },
    Cores { threads: usize },
    Uplink { connections: usize },
    Cold { mb: u64 },
}

const CASES: &[(&str, Subject)] = &[
    ("storage-100mb", Subject::Storage { mb: 100 }),
    ("storage-1000mb", Subject::Storage { mb: 1000 }),
    ("cores-1000-threads", Subject::Cores { threads: 1000 }),
    ("network-10-connections", Subject::Uplink { connections: 10 }),
    ("memory-cold-200mb", Subject::Cold { mb: 200 }),
];

/// Medians of a case.
#[derive(Clone, Debug, Default, Serialize)]
struct Case {
    /// Longest time in which the client got no answer.
    pause_ms: f64,
    /// From the call of `rswap swap` until its answer.
    total_ms: f64,
    #[serde(flatten)]
    copied: Option<Copied>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cold: Option<ColdCase>,
    pauses_ms: Vec<f64>,
}

/// Of a volume.
#[derive(Clone, Debug, Default, Serialize)]
struct Copied {
    /// How long the program stood still, by the agent's account.
    still_ms: f64,
    /// Of the volume, by the total time.
    mb_per_s: f64,
    /// The same of `cp -a`, and sync(1) of what it wrote.
    cp_mb_per_s: f64,
    /// By how much the client had fewer answers before the pause than before the swap.
    slowdown_pct: f64,
    passes: f64,
}

fn main() -> anyhow::Result<()> {
    let Cli { runs, only, output } = Cli::parse();
    let measured = |subject| match subject {
        Subject::Storage { mb } => storage(mb, runs),
        Subject::Cores { threads } => cores(threads, runs),
        Subject::Uplink { connections } => uplink(connections, runs),
        Subject::Cold { mb } => cold(mb, runs),
    };
    cases::measure(CASES, only.as_deref(), &output, measured, table)
}

/// What one swap came to.
struct Swap {
    seen: Seen,
    total: Duration,
}

/// Has `client` look on while `swap` is made.
fn watched<T>(client: Many, swap: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(Swap, T)> {
    thread::sleep(BEFORE);
    let began = Instant::now();
    let done = swap();
    let ended = Instant::now();
    thread::sleep(AFTER);
    let times = client.finish()?;
    Ok((Swap { seen: times.of_move(began, ended), total: ended - began }, done?))
}

fn storage(mb: u64, runs: usize) -> anyhow::Result<Case> {
    // Each holds the volume, and for a while the copy that cp(1) makes of it.
    let disk_bytes = (mb * 5 / 2 + 200) * 1_000_000;
    let scene = StorageScene::set([disk_bytes, disk_bytes])?;
    let server = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/volume_server.py");
    let words = [server.as_path(), &scene.path].map(|path| path.to_string_lossy().into_owned());
    let [server, path] = &words;
    let (bytes, port, net) = ((mb * 1_000_000).to_string(), PORT.to_string(), format!("{SERVER}/24"));
    scene.run_with(&["--net", &net], &["python3", server, path, &bytes, &port])?;
    answers(&scene.fleet.client)?;
    // From where volumes are at first.
    scene.moved("one")?.map_err(anyhow::Error::msg)?;
    let (mut swaps, mut cp_s) = (Vec::new(), Vec::new());
    for pool in ["two", "one"].into_iter().cycle().take(runs) {
        scene.is_on(Some(if pool == "two" { "one" } else { "two" }))?;
        cp_s.push(cp(&fs::canonicalize(scene.place())?, &scene.fleet.scratch().join(pool).join("mounted"))?);
        let client = Many::steady(&scene.fleet.client, (SERVER, PORT).into())?;
        let (swap, moved) = watched(client, || scene.moved(pool))?;
        let report = moved.map_err(anyhow::Error::msg)?;
        println!(
            "  pause {:.1} ms, still {:.1} ms, total {:.0} ms, passes {}, {:.1} MB copied, cp {:.0} ms, steps {:?}",
            swap.seen.gap.as_secs_f64() * 1e3,
            report.unavailability_ms,
            swap.total.as_secs_f64() * 1e3,
            report.passes,
            report.bytes_copied as f64 / 1e6,
            cp_s.last().copied().unwrap_or_default() * 1e3,
            report.freeze_steps_ms.iter().map(|(step, ms)| format!("{step} {ms:.1}")).collect::<Vec<_>>(),
        );
        swaps.push((swap, report));
    }
    check(&scene.fleet.client)?;
    let volume_mb = mb as f64;
    let of = |figure: &dyn Fn(&(Swap, _)) -> f64| median(swaps.iter().map(figure).collect());
    let copied = Copied {
        still_ms: of(&|(_, report)| report.unavailability_ms),
        mb_per_s: of(&|(swap, _)| volume_mb / swap.total.as_secs_f64()),
        cp_mb_per_s: volume_mb / median(cp_s),
        slowdown_pct: of(&|(swap, _)| swap.seen.slowdown_pct),
        passes: of(&|(_, report)| f64::from(report.passes)),
    };
    let mut case = case(&swaps.into_iter().map(|(swap, _)| swap).collect::<Vec<_>>());
    case.copied = Some(copied);
    Ok(case)
}

/// How long cp(1) takes, in seconds, until what it wrote is on the disk.
fn cp(from: &Path, to: &Path) -> anyhow::Result<f64> {
    let copy = to.join("cp");
    let began = Instant::now();
    let run = |command: &mut Command| -> anyhow::Result<()> {
        ensure!(command.status().context("cannot start it")?.success(), "{command:?} failed");
        Ok(())
    };
    run(Command::new("cp").arg("-a").arg(from).arg(&copy))?;
    run(Command::new("sync").arg("-f").arg(&copy))?;
    let took = began.elapsed().as_secs_f64();
    fs::remove_dir_all(&copy).context("removing what cp has made")?;
    run(Command::new("sync").arg("-f").arg(to))?;
    Ok(took)
}

fn cores(threads: usize, runs: usize) -> anyhow::Result<Case> {
    let more =
        "[[pool]]\nname = \"one\"\ncpus = \"0\"\n\n[[pool]]\nname = \"two\"\ncpus = \"1\"\n".to_owned();
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &HostOptions { more, ..HostOptions::default() })?;
    many(&fleet, &host, threads, ["one", "two"], runs)
}

fn uplink(connections: usize, runs: usize) -> anyhow::Result<Case> {
    let mut fleet = Fleet::new()?;
    let host = uplinks::host(&mut fleet)?;
    many(&fleet, &host, connections, ["first", "second"], runs)
}

/// A program of so many threads, each of which answers one connection, goes from one pool to the other.
fn many(fleet: &Fleet, host: &Host, threads: usize, pools: [&str; 2], runs: usize) -> anyhow::Result<Case> {
    let server = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/many.py");
    let (server, number, port) =
        (server.to_string_lossy().into_owned(), threads.to_string(), PORT.to_string());
    let net = format!("{SERVER}/24");
    host.run("case", &["--net", &net], &["python3", &server, "threads", &number, &port])?;
    answers(&fleet.client)?;
    host.wait_for_instance("case")?;
    let pids = host.pids("case")?;
    let pid = pids.first().context("it has no process")?;
    wait_for("all threads", START_LIMIT, || {
        Ok((fs::read_dir(format!("/proc/{pid}/task"))?.count() >= threads).then_some(()))
    })?;
    let swap = |pool: &str| -> anyhow::Result<SwapDone> {
        Ok(serde_json::from_str(&host.call(&["swap", "case", pool, "--json"])?)?)
    };
    swap(pools[0])?;
    let mut swaps = Vec::new();
    for pool in [pools[1], pools[0]].into_iter().cycle().take(runs) {
        let client = Many::start(&fleet.client, (SERVER, PORT).into(), threads)?;
        let (seen, done) = watched(client, || swap(pool))?;
        println!(
            "  pause {:.1} ms, total {:.1} ms, in the agent {:.1} ms",
            seen.seen.gap.as_secs_f64() * 1e3,
            seen.total.as_secs_f64() * 1e3,
            done.duration_ms
        );
        swaps.push(seen);
    }
    Ok(case(&swaps))
}

/// Pages that are not used go to swap, and come back.
fn cold(mb: u64, runs: usize) -> anyhow::Result<Case> {
    let (cold, pauses_ms) = cold::measure(mb, runs)?;
    let (pause_ms, total_ms) = (cold.pause_ms, cold.out_ms);
    Ok(Case { pause_ms, total_ms, copied: None, cold: Some(cold), pauses_ms })
}

fn case(swaps: &[Swap]) -> Case {
    let of = |figure: &dyn Fn(&Swap) -> f64| median(swaps.iter().map(figure).collect());
    let pause_ms = |swap: &Swap| swap.seen.gap.as_secs_f64() * 1e3;
    Case {
        pause_ms: of(&pause_ms),
        total_ms: of(&|swap| swap.total.as_secs_f64() * 1e3),
        copied: None,
        cold: None,
        pauses_ms: swaps.iter().map(pause_ms).collect(),
    }
}

/// Waits until the program takes connections.
fn answers(client: &Netns) -> anyhow::Result<()> {
    let knock = client.spawn("knock", move || {
        wait_for("the program to listen", START_LIMIT, || {
            Ok(TcpStream::connect((SERVER, PORT)).ok().map(drop))
        })
    })?;
    knock.join().map_err(|_| anyhow::anyhow!("the knocking thread panicked"))?
}

/// Every page is as it was written.
fn check(client: &Netns) -> anyhow::Result<()> {
    let checked = client.spawn("check", || {
        let mut stream = BufReader::new(TcpStream::connect((SERVER, PORT))?);
        stream.get_ref().set_read_timeout(Some(PATIENCE))?;
        stream.get_mut().write_all(b"check\n")?;
        let mut answer = String::new();
        stream.read_line(&mut answer)?;
        ensure!(answer == "check\n", "{answer}");
        Ok(())
    })?;
    checked.join().map_err(|_| anyhow::anyhow!("the check panicked"))?
}

fn table(cases: &BTreeMap<String, Case>) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header(["case", "pause ms", "still ms", "total ms", "MB/s", "cp -a MB/s", "slower %"]);
    for (name, case) in cases {
        let slower = case.cold.as_ref().map(|cold| format!("{:.1}", cold.slowdown_out_pct));
        let out = case
            .cold
            .as_ref()
            .map(|cold| format!("{:.0} out, {:.0} back", cold.out_mb_per_s, cold.back_mb_per_s));
        let copied = |figure: fn(&Copied) -> f64, digits: usize| {
            case.copied
                .as_ref()
                .map_or_else(|| "-".to_owned(), |copied| format!("{:.digits$}", figure(copied)))
        };
        table.add_row([
            name.clone(),
            format!("{:.1}", case.pause_ms),
            copied(|copied| copied.still_ms, 1),
            format!("{:.0}", case.total_ms),
            out.unwrap_or_else(|| copied(|copied| copied.mb_per_s, 0)),
            copied(|copied| copied.cp_mb_per_s, 0),
            slower.unwrap_or_else(|| copied(|copied| copied.slowdown_pct, 1)),
        ]);
    }
    table
}
