//! Clients that keep their connections, whatever happens to the server: one lost, doubled or late byte shows.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::{netns::Netns, stream::Pattern};

/// A connection that says nothing for so long is taken for dead.
const PATIENCE: Duration = Duration::from_secs(10);
/// Commands that a pipelining client has unanswered at most.
const IN_FLIGHT: u64 = 2000;

/// Something that runs on a thread in the clients' namespace until it is told to stop.
#[derive(Debug)]
pub struct Running {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<Duration>>,
}

impl Running {
    pub(crate) fn start(
        netns: &Netns,
        name: &str,
        work: impl FnOnce(&AtomicBool, &AtomicU64) -> anyhow::Result<Duration> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let (stopped, counter) = (stop.clone(), count.clone());
        let thread = netns.spawn(name, move || work(&stopped, &counter))?;
        Ok(Self { stop, count, thread })
    }

    /// How far it is: answers, messages or bytes.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Waits until it has come `more` further.
    pub fn wait_for(&self, more: u64, limit: Duration) -> anyhow::Result<()> {
        let goal = self.count() + more;
        crate::wait_for(&format!("{more} more to come"), limit, || {
            Ok((self.count() >= goal || self.thread.is_finished()).then_some(()))
        })
    }

    /// Ends it; an error is what it found wrong. Returns the longest time in which nothing came.
    pub fn finish(self) -> anyhow::Result<Duration> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?
    }
}

pub(crate) fn connect(server: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, PATIENCE).context("cannot connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn redis(server: Ipv4Addr) -> anyhow::Result<TcpStream> {
    connect((server, 6379).into())
}

/// Keeps the longest time between two events.
pub(crate) struct Gaps {
    last: Instant,
    pub(crate) longest: Duration,
}

impl Gaps {
    pub(crate) fn new() -> Self {
        Self { last: Instant::now(), longest: Duration::ZERO }
    }

    pub(crate) fn event(&mut self) {
        self.longest = self.longest.max(self.last.elapsed());
        self.last = Instant::now();
    }
}

/// Counts a key up by pipelined commands, many unanswered at any time: each answer must be one more than the last.
pub fn pipeline(netns: &Netns, server: Ipv4Addr) -> anyhow::Result<Running> {
    Running::start(netns, "pipeline", move |stop, answered| {
        let stream = redis(server)?;
        let mut writer = stream.try_clone()?;
        let sent = AtomicU64::new(0);
        thread::scope(|scope| {
            let write = || -> anyhow::Result<()> {
                while !stop.load(Ordering::Acquire) {
                    if sent.load(Ordering::Acquire) - answered.load(Ordering::Acquire) >= IN_FLIGHT {
                        thread::sleep(Duration::from_micros(200));
                        continue;
                    }
                    // Counted before, so that the reader never believes that all is answered too early.
                    sent.fetch_add(50, Ordering::AcqRel);
                    writer.write_all("*2\r\n$4\r\nINCR\r\n$8\r\npipeline\r\n".repeat(50).as_bytes())?;
                }
                Ok(())
            };
            let writing = scope.spawn(write);
            let mut gaps = Gaps::new();
            let mut read = || -> anyhow::Result<()> {
                let mut reader = BufReader::new(&stream);
                let mut line = String::new();
                while !stop.load(Ordering::Acquire)
                    || answered.load(Ordering::Acquire) < sent.load(Ordering::Acquire)
                {
                    line.clear();
                    let length = match reader.read_line(&mut line) {
                        // It was told to stop after it had begun to wait, and the writer before it sent more.
                        Err(error)
                            if error.kind() == ErrorKind::WouldBlock
                                && stop.load(Ordering::Acquire)
                                && answered.load(Ordering::Acquire) == sent.load(Ordering::Acquire) =>
                        {
                            break;
                        }
                        read => read?,
                    };
                    ensure!(length > 0, "the connection has ended");
                    let wanted = answered.load(Ordering::Acquire) + 1;
                    ensure!(line == format!(":{wanted}\r\n"), "{line:?} came where {wanted} was due");
                    answered.store(wanted, Ordering::Release);
                    gaps.event();
                }
                Ok(())
            };
            let outcome = read();
            stop.store(true, Ordering::Release);
            writing
                .join()
                .map_err(|_| anyhow::anyhow!("the writer panicked"))?
                .context("writing commands")?;
            outcome.context("reading answers")?;
            Ok(gaps.longest)
        })
    })
}

