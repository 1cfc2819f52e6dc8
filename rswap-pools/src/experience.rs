//! What requests of instances really take on a storage pool, by the load at which they are made.
//!
//! ```text
//! a window's histogram, per direction      / what one of that size takes unloaded (calibrated)
//!   -> ratios, counted in the bin of the window's load (powers of two of requests per second)
//!   -> at a load: all bins, the further away (in doublings) the less, and what was calibrated -> LatencyCurve
//! ```
//!
//! Ratios, not times: reads and writes, small and large requests teach one thing then, how much slower it is than it was measured.
//! Where nothing was calibrated, times are counted as they are. Pure: time and requests come in.

use std::collections::BTreeMap;

use rswap_common::histogram::{bounds_of, index_of};
use rswap_types::{LatencyPoint, UnixMillis};

use crate::LocalPool;

/// Calibration counts like so many requests.
const PRIOR_REQUESTS: f64 = 32.0;
/// More than this of a bin is not remembered: it shows what is there now after as many.
const MOST_REQUESTS: f64 = 512.0;
/// After this time without new ones, half of what was counted is forgotten.
const HALF_LIFE_MS: f64 = 600_000.0;
/// What is learnt at one load counts at twice that (and half) by this much.
const PER_DOUBLING: f64 = 0.25;
/// Where nothing was calibrated, less than so many requests say nothing.
const ENOUGH_REQUESTS: f64 = 8.0;
/// Loads further away from all that was seen than so many doublings are not told apart.
const TAIL: i32 = 4;
/// Ratios are counted in this many parts of one.
const PARTS: f64 = 1024.0;
/// What calibration's latencies are measured with, in bytes.
const CALIBRATED_BYTES: f64 = 4096.0;
/// Loads of 2^this and more are one bin.
const LAST_BIN: i32 = 24;

/// What requests take while nothing else is asked of the pool, as calibrated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unloaded {
    /// Median of reads of 4 KiB, in microseconds.
    pub read_us: f64,
    /// Median of writes of 4 KiB, in microseconds.
    pub write_us: f64,
    /// 99 % of both take no longer than this many times the median.
    pub p99_ratio: f64,
    /// How fast a long write goes, in bytes per second.
    pub bytes_per_s: f64,
}

impl Unloaded {
    /// As `rswap calibrate` measured it; `None` where it did not.
    pub fn of(pool: &LocalPool) -> Option<Self> {
        let at = |what| pool.measured(what).filter(|value| value.is_finite() && *value > 0.0);
        let (read_us, write_us) = (at("read_latency_p50_us")?, at("write_latency_p50_us")?);
        let tail = at("read_latency_p99_us").zip(at("write_latency_p99_us"));
        let p99_ratio = tail.map_or(1.0, |(read, write)| (read + write) / (read_us + write_us));
        Some(Self {
            read_us,
            write_us,
            p99_ratio: p99_ratio.max(1.0),
            bytes_per_s: at("write_bytes_per_s").unwrap_or(f64::INFINITY),
        })
    }

    /// Of reads and writes of 4 KiB, the mean of both medians, in microseconds: as [`LocalPool::latency_us`].
    pub fn mean_us(&self) -> f64 {
        (self.read_us + self.write_us) / 2.0
    }

    /// What one request of this many bytes takes, in microseconds: beyond 4 KiB, as fast as a long write goes.
    fn us(&self, writes: bool, bytes: f64) -> f64 {
        let first = if writes { self.write_us } else { self.read_us };
        first + (bytes - CALIBRATED_BYTES).max(0.0) / self.bytes_per_s * 1e6
    }
}

/// What instances asked of a pool in a window, in one direction.
#[derive(Clone, Copy, Debug)]
pub struct Requests<'h> {
    /// Writes, else reads.
    pub writes: bool,
    /// All of them together, in bytes.
    pub bytes: u64,
    /// How long they took, in nanoseconds: (bucket of [`rswap_common::histogram`], count).
    pub latency_ns: &'h [(u16, u64)],
}

/// What was learnt at loads of one power of two.
#[derive(Clone, Debug, Default, PartialEq)]
struct Bin {
    /// Ratio in [`PARTS`], as a bucket -> how many, older ones in part.
    counts: BTreeMap<u16, f64>,
}

impl Bin {
    fn total(&self) -> f64 {
        self.counts.values().sum()
    }

    fn scale(&mut self, by: f64) {
        self.counts.values_mut().for_each(|count| *count *= by);
        self.counts.retain(|_, count| *count > 1e-6);
    }

