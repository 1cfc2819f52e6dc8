//! What instances teach each other.

use proptest::prelude::*;

use super::{Prior, PriorError, Priors, Quantiles, Series};

const LEADS: [u64; 2] = [1, 6];
const DAY: u64 = 288;

/// Mostly quiet, with a burst now and then.
fn bursty(seed: u64, size: f64) -> impl Iterator<Item = f64> {
    let mut state = seed;
    (0..400).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let unit = (state >> 11) as f64 / (1u64 << 53) as f64;
        size * if unit > 0.85 { 5.0 } else { 1.0 + 0.1 * unit }
    })
}

fn taught_by(seeds: std::ops::Range<u64>) -> Priors {
    let mut priors = Priors::default();
    for seed in seeds {
        let mut series = Series::new(&LEADS, DAY);
        bursty(seed, 2.0).for_each(|value| series.observe(value));
        priors.learn("web", &format!("shop-{seed}"), &series.teach().unwrap());
    }
    priors
}

fn after(prior: &Prior, values: &[f64]) -> Quantiles {
    let mut series = Series::from_prior(&LEADS, DAY, prior).unwrap();
    values.iter().for_each(|&value| series.observe(value));
    series.quantiles().next().unwrap()
}

#[test]
fn a_new_instance_knows_the_bursts_of_its_kind() {
    let prior = taught_by(1..4).of("web", "new").unwrap();
    let quiet = [2.0, 2.1, 2.0];
    let mut alone = Series::new(&LEADS, DAY);
    quiet.iter().for_each(|&value| alone.observe(value));
    assert!(alone.quantiles().next().unwrap().p99 < 4.0);
    let taught = after(&prior, &quiet);
    assert!(taught.p99 > 4.0 && taught.p50 < 4.0, "{taught:?}");
}

#[test]
fn a_series_that_has_seen_little_teaches_nothing() {
    let mut series = Series::new(&LEADS, DAY);
    bursty(1, 1.0).take(20).for_each(|value| series.observe(value));
    assert_eq!(series.teach(), None);
}

#[test]
fn the_nearer_kin_counts_more() {
    let mut priors = taught_by(1..4);
    let mut other = Series::new(&LEADS, DAY);
    (0..400).for_each(|_| other.observe(900.0));
    for identity in ["x", "y", "z"] {
        priors.learn("batch", identity, &other.teach().unwrap());
    }
    let median = |class: &str| after(&priors.of(class, "new").unwrap(), &[]);
    assert_eq!(median("web"), Quantiles::default(), "nothing is forecast of what was never seen");
    let (web, batch) = (priors.of("web", "new").unwrap(), priors.of("batch", "new").unwrap());
    let first = |prior: &Prior| after(prior, &[30.0]).p99;
    assert!(first(&batch) > first(&web), "{} and {}", first(&batch), first(&web));
}

#[test]
fn what_was_learnt_is_stored_merged_and_checked() {
    let mut here = taught_by(1..3);
    let there = taught_by(3..6);
    let stored = serde_json::to_string(&there).unwrap();
    let read: Priors = serde_json::from_str(&stored).unwrap();
    assert_eq!(read, there);
    here.merge(&read);
    let all = here.of("unknown", "unknown").unwrap();
    assert_eq!(here.of("web", "shop-4").unwrap().series(), 1.0 + 3.0 + 1.0);
    assert_eq!(all.check(3), Err(PriorError::Leads(2, 3)));
    let json = serde_json::to_string(&all).unwrap();
    let newer: Prior = serde_json::from_str(&json.replace("\"version\":4", "\"version\":7")).unwrap();
    assert_eq!(newer.check(2), Err(PriorError::Version(7)));
    assert!(Series::from_prior(&LEADS, DAY, &newer).is_err());
}

/// Slowly up and down.
fn swinging(size: f64) -> impl Iterator<Item = f64> {
    (0..400).map(move |window| size * (1.0 + 0.5 * (f64::from(window) / 5.0).sin()))
}

/// Bursty and swinging series of one size, whose names say nothing.
fn nameless() -> Priors {
    let mut priors = Priors::default();
    for seed in 1..5 {
        let mut learn = |name: String, values: &mut dyn Iterator<Item = f64>| {
            let mut series = Series::new(&LEADS, DAY);
            values.for_each(|value| series.observe(value));
            priors.learn("", &name, &series.teach().unwrap());
        };
        learn(format!("a{seed}"), &mut bursty(seed, 2.0));
        learn(format!("b{seed}"), &mut swinging(2.0 + 0.1 * seed as f64));
    }
    priors
}

