//! What the instances of a fleet have taught, per class and per kind of profile, for all hosts.
//!
//! A host hands in what *its* instances taught, part by part, and what it hands in replaces what it had handed in before; it is given
//! what the *others* taught. So nothing counts twice, however often it is sent. Of each part, the lessons of those hosts are kept that
//! know most: a prior counts as few series anyway (`rswap_forecast::Priors`), so that more of them would cost memory and tell nothing new.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rswap_forecast::{Lessons, Part, StateError};
use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::HostName;

/// Hosts whose lessons are kept, per part.
pub const TEACHERS: usize = 32;
/// Parts that are kept at most: those that several hosts teach, and those that most is known of. What only one host teaches makes room
/// first, of the host that has most of that: nobody's lessons push out what others taught.
pub const MOST_PARTS: usize = 2_000;
/// Bytes of a class's name at most.
pub const MOST_CLASS_BYTES: usize = 4 << 10;
/// Horizons of lessons at most.
pub const MOST_HORIZONS: usize = 64;
/// A part is told again when so much more is known of it, as a share.
const GROWN: f64 = 0.1;
/// A part that goes on changing without growing is told again after so long, in milliseconds.
pub const REFRESH_MS: u64 = 30 * 60_000;
/// Whoever has not taught for so long, in milliseconds, makes room for one that knows as much.
pub(crate) const SILENT_MS: u64 = 4 * REFRESH_MS;

/// Up to where somebody knows a [`Model`]. `(0, 0)` is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Revision {
    /// Life of the controller: the count begins anew in each.
    pub life: u64,
    /// Counts up with each part that is told.
    pub number: u64,
}

/// Lessons of other windows or horizons can't be used.
type Leads = (u64, Vec<u64>);

/// What the fleet has taught.
#[derive(Clone, Debug, Default)]
pub struct Model {
    life: u64,
    number: u64,
    parts: BTreeMap<(Leads, Part), Taught>,
    /// [`MOST_PARTS`].
    most: usize,
    /// What was pushed out since that was last asked.
    dropped: BTreeSet<(HostName, Part)>,
}

#[derive(Clone, Debug)]
struct Taught {
    /// With when each was handed in.
    by_host: BTreeMap<HostName, (Lessons, UnixMillis)>,
    /// All of it together. Shared: it is told to every host, and copied when nobody waits for the model any more.
    whole: Arc<Lessons>,
    /// How much was known of it when it was last told, and when.
    told: (f64, UnixMillis),
    number: u64,
}

impl Model {
    /// Nothing is known yet, in this life of the controller.
    pub fn new(life: u64) -> Self {
        Self { life, most: MOST_PARTS, ..Self::default() }
    }

    /// The same, with fewer parts.
    #[cfg(test)]
    pub(crate) fn with_most(self, most: usize) -> Self {
        Self { most, ..self }
    }

    /// Takes in what a host's instances have taught of a part, in place of what they had before.
    ///
    /// # Errors
    ///
    /// If the lessons can't be used: nothing changes then.
    pub fn teach(
        &mut self,
        host: &HostName,
        part: &Part,
        lessons: &Lessons,
        now: UnixMillis,
    ) -> Result<(), StateError> {
        lessons.check()?;
        if matches!(part, Part::Class(class) if class.len() > MOST_CLASS_BYTES) {
            return Err(StateError::Damaged("the class's name is too long"));
        }
        if lessons.leads().1.len() > MOST_HORIZONS {
            return Err(StateError::Damaged("there are too many horizons"));
        }
        // Whatever else is in it is left out.
        let lessons = lessons.part(part);
        if lessons.series() <= 0.0 {
            return Ok(());
        }
        let leads = (lessons.leads().0, lessons.leads().1.to_vec());
        let key = (leads, part.clone());
        let number = self.number + 1;
        let taught = self.parts.entry(key).or_insert_with(|| Taught {
            by_host: BTreeMap::new(),
            whole: Arc::new(lessons.clone()),
            told: (0.0, UnixMillis(0)),
            number: 0,
        });
        // Of hosts that know equally much, those stay that came first: else each of a thousand would have all of the part merged anew. Not those
        // that have been silent, as one that has left the fleet is.
        let full = taught.by_host.len() >= TEACHERS && !taught.by_host.contains_key(host);
        let stays = |(kept, at): &(Lessons, UnixMillis)| match kept.series().total_cmp(&lessons.series()) {
            Ordering::Greater => true,
            Ordering::Equal => now.since(*at) < SILENT_MS,
            Ordering::Less => false,
        };
        if full && taught.by_host.values().all(stays) {
            self.dropped.insert((host.clone(), part.clone()));
            return Ok(());
        }
        let new = taught.by_host.insert(host.clone(), (lessons, now)).is_none();
        while taught.by_host.len() > TEACHERS {
            let least = taught
                .by_host
                .iter()
                .min_by(|(_, (a, at)), (_, (b, bt))| a.series().total_cmp(&b.series()).then(at.cmp(bt)));
            let Some(least) = least.map(|(host, _)| host.clone()) else { break };
            taught.by_host.remove(&least);
            self.dropped.insert((least, part.clone()));
        }
        let new = new && taught.by_host.contains_key(host);
        let mut all = taught.by_host.values().map(|(lessons, _)| lessons);
        if let Some(first) = all.next() {
            taught.whole = Arc::new(merged(first.clone(), all)?);
        }
        let (before, at) = taught.told;
        let series = taught.whole.series();
        if new || series > before * (1.0 + GROWN) || now.since(at) >= REFRESH_MS {
            taught.told = (series, now);
            taught.number = number;
            self.number = number;
        }
        self.bound();
        Ok(())
    }

