//! Demand + pools -> [`Plan`]. Pure: no I/O, no clock.
//!
//! Each round, for each instance and pool kind: score the present pool; past the threshold, or when the forecast need
//! exceeds what the present pool can give, compare every pool of the kind. A pool that cannot meet the need is dropped,
//! with the reason. The lowest score wins, with the price of the move counted in. A move that nothing forces must beat
//! the present pool by the hysteresis, waits for the cool-down, and does not lead back to where the instance was a short
//! while ago, on whatever way; a move that the need forces waits for none of them, only for the back-off after a failure.
//! A pool that is being drained, and one that an instance's [`rules`] forbid, force a move as a need does. Who must move and fits
//! nowhere may change places with another one. Migrations begin when little memory is expected to be written, as far as they can wait for that ([`Timing`]).
//! Candidates are kept with their numbers, whatever was decided.

mod compare;
mod config;
pub mod consolidate;
mod exchange;
mod explain;
pub mod flow;
mod lead;
mod ledger;
mod memory;
mod need;
pub mod order;
mod planner;
mod price;
mod rank;
mod reason;
mod remembered;
pub mod rules;
pub mod score;
mod timing;
mod urgency;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use config::PlanConfig;
pub use explain::{explain, in_words};
pub use flow::{FlowNeed, FlowTerms, PortView, VolumeView};
pub use lead::Lead;
pub use order::Step;
pub use planner::Planner;
pub use price::{MovePrice, price_of_move};
pub use reason::{Dropped, StayReason};
pub use remembered::Remembered;
pub use score::{Room, Terms};
pub use timing::{TimedBy, Timing};

use rswap_forecast::{Demand, Quantile, Quantiles};
use rswap_types::{InstanceName, UnixMillis};

/// What to do in this round, and why; every candidate with its numbers is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// When it was made.
    pub at: UnixMillis,
    /// One per instance and pool kind looked at.
    pub decisions: Vec<Decision>,
}

/// Which kind of pool a move changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MoveKind {
    /// Another core set of this host.
    Cpu,
    /// Another host.
    Host,
    /// Another storage pool of this host, for one volume.
    Storage,
    /// Another link of this host.
    Link,
}

/// What the planner needs to know about one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = PlannedInstance)]
pub struct InstanceView {
    /// Which.
    pub instance: InstanceName,
    /// The host pool that it sits on, where a fleet is planned; `None` = on this host.
    #[serde(default)]
    pub host: Option<String>,
    /// The CPU pool that it sits on; `None` while it may use every core.
    pub cpu_pool: Option<String>,
    /// Its forecast, CPU in reference cores (cores x the performance of the pool they were used on).
    pub demand: Demand,
    /// Cores in use now, of the pool it sits on.
    pub cores: f64,
    /// Memory in use now, in bytes.
    pub resident_bytes: u64,
    /// Bytes written per second, where writes are tracked.
    pub dirty_bytes_per_s: Option<f64>,
    /// The kinds of move that it can make at all.
    pub movable: Vec<MoveKind>,
    /// Its labels: some of them are [`rules`].
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its volumes, where plans can move them.
    #[serde(default)]
    pub volumes: Vec<VolumeView>,
    /// Its port, where plans can move it.
    #[serde(default)]
    pub port: Option<PortView>,
}

/// The need that a decision rests on, in reference cores and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NeedUsed {
    /// Mean of the medians over the horizon: what the money is reckoned with.
    pub expected_cores: f64,
    /// Highest value of `quantile` over the horizon: what a pool must be able to give.
    pub limit_cores: f64,
    /// Highest value of each quantile over the horizon, in reference cores: what violations are reckoned with.
    #[serde(default)]
    pub cores: Quantiles,
    /// As `expected_cores`, in bytes.
    pub expected_bytes: u64,
    /// As `limit_cores`, in bytes.
    pub limit_bytes: u64,
    /// Which quantile.
    pub quantile: Quantile,
}

/// One pool, with its numbers for one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Candidate {
    /// Name of the pool.
    pub pool: String,
    /// ROS, in money per hour: lower is better.
    pub score: f64,
    /// What the score is made of.
    pub terms: Terms,
    /// Of storage pools and links, what flows there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow: Option<FlowTerms>,
    /// What it costs to get there; `None` for the pool that it sits on.
    pub move_price: Option<MovePrice>,
    /// Score + the price of the move spread over the planning horizon, in money per hour: candidates are ranked by it.
    pub total: f64,
    /// Why it is out of the question, if it is.
    pub dropped: Option<Dropped>,
}

