//! Lessons in parts, so that hosts of a fleet can exchange what changed.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Lessons, Priors, Resource};

/// A part of lessons that is exchanged as a whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// What is known of all instances together, and of each kind of profile: measured likeness.
    General,
    /// What is known of one class.
    Class(String),
}

impl Lessons {
    /// The parts that something is known of. What is known of single identities is in none: it stays on its host.
    pub fn parts(&self) -> BTreeSet<Part> {
        let classes = self.priors.values().flat_map(Priors::classes);
        let classes = classes.filter(|class| !class.is_empty()).map(|class| Part::Class(class.to_owned()));
        let general = self.priors.values().any(|priors| priors.only_general().is_some());
        classes.chain(general.then_some(Part::General)).collect()
    }

    /// One part alone.
    pub fn part(&self, part: &Part) -> Self {
        let of = |priors: &Priors| match part {
            Part::General => priors.only_general(),
            Part::Class(class) => priors.only_class(class),
        };
        let priors: BTreeMap<Resource, Priors> =
            self.priors.iter().filter_map(|(resource, priors)| Some((*resource, of(priors)?))).collect();
        let mut part = Self::new(self.window_ms, self.horizons_ms.clone());
        part.priors = priors;
        part
    }

    /// How much they rest on: the series that taught, of the resource that most is known of.
    pub fn series(&self) -> f64 {
        self.priors.values().map(Priors::series).fold(0.0, f64::max)
    }

    /// What they were learnt for: the length of a window, and the horizons, in milliseconds. Only lessons of equal leads can be merged.
    pub fn leads(&self) -> (u64, &[u64]) {
        (self.window_ms, &self.horizons_ms)
    }
}
