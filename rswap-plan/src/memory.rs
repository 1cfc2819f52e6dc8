//! What is remembered of an instance between rounds.

use std::collections::VecDeque;

use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};

use crate::{MoveKind, Writing};

/// Places remembered: a circle of more pools than this is not seen as one.
const REMEMBERED: usize = 16;
/// Windows over which what it writes is remembered.
const WRITTEN_WINDOWS: usize = 60;

/// Moves, failures, and where the instance has been.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) last_move: Option<UnixMillis>,
    pub(super) last_failure: Option<UnixMillis>,
    pub(super) failures: u32,
    /// Why the last one failed.
    #[serde(default)]
    pub(super) last_error: Option<String>,
    #[serde(skip)]
    pub(super) in_flight: Option<String>,
    /// Which part of it is on its way by itself, and to which pool.
    #[serde(skip)]
    pub(super) part_in_flight: Option<(String, String)>,
    /// How much it is, in bytes, in the last round: the files of a volume; memory and files of an instance.
    #[serde(skip)]
    pub(super) bytes: u64,
    /// Of the move that is under way: from where, and how many bytes.
    #[serde(skip)]
    pub(super) departed: Option<(String, u64)>,
    /// By when its need exceeds what the present pool gives, as of the last round, per kind.
    #[serde(skip)]
    coming: Vec<(MoveKind, UnixMillis)>,
    /// Where it was in the last round, per kind.
    on: Vec<(MoveKind, String)>,
    /// What it left, and when; newest last.
    left: Vec<(MoveKind, String, UnixMillis)>,
    /// Bytes written per second in the last windows; newest last.
    #[serde(skip)]
    written: VecDeque<f64>,
    /// Since when a migration has been decided in every round.
    #[serde(skip)]
    pub(super) wanted: Option<UnixMillis>,
}

impl Memory {
    /// A move has begun.
    pub(super) fn started(&mut self, to: &str) {
        self.in_flight = Some(to.to_owned());
    }

    /// Where a move of this kind has begun is remembered until it has ended.
    pub(super) fn departs(&mut self, kind: MoveKind) {
        self.departed = self.sits_on(kind).map(|from| (from.to_owned(), self.bytes));
    }

    /// By when its need exceeds what the present pool of this kind gives.
    pub(super) fn coming(&self, kind: MoveKind) -> Option<UnixMillis> {
        self.coming.iter().find(|(of, _)| *of == kind).map(|(_, by)| *by)
    }

    /// The same, as a round has found it.
    pub(super) fn comes(&mut self, kind: MoveKind, by: Option<UnixMillis>) {
        self.coming.retain(|(of, _)| *of != kind);
        self.coming.extend(by.map(|by| (kind, by)));
    }

    /// Whether it, or a part of it, is on its way: one move of an instance at a time.
    pub(super) fn is_in_flight(&self) -> bool {
        self.in_flight.is_some() || self.part_in_flight.is_some()
    }

    /// It is done: what was remembered of failures is over.
    pub(super) fn moved(&mut self, now: UnixMillis) {
        self.last_move = Some(now);
        (self.in_flight, self.last_failure, self.failures, self.wanted) = (None, None, 0, None);
        (self.last_error, self.departed) = (None, None);
        // Elsewhere, another need is too much.
        self.coming.clear();
    }

    /// It has failed.
    pub(super) fn failed(&mut self, now: UnixMillis) {
        (self.in_flight, self.last_error, self.departed) = (None, None, None);
        self.failures = self.failures.saturating_add(1);
        self.last_failure = Some(now);
    }

    /// It writes so many bytes per second.
    pub(super) fn writes(&mut self, bytes_per_s: Option<f64>) {
        match bytes_per_s.filter(|rate| rate.is_finite() && *rate >= 0.0) {
            None => self.written.clear(),
            Some(rate) => {
                if self.written.len() == WRITTEN_WINDOWS {
                    self.written.pop_front();
                }
                self.written.push_back(rate);
            }
        }
    }

    /// What it writes now and in quiet times; `None` until enough was seen.
    pub(super) fn writing(&self) -> Option<Writing> {
        let now = *self.written.back().filter(|_| self.written.len() >= WRITTEN_WINDOWS / 4)?;
        let mut sorted: Vec<f64> = self.written.iter().copied().collect();
        sorted.sort_unstable_by(f64::total_cmp);
        Some(Writing { bytes_per_s: now, quiet_bytes_per_s: sorted[sorted.len() / 4] })
    }

    /// The pool of this kind that it was last seen on.
    pub(super) fn sits_on(&self, kind: MoveKind) -> Option<&str> {
        self.on.iter().find(|(of, _)| *of == kind).map(|(_, pool)| pool.as_str())
    }

    /// The instance is seen on `pool`.
    pub(super) fn sits(&mut self, kind: MoveKind, pool: &str, now: UnixMillis) {
        match self.on.iter_mut().find(|(of, _)| *of == kind) {
            None => {
                // Most are of one kind, and a vector that grows makes room for four.
                self.on.reserve_exact(1);
                self.on.push((kind, pool.to_owned()));
            }
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

    /// What it left, and when; the latest first.
    pub(super) fn all_left(&self, kind: MoveKind) -> impl Iterator<Item = (&str, UnixMillis)> {
        let of_kind = self.left.iter().rev().filter(move |(of, _, _)| *of == kind);
        of_kind.map(|(_, pool, at)| (pool.as_str(), *at))
    }

    /// When it last left `pool`.
    pub(super) fn left(&self, kind: MoveKind, pool: &str) -> Option<UnixMillis> {
        self.left.iter().rev().find(|(of, left, _)| *of == kind && left == pool).map(|(_, _, at)| *at)
    }
}
