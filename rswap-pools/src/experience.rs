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

use rswap_common::histogram::bounds_of;
use rswap_types::{LatencyPoint, UnixMillis};

use crate::{LocalPool, by_load::ByLoad};

/// Calibration counts like so many requests.
const PRIOR_REQUESTS: f64 = 32.0;
/// Where nothing was calibrated, less than so many requests say nothing.
const ENOUGH_REQUESTS: f64 = 8.0;
/// What calibration's latencies are measured with, in bytes.
const CALIBRATED_BYTES: f64 = 4096.0;
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

/// What requests took of late, by load.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Experience {
    unloaded: Option<Unloaded>,
    ratios: ByLoad,
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
        let ratios = requests.iter().flat_map(|of| {
            let count: u64 = of.latency_ns.iter().map(|(_, count)| *count).sum();
            let size = of.bytes as f64 / count.max(1) as f64;
            let base = unloaded.map_or(1.0, |unloaded| unloaded.us(of.writes, size)).max(1e-3);
            let us = |bucket: u16| bounds_of(bucket.into()).middle() as f64 / 1e3;
            of.latency_ns.iter().map(move |&(bucket, count)| (us(bucket) / base, count as f64))
        });
        self.ratios.count(now, operations_per_s, ratios);
    }

    /// What requests take, by load, at `now`. Without anything calibrated or experienced it has no points.
    pub fn curve(&self, now: UnixMillis) -> Vec<LatencyPoint> {
        let points = self.ratios.all(now).filter_map(|learnt| {
            let (prior, scale_us, tail) = match self.unloaded {
                Some(unloaded) => (PRIOR_REQUESTS, unloaded.mean_us(), unloaded.p99_ratio.ln()),
                None if learnt.samples < ENOUGH_REQUESTS => return None,
                None => (0.0, 1.0, 0.0),
            };
            let counted = learnt.samples + prior;
            let p50_us = scale_us * (learnt.ln_p50 / counted).exp();
            let p99_us = scale_us * ((learnt.ln_p99 + prior * tail) / counted).exp();
            Some(LatencyPoint {
                operations_per_s: learnt.load,
                p50_us,
                p99_us: p99_us.max(p50_us),
                requests: learnt.samples,
            })
        });
        points.collect()
    }
}

#[cfg(test)]
mod tests;
