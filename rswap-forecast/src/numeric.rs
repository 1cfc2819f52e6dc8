//! The few functions that a forecast is made of, in plain `f32` arithmetic: they vectorise, and give the same bits on
//! every machine, which a C library's do not.

use serde::{Deserialize, Serialize};

/// The nearest to `value` from `low` to `high`. What was read back may be so large that a range is none: `clamp` would end the program then.
#[inline]
pub(super) fn within(value: f32, low: f32, high: f32) -> f32 {
    value.max(low).min(high)
}

/// e^x - 1, exact near 0; the argument is held within [-30, 30].
#[inline]
pub(super) fn expm1(x: f32) -> f32 {
    let x = x.clamp(-30.0, 30.0);
    // x = k ln 2 + r with |r| <= ln 2 / 2; adding and taking away 1.5 x 2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let k = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - k * 0.693_359_4) + k * 2.121_944_4e-4;
    let p = 1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0));
    let p = r + r * r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * p)));
    let power = f32::from_bits(((k as i32 + 127) << 23) as u32);
    power * p + (power - 1.0)
}

/// Inverse hyperbolic sine of an amount: linear near 0, a logarithm far from it.
#[inline]
pub(super) fn asinh(x: f64) -> f32 {
    (x + (x * x + 1.0).sqrt()).ln() as f32
}

/// How far from the amount `from` the amount is that lies `d` from it on the scale of [`asinh`] with a unit `u`; `slope` is
/// sqrt(from^2 + u^2).
///
/// sinh(z + d) = sinh z cosh d + cosh z sinh d: with d = 0 it is 0, to the last bit.
#[inline]
pub(super) fn displaced(from: f32, slope: f32, d: f32) -> f32 {
    let up = expm1(d);
    let down = up / (1.0 + up);
    0.5 * (from * (up - down) + slope * (up + down))
}

/// Sum of products, in eight independent lanes.
#[inline]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a.zip(b) {
        for i in 0..8 {
            lanes[i] += x[i] * y[i];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// A number in half the space, with three significant digits: the upper half of its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Short(u16);

impl Short {
    #[inline]
    pub(super) fn new(number: f32) -> Self {
        Self((number.to_bits().wrapping_add(0x8000) >> 16) as u16)
    }

    #[inline]
    pub(super) fn get(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// A position in half the space, to the 2048th part of a unit: an amount to half a thousandth of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position(i16);

impl Position {
    #[inline]
    pub(super) fn new(position: f32) -> Self {
        Self((position * 2048.0).round() as i16)
    }

    #[inline]
    pub(super) fn get(self) -> f32 {
        f32::from(self.0) / 2048.0
    }
}
