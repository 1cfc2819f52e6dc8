//! A load on Redis that repeats, as days do, in seconds.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::netns::Netns;

/// Elements of the list that each query sorts: some milliseconds of the server's time on one core.
const SORTED_ELEMENTS: u64 = 4000;
const TIMEOUT: Duration = Duration::from_millis(200);
/// Load is offered in slices of this length.
const SLICE: Duration = Duration::from_millis(50);
/// Queries by which the cost of one is measured.
const TRIAL_QUERIES: u32 = 100;
/// What a query takes is measured again so often,
const FOLLOWED_EVERY: Duration = Duration::from_secs(1);
/// while at least so many cores' worth is offered: with less, what else the server does counts for more than the queries.
const FOLLOWED_FROM_CORES: f64 = 0.2;

/// A day, as the CPU time that the server needs for the queries.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// Length of a day.
    pub day: Duration,
    /// (share of the day, cores), ascending from share 0; in between along a line, and back to the first at the end.
    pub cores: &'static [(f64, f64)],
    /// When the peak begins, as a share of the day.
    pub peak_from: f64,
    /// When it ends.
    pub peak_to: f64,
}

impl Pattern {
    /// Cores' worth of queries, `at` after the first day's beginning.
    pub fn cores_at(&self, at: Duration) -> f64 {
        let share = (at.as_secs_f64() / self.day.as_secs_f64()).fract();
        let after = self.cores.partition_point(|(from, _)| *from <= share);
        let (from, low) = self.cores[after.saturating_sub(1)];
        let (to, high) = self.cores.get(after).copied().unwrap_or((1.0, self.cores[0].1));
        low + (high - low) * ((share - from) / (to - from)).clamp(0.0, 1.0)
    }

    /// When more than `amount` is offered on day `day` (from 0) for the first time, after the first day's beginning; `None` if never.
    pub fn first_above(&self, amount: f64, day: u32) -> Option<Duration> {
        let ends = self.cores[1..].iter().copied().chain([(1.0, self.cores[0].1)]);
        let share =
            self.cores.iter().zip(ends).find_map(|(&(from, low), (to, high))| match low > amount {
                true => Some(from),
                false if high > amount => Some(from + (to - from) * (amount - low) / (high - low)),
                false => None,
            })?;
        Some(self.day * day + self.day.mul_f64(share))
    }

    /// Which day it is, from 0, `at` after the first one's beginning.
    pub fn day_at(&self, at: Duration) -> u32 {
        (at.as_secs_f64() / self.day.as_secs_f64()) as u32
    }

    /// When the peak of day `day` (from 0) begins, after the first day's beginning.
    pub fn peak_start(&self, day: u32) -> Duration {
        self.day * day + self.day.mul_f64(self.peak_from)
    }

    /// When it ends.
    pub fn peak_end(&self, day: u32) -> Duration {
        self.day * day + self.day.mul_f64(self.peak_to)
    }
}

/// The CPU time that one query takes the server, whose cgroup is `cgroup`: the kernel's count over some queries.
pub fn query_cost(netns: &Netns, server: Ipv4Addr, cgroup: &Path) -> anyhow::Result<Duration> {
    let cgroup = cgroup.to_owned();
    let used = move || used(&cgroup).with_context(|| format!("cannot read {}/cpu.stat", cgroup.display()));
    let trial = netns.spawn("trial", move || {
        let client = redis::Client::open(format!("redis://{server}:6379/"))?;
        let mut connection = connect(&client)?;
        let before = used()?;
        for _ in 0..TRIAL_QUERIES {
            query(&mut connection)?;
        }
        Ok((used()? - before) / TRIAL_QUERIES)
    })?;
    trial.join().map_err(|_| anyhow::anyhow!("the trial panicked"))?
}

/// The CPU time that a cgroup has used, as the kernel counts it; `None` where there is no such cgroup.
fn used(cgroup: &Path) -> Option<Duration> {
    let text = fs::read_to_string(cgroup.join("cpu.stat")).ok()?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    Some(Duration::from_micros(usage.parse().ok()?))
}

/// What a query takes the server, with its share of all else that the server does: followed, as it depends on what the processor's caches
/// hold, and on who else runs.
struct Cost {
    /// Those that the server may be in.
    cgroups: Vec<PathBuf>,
    estimate: Duration,
    last: Instant,
    last_used: Duration,
    last_answered: u64,
}

impl Cost {
    fn new(estimate: Duration, cgroups: Vec<PathBuf>) -> Self {
        let last_used = cgroups.iter().filter_map(|cgroup| used(cgroup)).sum();
        Self { cgroups, estimate, last: Instant::now(), last_used, last_answered: 0 }
    }

    /// While `cores` are offered, and so many queries have been answered since the start.
    fn now(&mut self, cores: f64, answered: u64) -> Duration {
        if self.last.elapsed() < FOLLOWED_EVERY {
            return self.estimate;
        }
        let used = self.cgroups.iter().filter_map(|cgroup| used(cgroup)).sum::<Duration>();
        let queries = u32::try_from(answered - self.last_answered).unwrap_or(u32::MAX);
        // Less than before: it has gone from one of its cgroups to another.
        if let Some(used) = used.checked_sub(self.last_used).filter(|_| cores >= FOLLOWED_FROM_CORES)
            && queries > 0
        {
            // A second is short: half of what was known stays. After a move it may be a few queries, and much else.
            let measured = (used / queries).clamp(self.estimate / 2, self.estimate * 2);
            self.estimate = (self.estimate + measured) / 2;
        }
        (self.last, self.last_used, self.last_answered) = (Instant::now(), used, answered);
        self.estimate
    }
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<u64>>,
    /// When the first day began.
    pub started: Instant,
}

