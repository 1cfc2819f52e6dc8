//! What instances did window by window, for plots: how much, how long they waited, and what had been forecast. Bounded.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::packed::with_bytes;
use crate::{
    forecast::{Demand, Evidence, Resource, Usage},
    profile::{Profile, histogram::Histogram},
    units::UnixMillis,
};

/// Windows kept of an instance at most.
pub const WINDOWS_KEPT: usize = 300;
/// Windows kept of all instances together, as long as each keeps [`WINDOWS_KEPT_AT_LEAST`].
const WINDOWS_KEPT_OF_ALL: usize = 12_000;
/// Windows kept of an instance, however many there are.
const WINDOWS_KEPT_AT_LEAST: usize = 60;
const RESOURCES: usize = Resource::ALL.len();

/// How many windows are kept of each of so many instances.
pub(super) fn windows_kept(instances: usize) -> usize {
    (WINDOWS_KEPT_OF_ALL / instances.max(1)).clamp(WINDOWS_KEPT_AT_LEAST, WINDOWS_KEPT)
}

/// One window of an instance. Amounts in single precision, in the resource's unit.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Window {
    /// Its end.
    pub at: UnixMillis,
    /// What was used; what is not known is left out.
    pub used: BTreeMap<Resource, f32>,
    /// What had been forecast for it, `horizon_ms` before; what could not be believed then is left out.
    pub forecast: BTreeMap<Resource, Band>,
    /// How long things took.
    #[serde(flatten)]
    pub latencies: Latencies,
}

/// A forecast, as a band.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
pub struct Band {
    /// Exceeded in 50 % of windows.
    pub p50: f32,
    /// Exceeded in 5 % of windows.
    pub p95: f32,
}

/// A window's histograms, in short.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Latencies {
    /// From runnable to running, in nanoseconds.
    pub run_queue_ns: Spread,
    /// On a core between two switches, in nanoseconds.
    pub on_cpu_ns: Spread,
    /// Block I/O of all devices and both directions, in nanoseconds.
    pub block_ns: Spread,
    /// Smoothed TCP round trips, in microseconds.
    pub rtt_us: Spread,
    /// Page faults that waited, in nanoseconds.
    #[serde(default)]
    pub major_fault_ns: Spread,
}

impl Latencies {
    fn of(profile: &Profile) -> Self {
        Self {
            run_queue_ns: Spread::of(&profile.cpu.run_queue_ns),
            on_cpu_ns: Spread::of(&profile.cpu.on_cpu_ns),
            block_ns: Spread::of(&profile.io_latency_ns()),
            rtt_us: Spread::of(&profile.tcp.rtt_us),
            major_fault_ns: (profile.memory.fault_latency.as_ref())
                .map(|of| Spread::of(&of.major_ns))
                .unwrap_or_default(),
        }
    }
}

/// A histogram by powers of two, with the quantiles that it had before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Spread {
    /// Samples.
    pub count: u64,
    /// What half of them did not exceed.
    pub p50: Option<f32>,
    /// What 99 in 100 did not exceed.
    pub p99: Option<f32>,
    /// `(e, n)`, ascending: n samples of 2^e and more, but less than twice that. 0 is counted with 1.
    #[schema(value_type = Vec<(u8, u32)>)]
    pub octaves: Box<[(u8, u32)]>,
}

impl Spread {
    fn of(histogram: &Histogram) -> Self {
        let most = histogram.buckets.len().min(u64::BITS as usize);
        let mut octaves: Vec<(u8, u32)> = Vec::with_capacity(most);
        for (low, count) in histogram.lows() {
            let (octave, count) = (low.max(1).ilog2() as u8, u32::try_from(count).unwrap_or(u32::MAX));
            match octaves.last_mut() {
                Some((last, sum)) if *last == octave => *sum = sum.saturating_add(count),
                _ => octaves.push((octave, count)),
            }
        }
        let quantile = |q| histogram.quantile(q).map(|value| value as f32);
        Self {
            count: histogram.count,
            p50: quantile(0.5),
            p99: quantile(0.99),
            octaves: octaves.into_boxed_slice(),
        }
    }
}

/// What is kept of a window.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Seen {
    /// `None`: unknown.
    used: [Option<f32>; RESOURCES],
    /// What was forecast then, for `horizon_ms` later: p50 and p95.
    made: [Option<[f32; 2]>; RESOURCES],
    latencies: Latencies,
}

/// A window, and what is kept of it as bytes (postcard): of most, little is known or other than 0, and it is hardly ever looked at.
#[derive(Clone, Debug)]
struct Kept {
    at: UnixMillis,
    packed: Box<[u8]>,
}

