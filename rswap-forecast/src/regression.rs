//! Recursive least squares with forgetting: how far the value will have gone at one lead, from what is known now.

use serde::{Deserialize, Serialize};

/// Number of features, a multiple of four.
pub(super) const FEATURES: usize = 12;
/// Features of one moment.
pub(super) type Features = [f32; FEATURES];

/// The first feature: it is always the same.
pub(super) const ALWAYS: f32 = 0.1;
/// The feature that says how far the value is above where it was within the last half a dozen windows or so.
pub(super) const ABOVE: usize = 2;
/// The feature that says how far the value is from where it usually is at the time that is forecast.
pub(super) const BACK: usize = 8;

/// Weight that is left of an observation after one more.
const FORGET: f32 = 0.998;
/// An error counts up to so many mean absolute errors: amounts have heavy tails.
const HUBER: f32 = 3.0;
/// How unsure a new coefficient is.
const UNSURE: f32 = 10.0;
/// How unsure a coefficient is that others have taught, by that.
const PRIOR: f32 = 0.05;
/// The sum of variances at which they are taken back: without excitation, forgetting lets them grow without end.
const MOST_UNSURE: f32 = 2e4;

/// One regression; coefficients of 0 forecast that nothing changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Regression {
    covariance: [Features; FEATURES],
    weights: Features,
    mean_error: f32,
}

impl Regression {
    pub(super) fn new() -> Self {
        Self { covariance: unsure(), weights: [0.0; FEATURES], mean_error: 0.0 }
    }

    #[inline]
    pub(super) fn predict(&self, features: &Features) -> f32 {
        inner(&self.weights, features)
    }

    pub(super) fn weights(&self) -> &Features {
        &self.weights
    }

    /// Whether every number in it is one.
    pub(super) fn is_sound(&self) -> bool {
        let all = self.covariance.iter().flatten().chain(&self.weights).chain([&self.mean_error]);
        all.copied().all(f32::is_finite)
    }

    /// Others of its kind have these coefficients: they are less unsure than none.
    pub(super) fn start_from(&mut self, weights: &Features) {
        self.weights = *weights;
        self.covariance.iter_mut().flatten().for_each(|v| *v *= PRIOR);
    }

    /// `change` is what came of `features`.
    pub(super) fn learn(&mut self, features: &Features, change: f32) {
        let error = change - self.predict(features);
        let size = error.abs();
        if !size.is_finite() {
            return;
        }
        self.mean_error =
            if self.mean_error == 0.0 { size } else { self.mean_error + 0.02 * (size - self.mean_error) };
        let weight = (HUBER * self.mean_error / size.max(1e-12)).clamp(1e-3, 1.0);
        let gain: Features = std::array::from_fn(|i| inner(&self.covariance[i], features));
        let spread = inner(&gain, features);
        let divisor = FORGET / weight + spread;
        if spread.is_nan() || spread < 0.0 {
            self.covariance = unsure();
            return;
        }
        let step = error / divisor;
        let mut trace = 0.0;
        for i in 0..FEATURES {
            self.weights[i] += gain[i] * step;
            let share = gain[i] / divisor;
            for j in 0..FEATURES {
                self.covariance[i][j] = (self.covariance[i][j] - share * gain[j]) * (1.0 / FORGET);
            }
            trace += self.covariance[i][i];
        }
        if trace > MOST_UNSURE {
            let factor = MOST_UNSURE / trace;
            self.covariance.iter_mut().flatten().for_each(|v| *v *= factor);
        } else if trace.is_nan() {
            *self = Self::new();
        }
    }
}

fn unsure() -> [Features; FEATURES] {
    std::array::from_fn(|i| std::array::from_fn(|j| if i == j { UNSURE } else { 0.0 }))
}

#[inline]
fn inner(a: &Features, b: &Features) -> f32 {
    let mut lanes = [0.0f32; 4];
    for i in (0..FEATURES).step_by(4) {
        for lane in 0..4 {
            lanes[lane] += a[i + lane] * b[i + lane];
        }
    }
    (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
}
