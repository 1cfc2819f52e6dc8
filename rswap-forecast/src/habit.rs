//! What is usual: at this time of the day, and at all.

use serde::{Deserialize, Serialize};
use serde_big_array::BigArray;

use super::numeric::Position;

/// Most parts that a day is divided into.
const PARTS: usize = 288;
/// A day is gone through in so many steps at most.
const MOST_STEPS: u64 = 8192;
/// Weight of the newest day.
const NEWEST_DAY: f32 = 0.3;

/// The usual position at each time of the day.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Day {
    windows: u64,
    usual: Vec<Position>,
    /// How often each part was seen.
    times: Vec<u8>,
}

impl Day {
    pub(super) fn new(windows: u64) -> Self {
        let windows = windows.max(1);
        let parts = windows.min(PARTS as u64) as usize;
        Self { windows, usual: vec![Position::default(); parts], times: vec![0; parts] }
    }

    /// Whether it is one of so many windows.
    pub(super) fn is_sound(&self, windows: u64) -> bool {
        let new = Self::new(windows);
        (self.windows, self.usual.len(), self.times.len()) == (new.windows, new.usual.len(), new.times.len())
    }

    /// Windows in a day.
    pub(super) fn windows(&self) -> u64 {
        self.windows
    }

    fn part(&self, tick: u32) -> usize {
        ((u64::from(tick) % self.windows) * self.usual.len() as u64 / self.windows) as usize
    }

    pub(super) fn learn(&mut self, tick: u32, position: f32) {
        let part = self.part(tick);
        let windows_per_part = (self.windows / self.usual.len() as u64).max(1) as f32;
        let times = self.times[part];
        let step = (NEWEST_DAY / windows_per_part).max(1.0 / (1.0 + f32::from(times)));
        let usual = self.usual[part].get();
        self.usual[part] = Position::new(usual + (position - usual) * step);
        self.times[part] = times.saturating_add(1);
    }

    /// Up to `tick`, nothing was used in so many windows, of which it has learnt the newest `known`.
    pub(super) fn saw_nothing(&mut self, tick: u32, windows: u64, known: u64) {
        let windows = windows.min(self.windows);
        // Of a long day with short windows, each stands for several: all parts are seen far more often than is counted.
        let each = (windows / MOST_STEPS).max(1);
        for back in (known..windows).step_by(each as usize) {
            let part = self.part(tick.wrapping_sub(back as u32));
            // Its usual position is 0 from the beginning.
            self.times[part] = self.times[part].saturating_add(each.min(255) as u8);
        }
    }

    /// The usual position at `tick`, if that time of the day was seen before.
    pub(super) fn at(&self, tick: u32) -> Option<f32> {
        let part = self.part(tick);
        (self.times[part] > 0).then(|| self.usual[part].get())
    }

    /// Memory that it takes, in bytes, next to itself.
    pub(super) fn bytes(&self) -> usize {
        self.usual.capacity() * size_of::<Position>() + self.times.capacity()
    }

    pub(super) fn rescale(&mut self, convert: impl Fn(f32) -> f32) {
        self.usual.iter_mut().for_each(|usual| *usual = Position::new(convert(usual.get())));
    }
}

/// Width of a histogram's bin, as a difference of positions.
const WIDTH: f32 = 0.1;
/// Bins: positions up to 8, which is three thousand times the usual amount.
const BINS: usize = 80;

/// All that was seen, fading over a day: as VPA's recommender and Autopilot see demand.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Histogram {
    #[serde(with = "BigArray")]
    weights: [f32; BINS],
    /// Weight of the newest; it grows instead of the others fading.
    newest: f32,
    growth: f32,
}

impl Histogram {
    /// Number of bins.
    pub(super) const BINS: usize = BINS;
    /// Width of a bin.
    pub(super) const WIDTH: f32 = WIDTH;

    /// Whether its numbers are possible.
    pub(super) fn is_sound(&self) -> bool {
        let possible = |number: &f32| number.is_finite() && *number >= 0.0;
        self.weights.iter().chain([&self.newest, &self.growth]).all(possible)
    }

    /// The share of time in each bin.
    pub(super) fn shares(&self) -> Vec<f32> {
        let total: f32 = self.weights.iter().sum();
        self.weights.iter().map(|weight| if total > 0.0 { weight / total } else { 0.0 }).collect()
    }

    /// Others of its kind were at these positions, which counts as so many windows.
    pub(super) fn start_from(&mut self, shares: &[f32], windows: f32) {
        for (weight, share) in self.weights.iter_mut().zip(shares) {
            *weight += share.max(0.0) * windows * self.newest;
        }
    }

    pub(super) fn new(day: u64) -> Self {
        let half_life = day.max(1) as f32;
        let growth = 1.0 + super::numeric::expm1(std::f32::consts::LN_2 / half_life);
        Self { weights: [0.0; BINS], newest: 1.0, growth }
    }

    pub(super) fn learn(&mut self, position: f32) {
        self.newest *= self.growth;
        if self.newest > 1e9 {
            let unit = 1.0 / self.newest;
            self.weights.iter_mut().for_each(|weight| *weight *= unit);
            self.newest = 1.0;
        }
        self.weights[bin(position)] += self.newest;
    }

    /// As much as if it had learnt the position 0 in so many windows before.
    pub(super) fn saw_nothing(&mut self, windows: u64) {
        // The weights of all windows that there ever can be add up to that of so many.
        let most = 1.0 / (self.growth - 1.0).max(f32::MIN_POSITIVE);
        self.weights[0] += self.newest * (windows as f32).min(most);
    }

    /// Quantiles of the forecast's levels, as positions.
    pub(super) fn quantiles(&self) -> [f32; 4] {
        let total: f32 = self.weights.iter().sum();
        let mut result = [0.0; 4];
        let mut wanted = 3;
        let mut above = 0.0;
        for (bin, &weight) in self.weights.iter().enumerate().rev() {
            if weight == 0.0 {
                continue;
            }
            loop {
                let goal = super::lead::TAILS[wanted] * total;
                if above + weight < goal {
                    break;
                }
                result[wanted] = (bin as f32 + 1.0 - (goal - above) / weight) * WIDTH;
                if wanted == 0 {
                    return result;
                }
                wanted -= 1;
            }
            above += weight;
        }
        result
    }

    pub(super) fn rescale(&mut self, convert: impl Fn(f32) -> f32) {
        let old = std::mem::replace(&mut self.weights, [0.0; BINS]);
        for (i, weight) in old.into_iter().enumerate() {
            self.weights[bin(convert((i as f32 + 0.5) * WIDTH))] += weight;
        }
    }
}

fn bin(position: f32) -> usize {
    ((position / WIDTH) as usize).min(BINS - 1)
}
