//! Programs that notice everything that a move could do to them, and two hosts between which each is moved: what the
//! scenarios of failures have in common.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};

use crate::{
    Fleet, Host, HostOptions, binary,
    client::{DataSet, REDIS, VerifyingClient},
    heartbeat, moves, rounds, wait_for,
};

/// How long a program may take for what is waited for.
pub const LIMIT: Duration = Duration::from_secs(40);
/// In this time a program that runs shows that it does.
const STANDING_STILL: Duration = Duration::from_millis(500);

/// A program and whoever checks it.
pub trait Subject: Sized {
    /// Its instance's name.
    const NAME: &'static str;

    /// What the hosts need for it.
    fn options(_fleet: &Fleet) -> HostOptions {
        // How long the freeze takes is not what these scenarios are about.
        HostOptions { max_unavailability_ms: 3000, ..HostOptions::default() }
    }

    /// Starts it at a host, and waits until it is at work.
    fn start(fleet: &Fleet, at: &Host) -> anyhow::Result<Self>;

    /// Waits until it has done more. What it, or whoever checks it, finds wrong is an error.
    fn goes_on(&self) -> anyhow::Result<()>;

    /// A number that grows as long as it runs.
    fn work_done(&self) -> anyhow::Result<u64>;

    /// The last check: all that was promised is there.
    fn finish(self, _fleet: &Fleet) -> anyhow::Result<()> {
        self.goes_on()
    }
}

/// Two hosts and a program at one of them.
#[derive(Debug)]
pub struct Stage<S> {
    // Dropped in this order: the hosts live in the fleet's network.
    /// Where the program starts.
    pub a: Host,
    /// Where it is moved to.
    pub b: Host,
    /// The program.
    pub subject: S,
    /// The network.
    pub fleet: Fleet,
}

impl<S: Subject> Stage<S> {
    /// Starts both hosts, and the program at the first.
    pub fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let options = S::options(&fleet);
        let (a, b) = (fleet.host("a", &options)?, fleet.host("b", &options)?);
        let subject = S::start(&fleet, &a)?;
        Ok(Self { a, b, subject, fleet })
    }

    /// Waits until exactly one host has it, with nothing left of it at the other; whether that is the second.
    pub fn runs_at_one_host(&self) -> anyhow::Result<bool> {
        self.subject.goes_on()?;
        let there = wait_for("one copy at one host", LIMIT, || {
            let lists = [self.a.has_instance(S::NAME)?, self.b.has_instance(S::NAME)?];
            let runs = [self.a.has_processes()?, self.b.has_processes()?];
            Ok((lists == runs && lists[0] != lists[1]).then_some(lists[1]))
        })?;
        self.subject.goes_on()?;
        Ok(there)
    }

    /// Nothing of it runs anywhere.
    pub fn stands_still(&self) -> anyhow::Result<()> {
        let before = self.subject.work_done()?;
        thread::sleep(STANDING_STILL);
        let after = self.subject.work_done()?;
        ensure!(before == after, "a copy runs that was committed elsewhere: {before} became {after}");
        Ok(())
    }

    /// Moves it to the second host.
    pub fn next_try(&self) -> anyhow::Result<()> {
        self.moved(&self.a, &self.b)
    }

    /// Moves it to the second host, and back to the first.
    pub fn next_try_and_back(&self) -> anyhow::Result<()> {
        self.next_try()?;
        self.moved(&self.b, &self.a)
    }

    fn moved(&self, from: &Host, to: &Host) -> anyhow::Result<()> {
        moves::moved(S::NAME, from, to).context("the next try")?;
        self.subject.goes_on()
    }

    /// Waits until neither host has anything left to settle.
    pub fn journals_close(&self) -> anyhow::Result<()> {
        wait_for("every journal to be closed", LIMIT, || {
            let open = [self.a.open_journals()?, self.b.open_journals()?].concat();
            Ok(open.is_empty().then_some(()))
        })
    }

    /// The program's own last check.
    pub fn finish(self) -> anyhow::Result<()> {
        self.subject.finish(&self.fleet)
    }
}

const REDIS_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const REDIS_BYTES: u64 = 4 << 20;

/// Redis with an address of its own, a data set, and a client that remembers every acknowledgement.
#[derive(Debug)]
pub struct Redis {
    data: DataSet,
    client: VerifyingClient,
}

impl Subject for Redis {
    const NAME: &'static str = "redis";

    fn start(fleet: &Fleet, at: &Host) -> anyhow::Result<Self> {
        at.run(Self::NAME, &["--net", &format!("{REDIS_ADDRESS}/24")], REDIS)?;
        let data = DataSet::load(&fleet.client, REDIS_ADDRESS, REDIS_BYTES)?;
        let client = VerifyingClient::start(&fleet.client, REDIS_ADDRESS, Duration::from_millis(1))?;
        client.wait_for_acks(50, LIMIT)?;
        Ok(Self { data, client })
    }

