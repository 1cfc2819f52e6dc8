//! A Redis client of a steady rate over one connection, which knows what every key must hold.

use std::{
    io::{BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Timeline;
use crate::netns::Netns;

/// Commands are sent in bursts, so far apart.
const BURST_EVERY: Duration = Duration::from_millis(1);
/// Longer than any stop that is measured.
const PATIENCE: Duration = Duration::from_secs(60);
/// Commands that are unanswered at most: the client is a user, who waits, not a flood.
const IN_FLIGHT: usize = 2000;
const VALUE_BYTES: usize = 100;
/// Keys that are loaded or checked in one go.
const BATCH: u32 = 1000;

/// What the client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Reads keys, one after the other.
    Read,
    /// Writes keys at random.
    Write,
}

/// Keys, and how often each was written.
#[derive(Clone, Debug)]
pub struct Keys {
    server: Ipv4Addr,
    writes: Vec<u32>,
}

impl Keys {
    /// Loads keys until the server has `bytes` bytes resident.
    pub fn load(netns: &Netns, server: Ipv4Addr, bytes: u64) -> anyhow::Result<Self> {
        let loader = netns.spawn("load", move || {
            let mut stream = connect(server)?;
            let client = redis::Client::open(format!("redis://{server}:6379/"))?;
            let mut keys = Self { server, writes: Vec::new() };
            while resident_bytes(&client)? < bytes {
                for _ in 0..20 {
                    keys.add(&mut stream, BATCH)?;
                }
            }
            Ok(keys)
        })?;
        loader.join().map_err(|_| anyhow::anyhow!("the loader panicked"))?
    }

    fn add(&mut self, stream: &mut TcpStream, number: u32) -> anyhow::Result<()> {
        let mut commands = Vec::new();
        for _ in 0..number {
            let key = self.writes.len() as u32;
            self.writes.push(0);
            set(&mut commands, key, 0);
        }
        stream.write_all(&commands)?;
        expect(stream, &b"+OK\r\n".repeat(number as usize))
    }

    /// How many there are.
    pub fn number(&self) -> usize {
        self.writes.len()
    }

    /// Reads all of them back; the error names the first batch that is not as it was written.
    pub fn check(&self, netns: &Netns) -> anyhow::Result<()> {
        let keys = self.clone();
        let check = netns.spawn("check", move || {
            let mut stream = connect(keys.server)?;
            for (first, writes) in keys.writes.chunks(BATCH as usize).enumerate() {
                let first = first as u32 * BATCH;
                let mut command = format!("*{}\r\n$4\r\nMGET\r\n", writes.len() + 1).into_bytes();
                let mut answer = format!("*{}\r\n", writes.len()).into_bytes();
                for (key, writes) in (first..).zip(writes) {
                    command.extend_from_slice(format!("$12\r\nkey:{key:08}\r\n").as_bytes());
                    bulk(&mut answer, &value(key, *writes));
                }
                stream.write_all(&command)?;
                expect(&mut stream, &answer).with_context(|| format!("keys from {first}"))?;
            }
            Ok(())
        })?;
        check.join().map_err(|_| anyhow::anyhow!("the check panicked"))?
    }
}

fn connect(server: Ipv4Addr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from((server, 6379)), PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn resident_bytes(server: &redis::Client) -> anyhow::Result<u64> {
    let text: String = redis::cmd("INFO").arg("memory").query(&mut server.get_connection()?)?;
    let line = text.lines().find_map(|line| line.strip_prefix("used_memory_rss:"));
    Ok(line.context("INFO has no used_memory_rss")?.trim().parse()?)
}

/// Reads exactly what is due.
fn expect(stream: &mut impl Read, due: &[u8]) -> anyhow::Result<()> {
    let mut got = vec![0; due.len()];
    stream.read_exact(&mut got).context("waiting for an answer")?;
    ensure!(got == due, "the answer is wrong: {:?}...", String::from_utf8_lossy(&got[..got.len().min(80)]));
    Ok(())
}

fn bulk(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend_from_slice(format!("${}\r\n", bytes.len()).as_bytes());
    to.extend_from_slice(bytes);
    to.extend_from_slice(b"\r\n");
}

fn set(to: &mut Vec<u8>, key: u32, writes: u32) {
    to.extend_from_slice(format!("*3\r\n$3\r\nSET\r\n$12\r\nkey:{key:08}\r\n").as_bytes());
    bulk(to, &value(key, writes));
}

/// What a key holds after so many writes: it doesn't compress to nothing.
fn value(key: u32, writes: u32) -> [u8; VALUE_BYTES] {
    let mut value = [0; VALUE_BYTES];
    let mut word = u64::from(key) << 32 | u64::from(writes);
    for part in value.chunks_mut(8) {
        word = xxh3_64_with_seed(&word.to_le_bytes(), u64::from(key));
        part.copy_from_slice(&word.to_le_bytes()[..part.len()]);
    }
    value
}

/// A client at work.
#[derive(Debug)]
pub struct Paced {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<(Keys, Timeline)>>,
}

impl Paced {
    /// Starts `per_s` commands a second over a connection of its own.
    pub fn start(netns: &Netns, mut keys: Keys, work: Work, per_s: u32) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = netns.spawn("paced", move || {
            let stream = connect(keys.server)?;
            let mut reader = BufReader::new(stream.try_clone()?);
            let (sent, due) = mpsc::sync_channel::<Vec<u8>>(IN_FLIGHT);
            let answers = thread::spawn(move || -> anyhow::Result<Timeline> {
                let mut times = Timeline::default();
                for due in due {
                    expect(&mut reader, &due)?;
                    times.note(1);
                }
                Ok(times)
            });
            let sending = send(stream, &mut keys, work, per_s, &stopped, &sent);
            drop(sent);
            let times = answers.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
            let times = times.context("reading answers")?;
            sending?;
            Ok((keys, times))
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends it, when all is answered: what the keys must hold now, and when each answer came.
    pub fn finish(self) -> anyhow::Result<(Keys, Timeline)> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    }
}

fn send(
    mut stream: TcpStream,
    keys: &mut Keys,
    work: Work,
    per_s: u32,
    stop: &AtomicBool,
    sent: &mpsc::SyncSender<Vec<u8>>,
) -> anyhow::Result<()> {
    let number = keys.number() as u64;
    let per_burst = f64::from(per_s) * BURST_EVERY.as_secs_f64();
    let (mut owed, mut commands_sent) = (0.0, 0_u64);
    let mut next = Instant::now();
    while !stop.load(Ordering::Acquire) {
        owed += per_burst;
        let mut commands = Vec::new();
        while owed >= 1.0 {
            owed -= 1.0;
            commands_sent += 1;
            let due = match work {
                Work::Read => {
                    let key = (commands_sent % number) as u32;
                    commands
                        .extend_from_slice(format!("*2\r\n$3\r\nGET\r\n$12\r\nkey:{key:08}\r\n").as_bytes());
                    let mut answer = Vec::new();
                    bulk(&mut answer, &value(key, keys.writes[key as usize]));
                    answer
                }
                Work::Write => {
                    let key = (xxh3_64_with_seed(&commands_sent.to_le_bytes(), 1) % number) as u32;
                    keys.writes[key as usize] += 1;
                    set(&mut commands, key, keys.writes[key as usize]);
                    b"+OK\r\n".to_vec()
                }
            };
            // A full channel is a client that waits.
            if sent.send(due).is_err() {
                return Ok(());
            }
        }
        stream.write_all(&commands).context("sending commands")?;
        next += BURST_EVERY;
        // What could not be sent in its time is not made up for.
        next = next.max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}
