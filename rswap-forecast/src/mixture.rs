//! Who is believed: the weights of the experts for one quantile of one lead.
//!
//! Bernstein online aggregation on the gradient of the pinball loss: weights end up near the best *mixture*, not the
//! best expert. Losses fade, so that another expert can take over.

use serde::{Deserialize, Serialize};

use super::numeric::expm1;

/// Number of experts.
pub(super) const EXPERTS: usize = 9;
/// What the experts say about one quantile.
pub(super) type Opinions = [f32; EXPERTS];

/// Weight that is left of a loss after one more.
const FADE: f32 = 0.998;
/// Share of the weight that is spread evenly, so that nobody is forgotten.
const EVEN: f32 = 0.01;

/// The larger, the more is concluded from few losses.
const BOLDNESS: f32 = 1.2;

/// Share of what others have gained that a new series starts with.
const PRIOR: f32 = 0.3;
/// The variance that goes with it.
const PRIOR_VARIANCE: f32 = 3.0;

/// Weights, and what they rest on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Mixture {
    weights: Opinions,
    gained: Opinions,
    variance: Opinions,
    scale: f32,
}

impl Mixture {
    pub(super) fn new(known: &[bool; EXPERTS]) -> Self {
        let mut new =
            Self { weights: [0.0; EXPERTS], gained: [0.0; EXPERTS], variance: [0.0; EXPERTS], scale: 0.0 };
        new.weigh(known);
        new
    }

    /// The mixture of what is said.
    #[inline]
    pub(super) fn of(&self, opinions: &Opinions) -> f32 {
        // Relative to one of them: where all say the same, so does the mixture, to the last bit.
        let base = opinions[0];
        let mut sum = 0.0;
        for i in 0..EXPERTS {
            sum += self.weights[i] * (opinions[i] - base);
        }
        base + sum
    }

    /// Who would have been better: `opinions` were held of a quantile of which the share `tail` lies above.
    pub(super) fn learn(&mut self, opinions: &Opinions, outcome: f32, tail: f32, known: &[bool; EXPERTS]) {
        let mixed = self.of(opinions);
        let slope = if outcome < mixed { tail } else { tail - 1.0 };
        let losses: Opinions =
            std::array::from_fn(|i| slope * (opinions[i] - mixed) * f32::from(u8::from(known[i])));
        let largest = losses.iter().fold(0.0f32, |largest, loss| largest.max(loss.abs()));
        if largest == 0.0 || !largest.is_finite() {
            return;
        }
        self.scale = (self.scale * 0.999).max(largest);
        let unit = 1.0 / self.scale;
        for i in 0..EXPERTS {
            let loss = losses[i] * unit;
            self.variance[i] = self.variance[i] * FADE + loss * loss;
            let rate = rate(self.variance[i]);
            self.gained[i] = self.gained[i] * FADE - loss - 0.5 * rate * loss * loss;
        }
        self.weigh(known);
    }

    pub(super) fn gained(&self) -> &Opinions {
        &self.gained
    }

    /// Whether every number in it is one.
    pub(super) fn is_sound(&self) -> bool {
        let all = self.weights.iter().chain(&self.gained).chain(&self.variance).chain([&self.scale]);
        all.copied().all(f32::is_finite)
    }

    /// Others of its kind have gained this.
    pub(super) fn start_from(&mut self, gained: &Opinions, known: &[bool; EXPERTS]) {
        for i in 0..EXPERTS {
            self.gained[i] = if known[i] { gained[i] * PRIOR } else { 0.0 };
            self.variance[i] = PRIOR_VARIANCE;
        }
        self.weigh(known);
    }

    /// An expert has come: `share` of all weight is its own from now on.
    pub(super) fn join(&mut self, expert: usize, share: f32, known: &[bool; EXPERTS]) {
        self.variance[expert] = 0.0;
        let others = (0..EXPERTS).filter(|&i| i != expert && known[i]);
        let best = others.map(|i| rate(self.variance[i]) * self.gained[i]).fold(f32::MIN, f32::max);
        let odds = (share / (1.0 - share)).ln();
        self.gained[expert] = (if best > f32::MIN { best } else { 0.0 } + odds) / rate(0.0);
        self.weigh(known);
    }

    fn weigh(&mut self, known: &[bool; EXPERTS]) {
        let exponents: Opinions =
            std::array::from_fn(
                |i| {
                    if known[i] { rate(self.variance[i]) * self.gained[i] } else { f32::MIN }
                },
            );
        let highest = exponents.iter().copied().fold(f32::MIN, f32::max);
        let mut sum = 0.0;
        for i in 0..EXPERTS {
            self.weights[i] = if known[i] { expm1(exponents[i] - highest) + 1.0 } else { 0.0 };
            sum += self.weights[i];
        }
        let count = known.iter().filter(|known| **known).count() as f32;
        for i in 0..EXPERTS {
            if known[i] {
                self.weights[i] = self.weights[i] / sum * (1.0 - EVEN) + EVEN / count;
            }
        }
    }
}

/// The learning rate: the more an expert has varied, the less is concluded from one outcome.
#[inline]
fn rate(variance: f32) -> f32 {
    (BOLDNESS / (variance + 0.1)).sqrt().min(2.0)
}
