use proptest::prelude::*;
use rswap_common::histogram::index_of;

use super::*;

/// A window in which one instance ran for 0.1 s, and that took so many times as long.
fn takes(of: &mut CoreExperience, at_ms: u64, load: f64, times: f64) {
    assert!(of.window(UnixMillis(at_ms), load, &[Turns { ran_s: 0.1, waited_s: 0.1 * (times - 1.0) }], &[]));
}

fn times_at(of: &CoreExperience, at_ms: u64, load: f64) -> f64 {
    of.curve(UnixMillis(at_ms)).at(load).unwrap().times
}

#[test]
fn nothing_is_known_where_nobody_ran() {
    let mut of = CoreExperience::default();
    assert!(of.curve(UnixMillis(0)).is_empty());
    // Who hardly ran says nothing, however long it waited.
    assert!(!of.window(UnixMillis(0), 0.5, &[Turns { ran_s: 1e-4, waited_s: 5.0 }], &[]));
    assert!(of.curve(UnixMillis(0)).is_empty());
    assert!(of.waits(UnixMillis(0), 0.5).is_none());
}

#[test]
fn it_turns_to_what_is_seen_and_seconds_say_how_sure_it_is() {
    let mut of = CoreExperience::default();
    let mut before = 1.0;
    for round in 0..20 {
        takes(&mut of, round, 1.0, 2.0);
        let now = times_at(&of, round, 1.0);
        assert!(now > before && now < 2.0, "{now} after {before}");
        before = now;
    }
    let point = of.curve(UnixMillis(20)).at(1.0).unwrap();
    // 20 windows of 0.2 s: 400 samples next to 32 of nothing.
    assert!((point.times - 2f64.powf(400.0 / 432.0)).abs() < 0.06, "{point:?}");
    assert!(point.seconds > 3.0 && point.seconds < 4.0, "{point:?}");
}

#[test]
fn full_cores_slow_down_and_free_ones_do_not() {
    let mut of = CoreExperience::default();
    for round in 0..60 {
        takes(&mut of, round * 2, 1.1, 3.0);
        takes(&mut of, round * 2 + 1, 0.2, 1.0);
    }
    assert!(times_at(&of, 120, 1.0) > 2.3);
    assert!(times_at(&of, 120, 0.2) < 1.1);
}

#[test]
fn undisturbed_is_exactly_that() {
    let mut of = CoreExperience::default();
    (0..40).for_each(|round| takes(&mut of, round, 0.5, 1.0));
    assert!((times_at(&of, 40, 0.5) - 1.0).abs() < 1e-9, "{}", times_at(&of, 40, 0.5));
}

#[test]
fn one_window_that_was_bad_changes_little_and_what_is_over_is_forgotten() {
    let mut of = CoreExperience::default();
    (0..40).for_each(|round| takes(&mut of, round, 0.8, 1.0));
    takes(&mut of, 40, 0.8, 9.0);
    assert!(times_at(&of, 40, 0.8) < 1.05);
    (41..100).for_each(|round| takes(&mut of, round, 0.8, 5.0));
    assert!(times_at(&of, 100, 0.8) > 4.0);
    (101..400).for_each(|round| takes(&mut of, round, 0.8, 1.0));
    assert!(times_at(&of, 400, 0.8) < 1.05);
    let hours = 4 * 3_600_000;
    (401..440).for_each(|round| takes(&mut of, round, 0.8, 5.0));
    assert!(of.curve(UnixMillis(hours)).is_empty(), "what is old says nothing any more");
}

#[test]
fn one_bad_window_changes_little_however_many_cores_are_busy() {
    for cores in [1.0, 8.0, 64.0] {
        let mut of = CoreExperience::default();
        let all = |times: f64| [Turns { ran_s: cores, waited_s: cores * (times - 1.0) }];
        (0..40).for_each(|round| assert!(of.window(UnixMillis(round), 0.8, &all(1.0), &[])));
        of.window(UnixMillis(40), 0.8, &all(9.0), &[]);
        assert!(times_at(&of, 40, 0.8) < 1.05, "{} on {cores} cores", times_at(&of, 40, 0.8));
        // Those of one that hardly runs beside it count as much less as ever.
        for round in 41..100 {
            let both = [Turns { ran_s: cores, waited_s: 0.0 }, Turns { ran_s: 0.002, waited_s: 0.2 * cores }];
            of.window(UnixMillis(round), 0.8, &both, &[]);
        }
        assert!(times_at(&of, 100, 0.8) < 1.05, "{} on {cores} cores", times_at(&of, 100, 0.8));
    }
}

#[test]
fn waits_are_times_by_load() {
    let mut of = CoreExperience::default();
    let waits = [(index_of(3_000_000) as u16, 50), (index_of(9_000_000) as u16, 2)];
    of.window(UnixMillis(1), 0.9, &[Turns { ran_s: 0.1, waited_s: 0.1 }], &[&waits]);
    let point = of.waits(UnixMillis(1), 0.9).unwrap();
    assert!((point.p50_us / 3000.0 - 1.0).abs() < 0.08, "{point:?}");
    assert!((point.p99_us / 9000.0 - 1.0).abs() < 0.08, "{point:?}");
}

proptest! {
    /// It is never said to be better than undisturbed, nor worse than the worst that was seen.
    #[test]
    fn it_stays_within_what_was_seen(
        windows in prop::collection::vec((0.0..3.0f64, 0.0..2.0f64, 0.0..4.0f64), 1..60), load in 0.0..4.0f64,
    ) {
        let mut of = CoreExperience::default();
        let mut worst = 1.0f64;
        for (round, &(load, ran_s, waited_s)) in windows.iter().enumerate() {
            if of.window(UnixMillis(round as u64), load, &[Turns { ran_s, waited_s }], &[]) {
                worst = worst.max(((ran_s + waited_s) / ran_s).min(1000.0));
            }
        }
        if let Some(point) = of.curve(UnixMillis(60)).at(load) {
            prop_assert!(point.times >= 1.0 && point.times <= worst * 1.07, "{point:?} of {worst}");
            prop_assert!(point.seconds.is_finite() && point.seconds >= 0.0);
        }
    }
}
