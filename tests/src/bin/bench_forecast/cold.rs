//! How wrong the forecast is in an instance's first two hours, with and without what others have taught.

use rswap_agent::forecast::{Priors, Series};
use rswap_tests::traces::Column;

use crate::{DAY, LEADS_MIN, methods::LEVELS};

/// Windows that are judged: forecasts made in the first two hours.
const JUDGED: usize = 24;
/// Series of a column at most.
const MOST: usize = 1500;

/// Sums of one column and lead.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cold {
    /// Sum of the outcomes.
    pub(crate) amount: f64,
    /// Pinball loss, mean of the levels, of a series that starts from nothing.
    pub(crate) alone: f64,
    /// Of one that starts from what the series before it have taught.
    pub(crate) taught: f64,
    /// Of one that learns from those with a profile like its own as well, once it has shown it.
    pub(crate) alike: f64,
}

/// One series after the other, in the order of the file: each starts from what those before it have taught, then teaches. The same
/// name on another day is the same identity.
pub(crate) fn column(column: &Column) -> [Cold; LEADS_MIN.len()] {
    let leads = LEADS_MIN.map(|minutes| (minutes * 60) as u64 / rswap_tests::traces::GRID_S);
    let mut sums = [Cold::default(); LEADS_MIN.len()];
    let mut priors = Priors::default();
    for series in column.series.iter().take(MOST) {
        let identity = series.instance.rsplit('/').next().unwrap_or_default();
        let prior = priors.of(&series.class, identity);
        let mut alone = Series::new(&leads, DAY as u64);
        let taught = prior.as_ref().and_then(|prior| Series::from_prior(&leads, DAY as u64, prior).ok());
        let judged = taught.is_some();
        let mut taught = taught.unwrap_or_else(|| alone.clone());
        let mut alike = taught.clone();
        for (at, &value) in series.values.iter().enumerate() {
            taught.observe(value);
            if at >= JUDGED || !judged {
                continue;
            }
            alone.observe(value);
            alike.observe(value);
            if value.is_finite() {
                priors.resemble(&series.class, identity, &mut alike);
            }
            let all = alone.quantiles().zip(taught.quantiles()).zip(alike.quantiles());
            for ((sums, lead), ((alone, taught), alike)) in sums.iter_mut().zip(leads).zip(all) {
                let Some(&outcome) = series.values.get(at + lead as usize).filter(|v| v.is_finite()) else {
                    continue;
                };
                sums.amount += outcome.abs();
                for (level, [alone, taught, alike]) in LEVELS.into_iter().zip([
                    [alone.p50, taught.p50, alike.p50],
                    [alone.p90, taught.p90, alike.p90],
                    [alone.p95, taught.p95, alike.p95],
                    [alone.p99, taught.p99, alike.p99],
                ]) {
                    let loss = |off: f64| (level * off).max((level - 1.0) * off) / LEVELS.len() as f64;
                    sums.alone += loss(outcome - alone);
                    sums.taught += loss(outcome - taught);
                    sums.alike += loss(outcome - alike);
                }
            }
        }
        if let Some(lesson) = taught.teach() {
            priors.learn(&series.class, identity, &lesson);
        }
    }
    sums
}
