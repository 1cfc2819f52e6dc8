use proptest::prelude::*;
use rswap_common::histogram::index_of;
use rswap_types::LatencyCurve;

use super::*;
use crate::by_load::{HALF_LIFE_MS, PARTS};

const DISK: Unloaded = Unloaded { read_us: 80.0, write_us: 120.0, p99_ratio: 3.0, bytes_per_s: 100e6 };

fn histogram(us: f64, count: u64) -> Vec<(u16, u64)> {
    vec![(index_of((us * 1e3) as u64) as u16, count)]
}

/// So many writes of 4 KiB in a window, each as long as `us`, at this load.
fn writes(of: &mut Experience, at_ms: u64, load: f64, us: f64, count: u64) {
    let latency_ns = histogram(us, count);
    let requests = [Requests { writes: true, bytes: count * 4096, latency_ns: &latency_ns }];
    of.window(UnixMillis(at_ms), Some(DISK), load, &requests);
}

fn curve(of: &Experience, at_ms: u64) -> LatencyCurve {
    LatencyCurve { reference_us: DISK.mean_us(), points: of.curve(UnixMillis(at_ms)) }
}

fn near(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 0.08, "{found}, not {expected}");
}

#[test]
fn without_experience_it_is_as_calibrated_at_any_load() {
    let mut of = Experience::default();
    of.window(UnixMillis(5), Some(DISK), 50.0, &[]);
    for load in [0.0, 3.0, 1e5] {
        let point = curve(&of, 9).at(load).unwrap();
        assert!((point.p50_us - 100.0).abs() < 1e-6 && (point.p99_us - 300.0).abs() < 1e-6, "{point:?}");
        assert!(!point.is_experienced());
    }
}

#[test]
fn a_few_requests_outweigh_calibration_gradually() {
    let mut of = Experience::default();
    let mut before = 100.0;
    for round in 1..=8 {
        writes(&mut of, round, 50.0, 1200.0, 16);
        let now = curve(&of, round).at(45.0).unwrap().p50_us;
        assert!(now > before, "{now} after {before}");
        before = now;
    }
    // Ten times as slow as it was calibrated; 128 requests weigh four times as much as that.
    near(before, 100.0 * 10f64.powf(0.8));
    for round in 9..200 {
        writes(&mut of, round, 50.0, 1200.0, 16);
    }
    let point = curve(&of, 200).at(45.0).unwrap();
    near(point.p50_us, 1000.0 * 0.87);
    assert!(point.is_experienced());
}

#[test]
fn a_loaded_disk_is_slow_at_its_load_and_not_at_another() {
    let mut of = Experience::default();
    for round in 0..100 {
        writes(&mut of, round * 2, 40.0, 120.0, 20);
        writes(&mut of, round * 2 + 1, 6000.0, 12_000.0, 20);
    }
    let curve = curve(&of, 200);
    near(curve.at(45.0).unwrap().p50_us, 100.0);
    assert!(curve.at(5800.0).unwrap().p50_us > 5_000.0);
    let between = curve.at(1000.0).unwrap().p50_us;
    assert!(between > 150.0 && between < 5_000.0, "{between}");
}

#[test]
fn what_becomes_fast_again_is_known_to_be_after_some_requests() {
    let mut of = Experience::default();
    (0..200).for_each(|round| writes(&mut of, round, 50.0, 24_000.0, 20));
    (200..300).for_each(|round| writes(&mut of, round, 50.0, 120.0, 20));
    near(curve(&of, 300).at(45.0).unwrap().p50_us, 100.0);
}

#[test]
fn size_and_direction_are_reckoned_with() {
    let mut of = Experience::default();
    let one = |bytes: u64, us: f64| Unloaded { ..DISK }.us(true, bytes as f64) / us;
    assert!((one(4096, 120.0) - 1.0).abs() < 1e-9);
    // A MiB at 100 MB/s takes ten milliseconds: that is no slowness.
    for round in 0..50 {
        let (large, small) = (histogram(10_560.0, 10), histogram(80.0, 10));
        let requests = [
            Requests { writes: true, bytes: 10 << 20, latency_ns: &large },
            Requests { writes: false, bytes: 10 << 12, latency_ns: &small },
        ];
        of.window(UnixMillis(round), Some(DISK), 50.0, &requests);
    }
    near(curve(&of, 50).at(45.0).unwrap().p50_us, 100.0);
}

