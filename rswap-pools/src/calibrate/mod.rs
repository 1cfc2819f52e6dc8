//! How well pools do their work: short benchmarks, bounded in time and bytes, and what they found.
//!
//! Nothing here asks whether a pool may be loaded: that is for the caller. A benchmark ends early, without a result, when its
//! [`Stop`] is set.

mod cores;
mod kept;
mod link;
mod memory;
mod storage;

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

pub use cores::{cores, each_core_for};
pub use kept::{Calibration, KeptError, apply, fingerprint, keep, kept};
pub use link::{link, serve};
pub use memory::{memory, memory_bytes};
pub use storage::{FILE_BYTES, storage, storage_bytes};

/// One result: what (with its unit at the end), and how much.
pub type Result = (&'static str, f64);

/// Why a benchmark has no result.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// Somebody asked for the end.
    #[error("it was stopped")]
    Stopped,
    /// Something failed.
    #[error("cannot {attempted}")]
    Io {
        /// What was attempted.
        attempted: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The pool can't be measured.
    #[error("{0}")]
    Refused(String),
}

fn failed(attempted: impl Into<String>) -> impl FnOnce(io::Error) -> CalibrateError {
    move |source| CalibrateError::Io { attempted: attempted.into(), source }
}

/// Ends a benchmark from another thread.
#[derive(Debug, Default)]
pub struct Stop(AtomicBool);

impl Stop {
    /// The benchmark is to end.
    pub fn set(&self) {
        self.0.store(true, Relaxed);
    }

    fn check(&self) -> std::result::Result<(), CalibrateError> {
        if self.0.load(Relaxed) { Err(CalibrateError::Stopped) } else { Ok(()) }
    }
}

/// Runs `pass` (which says how much it did) again and again for `time`; answers with the highest rate per second. What else
/// runs makes a pass slower, never faster: the best of many is the hardware's.
fn best_rate(
    time: Duration,
    stop: &Stop,
    mut pass: impl FnMut() -> u64,
) -> std::result::Result<f64, CalibrateError> {
    let end = Instant::now() + time;
    let mut best = 0.0f64;
    loop {
        stop.check()?;
        let began = Instant::now();
        let done = pass();
        best = best.max(done as f64 / began.elapsed().as_secs_f64().max(1e-9));
        if Instant::now() >= end {
            return Ok(best);
        }
    }
}

/// Runs on `cpu` alone from here on. It holds for the calling thread.
fn pin(cpu: usize) -> std::result::Result<(), CalibrateError> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if cpu >= CpuSet::MAX_CPU {
        return Err(CalibrateError::Refused(format!(
            "CPU {cpu} is above {}: it can't be measured",
            CpuSet::MAX_CPU
        )));
    }
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).map_err(|errno| failed(format!("run on CPU {cpu}"))(errno.into()))
}

/// The value below which `share` (0 to 1) of the sorted values are.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get(((last as f64 * share).round() as usize).min(last)).copied().unwrap_or(f64::NAN)
}

/// A generator of numbers that are the same every time: xorshift64.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let values: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(
            (quantile(&values, 0.5), quantile(&values, 0.99), quantile(&values, 1.0)),
            (50.0, 99.0, 100.0)
        );
        assert_eq!(quantile(&[3.0], 0.99), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn the_best_pass_counts_and_a_stop_ends_it() {
        let stop = Stop::default();
        let mut passes = 0;
        let rate = best_rate(Duration::from_millis(30), &stop, || {
            passes += 1;
            if passes == 2 {
                std::thread::sleep(Duration::from_millis(20));
            }
            std::thread::sleep(Duration::from_millis(1));
            1
        });
        assert!(passes >= 2 && rate.unwrap() > 50.0, "the slow pass is not the one that counts");
        stop.set();
        let stopped = best_rate(Duration::from_secs(60), &stop, || 1);
        assert!(matches!(stopped, Err(CalibrateError::Stopped)));
    }
}
