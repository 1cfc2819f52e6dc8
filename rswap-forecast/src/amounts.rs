//! How much is used, as a histogram of amounts: what can be added up over instances of any size, in any order.
//!
//! A mean over instances says little of a kind whose members differ: of two that idle and two that use two cores, none uses what the
//! mean says, whichever mean it is. Of the histograms' sum, every quantile is one that a member showed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{habit::Histogram, lead::TAILS, numeric::asinh, series::UNIT};

/// Width of a bin, as a difference of logarithms.
const WIDTH: f64 = 0.05;
/// Less than this is nothing.
const LEAST: f64 = 1e-9;
/// The bin of nothing.
const NOTHING: i16 = i16::MIN;
/// The highest bin: no amount of a series is beyond it.
const LAST: i16 = 1495;

/// Weights of amounts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Amounts(BTreeMap<i16, f64>);

impl Amounts {
    /// Those of one series: the histogram of its positions, and their unit.
    pub(super) fn of(positions: &Histogram, unit: f64) -> Self {
        let mut new = Self::default();
        for (i, share) in positions.shares().into_iter().enumerate().filter(|(_, share)| *share > 0.0) {
            let amount = f64::from((i as f32 + 0.5) * Histogram::WIDTH).sinh() * unit;
            *new.0.entry(bin(amount)).or_default() += f64::from(share);
        }
        new
    }

    /// Whether its bins and weights are possible.
    pub(super) fn is_sound(&self) -> bool {
        self.0.iter().all(|(&bin, weight)| bin <= LAST && weight.is_finite() && *weight >= 0.0)
    }

    /// Adds another's, `times` as often.
    pub(super) fn add(&mut self, other: &Self, times: f64) {
        other.0.iter().for_each(|(&bin, weight)| *self.0.entry(bin).or_default() += weight * times);
    }

    fn total(&self) -> f64 {
        self.0.values().sum()
    }

    /// The mean amount; 0 of none.
    pub(super) fn mean(&self) -> f64 {
        let sum: f64 = self.0.iter().map(|(&bin, weight)| middle(bin) * weight).sum();
        sum / self.total().max(f64::MIN_POSITIVE)
    }

    /// The amount that the share `tail` lies above; 0 of none.
    pub(super) fn quantile(&self, tail: f64) -> f64 {
        let goal = tail * self.total();
        let mut above = 0.0;
        for (&bin, &weight) in self.0.iter().rev().filter(|(_, weight)| **weight > 0.0) {
            if above + weight >= goal {
                let within = 1.0 - (goal - above) / weight;
                return if bin == NOTHING { 0.0 } else { ((f64::from(bin) + within) * WIDTH).exp() };
            }
            above += weight;
        }
        0.0
    }

    /// The quantiles of a forecast.
    pub(super) fn quantiles(&self) -> [f64; 4] {
        TAILS.map(|tail| self.quantile(f64::from(tail)))
    }

    /// Shares of time at each position, by [`Histogram`]'s bins, of a series of that mean.
    pub(super) fn shares(&self, mean: f64) -> Vec<f32> {
        let (total, unit) = (self.total().max(f64::MIN_POSITIVE), (mean * UNIT).max(LEAST));
        let mut shares = vec![0.0; Histogram::BINS];
        for (&bin, weight) in &self.0 {
            let at = asinh(middle(bin) / unit) / Histogram::WIDTH;
            shares[(at as usize).min(Histogram::BINS - 1)] += (weight / total) as f32;
        }
        shares
    }
}

fn bin(amount: f64) -> i16 {
    if amount < LEAST { NOTHING } else { ((amount.ln() / WIDTH).floor() as i16).min(LAST) }
}

fn middle(bin: i16) -> f64 {
    if bin == NOTHING { 0.0 } else { ((f64::from(bin) + 0.5) * WIDTH).exp() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(amounts: &[(f64, f64)]) -> Amounts {
        let mut new = Amounts::default();
        amounts.iter().for_each(|&(amount, weight)| *new.0.entry(bin(amount)).or_default() += weight);
        new
    }

    #[test]
    fn every_quantile_of_a_sum_is_one_that_was_shown() {
        let mut sum = of(&[(0.0, 1.0)]);
        for other in [of(&[(0.0, 1.0)]), of(&[(2.0, 1.0)]), of(&[(1.9, 0.5), (2.1, 0.5)])] {
            sum.add(&other, 1.0);
        }
        let [median, high @ ..] = sum.quantiles();
        assert!(median <= 1.95, "{median}");
        assert!(high.iter().all(|amount| (1.9..2.2).contains(amount)), "{high:?}");
        assert!((sum.mean() - 1.0).abs() < 0.05, "{}", sum.mean());
        assert_eq!(sum.quantile(0.6), 0.0);
    }

    #[test]
    fn what_is_none_has_quantiles_of_nothing() {
        for none in [Amounts::default(), of(&[(0.0, 3.0)])] {
            assert_eq!((none.mean(), none.quantiles()), (0.0, [0.0; 4]));
            assert!(none.shares(none.mean()).iter().skip(1).all(|share| *share == 0.0));
        }
    }

    #[test]
    fn amounts_of_any_size_have_a_bin() {
        for amount in [f64::MIN_POSITIVE, 1e-9, 1.0, 1e12, f64::from(f32::MAX), f64::MAX] {
            assert!(of(&[(amount, 1.0)]).is_sound(), "{amount}");
        }
        let bytes = of(&[(4e9, 1.0)]);
        assert!((bytes.mean() / 4e9 - 1.0).abs() < WIDTH, "{}", bytes.mean());
    }
}
