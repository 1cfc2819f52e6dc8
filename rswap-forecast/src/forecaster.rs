//! The forecaster: a series per instance and resource.

use std::collections::BTreeMap;

use rswap_types::{InstanceName, UnixMillis};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Demand, DemandPoint, ForecastConfig, Lessons, Prior, Priors, Resource, StateError, Usage,
    series::Series,
    unused::{self, Track},
};

/// Without a new window for so many windows there is no forecast any more.
const STALE_WINDOWS: u64 = 10;
const DAY_MS: u64 = 24 * 3_600_000;
/// Classes, and identities, that are remembered of each resource.
const REMEMBERED: usize = 500;
/// Running instances of a class that a new one learns from at most.
const CLASSMATES: usize = 64;

/// Whom an instance is like: it learns from them, and they from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Kin {
    /// Its kind.
    pub class: String,
    /// Itself: what returns has the identity that it had before.
    pub identity: String,
}

/// What one instance used in one window.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation<'a> {
    /// Which.
    pub instance: &'a InstanceName,
    /// End of the window.
    pub at: UnixMillis,
    /// How much.
    pub usage: Usage,
}

/// Forecasts every instance that it is shown.
#[derive(Clone, Debug)]
pub struct Forecaster {
    pub(crate) config: ForecastConfig,
    /// What a window is meant to last, in milliseconds: real ones are some milliseconds off, and longer under load.
    pub(crate) window_ms: u64,
    pub(crate) instances: BTreeMap<InstanceName, Watched>,
    /// What instances that are gone have taught, and what others have.
    pub(crate) learnt: Lessons,
    /// What other hosts of the fleet have taught: replaced as a whole, never handed on as this one's.
    fleet: Option<Lessons>,
    /// `learnt` and `fleet` together, where there is a fleet.
    known: Option<Lessons>,
    /// What a resource teaches that is never used.
    nothing: Option<Prior>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Watched {
    kin: Kin,
    /// Which of the lives that were lived under this name.
    life: u64,
    /// End of the last window; `None` before the first.
    at: Option<UnixMillis>,
    /// Of what was ever seen.
    pub(crate) series: BTreeMap<Resource, Track>,
}

impl Forecaster {
    /// A forecaster that has seen nothing, for windows of nominally `window_ms` milliseconds.
    pub fn new(config: ForecastConfig, window_ms: u64) -> Self {
        let window_ms = window_ms.max(1);
        let learnt = Lessons::new(window_ms, config.horizons_ms.clone());
        let nothing = None;
        let mut new =
            Self { config, window_ms, instances: BTreeMap::new(), learnt, fleet: None, known: None, nothing };
        new.nothing = unused::lesson(&new.leads(), new.day());
        new
    }

    /// Takes over what the other hosts of a fleet have taught, in place of what they had taught before. It is kept apart from what
    /// was learnt here: [`Forecaster::lessons`] and [`Forecaster::state`] don't have it, so that nothing comes back as another's.
    ///
    /// # Errors
    ///
    /// As [`Lessons::merge`]; what was known before stays then.
    pub fn learn_from_fleet(&mut self, fleet: Lessons) -> Result<(), StateError> {
        let mut known = self.learnt.clone();
        known.merge(&fleet)?;
        (self.fleet, self.known) = (Some(fleet), Some(known));
        Ok(())
    }

    /// No lessons yet, for the same windows and horizons.
    pub fn no_lessons(&self) -> Lessons {
        Lessons::new(self.window_ms, self.config.horizons_ms.clone())
    }

    /// After a change of what was learnt here.
    pub(crate) fn know(&mut self) {
        let Some(fleet) = &self.fleet else { return };
        let mut known = self.learnt.clone();
        if known.merge(fleet).is_ok() {
            self.known = Some(known);
        }
    }

    /// Says whom an instance is like, which may become clearer while it runs, and which of its lives this is: the same name with
    /// another `life` is another instance, and begins anew. Who is not introduced is of no class, and known by its name.
    pub fn introduce(&mut self, instance: &InstanceName, kin: Kin, life: u64) {
        if self.instances.get(instance).is_some_and(|watched| watched.life != life) {
            self.forget(instance);
        }
        match self.instances.get_mut(instance) {
            Some(watched) => watched.kin = kin,
            None => {
                let new = Watched { kin, life, at: None, series: BTreeMap::new() };
                self.instances.insert(instance.clone(), new);
            }
        }
    }

    /// Takes in one window of an instance.
    pub fn observe(&mut self, seen: &Observation<'_>) {
        // Taken out, so that it can look at the others.
        let (name, mut watched) = self.instances.remove_entry(seen.instance).unwrap_or_else(|| {
            let kin = Kin { class: String::new(), identity: seen.instance.to_string() };
            (seen.instance.clone(), Watched { kin, life: 0, at: None, series: BTreeMap::new() })
        });
        self.observe_one(&mut watched, seen);
        self.instances.insert(name, watched);
    }

