//! How good a forecast is, and what it costs.

use anyhow::Context;
use nix::time::{ClockId, clock_gettime};
use rswap_tests::traces::Column;

use crate::{
    DAY, LEADS_MIN,
    methods::{self, LEVELS, Method, Rswap},
};

/// Series that the cost is measured on, per column.
const COSTED: usize = 12;
/// Windows for which an allocation is held.
const HELD: usize = 12;

/// Sums over the judged forecasts of one method.
#[derive(Clone, Debug, Default)]
pub(crate) struct Score {
    /// By lead.
    pub(crate) leads: [LeadScore; LEADS_MIN.len()],
    /// By level: allocations made by that quantile of the demand within the hour, and held for the hour.
    pub(crate) held: [Held; LEVELS.len()],
}

/// Sums of one lead.
#[derive(Clone, Debug, Default)]
pub(crate) struct LeadScore {
    /// Forecasts judged.
    pub(crate) count: f64,
    /// Sum of the outcomes.
    pub(crate) amount: f64,
    /// Pinball loss by level.
    pub(crate) pinball: [f64; LEVELS.len()],
    /// Outcomes at or under each level's quantile.
    pub(crate) covered: [f64; LEVELS.len()],
    /// Sum of the median's absolute errors.
    pub(crate) error: f64,
    /// Sum of the absolute changes from one window to the next.
    pub(crate) change: f64,
}

/// Sums of an allocation that is held.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    /// Windows.
    pub(crate) windows: f64,
    /// Demand.
    pub(crate) demand: f64,
    /// Allocated beyond the demand.
    pub(crate) slack: f64,
    /// Windows in which the demand was higher.
    pub(crate) violations: f64,
}

impl Score {
    /// Takes in another series' sums.
    pub(crate) fn add(&mut self, other: &Self) {
        for (a, b) in self.leads.iter_mut().zip(&other.leads) {
            a.count += b.count;
            a.amount += b.amount;
            a.error += b.error;
            a.change += b.change;
            for k in 0..LEVELS.len() {
                a.pinball[k] += b.pinball[k];
                a.covered[k] += b.covered[k];
            }
        }
        for (a, b) in self.held.iter_mut().zip(&other.held) {
            a.windows += b.windows;
            a.demand += b.demand;
            a.slack += b.slack;
            a.violations += b.violations;
        }
    }
}

/// Judges every method on one series.
pub(crate) fn series(values: &[f64]) -> Vec<Score> {
    let warm_up = DAY.min(values.len() / 4);
    methods::all()
        .into_iter()
        .map(|mut method| {
            let mut score = Score::default();
            let mut allocated = [0.0f64; LEVELS.len()];
            for (at, &value) in values.iter().enumerate() {
                if at >= warm_up && value.is_finite() {
                    held(&mut score, &allocated, value, at > warm_up);
                }
                method.observe(value);
                if at < warm_up {
                    continue;
                }
                if (at - warm_up).is_multiple_of(HELD) {
                    let within = (0..LEADS_MIN.len()).map(|lead| method.forecast(lead));
                    allocated =
                        within.fold([0.0; 4], |most, q| std::array::from_fn(|k| f64::max(most[k], q[k])));
                }
                judge(&mut score, method.as_ref(), values, at);
            }
            score
        })
        .collect()
}

fn judge(score: &mut Score, method: &dyn Method, values: &[f64], at: usize) {
    for (lead, minutes) in LEADS_MIN.into_iter().enumerate() {
        let then = at + minutes * 60 / rswap_tests::traces::GRID_S as usize;
        let Some(&outcome) = values.get(then).filter(|outcome| outcome.is_finite()) else { continue };
        let quantiles = method.forecast(lead);
        let sums = &mut score.leads[lead];
        sums.count += 1.0;
        sums.amount += outcome.abs();
        sums.error += (outcome - quantiles[0]).abs();
        sums.change += Some(values[then - 1]).filter(|v| v.is_finite()).map_or(0.0, |v| (outcome - v).abs());
        for k in 0..LEVELS.len() {
            let off = outcome - quantiles[k];
            sums.pinball[k] += (LEVELS[k] * off).max((LEVELS[k] - 1.0) * off);
            sums.covered[k] += f64::from(u8::from(outcome <= quantiles[k]));
        }
    }
}

fn held(score: &mut Score, allocated: &[f64; LEVELS.len()], demand: f64, allocated_yet: bool) {
    if !allocated_yet {
        return;
    }
    for (sums, &allocated) in score.held.iter_mut().zip(allocated) {
        sums.windows += 1.0;
        sums.demand += demand;
        sums.slack += (allocated - demand).max(0.0);
        sums.violations += f64::from(u8::from(demand > allocated));
    }
}

/// What the production forecast costs.
pub(crate) struct Cost {
    /// Updates per second of processor time of one core, all leads and quantiles included.
    pub(crate) updates_per_s: f64,
    /// Most memory that a series took.
    pub(crate) bytes_per_series: usize,
}

/// Measures it on one thread, by the processor time that it takes: other work on the machine does not count.
pub(crate) fn cost(columns: &[Column]) -> anyhow::Result<Cost> {
    let now = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("cannot read the processor time");
    let series: Vec<_> = columns.iter().flat_map(|column| column.series.iter().take(COSTED)).collect();
    let (mut updates, mut bytes_per_series, mut sink) = (0usize, 0, 0.0);
    let began = now()?;
    for series in series {
        let mut method = Rswap::new();
        for &value in &series.values {
            method.observe(value);
            sink += method.forecast(0)[0];
        }
        updates += series.values.len();
        bytes_per_series = bytes_per_series.max(method.bytes());
    }
    let took = std::time::Duration::from(now()? - began).as_secs_f64();
    anyhow::ensure!(f64::is_finite(sink), "a forecast is no number");
    Ok(Cost { updates_per_s: updates as f64 / took, bytes_per_series })
}
