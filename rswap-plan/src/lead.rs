//! How long before it is needed a move begins.
//!
//! What a pool can't give any more is needed from the begin of the first window on in which the forecast exceeds it: a window's forecast is
//! the mean over it. A move that this forces is done by then. What such a move takes is what the last ones of its kind between the same two pools
//! took, scaled to what is moved; until enough of them were measured, no less than what is expected, times [`SAFETY`]: expectations
//! are of a quiet machine. Plans are made once in a window, and who acts begins whatever would be late at the next look: a move
//! begins up to a window before its latest start.

use std::collections::VecDeque;

use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Candidate, Decision, MoveKind, Outcome, Planner, flow, memory::Memory, price};

/// What is expected is reckoned with so many times, until enough was measured.
pub(crate) const SAFETY: f64 = 2.0;
/// So many measured moves are enough to do without expectations.
const ENOUGH: usize = 4;
/// Moves that are remembered of each kind between two pools.
const REMEMBERED: usize = 20;
/// Of those, this share was no longer than what is reckoned with.
const SHARE: f64 = 0.9;
/// Pairs of pools that are remembered, the last used ones.
const PAIRS: usize = 256;

/// When a move that the need forces has to begin, and what that rests on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Lead {
    /// Milliseconds until it is needed: the begin of the first window in which the present pool won't be enough.
    pub due_ms: u64,
    /// How long the move is expected to take, in milliseconds.
    pub expected_ms: u64,
    /// How long nine of ten measured moves of its kind between these pools took at most, scaled to what is moved, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_ms: Option<u64>,
    /// How many were measured, of the last ones.
    #[serde(default)]
    pub measured: usize,
    /// What is reckoned with, in milliseconds.
    pub takes_ms: u64,
}

impl Lead {
    /// The latest start, in milliseconds from now.
    pub fn start_ms(&self) -> u64 {
        self.due_ms.saturating_sub(self.takes_ms)
    }

    /// Whether a move that begins now is done too late, by what is reckoned with.
    pub fn is_short(&self) -> bool {
        self.due_ms < self.takes_ms
    }
}

/// A need that will exceed what a pool gives, as one round's forecast has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Crossing {
    /// When, along the line between two horizons, in milliseconds from now.
    pub(crate) at_ms: u64,
    /// Until the last horizon before it, it is not so.
    pub(crate) after_ms: u64,
    /// At this horizon, it is.
    pub(crate) by_ms: u64,
}

impl Crossing {
    /// The earlier one.
    pub(crate) fn first(of: impl IntoIterator<Item = Self>) -> Option<Self> {
        of.into_iter().min_by_key(|crossing| crossing.at_ms)
    }

    /// By when it comes at the latest, where it was seen before to come by `before`. Between two horizons that are far apart, a step
    /// looks equally far away in every round, until it is at the nearer one: what was seen to come by some time is not put off, unless the
    /// forecast has changed, and it isn't there then.
    pub(crate) fn by(&self, now: UnixMillis, before: Option<UnixMillis>) -> UnixMillis {
        let by = UnixMillis(now.0.saturating_add(self.by_ms));
        let holds = |before: &UnixMillis| before.0 > now.0.saturating_add(self.after_ms);
        before.filter(holds).map_or(by, |before| before.min(by))
    }
}

impl Decision {
    /// Takes note of when the need exceeds what the present pool gives; `before` is by when it did so in the round before.
    pub(crate) fn crosses(&mut self, crossing: Option<Crossing>, before: Option<UnixMillis>) {
        self.crossing_by = crossing.map(|crossing| crossing.by(self.at, before));
        let by_ms = self.crossing_by.map(|by| by.since(self.at));
        self.crossing_in_ms =
            crossing.map(|crossing| by_ms.map_or(crossing.at_ms, |by| by.min(crossing.at_ms)));
    }
}

/// What one move took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Took {
    ms: u64,
    /// What was moved, in bytes.
    bytes: u64,
}

/// What the last moves of a kind between two pools took, newest last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Between {
    kind: MoveKind,
    from: String,
    to: String,
    took: VecDeque<Took>,
}

/// What moves took. The pair of pools that was used last is the last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Durations(Vec<Between>);

impl Durations {
    fn add(&mut self, kind: MoveKind, from: &str, to: &str, took: Took) {
        let is_it = |pair: &Between| pair.kind == kind && pair.from == from && pair.to == to;
        let mut pair = match self.0.iter().position(is_it) {
            Some(known) => self.0.remove(known),
            None => Between { kind, from: from.to_owned(), to: to.to_owned(), took: VecDeque::new() },
        };
        if pair.took.len() == REMEMBERED {
            pair.took.pop_front();
        }
        pair.took.push_back(took);
        if self.0.len() == PAIRS {
            self.0.remove(0);
        }
        self.0.push(pair);
    }

