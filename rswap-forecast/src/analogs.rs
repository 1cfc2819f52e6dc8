//! What came of similar moments: the newest outcomes of one lead, each with the moment that it came of.
//!
//! A forecast is the distribution of past outcomes, those of moments like the present one counting most. Outcomes are
//! kept in order, so that a weighted quantile is one walk from the top.

use serde::{Deserialize, Serialize};
use serde_big_array::BigArray;

use super::{lead::TAILS, numeric::Position};

/// Outcomes kept.
pub(super) const KEPT: usize = 112;
/// The weight of an outcome falls to a half in so many newer ones.
const HALF_LIFE: f32 = 25.0;
/// Distance, in typical ones, at which a moment counts half.
const LIKE: f32 = 0.5;
/// What the most unlike moment still counts.
const FLOOR: f32 = 0.01;

/// What an outcome counts less if its moment was before the level last changed.
const BEFORE: f32 = 0.2;

/// Weights of outcomes, by their place.
pub(super) type Weights = [f32; KEPT];

/// The order of at most [`KEPT`] values, which are kept elsewhere, by their places.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order(#[serde(with = "BigArray")] [u8; KEPT]);

impl Order {
    const EMPTY: Self = Self([0; KEPT]);

    /// Whether all are places.
    fn is_sound(&self) -> bool {
        self.0.iter().all(|&place| usize::from(place) < KEPT)
    }

    /// The value at `place` is replaced by `new`; `len` values were there before, `value` says which.
    fn put(&mut self, place: usize, len: usize, new: f32, value: impl Fn(usize) -> f32) {
        let below =
            |order: &[u8], limit: f32| order.partition_point(|&place| value(usize::from(place)) < limit);
        let mut len = len;
        if place < len {
            let known = &self.0[..len];
            let start = below(known, value(place));
            let is_it = |&other: &u8| usize::from(other) == place;
            // Among equals, it can be any; NaN has no place in an order, but must not break one.
            let at = known[start..].iter().position(is_it).map(|at| at + start);
            let at = at.or_else(|| known.iter().position(is_it)).unwrap_or(len - 1);
            self.0.copy_within(at + 1..len, at);
            len -= 1;
        }
        let at = below(&self.0[..len], new);
        self.0.copy_within(at..len, at + 1);
        self.0[at] = place as u8;
    }

    /// The values above which the shares [`TAILS`] of the weight lie.
    #[inline]
    fn quantiles(&self, len: usize, weights: &Weights, value: impl Fn(usize) -> f32) -> [f32; 4] {
        let total = total(&weights[..len]);
        let mut result = [0.0; 4];
        let mut wanted = 3;
        let mut goal = TAILS[3] * total;
        let (mut above, mut last, mut last_mid) = (0.0f32, f32::NAN, 0.0f32);
        for &place in self.0[..len].iter().rev() {
            let place = usize::from(place).min(KEPT - 1);
            let weight = weights[place];
            let mid = above + 0.5 * weight;
            while mid >= goal {
                let here = value(place);
                result[wanted] = if last.is_nan() {
                    here
                } else {
                    // Between two outcomes, along the line through both.
                    here + (last - here) * ((mid - goal) / (mid - last_mid).max(1e-20)).min(1.0)
                };
                if wanted == 0 {
                    return result;
                }
                wanted -= 1;
                goal = TAILS[wanted] * total;
            }
            above += weight;
            (last, last_mid) = (value(place), mid);
        }
        result[..=wanted].fill(if last.is_nan() { 0.0 } else { last });
        result
    }
}

/// Values and their order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Sorted {
    #[serde(with = "BigArray")]
    values: [f32; KEPT],
    order: Order,
}

impl Sorted {
    pub(super) fn new() -> Self {
        Self { values: [0.0; KEPT], order: Order::EMPTY }
    }

    /// Whether its values are numbers, in an order of places.
    pub(super) fn is_sound(&self) -> bool {
        self.values.iter().copied().all(f32::is_finite) && self.order.is_sound()
    }

    /// Puts `value` at `place`; `len` values were there before.
    pub(super) fn put(&mut self, place: usize, len: usize, value: f32) {
        self.order.put(place, len, value, |place| self.values[place]);
        self.values[place] = value;
    }

    /// The values above which the shares [`TAILS`] of the weight lie.
    pub(super) fn quantiles(&self, len: usize, weights: &Weights) -> [f32; 4] {
        self.order.quantiles(len, weights, |place| self.values[place])
    }

    /// The values, in no order.
    pub(super) fn values(&self, len: usize) -> &[f32] {
        &self.values[..len]
    }
}

/// The moments and what came of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Analogs {
    len: usize,
    next: usize,
    /// How many of the newest come of moments since the level last changed.
    since_change: usize,
    /// Where the value stood.
    #[serde(with = "BigArray")]
    level: [Position; KEPT],
    /// How far the regression was off.
    missed: Sorted,
    /// How far the value had gone.
    gone: Sorted,
    /// Order of where the value then was: at the level, and as far on as it had gone.
    came: Order,
}

