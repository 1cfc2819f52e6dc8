//! What is known of whom: priors by how near the kin is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Prior, PriorError, Series, amounts::Amounts, prior::Known, profile::Profile};

/// Series that a prior counts as at most, next to what is known of narrower kin: all, the class, those alike, the same one.
const MOST: [f64; 4] = [1.0, 3.0, 6.0, 9.0];
/// Series of nearer kin that say how much is used without the rest.
const ENOUGH: f64 = 2.0;
/// Kinds of profile that are told apart at most.
const KINDS: usize = 16;
/// Profiles nearer than this are of one kind.
const ALIKE: f32 = 0.5;

/// Priors by how near the kin is: everything, the class, those with a profile alike, and the same thing returning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Priors {
    all: Option<Prior>,
    classes: BTreeMap<String, Prior>,
    identities: BTreeMap<String, Prior>,
    /// One per kind of profile, in the order of their coming.
    #[serde(default)]
    kinds: Vec<Prior>,
}

impl Priors {
    pub(crate) const fn none() -> Self {
        Self { all: None, classes: BTreeMap::new(), identities: BTreeMap::new(), kinds: Vec::new() }
    }

    /// Takes in what a series has taught.
    pub fn learn(&mut self, class: &str, identity: &str, prior: &Prior) {
        match &mut self.all {
            Some(all) => all.merge(prior),
            none => *none = Some(prior.clone()),
        }
        add(&mut self.classes, class, prior);
        add(&mut self.identities, identity, prior);
        self.add_kind(prior);
    }

    /// Keeps at most so many classes and identities: those that most is known of.
    pub(crate) fn bound(&mut self, most: usize) {
        for known in [&mut self.classes, &mut self.identities] {
            while known.len() > most {
                let least = known.iter().min_by(|(_, a), (_, b)| a.series().total_cmp(&b.series()));
                let Some(key) = least.map(|(key, _)| key.clone()) else { break };
                known.remove(&key);
            }
        }
    }

    /// Whose return it knows.
    pub(crate) fn identities(&self) -> impl Iterator<Item = &str> {
        self.identities.keys().map(String::as_str)
    }

    /// Of which classes something is known.
    pub(crate) fn classes(&self) -> impl Iterator<Item = &str> {
        self.classes.keys().map(String::as_str)
    }

    /// What is known of one class, and nothing else.
    pub(crate) fn only_class(&self, class: &str) -> Option<Self> {
        let (name, prior) = self.classes.get_key_value(class)?;
        Some(Self { classes: BTreeMap::from([(name.clone(), prior.clone())]), ..Self::none() })
    }

    /// What is known of all together and of each kind of profile, and of no class or identity.
    pub(crate) fn only_general(&self) -> Option<Self> {
        let all = self.all.clone()?;
        Some(Self { all: Some(all), kinds: self.kinds.clone(), ..Self::none() })
    }

    /// Series that it comes from: of all, or of the only class that it knows.
    pub(crate) fn series(&self) -> f64 {
        let all = self.all.as_ref().map_or(0.0, Prior::series);
        self.classes.values().map(Prior::series).fold(all, f64::max)
    }

    /// Whether a series with so many leads can start from any of them.
    ///
    /// # Errors
    ///
    /// As [`Prior::check`].
    pub(crate) fn check(&self, leads: usize) -> Result<(), PriorError> {
        let mut all =
            self.all.iter().chain(self.classes.values()).chain(self.identities.values()).chain(&self.kinds);
        all.try_for_each(|prior| prior.check(leads))
    }

    /// Takes in what others have learnt.
    pub fn merge(&mut self, other: &Self) {
        match (&mut self.all, &other.all) {
            (Some(own), Some(other)) => own.merge(other),
            (own @ None, Some(other)) => *own = Some(other.clone()),
            (_, None) => {}
        }
        other.classes.iter().for_each(|(key, prior)| add(&mut self.classes, key, prior));
        other.identities.iter().for_each(|(key, prior)| add(&mut self.identities, key, prior));
        other.kinds.iter().for_each(|kind| self.add_kind(kind));
    }

