//! A Redis client that remembers what was acknowledged, and a data set that can be checked.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;
use redis::{Connection, RedisResult};
use rswap_agent::units::UnixMillis;
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

use crate::netns::Netns;

/// A client that finds its server again at once doesn't wait for TCP's own timers.
const CLIENT_TIMEOUT: Duration = Duration::from_millis(20);
/// For loading and checking, where nothing is measured.
pub(crate) const PATIENT_TIMEOUT: Duration = Duration::from_secs(20);
pub(crate) const VALUE_BYTES: usize = 1024;
const BATCH: u64 = 500;

/// What a run of the client saw.
#[derive(Clone, Debug, Serialize)]
pub struct ClientReport {
    /// Writes that the server said are done.
    pub acked_writes: u64,
    /// Those of them that were not there at the end, or not as written.
    pub lost_writes: u64,
    /// Longest time between two acknowledgements, in milliseconds.
    pub largest_gap_ms: f64,
    /// When it began, since the client's start, in milliseconds.
    pub largest_gap_at_ms: f64,
    /// Connections made after the first one.
    pub reconnects: u64,
    /// Every acknowledgement.
    #[serde(skip)]
    acks: Acks,
}

impl ClientReport {
    /// Longest time between two acknowledgements of which any part lies in `from..=to`, in milliseconds.
    pub fn largest_gap_between_ms(&self, from: UnixMillis, to: UnixMillis) -> f64 {
        let since_start = |at: UnixMillis| Duration::from_millis(at.since(self.acks.started));
        let gap = self.acks.largest_gap(since_start(from), since_start(to));
        gap.0.as_secs_f64() * 1e3
    }
}

/// Acknowledgements, as times since the client's start, and the gaps between them.
#[derive(Clone, Debug, Default)]
struct Acks {
    started: UnixMillis,
    times: Vec<Duration>,
}

impl Acks {
    /// The longest gap of which any part lies between the two times, and when it began.
    fn largest_gap(&self, from: Duration, to: Duration) -> (Duration, Duration) {
        let pairs = self.times.windows(2).filter(|pair| pair[1] >= from && pair[0] <= to);
        pairs.map(|pair| (pair[1].saturating_sub(pair[0]), pair[0])).max().unwrap_or_default()
    }
}

/// How a [`VerifyingClient`] takes silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It makes a new connection after 20 ms.
    Hasty,
    /// It waits, for seconds: what it counts as reconnects, the server has broken.
    Patient,
}

impl Manner {
    fn timeout(self) -> Duration {
        match self {
            Self::Hasty => CLIENT_TIMEOUT,
            Self::Patient => PATIENT_TIMEOUT,
        }
    }
}

/// Writes numbered keys, each once, and records every acknowledgement with its time.
#[derive(Debug)]
pub struct VerifyingClient {
    server: Ipv4Addr,
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<(Acks, u64)>>,
}

impl VerifyingClient {
    /// Starts writing to `server` from the namespace, with a pause after each acknowledged write.
    pub fn start(netns: &Netns, server: Ipv4Addr, pause: Duration) -> anyhow::Result<Self> {
        Self::start_in(Manner::Hasty, netns, server, pause)
    }

