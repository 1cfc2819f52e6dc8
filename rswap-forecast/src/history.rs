//! The newest positions of a series, and the season in them.

use serde::{Deserialize, Serialize};

use super::{numeric::Position, season};

/// Between searches for the period at least so many windows go by.
const SEARCH_EVERY: u64 = 4;
/// And at most so many.
pub(super) const SEARCH_AT_LEAST_EVERY: u64 = 128;

/// No count of windows of a series comes near it.
pub(super) const MOST: u64 = 1 << 48;

/// Positions, oldest first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct History {
    positions: Vec<Position>,
    start: usize,
    since_search: u64,
    period: Option<usize>,
}

impl History {
    /// Windows kept: the longest period that can be found is half of it.
    pub(super) const KEPT: usize = 512;

    pub(super) fn new() -> Self {
        Self { positions: Vec::with_capacity(Self::KEPT), start: 0, since_search: 0, period: None }
    }

    /// Whether its places and its period are possible.
    pub(super) fn is_sound(&self) -> bool {
        let len = self.positions.len();
        let start = if len == Self::KEPT { Self::KEPT } else { 1 };
        len <= Self::KEPT
            && self.start < start
            && self.since_search < MOST
            && self.period.is_none_or(|period| (1..=Self::KEPT).contains(&period))
    }

    /// Whether the period has changed.
    pub(super) fn learn(&mut self, position: f32) -> bool {
        self.keep(position);
        self.since_search += 1;
        let pause = (self.positions.len() as u64 / 4).clamp(SEARCH_EVERY, SEARCH_AT_LEAST_EVERY);
        if self.since_search < pause {
            return false;
        }
        self.since_search = 0;
        let found = season::period(&self.ordered());
        let changed = found != self.period;
        self.period = found;
        changed
    }

    /// A window went by unseen: the season's guess is the better one, a repeated last value would become a part of it.
    pub(super) fn guess(&mut self, last: f32) {
        let guess = self.repeat(1).unwrap_or(last);
        self.keep(guess);
    }

    /// The position `steps` ahead, if the season is repeated.
    pub(super) fn repeat(&self, steps: usize) -> Option<f32> {
        let period = self.period?;
        let newest = self.positions.len().checked_sub(1)?;
        let back = steps.div_ceil(period) * period;
        let (mut sum, mut count) = (0.0, 0u32);
        for cycle in 0..2 {
            let Some(at) = (newest + steps).checked_sub(back + cycle * period) else { break };
            sum += self.positions[(self.start + at) % self.positions.len()].get();
            count += 1;
        }
        (count > 0).then(|| sum / count as f32)
    }

    /// The errors that repeating the season `steps` ahead would have made.
    pub(super) fn season_errors(&self, steps: usize) -> Option<impl Iterator<Item = f32> + use<>> {
        let period = self.period?;
        let values = self.ordered();
        let last = values.len().saturating_sub(steps);
        Some((0..last).filter_map(move |from| {
            Some(values[from + steps] - season::repeat(&values, from, steps, period)?)
        }))
    }

    pub(super) fn rescale(&mut self, convert: impl Fn(f32) -> f32) {
        self.positions.iter_mut().for_each(|position| *position = Position::new(convert(position.get())));
    }

    fn keep(&mut self, position: f32) {
        let position = Position::new(position);
        if self.positions.len() < Self::KEPT {
            self.positions.push(position);
        } else {
            self.positions[self.start] = position;
            self.start = (self.start + 1) % Self::KEPT;
        }
    }

    /// Memory that it takes, in bytes, next to itself.
    pub(super) fn bytes(&self) -> usize {
        self.positions.capacity() * size_of::<Position>()
    }

    /// All of them, oldest first; of what was not seen, the guesses.
    pub(super) fn ordered(&self) -> Vec<f32> {
        let (newer, older) = self.positions.split_at(self.start);
        older.iter().chain(newer).map(|position| position.get()).collect()
    }
}
