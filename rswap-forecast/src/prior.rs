//! What instances have taught: so that a new one starts from its kind, not from nothing.
//!
//! Everything is on the scale of the series that it comes from, so that small and large instances of a kind can teach each
//! other; only the mean amount is not. A [`Prior`] can be stored, sent, and merged with others in any order of arrival.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    analogs::{self, Analogs},
    habit::Histogram,
    mixture::{EXPERTS, Mixture},
    regression::{FEATURES, Regression},
    series::UNIT,
};

/// Outcomes that a new series is given in place of its own: about so many of its own outweigh them.
const GIVEN: usize = 6;
/// Series that a prior counts as at most, next to what is known of a narrower kind.
const MOST: [f64; 3] = [1.0, 3.0, 9.0];
/// Format of stored priors.
const VERSION: u32 = 1;

/// What one series, or many, have taught.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prior {
    version: u32,
    /// Series that it comes from.
    series: f64,
    /// Mean of the logarithms of their mean amounts.
    log_mean: f64,
    /// Shares of time at each position, by [`Histogram`]'s bins.
    usual: Vec<f32>,
    /// The quantiles of what it used when it was here before, where it returns.
    #[serde(default)]
    own: Option<[f64; 4]>,
    leads: Vec<LeadPrior>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct LeadPrior {
    regression: [f32; FEATURES],
    /// What was gained by each expert, per quantile.
    gained: [[f32; EXPERTS]; 4],
    /// Evenly spaced quantiles of the regression's errors, and of changes.
    missed: [f32; GIVEN],
    gone: [f32; GIVEN],
    unrest: f32,
}

/// A prior that can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PriorError {
    /// It was written by another release.
    #[error("the prior has format {0}, this release knows {VERSION}")]
    Version(u32),
    /// It is for other leads.
    #[error("the prior has {0} leads, {1} are forecast")]
    Leads(usize, usize),
    /// A number in it is none.
    #[error("the prior contains what is no number")]
    Number,
}

impl Prior {
    /// Whether a series with so many leads can start from it.
    ///
    /// # Errors
    ///
    /// If it is of another format, for other leads, or damaged.
    pub fn check(&self, leads: usize) -> Result<(), PriorError> {
        let finite = |numbers: &[f32]| numbers.iter().all(|number| number.is_finite());
        let lead_is_fine = |lead: &LeadPrior| {
            let gained = lead.gained.iter().all(|gained| finite(gained));
            finite(&lead.regression) && gained && finite(&lead.missed) && finite(&lead.gone)
        };
        let own = self.own.iter().flatten().all(|amount| amount.is_finite());
        let numbers = own && self.series.is_finite() && self.log_mean.is_finite() && finite(&self.usual);
        if self.version != VERSION {
            Err(PriorError::Version(self.version))
        } else if self.leads.len() != leads {
            Err(PriorError::Leads(self.leads.len(), leads))
        } else if !numbers || self.usual.len() != Histogram::BINS || !self.leads.iter().all(lead_is_fine) {
            Err(PriorError::Number)
        } else {
            Ok(())
        }
    }

    /// Takes in another one, each by the number of series that it comes from.
    pub fn merge(&mut self, other: &Self) {
        if self.version != other.version || self.leads.len() != other.leads.len() {
            return;
        }
        let share = other.series / (self.series + other.series).max(f64::MIN_POSITIVE);
        self.series += other.series;
        self.log_mean += (other.log_mean - self.log_mean) * share;
        let share = share as f32;
        let towards = |own: &mut [f32], other: &[f32]| {
            own.iter_mut().zip(other).for_each(|(own, other)| *own += (other - *own) * share);
        };
        towards(&mut self.usual, &other.usual);
        for (own, other) in self.leads.iter_mut().zip(&other.leads) {
            towards(&mut own.regression, &other.regression);
            towards(&mut own.missed, &other.missed);
            towards(&mut own.gone, &other.gone);
            own.gained.iter_mut().zip(&other.gained).for_each(|(own, other)| towards(own, other));
            own.unrest += (other.unrest - own.unrest) * share;
        }
    }

    /// Series that it comes from.
    pub fn series(&self) -> f64 {
        self.series
    }

    pub(super) fn of(mean: f64, long: &Histogram) -> Self {
        Self {
            version: VERSION,
            series: 1.0,
            log_mean: mean.max(1e-12).ln(),
            usual: long.shares(),
            own: None,
            leads: vec![],
        }
    }

    pub(super) fn add_lead(&mut self, regression: &Regression, analogs: &Analogs, mixtures: &[Mixture; 4]) {
        let (missed, gone, unrest) = analogs.sketch();
        let gained = std::array::from_fn(|k| *mixtures[k].gained());
        self.leads.push(LeadPrior { regression: *regression.weights(), gained, missed, gone, unrest });
    }