impl Load {
    /// Starts the first day. One query takes the server `cost` of CPU time at first, and that is followed in its `cgroups`, in one of which it is.
    pub fn start(
        netns: &Netns,
        server: Ipv4Addr,
        pattern: Pattern,
        cost: Duration,
        cgroups: Vec<PathBuf>,
    ) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let started = Instant::now();
        let mut cost = Cost::new(cost, cgroups);
        let per_s = move |at, answered| {
            let cores = pattern.cores_at(at);
            cores / cost.now(cores, answered).as_secs_f64()
        };
        let thread = netns.spawn("load", move || offer(&stopped, server, per_s, started, query))?;
        Ok(Self { stop, thread, started })
    }

    /// Starts the first day of a load of writes: so many values of `bytes` per second as the pattern has cores, to a hundred keys.
    pub fn start_writes(
        netns: &Netns,
        server: Ipv4Addr,
        pattern: Pattern,
        bytes: usize,
    ) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let started = Instant::now();
        let value = vec![b'v'; bytes];
        let mut number = 0_u64;
        let write = move |connection: &mut redis::Connection| {
            number += 1;
            redis::cmd("SET").arg(format!("load:{}", number % 100)).arg(&value[..]).query::<()>(connection)
        };
        let per_s = move |at, _| pattern.cores_at(at);
        let thread = netns.spawn("writes", move || offer(&stopped, server, per_s, started, write))?;
        Ok(Self { stop, thread, started })
    }

    /// Ends it, and returns how many queries were answered.
    pub fn finish(self) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow::anyhow!("the load's thread panicked"))?
    }
}

/// Offers `per_s(time since the start, queries answered)` queries per second until it is stopped.
fn offer(
    stop: &AtomicBool,
    server: Ipv4Addr,
    mut per_s: impl FnMut(Duration, u64) -> f64,
    started: Instant,
    mut query: impl FnMut(&mut redis::Connection) -> redis::RedisResult<()>,
) -> anyhow::Result<u64> {
    let client = redis::Client::open(format!("redis://{server}:6379/"))?;
    let mut connection = None;
    let mut answered = 0;
    let mut due = 0.0;
    let mut next = started;
    while !stop.load(Ordering::Acquire) {
        next += SLICE;
        let of_slice = per_s(started.elapsed(), answered) * SLICE.as_secs_f64();
        due += of_slice;
        while due >= 1.0 && Instant::now() < next {
            due -= 1.0;
            let Some(open) = &mut connection else {
                connection = connect(&client).ok();
                continue;
            };
            match query(open) {
                Ok(()) => answered += 1,
                // The server is being moved, or was: this query is given up, as a user would.
                Err(_) => connection = None,
            }
        }
        // What could not be offered in its time is not made up for: users don't come back for it at once.
        due = due.min(of_slice + 1.0);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next = next.max(Instant::now());
    }
    Ok(answered)
}

/// Sorts the list, and asks for its first element only.
fn query(connection: &mut redis::Connection) -> redis::RedisResult<()> {
    let mut sort = redis::cmd("SORT");
    sort.arg("load:list").arg("ALPHA").arg("LIMIT").arg(0).arg(1).query::<Vec<String>>(connection).map(drop)
}

fn connect(client: &redis::Client) -> anyhow::Result<redis::Connection> {
    let mut connection = client.get_connection_with_timeout(TIMEOUT)?;
    connection.set_read_timeout(Some(TIMEOUT))?;
    connection.set_write_timeout(Some(TIMEOUT))?;
    let length: u64 = redis::cmd("LLEN").arg("load:list").query(&mut connection)?;
    if length == 0 {
        let mut push = redis::cmd("RPUSH");
        push.arg("load:list");
        for number in 0..SORTED_ELEMENTS {
            push.arg(format!("item-{}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        }
        push.query::<()>(&mut connection).context("cannot make the list to sort")?;
    }
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_follows_its_breakpoints_and_repeats() {
        let pattern = Pattern {
            day: Duration::from_secs(20),
            cores: &[(0.0, 0.1), (0.5, 0.1), (0.6, 1.1), (0.8, 1.1), (0.9, 0.1)],
            peak_from: 0.6,
            peak_to: 0.8,
        };
        let near = |s: f64, cores: f64| {
            let found = pattern.cores_at(Duration::from_secs_f64(s));
            assert!((found - cores).abs() < 1e-6, "{found} cores at {s} s, not {cores}");
        };
        for (s, cores) in [(1.0, 0.1), (11.0, 0.6), (14.0, 1.1), (17.0, 0.6), (19.0, 0.1), (31.0, 0.6)] {
            near(s, cores);
        }
        assert_eq!(pattern.peak_start(2), Duration::from_secs(52));
        assert_eq!(pattern.peak_end(2), Duration::from_secs(56));
        assert_eq!(pattern.day_at(Duration::from_secs(39)), 1);
        let above = |amount: f64, day| pattern.first_above(amount, day).map(|at| at.as_secs_f64());
        let close =
            |found: Option<f64>, s: f64| assert!((found.unwrap() - s).abs() < 1e-6, "{found:?}, not {s}");
        close(above(0.6, 0), 11.0);
        close(above(0.6, 2), 51.0);
        close(above(0.05, 1), 20.0);
        assert_eq!(above(1.1, 0), None);
    }
}
