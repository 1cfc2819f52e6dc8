//! What was learnt outlives the forecaster.

use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::*;

const WINDOW_MS: u64 = 1_000;

fn config() -> ForecastConfig {
    ForecastConfig { horizons_ms: vec![2_000, 10_000], min_seen: 20 }
}

fn name(text: &str) -> InstanceName {
    text.parse().unwrap()
}

fn kin(class: &str, identity: &str) -> Kin {
    Kin { class: class.to_owned(), identity: identity.to_owned() }
}

/// A window of an instance that does I/O in three windows of four.
fn show(forecaster: &mut Forecaster, instance: &str, window: u64) {
    let phase = window % 20;
    let busy = |low: f64, high: f64| if phase > 13 { high } else { low };
    let io = !window.is_multiple_of(4);
    forecaster.observe(&Observation {
        instance: &name(instance),
        at: UnixMillis(1_000_000 + window * WINDOW_MS),
        usage: Usage {
            reference_cores: busy(0.1, 0.9),
            memory_bytes: 1e8 + window as f64,
            io_bytes_per_s: Some(if io { 4e6 } else { 0.0 }),
            io_latency_ns: io.then_some(busy(1e5, 9e5)),
            net_in_bytes_per_s: Some(busy(1e3, 2e6)),
            net_out_bytes_per_s: Some(busy(1e4, 1e7)),
            written_bytes_per_s: None,
            volume_operations_per_s: Some(busy(20.0, 900.0)),
            volume_bytes_per_s: Some(busy(1e5, 9e6)),
            port_bytes_per_s: Some(busy(1e4, 1e7)),
        },
    });
}

fn shown(windows: u64) -> Forecaster {
    let mut forecaster = Forecaster::new(config(), WINDOW_MS);
    forecaster.introduce(&name("a"), kin("web", "a"), 7);
    (0..windows).for_each(|window| show(&mut forecaster, "a", window));
    forecaster
}

fn demand(forecaster: &Forecaster, instance: &str, window: u64) -> Option<Demand> {
    forecaster.demand(&name(instance), UnixMillis(1_000_000 + window * WINDOW_MS))
}

fn points(forecaster: &Forecaster, window: u64, resource: Resource) -> Vec<DemandPoint> {
    let points = demand(forecaster, "a", window).unwrap().points;
    points.into_iter().filter(|point| point.resource == resource).collect()
}

#[test]
fn every_resource_that_is_seen_is_forecast_and_no_other() {
    let forecaster = shown(300);
    for resource in Resource::ALL {
        let points = points(&forecaster, 299, resource);
        assert_eq!(points.is_empty(), resource == Resource::Written, "{resource:?}");
        for point in points {
            assert!(matches!(point.evidence, Evidence::Enough { .. }), "{point:?}");
        }
    }
    // The next rise of network traffic is 10 windows after the last low one.
    let mut forecaster = shown(305);
    let out = points(&forecaster, 304, Resource::NetOut);
    assert!(out[1].need.p50 > 5e6 && out[0].need.p50 < 1e5, "{out:?}");
    // A window without a request says nothing of latency: it is no 0, and it does not end the series.
    let before = points(&forecaster, 304, Resource::IoLatency);
    assert!(before[0].need.p50 > 5e4, "{before:?}");
    (305..309).for_each(|window| show(&mut forecaster, "a", window));
    let latency = points(&forecaster, 308, Resource::IoLatency);
    assert!(latency[0].need.p50 > 5e4, "{latency:?}");
}

#[test]
fn a_new_start_goes_on_where_it_was() {
    let mut before = shown(200);
    let mut after = Forecaster::with_state(config(), WINDOW_MS, &before.state(usize::MAX)).unwrap();
    assert_eq!(demand(&after, "a", 199), demand(&before, "a", 199));
    after.introduce(&name("a"), kin("web", "a"), 7);
    // Away for a while: what was not seen counts as unseen, in both.
    for window in 210..260 {
        show(&mut before, "a", window);
        show(&mut after, "a", window);
        assert_eq!(demand(&after, "a", window), demand(&before, "a", window), "{window}");
    }
    let cpu = points(&after, 259, Resource::Cpu);
    assert!(cpu.iter().all(|point| matches!(point.evidence, Evidence::Enough { .. })), "{cpu:?}");
}

