//! A program that checks its own memory: it ends with a message as soon as a byte is not as it was written.
//!
//! Each thread owns a region and keeps, apart from it, the stamp that every page must have. It verifies a page,
//! gives it a new stamp and goes on. The main thread waits on epoll for a timer, an eventfd and a pipe to
//! itself, and appends a numbered line to a log: a line that is missing or comes twice shows that the program
//! was rolled back, or ran in two places.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::AsFd,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

const PAGE_BYTES: usize = 4096;
const WORDS: usize = PAGE_BYTES / 8;
/// The program's heartbeat.
const TICK: Duration = Duration::from_millis(20);
/// Each thread rests so long after each burst of pages.
const NAP: Duration = Duration::from_millis(5);

const TIMER: u64 = 1;
const EVENT: u64 = 2;
const PIPE: u64 = 3;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memcheck: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [log, threads, mib_per_thread, burst] = arguments.as_slice() else {
        bail!("usage: memcheck LOG THREADS MIB_PER_THREAD PAGES_PER_BURST");
    };
    let threads: u64 = threads.parse().context("THREADS is no number")?;
    let mib: usize = mib_per_thread.parse().context("MIB_PER_THREAD is no number")?;
    let burst: u64 = burst.parse().context("PAGES_PER_BURST is no number")?;
    let mut log = OpenOptions::new().create(true).append(true).open(log).context("cannot open the log")?;

    let verified = Arc::new(AtomicU64::new(0));
    let (failures, failed) = mpsc::channel();
    for thread in 0..threads {
        let (verified, failures) = (verified.clone(), failures.clone());
        thread::spawn(move || {
            let mut region = Region::new(thread, mib * (1 << 20) / PAGE_BYTES);
            loop {
                for _ in 0..burst {
                    if let Err(wrong) = region.step() {
                        // Nobody to tell when the main thread is ending already.
                        let _ = failures.send(wrong);
                        return;
                    }
                    verified.fetch_add(1, Ordering::Relaxed);
                }
                thread::sleep(NAP);
            }
        });
    }
    watch(&mut log, &verified, &failed)
}

/// One thread's memory.
struct Region {
    thread: u64,
    memory: Vec<u64>,
    stamps: Vec<u64>,
    random: u64,
}

impl Region {
    fn new(thread: u64, pages: usize) -> Self {
        let mut region =
            Self { thread, memory: vec![0; pages * WORDS], stamps: vec![0; pages], random: mix(thread + 1) };
        for page in 0..pages {
            region.write(page, mix(page as u64));
        }
        region
    }

    /// Verifies a page and gives it a new stamp.
    fn step(&mut self) -> Result<(), String> {
        self.random = mix(self.random);
        let page = (self.random % self.stamps.len() as u64) as usize;
        self.verify(page)?;
        self.write(page, mix(self.random ^ 0x5eed));
        Ok(())
    }

    fn write(&mut self, page: usize, stamp: u64) {
        self.stamps[page] = stamp;
        let words = &mut self.memory[page * WORDS..][..WORDS];
        let mut sum = stamp;
        for (index, word) in words[..WORDS - 1].iter_mut().enumerate() {
            *word = content(self.thread, page, stamp, index);
            sum = sum.rotate_left(7) ^ *word;
        }
        words[WORDS - 1] = sum;
    }

    fn verify(&self, page: usize) -> Result<(), String> {
        let stamp = self.stamps[page];
        let words = &self.memory[page * WORDS..][..WORDS];
        let mut sum = stamp;
        for (index, &word) in words[..WORDS - 1].iter().enumerate() {
            let wanted = content(self.thread, page, stamp, index);
            if word != wanted {
                return Err(format!(
                    "thread {} page {page} word {index}: {word:#x}, but {wanted:#x} was written",
                    self.thread
                ));
            }
            sum = sum.rotate_left(7) ^ word;
        }
        if words[WORDS - 1] == sum {
            Ok(())
        } else {
            Err(format!("thread {} page {page}: its checksum is wrong", self.thread))
        }
    }
}

/// Most words are small counters, as in real heaps; every eighth is random.
fn content(thread: u64, page: usize, stamp: u64, index: usize) -> u64 {
    if index.is_multiple_of(8) { mix(stamp ^ index as u64) } else { thread << 32 | page as u64 }
}

/// splitmix64: a step that spreads every bit.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The heartbeat: a timer makes an event, the event a byte in a pipe, the byte a line in the log.
fn watch(log: &mut File, verified: &AtomicU64, failed: &mpsc::Receiver<String>) -> anyhow::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    timer.set(Expiration::Interval(TimeSpec::from_duration(TICK)), TimerSetTimeFlags::empty())?;
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
    let (mut pipe_out, mut pipe_in) = std::io::pipe()?;
    epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
    epoll.add(event.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, EVENT))?;
    epoll.add(pipe_out.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, PIPE))?;
    // Expires long before the first heartbeat, and is never read: it must stay readable wherever the program runs.
    let expired = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    expired.set(Expiration::OneShot(TimeSpec::from_duration(TICK / 20)), TimerSetTimeFlags::empty())?;
    // On a busy machine the first look may come before that.
    poll(&mut [PollFd::new(expired.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    let mut line = 0_u64;
    let mut ready = [EpollEvent::empty(); 4];
    loop {
        let count = match epoll.wait(&mut ready, EpollTimeout::from(1000_u16)) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error).context("epoll_wait"),
        };
        for happened in &ready[..count] {
            match happened.data() {
                TIMER => {
                    timer.wait()?;
                    event.write(1)?;
                }
                EVENT => {
                    event.read()?;
                    pipe_in.write_all(&[line as u8])?;
                }
                PIPE => {
                    let mut byte = [0];
                    pipe_out.read_exact(&mut byte)?;
                    if byte[0] != line as u8 {
                        return fail(log, &format!("the pipe gave {} for line {line}", byte[0]));
                    }
                    if poll(&mut [PollFd::new(expired.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? != 1 {
                        return fail(log, "a timer that had expired has not any more");
                    }
                    writeln!(log, "line={line} verified={}", verified.load(Ordering::Relaxed))?;
                    line += 1;
                }
                other => return fail(log, &format!("epoll gave data {other} that was never registered")),
            }
        }
        if let Ok(wrong) = failed.try_recv() {
            return fail(log, &wrong);
        }
    }
}

fn fail(log: &mut File, what: &str) -> anyhow::Result<()> {
    writeln!(log, "MISMATCH {what}")?;
    bail!("{what}")
}
