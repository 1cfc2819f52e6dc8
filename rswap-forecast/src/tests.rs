//! The forecaster's promises.

use proptest::prelude::*;

use super::*;

const WINDOW_MS: u64 = 250;

fn seen(at_window: u64, reference_cores: f64, memory_bytes: u64) -> Observation<'static> {
    static NAME: std::sync::LazyLock<InstanceName> = std::sync::LazyLock::new(|| "a".parse().unwrap());
    Observation {
        instance: &NAME,
        at: UnixMillis(1_000_000 + at_window * WINDOW_MS),
        usage: Usage { reference_cores, memory_bytes: memory_bytes as f64, ..Usage::default() },
    }
}

fn forecaster() -> Forecaster {
    Forecaster::new(ForecastConfig { horizons_ms: vec![250, 1_000, 2_500, 5_000], min_seen: 20 }, WINDOW_MS)
}

fn demand(forecaster: &Forecaster, window: u64) -> Option<Demand> {
    forecaster.demand(&"a".parse().unwrap(), UnixMillis(1_000_000 + window * WINDOW_MS))
}

fn point(demand: &Demand, resource: Resource, horizon_ms: u64) -> DemandPoint {
    demand.points.iter().find(|p| p.resource == resource && p.horizon_ms == horizon_ms).unwrap().clone()
}

/// Sum of uniforms: near enough to normal, standard deviation 1.
fn noise(random: &mut fastrand::Rng) -> f64 {
    (0..12).map(|_| random.f64()).sum::<f64>() - 6.0
}

/// Idle, with a peak in the last third of each period.
fn daily(window: u64, period: u64) -> f64 {
    if window % period >= period * 2 / 3 { 0.9 } else { 0.1 }
}

#[test]
fn too_little_is_said() {
    let mut forecaster = forecaster();
    assert_eq!(demand(&forecaster, 0), None);
    forecaster.observe(&seen(0, 0.5, 1));
    let cpu = point(&demand(&forecaster, 0).unwrap(), Resource::Cpu, 1_000);
    assert_eq!(cpu.evidence, Evidence::TooLittle { seen: 0, needed: 20 });
    forecaster.forget(&"a".parse().unwrap());
    assert_eq!(demand(&forecaster, 0), None);
}

#[test]
fn a_constant_is_forecast_as_itself() {
    let mut forecaster = forecaster();
    for window in 0..100 {
        forecaster.observe(&seen(window, 0.5, 64 << 20));
    }
    let demand = demand(&forecaster, 99).unwrap();
    let cpu = point(&demand, Resource::Cpu, 2_500);
    assert!((cpu.need.p50 - 0.5).abs() < 1e-9 && (cpu.need.p99 - 0.5).abs() < 1e-9, "{cpu:?}");
    assert!(matches!(cpu.evidence, Evidence::Enough { p95_coverage: 1.0, .. }), "{cpu:?}");
    assert!((point(&demand, Resource::Memory, 250).need.p95 - f64::from(64 << 20)).abs() < 1.0);
}

#[test]
fn a_repeated_rise_is_forecast_before_it_comes() {
    let seed = 7;
    println!("seed {seed}");
    for period in [20, 36, 60] {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut forecaster = forecaster();
        // The third rise: two periods have been seen, and a part of the third.
        let rise = 2 * period + period * 2 / 3;
        for window in 0..rise - 5 {
            forecaster.observe(&seen(
                window,
                (daily(window, period) + 0.02 * noise(&mut random)).max(0.0),
                1 << 20,
            ));
        }
        let demand = demand(&forecaster, rise - 6).unwrap();
        // 2.5 s ahead the peak is there, 1 s ahead it is not.
        let (soon, later) = (point(&demand, Resource::Cpu, 1_000), point(&demand, Resource::Cpu, 2_500));
        assert!(later.need.p95 > 0.7, "period {period}: {later:?}");
        assert!(later.need.p50 > 0.6, "period {period}: {later:?}");
        assert!(soon.need.p50 < 0.4, "period {period}: {soon:?}");
    }
}