    /// The logarithm of the ratio that this share of the requests doesn't exceed.
    fn ln_quantile(&self, share: f64) -> Option<f64> {
        let rank = self.total() * share;
        let mut seen = 0.0;
        let reaches = |(_, count): &(&u16, &f64)| {
            seen += **count;
            seen >= rank
        };
        let found = self.counts.iter().find(reaches).or_else(|| self.counts.iter().next_back());
        found.map(|(&index, _)| (bounds_of(index.into()).middle().max(1) as f64 / PARTS).ln())
    }
}

/// What requests took of late, by load.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Experience {
    unloaded: Option<Unloaded>,
    bins: BTreeMap<i32, Bin>,
    at: Option<UnixMillis>,
}

fn bin_of(operations_per_s: f64) -> i32 {
    if operations_per_s >= 1.0 { (operations_per_s.log2() as i32).min(LAST_BIN) } else { 0 }
}

/// The load that a bin stands for: the middle of the logarithms.
fn load_of(bin: i32) -> f64 {
    (f64::from(bin) + 0.5).exp2()
}

fn decay(ms: u64) -> f64 {
    (-(ms as f64) / HALF_LIFE_MS).exp2()
}

impl Experience {
    /// Takes in what instances' requests took in a window that ended at `now`, in which everybody together made so many per second.
    /// When what is `unloaded` is another than before, what was learnt is worth nothing.
    pub fn window(
        &mut self,
        now: UnixMillis,
        unloaded: Option<Unloaded>,
        operations_per_s: f64,
        requests: &[Requests<'_>],
    ) {
        if unloaded != self.unloaded {
            *self = Self { unloaded, ..Self::default() };
        }
        let factor = self.at.map_or(1.0, |before| decay(now.since(before)));
        self.at = Some(now);
        if factor < 1.0 {
            self.bins.values_mut().for_each(|bin| bin.scale(factor));
            self.bins.retain(|_, bin| !bin.counts.is_empty());
        }
        let counted = |of: &Requests<'_>| of.latency_ns.iter().map(|(_, count)| *count).sum::<u64>();
        if !operations_per_s.is_finite() || requests.iter().all(|of| counted(of) == 0) {
            return;
        }
        let bin = self.bins.entry(bin_of(operations_per_s)).or_default();
        for of in requests {
            let count = counted(of);
            if count == 0 {
                continue;
            }
            let size = of.bytes as f64 / count as f64;
            let base = self.unloaded.map_or(1.0, |unloaded| unloaded.us(of.writes, size));
            for &(bucket, count) in of.latency_ns {
                let us = bounds_of(bucket.into()).middle() as f64 / 1e3;
                let ratio = (us / base.max(1e-3) * PARTS).clamp(1.0, 1e15) as u64;
                *bin.counts.entry(index_of(ratio) as u16).or_default() += count as f64;
            }
        }
        let total = bin.total();
        if total > MOST_REQUESTS {
            bin.scale(MOST_REQUESTS / total);
        }
    }

    /// What requests take, by load, at `now`. Without anything calibrated or experienced it has no points.
    pub fn curve(&self, now: UnixMillis) -> Vec<LatencyPoint> {
        let fresh = self.at.map_or(1.0, |at| decay(now.since(at)));
        let (first, last) = (self.bins.keys().next().copied(), self.bins.keys().next_back().copied());
        let (first, last) = (first.unwrap_or(0), last.unwrap_or(0));
        (first.saturating_sub(TAIL).max(0)..=(last + TAIL)).filter_map(|bin| self.point(bin, fresh)).collect()
    }

    fn point(&self, at: i32, fresh: f64) -> Option<LatencyPoint> {
        let (mut requests, mut p50, mut p99) = (0.0, 0.0, 0.0);
        for (&bin, seen) in &self.bins {
            let weight = seen.total() * fresh * PER_DOUBLING.powi((bin - at).abs());
            requests += weight;
            p50 += weight * seen.ln_quantile(0.5).unwrap_or(0.0);
            p99 += weight * seen.ln_quantile(0.99).unwrap_or(0.0);
        }
        let (prior, scale_us, tail) = match self.unloaded {
            Some(unloaded) => (PRIOR_REQUESTS, unloaded.mean_us(), unloaded.p99_ratio.ln()),
            None if requests < ENOUGH_REQUESTS => return None,
            None => (0.0, 1.0, 0.0),
        };
        let p50_us = scale_us * (p50 / (requests + prior)).exp();
        let p99_us = scale_us * ((p99 + prior * tail) / (requests + prior)).exp();
        Some(LatencyPoint { operations_per_s: load_of(at), p50_us, p99_us: p99_us.max(p50_us), requests })
    }
}

#[cfg(test)]
mod tests;
