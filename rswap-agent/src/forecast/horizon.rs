//! One horizon of one series: what was forecast, how it turned out, and what follows for the next forecast.

use std::collections::VecDeque;

use super::{Evidence, Quantiles};

/// Number of experts: last value, EWMA, Holt, seasonal-naive.
pub(super) const EXPERTS: usize = 4;
/// Which of them is the seasonal one.
pub(super) const SEASONAL: usize = 3;

const LEVELS: [f64; 4] = [0.5, 0.9, 0.95, 0.99];
/// Longest horizon, in windows: it bounds the forecasts that wait for their outcome.
const MAX_STEPS: u64 = 4096;
/// Errors kept per expert.
const ERRORS: usize = 256;
/// An expert with fewer known errors has no say.
const MIN_ERRORS: usize = 8;
/// Weight of the newest loss.
const FORGETTING: f64 = 0.05;
/// How sharply the better expert is preferred.
const SHARPNESS: i32 = 4;
/// Step of the conformal correction, in mean absolute errors.
const STEP: f64 = 0.1;
/// Farthest that the correction goes, in mean absolute errors.
const FARTHEST: f64 = 10.0;

#[derive(Clone, Debug, Default)]
struct Expert {
    errors: VecDeque<f64>,
    /// Discounted mean pinball loss; `None` until there is one.
    loss: Option<f64>,
}

/// A forecast that waits for its outcome.
#[derive(Clone, Debug)]
struct Pending {
    points: [Option<f64>; EXPERTS],
    /// Each expert's quantiles.
    spreads: [Option<[f64; 4]>; EXPERTS],
    /// What was given out, if there was enough to say anything.
    given: Option<[f64; 4]>,
    /// Made before the last recalibration: it counts for the coverage, but says nothing about the present correction.
    outdated: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Horizon {
    steps: usize,
    experts: [Expert; EXPERTS],
    pending: VecDeque<Pending>,
    /// Conformal correction per level.
    shift: [f64; 4],
    mean_abs_error: f64,
    /// Outcomes that the correction rests on.
    since_calibration: u64,
    seen: u64,
    covered: u64,
    newest: [f64; 4],
}

impl Horizon {
    pub(super) fn new(steps: u64) -> Self {
        Self {
            steps: steps.clamp(1, MAX_STEPS) as usize,
            experts: Default::default(),
            pending: VecDeque::new(),
            shift: [0.0; 4],
            mean_abs_error: 0.0,
            since_calibration: 0,
            seen: 0,
            covered: 0,
            newest: [0.0; 4],
        }
    }

    /// How far ahead, in windows.
    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    /// One window on: judges the forecast that was made for it, if its outcome is known, and makes the next one.
    pub(super) fn advance(&mut self, outcome: Option<f64>, points: [Option<f64>; EXPERTS]) {
        if self.pending.len() >= self.steps
            && let Some(due) = self.pending.pop_front()
            && let Some(outcome) = outcome
        {
            self.judge(&due, outcome);
        }
        let spreads: [Option<[f64; 4]>; EXPERTS] =
            std::array::from_fn(|i| points[i].and_then(|point| self.experts[i].spread(point)));
        let combined = self.combine(&spreads);
        let given = combined.map(|quantiles| {
            let mut shifted: [f64; 4] = std::array::from_fn(|i| (quantiles[i] + self.shift[i]).max(0.0));
            // Corrections are made level by level: put them in order again.
            for i in 1..shifted.len() {
                shifted[i] = shifted[i].max(shifted[i - 1]);
            }
            shifted
        });
        self.newest = given.unwrap_or_else(|| [points[0].unwrap_or_default(); 4]);
        self.pending.push_back(Pending { points, spreads, given, outdated: false });
    }

    /// What was forecast before can't be judged any more.
    pub(super) fn interrupt(&mut self) {
        self.pending.clear();
        self.relearn(SEASONAL, Vec::new());
    }

    /// Replaces what is known of an expert by the errors that it would have made.
    pub(super) fn relearn(&mut self, expert: usize, errors: Vec<f64>) {
        let known = Expert { errors: errors.into_iter().collect(), loss: None };
        let skip = known.errors.len().saturating_sub(ERRORS);
        let errors: VecDeque<f64> = known.errors.into_iter().skip(skip).collect();
        let mut relearned = Expert { errors, loss: None };
        relearned.loss = relearned.spread(0.0).map(|spread| {
            let count = relearned.errors.len() as f64;
            relearned.errors.iter().map(|&error| mean_pinball(&spread, error)).sum::<f64>() / count
        });
        self.experts[expert] = relearned;
        // A point of the old expert says nothing about the new one.
        for pending in &mut self.pending {
            pending.points[expert] = None;
            pending.spreads[expert] = None;
        }
    }

