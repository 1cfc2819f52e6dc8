//! One resource of one instance: its recent values, the experts, and their forecasts per horizon.

use std::collections::VecDeque;

use super::{
    Evidence, Quantiles,
    horizon::{EXPERTS, Horizon, SEASONAL},
    season,
};

/// Windows kept: the longest period that can be found is half of it.
const KEPT: usize = 512;
/// The period is looked for again after so many windows.
const SEARCH_EVERY: u64 = 4;
/// Smoothing of the level.
const ALPHA: f64 = 0.3;
/// Smoothing of the trend.
const BETA: f64 = 0.1;
/// A trend is not drawn out for longer than this, in windows.
const TREND_REACH: f64 = 20.0;

#[derive(Clone, Debug)]
pub(super) struct Series {
    values: VecDeque<f64>,
    seen: u64,
    ewma: f64,
    level: f64,
    trend: f64,
    period: Option<usize>,
    horizons: Vec<Horizon>,
}

impl Series {
    pub(super) fn new(horizons_ms: &[u64], window_ms: u64) -> Self {
        Self {
            values: VecDeque::with_capacity(KEPT),
            seen: 0,
            ewma: 0.0,
            level: 0.0,
            trend: 0.0,
            period: None,
            horizons: horizons_ms.iter().map(|ms| Horizon::new(ms / window_ms)).collect(),
        }
    }

    /// Windows went by unseen. Positions in the period go on; forecasts for them are never judged.
    pub(super) fn skip(&mut self, windows: u64) {
        if windows as usize >= KEPT {
            self.values.clear();
            self.period = None;
            self.seen = 0;
            self.horizons.iter_mut().for_each(Horizon::interrupt);
            return;
        }
        for _ in 0..windows {
            if let Some(&last) = self.values.back() {
                // What the season says is the better guess: the last value would be repeated as a part of it.
                let newest = self.values.len() - 1;
                let guess = self.period.and_then(|period| season::repeat(&self.values, newest, 1, period));
                self.keep(guess.unwrap_or(last));
                let experts =
                    self.horizons.iter().map(|horizon| self.experts(horizon.steps())).collect::<Vec<_>>();
                for (horizon, experts) in self.horizons.iter_mut().zip(experts) {
                    horizon.advance(None, experts);
                }
            }
        }
    }

    /// Takes in the next window. A value that is no amount counts as unseen.
    pub(super) fn observe(&mut self, value: f64) {
        if !value.is_finite() || value < 0.0 {
            return self.skip(1);
        }
        if self.seen == 0 {
            (self.ewma, self.level, self.trend) = (value, value, 0.0);
        } else {
            self.ewma += ALPHA * (value - self.ewma);
            let before = self.level;
            self.level = ALPHA * value + (1.0 - ALPHA) * (self.level + self.trend);
            self.trend = BETA * (self.level - before) + (1.0 - BETA) * self.trend;
        }
        self.seen += 1;
        self.keep(value);
        if self.seen.is_multiple_of(SEARCH_EVERY) {
            self.search();
        }
        let experts = self.horizons.iter().map(|horizon| self.experts(horizon.steps())).collect::<Vec<_>>();
        for (horizon, experts) in self.horizons.iter_mut().zip(experts) {
            horizon.advance(Some(value), experts);
        }
    }

    /// Quantiles and evidence per horizon.
    pub(super) fn forecasts(&self, needed: u64) -> impl Iterator<Item = (Quantiles, Evidence)> {
        self.horizons.iter().map(move |horizon| (horizon.quantiles(), horizon.evidence(needed)))
    }

    fn keep(&mut self, value: f64) {
        if self.values.len() == KEPT {
            self.values.pop_front();
        }
        self.values.push_back(value);
    }

    /// Looks for the period. A new one can be judged at once: what it would have forecast is known from the kept values.
    fn search(&mut self) {
        let found = season::period(&self.values);
        if found == self.period {
            return;
        }
        let appeared = found.is_some() != self.period.is_some();
        self.period = found;
        for horizon in &mut self.horizons {
            let steps = horizon.steps();
            let errors = found.map(|period| {
                let judged = (0..self.values.len().saturating_sub(steps)).filter_map(|from| {
                    Some(self.values[from + steps] - season::repeat(&self.values, from, steps, period)?)
                });
                judged.collect()
            });
            horizon.relearn(SEASONAL, errors.unwrap_or_default());
            if appeared {
                horizon.recalibrate();
            }
        }
    }

    /// The experts' points, `None` for one that has nothing to say.
    fn experts(&self, steps: usize) -> [Option<f64>; EXPERTS] {
        let last = self.values.back().copied();
        let reach = (steps as f64).min(TREND_REACH);
        let seasonal = self.period.and_then(|period| {
            season::repeat(&self.values, self.values.len().checked_sub(1)?, steps, period)
        });
        [last, Some(self.ewma), Some((self.level + self.trend * reach).max(0.0)), seasonal]
    }
}
