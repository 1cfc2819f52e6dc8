//! How far the value lies from a centre, such as the regression's forecast, as quantiles that are steered one by one: the expert with the long memory.
//!
//! Each is a sum of what makes errors large, and of the way back to the usual, with coefficients that follow the gradient of the pinball loss. It needs no
//! outcomes kept, so that a quantile that few of them reach is still told by all of them.

use serde::{Deserialize, Serialize};

use super::lead::TAILS;

/// What goes into it: how much values usually move and have moved of late, how far the value is from where it was, and from
/// where it usually is at the time that is forecast.
pub(super) const SIGNS: usize = 4;
pub(super) type Signs = [f32; SIGNS];

/// Coefficients of the first three to begin with, per quantile.
const FIRST: [f32; 4] = [0.0, 0.3, 0.45, 0.75];
/// Step, as a share of what values usually move: at first, and in the end.
const STEPS: (f32, f32) = (0.5, 0.005);

/// Sum of the squares of what is no movement but rounding.
const STILL: f32 = 1e-10;

/// The coefficients of one lead.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Steered {
    weights: [Signs; 4],
    seen: u32,
}

impl Steered {
    pub(super) fn new() -> Self {
        Self { weights: FIRST.map(|first| [first, first, first, 0.0]), seen: 0 }
    }

    pub(super) fn weights(&self) -> &[Signs; 4] {
        &self.weights
    }

    /// Whether its numbers are ones.
    pub(super) fn is_sound(&self) -> bool {
        self.weights.iter().flatten().all(|weight| weight.is_finite())
    }

    /// Others of its kind have these coefficients, which count as so many outcomes.
    pub(super) fn start_from(&mut self, weights: &[Signs; 4], outcomes: u32) {
        self.weights = *weights;
        self.seen = outcomes;
    }

    /// Distances from the centre.
    pub(super) fn quantiles(&self, signs: &Signs) -> [f32; 4] {
        if square(signs) <= STILL {
            return [0.0; 4];
        }
        std::array::from_fn(|k| at(&self.weights[k], signs))
    }

    /// `missed` is how far the value was from the centre, `stride` for how many outcomes this one stands.
    pub(super) fn learn(&mut self, signs: &Signs, missed: f32, stride: u32) {
        let square = square(signs);
        if !(missed.is_finite() && square.is_finite() && square > STILL) {
            return;
        }
        self.seen = self.seen.saturating_add(1);
        let step = STEPS.1.max(STEPS.0 / ((self.seen + 1) as f32).sqrt()) * stride as f32;
        for k in 0..4 {
            let exceeded = f32::from(u8::from(missed > at(&self.weights[k], signs)));
            let by = step * signs[0] * (exceeded - TAILS[k]) / square;
            for i in 0..SIGNS {
                self.weights[k][i] += by * signs[i];
            }
        }
    }
}

fn square(signs: &Signs) -> f32 {
    signs.iter().map(|sign| sign * sign).sum()
}

fn at(weights: &Signs, signs: &Signs) -> f32 {
    weights.iter().zip(signs).map(|(weight, sign)| weight * sign).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_quantile_is_exceeded_as_often_as_it_says_whatever_the_spread() {
        let seed = 11;
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut steered = Steered::new();
        let mut exceeded = [[0.0f32; 4]; 2];
        for round in 0..40_000 {
            // Calm and restless times take turns: the errors are five times as large in the latter.
            let restless = (round / 50) % 2;
            let size = [1.0f32, 5.0][restless];
            let signs = [2.0, size, 0.0, 0.0];
            let missed = size * ((0..12).map(|_| random.f32()).sum::<f32>() - 6.0);
            if round >= 20_000 {
                let quantiles = steered.quantiles(&signs);
                (0..4).for_each(|k| {
                    exceeded[restless][k] += f32::from(u8::from(missed > quantiles[k])) / 10_000.0
                });
            }
            steered.learn(&signs, missed, 1);
        }
        for (kind, exceeded) in exceeded.iter().enumerate() {
            for k in 0..4 {
                let off = (exceeded[k] - TAILS[k]).abs();
                assert!(off < 0.02 + 0.1 * TAILS[k], "{kind}: {exceeded:?}");
            }
        }
    }

    #[test]
    fn what_is_no_number_teaches_nothing() {
        let mut steered = Steered::new();
        let before = *steered.weights();
        for (signs, missed) in
            [([0.0; SIGNS], 1.0), ([f32::NAN; SIGNS], 1.0), ([1.0; SIGNS], f32::NAN), ([1e30; SIGNS], 1.0)]
        {
            steered.learn(&signs, missed, 1);
        }
        assert_eq!(*steered.weights(), before);
    }
}