#[test]
fn who_has_the_same_profile_teaches_more_than_the_rest() {
    let priors = nameless();
    let learns = |resembles: bool, values: &mut dyn Iterator<Item = f64>| {
        let mut series = Series::from_prior(&LEADS, DAY, &priors.of("", "new").unwrap()).unwrap();
        for value in values.take(10) {
            series.observe(value);
            if resembles {
                priors.resemble("", "new", &mut series);
            }
        }
        series.quantiles().next().unwrap()
    };
    // After ten windows of its swing, what bursts have taught is gone.
    let (alone, alike) = (learns(false, &mut swinging(2.0)), learns(true, &mut swinging(2.0)));
    assert!(alike.p99 < alone.p99, "{alike:?} and {alone:?}");
}

#[test]
fn it_sees_again_what_it_saw() {
    let priors = nameless();
    let mut series = Series::new(&LEADS, DAY);
    for value in swinging(3.0).take(8) {
        series.observe(value);
    }
    let before = series.clone();
    priors.resemble("", "new", &mut series);
    let (was, is) = (before.quantiles().next().unwrap(), series.quantiles().next().unwrap());
    assert_ne!(was, is, "it has learnt");
    assert!((is.p50 / was.p50 - 1.0).abs() < 0.5, "{was:?} and {is:?}: it is still itself");
    series.observe(3.0);
    let after = series.quantiles().next();
    priors.resemble("", "new", &mut series);
    assert_eq!(series.quantiles().next(), after, "only once");
}

#[test]
fn kinds_of_profile_are_bounded_and_merged() {
    let learn = |sizes: std::ops::Range<i32>| {
        let mut priors = Priors::default();
        for size in sizes {
            let mut series = Series::new(&LEADS, DAY);
            bursty(size as u64, 10f64.powi(size)).for_each(|value| series.observe(value));
            priors.learn("", "", &series.teach().unwrap());
        }
        priors
    };
    let kinds = |priors: &Priors| serde_json::to_value(priors).unwrap()["kinds"].as_array().unwrap().len();
    let (mut here, there) = (learn(-4..8), learn(8..20));
    assert_eq!((kinds(&here), kinds(&there)), (12, 12), "sizes that differ tenfold are kinds of their own");
    here.merge(&there);
    assert_eq!(kinds(&here), 16);
    let series: f64 = serde_json::to_value(&here).unwrap()["kinds"]
        .as_array()
        .unwrap()
        .iter()
        .map(|kind| kind["series"].as_f64().unwrap())
        .sum();
    assert_eq!(series, 24.0, "nothing that was learnt is lost");
}

#[test]
fn what_another_release_taught_gives_way() {
    let mut priors = taught_by(1..3);
    let json = serde_json::to_string(&priors).unwrap().replace("\"version\":4", "\"version\":1");
    let mut older: Priors = serde_json::from_str(&json).unwrap();
    assert_eq!(older.of("web", "x").unwrap().check(2), Err(PriorError::Version(1)));
    older.merge(&priors);
    assert_eq!(older.of("web", "shop-1").unwrap().check(2), Ok(()));
    priors.merge(&older);
    assert_eq!(priors.of("web", "shop-1").unwrap().check(2), Ok(()));
}

/// A class of which each member stays near its level.
fn class_of(levels: &[f64]) -> Priors {
    let mut priors = Priors::default();
    for (member, level) in levels.iter().enumerate() {
        let mut random = fastrand::Rng::with_seed(member as u64);
        let mut series = Series::new(&LEADS, DAY);
        (0..100).for_each(|_| series.observe(level * (0.97 + 0.06 * random.f64())));
        priors.learn("web", &format!("shop-{member}"), &series.teach().unwrap());
    }
    priors
}

/// What a newcomer of the class is forecast after its first window.
fn newcomer(priors: &Priors, first: f64) -> Quantiles {
    after(&priors.of("web", "new").unwrap(), &[first])
}

