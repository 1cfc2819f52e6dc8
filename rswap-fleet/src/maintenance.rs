//! Rolling maintenance: host after host is emptied, worked on, and used again.
//!
//! ```text
//! Waiting -> Draining -> Empty -> (somebody works on it, and says so) ---------> Back -> Done
//!               |          |                                                      |
//!               |          +----> (another version of the agent, or run of the    |
//!               |                  kernel, reports from there) -------------------+
//!               +--- too long, or the host is away --> Stuck <--------------------+ it is not back, ready to be used, in time
//! ```
//!
//! Nothing that a host said before its turn makes it Empty: it has to have said since then that it is being emptied and that nothing runs
//! there, and nothing may be on its way to it.
//!
//! At most `at_once` hosts are between Waiting and Done. One that is stuck stays drained and stops the roll: no further host is begun
//! until somebody has decided ([`Roll::retry`], [`Roll::skip`]). It is a pure function of what is seen: after a new start of the controller
//! it goes on from what was kept.

use std::collections::{BTreeMap, BTreeSet};

use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{HostName, Running};

/// Where a host is in a roll.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "stage")]
pub enum Stage {
    /// Its turn has not come.
    Waiting,
    /// It is being emptied.
    Draining {
        /// Since when.
        since: UnixMillis,
    },
    /// Nothing runs there: it can be worked on.
    Empty {
        /// Since when.
        since: UnixMillis,
        /// Which agent it was then, in which run of the kernel.
        was: Option<Running>,
    },
    /// It has been worked on, and is to report and be used again.
    Back {
        /// Since when.
        since: UnixMillis,
    },
    /// It has not got on in time: somebody has to look.
    Stuck {
        /// Since when.
        since: UnixMillis,
        /// Why.
        reason: String,
    },
    /// It is used again.
    Done,
    /// Left out by decision.
    Skipped,
}

/// What is seen of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// It reports.
    pub present: bool,
    /// Instances that are there, on their way away included.
    pub instances: usize,
    /// It made its last report so long ago, in terms of the controller's clock.
    pub heard: UnixMillis,
    /// It says that it may be used: its own pool is neither drained nor unavailable, and its agent acts.
    pub ready: bool,
    /// It says that it is being emptied: it takes nobody in by itself.
    pub draining: bool,
    /// Migrations to it that were ordered, and of which its last report may not say yet what became of them.
    pub coming: usize,
    /// Which agent it is, in which run of the kernel.
    pub running: Option<Running>,
}

impl Seen {
    /// Whether nothing runs there, and nothing will, by what it has said since its turn began.
    fn is_empty(&self, since: UnixMillis) -> bool {
        self.present && self.heard > since && self.draining && self.instances == 0 && self.coming == 0
    }
}

/// A roll over some hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roll {
    /// Hosts that are emptied or worked on at once.
    at_once: usize,
    /// How long a host may take to be emptied, and to come back, in milliseconds.
    limit_ms: u64,
    order: Vec<HostName>,
    stages: BTreeMap<HostName, Stage>,
}

/// Why a roll can't do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RollError {
    /// It is not in it.
    #[error("host {0} is not in this roll")]
    Unknown(HostName),
    /// It is somewhere else.
    #[error("host {host} is {stage}")]
    Stage {
        /// Which.
        host: HostName,
        /// Where it is.
        stage: &'static str,
    },
}

impl Roll {
    /// A roll over these hosts, in this order; each once.
    pub fn new(hosts: impl IntoIterator<Item = HostName>, at_once: usize, limit_ms: u64) -> Self {
        let mut stages = BTreeMap::new();
        let mut order = Vec::new();
        for host in hosts {
            if stages.insert(host.clone(), Stage::Waiting).is_none() {
                order.push(host);
            }
        }
        Self { at_once: at_once.max(1), limit_ms, order, stages }
    }