/// What was decided for one instance and one pool kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    /// For whom.
    pub instance: InstanceName,
    /// About which kind of pool.
    pub kind: MoveKind,
    /// Which volume; `None` unless it is about storage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// When.
    pub at: UnixMillis,
    /// The need that it rests on; `None` if the forecast has seen too little, and for volumes and ports.
    pub need: Option<NeedUsed>,
    /// The same of a volume or a port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow: Option<FlowNeed>,
    /// Milliseconds until the need exceeds what the present pool can give; `None` if it doesn't within the horizon.
    pub crossing_in_ms: Option<u64>,
    /// By when it does at the latest, by this round's forecast and those before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crossing_by: Option<UnixMillis>,
    /// The present pool.
    pub current: Option<Candidate>,
    /// The other pools of the kind, best first: all of them, or the best ones; in the plan of a fleet, the best one alone where it stays.
    pub candidates: Vec<Candidate>,
    /// How many others were compared.
    #[serde(default)]
    pub left_out: usize,
    /// The score above which alternatives are looked for, in money per hour.
    pub threshold: f64,
    /// The gain that an unforced move must exceed, in money per hour.
    pub hysteresis: f64,
    /// Whom it changes places with, where neither fits next to the other.
    #[serde(default)]
    pub exchange: Option<InstanceName>,
    /// All moves that this round decided for the instance, in their order, where there are several: the first begins, and the others
    /// are decided anew when it has ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// When a move that the need forces has to begin, where it is known when the need is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead: Option<Lead>,
    /// How much memory it writes, and how little that is at times, where a migration has been decided and this is known.
    #[serde(default)]
    pub writing: Option<Writing>,
    /// When a migration could begin, and what is expected then, where one has been decided and this is known.
    #[serde(default)]
    pub timing: Option<Timing>,
    /// The result.
    pub outcome: Outcome,
}

impl Decision {
    fn undecided(view: &InstanceView, kind: MoveKind, at: UnixMillis, config: &PlanConfig) -> Self {
        Self {
            instance: view.instance.clone(),
            kind,
            volume: None,
            at,
            need: None,
            flow: None,
            crossing_in_ms: None,
            crossing_by: None,
            current: None,
            candidates: Vec::new(),
            left_out: 0,
            threshold: config.threshold,
            hysteresis: config.hysteresis,
            exchange: None,
            steps: Vec::new(),
            lead: None,
            writing: None,
            timing: None,
            outcome: Outcome::Stay { reason: StayReason::NoPoolFits },
        }
    }

    /// Unless it moves, keeps no other pool than the best.
    pub(crate) fn abridge(&mut self) {
        if self.moves() || self.candidates.len() < 2 {
            return;
        }
        self.left_out += self.candidates.len() - 1;
        self.candidates.truncate(1);
        self.candidates.shrink_to_fit();
    }

    /// Whether it moves.
    pub fn moves(&self) -> bool {
        matches!(self.outcome, Outcome::Move { .. })
    }

    /// What a move is expected to save, in money per hour, its price counted in; less than nothing where the need forces it.
    /// `None` if it stays, or the present pool has no score.
    pub fn gain_per_hour(&self) -> Option<f64> {
        let Outcome::Move { to, .. } = &self.outcome else { return None };
        let there = self.candidates.iter().find(|candidate| candidate.pool == *to)?;
        Some(self.current.as_ref()?.score - there.total)
    }
}

/// How much memory is written now and in quiet times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Writing {
    /// Bytes per second now.
    pub bytes_per_s: f64,
    /// Bytes per second that it didn't exceed in a quarter of the last windows.
    pub quiet_bytes_per_s: f64,
}

impl Writing {
    /// Whether now is a good time to migrate.
    pub fn is_quiet(&self) -> bool {
        self.bytes_per_s <= self.quiet_bytes_per_s
    }
}

/// The result of a decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// It stays where it is.
    Stay {
        /// Why.
        reason: StayReason,
    },
    /// It moves.
    Move {
        /// To which pool.
        to: String,
        /// When to start, so that the move is done before the need is there.
        start_by: UnixMillis,
        /// Whether the need forces it, or only the score is better.
        forced: bool,
    },
}

#[cfg(test)]
mod core_tests;
#[cfg(test)]
mod fleet_tests;
#[cfg(test)]
mod rank_tests;
#[cfg(test)]
mod tests;

/// The worked examples of `docs/score.md` are tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/score.md")]
mod score_examples {}
