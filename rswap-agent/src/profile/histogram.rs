//! Mergeable log-linear histograms (relative error at most 1/16).

use std::{iter::Peekable, slice::Iter, sync::Arc};

use rswap_common::{
    histogram::{BUCKETS, bounds_of, index_of},
    layout::HistogramRecord,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Counts per log-linear bucket, with the exact number and sum of the samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Histogram {
    /// (bucket index, count), ascending, only buckets with samples.
    pub buckets: Vec<(u16, u64)>,
    /// Number of samples.
    pub count: u64,
    /// Exact sum of the samples, in the histogram's unit.
    pub sum: u64,
}

impl Histogram {
    /// What was counted between two readings of the same record, however the counters wrapped meanwhile.
    pub(super) fn between(earlier: &Counts, later: &Counts) -> Self {
        if Arc::ptr_eq(&earlier.buckets, &later.buckets) {
            return Self { sum: later.sum.wrapping_sub(earlier.sum), ..Self::default() };
        }
        let (mut before, mut now) = (earlier.buckets.iter().peekable(), later.buckets.iter().peekable());
        let mut buckets = Vec::new();
        while let Some(index) = before.peek().into_iter().chain(now.peek()).map(|(index, _)| *index).min() {
            let of = |counts: &mut Peekable<Iter<'_, (u16, u32)>>| {
                counts.next_if(|(found, _)| *found == index).map_or(0, |(_, count)| *count)
            };
            let (before, now) = (of(&mut before), of(&mut now));
            let count = u64::from(now.wrapping_sub(before));
            if count > 0 {
                buckets.push((index, count));
            }
        }
        let count = buckets.iter().map(|&(_, count)| count).sum();
        Self { buckets, count, sum: later.sum.wrapping_sub(earlier.sum) }
    }

    /// Counts one sample.
    pub fn record(&mut self, value: u64) {
        let index = index_of(value) as u16;
        match self.buckets.binary_search_by_key(&index, |&(index, _)| index) {
            Ok(place) => self.buckets[place].1 += 1,
            Err(place) => self.buckets.insert(place, (index, 1)),
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
    }

    /// Adds another histogram's samples.
    pub fn merge(&mut self, other: &Self) {
        if self.buckets.is_empty() {
            // So each sum begins: its list need not grow.
            self.buckets.clone_from(&other.buckets);
        } else {
            for &(index, count) in &other.buckets {
                match self.buckets.binary_search_by_key(&index, |&(index, _)| index) {
                    Ok(place) => self.buckets[place].1 = self.buckets[place].1.saturating_add(count),
                    Err(place) => self.buckets.insert(place, (index, count)),
                }
            }
        }
        self.count = self.count.saturating_add(other.count);
        self.sum = self.sum.saturating_add(other.sum);
    }

    /// The value that a share `q` (0 to 1) of the samples does not exceed, to within 1/16; `None` without
    /// samples.
    pub fn quantile(&self, q: f64) -> Option<u64> {
        let total: u64 = self.buckets.iter().map(|&(_, count)| count).sum();
        let rank = ((q.clamp(0.0, 1.0) * total as f64).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for &(index, count) in &self.buckets {
            seen += count;
            if seen >= rank {
                return Some(bounds_of(index.into()).middle());
            }
        }
        None
    }

    /// The least value of each bucket that has samples, ascending, with their count.
    pub fn lows(&self) -> impl Iterator<Item = (u64, u64)> {
        self.buckets.iter().map(|&(index, count)| (bounds_of(index.into()).low, count))
    }

    /// The samples' mean; `None` without samples.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum as f64 / self.count as f64)
    }
}

/// A reading of a record that is kept: most buckets have never counted anything. A later one shares it, where nothing was counted since.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Counts {
    sum: u64,
    /// (bucket index, count), ascending, those that are not 0.
    buckets: Arc<[(u16, u32)]>,
}

impl Counts {
    pub(super) fn of(record: &HistogramRecord) -> Self {
        let counted = record.buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        // Counted first, so that no more is reserved than there is.
        let mut buckets = Vec::with_capacity(counted.clone().count());
        buckets.extend(counted.map(|(index, count)| (index as u16, *count)));
        Self { sum: record.sum, buckets: buckets.into() }
    }

    /// How many samples.
    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| u64::from(*count)).sum()
    }
}

/// Adds what another CPU's record of the same metric counted.
pub(super) fn add_counts(total: &mut HistogramRecord, sum: u64, buckets: &[u32; BUCKETS]) {
    total.sum = total.sum.wrapping_add(sum);
    for (bucket, count) in total.buckets.iter_mut().zip(buckets) {
        *bucket = bucket.wrapping_add(*count);
    }
}

/// A histogram of these.
#[cfg(test)]
pub(crate) fn of(values: &[u64]) -> Histogram {
    let mut histogram = Histogram::default();
    values.iter().for_each(|&value| histogram.record(value));
    histogram
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_histogram_has_no_quantiles() {
        assert_eq!(Histogram::default().quantile(0.5), None);
        assert_eq!(Histogram::default().mean(), None);
    }

    #[test]
    fn a_difference_survives_wrapping() {
        let mut earlier = HistogramRecord::EMPTY;
        earlier.sum = u64::MAX - 1;
        earlier.buckets[5] = u32::MAX;
        let mut later = earlier;
        later.sum = 8;
        later.buckets[5] = 1;
        // One of them to 0.
        earlier.buckets[7] = u32::MAX - 2;
        later.buckets[7] = 0;
        let difference = Histogram::between(&Counts::of(&earlier), &Counts::of(&later));
        assert_eq!(difference, Histogram { buckets: vec![(5, 2), (7, 3)], count: 5, sum: 10 });
    }

    proptest! {
        #[test]
        fn what_was_counted_between_readings_is_what_was_counted_then(before: Vec<u32>, then: Vec<u32>) {
            let (before, then): (Vec<u64>, Vec<u64>) =
                (before.into_iter().map(u64::from).collect(), then.into_iter().map(u64::from).collect());
            let read = |values: &[u64]| {
                let mut record = HistogramRecord::EMPTY;
                values.iter().for_each(|&value| {
                    record.buckets[index_of(value)] += 1;
                    record.sum += value;
                });
                Counts::of(&record)
            };
            let (earlier, later) = (read(&before), read(&[before.as_slice(), &then].concat()));
            prop_assert_eq!(Histogram::between(&earlier, &later), of(&then));
            prop_assert_eq!(Histogram::between(&Counts::default(), &later), of(&[before, then].concat()));
        }

        #[test]
        fn merging_is_counting_together(a: Vec<u32>, b: Vec<u32>) {
            let (a, b): (Vec<u64>, Vec<u64>) =
                (a.into_iter().map(u64::from).collect(), b.into_iter().map(u64::from).collect());
            let mut merged = of(&a);
            merged.merge(&of(&b));
            prop_assert_eq!(merged, of(&[a, b].concat()));
        }

        #[test]
        fn a_quantile_is_within_a_sixteenth_of_the_exact_one(
            mut values in prop::collection::vec(0..1u64 << 39, 1..200), q in 0.0..=1.0f64,
        ) {
            let estimate = of(&values).quantile(q).unwrap();
            values.sort_unstable();
            let rank = ((q * values.len() as f64).ceil() as usize).clamp(1, values.len());
            let exact = values[rank - 1];
            prop_assert!(estimate.abs_diff(exact) * 16 <= exact, "{} for {}", estimate, exact);
        }
    }
}
