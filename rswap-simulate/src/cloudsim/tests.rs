//! The model's rules, and how policies compare on a made-up day.

use super::*;

/// A made-up day: machines that are mostly quiet, with bursts, and some that are always busy.
fn day(machines: usize, seed: u64) -> Vec<Vec<f64>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut unit = move || random.f64();
    (0..machines)
        .map(|_| {
            let (usual, burst) = (0.02 + 0.2 * unit() * unit(), 0.1 * unit());
            let sample = |unit: &mut dyn FnMut() -> f64| {
                let share = if unit() < burst { 0.6 + 0.4 * unit() } else { usual * (0.5 + unit()) };
                (share * 100.0).round().max(1.0) / 100.0
            };
            (0..SAMPLES).map(|_| sample(&mut unit)).collect()
        })
        .collect()
}

#[test]
fn watts_are_read_off_between_two_measured_points() {
    let center = Center::new(&[]);
    assert_eq!(center.hosts[0].watts(0.0), 86.0);
    assert!((center.hosts[0].watts(0.25) - 94.3).abs() < 1e-9);
    assert_eq!(center.hosts[1].watts(1.0), 135.0);
}

#[test]
fn who_is_oversubscribed_gets_less_in_proportion() {
    let host = &Center::new(&[]).hosts[0];
    let (enough, free) =
        host.allocate(&[(1000.0, false, false), (500.0, true, false), (1000.0, false, true)]);
    assert_eq!((enough, free), (vec![1000.0, 450.0, 100.0], 3720.0 - 1600.0));
    // 2500 is more than a processor has; 1860 + 1860 + 1000 are wanted of 3720.
    let (short, free) =
        host.allocate(&[(2500.0, false, false), (1860.0, false, false), (1000.0, false, false)]);
    assert_eq!((short, free), (vec![1465.0, 1465.0, 788.0], 0.0));
}

#[test]
fn a_machine_that_demands_nothing_leaves() {
    let mut demand = day(8, 1);
    demand[3][100..].fill(0.0);
    let mut quiet = day(8, 1);
    quiet[3][100..].fill(0.01);
    let kwh = |demand: &[Vec<f64>]| run(demand, &mut Ours::new(8)).kwh;
    assert!(kwh(&demand) <= kwh(&quiet));
}

/// Nothing moves: energy is that of the hosts on which machines were started.
#[test]
fn what_stays_costs_what_its_hosts_cost() {
    struct Stay;
    impl Policy for Stay {
        fn boot(&mut self, _: &Center, _: usize) -> Option<usize> {
            Some(1)
        }
        fn tick(&mut self, _: &Center) -> Moves {
            Moves::new()
        }
    }
    let outcome = run(&[vec![0.5; SAMPLES]], &mut Stay);
    // 1250 of 5320 MIPS, from the first tick to the last one at 86,100.1 s.
    let watts = 101.0 + 4.0 * (1250.0 / 532.0 - 2.0);
    assert!((outcome.kwh - watts * 85_800.0 / 3.6e6).abs() < 1e-9, "{outcome:?}");
    assert_eq!((outcome.migrations, outcome.esv), (0, 0.0));
}

#[test]
fn a_day_has_one_outcome() {
    let demand = day(120, 7);
    let twice = || {
        let classic = run(&demand, &mut Classic::new(Detector::LocalRegression(1.2)));
        (classic, run(&demand, &mut Ours::new(demand.len())))
    };
    assert_eq!(twice(), twice());
}

#[test]
fn forecasts_move_less_and_violate_less_at_no_more_energy() {
    for seed in 1..=6 {
        println!("seed {seed}");
        let demand = day(200, seed);
        let classic = |detector| run(&demand, &mut Classic::new(detector));
        let regression = classic(Detector::LocalRegression(1.2));
        let others = [
            classic(Detector::Threshold(0.8)),
            classic(Detector::InterquartileRange(1.5)),
            classic(Detector::MedianDeviation(2.5)),
            regression,
        ];
        let ours = run(&demand, &mut Ours::new(demand.len()));
        let least = |value: fn(&Outcome) -> f64| others.iter().map(value).fold(f64::MAX, f64::min);
        assert!(ours.kwh <= regression.kwh, "{ours:?} {regression:?}");
        assert!(ours.esv <= least(|outcome| outcome.esv) / 4.0, "{ours:?} {others:?}");
        assert!(ours.migrations as f64 <= least(|outcome| outcome.migrations as f64) / 3.0, "{ours:?}");
    }
}
