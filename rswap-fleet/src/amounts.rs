//! Sums of what was used, in whole numbers: merged in any order and grouping, they are exactly the same.

use rswap_forecast::Resource;
use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Amounts of one resource over some windows. Whole numbers of [`unit`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sum {
    /// Windows in which it was known.
    pub count: u64,
    /// Sum over them.
    pub sum: u128,
    /// The highest of them.
    pub most: u64,
}

/// In how many parts of the resource's own unit a [`Sum`] counts: cores and requests per second in millionths and thousandths, bytes
/// and nanoseconds as they are.
pub fn unit(resource: Resource) -> f64 {
    match resource {
        Resource::Cpu => 1e6,
        Resource::VolumeOperations => 1e3,
        Resource::Memory
        | Resource::Io
        | Resource::IoLatency
        | Resource::NetIn
        | Resource::NetOut
        | Resource::Written
        | Resource::VolumeBytes
        | Resource::Port => 1.0,
    }
}

impl Sum {
    /// Takes in one window's amount, in the resource's own unit. What is no number is not known.
    pub fn add(&mut self, resource: Resource, amount: f64) {
        if !amount.is_finite() {
            return;
        }
        // Saturates: no amount is negative, and none that is real has 64 bits.
        let whole = (amount * unit(resource)).round() as u64;
        self.merge(&Self { count: 1, sum: u128::from(whole), most: whole });
    }

    /// Takes in other windows.
    pub fn merge(&mut self, other: &Self) {
        self.count = self.count.saturating_add(other.count);
        self.sum = self.sum.saturating_add(other.sum);
        self.most = self.most.max(other.most);
    }

    /// The mean per window, in the resource's own unit; `None` if it was never known.
    pub fn mean(&self, resource: Resource) -> Option<f64> {
        (self.count > 0).then(|| self.sum as f64 / self.count as f64 / unit(resource))
    }
}

/// How fine history is, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tier {
    /// Length of a row, in milliseconds; 0: a row per report.
    pub row_ms: u64,
    /// Rows that begin earlier than so long ago are dropped, in milliseconds.
    pub kept_ms: u64,
}

impl Tier {
    /// When the row begins that a moment falls into.
    pub fn row_of(&self, at: UnixMillis) -> UnixMillis {
        match self.row_ms {
            0 => at,
            row_ms => UnixMillis(at.0 - at.0 % row_ms),
        }
    }

    /// Rows that begin earlier are dropped.
    pub fn oldest_kept(&self, now: UnixMillis) -> UnixMillis {
        UnixMillis(now.0.saturating_sub(self.kept_ms))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sums_are_the_same_in_any_order_and_grouping(
            amounts in prop::collection::vec(0.0f64..1e12, 1..40), split in 0usize..40,
        ) {
            let of = |amounts: &mut dyn Iterator<Item = &f64>| {
                let mut sum = Sum::default();
                amounts.for_each(|amount| sum.add(Resource::Cpu, *amount));
                sum
            };
            let whole = of(&mut amounts.iter());
            let split = split.min(amounts.len());
            let mut parts = of(&mut amounts[split..].iter().rev());
            parts.merge(&of(&mut amounts[..split].iter().rev()));
            prop_assert_eq!(parts, whole);
            prop_assert_eq!(whole.count, amounts.len() as u64);
        }
    }

    #[test]
    fn a_mean_is_in_the_resources_unit_and_what_is_no_number_is_not_known() {
        let mut sum = Sum::default();
        assert_eq!(sum.mean(Resource::Cpu), None);
        [0.25, f64::NAN, 0.75, f64::INFINITY].into_iter().for_each(|cores| sum.add(Resource::Cpu, cores));
        assert_eq!((sum.mean(Resource::Cpu), sum.most), (Some(0.5), 750_000));
        sum.add(Resource::Cpu, -1.0);
        assert_eq!(sum.count, 3);
        assert_eq!(sum.sum, 1_000_000);
    }

    #[test]
    fn a_row_begins_at_a_multiple_of_its_length() {
        let tier = Tier { row_ms: 60_000, kept_ms: 120_000 };
        assert_eq!(tier.row_of(UnixMillis(179_999)), UnixMillis(120_000));
        assert_eq!(Tier { row_ms: 0, ..tier }.row_of(UnixMillis(7)), UnixMillis(7));
        assert_eq!(tier.oldest_kept(UnixMillis(60_000)), UnixMillis(0));
    }
}