#[test]
fn another_life_begins_anew_and_learns_from_the_last_one() {
    let mut forecaster = shown(200);
    forecaster.introduce(&name("a"), kin("web", "a"), 8);
    assert_eq!(demand(&forecaster, "a", 199), None);
    show(&mut forecaster, "a", 200);
    let cpu = points(&forecaster, 200, Resource::Cpu);
    assert!(matches!(cpu[0].evidence, Evidence::TooLittle { .. }), "{cpu:?}");
    assert!(cpu[0].need.p99 > 0.5, "what it was before is known: {cpu:?}");
}

#[test]
fn a_class_learns_from_one_of_it_and_another_class_from_all() {
    let mut forecaster = shown(200);
    for window in 0..200 {
        forecaster.introduce(&name("idle"), kin("batch", "idle"), 1);
        forecaster.observe(&Observation {
            instance: &name("idle"),
            at: UnixMillis(1_000_000 + window * WINDOW_MS),
            usage: Usage { reference_cores: 0.1, memory_bytes: 1e6, ..Usage::default() },
        });
    }
    forecaster.forget_others(|_| false);
    let first = |forecaster: &mut Forecaster, instance: &str, class: &str| {
        forecaster.introduce(&name(instance), kin(class, instance), 1);
        show(forecaster, instance, 300);
        let points = demand(forecaster, instance, 300).unwrap().points;
        points.iter().find(|point| point.resource == Resource::Cpu).unwrap().need.p99
    };
    let (web, batch) = (first(&mut forecaster, "x", "web"), first(&mut forecaster, "y", "batch"));
    assert!(web > 2.0 * batch, "{web} and {batch}");
}

#[test]
fn lessons_go_from_one_to_another() {
    let (teacher, mut pupil) = (shown(200), Forecaster::new(config(), WINDOW_MS));
    let lessons = Lessons::of_state(&teacher.state(usize::MAX)).unwrap();
    assert_eq!(lessons, teacher.lessons(), "also of what runs");
    let sent = serde_json::to_string(&lessons).unwrap();
    pupil.learn(&serde_json::from_str(&sent).unwrap()).unwrap();
    pupil.introduce(&name("b"), kin("web", "b"), 1);
    show(&mut pupil, "b", 300);
    let mut untaught = Forecaster::new(config(), WINDOW_MS);
    show(&mut untaught, "b", 300);
    let p99 = |forecaster| demand(forecaster, "b", 300).unwrap().points[0].need.p99;
    assert!(p99(&pupil) > 3.0 * p99(&untaught), "{} and {}", p99(&pupil), p99(&untaught));

    let newer: Lessons = serde_json::from_str(&sent.replacen("\"version\":1", "\"version\":9", 1)).unwrap();
    assert_eq!(pupil.learn(&newer), Err(StateError::Version(9, 1)));
    let mut other = Forecaster::new(ForecastConfig::default(), WINDOW_MS);
    assert!(matches!(other.learn(&lessons), Err(StateError::OtherLeads(..))));
}

#[test]
fn who_resembles_what_was_here_learns_from_it_whatever_its_class() {
    let mut forecaster = shown(200);
    forecaster.forget(&name("a"));
    // Most of what was here is of another size, and never still.
    for other in 0..6u64 {
        let wild = name(&format!("wild-{other}"));
        forecaster.introduce(&wild, kin("wild", wild.as_str()), 1);
        for window in 200..300 {
            let reference_cores = 8.0 + ((window * 7 + other) % 5) as f64;
            forecaster.observe(&Observation {
                instance: &wild,
                at: UnixMillis(1_000_000 + window * WINDOW_MS),
                usage: Usage { reference_cores, ..Usage::default() },
            });
        }
        forecaster.forget(&wild);
    }
    forecaster.introduce(&name("b"), kin("another", "b"), 1);
    let mut alone = forecaster.begin(Resource::Cpu, &kin("another", "b"));
    for window in 300..312 {
        show(&mut forecaster, "b", window);
        alone.observe(0.1);
    }
    let taught = demand(&forecaster, "b", 311).unwrap().points[1].need;
    let alone = alone.quantiles().nth(1).unwrap();
    // What those did who were never like it counts less.
    assert!(taught.p50 < 0.9 * alone.p50 && taught.p99 > 0.9, "{taught:?} and {alone:?}");
}

