//! What was learnt, between two lives of its forecaster, and between forecasters.
//!
//! [`Lessons`] are what instances have taught: they can be handed out, and merged with those of others. The state of a forecaster is
//! these and its running series as they are, so that forecasts go on where they were:
//!
//! | bytes | what |
//! | --- | --- |
//! | 16 | `rswap forecasts` and a zero |
//! | 4 | version, little-endian, as all numbers here |
//! | 8 | length of the payload |
//! | | the payload (postcard): lessons, then instances |
//! | 8 | XXH3 of the payload |

use std::collections::{BTreeMap, BTreeSet};

use rswap_types::InstanceName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use xxhash_rust::xxh3::xxh3_64;

use crate::{ForecastConfig, Forecaster, Priors, Resource, forecaster::Watched};

const MAGIC: &[u8; 16] = b"rswap forecasts\0";
/// Version of the state: what a series is made of changes with the forecast.
const VERSION: u32 = 5;
/// Version of lessons.
const LESSONS: u32 = 1;
const HEAD: usize = MAGIC.len() + 4 + 8;

/// Why a state, or lessons, could not be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// It is something else.
    #[error("it is no forecaster's state")]
    NoState,
    /// Another release wrote it.
    #[error("it has version {0}, this release knows {1}")]
    Version(u32, u32),
    /// It is cut off, or bytes of it have changed.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// It is of forecasts for other leads: nothing of it would be right.
    #[error("it is for windows of {0} ms and horizons of {1:?} ms, here they are {2} ms and {3:?} ms")]
    OtherLeads(u64, Vec<u64>, u64, Vec<u64>),
}

/// What instances have taught, per resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Lessons {
    /// Of this format.
    version: u32,
    /// Windows that it was learnt in, in milliseconds.
    pub(crate) window_ms: u64,
    /// Horizons that it was learnt for, in milliseconds.
    pub(crate) horizons_ms: Vec<u64>,
    /// By resource: what a forecaster of the same version reads, and nobody else.
    #[schema(value_type = BTreeMap<Resource, Object>)]
    pub(crate) priors: BTreeMap<Resource, Priors>,
}

impl Lessons {
    pub(crate) fn new(window_ms: u64, horizons_ms: Vec<u64>) -> Self {
        Self { version: LESSONS, window_ms, horizons_ms, priors: BTreeMap::new() }
    }

    /// Takes in what others have learnt. What both know from the same instances then counts twice.
    ///
    /// # Errors
    ///
    /// If they are of another version, for other leads, or damaged; nothing is taken in then.
    pub fn merge(&mut self, other: &Self) -> Result<(), StateError> {
        other.check()?;
        if (self.window_ms, &self.horizons_ms) != (other.window_ms, &other.horizons_ms) {
            let (theirs, ours) = (other.horizons_ms.clone(), self.horizons_ms.clone());
            return Err(StateError::OtherLeads(other.window_ms, theirs, self.window_ms, ours));
        }
        for (resource, priors) in &other.priors {
            self.priors.entry(*resource).or_default().merge(priors);
        }
        Ok(())
    }

    /// Whether they can be used at all.
    ///
    /// # Errors
    ///
    /// If they are of another version, or damaged.
    pub fn check(&self) -> Result<(), StateError> {
        if self.version != LESSONS {
            return Err(StateError::Version(self.version, LESSONS));
        }
        let sound = |priors: &Priors| priors.check(self.horizons_ms.len()).is_ok();
        match self.priors.values().all(sound) {
            true => Ok(()),
            false => Err(StateError::Damaged("a prior in it is none")),
        }
    }

    /// How many instances, by identity, something is known of.
    pub fn identities(&self) -> usize {
        self.priors.values().flat_map(Priors::identities).collect::<BTreeSet<_>>().len()
    }

    pub(crate) fn bound(&mut self, most: usize) {
        self.priors.values_mut().for_each(|priors| priors.bound(most));
    }
}

#[derive(Serialize)]
struct Written<'a> {
    learnt: &'a Lessons,
    instances: &'a BTreeMap<InstanceName, Watched>,
}

#[derive(Deserialize)]
struct Read {
    learnt: Lessons,
    instances: BTreeMap<InstanceName, Watched>,
}

