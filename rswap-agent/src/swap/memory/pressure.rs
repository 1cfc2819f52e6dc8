//! How much may be paged out, by how long the instance waits for its memory.
//!
//! The rule is that of Meta's Senpai (TMO: Transparent Memory Offloading in Datacenters, ASPLOS 2022, section 3.3):
//! `reclaim = most * max(0, 1 - pressure / limit)`, where `most` is a rate here instead of a share of the instance's memory.
//!
//! The pressure is the `some` of `memory.pressure`, or what the major faults of its processes must have taken, whichever is more: the kernel
//! counts a wait for a page from swap only if the page was used much before it went, and only where it keeps pressures.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How long an instance waited for its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pressure {
    /// Share of the time.
    #[serde(rename = "waiting_share")]
    pub share: f64,
    /// Pages that were fetched from swap, or from files, per second.
    pub faults_per_s: f64,
}

/// Bytes that may be paged out of an instance after `elapsed` under this pressure.
pub(super) fn allowed(bytes_per_s: f64, elapsed: Duration, pressure: f64, limit: f64) -> u64 {
    if pressure >= limit {
        return 0;
    }
    (bytes_per_s * elapsed.as_secs_f64() * (1.0 - pressure / limit)) as u64
}

/// Waits and faults so far.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    at: Instant,
    /// `None` where the kernel keeps no pressures.
    stalled: Option<Duration>,
    /// Of each process.
    faults: BTreeMap<i32, u64>,
}

impl Reading {
    /// Of the processes in a cgroup, as of now.
    pub(super) fn take(cgroup: &Path, pids: &[i32]) -> Self {
        let pressure = fs::read_to_string(cgroup.join("memory.pressure"));
        let faults = pids.iter().filter_map(|pid| {
            let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((*pid, major_faults(&text)?))
        });
        Self {
            at: Instant::now(),
            stalled: pressure.ok().and_then(|text| stalled(&text)),
            faults: faults.collect(),
        }
    }

    pub(super) fn elapsed_since(&self, before: &Self) -> Duration {
        self.at - before.at
    }

    /// What there was since `before`, where a fault takes so long.
    pub(super) fn since(&self, before: &Self, fault: Duration) -> Pressure {
        let elapsed_s = self.elapsed_since(before).as_secs_f64().max(1e-3);
        // Of a process that is new, all: it had none before it was there.
        let faults =
            self.faults.iter().map(|(pid, now)| now.saturating_sub(*before.faults.get(pid).unwrap_or(&0)));
        let faults_per_s = faults.sum::<u64>() as f64 / elapsed_s;
        let stalled = match (self.stalled, before.stalled) {
            (Some(now), Some(before)) => now.saturating_sub(before).as_secs_f64() / elapsed_s,
            _ => 0.0,
        };
        Pressure { share: stalled.max(faults_per_s * fault.as_secs_f64()), faults_per_s }
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=1234`, in microseconds.
fn stalled(text: &str) -> Option<Duration> {
    let line = text.lines().find(|line| line.starts_with("some "))?;
    let total = line.split_whitespace().find_map(|word| word.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

/// The twelfth field of `/proc/PID/stat`, counted behind the name, which may hold spaces and parentheses.
fn major_faults(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(9)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1_048_576.0;

    #[test]
    fn less_is_allowed_the_nearer_the_limit_is_and_nothing_above_it() {
        let second = Duration::from_secs(1);
        assert_eq!(allowed(64.0 * MIB, second, 0.0, 0.01), 64 << 20);
        assert_eq!(allowed(64.0 * MIB, second / 2, 0.005, 0.01), 16 << 20);
        assert_eq!(allowed(64.0 * MIB, second, 0.01, 0.01), 0);
        assert_eq!(allowed(64.0 * MIB, second, 0.5, 0.01), 0);
        assert_eq!(allowed(64.0 * MIB, second, 0.0, 0.0), 0, "no wait at all is allowed");
    }

    #[test]
    fn the_longer_of_both_waits_counts() {
        let at = Instant::now();
        let faults = |n| BTreeMap::from([(7, n)]);
        let before = Reading { at, stalled: Some(Duration::from_millis(10)), faults: faults(100) };
        let after = Reading {
            at: at + Duration::from_secs(2),
            stalled: Some(Duration::from_millis(30)),
            faults: faults(1100),
        };
        let seen = after.since(&before, Duration::from_micros(5));
        assert!((seen.share - 0.01).abs() < 1e-9 && (seen.faults_per_s - 500.0).abs() < 1e-9, "{seen:?}");
        let slow = after.since(&before, Duration::from_micros(100));
        assert!((slow.share - 0.05).abs() < 1e-9, "{slow:?}");
        let unkept = Reading { stalled: None, ..after }.since(&before, Duration::from_micros(4));
        assert!((unkept.share - 0.002).abs() < 1e-9, "{unkept:?}");
    }

    #[test]
    fn numbers_are_found_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 500 0 42 0 1 2";
        assert_eq!(major_faults(stat), Some(42));
        assert_eq!(major_faults("7 (a"), None);
        assert_eq!(
            stalled("some avg10=0.00 total=81\nfull avg10=0.00 total=3\n"),
            Some(Duration::from_micros(81))
        );
        assert_eq!(stalled(""), None);
    }
}
