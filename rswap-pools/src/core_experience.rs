//! How much longer work of instances really takes on a set of cores, for waiting until others leave one, by load.
//!
//! ```text
//! of each instance in a window: (ran + waited while others ran) / ran
//!   -> counted in the bin of the window's load (share of the cores that is taken)
//!   -> at a load: all bins, the further away the less, and that a core of one's own disturbs nobody -> SlowdownCurve
//! ```
//!
//! The mean of a window, not its median wait: times of waiting add up to the time that work takes. And the median of the windows:
//! one that was bad changes nothing. Pure: time and what was counted come in.

use rswap_types::{LatencyPoint, SlowdownCurve, SlowdownPoint, UnixMillis};

use crate::{
    by_load::{ByLoad, Learnt, MOST},
    experience::{Experience, Requests},
};

/// One sample is so much time of an instance that ran or waited, in seconds.
const SAMPLE_S: f64 = 0.01;
/// All instances together count for at most this part of what is remembered of a load, in one window: with more than five busy cores a second would else
/// be all that is known.
const WINDOW_PART: f64 = 1.0 / 16.0;
/// That a core of one's own disturbs nobody counts like so many samples.
const PRIOR: f64 = 32.0;
/// Whoever ran less than this in a window, in seconds, says nothing.
const LEAST_RAN_S: f64 = 0.001;
/// More than this many times as long is counted as this.
const MOST_TIMES: f64 = 1000.0;
/// Loads are counted in this many parts of all cores: powers of two of that are told apart, and full cores are in the middle of one.
const LOAD_PARTS: f64 = 100.0;

/// What an instance did on the pool's cores in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Turns {
    /// How long its threads ran, in seconds, summed up.
    pub ran_s: f64,
    /// How long they waited while others than itself ran, in seconds.
    pub waited_s: f64,
}

/// What instances' work took of late, by load.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CoreExperience {
    slowdown: ByLoad,
    waits: Experience,
}

impl CoreExperience {
    /// Takes in a window that ended at `now`, in which this share of the cores was taken: what each instance did there, and for how long
    /// their threads waited each time, for whomever: (bucket of [`rswap_common::histogram`] in nanoseconds, count). True if any
    /// of it counts.
    pub fn window(
        &mut self,
        now: UnixMillis,
        load: f64,
        turns: &[Turns],
        waited_ns: &[&[(u16, u64)]],
    ) -> bool {
        let samples: Vec<(f64, f64)> = turns
            .iter()
            .filter(|of| of.ran_s >= LEAST_RAN_S && of.waited_s >= 0.0 && of.waited_s.is_finite())
            .map(|of| {
                let all_s = of.ran_s + of.waited_s;
                ((all_s / of.ran_s).min(MOST_TIMES), all_s / SAMPLE_S)
            })
            .collect();
        let counts = !samples.is_empty();
        let total: f64 = samples.iter().map(|(_, count)| count).sum();
        let part = (MOST * WINDOW_PART / total).min(1.0);
        let samples = samples.into_iter().map(|(times, count)| (times, count * part));
        self.slowdown.count(now, load * LOAD_PARTS, samples);
        let waits: Vec<Requests<'_>> =
            waited_ns.iter().map(|latency_ns| Requests { writes: false, bytes: 0, latency_ns }).collect();
        self.waits.window(now, None, load * LOAD_PARTS, &waits);
        counts
    }

    /// How much longer work takes, by load, at `now`; without points if nobody has run there.
    pub fn curve(&self, now: UnixMillis) -> SlowdownCurve {
        let point = |learnt: Learnt| SlowdownPoint {
            load: learnt.load / LOAD_PARTS,
            times: (learnt.ln_p50 / (learnt.samples + PRIOR)).exp().max(1.0),
            seconds: learnt.samples * SAMPLE_S,
        };
        let points: Vec<SlowdownPoint> = self.slowdown.all(now).map(point).collect();
        if points.iter().any(SlowdownPoint::is_experienced) {
            SlowdownCurve { points }
        } else {
            SlowdownCurve::default()
        }
    }

    /// How long a thread that can run waits for a core at this load, at `now`.
    pub fn waits(&self, now: UnixMillis, load: f64) -> Option<LatencyPoint> {
        let curve = rswap_types::LatencyCurve { reference_us: 0.0, points: self.waits.curve(now) };
        curve.at(load * LOAD_PARTS)
    }
}

#[cfg(test)]
mod tests;
