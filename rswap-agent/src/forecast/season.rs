//! Finding a period, and repeating it.

use std::collections::VecDeque;

/// Shortest period looked for, in windows.
const MIN_PERIOD: usize = 4;
/// Correlation that makes a lag a period.
const PERIODIC: f64 = 0.6;
/// The correlation must have been under this at a shorter lag: a slow drift correlates at every lag.
const DIPPED: f64 = 0.3;
/// A longer period must be better by this, or multiples of the period would be taken for it.
const CLEARLY: f64 = 0.05;
/// Cycles averaged for a forecast.
const CYCLES: usize = 2;

/// The period of `values` in windows, if there is one and two of them were seen.
pub(super) fn period(values: &VecDeque<f64>) -> Option<usize> {
    let values: Vec<f64> = values.iter().copied().collect();
    let mut dipped = false;
    let mut best: Option<(usize, f64)> = None;
    for lag in 1..=values.len() / 2 {
        let correlation = correlation(&values[lag..], &values[..values.len() - lag])?;
        dipped |= correlation < DIPPED;
        let better = best.is_none_or(|(at, found)| {
            // The same peak goes on rising: follow it to its top.
            correlation > found + if lag <= at + at / 4 { 0.0 } else { CLEARLY }
        });
        if dipped && lag >= MIN_PERIOD && correlation > PERIODIC && better {
            best = Some((lag, correlation));
        }
    }
    best.map(|(lag, _)| lag)
}

/// Pearson's correlation; `None` where one of both doesn't vary.
fn correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let n = a.len() as f64;
    let (mean_a, mean_b) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let (mut covariance, mut var_a, mut var_b) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        covariance += (x - mean_a) * (y - mean_b);
        var_a += (x - mean_a).powi(2);
        var_b += (y - mean_b).powi(2);
    }
    let scale = (var_a * var_b).sqrt();
    (scale.is_finite() && scale > f64::EPSILON * (1.0 + mean_a.abs() * mean_b.abs()) * n)
        .then(|| covariance / scale)
}

/// Forecast of the value `steps` after position `from` (the last known one), from whole periods before it.
pub(super) fn repeat(values: &VecDeque<f64>, from: usize, steps: usize, period: usize) -> Option<f64> {
    let back = steps.div_ceil(period) * period;
    let (mut sum, mut count) = (0.0, 0u32);
    for cycle in 0..CYCLES {
        let Some(at) = (from + steps).checked_sub(back + cycle * period) else { break };
        sum += values.get(at).filter(|_| at <= from)?;
        count += 1;
    }
    (count > 0).then(|| sum / f64::from(count))
}
