//! Whether the level has changed, and since when.
//!
//! A two-sided CUSUM: what a window is off the level, in standard deviations, is summed up as far as it goes beyond what is
//! allowed; the sum never falls below 0. Neighbours resemble each other, which alone would look like a changed level; so what is
//! summed is what the window before does not explain. The sum began to rise when the level changed.

use serde::{Deserialize, Serialize};

use super::numeric::within;

/// Windows over which level and spread are taken.
const WINDOWS: u32 = 144;
/// Windows without which nothing is said.
const FEWEST: u32 = 8;
/// Standard deviations that a window may be off for nothing.
const ALLOWED: f32 = 0.75;
/// One window counts at most so many: two alone never are a new level.
const MOST: f32 = 6.0;
/// The sum at which the level has changed.
const CHANGED: f32 = 12.0;
/// Smallest standard deviation, as a difference of positions: a thousandth of the amount.
const LEAST: f32 = 1e-3;
/// Positions resemble their neighbours at most so much.
const ALIKE: f32 = 0.98;

/// The level of one series, on its scale.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Level {
    seen: u32,
    mean: f32,
    /// Mean square of what windows are off the mean, and mean product with the window before.
    square: f32,
    product: f32,
    /// How far the newest one was off.
    off: f32,
    up: Side,
    down: Side,
    /// Windows since the newest change began.
    since: Option<u32>,
}

/// Evidence for a change to one side.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Side {
    sum: f32,
    /// Windows since it began to rise, and the sum of their positions.
    windows: u16,
    positions: f32,
}

impl Level {
    /// A window went by unseen.
    pub(super) fn pass(&mut self) {
        self.since = self.since.map(|since| since.saturating_add(1));
    }

    /// Windows since the newest change began; `None` if none was found.
    pub(super) fn changed_windows_ago(&self) -> Option<u32> {
        self.since
    }

    /// So much went by unseen that nothing is known of the level any more.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Where it is.
    pub(super) fn mean(&self) -> f32 {
        self.mean
    }

    /// Takes in the position of a window; whether this showed that the level has changed.
    pub(super) fn learn(&mut self, position: f32) -> bool {
        self.pass();
        self.seen = self.seen.saturating_add(1);
        if self.seen == 1 {
            self.mean = position;
            return false;
        }
        let off = position - self.mean;
        let (alike, deviation) = self.noise();
        let unexplained = ((off - alike * self.off) / deviation).clamp(-MOST, MOST);
        let changed = self.seen > FEWEST
            && (self.up.add(unexplained, position) | self.down.add(-unexplained, position));
        // A window that stands out counts as one at the limit: the spread is that of the level, not of the changes.
        let most = 2.0 * MOST * deviation;
        let held = within(off, -most, most);
        let step = 1.0 / self.seen.min(WINDOWS) as f32;
        self.mean += step * held;
        self.square += step * (held * held - self.square);
        self.product += step * (held * self.off - self.product);
        self.off = held;
        if changed {
            let side = if self.up.sum > self.down.sum { &self.up } else { &self.down };
            self.since = Some(u32::from(side.windows) - 1);
            self.mean = side.positions / f32::from(side.windows.max(1));
            self.off = position - self.mean;
            self.up = Side::default();
            self.down = Side::default();
        }
        changed
    }

    /// How alike neighbours are, and the standard deviation of what is left.
    fn noise(&self) -> (f32, f32) {
        // Of few windows, the spread may be far larger than seen.
        let square = self.square * (1.0 + 8.0 / self.seen as f32) + LEAST * LEAST;
        let alike = (self.product / square).clamp(0.0, ALIKE);
        (alike, (square * (1.0 - alike * alike)).sqrt())
    }

    /// Whether its numbers are ones.
    pub(super) fn is_sound(&self) -> bool {
        let sides = [self.up.sum, self.up.positions, self.down.sum, self.down.positions];
        let all_finite =
            [self.mean, self.square, self.product, self.off].into_iter().chain(sides).all(f32::is_finite);
        // A mean of squares.
        all_finite && self.square >= 0.0
    }

    /// The unit of the scale has changed.
    pub(super) fn rescale(&mut self, convert: impl Fn(f32) -> f32) {
        let last = convert(self.mean + self.off);
        self.mean = convert(self.mean);
        self.off = last - self.mean;
        for side in [&mut self.up, &mut self.down] {
            let windows = f32::from(side.windows.max(1));
            side.positions = convert(side.positions / windows) * windows;
        }
    }
}

impl Side {
    /// Whether the sum is reached.
    fn add(&mut self, unexplained: f32, position: f32) -> bool {
        self.sum += unexplained - ALLOWED;
        if self.sum <= 0.0 || self.windows == u16::MAX {
            *self = Self::default();
            return false;
        }
        self.windows += 1;
        self.positions += position;
        self.sum > CHANGED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_that_is_no_number_does_not_make_it_fail() {
        for square in [-1e30, f32::MAX] {
            let mut level = Level { seen: 5, square, ..Level::default() };
            for position in [0.0, f32::MAX, -f32::MAX, 1.0] {
                level.learn(position);
            }
        }
        assert!(!Level { square: -1.0, ..Level::default() }.is_sound());
        assert!(Level::default().is_sound());
    }
}
