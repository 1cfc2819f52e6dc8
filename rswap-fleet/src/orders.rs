//! What a controller wants of an agent, and when the agent does it.
//!
//! Orders are sent until their outcome is known, so they come twice, late, and after newer ones; a controller that was replaced may
//! still speak. The rule is the agent's alone: an order is carried out once, before its deadline, and never after a newer one about the
//! same thing.

use std::collections::BTreeMap;

use rswap_types::{InstanceName, UnixMillis};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::HostName;

/// Longest time from an order's making to its deadline, in milliseconds. What was decided longer ago rests on what nobody knows any more.
pub const LONGEST_MS: u64 = 10 * 60_000;
/// How far clocks of a fleet may be apart, in milliseconds.
pub const SKEW_MS: u64 = 60_000;
/// Subjects that an agent remembers at most; past that, new ones are refused until old ones are forgotten.
pub const MOST_SUBJECTS: usize = 20_000;

/// Which order: later ones are greater, also those of a later life of the controller.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
pub struct Token {
    /// Life of the controller: counts up at each of its starts, and is stored before the first order.
    pub life: u64,
    /// Counts up within that life.
    pub number: u64,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "action")]
pub enum Action {
    /// Empty a pool of the host (`this-host`: the host), or let it be used again.
    Drain {
        /// Which.
        pool: String,
        /// Let it be used again.
        undo: bool,
    },
    /// Migrate an instance.
    Migrate {
        /// Which, by its name on the host.
        instance: InstanceName,
        /// To which host.
        to: HostName,
        /// Where that takes migrations.
        #[schema(value_type = String)]
        address: std::net::SocketAddr,
    },
}

/// What an action is about: of two orders about one thing, the later one counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// A pool.
    Pool(String),
    /// An instance.
    Instance(InstanceName),
}

impl Action {
    /// What it is about.
    pub fn subject(&self) -> Subject {
        match self {
            Self::Drain { pool, .. } => Subject::Pool(pool.clone()),
            Self::Migrate { instance, .. } => Subject::Instance(instance.clone()),
        }
    }
}

/// An order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Order {
    /// Which.
    pub token: Token,
    /// For whom.
    pub host: HostName,
    /// After this, it is not begun any more.
    pub deadline: UnixMillis,
    /// What.
    pub action: Action,
}

/// What became of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OrderOutcome {
    /// Of which.
    pub token: Token,
    /// What.
    #[serde(flatten)]
    pub result: OrderResult,
}

/// What an order came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum OrderResult {
    /// It has been carried out.
    Done,
    /// It was begun, and failed: everything is as before.
    Failed {
        /// Why.
        error: String,
    },
    /// It was not begun.
    Refused {
        /// Why.
        error: String,
    },
}

/// Why an order is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// For another host.
    #[error("it is for host {0}")]
    OtherHost(HostName),
    /// Too late.
    #[error("its deadline was {late_ms} ms ago")]
    Late {
        /// How late.
        late_ms: u64,
    },
    /// Its deadline is so far off that it could come again when it has been forgotten.
    #[error("its deadline is {ahead_ms} ms ahead: the clocks differ, or it is none of a controller")]
    Ahead {
        /// How far.
        ahead_ms: u64,
    },
    /// It was carried out before.
    #[error("it was taken before")]
    Repeated,
    /// A newer one about the same thing was taken before.
    #[error("a newer one about the same was taken before")]
    Outdated,
    /// A later life of the controller has spoken.
    #[error("it is of an earlier life of the controller")]
    EarlierLife,
    /// Too many are remembered.
    #[error("{MOST_SUBJECTS} things that orders were about are remembered already")]
    Full,
}

/// What an agent remembers of orders. To be kept before an order is begun.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The latest life of the controller that was heard of.
    life: u64,
    /// Of each subject, the newest order that was taken, and when it may be forgotten.
    taken: Vec<(Subject, Token, UnixMillis)>,
    /// The latest moment that was seen: a clock that is set back opens no deadline again.
    seen: UnixMillis,
}