    pub(super) fn mean(&self) -> f64 {
        self.log_mean.exp()
    }

    /// What was hardly ever exceeded.
    pub(super) fn highest(&self) -> f64 {
        let [.., top] = analogs::spread::<100>(&self.usual, Histogram::WIDTH);
        f64::from(top).sinh() * UNIT * self.mean()
    }

    /// The quantiles of what it used when it was here before, where it returns.
    pub(super) fn own(&self) -> Option<[f64; 4]> {
        self.own
    }

    /// The quantiles of all that was used, as amounts.
    fn amounts(&self) -> [f64; 4] {
        Histogram::of(&self.usual).quantiles().map(|position| f64::from(position).sinh() * UNIT * self.mean())
    }

    pub(super) fn usual(&self) -> &[f32] {
        &self.usual
    }

    /// Gives one lead what it can't know yet.
    pub(super) fn teach(
        &self,
        lead: usize,
        regression: &mut Regression,
        analogs: &mut Analogs,
        mixtures: &mut [Mixture; 4],
        known: &[bool; EXPERTS],
    ) {
        let Some(prior) = self.leads.get(lead) else { return };
        regression.start_from(&prior.regression);
        for (mixture, gained) in mixtures.iter_mut().zip(&prior.gained) {
            mixture.start_from(gained, known);
        }
        let levels = analogs::spread::<GIVEN>(&self.usual, Histogram::WIDTH);
        for i in 0..GIVEN {
            // In an order that pairs no high level with a high change.
            let (missed, gone) = (prior.missed[(i * 5 + 2) % GIVEN], prior.gone[(i * 5 + 2) % GIVEN]);
            analogs.add(levels[i] - gone, prior.unrest, missed, gone);
        }
    }

    /// At most as many series.
    fn at_most(&self, series: f64) -> Self {
        Self { series: self.series.min(series), ..self.clone() }
    }
}

/// Priors by how near the kin is: everything, the class, and the same thing returning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Priors {
    all: Option<Prior>,
    classes: BTreeMap<String, Prior>,
    identities: BTreeMap<String, Prior>,
}

impl Priors {
    /// Takes in what a series has taught.
    pub fn learn(&mut self, class: &str, identity: &str, prior: &Prior) {
        let add = |known: Option<&mut Prior>| match known {
            Some(known) => {
                known.merge(prior);
                false
            }
            None => true,
        };
        if add(self.all.as_mut()) {
            self.all = Some(prior.clone());
        }
        if add(self.classes.get_mut(class)) {
            self.classes.insert(class.to_owned(), prior.clone());
        }
        if add(self.identities.get_mut(identity)) {
            self.identities.insert(identity.to_owned(), prior.clone());
        }
    }

    /// Keeps at most so many classes and identities: those that most is known of.
    pub(crate) fn bound(&mut self, most: usize) {
        for known in [&mut self.classes, &mut self.identities] {
            while known.len() > most {
                let least = known.iter().min_by(|(_, a), (_, b)| a.series.total_cmp(&b.series));
                let Some(key) = least.map(|(key, _)| key.clone()) else { break };
                known.remove(&key);
            }
        }
    }

    /// Whose return it knows.
    pub(crate) fn identities(&self) -> impl Iterator<Item = &str> {
        self.identities.keys().map(String::as_str)
    }

    /// Whether a series with so many leads can start from any of them.
    ///
    /// # Errors
    ///
    /// As [`Prior::check`].
    pub(crate) fn check(&self, leads: usize) -> Result<(), PriorError> {
        let mut all = self.all.iter().chain(self.classes.values()).chain(self.identities.values());
        all.try_for_each(|prior| prior.check(leads))
    }

    /// Takes in what others have learnt.
    pub fn merge(&mut self, other: &Self) {
        let both = |own: &mut BTreeMap<String, Prior>, other: &BTreeMap<String, Prior>| {
            for (key, prior) in other {
                own.entry(key.clone()).and_modify(|own| own.merge(prior)).or_insert_with(|| prior.clone());
            }
        };
        match (&mut self.all, &other.all) {
            (Some(own), Some(other)) => own.merge(other),
            (own @ None, Some(other)) => *own = Some(other.clone()),
            (_, None) => {}
        }
        both(&mut self.classes, &other.classes);
        both(&mut self.identities, &other.identities);
    }

    /// What a new series starts from: the nearer the kin, the more it counts, once there is enough of it.
    pub fn of(&self, class: &str, identity: &str) -> Option<Prior> {
        let kin = [self.all.as_ref(), self.classes.get(class), self.identities.get(identity)];
        let known = kin.into_iter().zip(MOST).filter_map(|(prior, most)| Some(prior?.at_most(most)));
        let mut prior = known.reduce(|mut wide, near| {
            wide.merge(&near);
            wide
        })?;
        prior.own = self.identities.get(identity).map(Prior::amounts);
        Some(prior)
    }
}
