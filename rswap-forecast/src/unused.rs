//! What an instance has never used.
//!
//! Most of them use few of the resources that are measured: one that computes has no disk and no network, and a series of
//! nothing but zeros takes as much memory, and as long per window, as any other, to learn that nothing follows nothing. So such a
//! series is put away once it forecasts nothing else, and only its windows are counted. With the first amount above 0 it is there again: begun
//! from what is known of its kind by then, and shown as many zeros as it still would know of.

use serde::{Deserialize, Serialize};

use super::{
    Evidence, Prior, Quantiles, Series,
    lead::evidence_of_nothing,
    profile::BLOCK,
    series::{HIGHEST, TEACHES_AFTER},
};

/// One resource of one instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Track {
    /// It was used, or may be soon, as far as its kind tells.
    Used(Box<Series>),
    /// All that was seen of it is zeros.
    Unused(Unused),
}

/// Windows of a resource that nothing was used of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Unused {
    /// As a series has it, and how many of the windows were seen.
    tick: u32,
    seen: u64,
}

impl Track {
    /// Windows went by unseen.
    pub(super) fn skip(&mut self, windows: u64) {
        match self {
            Self::Used(series) => series.skip(windows),
            Self::Unused(unused) => unused.tick = unused.tick.wrapping_add(windows as u32),
        }
    }

    /// Takes in the next window. `begin` makes a series that has seen nothing, from what is known of its kind; `resemble` is called after each
    /// window of a series, as [`crate::Priors::resemble`] wants it.
    pub(super) fn observe(
        &mut self,
        value: f64,
        begin: impl FnOnce() -> Series,
        resemble: impl Fn(&mut Series),
    ) {
        if !(0.0..=HIGHEST).contains(&value) {
            return self.skip(1);
        }
        if let Self::Unused(unused) = self {
            // With its first block it shows what it is like, and those alike may have gone on otherwise.
            if value == 0.0 && unused.seen + 1 != BLOCK as u64 {
                unused.tick = unused.tick.wrapping_add(1);
                unused.seen += 1;
                return;
            }
            let mut series = Box::new(begin());
            series.see_nothing(unused.tick, unused.seen, &resemble);
            *self = Self::Used(series);
        }
        let Self::Used(series) = self else { return };
        series.observe(value);
        resemble(series);
        if let Some((tick, seen)) = series.is_unused() {
            *self = Self::Unused(Unused { tick, seen });
        }
    }

    /// Quantiles and evidence per lead, for these leads in windows.
    pub(super) fn forecasts(&self, leads: &[u64], needed: u64) -> Vec<(Quantiles, Evidence)> {
        match self {
            Self::Used(series) => series.forecasts(needed).collect(),
            Self::Unused(unused) => {
                let of = |&steps| (Quantiles::default(), evidence_of_nothing(steps, unused.seen, needed));
                leads.iter().map(of).collect()
            }
        }
    }

    /// What it can teach; `nothing` is the lesson of one that has seen zeros alone.
    pub(super) fn teach(&self, nothing: Option<&Prior>) -> Option<Prior> {
        match self {
            Self::Used(series) => series.teach(),
            Self::Unused(unused) => nothing.filter(|_| unused.seen >= TEACHES_AFTER).cloned(),
        }
    }

    /// As [`Series::is_sound`].
    pub(super) fn is_sound(&self, leads: &[u64], day: u64) -> bool {
        match self {
            Self::Used(series) => series.is_sound(leads, day),
            Self::Unused(unused) => (1..super::history::MOST).contains(&unused.seen),
        }
    }
}

