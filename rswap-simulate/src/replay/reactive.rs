//! Thresholds on what is used now: what is done without forecasts. And nothing at all.

use super::{Policy, Start, View};

/// A pool that is fuller than this sheds its biggest instance.
const HIGH: f64 = 0.8;
/// A cheaper pool takes an instance if it is no fuller than this with it.
const LOW: f64 = 0.6;

/// Moves away from pools that are nearly full, and to cheaper ones that are half empty, one instance per pool and window.
/// With `thresholds` off it leaves everything where it is.
#[derive(Clone, Debug)]
pub struct Reactive {
    thresholds: bool,
}

impl Reactive {
    /// By thresholds.
    pub fn by_thresholds() -> Self {
        Self { thresholds: true }
    }

    /// Never moves anything.
    pub fn never() -> Self {
        Self { thresholds: false }
    }
}

impl Policy for Reactive {
    fn name(&self) -> &str {
        if self.thresholds { "reactive" } else { "static" }
    }

    fn decide(&mut self, view: &View<'_>) -> Vec<Start> {
        if !self.thresholds {
            return Vec::new();
        }
        let scenario = view.scenario;
        let has = |site: usize| scenario.pools[site].capacity.cores * scenario.pools[site].performance;
        let cost = |site: usize| scenario.pools[site].cost_per_core_hour / scenario.pools[site].performance;
        let mut load = vec![0.0; scenario.pools.len()];
        for (instance, used) in view.used.iter().enumerate() {
            load[view.going[instance].unwrap_or(view.at[instance])] += used.unwrap_or(0.0);
        }
        let mut starts = Vec::new();
        let free = |instance: &usize| view.going[*instance].is_none() && view.used[*instance].is_some();
        for site in scenario.sites() {
            let mut here: Vec<usize> =
                (0..view.at.len()).filter(free).filter(|&instance| view.at[instance] == site).collect();
            let used = |instance: usize| view.used[instance].unwrap_or(0.0);
            here.sort_by(|&a, &b| used(b).total_cmp(&used(a)));
            let full = load[site] > has(site) * HIGH;
            let fits = |instance: usize, to: usize, load: &[f64]| load[to] + used(instance) <= has(to) * LOW;
            let target = here.iter().find_map(|&instance| {
                let mut others = scenario
                    .sites()
                    .filter(|&to| to != site && fits(instance, to, &load) && (full || cost(to) < cost(site)));
                let first = others.next()?;
                let best = others.fold(first, |best, to| if cost(to) < cost(best) { to } else { best });
                Some((instance, best))
            });
            if let Some((instance, to)) = target {
                load[site] -= used(instance);
                load[to] += used(instance);
                starts.push(Start { instance, to, forced: full });
            }
        }
        starts
    }

    fn ended(&mut self, _instance: usize, _done: bool, _view: &View<'_>) {}
}
