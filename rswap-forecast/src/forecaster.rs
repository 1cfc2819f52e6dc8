//! The forecaster: a series per instance and resource.

use std::collections::BTreeMap;

use rswap_types::{InstanceName, UnixMillis};

use crate::{Demand, DemandPoint, ForecastConfig, Priors, Resource, series::Series};

/// Without a new window for so many windows there is no forecast any more.
const STALE_WINDOWS: u64 = 10;

/// Instances have no class that a profile tells: all of a host are one.
const ANY_CLASS: &str = "";
const DAY_MS: u64 = 24 * 3_600_000;

/// What one instance used in one window.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation<'a> {
    /// Which.
    pub instance: &'a InstanceName,
    /// End of the window.
    pub at: UnixMillis,
    /// In reference cores (cores x the performance of the pool they were used on), so that it stays comparable when the
    /// instance moves.
    pub reference_cores: f64,
    /// Memory, in bytes.
    pub memory_bytes: f64,
}

/// Forecasts every instance that it is shown.
#[derive(Clone, Debug)]
pub struct Forecaster {
    config: ForecastConfig,
    /// What a window is meant to last, in milliseconds: real ones are some milliseconds off, and longer under load.
    window_ms: u64,
    instances: BTreeMap<InstanceName, Watched>,
    /// What instances that are gone have taught, per resource.
    priors: BTreeMap<Resource, Priors>,
}

#[derive(Clone, Debug)]
struct Watched {
    at: UnixMillis,
    series: [(Resource, Series); 2],
}

impl Forecaster {
    /// A forecaster that has seen nothing, for windows of nominally `window_ms` milliseconds.
    pub fn new(config: ForecastConfig, window_ms: u64) -> Self {
        Self { config, window_ms: window_ms.max(1), instances: BTreeMap::new(), priors: BTreeMap::new() }
    }

    /// Takes in one window of an instance.
    pub fn observe(&mut self, seen: &Observation<'_>) {
        let window_ms = self.window_ms;
        let leads: Vec<u64> = self.config.horizons_ms.iter().map(|ms| ms / window_ms).collect();
        let day = DAY_MS / window_ms;
        let fresh = || Watched {
            at: UnixMillis(seen.at.0.saturating_sub(window_ms)),
            series: [Resource::Cpu, Resource::Memory]
                .map(|resource| (resource, begin(&self.priors, resource, seen.instance, &leads, day))),
        };
        let watched = self.instances.entry(seen.instance.clone()).or_insert_with(fresh);
        // To the nearest window: ends of windows jitter.
        let windows = (seen.at.since(watched.at) + window_ms / 2) / window_ms;
        if windows == 0 {
            return; // Seen already, or the clock went back.
        }
        watched.at = seen.at;
        for (resource, series) in &mut watched.series {
            let value = match resource {
                Resource::Cpu => seen.reference_cores,
                Resource::Memory => seen.memory_bytes,
            };
            series.skip(windows - 1);
            series.observe(value);
        }
    }

    /// What the instance will need; `None` if it is unknown or was not seen for a while.
    pub fn demand(&self, instance: &InstanceName, now: UnixMillis) -> Option<Demand> {
        let watched = self.instances.get(instance)?;
        if now.since(watched.at) > self.window_ms.saturating_mul(STALE_WINDOWS) {
            return None;
        }
        let points = watched.series.iter().flat_map(|(resource, series)| {
            let forecasts = series.forecasts(self.config.min_seen).zip(&self.config.horizons_ms);
            forecasts.map(|((need, evidence), &horizon_ms)| DemandPoint {
                resource: *resource,
                horizon_ms,
                need,
                evidence,
            })
        });
        Some(Demand { instance: instance.clone(), at: now, points: points.collect() })
    }

    /// The instance is gone. What it has taught is kept, for when it returns, and for others.
    pub fn forget(&mut self, instance: &InstanceName) {
        let Some(gone) = self.instances.remove(instance) else { return };
        for (resource, series) in &gone.series {
            if let Some(lesson) = series.teach() {
                self.priors.entry(*resource).or_default().learn(ANY_CLASS, instance.as_str(), &lesson);
            }
        }
    }
}

/// A series of a new instance, which starts from what is known of its like.
fn begin(
    priors: &BTreeMap<Resource, Priors>,
    resource: Resource,
    instance: &InstanceName,
    leads: &[u64],
    day: u64,
) -> Series {
    let prior = priors.get(&resource).and_then(|priors| priors.of(ANY_CLASS, instance.as_str()));
    let taught = prior.and_then(|prior| Series::from_prior(leads, day, &prior).ok());
    taught.unwrap_or_else(|| Series::new(leads, day))
}