/// What one can teach that has seen nothing but zeros: that is the same, however many.
pub(super) fn lesson(leads: &[u64], day: u64) -> Option<Prior> {
    let mut series = Series::new(leads, day);
    (0..TEACHES_AFTER).for_each(|_| series.observe(0.0));
    series.teach()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Priors;

    const LEADS: [u64; 4] = [1, 5, 30, 60];
    const DAY: u64 = 86_400;

    fn unused(windows: u64) -> Track {
        let mut track = Track::Used(Box::new(Series::new(&LEADS, DAY)));
        (0..windows).for_each(|_| observe(&mut track, 0.0));
        track
    }

    fn observe(track: &mut Track, value: f64) {
        track.observe(value, || Series::new(&LEADS, DAY), |_| ());
    }

    fn list(quantiles: &Quantiles) -> [f64; 4] {
        [quantiles.p50, quantiles.p90, quantiles.p95, quantiles.p99]
    }

    /// A series that is never put away.
    fn series(windows: u64) -> Series {
        let mut series = Series::new(&LEADS, DAY);
        (0..windows).for_each(|_| series.observe(0.0));
        series
    }

    #[test]
    fn what_is_never_used_is_put_away_and_forecast_as_nothing() {
        for windows in [1, 7, 8, 9, 100, 2_000] {
            let (track, whole) = (unused(windows), series(windows));
            assert!(matches!(track, Track::Unused(_)), "{windows}");
            for (lead, (own, whole)) in
                track.forecasts(&LEADS, 30).into_iter().zip(whole.forecasts(30)).enumerate()
            {
                assert_eq!(own.0, whole.0, "{windows}, lead {lead}");
                // Never more evidence than there would be, and hardly less.
                let seen = |evidence| match evidence {
                    Evidence::TooLittle { seen, .. } => seen,
                    Evidence::Enough { seen, p95_coverage } => {
                        assert_eq!(p95_coverage, 1.0);
                        seen
                    }
                };
                let (own, whole) = (seen(own.1), seen(whole.1));
                assert!(
                    own <= whole && whole <= own + 3 * LEADS[lead].div_ceil(6),
                    "{windows}: {own} of {whole}"
                );
            }
        }
    }

    #[test]
    fn what_it_teaches_is_what_a_series_of_zeros_does() {
        let nothing = lesson(&LEADS, DAY);
        assert!(nothing.is_some());
        assert_eq!(unused(TEACHES_AFTER - 1).teach(nothing.as_ref()), None);
        for windows in [TEACHES_AFTER, 1_000] {
            assert_eq!(unused(windows).teach(nothing.as_ref()), series(windows).teach(), "{windows}");
        }
    }

    #[test]
    fn where_its_kind_uses_much_it_is_not_put_away_before_that_is_forgotten() {
        let mut taught = Priors::default();
        let mut teacher = Series::new(&LEADS, DAY);
        (0..300).for_each(|window: u64| teacher.observe(if window % 50 < 10 { 5e6 } else { 0.0 }));
        taught.learn("web", "other", &teacher.teach().unwrap());
        let prior = taught.of("web", "new").unwrap();
        let begin = || Series::from_prior(&LEADS, DAY, &prior).unwrap();
        let mut track = Track::Used(Box::new(begin()));
        let observe = |track: &mut Track, value| track.observe(value, begin, |_| ());
        (0..4).for_each(|_| observe(&mut track, 0.0));
        assert!(matches!(track, Track::Used(_)));
        assert!(track.forecasts(&LEADS, 30)[3].0.p99 > 0.0);
        (0..2_000).for_each(|_| observe(&mut track, 0.0));
        assert!(matches!(track, Track::Unused(_)));
        // With its first use it remembers whose kind it is of.
        observe(&mut track, 1e6);
        let Track::Used(series) = &track else { panic!("{track:?}") };
        assert!(series.is_sound(&LEADS, DAY) && series.is_unused().is_none());
        // Once used, it is never put away again.
        (0..3_000).for_each(|_| observe(&mut track, 0.0));
        assert!(matches!(track, Track::Used(_)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn what_wakes_goes_on_as_if_it_had_never_slept(
            zeros in prop_oneof![1u64..200, 600u64..700, 2_000u64..2_500],
            later in prop::collection::vec(prop_oneof![Just(0.0), 0.5f64..2.0], 1..40),
        ) {
            let (mut track, mut whole) = (unused(zeros), series(zeros));
            let (mut off, mut count) = (0.0, 0.0);
            for value in [1.0].into_iter().chain(later) {
                observe(&mut track, value);
                whole.observe(value);
                for (own, whole) in track.forecasts(&LEADS, 30).iter().zip(whole.forecasts(30)) {
                    for (own, whole) in list(&own.0).into_iter().zip(list(&whole.0)) {
                        off += (own - whole).abs() / (1.0 + whole);
                        count += 1.0;
                    }
                }
            }
            // As long as all of its windows are seen again, to the last bit. Of more, the kept zeros are in another order, and weigh as much together: a change of
            // the level may be found a window earlier or later.
            let most = if zeros < 600 { 0.0 } else { 0.1 };
            prop_assert!(off / count <= most, "{}", off / count);
            let sound = |track: &Track| track.is_sound(&LEADS, DAY);
            prop_assert!(sound(&track));
        }
    }
}