    fn observe_one(&self, watched: &mut Watched, seen: &Observation<'_>) {
        let before = UnixMillis(seen.at.0.saturating_sub(self.window_ms));
        // A clock that was set back by much stays there: the windows go on by it.
        let stale_ms = self.window_ms.saturating_mul(STALE_WINDOWS);
        let at = watched.at.filter(|at| at.since(seen.at) <= stale_ms).unwrap_or(before);
        // To the nearest window: ends of windows jitter.
        let windows = (seen.at.since(at) + self.window_ms / 2) / self.window_ms;
        if windows == 0 {
            return; // Seen already, or the clock went back a little.
        }
        watched.at = Some(seen.at);
        for resource in Resource::ALL {
            let used = seen.usage.of(resource).filter(|amount| amount.is_finite());
            match (watched.series.get_mut(&resource), used) {
                (Some(track), Some(used)) => {
                    track.skip(windows - 1);
                    self.take_in(track, used, resource, &watched.kin);
                }
                (Some(track), None) => track.skip(windows),
                (None, Some(used)) => {
                    let mut track = Track::Used(Box::new(self.begin(resource, &watched.kin)));
                    self.take_in(&mut track, used, resource, &watched.kin);
                    watched.series.insert(resource, track);
                }
                (None, None) => {}
            }
        }
    }

    fn take_in(&self, track: &mut Track, used: f64, resource: Resource, kin: &Kin) {
        let begin = || self.begin(resource, kin);
        track.observe(used, begin, |series| {
            let running = || self.running(&kin.class, resource);
            self.priors(resource).resemble_among(&kin.class, &kin.identity, running, series);
        });
    }

    /// A series of a new instance, which starts from what is known of its like.
    pub(crate) fn begin(&self, resource: Resource, kin: &Kin) -> Series {
        let running = self.running(&kin.class, resource);
        let prior = self.priors(resource).of_among(&kin.class, &kin.identity, &running);
        let taught = prior.and_then(|prior| Series::from_prior(&self.leads(), self.day(), &prior).ok());
        taught.unwrap_or_else(|| Series::new(&self.leads(), self.day()))
    }

    fn priors(&self, resource: Resource) -> &Priors {
        static NONE: Priors = Priors::none();
        self.known.as_ref().unwrap_or(&self.learnt).priors.get(&resource).unwrap_or(&NONE)
    }

    /// What others of the class have taught that still run.
    fn running(&self, class: &str, resource: Resource) -> Vec<Prior> {
        let others = self.instances.values().filter(|other| !class.is_empty() && other.kin.class == class);
        let taught = others.filter_map(|other| other.series.get(&resource)?.teach(self.nothing.as_ref()));
        taught.take(CLASSMATES).collect()
    }

    /// What the instance will need; `None` if it is unknown or was not seen for a while.
    pub fn demand(&self, instance: &InstanceName, now: UnixMillis) -> Option<Demand> {
        let watched = self.instances.get(instance)?;
        if now.since(watched.at?) > self.window_ms.saturating_mul(STALE_WINDOWS) {
            return None;
        }
        let leads = self.leads();
        let points = watched.series.iter().flat_map(|(resource, track)| {
            let forecasts = track.forecasts(&leads, self.config.min_seen).into_iter();
            forecasts.zip(&self.config.horizons_ms).map(|((need, evidence), &horizon_ms)| DemandPoint {
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
        if let Some(gone) = self.instances.remove(instance) {
            gone.teach(self.nothing.as_ref(), &mut self.learnt);
            self.learnt.bound(REMEMBERED);
            self.know();
        }
    }

    /// Those that are not `present` are gone.
    pub fn forget_others(&mut self, present: impl Fn(&InstanceName) -> bool) {
        let gone: Vec<InstanceName> = self.instances.keys().filter(|name| !present(name)).cloned().collect();
        gone.iter().for_each(|name| self.forget(name));
    }

    /// Whom the instance is like, as far as it was told.
    pub fn kin(&self, instance: &InstanceName) -> Option<&Kin> {
        self.instances.get(instance).map(|watched| &watched.kin)
    }

    /// What a resource teaches that is never used.
    pub(crate) fn nothing(&self) -> Option<&Prior> {
        self.nothing.as_ref()
    }

    /// Horizons in windows.
    pub(crate) fn leads(&self) -> Vec<u64> {
        self.config.horizons_ms.iter().map(|ms| ms / self.window_ms).collect()
    }

    /// Windows in a day.
    pub(crate) fn day(&self) -> u64 {
        DAY_MS / self.window_ms
    }
}

impl Watched {
    /// Tells what it can teach by now; `nothing` is what a resource teaches that is never used.
    pub(crate) fn teach(&self, nothing: Option<&Prior>, learnt: &mut Lessons) {
        for (resource, track) in &self.series {
            if let Some(lesson) = track.teach(nothing) {
                let priors = learnt.priors.entry(*resource).or_default();
                priors.learn(&self.kin.class, &self.kin.identity, &lesson);
            }
        }
    }
}
