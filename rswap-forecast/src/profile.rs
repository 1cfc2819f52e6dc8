//! What a series is like, as far as a few windows tell it: whom it resembles, whatever their names.
//!
//! Every few windows are a block, and each block says the same things: how much, how even, how much like its neighbour. So a new
//! series can be compared with one that has been seen for long.

use serde::{Deserialize, Serialize};

/// Windows of a block: a series has a profile after so many.
pub(super) const BLOCK: usize = 8;
/// What a block says.
const TRAITS: usize = 5;
/// Differences that count one, in the order of the traits.
const COUNTS_ONE: [f32; TRAITS] = [1.5, 0.7, 0.4, 0.4, 0.3];
/// Blocks over which the traits are taken.
const BLOCKS: u32 = 64;
/// A change of less than this share of the mean is none.
const STILL: f32 = 0.01;

/// What a series is like, or the mean of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Profile {
    /// Logarithm of the mean; logarithm of the deviation as a share of it; correlation of neighbours; logarithm of the highest as a
    /// multiple of the mean; share of windows in which it stays as it was.
    traits: [f32; TRAITS],
}

impl Profile {
    fn of(block: &[f32; BLOCK]) -> Self {
        let n = BLOCK as f32;
        let unit = (block.iter().sum::<f32>() / n).max(1e-9);
        let values = block.map(|value| value / unit);
        let mean = values.iter().sum::<f32>() / n;
        let square = values.iter().map(|value| (value - mean) * (value - mean)).sum::<f32>();
        let product = values.windows(2).map(|pair| (pair[0] - mean) * (pair[1] - mean)).sum::<f32>();
        let still = values.windows(2).filter(|pair| (pair[1] - pair[0]).abs() <= STILL).count();
        let highest = values.iter().copied().fold(0.0, f32::max);
        Self {
            traits: [
                unit.ln(),
                (0.01 + (square / n).sqrt()).ln(),
                if square > 0.0 { product / square } else { 0.0 },
                highest.max(1e-9).ln(),
                still as f32 / (n - 1.0),
            ],
        }
    }

    /// How unlike two are: within 1 they are hard to tell apart.
    pub(super) fn distance(&self, other: &Self) -> f32 {
        let square = |i: usize| ((self.traits[i] - other.traits[i]) / COUNTS_ONE[i]).powi(2);
        ((0..TRAITS).map(square).sum::<f32>() / TRAITS as f32).sqrt()
    }

    pub(super) fn towards(&mut self, other: &Self, share: f32) {
        self.traits.iter_mut().zip(other.traits).for_each(|(own, other)| *own += (other - *own) * share);
    }

    pub(super) fn is_finite(&self) -> bool {
        self.traits.iter().all(|number| number.is_finite())
    }
}

/// The profile of a series in the making.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Profiler {
    block: [f32; BLOCK],
    filled: u32,
    blocks: u32,
    profile: Profile,
}

impl Profiler {
    pub(super) fn learn(&mut self, value: f64) {
        self.block[self.filled as usize] = value as f32;
        self.filled += 1;
        if self.filled as usize == BLOCK {
            self.filled = 0;
            self.blocks = (self.blocks + 1).min(BLOCKS);
            self.profile.towards(&Profile::of(&self.block), 1.0 / self.blocks as f32);
        }
    }

    /// Whether its places and numbers are ones.
    pub(super) fn is_sound(&self) -> bool {
        let finite = self.block.iter().all(|value| value.is_finite()) && self.profile.is_finite();
        (self.filled as usize) < BLOCK && self.blocks <= BLOCKS && finite
    }

    /// `None` before the first block is full.
    pub(super) fn profile(&self) -> Option<Profile> {
        (self.blocks > 0).then_some(self.profile)
    }
}
