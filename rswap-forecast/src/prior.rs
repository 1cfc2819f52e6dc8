//! What instances have taught: so that a new one starts from its kind, not from nothing.
//!
//! How a series moves is on the scale of the series that it comes from, so that small and large instances of a kind can teach each
//! other, those that do more counting for more: one that idles knows little of how its kind moves. How much is used is mixed, not
//! averaged ([`Amounts`]). A [`Prior`] can be stored, sent, and merged with others in any order of arrival.

use serde::{Deserialize, Serialize};

use super::{
    amounts::Amounts,
    analogs::{self, Analogs},
    habit::Histogram,
    lead::CENTRES,
    mixture::{EXPERTS, Mixture},
    profile::Profile,
    regression::{FEATURES, Regression},
    steered::{Signs, Steered},
};

/// Outcomes that a new series is given in place of its own: about so many of its own outweigh them.
const GIVEN: usize = 6;
/// Format of stored priors.
const VERSION: u32 = 4;
/// What is hardly ever exceeded: by this share of time.
const HARDLY: f64 = 0.005;
/// Nobody knows less of how its kind moves than one that uses so much.
const LEAST_ACTIVE: f64 = 1e-9;
/// Outcomes that steered spreads count as.
const STEERED_BY: u32 = 20;

/// What one series, or many, have taught.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prior {
    version: u32,
    /// Series that it comes from.
    series: f64,
    /// How much they count in how their kind moves.
    #[serde(default)]
    active: f64,
    /// What they are like, on average.
    #[serde(default)]
    profile: Profile,
    /// What they used: each weighs 1.
    #[serde(default)]
    amounts: Amounts,
    /// What is known of what a newcomer will use that starts from it; of no other it is known.
    #[serde(skip)]
    known: Known,
    leads: Vec<LeadPrior>,
}

/// The quantiles of what was used before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Known {
    /// By itself, where it returns.
    pub(super) own: Option<[f64; 4]>,
    /// By those of its class.
    pub(super) class: Option<[f64; 4]>,
}

impl Known {
    pub(super) fn amounts(&self) -> impl Iterator<Item = &f64> {
        self.own.iter().chain(&self.class).flatten()
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct LeadPrior {
    regression: [f32; FEATURES],
    /// Coefficients of the steered spreads, per centre and quantile.
    #[serde(default)]
    steered: [[Signs; 4]; CENTRES],
    /// What was gained by each expert, per quantile.
    gained: [[f32; EXPERTS]; 4],
    /// Evenly spaced quantiles of the regression's errors, and of changes.
    missed: [f32; GIVEN],
    gone: [f32; GIVEN],
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
            let steered = lead.steered.iter().flatten().all(|steered| finite(steered));
            finite(&lead.regression) && steered && gained && finite(&lead.missed) && finite(&lead.gone)
        };
        let numbers = [self.series, self.active].iter().all(|number| number.is_finite())
            && self.profile.is_finite()
            && self.amounts.is_sound();
        if self.version != VERSION {
            Err(PriorError::Version(self.version))
        } else if self.leads.len() != leads {
            Err(PriorError::Leads(self.leads.len(), leads))
        } else if !numbers || !self.leads.iter().all(lead_is_fine) {
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
        let share = |own: f64, other: f64| (other / (own + other).max(f64::MIN_POSITIVE)) as f32;
        self.profile.towards(&other.profile, share(self.series, other.series));
        let share = share(self.active, other.active);
        self.series += other.series;
        self.active += other.active;
        self.amounts.add(&other.amounts, 1.0);
        let towards = |own: &mut [f32], other: &[f32]| {
            own.iter_mut().zip(other).for_each(|(own, other)| *own += (other - *own) * share);
        };
        for (own, other) in self.leads.iter_mut().zip(&other.leads) {
            towards(&mut own.regression, &other.regression);
            let (own_steered, steered) = (own.steered.iter_mut().flatten(), other.steered.iter().flatten());
            own_steered.zip(steered).for_each(|(own, other)| towards(own, other));
            towards(&mut own.missed, &other.missed);
            towards(&mut own.gone, &other.gone);
            own.gained.iter_mut().zip(&other.gained).for_each(|(own, other)| towards(own, other));
        }
    }

    /// Both.
    pub(super) fn merged(mut self, other: Self) -> Self {
        self.merge(&other);
        self
    }

    /// Series that it comes from.
    pub fn series(&self) -> f64 {
        self.series
    }

    pub(super) fn of(mean: f64, profile: Profile, amounts: Amounts) -> Self {
        Self {
            version: VERSION,
            series: 1.0,
            active: mean.max(LEAST_ACTIVE).sqrt(),
            profile,
            amounts,
            known: Known::default(),
            leads: vec![],
        }
    }

    pub(super) fn add_lead(
        &mut self,
        regression: &Regression,
        steered: &[Steered; CENTRES],
        analogs: &Analogs,
        mixtures: &[Mixture; 4],
    ) {
        let (missed, gone) = analogs.sketch();
        let gained = std::array::from_fn(|k| *mixtures[k].gained());
        let (regression, steered) = (*regression.weights(), steered.each_ref().map(|one| *one.weights()));
        self.leads.push(LeadPrior { regression, steered, gained, missed, gone });
    }

    /// What the series are like that it comes from.
    pub(super) fn profile(&self) -> &Profile {
        &self.profile
    }

    /// What they used.
    pub(super) fn amounts(&self) -> &Amounts {
        &self.amounts
    }

    /// What was hardly ever exceeded.
    pub(super) fn highest(&self) -> f64 {
        self.amounts.quantile(HARDLY)
    }

    /// What is known of what it will use, where it returns, or is of a class.
    pub(super) fn known(&self) -> Known {
        self.known
    }

    /// Gives one lead what it can't know yet; `usual` are shares of time at each position.
    pub(super) fn teach(
        &self,
        lead: usize,
        usual: &[f32],
        regression: &mut Regression,
        steered: &mut [Steered; CENTRES],
        analogs: &mut Analogs,
    ) {
        let Some(prior) = self.leads.get(lead) else { return };
        regression.start_from(&prior.regression);
        for (steered, weights) in steered.iter_mut().zip(&prior.steered) {
            steered.start_from(weights, STEERED_BY);
        }
        let levels = analogs::spread::<GIVEN>(usual, Histogram::WIDTH);
        for i in 0..GIVEN {
            // In an order that pairs no high level with a high change.
            let (missed, gone) = (prior.missed[(i * 5 + 2) % GIVEN], prior.gone[(i * 5 + 2) % GIVEN]);
            analogs.add(levels[i] - gone, missed, gone);
        }
    }

    /// Says whom to believe.
    pub(super) fn teach_mixtures(&self, lead: usize, mixtures: &mut [Mixture; 4], known: &[bool; EXPERTS]) {
        let gained = self.leads.get(lead).map(|prior| &prior.gained);
        for (mixture, gained) in mixtures.iter_mut().zip(gained.into_iter().flatten()) {
            mixture.start_from(gained, known);
        }
    }

    /// A newcomer's: it uses `amounts`, as far as anybody knows, and its high quantiles are drawn up to what is `known`.
    pub(super) fn of_newcomer(self, amounts: Amounts, known: Known) -> Self {
        Self { amounts, known, ..self }
    }

    /// At most as many series, which count alike however much they use.
    pub(super) fn at_most(&self, series: f64) -> Self {
        let series = self.series.min(series);
        let mut amounts = Amounts::default();
        amounts.add(&self.amounts, series / self.series.max(f64::MIN_POSITIVE));
        Self { series, active: series, amounts, ..self.clone() }
    }
}