    fn goes_on(&self) -> anyhow::Result<()> {
        self.client.wait_for_acks(50, LIMIT)
    }

    fn work_done(&self) -> anyhow::Result<u64> {
        Ok(self.client.acked())
    }

    fn finish(self, fleet: &Fleet) -> anyhow::Result<()> {
        let seen = self.client.finish(&fleet.client)?;
        println!("{seen:?}");
        ensure!(seen.lost_writes == 0, "acknowledged writes are lost");
        let wrong = self.data.wrong_keys(&fleet.client)?;
        ensure!(wrong == 0, "{wrong} keys of the data set are wrong");
        Ok(())
    }
}

/// Four threads that verify the memory that they rewrite.
#[derive(Debug)]
pub struct Memcheck {
    log: PathBuf,
}

impl Subject for Memcheck {
    const NAME: &'static str = "memcheck";

    fn start(fleet: &Fleet, at: &Host) -> anyhow::Result<Self> {
        let log = fleet.scratch().join("memcheck.log");
        let program = binary("memcheck")?;
        let command = [&program.to_string_lossy(), &*log.to_string_lossy(), "4", "6", "8"];
        at.run(Self::NAME, &[], &command)?;
        heartbeat::wait_for_progress(&log)?;
        Ok(Self { log })
    }

    fn goes_on(&self) -> anyhow::Result<()> {
        // A matrix asks over a hundred times.
        heartbeat::wait_for_more(&self.log, 12, 300)
    }

    fn work_done(&self) -> anyhow::Result<u64> {
        heartbeat::lines(&self.log)
    }

    fn finish(self, _fleet: &Fleet) -> anyhow::Result<()> {
        heartbeat::wait_for_progress(&self.log)
    }
}

fn python(name: &str, arguments: &[&str]) -> Vec<String> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name);
    let words = ["python3".to_owned(), program.to_string_lossy().into_owned()];
    words.into_iter().chain(arguments.iter().map(|word| (*word).to_owned())).collect()
}

fn run(at: &Host, name: &str, options: &[&str], command: &[String]) -> anyhow::Result<()> {
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    at.run(name, options, &command)
}

/// A ring of processes with shared memory, pipes, sockets and a zombie.
#[derive(Debug)]
pub struct Tree {
    log: PathBuf,
}

impl Subject for Tree {
    const NAME: &'static str = "tree";

    fn start(fleet: &Fleet, at: &Host) -> anyhow::Result<Self> {
        let log = fleet.scratch().join("tree.log");
        run(at, Self::NAME, &[], &python("tree.py", &[&log.to_string_lossy(), "4", "0.002"]))?;
        let tree = Self { log };
        tree.goes_on()?;
        Ok(tree)
    }

    fn goes_on(&self) -> anyhow::Result<()> {
        rounds::wait_for_more(&self.log, 30, LIMIT)
    }

    fn work_done(&self) -> anyhow::Result<u64> {
        Ok(rounds::read(&self.log)?.made)
    }
}

/// A program that works in a volume in every way that a program can, and verifies it in each round.
#[derive(Debug)]
pub struct VolumeWorker {
    log: PathBuf,
}

const VOLUME_BYTES: &str = "4194304";

impl Subject for VolumeWorker {
    const NAME: &'static str = "worker";

    fn options(fleet: &Fleet) -> HostOptions {
        // The hosts share nothing but the place of the log.
        let more = format!("[files]\nshared = [{:?}]\n", fleet.scratch().join("shared"));
        HostOptions { max_unavailability_ms: 3000, more, ..HostOptions::default() }
    }

    fn start(fleet: &Fleet, at: &Host) -> anyhow::Result<Self> {
        let shared = fleet.scratch().join("shared");
        std::fs::create_dir_all(&shared)?;
        let (log, path) = (shared.join("worker.log"), fleet.scratch().join("mounted"));
        let command =
            python("volume.py", &[&log.to_string_lossy(), &path.to_string_lossy(), "0.005", VOLUME_BYTES]);
        run(at, Self::NAME, &["--volume", &format!("data:{}", path.display())], &command)?;
        let worker = Self { log };
        worker.goes_on()?;
        Ok(worker)
    }

    fn goes_on(&self) -> anyhow::Result<()> {
        rounds::wait_for_more(&self.log, 20, LIMIT)
    }

    fn work_done(&self) -> anyhow::Result<u64> {
        Ok(rounds::read(&self.log)?.made)
    }
}