    fn bound(&mut self) {
        while self.parts.len() > self.most {
            let mut alone = BTreeMap::<&HostName, usize>::new();
            self.parts
                .values()
                .filter_map(Taught::only)
                .for_each(|host| *alone.entry(host).or_default() += 1);
            let has = |taught: &Taught| taught.only().and_then(|host| alone.get(host)).copied().unwrap_or(0);
            let least = self.parts.iter().min_by(|(_, a), (_, b)| {
                has(b).cmp(&has(a)).then(a.whole.series().total_cmp(&b.whole.series()))
            });
            let Some(key) = least.map(|(key, _)| key.clone()) else { break };
            let Some(taught) = self.parts.remove(&key) else { break };
            self.dropped.extend(taught.by_host.into_keys().map(|host| (host, key.1.clone())));
        }
    }

    /// What was pushed out since this was last called: of whom, and of what, as far as nothing is known of it any more.
    pub fn dropped(&mut self) -> Vec<(HostName, Part)> {
        let dropped = std::mem::take(&mut self.dropped);
        // Of few windows and horizons there are many parts.
        let leads: BTreeSet<&Leads> = self.parts.keys().map(|(leads, _)| leads).collect();
        dropped.into_iter().filter(|(host, part)| !self.is_teacher(&leads, host, part)).collect()
    }

    /// Whether something that a host has taught of a part is kept.
    pub fn teaches(&self, host: &HostName, part: &Part) -> bool {
        self.is_teacher(&self.parts.keys().map(|(leads, _)| leads).collect(), host, part)
    }

    fn is_teacher(&self, leads: &BTreeSet<&Leads>, host: &HostName, part: &Part) -> bool {
        leads.iter().any(|leads| {
            let taught = self.parts.get(&((*leads).clone(), part.clone()));
            taught.is_some_and(|taught| taught.by_host.contains_key(host))
        })
    }

    /// What the others have taught that `host` does not know yet, in the order in which it was told, until `most_series_parts`
    /// parts are named; and up to where the host knows the model when it has taken them in.
    pub fn for_host(
        &self,
        host: &HostName,
        (window_ms, horizons_ms): (u64, &[u64]),
        knows: Revision,
        most_parts: usize,
    ) -> (Vec<(Part, Arc<Lessons>)>, Revision) {
        let since = if knows.life == self.life { knows.number } else { 0 };
        let usable = |(window, horizons): &Leads| *window == window_ms && horizons == horizons_ms;
        let new = self.parts.iter().filter(|((leads, _), taught)| taught.number > since && usable(leads));
        let mut new: Vec<_> = new.collect();
        new.sort_by_key(|(_, taught)| taught.number);
        let (mut parts, mut up_to) = (Vec::new(), self.number);
        for ((_, part), taught) in new {
            if parts.len() == most_parts {
                up_to = taught.number - 1;
                break;
            }
            if let Some(lessons) = taught.by_others(host) {
                parts.push((part.clone(), lessons));
            }
        }
        (parts, Revision { life: self.life, number: up_to })
    }

    /// Of how many hosts and series something is known, per part.
    pub fn known(&self) -> impl Iterator<Item = (&Part, usize, f64)> {
        self.parts.iter().map(|((_, part), taught)| (part, taught.by_host.len(), taught.whole.series()))
    }
}

impl Taught {
    /// Who teaches it, if that is one alone.
    fn only(&self) -> Option<&HostName> {
        self.by_host.keys().next().filter(|_| self.by_host.len() == 1)
    }

    fn by_others(&self, host: &HostName) -> Option<Arc<Lessons>> {
        if !self.by_host.contains_key(host) {
            return Some(self.whole.clone());
        }
        let mut others =
            self.by_host.iter().filter(|(name, _)| *name != host).map(|(_, (lessons, _))| lessons);
        let first = others.next()?.clone();
        merged(first, others).ok().map(Arc::new)
    }
}

fn merged<'l>(mut first: Lessons, others: impl Iterator<Item = &'l Lessons>) -> Result<Lessons, StateError> {
    for other in others {
        first.merge(other)?;
    }
    Ok(first)
}

/// An agent's side: which parts it hands in, and when.
#[derive(Clone, Debug, Default)]
pub struct Teaching {
    /// How much was known of each part when it was last handed in, and when.
    told: BTreeMap<Part, (f64, UnixMillis)>,
}

impl Teaching {
    /// Of what is known here, the parts that are to be handed in now, those first that were never.
    pub fn due(&self, lessons: &Lessons, now: UnixMillis, most_parts: usize) -> Vec<(Part, Lessons)> {
        let due = lessons.parts().into_iter().filter_map(|part| {
            let of = lessons.part(&part);
            let told = self.told.get(&part);
            let is_due = told.is_none_or(|(series, at)| {
                of.series() > series * (1.0 + GROWN) || now.since(*at) >= REFRESH_MS
            });
            is_due.then_some((told.is_some(), part, of))
        });
        let mut due: Vec<_> = due.collect();
        due.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        due.into_iter().take(most_parts).map(|(_, part, lessons)| (part, lessons)).collect()
    }

    /// The controller has these.
    pub fn told(&mut self, parts: &[(Part, Lessons)], now: UnixMillis) {
        for (part, lessons) in parts {
            self.told.insert(part.clone(), (lessons.series(), now));
        }
    }

    /// Another controller, or one that has lost them: everything is handed in anew.
    pub fn forget(&mut self) {
        self.told.clear();
    }
}
