//! What numbers of a configuration may be: for `#[serde(deserialize_with = "...")]`.
#![allow(clippy::missing_errors_doc, reason = "each refuses what its first line excludes, and says so")]

use serde::{Deserialize, Deserializer, de::Error as _};

fn checked<'de, D: Deserializer<'de>>(from: D, is: fn(f64) -> bool, wanted: &str) -> Result<f64, D::Error> {
    let value = f64::deserialize(from)?;
    if value.is_finite() && is(value) {
        Ok(value)
    } else {
        Err(D::Error::custom(format!("{value} is not {wanted}")))
    }
}

/// A finite number.
pub fn finite<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    checked(from, |_| true, "a finite number")
}

/// A number above 0.
pub fn positive<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    checked(from, |value| value > 0.0, "above 0")
}

/// A number that is 0 or above.
pub fn non_negative<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    checked(from, |value| value >= 0.0, "0 or above")
}

/// 0 or above, and under 1.
pub fn share<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    checked(from, |value| (0.0..1.0).contains(&value), "a share: 0 or above, and under 1")
}

/// A number above 0, where one is given.
pub fn optional_positive<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    positive(from).map(Some)
}

/// A number that is 0 or above, where one is given.
pub fn optional_non_negative<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    non_negative(from).map(Some)
}

/// 1 or more.
pub fn positive_integer<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    match u64::deserialize(from)? {
        0 => Err(D::Error::custom("0 is not possible here: use 1 or more")),
        value => Ok(value),
    }
}

/// 1 or more, as a `u32`.
pub fn positive_u32<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    u32::try_from(positive_integer(from)?).map_err(D::Error::custom)
}