    /// One round: what is seen moves hosts on, and the next ones begin where there is room. Nobody has listened before `from`: no host is
    /// late by what it may have said until then.
    pub fn round(&mut self, seen: &BTreeMap<HostName, Seen>, from: UnixMillis, now: UnixMillis) {
        for (host, stage) in &mut self.stages {
            let seen = seen.get(host).cloned().unwrap_or_default();
            let limit_ms = self.limit_ms;
            let late = |since: UnixMillis| now.since(since.max(from)) >= limit_ms;
            let stuck = |reason: String| Stage::Stuck { since: now, reason };
            let next = match &*stage {
                Stage::Draining { since } if seen.is_empty(*since) => {
                    Some(Stage::Empty { since: now, was: seen.running })
                }
                Stage::Draining { since } if late(*since) => Some(stuck(match &seen {
                    Seen { present: false, .. } => "it does not report while it is emptied".to_owned(),
                    Seen { instances: 1.., .. } => format!("{} instances have not left it", seen.instances),
                    Seen { coming: 1.., .. } => {
                        format!("{} instances are still on their way to it", seen.coming)
                    }
                    _ => "its agent does not say that it is being emptied".to_owned(),
                })),
                // Somebody has started something there.
                Stage::Empty { .. } if seen.present && seen.instances > 0 => {
                    Some(Stage::Draining { since: now })
                }
                Stage::Empty { was: Some(was), .. }
                    if seen.present && seen.running.as_ref().is_some_and(|is| is != was) =>
                {
                    Some(Stage::Back { since: now })
                }
                Stage::Back { since } if seen.present && seen.ready && seen.heard > *since => {
                    Some(Stage::Done)
                }
                Stage::Back { since } if late(*since) => Some(stuck(match seen.present {
                    true => "it is back, and does not say that it may be used".to_owned(),
                    false => "it has not come back".to_owned(),
                })),
                _ => None,
            };
            if let Some(next) = next {
                *stage = next;
            }
        }
        if self.stages.values().any(|stage| matches!(stage, Stage::Stuck { .. })) {
            return;
        }
        let mut busy = self.stages.values().filter(|stage| is_busy(stage)).count();
        for host in &self.order {
            if busy >= self.at_once {
                break;
            }
            if let Some(stage @ Stage::Waiting) = self.stages.get_mut(host) {
                *stage = Stage::Draining { since: now };
                busy += 1;
            }
        }
    }

    /// Hosts that are to be left by all, and entered by nobody.
    pub fn drained(&self) -> BTreeSet<HostName> {
        let drained = |stage: &Stage| {
            matches!(stage, Stage::Draining { .. } | Stage::Empty { .. } | Stage::Stuck { .. })
        };
        self.stages.iter().filter(|(_, stage)| drained(stage)).map(|(host, _)| host.clone()).collect()
    }

    /// An empty host has been worked on.
    ///
    /// # Errors
    ///
    /// If it is not empty.
    pub fn worked_on(&mut self, host: &HostName, now: UnixMillis) -> Result<(), RollError> {
        self.step(host, |stage| matches!(stage, Stage::Empty { .. }), Stage::Back { since: now })
    }

    /// A stuck host is tried again.
    ///
    /// # Errors
    ///
    /// If it is not stuck.
    pub fn retry(&mut self, host: &HostName, now: UnixMillis) -> Result<(), RollError> {
        self.step(host, |stage| matches!(stage, Stage::Stuck { .. }), Stage::Draining { since: now })
    }

    /// A host is left out: one that waits or is stuck.
    ///
    /// # Errors
    ///
    /// If it is being emptied or worked on, or done.
    pub fn skip(&mut self, host: &HostName) -> Result<(), RollError> {
        self.step(host, |stage| matches!(stage, Stage::Waiting | Stage::Stuck { .. }), Stage::Skipped)
    }

    fn step(&mut self, host: &HostName, from: impl Fn(&Stage) -> bool, to: Stage) -> Result<(), RollError> {
        match self.stages.get_mut(host) {
            None => Err(RollError::Unknown(host.clone())),
            Some(stage) if from(stage) => {
                *stage = to;
                Ok(())
            }
            Some(stage) => Err(RollError::Stage { host: host.clone(), stage: stage.name() }),
        }
    }

    /// Where each host is, in the order of the roll.
    pub fn stages(&self) -> impl Iterator<Item = (&HostName, &Stage)> {
        self.order.iter().filter_map(|host| Some((host, self.stages.get(host)?)))
    }

    /// Hosts that may be used again, and have not said yet that they are.
    pub fn coming_back(&self) -> impl Iterator<Item = &HostName> {
        self.stages.iter().filter(|(_, stage)| matches!(stage, Stage::Back { .. })).map(|(host, _)| host)
    }

    /// Where a host is that the roll is not done with: what is wanted of it until then is the roll's to say.
    pub fn holds(&self, host: &HostName) -> Option<&Stage> {
        self.stages.get(host).filter(|stage| is_busy(stage) || **stage == Stage::Waiting)
    }

    /// Hosts that are emptied or worked on at once, and how long a host may take for each, in milliseconds.
    pub fn limits(&self) -> (usize, u64) {
        (self.at_once, self.limit_ms)
    }

    /// Whether nothing is left to be done.
    pub fn is_over(&self) -> bool {
        self.stages.values().all(|stage| matches!(stage, Stage::Done | Stage::Skipped))
    }
}

fn is_busy(stage: &Stage) -> bool {
    matches!(stage, Stage::Draining { .. } | Stage::Empty { .. } | Stage::Back { .. } | Stage::Stuck { .. })
}

impl Stage {
    /// For people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Draining { .. } => "being emptied",
            Self::Empty { .. } => "empty",
            Self::Back { .. } => "to come back",
            Self::Stuck { .. } => "stuck",
            Self::Done => "done",
            Self::Skipped => "left out",
        }
    }
}

#[cfg(test)]
mod tests;
