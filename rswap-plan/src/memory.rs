//! What is remembered of an instance between rounds.

use rswap_types::UnixMillis;

use crate::MoveKind;

/// Places remembered: a circle of more pools than this is not seen as one.
const REMEMBERED: usize = 16;

/// Moves, failures, and where the instance has been.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    pub(super) last_move: Option<UnixMillis>,
    pub(super) last_failure: Option<UnixMillis>,
    pub(super) failures: u32,
    pub(super) in_flight: Option<String>,
    /// Where it was in the last round, per kind.
    on: Vec<(MoveKind, String)>,
    /// What it left, and when; newest last.
    left: Vec<(MoveKind, String, UnixMillis)>,
}

impl Memory {
    /// A move has begun.
    pub(super) fn started(&mut self, to: &str) {
        self.in_flight = Some(to.to_owned());
    }

    /// It is done: what was remembered of failures is over.
    pub(super) fn moved(&mut self, now: UnixMillis) {
        self.last_move = Some(now);
        (self.in_flight, self.last_failure, self.failures) = (None, None, 0);
    }

    /// It has failed.
    pub(super) fn failed(&mut self, now: UnixMillis) {
        self.in_flight = None;
        self.failures = self.failures.saturating_add(1);
        self.last_failure = Some(now);
    }

    /// The instance is seen on `pool`.
    pub(super) fn sits(&mut self, kind: MoveKind, pool: &str, now: UnixMillis) {
        match self.on.iter_mut().find(|(of, _)| *of == kind) {
            None => self.on.push((kind, pool.to_owned())),
            Some((_, on)) if on == pool => {}
            Some((_, on)) => {
                let left = std::mem::replace(on, pool.to_owned());
                if self.left.len() == REMEMBERED {
                    self.left.remove(0);
                }
                self.left.push((kind, left, now));
            }
        }
    }

    /// When it last left `pool`.
    pub(super) fn left(&self, kind: MoveKind, pool: &str) -> Option<UnixMillis> {
        self.left.iter().rev().find(|(of, left, _)| *of == kind && left == pool).map(|(_, _, at)| *at)
    }
}
