//! Moves of every kind, as they are shown: who was moved where, why, and what it took. Bounded.

use std::collections::VecDeque;

use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    instance::InstanceName,
    plan::{Decision, MoveKind, Outcome, in_words},
    units::UnixMillis,
};

/// Ended moves kept; the oldest go first. Those under way are always kept.
pub const MOVES_KEPT: usize = 200;

/// What a move changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MovedKind {
    /// Its cores.
    Cpu,
    /// Its host.
    Host,
    /// The directory of one of its volumes.
    Storage,
    /// Its uplink.
    Link,
    /// Where its cold pages are.
    Memory,
}

impl From<MoveKind> for MovedKind {
    fn from(kind: MoveKind) -> Self {
        match kind {
            MoveKind::Cpu => Self::Cpu,
            MoveKind::Host => Self::Host,
            MoveKind::Storage => Self::Storage,
            MoveKind::Link => Self::Link,
        }
    }
}

/// Who wanted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AskedBy {
    /// This agent's plan.
    Plan,
    /// Somebody who called the agent.
    Request,
    /// The fleet's controller.
    Controller,
}

/// What is known of a move when it begins.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct NewMove {
    /// Of which instance.
    pub instance: InstanceName,
    /// What it changes.
    pub kind: MovedKind,
    /// Which volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<InstanceName>,
    /// The pool that it was on, if it was on one.
    pub from: Option<String>,
    /// The pool, or the address, that it moves to.
    pub to: String,
    /// Who wanted it.
    pub asked_by: AskedBy,
    /// When it began.
    pub started: UnixMillis,
    /// Of a migration, its number among them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<u64>,
}

/// How a move stands.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum MoveState {
    /// On its way.
    Running,
    /// It is there.
    Done {
        /// When it ended.
        ended: UnixMillis,
        /// How long the instance, or its traffic, stood still, in milliseconds; `None` where nothing of it had to.
        pause_ms: Option<f64>,
    },
    /// It is where it was.
    Failed {
        /// When it ended.
        ended: UnixMillis,
        /// What went wrong, and what to do.
        error: String,
    },
    /// It is frozen here, and may run there.
    InDoubt {
        /// When it ended.
        ended: UnixMillis,
        /// What went wrong, and what to do.
        error: String,
    },
}

/// One move.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MoveView {
    /// Unique since the agent's start; they count up.
    pub id: u64,
    /// What it is.
    #[serde(flatten)]
    pub what: NewMove,
    /// How it stands.
    #[serde(flatten)]
    pub state: MoveState,
    /// Whether the need forced it; `None` if no plan of this agent decided it.
    pub forced: Option<bool>,
    /// What the plan expected it to save, in money per hour, its price counted in.
    pub gain_per_hour: Option<f64>,
    /// The decision in words.
    pub why: Vec<String>,
    /// The decision that it came from.
    #[serde(skip)]
    pub decision: Option<Decision>,
}

/// The last moves, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Moves {
    kept: VecDeque<MoveView>,
    last_id: u64,
}

impl Moves {
    /// A move begins, because of `decision` if a plan decided it.
    pub fn begin(&mut self, what: NewMove, decision: Option<Decision>) {
        self.last_id += 1;
        let forced = decision.as_ref().and_then(|decision| match decision.outcome {
            Outcome::Move { forced, .. } => Some(forced),
            Outcome::Stay { .. } => None,
        });
        self.kept.push_back(MoveView {
            id: self.last_id,
            what,
            state: MoveState::Running,
            forced,
            gain_per_hour: decision.as_ref().and_then(Decision::gain_per_hour),
            why: decision.as_ref().map(in_words).unwrap_or_default(),
            decision,
        });
        let ended = |kept: &MoveView| kept.state != MoveState::Running;
        while self.kept.iter().filter(|kept| ended(kept)).count() > MOVES_KEPT {
            match self.kept.iter().position(ended) {
                Some(oldest) => self.kept.remove(oldest),
                None => break,
            };
        }
    }

    /// The move of `instance` that is under way ends; an instance has one at a time.
    pub fn end(&mut self, instance: &InstanceName, state: MoveState) {
        let under_way =
            |kept: &&mut MoveView| kept.what.instance == *instance && kept.state == MoveState::Running;
        if let Some(ended) = self.kept.iter_mut().rev().find(under_way) {
            ended.state = state;
        }
    }

    /// How many have begun since the agent's start.
    pub fn started(&self) -> u64 {
        self.last_id
    }

    /// How many are under way.
    pub fn running(&self) -> usize {
        self.kept.iter().filter(|kept| kept.state == MoveState::Running).count()
    }

    /// All that are kept, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &MoveView> {
        self.kept.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(instance: &str) -> NewMove {
        NewMove {
            instance: instance.parse().unwrap(),
            kind: MovedKind::Cpu,
            volume: None,
            from: None,
            to: "fast".into(),
            asked_by: AskedBy::Request,
            started: UnixMillis(1),
            migration: None,
        }
    }

    #[test]
    fn the_one_under_way_ends_and_the_oldest_ended_go() {
        let mut moves = Moves::default();
        moves.begin(new("stays"), None);
        for n in 0..(MOVES_KEPT as u64 + 20) {
            moves.begin(new("goes"), None);
            moves.end(&"goes".parse().unwrap(), MoveState::Done { ended: UnixMillis(n), pause_ms: None });
        }
        moves.begin(new("goes"), None);
        let shown: Vec<_> = moves.iter().collect();
        assert_eq!(shown.len(), MOVES_KEPT + 2);
        assert_eq!((shown[0].id, &shown[0].state), (1, &MoveState::Running));
        let last_two: Vec<_> = shown.iter().rev().take(2).map(|shown| &shown.state).collect();
        let ended = MoveState::Done { ended: UnixMillis(MOVES_KEPT as u64 + 19), pause_ms: None };
        assert_eq!(last_two, [&MoveState::Running, &ended]);
    }
}