#[test]
fn p95_covers_95_percent_of_a_noisy_season() {
    let seed = 20_261_123;
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut forecaster = forecaster();
    for window in 0..4_000u64 {
        let phase = window as f64 / 48.0 * std::f64::consts::TAU;
        let value = 1.0 + 0.6 * phase.sin() + 0.1 * noise(&mut random);
        forecaster.observe(&seen(window, value.max(0.0), 1 << 20));
    }
    for horizon_ms in [250, 1_000, 2_500, 5_000] {
        let cpu = point(&demand(&forecaster, 3_999).unwrap(), Resource::Cpu, horizon_ms);
        let Evidence::Enough { p95_coverage, .. } = cpu.evidence else { panic!("{cpu:?}") };
        // Stated tolerance: 1.5 points.
        assert!((p95_coverage - 0.95).abs() <= 0.015, "{horizon_ms} ms: {p95_coverage}");
        // Coverage bought with width would be worth nothing: the noise's p95 - p50 is 0.16.
        assert!(cpu.need.p95 - cpu.need.p50 < 0.4, "{horizon_ms} ms: {cpu:?}");
    }
}

#[test]
fn gaps_do_not_shift_the_season() {
    let period = 20;
    let mut forecaster = forecaster();
    let rise = 5 * period + period * 2 / 3;
    for window in (0..rise - 5).filter(|window| !(70..78).contains(window)) {
        forecaster.observe(&seen(window, daily(window, period), 1 << 20));
    }
    let later = point(&demand(&forecaster, rise - 6).unwrap(), Resource::Cpu, 2_500);
    assert!(later.need.p95 > 0.7, "{later:?}");
}

#[test]
fn what_is_seen_in_few_windows_is_forecast_and_judged_by_those() {
    // Of longer leads not every window is judged: looks must not keep their step.
    const APART: u64 = 257;
    let mut forecaster = forecaster();
    let points = |forecaster: &Forecaster, window| {
        let demand = demand(forecaster, window).unwrap();
        [250, 1_000, 2_500, 5_000].map(|horizon_ms| point(&demand, Resource::Written, horizon_ms))
    };
    for window in 0..40 * APART {
        let mut seen = seen(window, 0.5, 1 << 20);
        let amount = [20e6, 30e6][(window / APART % 2) as usize];
        seen.usage.written_bytes_per_s = window.is_multiple_of(APART).then_some(amount);
        forecaster.observe(&seen);
        if window == APART / 2 {
            for point in points(&forecaster, window) {
                assert!((19e6..21e6).contains(&point.need.p50), "{point:?}");
                assert_eq!(point.evidence, Evidence::TooLittle { seen: 0, needed: 20 });
            }
        }
    }
    for point in points(&forecaster, 40 * APART - 1) {
        assert!((19e6..31e6).contains(&point.need.p50) && point.need.p95 < 45e6, "{point:?}");
        assert!(matches!(point.evidence, Evidence::Enough { .. }), "{point:?}");
    }
}

#[test]
fn windows_that_are_not_quite_regular_are_one_series() {
    let mut forecaster = forecaster();
    for window in 0..60 {
        let jitter = [0, 3, 250 / 3, 1][window as usize % 4];
        let mut late = seen(window, 0.5, 1);
        late.at.0 += jitter;
        forecaster.observe(&late);
    }
    let cpu = point(&demand(&forecaster, 60).unwrap(), Resource::Cpu, 1_000);
    assert!(matches!(cpu.evidence, Evidence::Enough { seen: 40.., .. }), "{cpu:?}");
}

#[test]
fn what_was_not_seen_for_long_is_not_forecast() {
    let mut forecaster = forecaster();
    forecaster.observe(&seen(0, 0.5, 1));
    assert!(demand(&forecaster, 5).is_some());
    assert!(demand(&forecaster, 50).is_none());
}

#[test]
fn an_instance_that_returns_is_known() {
    for seed in 0..40 {
        let mut forecaster = forecaster();
        // Four windows in five are quiet, and nothing says which.
        let mut random = fastrand::Rng::with_seed(seed);
        for window in 0..400 {
            let need = if random.f64() < 0.2 { 1.5 } else { 0.2 };
            forecaster.observe(&seen(window, need, 1 << 20));
        }
        forecaster.forget(&"a".parse().unwrap());
        assert_eq!(demand(&forecaster, 400), None);
        (1_001..1_004).for_each(|window| forecaster.observe(&seen(window, 0.2, 1 << 20)));
        let cpu = point(&demand(&forecaster, 1_003).unwrap(), Resource::Cpu, 1_000);
        let Quantiles { p50, p95, p99, .. } = cpu.need;
        assert!((1.4..1.7).contains(&p99) && p95 > 1.2 && p50 < 1.0, "seed {seed}: {cpu:?}");
        assert!(
            matches!(cpu.evidence, Evidence::TooLittle { .. }),
            "it is not believed before it is judged: {cpu:?}"
        );
    }
}

