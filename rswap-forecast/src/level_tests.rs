//! How soon a changed level is noticed and followed, and that noise is not taken for one.

use proptest::prelude::*;

use super::{Series, level::Level};

const LEADS: [u64; 2] = [1, 6];
const DAY: u64 = 288;

/// Sum of uniforms: near enough to normal, standard deviation 1.
fn noise(random: &mut fastrand::Rng) -> f64 {
    (0..12).map(|_| random.f64()).sum::<f64>() - 6.0
}

/// Noise around 1, of which each window resembles the one before.
fn stationary(seed: u64, alike: f64) -> impl Iterator<Item = f64> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut off = 0.0;
    std::iter::repeat_with(move || {
        off = alike * off + (1.0 - alike * alike).sqrt() * noise(&mut random);
        off
    })
}

/// Windows after a step until it is noticed, and until the medians of both leads stay within a tenth of the new level for ten windows.
fn followed(seed: u64, (before, after): (f64, f64)) -> (u64, [u64; 2]) {
    let mut series = Series::new(&LEADS, DAY);
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..600 {
        series.observe(before * (1.0 + 0.05 * noise(&mut random)));
    }
    assert_eq!(series.level_changed_windows_ago(), None, "seed {seed}: nothing has changed yet");
    let (mut noticed, mut away) = (None, [0; 2]);
    for window in 1..=60 {
        series.observe(after * (1.0 + 0.05 * noise(&mut random)));
        if noticed.is_none() && series.level_changed_windows_ago().is_some() {
            noticed = Some(window);
        }
        for (away, quantiles) in away.iter_mut().zip(series.quantiles()) {
            if (quantiles.p50 / after - 1.0).abs() > 0.1 && window <= *away + 10 {
                *away = window;
            }
        }
    }
    let ago = series.level_changed_windows_ago().unwrap();
    assert!((57..=70).contains(&ago), "seed {seed}: it began 60 windows ago, not {ago}");
    (noticed.unwrap(), away.map(|away| away + 1))
}

fn median(mut numbers: Vec<u64>) -> u64 {
    numbers.sort_unstable();
    numbers[numbers.len() / 2]
}

#[test]
fn a_step_is_noticed_in_three_windows_and_followed_in_some_more() {
    for step in [(1.0, 4.0), (4.0, 1.0), (1.0, 1.6)] {
        let all: Vec<_> = (1..=20).map(|seed| followed(seed, step)).collect();
        println!("{step:?}: {all:?}");
        assert!(all.iter().all(|(noticed, _)| *noticed <= 6), "{step:?}: {all:?}");
        let [near, far] = [0, 1].map(|lead| median(all.iter().map(|(_, followed)| followed[lead]).collect()));
        assert!(near <= 12 && far <= 40, "{step:?}: {near} and {far} windows");
    }
}

#[test]
fn outcomes_of_the_old_level_are_forgotten_with_it() {
    let seed = 3;
    let mut series = Series::new(&LEADS, DAY);
    let mut random = fastrand::Rng::with_seed(seed);
    (0..600).for_each(|_| series.observe(4.0 * (1.0 + 0.05 * noise(&mut random))));
    (0..40).for_each(|_| series.observe(1.0 * (1.0 + 0.05 * noise(&mut random))));
    let next = series.quantiles().next().unwrap();
    assert!(next.p95 < 2.0, "the old level was 4: {next:?}");
}

/// The stated rate: of stationary noise, less than one window in ten thousand looks like a change; where neighbours are very
/// alike and the tail is heavy, one in two thousand.
#[test]
fn stationary_noise_is_no_change() {
    for (name, alike) in [("white", 0.0), ("half alike", 0.5), ("very alike", 0.95)] {
        for heavy in [false, true] {
            let mut alarms = 0;
            for seed in 1..=10 {
                let mut level = Level::default();
                let values = stationary(seed, alike).take(10_000);
                alarms += values
                    .filter(|&off| level.learn(if heavy { (0.5 * off).exp() } else { off } as f32))
                    .count();
            }
            let most = if heavy && alike > 0.9 { 50 } else { 10 };
            assert!(alarms < most, "{name}, heavy {heavy}: {alarms} in 100,000 windows");
        }
    }
}

#[test]
fn what_was_not_seen_for_long_has_no_level() {
    let mut series = Series::new(&LEADS, DAY);
    (0..50).for_each(|_| series.observe(1.0));
    (0..10).for_each(|_| series.observe(9.0));
    assert_eq!(series.level_changed_windows_ago(), Some(9));
    series.skip(5);
    assert_eq!(series.level_changed_windows_ago(), Some(14));
    series.skip(5_000);
    assert_eq!(series.level_changed_windows_ago(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_step_of_six_deviations_is_noticed_with_its_beginning(
        seed in any::<u64>(),
        calm in 150u32..400,
        size in 6.0..60.0f32,
        up in any::<bool>(),
        spread in 0.01..0.5f32,
    ) {
        let mut level = Level::default();
        let mut random = fastrand::Rng::with_seed(seed);
        let mut next = |at: f32| level.learn(3.0 + spread * (at + noise(&mut random) as f32)).then(|| level.changed_windows_ago());
        for _ in 0..calm {
            prop_assert_eq!(next(0.0), None);
        }
        let to = if up { size } else { -size };
        let found = (1..=8).find_map(|window| Some((window, next(to)??)));
        let Some((window, ago)) = found else { return Err(TestCaseError::fail("not noticed in eight windows")) };
prop_assert!(ago + 2 >= window && ago <= window + 20, "{window} windows after it began it was noticed, and taken for {ago} old");
    }

    #[test]
    fn no_position_breaks_it(positions in prop::collection::vec(prop_oneof![-16.0..16.0f32, Just(0.0)], 1..300)) {
        let mut level = Level::default();
        for position in positions {
            level.learn(position);
            prop_assert!(level.mean().is_finite() && level.mean().abs() <= 16.1, "{level:?}");
        }
    }
}
