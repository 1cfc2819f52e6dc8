//! Log-linear bucket indexing: every power of two is cut into eight buckets of equal width.
//!
//! A value stands for its bucket's middle, which is at most 1/16 of the value away from it. Values
//! under 16 have a bucket of their own and are exact. Values of 2^40 and above (18 minutes, in
//! nanoseconds) share the last bucket.

/// Each power of two has `1 << SUB_BUCKET_BITS` buckets.
pub const SUB_BUCKET_BITS: u32 = 3;

/// Values of `1 << MAX_VALUE_BITS` and above are counted in the last bucket.
pub const MAX_VALUE_BITS: u32 = 40;

/// Number of buckets of a histogram.
pub const BUCKETS: usize = ((MAX_VALUE_BITS - SUB_BUCKET_BITS + 1) << SUB_BUCKET_BITS) as usize;

const SUB_BUCKETS: u64 = 1 << SUB_BUCKET_BITS;

/// Values that [`SMALL`] has.
const SMALL_BITS: u32 = 8;

/// Buckets of the values that are smaller than `1 << SMALL_BITS`. They are under 256 of them.
static SMALL: [u8; 1 << SMALL_BITS] = {
    let mut small = [0; 1 << SMALL_BITS];
    let mut value = 0;
    while value < small.len() {
        small[value] = index_of(value as u64) as u8;
        value += 1;
    }
    small
};

/// The same as [`index_of`], for processors without an instruction that counts leading zeroes (eBPF): without one, that takes four times as many instructions
/// as this.
#[inline(always)]
pub fn index_by_table(value: u64) -> usize {
    // Shifted by whole steps of bits that leave at least the four upper ones, by which buckets are told apart.
    const STEP: u32 = SMALL_BITS - SUB_BUCKET_BITS;
    let steps = if value < 1 << (SMALL_BITS + STEP) {
        if value < 1 << SMALL_BITS { 0 } else { 1 }
    } else if value < 1 << (SMALL_BITS + 3 * STEP) {
        if value < 1 << (SMALL_BITS + 2 * STEP) { 2 } else { 3 }
    } else if value < 1 << (SMALL_BITS + 5 * STEP) {
        if value < 1 << (SMALL_BITS + 4 * STEP) { 4 } else { 5 }
    } else if value < 1 << MAX_VALUE_BITS {
        if value < 1 << (SMALL_BITS + 6 * STEP) { 6 } else { 7 }
    } else {
        return BUCKETS - 1;
    };
    let shift = steps * STEP;
    SMALL[(value >> shift) as usize & (SMALL.len() - 1)] as usize + (shift << SUB_BUCKET_BITS) as usize
}

/// The bucket that counts `value`; always under [`BUCKETS`].
#[inline(always)]
pub const fn index_of(value: u64) -> usize {
    if value < SUB_BUCKETS {
        return value as usize;
    }
    let exponent = 63 - value.leading_zeros();
    if exponent >= MAX_VALUE_BITS {
        return BUCKETS - 1;
    }
    let shift = exponent - SUB_BUCKET_BITS;
    // `value >> shift` is in 8..16: its top bit numbers the power of two together with `shift`.
    (((shift as u64) << SUB_BUCKET_BITS) + (value >> shift)) as usize
}

/// Values that one bucket counts: `low..=high`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The smallest.
    pub low: u64,
    /// The largest.
    pub high: u64,
}

impl Bounds {
    /// The value that stands for all of the bucket's.
    pub const fn middle(self) -> u64 {
        self.low + (self.high - self.low) / 2
    }
}

/// The values that bucket `index` counts. The last bucket's `high` is nominal: it also counts everything
/// above. Indices past the last are treated as the last.
pub const fn bounds_of(index: usize) -> Bounds {
    let index = if index < BUCKETS { index } else { BUCKETS - 1 } as u64;
    if index < SUB_BUCKETS {
        return Bounds { low: index, high: index };
    }
    let shift = (index >> SUB_BUCKET_BITS) - 1;
    let mantissa = index - (shift << SUB_BUCKET_BITS);
    Bounds { low: mantissa << shift, high: ((mantissa + 1) << shift) - 1 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_tile_the_range_without_gaps() {
        let mut expected_low = 0;
        for index in 0..BUCKETS {
            let bounds = bounds_of(index);
            assert_eq!(bounds.low, expected_low, "bucket {index}");
            assert_eq!(index_of(bounds.low), index);
            assert_eq!(index_of(bounds.high), index);
            expected_low = bounds.high + 1;
        }
        assert_eq!(expected_low, 1 << MAX_VALUE_BITS);
    }

    #[test]
    fn the_last_bucket_takes_everything_above() {
        assert_eq!(index_of(1 << MAX_VALUE_BITS), BUCKETS - 1);
        assert_eq!(index_of(u64::MAX), BUCKETS - 1);
        assert_eq!(bounds_of(usize::MAX), bounds_of(BUCKETS - 1));
    }

    #[test]
    fn the_table_answers_the_same_at_every_bound() {
        for index in 0..BUCKETS {
            let Bounds { low, high } = bounds_of(index);
            assert_eq!([low, high].map(index_by_table), [index; 2]);
        }
        assert_eq!([1 << MAX_VALUE_BITS, u64::MAX].map(index_by_table), [BUCKETS - 1; 2]);
    }

    proptest! {
        #[test]
        fn the_table_answers_the_same_for_any_value(bits in 0..u64::BITS, noise: u64) {
            let value = (1 << bits) | (noise & ((1 << bits) - 1));
            prop_assert_eq!(index_by_table(value), index_of(value));
        }

        #[test]
        fn a_value_is_within_a_sixteenth_of_its_buckets_middle(bits in 0..MAX_VALUE_BITS, noise: u64) {
            let value = (1 << bits) | (noise & ((1 << bits) - 1));
            let bounds = bounds_of(index_of(value));
            prop_assert!(bounds.low <= value && value <= bounds.high);
            prop_assert!(bounds.middle().abs_diff(value) * 16 <= value);
        }

        #[test]
        fn larger_values_never_get_a_smaller_bucket(a: u64, b: u64) {
            let (small, large) = if a < b { (a, b) } else { (b, a) };
            prop_assert!(index_of(small) <= index_of(large));
            prop_assert!(index_of(large) < BUCKETS);
        }
    }
}