    /// As [`VerifyingClient::start`], in a manner.
    pub fn start_in(
        manner: Manner,
        netns: &Netns,
        server: Ipv4Addr,
        pause: Duration,
    ) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let acked = Arc::new(AtomicU64::new(0));
        let (stopped, counter) = (stop.clone(), acked.clone());
        let thread = netns
            .spawn("client", move || write_until(&stopped, &counter, server, pause, manner.timeout()))?;
        Ok(Self { server, stop, acked, thread })
    }

    /// Writes acknowledged so far.
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Acquire)
    }

    /// Waits until `more` further writes were acknowledged: the server is there and writable.
    pub fn wait_for_acks(&self, more: u64, limit: Duration) -> anyhow::Result<()> {
        let goal = self.acked() + more;
        crate::wait_for(&format!("{more} further acknowledged writes"), limit, || {
            Ok((self.acked() >= goal).then_some(()))
        })
    }

    /// Stops writing, and reads everything back that was acknowledged.
    pub fn finish(self, netns: &Netns) -> anyhow::Result<ClientReport> {
        self.stop.store(true, Ordering::Release);
        let (acks, reconnects) =
            self.thread.join().map_err(|_| anyhow::anyhow!("the client's thread panicked"))??;
        let acked_writes = acks.times.len() as u64;
        let server = self.server;
        let check = netns.spawn("check", move || {
            count_wrong(&mut connect(server, PATIENT_TIMEOUT)?, "w", acked_writes, 64)
        })?;
        let lost_writes = check.join().map_err(|_| anyhow::anyhow!("the check panicked"))??;
        let (gap, at) = acks.largest_gap(Duration::ZERO, Duration::MAX);
        Ok(ClientReport {
            acked_writes,
            lost_writes,
            largest_gap_ms: gap.as_secs_f64() * 1e3,
            largest_gap_at_ms: at.as_secs_f64() * 1e3,
            reconnects,
            acks,
        })
    }
}

fn write_until(
    stop: &AtomicBool,
    acked: &AtomicU64,
    server: Ipv4Addr,
    pause: Duration,
    timeout: Duration,
) -> anyhow::Result<(Acks, u64)> {
    let started = Instant::now();
    let mut acks = Acks { started: UnixMillis::now(), times: Vec::new() };
    let mut connections = 0_u64;
    let mut connection: Option<Connection> = None;
    while !stop.load(Ordering::Acquire) {
        let number = acks.times.len() as u64;
        let Some(open) = &mut connection else {
            connection = connect(server, timeout).ok();
            connections += u64::from(connection.is_some());
            if connection.is_none() {
                // A refusal comes back at once; a lost packet has cost the timeout already.
                thread::sleep(Duration::from_millis(1));
            }
            continue;
        };
        let answer: RedisResult<String> =
            redis::cmd("SET").arg(key("w", number)).arg(value("w", number, 64)).query(open);
        match answer {
            Ok(_) => {
                acks.times.push(started.elapsed());
                acked.fetch_add(1, Ordering::Release);
                thread::sleep(pause);
            }
            // Not acknowledged: the same write again, over a new connection.
            Err(_) => connection = None,
        }
    }
    Ok((acks, connections.saturating_sub(1)))
}

pub(crate) fn connect(server: Ipv4Addr, timeout: Duration) -> RedisResult<Connection> {
    let client = redis::Client::open(format!("redis://{server}:6379/"))?;
    let connection = client.get_connection_with_timeout(timeout)?;
    connection.set_read_timeout(Some(timeout))?;
    connection.set_write_timeout(Some(timeout))?;
    Ok(connection)
}

pub(crate) fn key(kind: &str, number: u64) -> String {
    format!("{kind}:{number}")
}

/// Contents that follow from the key, differ between keys, and don't compress to nothing.
pub(crate) fn value(kind: &str, number: u64, bytes: usize) -> Vec<u8> {
    let mut value = Vec::with_capacity(bytes + 8);
    let mut word = xxh3_64(key(kind, number).as_bytes());
    while value.len() < bytes {
        word = xxh3_64(&word.to_le_bytes());
        value.extend_from_slice(&word.to_le_bytes());
    }
    value.truncate(bytes);
    value
}

fn count_wrong(connection: &mut Connection, kind: &str, count: u64, bytes: usize) -> anyhow::Result<u64> {
    let mut wrong = BTreeSet::new();
    for first in (0..count).step_by(BATCH as usize) {
        let numbers = first..(first + BATCH).min(count);
        let mut get = redis::cmd("MGET");
        for number in numbers.clone() {
            get.arg(key(kind, number));
        }
        let found: Vec<Option<Vec<u8>>> = get.query(connection).context("cannot read the keys back")?;
        for (number, found) in numbers.zip(found) {
            if found != Some(value(kind, number, bytes)) {
                wrong.insert(number);
            }
        }
    }
    if !wrong.is_empty() {
        let shown: Vec<_> = wrong.iter().take(10).collect();
        eprintln!("{} of {count} {kind} keys are missing or wrong, such as {shown:?}", wrong.len());
    }
    Ok(wrong.len() as u64)
}