#[test]
fn what_is_no_state_is_refused_with_the_reason() {
    let state = shown(60).state(usize::MAX);
    let with = |bytes: &[u8]| Forecaster::with_state(config(), WINDOW_MS, bytes).map(drop);
    assert_eq!(with(&state), Ok(()));
    assert_eq!(with(b"{}"), Err(StateError::NoState));
    let mut newer = state.clone();
    newer[16] = 9;
    assert_eq!(with(&newer), Err(StateError::Version(9, 5)));
    assert_eq!(with(&state[..state.len() - 1]), Err(StateError::Damaged("its checksum differs")));
    assert_eq!(with(&state[..state.len() / 2]), Err(StateError::Damaged("it ends too soon")));
    let other = Forecaster::with_state(ForecastConfig::default(), WINDOW_MS, &state);
    assert!(matches!(other, Err(StateError::OtherLeads(..))));
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut forecaster = Forecaster::new(config(), WINDOW_MS);
    let mut series = Series::new(&[2, 10], 100);
    (0..60).for_each(|window| series.observe(f64::from(window)));
    let lesson = series.teach().unwrap();
    let priors = forecaster.learnt.priors.entry(Resource::Cpu).or_default();
    for number in 0..2_000 {
        priors.learn(&format!("class {number}"), &format!("identity {number}"), &lesson);
    }
    // The one that returns most often stays.
    priors.learn("class 7", "identity 7", &lesson);
    let large = forecaster.state(usize::MAX).len();
    forecaster.introduce(&name("a"), Kin::default(), 1);
    forecaster.forget(&name("a"));
    assert!(forecaster.state(usize::MAX).len() * 3 < large);
    assert_eq!(
        forecaster.learnt.priors[&Resource::Cpu].of("class 7", "identity 7").unwrap().series(),
        1.0 + 2.0 + 2.0
    );
}

#[test]
fn what_is_too_much_is_kept_as_what_it_taught() {
    let whole = shown(200);
    let state = whole.state(whole.state(usize::MAX).len() - 1);
    let mut read = Forecaster::with_state(config(), WINDOW_MS, &state).unwrap();
    assert_eq!(demand(&read, "a", 199), None);
    read.introduce(&name("a"), kin("web", "a"), 7);
    show(&mut read, "a", 200);
    assert!(points(&read, 200, Resource::Cpu)[0].need.p99 > 0.5);
}

#[test]
fn a_clock_that_was_set_back_silences_nothing() {
    let mut forecaster = shown(100);
    for window in 0..30 {
        forecaster.observe(&Observation {
            instance: &name("a"),
            at: UnixMillis(5_000 + window * WINDOW_MS),
            usage: Usage { reference_cores: 3.0, ..Usage::default() },
        });
    }
    let demand = forecaster.demand(&name("a"), UnixMillis(34_000)).unwrap();
    assert!(demand.points[0].need.p50 > 2.5, "{:?}", demand.points[0]);
}

/// The payload's bytes changed at will, with a checksum that fits: what the reader itself has to stand.
fn forged(state: &[u8], changes: &[(usize, u8)], cut: usize) -> Vec<u8> {
    let mut payload = state[28..state.len() - 8].to_vec();
    payload.truncate(payload.len() - cut % payload.len());
    for &(place, byte) in changes {
        let len = payload.len();
        payload[place % len] = byte;
    }
    let mut forged = state[..20].to_vec();
    forged.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    forged.extend_from_slice(&payload);
    forged.extend_from_slice(&xxh3_64(&payload).to_le_bytes());
    forged
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn no_bytes_make_it_fail(
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 0..12),
        cut in prop_oneof![Just(0usize), any::<usize>()],
        junk in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        static STATE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| shown(150).state(usize::MAX));
        let _refused = Forecaster::with_state(config(), WINDOW_MS, &junk);
        let forged = forged(&STATE, &changes, cut);
        if let Ok(lessons) = Lessons::of_state(&forged) {
            prop_assert_eq!(lessons.check(), Ok(()));
        }
        if let Ok(mut read) = Forecaster::with_state(config(), WINDOW_MS, &forged) {
            (150..200).for_each(|window| show(&mut read, "a", window));
            for point in demand(&read, "a", 199).into_iter().flat_map(|demand| demand.points) {
                prop_assert!(point.need.p50 >= 0.0 && point.need.p99 >= point.need.p50, "{:?}", point);
            }
        }
    }
}
