//! A load on Redis that repeats, as days do, in seconds.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::netns::Netns;

/// Elements of the list that each query sorts: about a millisecond of the server's time on one core.
const SORTED_ELEMENTS: u64 = 2000;
const TIMEOUT: Duration = Duration::from_millis(200);
/// Load is offered in slices of this length.
const SLICE: Duration = Duration::from_millis(50);

/// A day: quiet, a ramp, the peak, a ramp down.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// Length of a day.
    pub day: Duration,
    /// Queries per second when it is quiet.
    pub quiet_per_s: f64,
    /// Queries per second at the peak.
    pub peak_per_s: f64,
    /// When the ramp to the peak begins, as a share of the day.
    pub ramp_from: f64,
    /// When the peak begins, as a share of the day.
    pub peak_from: f64,
    /// When the peak ends, as a share of the day. The ramp down is as long as the ramp up.
    pub peak_to: f64,
}

impl Pattern {
    /// Queries per second, `at` after the first day's beginning.
    pub fn rate_per_s(&self, at: Duration) -> f64 {
        let days = at.as_secs_f64() / self.day.as_secs_f64();
        let share = days.fract();
        let ramp = self.peak_from - self.ramp_from;
        let height = if share < self.ramp_from {
            0.0
        } else if share < self.peak_from {
            (share - self.ramp_from) / ramp
        } else if share < self.peak_to {
            1.0
        } else {
            (1.0 - (share - self.peak_to) / ramp).max(0.0)
        };
        self.quiet_per_s + height * (self.peak_per_s - self.quiet_per_s)
    }

    /// When the peak of day `day` (from 0) begins, after the first day's beginning.
    pub fn peak_start(&self, day: u32) -> Duration {
        self.day * day + self.day.mul_f64(self.peak_from)
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
    /// Starts the first day.
    pub fn start(netns: &Netns, server: Ipv4Addr, pattern: Pattern) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let started = Instant::now();
        let thread = netns.spawn("load", move || offer(&stopped, server, pattern, started))?;
        Ok(Self { stop, thread, started })
    }

    /// Ends it, and returns how many queries were answered.
    pub fn finish(self) -> anyhow::Result<u64> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow::anyhow!("the load's thread panicked"))?
    }
}

fn offer(stop: &AtomicBool, server: Ipv4Addr, pattern: Pattern, started: Instant) -> anyhow::Result<u64> {
    let client = redis::Client::open(format!("redis://{server}:6379/"))?;
    let mut connection = None;
    let mut answered = 0;
    let mut due = 0.0;
    let mut next = started;
    while !stop.load(Ordering::Acquire) {
        next += SLICE;
        due += pattern.rate_per_s(started.elapsed()) * SLICE.as_secs_f64();
        while due >= 1.0 && Instant::now() < next {
            due -= 1.0;
            let Some(open) = &mut connection else {
                connection = connect(&client).ok();
                continue;
            };
            let sort =
                redis::cmd("SORT").arg("load:list").arg("ALPHA").arg("LIMIT").arg(0).arg(1).query(open);
            match sort {
                Ok(redis::Value::Array(_)) => answered += 1,
                // The server is being moved, or was: this query is given up, as a user would.
                _ => connection = None,
            }
        }
        // What could not be offered in its time is not made up for: users don't come back for it at once.
        due = due.min(pattern.rate_per_s(started.elapsed()) * SLICE.as_secs_f64() + 1.0);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        next = next.max(Instant::now());
    }
    Ok(answered)
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
    fn the_load_is_quiet_then_high_then_quiet_and_repeats() {
        let pattern = Pattern {
            day: Duration::from_secs(20),
            quiet_per_s: 10.0,
            peak_per_s: 110.0,
            ramp_from: 0.5,
            peak_from: 0.6,
            peak_to: 0.8,
        };
        let rate = |s: f64| pattern.rate_per_s(Duration::from_secs_f64(s));
        assert_eq!(rate(1.0), 10.0);
        assert!((rate(11.0) - 60.0).abs() < 1e-6);
        assert_eq!(rate(14.0), 110.0);
        assert!((rate(17.0) - 60.0).abs() < 1e-6);
        assert_eq!(rate(19.0), 10.0);
        assert_eq!(rate(21.0), rate(1.0));
        assert_eq!(pattern.peak_start(2), Duration::from_secs(52));
    }
}