/// Publishes numbers on one connection and hears them on another: each must be one more than the last.
pub fn subscribe(netns: &Netns, server: Ipv4Addr) -> anyhow::Result<Running> {
    Running::start(netns, "subscriber", move |stop, heard| {
        let mut subscriber = BufReader::new(redis(server)?);
        subscriber.get_mut().write_all(b"SUBSCRIBE numbers\r\n")?;
        let word = |from: &mut BufReader<TcpStream>| -> anyhow::Result<String> {
            let mut line = String::new();
            ensure!(from.read_line(&mut line)? > 0, "the connection has ended");
            Ok(line.trim_end().to_owned())
        };
        // *3, $9, subscribe, $7, numbers, :1
        for _ in 0..6 {
            word(&mut subscriber)?;
        }
        let mut publisher = BufReader::new(redis(server)?);
        let mut gaps = Gaps::new();
        let mut number = 0_u64;
        while !stop.load(Ordering::Acquire) {
            number += 1;
            publisher.get_mut().write_all(format!("PUBLISH numbers {number}\r\n").as_bytes())?;
            let receivers = word(&mut publisher).context("publishing")?;
            ensure!(receivers == ":1", "{receivers} subscribers instead of one");
            // *3, $7, message, $7, numbers, $LENGTH, the number
            let message: Vec<String> =
                (0..7).map(|_| word(&mut subscriber)).collect::<anyhow::Result<_>>().context("subscribed")?;
            ensure!(message[6] == number.to_string(), "{message:?} came where {number} was due");
            heard.store(number, Ordering::Release);
            gaps.event();
        }
        Ok(gaps.longest)
    })
}

/// Reads a stream of `stream_server`, slowly, so that everything on the way is full; every byte is compared.
pub fn slow_reader(netns: &Netns, server: SocketAddr) -> anyhow::Result<Running> {
    Running::start(netns, "slow reader", move |stop, bytes| {
        let mut stream = connect(server)?;
        stream.write_all(b"S")?;
        let (mut pattern, mut gaps) = (Pattern::default(), Gaps::new());
        let mut buffer = vec![0; 64 << 10];
        while !stop.load(Ordering::Acquire) {
            let got = stream.read(&mut buffer).context("reading the stream")?;
            ensure!(got > 0, "the stream has ended");
            pattern.compare(&buffer[..got])?;
            bytes.fetch_add(got as u64, Ordering::AcqRel);
            gaps.event();
            thread::sleep(Duration::from_millis(1));
        }
        Ok(gaps.longest)
    })
}

/// Writes a stream to `stream_server`, which reads slowly and compares every byte.
pub fn fast_writer(netns: &Netns, server: SocketAddr) -> anyhow::Result<Running> {
    Running::start(netns, "fast writer", move |stop, bytes| {
        let mut stream = connect(server)?;
        stream.write_all(b"R")?;
        let (mut pattern, mut gaps) = (Pattern::default(), Gaps::new());
        let mut buffer = vec![0; 64 << 10];
        let mut sent = 0_u64;
        while !stop.load(Ordering::Acquire) {
            pattern.fill(&mut buffer);
            stream.write_all(&buffer).context("writing the stream")?;
            sent += buffer.len() as u64;
            bytes.store(sent, Ordering::Release);
            gaps.event();
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("waiting for the server's count")?;
        ensure!(answer == sent.to_string(), "the server counts {answer:?} bytes of {sent}");
        Ok(gaps.longest)
    })
}

/// Sends numbered lines to `stream_server`'s echo, which waits for edges of epoll, and compares what comes back.
pub fn echo(netns: &Netns, server: SocketAddr) -> anyhow::Result<Running> {
    Running::start(netns, "echo", move |stop, echoed| {
        let mut stream = BufReader::new(connect(server)?);
        stream.get_mut().write_all(b"E")?;
        let mut gaps = Gaps::new();
        let mut number = 0_u64;
        while !stop.load(Ordering::Acquire) {
            number += 1;
            let line = format!("line {number}\n");
            stream.get_mut().write_all(line.as_bytes())?;
            let mut back = String::new();
            stream.read_line(&mut back).context("waiting for the echo")?;
            ensure!(back == line, "{back:?} came back for {line:?}");
            echoed.store(number, Ordering::Release);
            gaps.event();
            thread::sleep(Duration::from_millis(1));
        }
        Ok(gaps.longest)
    })
}

/// Counts a key of a Redis up, one command after the other: each answer must be one more than the last.
pub fn count_up(netns: &Netns, server: SocketAddr) -> anyhow::Result<Running> {
    Running::start(netns, "count up", move |stop, counted| {
        let mut stream = BufReader::new(connect(server)?);
        let mut gaps = Gaps::new();
        let mut number = 0_u64;
        while !stop.load(Ordering::Acquire) {
            number += 1;
            stream.get_mut().write_all(b"INCR counted\r\n")?;
            let mut answer = String::new();
            stream.read_line(&mut answer).context("waiting for an answer")?;
            ensure!(answer == format!(":{number}\r\n"), "{answer:?} came where {number} was due");
            counted.store(number, Ordering::Release);
            gaps.event();
            thread::sleep(Duration::from_millis(1));
        }
        Ok(gaps.longest)
    })
}
