//! Two hosts between which a program moves, while its clients go on.

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::Context;

use rswap_agent::status::MigrationReport;

use crate::{
    Fleet, Host, HostOptions,
    migration::Migration,
    pauses,
    persistent::Running,
    proxy::{Fault, Proxy},
    wait_for,
};

/// How long a server may take to answer its first client.
pub const START_LIMIT: Duration = Duration::from_secs(60);
/// How long clients may take to get on after a move.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Budget for the freeze: the tests' machine is busy, and these tests aren't about it.
const PATIENT_MS: u64 = 5000;

/// Moves that may be put off because of what a program does at the moment: half-read directories, for example.
const TRIES: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

/// Moves `name`, and waits until it is only at `to`. What can't be carried at the moment is tried again, as the refusal says.
pub fn moved(name: &str, from: &Host, to: &Host) -> anyhow::Result<MigrationReport> {
    for tries in 1.. {
        match from.migrate(name, &to.migrate_address())?.end()? {
            Ok(report) => {
                to.wait_for_instance(name)?;
                anyhow::ensure!(!from.has_instance(name)?, "it is listed at the host that it has left");
                return Ok(report);
            }
            Err(reason) if reason.contains("try again") && tries < TRIES => println!("{reason}"),
            Err(reason) => anyhow::bail!("the migration failed: {reason}"),
        }
        thread::sleep(BETWEEN_TRIES);
    }
    unreachable!("the last try has returned")
}

/// A migration that stands still where the fault says. One that is put off before is begun anew.
pub fn held(name: &str, from: &Host, to: &Host, fault: Fault) -> anyhow::Result<(Proxy, Migration)> {
    for _ in 0..TRIES {
        let proxy = Proxy::start(from, to, fault)?;
        let migration = from.migrate(name, &proxy.address())?;
        let Err(error) = proxy.wait_for_fault() else { return Ok((proxy, migration)) };
        match migration.end()? {
            Err(reason) if reason.contains("try again") => println!("{reason}"),
            ended => return Err(error.context(format!("it ended before: {ended:?}"))),
        }
    }
    anyhow::bail!("it was put off {TRIES} times")
}

/// Two hosts and their clients.
#[derive(Debug)]
pub struct Pair {
    // Dropped in this order: the hosts live in the fleet's network.
    /// Where programs start.
    pub a: Host,
    /// The other one.
    pub b: Host,
    /// The network, with the clients.
    pub fleet: Fleet,
}

impl Pair {
    /// Makes them.
    pub fn new() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let options = HostOptions { max_unavailability_ms: PATIENT_MS, ..HostOptions::default() };
        let (a, b) = (fleet.host("a", &options)?, fleet.host("b", &options)?);
        Ok(Self { a, b, fleet })
    }

    /// Moves `name` there, back, and there again. Its clients must get `more` further answers after each move.
    pub fn three_moves(&self, name: &str, clients: &[&Running], more: u64) -> anyhow::Result<()> {
        self.three_moves_and(name, || clients.iter().try_for_each(|client| client.wait_for(more, LIMIT)))
    }

    /// Moves `name` there, back, and there again; `goes_on` must succeed after each move.
    pub fn three_moves_and(
        &self,
        name: &str,
        goes_on: impl Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for (from, to) in [(&self.a, &self.b), (&self.b, &self.a), (&self.a, &self.b)] {
            let report = moved(name, from, to)?;
            println!(
                "{name}: frozen {:.0} ms, {} rounds, {} pages",
                report.unavailability_ms, report.rounds, report.pages_sent
            );
            goes_on().context("after a move")?;
        }
        Ok(())
    }

    /// Waits until something listens at `port` of `server`.
    pub fn wait_for_port(&self, server: std::net::Ipv4Addr, port: u16) -> anyhow::Result<()> {
        let connect = move || {
            let address = (server, port).into();
            wait_for("the server to listen", START_LIMIT, || {
                Ok(std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok().map(drop))
            })
        };
        let waiting = self.fleet.client.spawn("knock", connect)?;
        waiting.join().map_err(|_| anyhow::anyhow!("the one who knocked panicked"))?
    }
}

/// Ends a client, and prints how long it waited at most.
pub fn finish(name: &str, client: Running) -> anyhow::Result<()> {
    let answers = client.count();
    let gap = client.finish()?;
    pauses::waited(name, gap.as_secs_f64() * 1e3);
    println!("{name}: {answers} answers, the longest wait {} ms", gap.as_millis());
    Ok(())
}

/// A program of the tests.
pub fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name)
}

/// Python itself: what stands for it on the PATH may be a script, which takes its time and makes processes of its own before it starts this.
pub fn python() -> anyhow::Result<PathBuf> {
    let asked = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    let path = String::from_utf8(asked.context("cannot start python3")?.stdout)?;
    Ok(PathBuf::from(path.trim()))
}