    /// What such moves of `bytes` took, in milliseconds, ascending. `expected_s` is what one is expected to take, and `fixed_s` what of that
    /// does not depend on how much is moved.
    fn of(
        &self,
        kind: MoveKind,
        from: &str,
        to: &str,
        bytes: u64,
        (expected_s, fixed_s): (f64, f64),
    ) -> Vec<u64> {
        let is_it = |pair: &&Between| pair.kind == kind && pair.from == from && pair.to == to;
        let scaled = |took: &Took| {
            let like = match bytes {
                0 => expected_s,
                bytes => fixed_s + (expected_s - fixed_s).max(0.0) * took.bytes as f64 / bytes as f64,
            };
            if like > 0.0 { (took.ms as f64 * expected_s / like) as u64 } else { took.ms }
        };
        let found = self.0.iter().find(is_it);
        let mut all: Vec<u64> = found.into_iter().flat_map(|pair| &pair.took).map(scaled).collect();
        all.sort_unstable();
        all
    }
}

impl Planner {
    /// Forecasts are means over windows of `window_ms` milliseconds, and a plan is made in each. Without this, they are taken for those of
    /// moments.
    pub fn with_windows(mut self, window_ms: u64) -> Self {
        self.window_ms = window_ms;
        self
    }

    /// A move that began by [`Planner::part_started`] took `took_ms` milliseconds, and is done: such moves are reckoned with by it. To be said
    /// before [`Planner::part_moved`].
    pub fn lasted(
        &mut self,
        instance: &rswap_types::InstanceName,
        kind: MoveKind,
        volume: Option<&str>,
        to: &str,
        took_ms: u64,
    ) {
        let memory = match flow::is_of_a_part(kind) {
            true => self.parts.get_mut(instance).and_then(|parts| parts.get_mut(&flow::key(kind, volume))),
            false => self.memory.get_mut(instance),
        };
        let Some((from, bytes)) = memory.and_then(|memory| memory.departed.take()) else { return };
        if bytes == 0 && matches!(kind, MoveKind::Storage | MoveKind::Host) {
            // How much that was is not known yet, and what it took can't be scaled.
            return;
        }
        self.durations.add(kind, &from, to, Took { ms: took_ms, bytes });
    }

    /// Where the need forces a move, and it is known when: its latest start. `memory` is of what moves.
    pub(crate) fn set_start(&self, decision: &mut Decision, memory: &Memory) {
        let (Outcome::Move { to, start_by, forced: true }, Some(crossing_ms)) =
            (&mut decision.outcome, decision.crossing_in_ms)
        else {
            return;
        };
        let Some(target) = decision.candidates.iter().find(|candidate| candidate.pool == *to) else { return };
        let from = decision.current.as_ref().map(|current| current.pool.as_str());
        let lead = self.lead(decision.kind, from, target, memory.bytes, crossing_ms);
        *start_by = UnixMillis(decision.at.0.saturating_add(lead.start_ms()));
        decision.lead = Some(lead);
    }

    fn lead(
        &self,
        kind: MoveKind,
        from: Option<&str>,
        target: &Candidate,
        bytes: u64,
        crossing_ms: u64,
    ) -> Lead {
        let expected_s = target.move_price.map_or(0.0, |price| price.seconds);
        let (bytes, fixed_s) = match kind {
            MoveKind::Storage => (bytes, flow::FIXED_S),
            MoveKind::Host => (bytes, price::HOST_FIXED_S),
            // How much that is does not matter.
            MoveKind::Cpu | MoveKind::Link => (0, 0.0),
        };
        let took = from.map(|from| self.durations.of(kind, from, &target.pool, bytes, (expected_s, fixed_s)));
        let took = took.unwrap_or_default();
        let rank = (took.len() as f64 * SHARE).ceil() as usize;
        let took_ms = rank.checked_sub(1).and_then(|rank| took.get(rank)).copied();
        let careful_ms = careful_ms(target);
        Lead {
            due_ms: crossing_ms.saturating_sub(self.window_ms),
            expected_ms: (expected_s * 1e3) as u64,
            took_ms,
            measured: took.len(),
            takes_ms: match took_ms {
                Some(took_ms) if took.len() >= ENOUGH => took_ms,
                Some(took_ms) => took_ms.max(careful_ms),
                None => careful_ms,
            },
        }
    }
}

/// What a move there is expected to take, in milliseconds, times [`SAFETY`].
pub(crate) fn careful_ms(target: &Candidate) -> u64 {
    target.move_price.map_or(0, |price| (price.seconds * 1e3 * SAFETY) as u64)
}
