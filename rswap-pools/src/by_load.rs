//! Ratios, counted by the load at which they were seen. What is new outweighs what is old, and what was seen at other loads counts the
//! less the further away they are.

use std::collections::BTreeMap;

use rswap_common::histogram::{bounds_of, index_of};
use rswap_types::UnixMillis;

/// More samples than this of a bin are not remembered: it shows what is there now after as many.
pub(crate) const MOST: f64 = 512.0;
/// After this time without new ones, half of what was counted is forgotten.
pub(crate) const HALF_LIFE_MS: f64 = 600_000.0;
/// What is learnt at one load counts at twice that (and half) by this much.
const PER_DOUBLING: f64 = 0.25;
/// Loads further away from all that was seen than so many doublings are not told apart.
const TAIL: i32 = 4;
/// Ratios are counted in this many parts of one: so 1 is in the middle of its bucket (1024 to 1151), and is read back as 1.
pub(crate) const PARTS: f64 = 1087.0;
/// Loads of 2^this and more are one bin.
const LAST_BIN: i32 = 24;

/// What was learnt at loads of one power of two.
#[derive(Clone, Debug, Default, PartialEq)]
struct Bin {
    /// Ratio in [`PARTS`], as a bucket -> how many, older ones in part.
    counts: BTreeMap<u16, f64>,
}

impl Bin {
    fn total(&self) -> f64 {
        self.counts.values().sum()
    }

    fn scale(&mut self, by: f64) {
        self.counts.values_mut().for_each(|count| *count *= by);
        self.counts.retain(|_, count| *count > 1e-6);
    }

    /// The logarithm of the ratio that this share of the samples doesn't exceed.
    fn ln_quantile(&self, share: f64) -> Option<f64> {
        let rank = self.total() * share;
        let mut seen = 0.0;
        let reaches = |(_, count): &(&u16, &f64)| {
            seen += **count;
            seen >= rank
        };
        let found = self.counts.iter().find(reaches).or_else(|| self.counts.iter().next_back());
        found.map(|(&index, _)| (bounds_of(index.into()).middle().max(1) as f64 / PARTS).ln())
    }
}

/// What was learnt, as it counts at one load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Learnt {
    /// In the middle of the logarithms of a power of two.
    pub(crate) load: f64,
    /// How many samples count.
    pub(crate) samples: f64,
    /// Samples x the logarithm of the median ratio.
    pub(crate) ln_p50: f64,
    /// The same of the 99th percentile.
    pub(crate) ln_p99: f64,
}

/// Ratios by load.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ByLoad {
    bins: BTreeMap<i32, Bin>,
    at: Option<UnixMillis>,
}

/// The bin of a load: powers of two, from 1 on.
fn bin_of(load: f64) -> i32 {
    if load >= 1.0 { (load.log2() as i32).min(LAST_BIN) } else { 0 }
}

fn decay(ms: u64) -> f64 {
    (-(ms as f64) / HALF_LIFE_MS).exp2()
}

impl ByLoad {
    /// Forgets what is old at `now`, then counts (ratio, how often) at this load.
    pub(crate) fn count(
        &mut self,
        now: UnixMillis,
        load: f64,
        samples: impl IntoIterator<Item = (f64, f64)>,
    ) {
        let factor = self.at.map_or(1.0, |before| decay(now.since(before)));
        self.at = Some(now);
        if factor < 1.0 {
            self.bins.values_mut().for_each(|bin| bin.scale(factor));
            self.bins.retain(|_, bin| !bin.counts.is_empty());
        }
        let mut samples =
            samples.into_iter().filter(|(ratio, count)| ratio.is_finite() && *count > 0.0).peekable();
        if !load.is_finite() || samples.peek().is_none() {
            return;
        }
        let bin = self.bins.entry(bin_of(load)).or_default();
        for (ratio, count) in samples {
            let parts = (ratio * PARTS).clamp(1.0, 1e15) as u64;
            *bin.counts.entry(index_of(parts) as u16).or_default() += count;
        }
        let total = bin.total();
        if total > MOST {
            bin.scale(MOST / total);
        }
    }

    /// What was learnt, at every load that can be told apart, at `now`.
    pub(crate) fn all(&self, now: UnixMillis) -> impl Iterator<Item = Learnt> {
        let fresh = self.at.map_or(1.0, |at| decay(now.since(at)));
        let (first, last) = (self.bins.keys().next().copied(), self.bins.keys().next_back().copied());
        let (first, last) = (first.unwrap_or(0), last.unwrap_or(0));
        (first.saturating_sub(TAIL).max(0)..=(last + TAIL)).map(move |bin| self.at(bin, fresh))
    }

    fn at(&self, at: i32, fresh: f64) -> Learnt {
        let load = (f64::from(at) + 0.5).exp2();
        let mut learnt = Learnt { load, samples: 0.0, ln_p50: 0.0, ln_p99: 0.0 };
        for (&bin, seen) in &self.bins {
            let weight = seen.total() * fresh * PER_DOUBLING.powi((bin - at).abs());
            learnt.samples += weight;
            learnt.ln_p50 += weight * seen.ln_quantile(0.5).unwrap_or(0.0);
            learnt.ln_p99 += weight * seen.ln_quantile(0.99).unwrap_or(0.0);
        }
        learnt
    }
}