/// A data set of `d:N` keys that can be checked.
#[derive(Clone, Copy, Debug)]
pub struct DataSet {
    server: Ipv4Addr,
    keys: u64,
}

impl DataSet {
    /// Loads at least `bytes` of values.
    pub fn load(netns: &Netns, server: Ipv4Addr, bytes: u64) -> anyhow::Result<Self> {
        let set = Self { server, keys: bytes.div_ceil(VALUE_BYTES as u64) };
        let load = netns.spawn("load", move || {
            let mut connection = crate::wait_for("Redis to answer", Duration::from_secs(10), || {
                Ok(connect(server, PATIENT_TIMEOUT).ok())
            })?;
            for first in (0..set.keys).step_by(BATCH as usize) {
                let mut put = redis::cmd("MSET");
                for number in first..(first + BATCH).min(set.keys) {
                    put.arg(key("d", number)).arg(value("d", number, VALUE_BYTES));
                }
                put.query::<()>(&mut connection).context("cannot load the data set")?;
            }
            Ok(())
        })?;
        load.join().map_err(|_| anyhow::anyhow!("the loading thread panicked"))??;
        Ok(set)
    }

    /// How many there are.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// Where they are.
    pub fn server(&self) -> Ipv4Addr {
        self.server
    }

    /// How many keys are missing or wrong.
    pub fn wrong_keys(&self, netns: &Netns) -> anyhow::Result<u64> {
        let set = *self;
        let check = netns.spawn("check", move || {
            count_wrong(&mut connect(set.server, PATIENT_TIMEOUT)?, "d", set.keys, VALUE_BYTES)
        })?;
        check.join().map_err(|_| anyhow::anyhow!("the check panicked"))?
    }

    /// The server's own count of the memory that its data takes, in bytes.
    pub fn used_bytes(&self, netns: &Netns) -> anyhow::Result<u64> {
        let server = self.server;
        let ask = netns.spawn("info", move || {
            let info: String =
                redis::cmd("INFO").arg("memory").query(&mut connect(server, PATIENT_TIMEOUT)?)?;
            let used = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
            used.context("INFO memory has no used_memory")?.trim().parse().context("used_memory is no number")
        })?;
        ask.join().map_err(|_| anyhow::anyhow!("the question panicked"))?
    }
}

/// The command line of the Redis that the scenarios run: in memory only, open to the fleet's network.
pub const REDIS: &[&str] = &[
    "redis-server",
    "--save",
    "",
    "--appendonly",
    "no",
    "--daemonize",
    "no",
    "--bind",
    "0.0.0.0",
    "--protected-mode",
    "no",
    "--port",
    "6379",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_gap_is_found_with_its_beginning() {
        let ms = Duration::from_millis;
        let acks = Acks { times: [0, 3, 50, 52].map(ms).to_vec(), ..Acks::default() };
        assert_eq!(acks.largest_gap(ms(0), Duration::MAX), (ms(47), ms(3)));
        assert_eq!(acks.largest_gap(ms(20), ms(30)), (ms(47), ms(3)));
        assert_eq!(acks.largest_gap(ms(51), ms(60)), (ms(2), ms(50)));
        assert_eq!(Acks::default().largest_gap(ms(0), Duration::MAX), Default::default());
    }

    #[test]
    fn values_follow_from_their_keys() {
        assert_eq!(value("d", 7, 100), value("d", 7, 100));
        assert_ne!(value("d", 7, 100), value("d", 8, 100));
        assert_ne!(value("d", 7, 100), value("w", 7, 100));
        assert_eq!(value("d", 7, 100).len(), 100);
    }
}
