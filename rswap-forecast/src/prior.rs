//! What instances have taught: so that a new one starts from its kind, not from nothing.
//!
//! Everything is on the scale of the series that it comes from, so that small and large instances of a kind can teach each
//! other; only the mean amount is not. A [`Prior`] can be stored, sent, and merged with others in any order of arrival.

use serde::{Deserialize, Serialize};

use super::{
    analogs::{self, Analogs},
    habit::Histogram,
    mixture::{EXPERTS, Mixture},
    profile::Profile,
    regression::{FEATURES, Regression},
    series::UNIT,
    steered::{Signs, Steered},
};

/// Outcomes that a new series is given in place of its own: about so many of its own outweigh them.
const GIVEN: usize = 6;
/// Format of stored priors.
const VERSION: u32 = 2;
/// Outcomes that steered spreads count as.
const STEERED_BY: u32 = 20;

/// What one series, or many, have taught.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prior {
    version: u32,
    /// Series that it comes from.
    series: f64,
    /// Mean of the logarithms of their mean amounts.
    log_mean: f64,
    /// What they are like, on average.
    #[serde(default)]
    profile: Profile,
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
    /// Coefficients of the steered spreads, per quantile.
    #[serde(default)]
    steered: [Signs; 4],
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
            let steered = lead.steered.iter().all(|steered| finite(steered));
            finite(&lead.regression) && steered && gained && finite(&lead.missed) && finite(&lead.gone)
        };
        let own = self.own.iter().flatten().all(|amount| amount.is_finite());
        let numbers = own
            && self.series.is_finite()
            && self.log_mean.is_finite()
            && self.profile.is_finite()
            && finite(&self.usual);
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

    /// Takes in another one, each by the number of series that it comes from. What another release has taught gives way.
    pub fn merge(&mut self, other: &Self) {
        if self.version != VERSION {
            *self = other.clone();
            return;
        }
        if self.version != other.version || self.leads.len() != other.leads.len() {
            return;
        }
        let share = other.series / (self.series + other.series).max(f64::MIN_POSITIVE);
        self.series += other.series;
        self.log_mean += (other.log_mean - self.log_mean) * share;
        let share = share as f32;
        self.profile.towards(&other.profile, share);
        let towards = |own: &mut [f32], other: &[f32]| {
            own.iter_mut().zip(other).for_each(|(own, other)| *own += (other - *own) * share);
        };
        towards(&mut self.usual, &other.usual);
        for (own, other) in self.leads.iter_mut().zip(&other.leads) {
            towards(&mut own.regression, &other.regression);
            own.steered.iter_mut().zip(&other.steered).for_each(|(own, other)| towards(own, other));
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

    pub(super) fn of(mean: f64, profile: Profile, long: &Histogram) -> Self {
        Self {
            version: VERSION,
            series: 1.0,
            log_mean: mean.max(1e-12).ln(),
            profile,
            usual: long.shares(),
            own: None,
            leads: vec![],
        }
    }

    pub(super) fn add_lead(
        &mut self,
        regression: &Regression,
        steered: &Steered,
        analogs: &Analogs,
        mixtures: &[Mixture; 4],
    ) {
        let (missed, gone, unrest) = analogs.sketch();
        let gained = std::array::from_fn(|k| *mixtures[k].gained());
        let (regression, steered) = (*regression.weights(), *steered.weights());
        self.leads.push(LeadPrior { regression, steered, gained, missed, gone, unrest });
    }

    /// What the series are like that it comes from.
    pub(super) fn profile(&self) -> &Profile {
        &self.profile
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
        steered: &mut Steered,
        analogs: &mut Analogs,
        mixtures: &mut [Mixture; 4],
        known: &[bool; EXPERTS],
    ) {
        let Some(prior) = self.leads.get(lead) else { return };
        regression.start_from(&prior.regression);
        steered.start_from(&prior.steered, STEERED_BY);
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

    /// Of the same one that was here before, all that it used is known.
    pub(super) fn returns_as(&mut self, before: Option<&Self>) {
        self.own = before.map(Self::amounts);
    }

    /// At most as many series.
    pub(super) fn at_most(&self, series: f64) -> Self {
        Self { series: self.series.min(series), ..self.clone() }
    }
}