    /// What a new series starts from: the nearer the kin, the more it counts, once there is enough of it.
    pub fn of(&self, class: &str, identity: &str) -> Option<Prior> {
        self.of_among(class, identity, &[])
    }

    /// As [`Priors::of`], where others of the class still run: what they have taught up to now.
    pub(crate) fn of_among(&self, class: &str, identity: &str, running: &[Prior]) -> Option<Prior> {
        self.known(class, identity, None, running)
    }

    /// A series that has just shown what it is like starts again from what is known of its like, too, and sees again what it saw. To be
    /// called after each window that was seen: at one of them it does so.
    pub fn resemble(&self, class: &str, identity: &str, series: &mut Series) {
        self.resemble_among(class, identity, Vec::new, series);
    }

    /// As [`Priors::resemble`], where others of the class still run.
    pub(crate) fn resemble_among(
        &self,
        class: &str,
        identity: &str,
        running: impl FnOnce() -> Vec<Prior>,
        series: &mut Series,
    ) {
        let Some(profile) = series.first_profile() else { return };
        let known = self.known(class, identity, self.alike(&profile), &running());
        if let Some(again) = known.and_then(|prior| series.again_from(&prior).ok()) {
            *series = again;
        }
    }

    fn known(&self, class: &str, identity: &str, alike: Option<Prior>, running: &[Prior]) -> Option<Prior> {
        let with_running =
            |known: Option<&Prior>| known.into_iter().chain(running).cloned().reduce(Prior::merged);
        let (all, class) = (with_running(self.all.as_ref()), with_running(self.classes.get(class)));
        let same = self.identities.get(identity).cloned();
        let quantiles = |prior: &Option<Prior>| prior.as_ref().map(|prior| prior.amounts().quantiles());
        let known = Known { own: quantiles(&same), class: quantiles(&class) };
        let kin = [all, class, alike, same];
        // How much others use says little where enough of a nearer kin has shown it.
        let enough = kin.iter().skip(1).flatten().any(|prior| prior.series() >= ENOUGH);
        let mut amounts = Amounts::default();
        let of_most = kin.into_iter().zip(MOST).filter_map(|(prior, most)| Some(prior?.at_most(most)));
        let of_most: Vec<Prior> = of_most.collect();
        for prior in of_most.iter().skip(usize::from(enough)) {
            amounts.add(prior.amounts(), 1.0);
        }
        Some(of_most.into_iter().reduce(Prior::merged)?.of_newcomer(amounts, known))
    }

    /// What those alike have taught, each kind by how near it is.
    fn alike(&self, profile: &Profile) -> Option<Prior> {
        let near = self.kinds.iter().map(|kind| {
            let distance = kind.profile().distance(profile);
            kind.at_most(kind.series() * f64::from(1.0 / (1.0 + (distance / ALIKE).powi(4))))
        });
        near.reduce(Prior::merged)
    }

    /// To the kind that it is of; where there is none yet, it makes a new one, and where that is one too many, the two that are nearest to
    /// each other become one.
    fn add_kind(&mut self, prior: &Prior) {
        let distances = self.kinds.iter().map(|kind| kind.profile().distance(prior.profile()));
        let nearest = distances.enumerate().min_by(|a, b| a.1.total_cmp(&b.1));
        match nearest {
            Some((kind, distance)) if distance < ALIKE => self.kinds[kind].merge(prior),
            _ => self.kinds.push(prior.clone()),
        }
        if self.kinds.len() > KINDS {
            let pairs = (0..self.kinds.len()).flat_map(|a| (0..a).map(move |b| (a, b)));
            let apart = |&(a, b): &(usize, usize)| self.kinds[a].profile().distance(self.kinds[b].profile());
            if let Some((a, b)) = pairs.min_by(|one, other| apart(one).total_cmp(&apart(other))) {
                let gone = self.kinds.remove(a);
                self.kinds[b].merge(&gone);
            }
        }
    }
}

fn add(known: &mut BTreeMap<String, Prior>, key: &str, prior: &Prior) {
    known.entry(key.to_owned()).and_modify(|known| known.merge(prior)).or_insert_with(|| prior.clone());
}
