//! Mean and variance of a need: what can be added up over instances, as quantiles can't.

use std::ops::{Add, Sub};

use crate::Quantiles;

/// Mean and variance of a need, in its unit and that squared. Sums are those of needs that don't depend on each other.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    /// Mean.
    pub mean: f64,
    /// Variance.
    pub variance: f64,
}

/// Of the half below the median, only the median is known: where amounts can't be negative and bursts are upwards, its mean is
/// not far below.
const LOWER_HALF: f64 = 0.75;

impl Moments {
    /// As far as four quantiles tell them: between two, all values are taken for equally likely.
    pub fn of(quantiles: &Quantiles) -> Self {
        let Quantiles { p50, p90, p95, p99 } = *quantiles;
        let parts = [
            (p50 * LOWER_HALF, 0.5),
            ((p50 + p90) / 2.0, 0.4),
            ((p90 + p95) / 2.0, 0.05),
            ((p95 + p99) / 2.0, 0.04),
            (p99, 0.01),
        ];
        let mean: f64 = parts.iter().map(|(value, weight)| value * weight).sum();
        let variance = parts.iter().map(|(value, weight)| weight * (value - mean).powi(2)).sum();
        Self { mean, variance }
    }

    /// The mean of several, such as those of several leads.
    pub fn mean_of(several: &[Self]) -> Self {
        let n = several.len().max(1) as f64;
        let sum = several.iter().fold((0.0, 0.0), |sum, one| (sum.0 + one.mean, sum.1 + one.variance));
        Self { mean: sum.0 / n, variance: sum.1 / n }
    }

    /// Between itself (weight 1) and another (weight 0).
    pub fn weighed(self, weight: f64, other: Self) -> Self {
        let between = |a: f64, b: f64| weight * a + (1.0 - weight) * b;
        Self { mean: between(self.mean, other.mean), variance: between(self.variance, other.variance) }
    }

    /// The mean, and so many standard deviations.
    pub fn limit(&self, deviations: f64) -> f64 {
        self.mean + deviations * self.variance.max(0.0).sqrt()
    }
}

impl Add for Moments {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { mean: self.mean + other.mean, variance: self.variance + other.variance }
    }
}

impl Sub for Moments {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { mean: self.mean - other.mean, variance: (self.variance - other.variance).max(0.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_has_a_narrower_limit_than_its_parts() {
        let one = Moments::of(&Quantiles { p50: 1.0, p90: 2.0, p95: 2.5, p99: 4.0 });
        assert!((one.mean - 1.2575).abs() < 1e-9, "{one:?}");
        let all = (0..16).fold(Moments::default(), |sum, _| sum + one);
        assert!((all.mean - 16.0 * one.mean).abs() < 1e-9);
        let over = |moments: Moments| moments.limit(2.0) - moments.mean;
        assert!((over(all) - 4.0 * over(one)).abs() < 1e-9);
    }
}