#[test]
fn what_is_old_is_forgotten_and_another_calibration_begins_anew() {
    let mut of = Experience::default();
    (0..100).for_each(|round| writes(&mut of, round, 50.0, 12_000.0, 20));
    assert!(curve(&of, 100).at(45.0).unwrap().p50_us > 5_000.0);
    let later = 100 + 20 * HALF_LIFE_MS as u64;
    near(curve(&of, later).at(45.0).unwrap().p50_us, 100.0);
    let mut kept = of.clone();
    kept.window(UnixMillis(later), Some(DISK), 0.0, &[]);
    assert_eq!(curve(&kept, later).at(45.0).map(|point| point.is_experienced()), Some(false));
    of.window(UnixMillis(101), Some(Unloaded { read_us: 90.0, ..DISK }), 0.0, &[]);
    assert!(!curve(&of, 101).at(45.0).unwrap().is_experienced());
}

#[test]
fn without_calibration_times_are_what_they_are_once_there_are_enough() {
    let mut of = Experience::default();
    let few = histogram(700.0, 4);
    let of_few = Requests { writes: true, bytes: 4 << 12, latency_ns: &few };
    of.window(UnixMillis(1), None, 20.0, &[of_few]);
    assert!(of.curve(UnixMillis(1)).is_empty());
    of.window(UnixMillis(2), None, 20.0, &[of_few, of_few]);
    let points = of.curve(UnixMillis(2));
    let found = LatencyCurve { reference_us: 100.0, points };
    near(found.at(22.0).unwrap().p50_us, 700.0);
    near(found.speed_at(22.0).unwrap(), 1.0 / 7.0);
}

fn window() -> impl Strategy<Value = (f64, Vec<(bool, u64, u64, u64)>)> {
    let requests = (any::<bool>(), 1u64..1 << 22, 1u64..1 << 36, 0u64..2000);
    (0.0..1e7f64, prop::collection::vec(requests, 0..4))
}

proptest! {
    /// Whatever comes in, all that comes out is a positive number, with the p99 not below the median, and between what was calibrated
    /// and the extremes of what was seen.
    #[test]
    fn estimates_lie_between_what_was_calibrated_and_what_was_seen(windows in prop::collection::vec(window(), 0..20)) {
        let mut of = Experience::default();
        let (mut least, mut most) = (1.0f64, 1.0f64);
        for (at, (load, requests)) in windows.iter().enumerate() {
            let histograms: Vec<Vec<(u16, u64)>> =
                requests.iter().map(|(_, _, ns, count)| vec![(index_of(*ns) as u16, *count)]).collect();
            let of_window: Vec<Requests<'_>> = requests
                .iter()
                .zip(&histograms)
                .map(|((writes, size, _, count), latency_ns)| {
                    Requests { writes: *writes, bytes: size * count, latency_ns }
                })
                .collect();
            for (writes, size, ns, count) in requests {
                if *count > 0 {
                    let ratio = *ns as f64 / 1e3 / DISK.us(*writes, *size as f64);
                    (least, most) = (least.min(ratio), most.max(ratio));
                }
            }
            of.window(UnixMillis(at as u64 * 1000), Some(DISK), *load, &of_window);
        }
        let now = UnixMillis(windows.len() as u64 * 1000);
        let mut before = 0.0;
        for point in of.curve(now) {
            prop_assert!(point.operations_per_s > before);
            before = point.operations_per_s;
            let ratio = point.p50_us / DISK.mean_us();
            // Buckets, twice, and ratios in 1024 parts.
            prop_assert!(ratio.is_finite() && ratio <= most * 1.2 && ratio >= least * 0.8 - 2.0 / PARTS, "{ratio}: {least} to {most}");
            prop_assert!(point.p99_us >= point.p50_us && point.requests >= 0.0);
        }
    }

    /// Merging is adding: in which order a window's histograms come makes no difference.
    #[test]
    fn the_order_within_a_window_does_not_matter((load, requests) in window()) {
        let histograms: Vec<Vec<(u16, u64)>> =
            requests.iter().map(|(_, _, ns, count)| vec![(index_of(*ns) as u16, *count)]).collect();
        let mut all: Vec<Requests<'_>> = requests
            .iter()
            .zip(&histograms)
            .map(|((writes, size, _, count), latency_ns)| Requests { writes: *writes, bytes: size * count, latency_ns })
            .collect();
        let (mut one, mut other) = (Experience::default(), Experience::default());
        one.window(UnixMillis(1), Some(DISK), load, &all);
        all.reverse();
        other.window(UnixMillis(1), Some(DISK), load, &all);
        for (a, b) in one.curve(UnixMillis(1)).iter().zip(&other.curve(UnixMillis(1))) {
            prop_assert!((a.p50_us - b.p50_us).abs() <= 1e-6 * a.p50_us, "{:?} {:?}", a, b);
        }
    }
}