impl Kept {
    fn new(at: UnixMillis, seen: &Seen) -> Self {
        Self { at, packed: with_bytes(seen, |bytes| bytes.into()) }
    }

    fn seen(&self) -> Seen {
        postcard::from_bytes(&self.packed).expect("as it was packed by this process")
    }
}

/// An instance's last windows.
#[derive(Clone, Debug, Default)]
pub struct Series {
    kept: VecDeque<Kept>,
    window_ms: u64,
    horizon_ms: Option<u64>,
}

impl Series {
    /// Takes in a window; of those that it has then, `keep` stay.
    pub fn record(&mut self, profile: &Profile, usage: &Usage, demand: Option<&Demand>, keep: usize) {
        let number = |amount: &f32| !amount.is_nan();
        let used =
            Resource::ALL.map(|resource| usage.of(resource).map(|amount| amount as f32).filter(number));
        let points = demand.map_or(&[][..], |demand| demand.points.as_slice());
        let horizon_ms = points.iter().map(|point| point.horizon_ms).min();
        let made = Resource::ALL.map(|resource| {
            let believed = |evidence| matches!(evidence, Evidence::Enough { .. });
            let point = points.iter().find(|point| {
                point.resource == resource && Some(point.horizon_ms) == horizon_ms && believed(point.evidence)
            });
            let band = point.map(|point| [point.need.p50 as f32, point.need.p95 as f32]);
            band.filter(|band| band.iter().all(number))
        });
        self.window_ms = profile.window_ms;
        self.horizon_ms = horizon_ms.or(self.horizon_ms);
        let surplus = (self.kept.len() + 1).saturating_sub(keep);
        self.kept.drain(..surplus.min(self.kept.len()));
        if self.kept.capacity() > 2 * keep {
            self.kept.shrink_to(keep);
        }
        self.kept.reserve_exact(keep.saturating_sub(self.kept.len()));
        let seen = Seen { used, made, latencies: Latencies::of(profile) };
        self.kept.push_back(Kept::new(profile.at, &seen));
    }

    /// How far ahead the forecasts were made that windows are shown with, in milliseconds.
    pub fn horizon_ms(&self) -> Option<u64> {
        self.horizon_ms
    }

    /// The windows that ended after `since`, oldest first.
    pub fn windows(&self, since: UnixMillis) -> impl Iterator<Item = Window> {
        self.kept.iter().filter(move |kept| kept.at > since).map(move |kept| {
            let Seen { used, latencies, .. } = kept.seen();
            let used = Resource::ALL.into_iter().zip(used);
            let known = used.filter_map(|(resource, used)| Some((resource, used?)));
            let made =
                self.made_for(kept.at).into_iter().flat_map(|made| Resource::ALL.into_iter().zip(made));
            let made = made.filter_map(|(resource, made)| {
                let [p50, p95] = made?;
                Some((resource, Band { p50, p95 }))
            });
            Window { at: kept.at, used: known.collect(), forecast: made.collect(), latencies }
        })
    }