impl Ledger {
    /// Whether the order is to be carried out now. If so, it counts as taken.
    ///
    /// # Errors
    ///
    /// The reason why it is not; then nothing changes but what is known of the controller's life and of the time.
    pub fn take(&mut self, order: &Order, host: &HostName, now: UnixMillis) -> Result<(), Refusal> {
        self.seen = self.seen.max(now);
        let now = self.seen;
        if order.host != *host {
            return Err(Refusal::OtherHost(order.host.clone()));
        }
        if order.token.life < self.life {
            return Err(Refusal::EarlierLife);
        }
        self.life = order.token.life;
        self.taken.retain(|(_, _, until)| *until >= now);
        if order.deadline < now {
            return Err(Refusal::Late { late_ms: now.since(order.deadline) });
        }
        let ahead_ms = order.deadline.since(now);
        if ahead_ms > LONGEST_MS + SKEW_MS {
            return Err(Refusal::Ahead { ahead_ms });
        }
        let subject = order.action.subject();
        // Whatever came before this one has a deadline that is over by then.
        let until = UnixMillis(now.0.saturating_add(LONGEST_MS + 2 * SKEW_MS).max(order.deadline.0));
        let full = self.taken.len() >= MOST_SUBJECTS;
        match self.taken.iter_mut().find(|(known, _, _)| *known == subject) {
            Some((_, token, _)) if order.token == *token => Err(Refusal::Repeated),
            Some((_, token, _)) if order.token < *token => Err(Refusal::Outdated),
            Some((_, token, kept)) => {
                (*token, *kept) = (order.token, until);
                Ok(())
            }
            None if full => Err(Refusal::Full),
            None => {
                self.taken.push((subject, order.token, until));
                Ok(())
            }
        }
    }
}

/// The controller's side: orders that wait for an outcome, one per host and subject.
#[derive(Clone, Debug, Default)]
pub struct Book {
    life: u64,
    number: u64,
    waiting: BTreeMap<(HostName, Subject), Order>,
}

impl Book {
    /// No orders yet, in this life of the controller.
    pub fn new(life: u64) -> Self {
        Self { life, ..Self::default() }
    }

    /// Gives an order, in place of one about the same. The same action again, while it waits, is the same order.
    pub fn give(&mut self, host: &HostName, action: Action, within_ms: u64, now: UnixMillis) -> Token {
        let key = (host.clone(), action.subject());
        if let Some(order) = self.waiting.get(&key).filter(|order| order.action == action) {
            return order.token;
        }
        self.number += 1;
        let token = Token { life: self.life, number: self.number };
        let deadline = UnixMillis(now.0.saturating_add(within_ms.min(LONGEST_MS)));
        self.waiting.insert(key, Order { token, host: host.clone(), deadline, action });
        token
    }

    /// The order about this that waits.
    pub fn about(&self, host: &HostName, subject: Subject) -> Option<&Order> {
        self.waiting.get(&(host.clone(), subject))
    }

    /// What a host is to be told.
    pub fn of(&self, host: &HostName) -> Vec<Order> {
        self.waiting.values().filter(|order| order.host == *host).cloned().collect()
    }

    /// Takes in an outcome; the order that it is of, if that waited.
    pub fn ended(&mut self, host: &HostName, outcome: &OrderOutcome) -> Option<Order> {
        let waits = |order: &&Order| order.host == *host && order.token == outcome.token;
        let key = self.waiting.values().find(waits).map(|order| (host.clone(), order.action.subject()))?;
        self.waiting.remove(&key)
    }

    /// Takes out what can't be begun any more: by anybody's clock.
    pub fn expired(&mut self, now: UnixMillis) -> Vec<Order> {
        let over = |order: &Order| order.deadline.0.saturating_add(SKEW_MS) < now.0;
        let keys: Vec<_> =
            self.waiting.iter().filter(|(_, order)| over(order)).map(|(key, _)| key.clone()).collect();
        keys.iter().filter_map(|key| self.waiting.remove(key)).collect()
    }

    /// All that wait.
    pub fn waiting(&self) -> impl Iterator<Item = &Order> {
        self.waiting.values()
    }
}

#[cfg(test)]
mod tests;