#[test]
fn who_runs_teaches_newcomers_of_its_class_and_no_others() {
    let mut forecaster = forecaster();
    let kin = |class: &str, identity: &str| Kin { class: class.into(), identity: identity.into() };
    let mut show = |name: &str, class: &str, windows: std::ops::Range<u64>, cores: f64| {
        let name: InstanceName = name.parse().unwrap();
        forecaster.introduce(&name, kin(class, name.as_str()), 1);
        for window in windows {
            forecaster.observe(&Observation { instance: &name, ..seen(window, cores, 1 << 30) });
        }
        let now = UnixMillis(1_000_000 + 101 * WINDOW_MS);
        let points = forecaster.demand(&name, now).unwrap().points;
        points.into_iter().find(|p| p.resource == Resource::Cpu && p.horizon_ms == 1_000).unwrap().need
    };
    for (name, cores) in [("b", 2.0), ("c", 0.0), ("d", 2.0), ("e", 0.0)] {
        show(name, "app=shop", 0..100, cores);
    }
    let (new, stranger) = (show("f", "app=shop", 100..101, 0.05), show("g", "app=other", 100..101, 0.05));
    assert!((1.8..2.6).contains(&new.p99), "{new:?}");
    assert!(stranger.p99 < 0.1, "{stranger:?}");
    // Nor does who has no class.
    show("h", "", 0..100, 3.0);
    let nameless = show("i", "", 100..101, 0.05);
    assert!(nameless.p99 < 0.1, "{nameless:?}");
    // It shows in its first windows that it is one of those that idle, and goes on to be taken for one.
    let idle = show("f", "app=shop", 101..160, 0.05);
    assert!(idle.p99 < 0.5, "{idle:?}");
}

#[test]
fn what_returns_smaller_is_believed_in_the_end() {
    let mut forecaster = forecaster();
    (0..400).for_each(|window| forecaster.observe(&seen(window, 3.0, 1 << 20)));
    forecaster.forget(&"a".parse().unwrap());
    (1_001..1_102).for_each(|window| forecaster.observe(&seen(window, 0.2, 1 << 20)));
    let cpu = point(&demand(&forecaster, 1_101).unwrap(), Resource::Cpu, 1_000);
    assert!(cpu.need.p99 < 0.5, "{cpu:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn quantiles_are_ordered_amounts_whatever_is_seen(
        windows in prop::collection::vec((0u64..700, any::<f64>(), 0.0..4.0f64, any::<u64>(), 0u8..8), 1..150),
    ) {
        let mut forecaster = forecaster();
        let mut at = 0;
        for (gap, wild, tame, bytes, kind) in windows {
            at += if kind == 0 { gap } else { 1 };
            // Above this, sums of squares overflow, and no machine has so many cores.
            let cores = if kind == 1 { wild } else { tame };
            let cores = if cores.abs() > 1e100 { f64::NAN } else { cores };
            forecaster.observe(&seen(at, cores, bytes));
            let demand = demand(&forecaster, at).unwrap();
            for DemandPoint { need, .. } in demand.points {
                let ordered = [0.0, need.p50, need.p90, need.p95, need.p99, f64::MAX];
                prop_assert!(ordered.windows(2).all(|pair| pair[0] <= pair[1]), "{need:?}");
            }
        }
    }
}

/// A short day as of a service: idle, busy, and a peak of a sixth of it; windows jitter, and so does the need.
#[test]
fn the_third_peak_of_a_short_day_is_known_before_it_comes() {
    const DAY: u64 = 48;
    for seed in 1..=8 {
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut forecaster = forecaster();
        let need = |window: u64, noise: f64| {
            let base = match window % DAY {
                16..=33 => 0.30,
                36..=43 => 0.80,
                34..=35 => 0.55,
                _ => 0.05,
            };
            (base * (1.0 + 0.06 * noise)).max(0.0)
        };
        let peak = 2 * DAY + 36;
        for window in 0..peak - 3 {
            let mut late = seen(window, need(window, noise(&mut random)), 1 << 20);
            late.at.0 += (random.f64() * 20.0) as u64;
            forecaster.observe(&late);
        }
        // 10 windows ahead is in the peak; the busy hours before it are not taken for it.
        let demand = demand(&forecaster, peak - 4).unwrap();
        let ahead = point(&demand, Resource::Cpu, 2_500);
        assert!(ahead.need.p95 > 0.7, "{ahead:?}");
        let next = point(&demand, Resource::Cpu, 250);
        assert!(next.need.p50 < 0.6, "{next:?}");
    }
}