    /// The season has appeared or gone: corrections that were made for the other case would take thousands of windows
    /// to fade, and keep the quantiles far too wide meanwhile.
    pub(super) fn recalibrate(&mut self) {
        self.shift = [0.0; 4];
        self.since_calibration = 0;
        self.mean_abs_error = 0.0;
        for pending in &mut self.pending {
            pending.outdated = true;
        }
    }

    pub(super) fn quantiles(&self) -> Quantiles {
        let [p50, p90, p95, p99] = self.newest;
        Quantiles { p50, p90, p95, p99 }
    }

    pub(super) fn evidence(&self, needed: u64) -> Evidence {
        if self.seen < needed || self.seen == 0 {
            Evidence::TooLittle { seen: self.seen, needed }
        } else {
            Evidence::Enough { seen: self.seen, p95_coverage: self.covered as f64 / self.seen as f64 }
        }
    }

    fn judge(&mut self, due: &Pending, outcome: f64) {
        for (i, expert) in self.experts.iter_mut().enumerate() {
            if let Some(spread) = &due.spreads[i] {
                let loss = mean_pinball(spread, outcome);
                expert.loss = Some(expert.loss.map_or(loss, |old| old + FORGETTING * (loss - old)));
            }
            if let Some(point) = due.points[i] {
                if expert.errors.len() == ERRORS {
                    expert.errors.pop_front();
                }
                expert.errors.push_back(outcome - point);
            }
        }
        let Some(given) = &due.given else { return };
        self.seen += 1;
        self.covered += u64::from(outcome <= given[2]);
        if due.outdated {
            return;
        }
        self.since_calibration += 1;
        let error = (outcome - given[0]).abs();
        self.mean_abs_error +=
            (error - self.mean_abs_error) * FORGETTING.max(1.0 / self.since_calibration as f64);
        let farthest = FARTHEST * self.mean_abs_error;
        for i in 0..LEVELS.len() {
            let exceeded = f64::from(u8::from(outcome > given[i]));
            let step = STEP * self.mean_abs_error * (exceeded - (1.0 - LEVELS[i]));
            self.shift[i] = (self.shift[i] + step).clamp(-farthest, farthest);
        }
    }

    fn combine(&self, spreads: &[Option<[f64; 4]>; EXPERTS]) -> Option<[f64; 4]> {
        let losses = self.experts.iter().map(|expert| expert.loss);
        let said: Vec<_> = spreads.iter().zip(losses).filter_map(|(s, loss)| s.map(|s| (s, loss))).collect();
        let best = said.iter().filter_map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
        let mut sum = [0.0; 4];
        let mut weights = 0.0;
        for (spread, loss) in &said {
            let weight = match loss {
                // The tiny term keeps two perfect experts comparable.
                Some(loss) => ((best + 1e-12) / (loss + 1e-12)).powi(SHARPNESS),
                None if best.is_finite() => 0.0,
                None => 1.0,
            };
            weights += weight;
            for (total, value) in sum.iter_mut().zip(spread) {
                *total += weight * value;
            }
        }
        (weights > 0.0).then(|| sum.map(|total| total / weights))
    }
}

impl Expert {
    /// The quantiles around a point, from the expert's own errors.
    fn spread(&self, point: f64) -> Option<[f64; 4]> {
        if self.errors.len() < MIN_ERRORS {
            return None;
        }
        let mut sorted: Vec<f64> = self.errors.iter().copied().collect();
        sorted.sort_unstable_by(f64::total_cmp);
        // Rank (n + 1) q, as conformal prediction has it: few errors give a wide spread.
        let at = |level: f64| {
            let rank = ((sorted.len() + 1) as f64 * level).ceil() as usize;
            sorted[rank.clamp(1, sorted.len()) - 1]
        };
        Some(LEVELS.map(|level| point + at(level)))
    }
}

fn mean_pinball(quantiles: &[f64; 4], outcome: f64) -> f64 {
    let losses = quantiles.iter().zip(LEVELS).map(|(quantile, level)| {
        let error = outcome - quantile;
        (level * error).max((level - 1.0) * error)
    });
    losses.sum::<f64>() / LEVELS.len() as f64
}