    /// What was forecast for the window that ended `at`: windows are some milliseconds off.
    fn made_for(&self, at: UnixMillis) -> Option<[Option<[f32; 2]>; RESOURCES]> {
        let made_at = at.0.checked_sub(self.horizon_ms?)?;
        let after = self.kept.partition_point(|kept| kept.at.0 < made_at);
        let near = [after.checked_sub(1), Some(after)].into_iter().flatten().filter_map(|i| self.kept.get(i));
        let nearest = near.min_by_key(|kept| kept.at.0.abs_diff(made_at))?;
        (nearest.at.0.abs_diff(made_at) <= self.window_ms / 2).then(|| nearest.seen().made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        forecast::{DemandPoint, Quantiles},
        profile::{CpuProfile, MemoryProfile, TcpProfile},
    };

    const WINDOW_MS: u64 = 500;

    fn profile(at: u64, waits_ns: &[u64]) -> Profile {
        let mut cpu = CpuProfile::default();
        waits_ns.iter().for_each(|&ns| cpu.run_queue_ns.record(ns));
        Profile {
            instance: "a".parse().unwrap(),
            at: UnixMillis(at),
            window_ms: WINDOW_MS,
            cpu,
            block: Vec::new(),
            block_counted: false,
            disk_neighbours: Vec::new(),
            io: Default::default(),
            tcp: TcpProfile::default(),
            tcp_counted: false,
            memory: MemoryProfile::default(),
        }
    }

    fn demand(at: u64, cores: f64, evidence: Evidence) -> Demand {
        let point = |horizon_ms| DemandPoint {
            resource: Resource::Cpu,
            horizon_ms,
            need: Quantiles { p50: cores, p95: 2.0 * cores, ..Quantiles::default() },
            evidence,
        };
        Demand {
            instance: "a".parse().unwrap(),
            at: UnixMillis(at),
            points: vec![point(3_000), point(1_000)],
        }
    }

    const BELIEVED: Evidence = Evidence::Enough { seen: 40, p95_coverage: 0.95 };

    #[test]
    fn a_forecast_is_shown_with_the_window_that_it_was_made_for() {
        let mut series = Series::default();
        for n in 0..8_u64 {
            // Windows end a little late now and then.
            let at = 10_000 + n * WINDOW_MS + (n % 3) * 40;
            let evidence = if n == 3 { Evidence::TooLittle { seen: 1, needed: 30 } } else { BELIEVED };
            let usage = Usage { reference_cores: n as f64, ..Usage::default() };
            series.record(&profile(at, &[]), &usage, Some(&demand(at, n as f64, evidence)), 100);
        }
        assert_eq!(series.horizon_ms(), Some(1_000));
        let shown: Vec<_> = series
            .windows(UnixMillis(0))
            .map(|window| {
                (window.used[&Resource::Cpu], window.forecast.get(&Resource::Cpu).map(|band| band.p95))
            })
            .collect();
        let expected = [None, None, Some(0.0), Some(2.0), Some(4.0), None, Some(8.0), Some(10.0)];
        assert_eq!(shown, (0_u8..8).map(f32::from).zip(expected).collect::<Vec<_>>());
        assert_eq!(series.windows(UnixMillis(12_500)).count(), 3);
    }

    #[test]
    fn latencies_keep_their_count_and_quantiles_and_what_is_unknown_is_left_out() {
        let mut series = Series::default();
        series.record(&profile(500, &[0, 1, 900, 1_000, 1_100, 1 << 20]), &Usage::default(), None, 100);
        let window = series.windows(UnixMillis(0)).next().unwrap();
        let waits = &window.latencies.run_queue_ns;
        assert_eq!(*waits.octaves, [(0, 2), (9, 2), (10, 1), (20, 1)]);
        assert_eq!(waits.count, 6);
        assert!(waits.p99.is_some_and(|p99| (p99 / (1 << 20) as f32 - 1.0).abs() < 1.0 / 16.0), "{waits:?}");
        assert_eq!(window.latencies.rtt_us, Spread::default());
        let json = serde_json::to_value(&window).unwrap();
        assert_eq!(json["used"], serde_json::json!({ "cpu": 0.0, "memory": 0.0 }));
        let unknown = Usage { reference_cores: f64::NAN, ..Usage::default() };
        series.record(&profile(1_000, &[]), &unknown, Some(&demand(1_000, f64::NAN, BELIEVED)), 100);
        let json = serde_json::to_value(series.windows(UnixMillis(500)).next().unwrap()).unwrap();
        assert_eq!(json["used"], serde_json::json!({ "memory": 0.0 }));
    }

    #[test]
    fn a_window_in_which_little_happened_takes_little() {
        let mut series = Series::default();
        let waits: Vec<u64> = (0..40).map(|n| 1_000 << (n % 8)).collect();
        let usage =
            Usage { reference_cores: 0.01, memory_bytes: 1e7, io_bytes_per_s: Some(0.0), ..Usage::default() };
        for n in 0..60 {
            series.record(
                &profile(n * WINDOW_MS, &waits),
                &usage,
                Some(&demand(n * WINDOW_MS, 0.01, BELIEVED)),
                60,
            );
        }
        let bytes: usize = series.kept.iter().map(|kept| size_of::<Kept>() + kept.packed.len()).sum();
        assert!(bytes <= 60 * 160, "{bytes}");
        assert!(series.kept.iter().all(|kept| kept.seen().latencies.run_queue_ns.octaves.len() == 8));
    }

    #[test]
    fn the_oldest_windows_go_the_more_instances_the_earlier() {
        assert_eq!((windows_kept(1), windows_kept(40), windows_kept(200)), (300, 300, 60));
        assert_eq!(windows_kept(100_000), 60);
        let mut series = Series::default();
        for n in 0..500 {
            series.record(&profile(n * WINDOW_MS, &[]), &Usage::default(), None, WINDOWS_KEPT);
        }
        assert_eq!(series.windows(UnixMillis(0)).count(), WINDOWS_KEPT);
        series.record(&profile(500 * WINDOW_MS, &[]), &Usage::default(), None, 60);
        let left: Vec<_> = series.windows(UnixMillis(0)).map(|window| window.at.0 / WINDOW_MS).collect();
        assert_eq!(left, (441..=500).collect::<Vec<_>>());
        assert!(series.kept.capacity() <= 120, "{}", series.kept.capacity());
    }
}