impl Forecaster {
    /// All that it knows, for [`Forecaster::with_state`]. If that is more than `most_bytes`, it is only what was learnt, of running
    /// instances as well: they begin anew from that.
    pub fn state(&self, most_bytes: usize) -> Vec<u8> {
        let whole = written(&self.learnt, &self.instances);
        if whole.len() <= most_bytes { whole } else { written(&self.lessons(), &BTreeMap::new()) }
    }

    /// A forecaster that goes on from a [`Forecaster::state`]: windows since then count as unseen.
    ///
    /// # Errors
    ///
    /// If it is none, of another version, damaged, or for other windows or horizons.
    pub fn with_state(config: ForecastConfig, window_ms: u64, state: &[u8]) -> Result<Self, StateError> {
        let Read { learnt, instances } = read(state)?;
        let mut new = Self::new(config, window_ms);
        new.learnt.merge(&learnt)?;
        let (leads, day) = (new.leads(), new.day());
        let mut series = instances.values().flat_map(|watched| watched.series.values());
        if !series.all(|series| series.is_sound(&leads, day)) {
            return Err(StateError::Damaged("a series in it is none"));
        }
        new.instances = instances;
        Ok(new)
    }

    /// What was learnt here, also from instances that still run.
    pub fn lessons(&self) -> Lessons {
        let mut lessons = self.learnt.clone();
        self.instances.values().for_each(|watched| watched.teach(self.nothing(), &mut lessons));
        lessons
    }

    /// Takes in what others have learnt: instances that come from now on start from it, too.
    ///
    /// # Errors
    ///
    /// As [`Lessons::merge`].
    pub fn learn(&mut self, lessons: &Lessons) -> Result<(), StateError> {
        self.learnt.merge(lessons)?;
        self.know();
        Ok(())
    }
}

impl Lessons {
    /// Those of a [`Forecaster::state`], for whatever windows and horizons, also of the instances that ran then.
    ///
    /// # Errors
    ///
    /// If it is none, of another version, or damaged.
    pub fn of_state(state: &[u8]) -> Result<Self, StateError> {
        let Read { learnt: mut lessons, instances } = read(state)?;
        lessons.check()?;
        let config = ForecastConfig { horizons_ms: lessons.horizons_ms.clone(), ..ForecastConfig::default() };
        let shape = Forecaster::new(config, lessons.window_ms);
        let (leads, day) = (shape.leads(), shape.day());
        for watched in instances.values() {
            if !watched.series.values().all(|series| series.is_sound(&leads, day)) {
                return Err(StateError::Damaged("a series in it is none"));
            }
            watched.teach(shape.nothing(), &mut lessons);
        }
        Ok(lessons)
    }
}

fn written(learnt: &Lessons, instances: &BTreeMap<InstanceName, Watched>) -> Vec<u8> {
    let mut state = Vec::new();
    state.extend_from_slice(MAGIC);
    state.extend_from_slice(&VERSION.to_le_bytes());
    state.extend_from_slice(&[0; 8]);
    // In place: it is tens of megabytes, and two of them would be the largest of all that the agent holds.
    let mut state =
        postcard::to_extend(&Written { learnt, instances }, state).expect("plain data of known lengths");
    let (len, digest) = ((state.len() - HEAD) as u64, xxh3_64(&state[HEAD..]));
    state[HEAD - 8..HEAD].copy_from_slice(&len.to_le_bytes());
    state.extend_from_slice(&digest.to_le_bytes());
    state
}

fn read(state: &[u8]) -> Result<Read, StateError> {
    let rest = state.strip_prefix(MAGIC).ok_or(StateError::NoState)?;
    let (version, rest) = number::<4>(rest)?;
    let version = u32::from_le_bytes(version);
    if version != VERSION {
        return Err(StateError::Version(version, VERSION));
    }
    let (len, rest) = number::<8>(rest)?;
    let len = usize::try_from(u64::from_le_bytes(len)).map_err(|_| StateError::Damaged("its length"))?;
    let (payload, rest) = rest.split_at_checked(len).ok_or(StateError::Damaged("it ends too soon"))?;
    if rest != xxh3_64(payload).to_le_bytes() {
        return Err(StateError::Damaged("its checksum differs"));
    }
    match postcard::take_from_bytes(payload) {
        Ok((read, [])) => Ok(read),
        _ => Err(StateError::Damaged("its contents are others than its version has")),
    }
}

fn number<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), StateError> {
    bytes
        .split_first_chunk()
        .map(|(number, rest)| (*number, rest))
        .ok_or(StateError::Damaged("it ends too soon"))
}