#[test]
fn who_idles_does_not_spoil_its_class() {
    for first in [0.0, 0.05, 2.0] {
        let band = newcomer(&class_of(&[0.0, 0.0, 2.0, 2.0]), first);
        assert!((1.8..2.6).contains(&band.p99), "after {first}: {band:?}");
    }
    // Half of a class of busy ones say no more than all of them.
    let (half, all) = (newcomer(&class_of(&[0.0, 2.0]), 2.0), newcomer(&class_of(&[2.0, 2.0]), 2.0));
    assert!((1.8..2.2).contains(&half.p50) && (1.8..2.2).contains(&all.p50), "{half:?} and {all:?}");
}

#[test]
fn large_strangers_say_nothing_of_a_class_that_is_known() {
    let mut priors = class_of(&[0.0, 0.0, 2.0, 2.0]);
    let mut large = Series::new(&LEADS, DAY);
    (0..100).for_each(|_| large.observe(64.0));
    (0..8).for_each(|i| priors.learn("batch", &format!("job-{i}"), &large.teach().unwrap()));
    let band = newcomer(&priors, 0.05);
    assert!((1.8..2.6).contains(&band.p99), "{band:?}");
}

#[test]
fn what_its_class_can_do_is_forgotten_by_who_does_not() {
    let priors = class_of(&[0.0, 0.0, 2.0, 2.0]);
    let band = after(&priors.of("web", "new").unwrap(), &[0.1; 60]);
    assert!(band.p99 < 0.5, "{band:?}");
}

fn level() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), 0.0..1e-4f64, 0.1..10.0f64]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_first_band_holds_what_members_use_and_no_multiple_of_it(
        levels in prop::collection::vec(level(), 1..8),
        busy in 0.1..10.0f64,
        at in any::<prop::sample::Index>(),
        idle in 0usize..4,
    ) {
        let mut members: Vec<f64> = [levels, vec![busy]].concat();
        let first = members[at.index(members.len())];
        let most = members.iter().copied().fold(0.0, f64::max);
        for _ in 0..2 {
            let band = newcomer(&class_of(&members), first);
            prop_assert!(band.p99 >= 0.9 * most && band.p99 <= 1.6 * most, "{members:?}, {first}: {band:?}");
            // And once more with members that do nothing.
            members.extend(vec![0.0; idle]);
        }
    }

    #[test]
    fn lessons_are_the_same_in_whatever_order_they_come(
        levels in prop::collection::vec(level(), 2..8),
        by in 1usize..8,
    ) {
        let each: Vec<Priors> = levels.iter().map(|&level| class_of(&[level])).collect();
        let merged = |order: &mut dyn Iterator<Item = &Priors>| {
            order.fold(Priors::default(), |mut all, one| {
                all.merge(one);
                all
            })
        };
        let by = by % each.len();
        let (one, other) = (merged(&mut each.iter()), merged(&mut each[by..].iter().chain(&each[..by]).rev()));
        let (one, other) = (newcomer(&one, 1.0), newcomer(&other, 1.0));
        for (a, b) in [(one.p50, other.p50), (one.p95, other.p95), (one.p99, other.p99)] {
            prop_assert!((a - b).abs() <= 1e-3 * (a + b), "{one:?} and {other:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn whatever_teaches_and_whatever_follows_quantiles_are_ordered_amounts(
        lesson in prop::collection::vec(prop_oneof![0.0..1e9f64, Just(0.0), Just(f64::NAN), 0.0..1.0f64], 60..200),
        values in prop::collection::vec(prop_oneof![0.0..1e9f64, Just(0.0), any::<f64>()], 1..60),
    ) {
        let mut teacher = Series::new(&LEADS, DAY);
        lesson.iter().for_each(|&value| teacher.observe(value));
        let Some(prior) = teacher.teach() else { return Ok(()) };
        let mut priors = Priors::default();
        priors.learn("a", "b", &prior);
        let prior = priors.of("a", "b").unwrap();
        prop_assert_eq!(prior.check(LEADS.len()), Ok(()));
        let mut series = Series::from_prior(&LEADS, DAY, &prior).unwrap();
        for value in values {
            series.observe(value);
            priors.resemble("a", "c", &mut series);
            for q in series.quantiles() {
                let ordered = [0.0, q.p50, q.p90, q.p95, q.p99, f64::MAX];
                prop_assert!(ordered.windows(2).all(|pair| pair[0] <= pair[1]), "{q:?}");
            }
        }
    }
}