impl Analogs {
    pub(super) fn new() -> Self {
        Self {
            len: 0,
            next: 0,
            since_change: KEPT,
            level: [Position::default(); KEPT],
            missed: Sorted::new(),
            gone: Sorted::new(),
            came: Order::EMPTY,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether its places are ones, and its numbers.
    pub(super) fn is_sound(&self) -> bool {
        let places =
            self.len <= KEPT && self.next < KEPT && self.since_change <= KEPT && self.came.is_sound();
        places && self.missed.is_sound() && self.gone.is_sound()
    }

    pub(super) fn add(&mut self, level: f32, missed: f32, gone: f32) {
        let level = Position::new(level);
        let came = |place: usize| self.level[place].get() + self.gone.values[place];
        self.came.put(self.next, self.len, level.get() + gone, came);
        self.missed.put(self.next, self.len, missed);
        self.gone.put(self.next, self.len, gone);
        self.level[self.next] = level;
        self.len = (self.len + 1).min(KEPT);
        self.next = (self.next + 1) % KEPT;
        self.since_change = (self.since_change + 1).min(KEPT);
    }

    /// The level has changed: so many of the newest outcomes come of moments since.
    pub(super) fn level_changed(&mut self, outcomes: usize) {
        self.since_change = outcomes;
    }

    /// Weights by age alone.
    fn ages(&self) -> Weights {
        let mut weights = ages(self.len, self.next);
        for age in self.since_change..self.len {
            weights[(self.next + KEPT - 1 - age) % KEPT] *= BEFORE;
        }
        weights
    }

    /// Where the value was after the outcome at `place`.
    fn came_to(&self, place: usize) -> f32 {
        self.level[place].get() + self.gone.values[place]
    }

    /// Weights of the outcomes by age, and by how near their moment's level was; `typical` is how far the value usually is from where
    /// it was.
    pub(super) fn likeness(&self, level: f32, typical: f32) -> Weights {
        let mut weights = self.ages();
        let near = 1.0 / (typical.max(1e-6) * LIKE);
        for i in 0..KEPT {
            let off = (self.level[i].get() - level) * near;
            weights[i] *= 1.0 / (1.0 + off * off) + FLOOR;
        }
        weights
    }

    /// How far the regression was off, at moments that weigh so much.
    pub(super) fn missed(&self, weights: &Weights) -> [f32; 4] {
        self.missed.quantiles(self.len, weights)
    }

    /// How far the value went, after moments that weigh so much.
    pub(super) fn gone(&self, weights: &Weights) -> [f32; 4] {
        self.gone.quantiles(self.len, weights)
    }

    /// Where the value went, after moments that weigh so much.
    pub(super) fn came(&self, weights: &Weights) -> [f32; 4] {
        self.came.quantiles(self.len, weights, |place| self.came_to(place))
    }

    /// Evenly spaced quantiles of the regression's errors and of the changes.
    pub(super) fn sketch<const N: usize>(&self) -> ([f32; N], [f32; N]) {
        let at = |sorted: &Sorted| {
            std::array::from_fn(|i| {
                if self.len == 0 {
                    return 0.0;
                }
                sorted.values[usize::from(sorted.order.0[(2 * i + 1) * self.len / (2 * N)])]
            })
        };
        (at(&self.missed), at(&self.gone))
    }

    /// Mean pinball loss of the regression's errors against their own quantiles.
    pub(super) fn loss(&self) -> f32 {
        spread_loss(&self.missed, self.len, self.next)
    }

    /// The unit of the scale has changed.
    pub(super) fn rescale(&mut self, convert: impl Fn(f32) -> f32) {
        for i in 0..self.len {
            self.level[i] = Position::new(convert(self.level[i].get()));
        }
        // Changes are kept as they are, which they nearly are on any scale; where that puts the values is ordered anew.
        let (level, gone) = (&self.level, &self.gone.values);
        let came = |&place: &u8| level[usize::from(place)].get() + gone[usize::from(place)];
        self.came.0[..self.len].sort_by(|a, b| came(a).total_cmp(&came(b)));
    }
}

/// Weights by age alone, of `len` values of which the next will be put at `next`.
pub(super) fn ages(len: usize, next: usize) -> Weights {
    let table = by_age();
    let mut weights = [0.0; KEPT];
    if len == 0 {
        return weights;
    }
    // The newest is at next - 1, the oldest at next, or at 0 while not all places are taken.
    let next = if len < KEPT { len } else { next };
    let (older, newer) = weights[..len].split_at_mut(next);
    for (weight, age) in older.iter_mut().rev().zip(table) {
        *weight = *age;
    }
    for (weight, age) in newer.iter_mut().rev().zip(&table[next.min(KEPT)..]) {
        *weight = *age;
    }
    weights
}

fn by_age() -> &'static Weights {
    static TABLE: std::sync::OnceLock<Weights> = std::sync::OnceLock::new();
    TABLE.get_or_init(|| {
        let step = 1.0 + super::numeric::expm1(-std::f32::consts::LN_2 / HALF_LIFE);
        let mut weight = 1.0;
        std::array::from_fn(|_| {
            let now = weight;
            weight *= step;
            now
        })
    })
}

fn total(weights: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let chunks = weights.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for i in 0..8 {
            lanes[i] += chunk[i];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Mean pinball loss of errors against their own quantiles.
pub(super) fn spread_loss(errors: &Sorted, len: usize, next: usize) -> f32 {
    let quantiles = errors.quantiles(len, &ages(len, next));
    let mut sum = 0.0;
    for error in errors.values(len) {
        for k in 0..4 {
            let off = error - quantiles[k];
            sum += ((1.0 - TAILS[k]) * off).max(-TAILS[k] * off);
        }
    }
    sum / (4 * len.max(1)) as f32
}

/// Evenly spaced quantiles of what lies in bins of `width`.
pub(super) fn spread<const N: usize>(shares: &[f32], width: f32) -> [f32; N] {
    let whole: f32 = shares.iter().sum();
    std::array::from_fn(|i| {
        let goal = whole * (i as f32 + 0.5) / N as f32;
        let mut sum = 0.0;
        let bin = shares.iter().position(|share| {
            sum += share;
            sum >= goal
        });
        (bin.unwrap_or_default() as f32 + 0.5) * width
    })
}
