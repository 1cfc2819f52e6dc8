//! Finding a period, and repeating it.

use super::numeric::dot;

/// Shortest period looked for, in windows.
const MIN_PERIOD: usize = 4;
/// Correlation that makes a lag a period.
const PERIODIC: f32 = 0.6;
/// The correlation must have been under this at a shorter lag: a slow drift correlates at every lag.
const DIPPED: f32 = 0.3;
/// A longer period must be better by this, or multiples of the period would be taken for it.
const CLEARLY: f32 = 0.05;
/// Cycles averaged for a forecast.
const CYCLES: usize = 2;

/// The period of `values` in windows, if there is one and two of them were seen.
pub(super) fn period(values: &[f32]) -> Option<usize> {
    let n = values.len();
    let mean = values.iter().sum::<f32>() / n.max(1) as f32;
    let values: Vec<f32> = values.iter().map(|value| value - mean).collect();
    // Sums from the start, so that each lag's means and variances cost nothing.
    let (mut sums, mut squares) = (vec![0.0f32; n + 1], vec![0.0f32; n + 1]);
    for (i, value) in values.iter().enumerate() {
        sums[i + 1] = sums[i] + value;
        squares[i + 1] = squares[i] + value * value;
    }
    let mut dipped = false;
    let mut best: Option<(usize, f32)> = None;
    for lag in 1..=n / 2 {
        let count = (n - lag) as f32;
        let (sum_new, sum_old) = (sums[n] - sums[lag], sums[n - lag]);
        let new = squares[n] - squares[lag] - sum_new * sum_new / count;
        let old = squares[n - lag] - sum_old * sum_old / count;
        let scale = (new.max(0.0) * old.max(0.0)).sqrt();
        // Where one of both doesn't vary, there is nothing to find.
        if scale.is_nan() || scale <= 1e-6 * (1.0 + mean * mean) * count {
            return None;
        }
        let correlation = (dot(&values[lag..], &values[..n - lag]) - sum_new * sum_old / count) / scale;
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

/// Forecast of the value `steps` after position `from` (the last known one), from whole periods before it.
pub(super) fn repeat(values: &[f32], from: usize, steps: usize, period: usize) -> Option<f32> {
    let back = steps.div_ceil(period) * period;
    let (mut sum, mut count) = (0.0, 0u32);
    for cycle in 0..CYCLES {
        let Some(at) = (from + steps).checked_sub(back + cycle * period) else { break };
        sum += values.get(at).filter(|_| at <= from)?;
        count += 1;
    }
    (count > 0).then(|| sum / count as f32)
}
