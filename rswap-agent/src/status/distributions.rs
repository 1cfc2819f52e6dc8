//! How long things took an instance over more than a window: the last minute, the last hour, and since it is shown. Histograms are added up in
//! parts, so that a span is a sum of parts, with exact numbers and sums.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    profile::{Operation, Profile, histogram::Histogram},
    units::UnixMillis,
};

/// What is distributed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "metric")]
pub enum Metric {
    /// From runnable to running, in nanoseconds.
    RunQueueNs,
    /// On a CPU between two switches, in nanoseconds.
    OnCpuNs,
    /// From when the driver was given a request to its end, in nanoseconds.
    BlockDeviceNs {
        /// `major:minor`, or `other`.
        device: String,
        /// What the requests do.
        operation: Operation,
    },
    /// From when a request was made to when the driver was given it, in nanoseconds.
    BlockQueueNs {
        /// `major:minor`, or `other`.
        device: String,
        /// What the requests do.
        operation: Operation,
    },
    /// Smoothed TCP round trips, in microseconds.
    TcpRttUs,
    /// How long TCP connections lasted that ended, in microseconds.
    TcpLifeUs,
    /// Page faults that waited, in nanoseconds.
    MajorFaultNs,
    /// Page faults served from memory, in nanoseconds, where `profile.minor_faults` is on.
    MinorFaultNs,
}

/// The spans that are kept beside the last window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// 60 to 70 seconds.
    Minute,
    /// 60 to 65 minutes.
    Hour,
}

impl Span {
    /// How long a part of it is, and how many whole ones belong to it.
    const fn parts(self) -> (u64, usize) {
        match self {
            Self::Minute => (10_000, 6),
            Self::Hour => (300_000, 12),
        }
    }
}

/// One metric over the spans.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Distribution {
    /// Which.
    #[serde(flatten)]
    pub metric: Metric,
    /// The last window.
    pub window: Histogram,
    /// The last minute: 60 to 70 seconds, as far as the instance was shown.
    pub minute: Histogram,
    /// The last hour: 60 to 65 minutes.
    pub hour: Histogram,
    /// Since the instance is shown.
    pub total: Histogram,
}

/// One instance's distributions.
#[derive(Clone, Debug, Default)]
pub struct Distributions {
    of: BTreeMap<Metric, Kept>,
    listen_drops: Option<u64>,
}

/// A metric's samples, each kept once: a part of a minute is added to the hour's and to the total when it is full.
#[derive(Clone, Debug, Default)]
struct Kept {
    last: Packed,
    minute: Parts,
    hour: Parts,
    /// Without what is in the part of a minute that is being filled.
    total: Packed,
}

/// A histogram as bytes (postcard): of hundreds of buckets few have samples, most of these few, and it is hardly ever looked at.
#[derive(Clone, Debug, Default)]
struct Packed(Box<[u8]>);

impl Packed {
    /// Buckets as `(distance from the one before, samples)`.
    fn of(histogram: &Histogram) -> Self {
        if histogram.count == 0 {
            return Self::default();
        }
        let mut before = 0;
        let distances = histogram.buckets.iter().map(|&(index, count)| {
            let distance = index - std::mem::replace(&mut before, index);
            (distance, count)
        });
        let distances: Vec<(u16, u64)> = distances.collect();
        let packed = postcard::to_stdvec(&(histogram.count, histogram.sum, distances));
        Self(packed.expect("plain data of known lengths").into_boxed_slice())
    }

    fn histogram(&self) -> Histogram {
        if self.0.is_empty() {
            return Histogram::default();
        }
        let unpacked: (u64, u64, Vec<(u16, u64)>) =
            postcard::from_bytes(&self.0).expect("as it was packed by this process");
        let (count, sum, mut buckets) = unpacked;
        let mut index = 0;
        for bucket in &mut buckets {
            index += bucket.0;
            bucket.0 = index;
        }
        Histogram { buckets, count, sum }
    }

    fn add(&mut self, histogram: &Histogram) {
        if self.0.is_empty() {
            *self = Self::of(histogram);
        } else if histogram.count > 0 {
            let mut sum = self.histogram();
            sum.merge(histogram);
            *self = Self::of(&sum);
        }
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The parts of a span.
#[derive(Clone, Debug, Default)]
struct Parts {
    /// Number of the part that is being filled, from the epoch.
    filling: u64,
    now: Packed,
    /// Whole parts that had samples, oldest first, by their number.
    whole: VecDeque<(u64, Packed)>,
}

impl Parts {
    /// Goes on to the part that is filled then; answers when the one that was filled until now began, and what is in it, if it is full.
    fn go_on_to(&mut self, at: UnixMillis, span: Span) -> Option<(UnixMillis, Histogram)> {
        let (part_ms, kept) = span.parts();
        let number = at.0 / part_ms;
        let mut full = None;
        // The clock of the host may have been set back: then the part that is being filled is filled on.
        if number > self.filling {
            if !self.now.is_empty() {
                let now = std::mem::take(&mut self.now);
                full = Some((UnixMillis(self.filling * part_ms), now.histogram()));
                self.whole.push_back((self.filling, now));
            }
            self.filling = number;
        }
        while self.whole.front().is_some_and(|(oldest, _)| oldest + (kept as u64) < self.filling) {
            self.whole.pop_front();
        }
        full
    }

    fn sum(&self) -> Histogram {
        let mut sum = self.now.histogram();
        self.whole.iter().for_each(|(_, part)| sum.merge(&part.histogram()));
        sum
    }

    fn is_empty(&self) -> bool {
        self.now.is_empty() && self.whole.is_empty()
    }
}

impl Kept {
    fn go_on_to(&mut self, at: UnixMillis) {
        if let Some((then, full)) = self.minute.go_on_to(at, Span::Minute) {
            self.hour.go_on_to(then, Span::Hour);
            self.hour.now.add(&full);
            self.total.add(&full);
        }
        self.hour.go_on_to(at, Span::Hour);
    }

    fn hour(&self) -> Histogram {
        let mut sum = self.hour.sum();
        sum.merge(&self.minute.now.histogram());
        sum
    }

    fn total(&self) -> Histogram {
        let mut sum = self.total.histogram();
        sum.merge(&self.minute.now.histogram());
        sum
    }

    fn had_some_in_the_hour(&self) -> bool {
        !self.hour.is_empty() || !self.minute.now.is_empty()
    }
}

impl Distributions {
    /// Takes in a window.
    pub fn record(&mut self, profile: &Profile) {
        if let Some(dropped) = profile.tcp.listen_drops {
            *self.listen_drops.get_or_insert_default() += dropped;
        }
        for kept in self.of.values_mut() {
            kept.last = Packed::default();
            kept.go_on_to(profile.at);
        }
        self.add(profile.at, Metric::RunQueueNs, &profile.cpu.run_queue_ns);
        self.add(profile.at, Metric::OnCpuNs, &profile.cpu.on_cpu_ns);
        self.add(profile.at, Metric::TcpRttUs, &profile.tcp.rtt_us);
        if let Some(connections) = &profile.tcp.connections {
            self.add(profile.at, Metric::TcpLifeUs, &connections.life_us);
        }
        if let Some(faults) = &profile.memory.fault_latency {
            self.add(profile.at, Metric::MajorFaultNs, &faults.major_ns);
            faults.minor_ns.iter().for_each(|minor| self.add(profile.at, Metric::MinorFaultNs, minor));
        }
        for block in &profile.block {
            let (device, operation) = (block.device.clone(), block.operation);
            let queue = Metric::BlockQueueNs { device: device.clone(), operation };
            self.add(profile.at, Metric::BlockDeviceNs { device, operation }, &block.latency_ns);
            self.add(profile.at, queue, &block.queue_ns);
        }
    }

    fn add(&mut self, at: UnixMillis, metric: Metric, histogram: &Histogram) {
        if histogram.count == 0 {
            return;
        }
        let kept = self.of.entry(metric).or_default();
        kept.go_on_to(at);
        kept.minute.now.add(histogram);
        kept.last = Packed::of(histogram);
    }

    /// All that had samples in the last hour.
    pub fn shown(&self) -> impl Iterator<Item = Distribution> {
        self.of.iter().filter(|(_, kept)| kept.had_some_in_the_hour()).map(|(metric, kept)| Distribution {
            metric: metric.clone(),
            window: kept.last.histogram(),
            minute: kept.minute.sum(),
            hour: kept.hour(),
            total: kept.total(),
        })
    }

    /// Everything since the instance is shown.
    pub fn totals(&self) -> impl Iterator<Item = (&Metric, Histogram)> {
        self.of.iter().map(|(metric, kept)| (metric, kept.total()))
    }

    /// Connections to it that were dropped since it is shown; `None` if that was never known.
    pub fn listen_drops(&self) -> Option<u64> {
        self.listen_drops
    }

    /// What it takes of memory, in bytes, as far as it grows with the samples.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        let parts = |parts: &Parts| {
            let whole = parts.whole.capacity() * size_of::<(u64, Packed)>();
            whole + parts.now.0.len() + parts.whole.iter().map(|(_, part)| part.0.len()).sum::<usize>()
        };
        let of = |kept: &Kept| {
            size_of::<(Metric, Kept)>()
                + kept.last.0.len()
                + kept.total.0.len()
                + parts(&kept.minute)
                + parts(&kept.hour)
        };
        self.of.values().map(of).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::profile::{BlockProfile, CpuProfile, MemoryProfile, TcpProfile};

    fn of(values: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        values.iter().for_each(|value| histogram.record(*value));
        histogram
    }

    fn profile(at_s: u64, waits_ns: &[u64]) -> Profile {
        Profile {
            instance: "a".parse().unwrap(),
            at: UnixMillis(at_s * 1000),
            window_ms: 1000,
            cpu: CpuProfile { run_queue_ns: of(waits_ns), ..CpuProfile::default() },
            block: Vec::new(),
            block_counted: true,
            disk_neighbours: Vec::new(),
            tcp: TcpProfile::default(),
            tcp_counted: true,
            memory: MemoryProfile::default(),
        }
    }

    fn waits(distributions: &Distributions) -> Option<Distribution> {
        distributions.shown().find(|of| of.metric == Metric::RunQueueNs)
    }

    #[test]
    fn a_span_forgets_what_was_before_it_and_the_total_does_not() {
        let mut kept = Distributions::default();
        kept.record(&profile(100_000, &[5, 7000]));
        let first = waits(&kept).unwrap();
        assert_eq!((first.window.count, first.minute.sum, first.hour.sum), (2, 7005, 7005));
        kept.record(&profile(100_040, &[11]));
        let both = waits(&kept).unwrap();
        assert_eq!((both.window.sum, both.minute.sum, both.hour.sum), (11, 7016, 7016));
        kept.record(&profile(100_075, &[]));
        let later = waits(&kept).unwrap();
        assert_eq!(
            (later.window.count, later.minute.sum, later.hour.sum, later.total.sum),
            (0, 11, 7016, 7016)
        );
        kept.record(&profile(100_000 + 4_000, &[]));
        assert_eq!(waits(&kept), None, "nothing within the hour");
        assert_eq!(kept.totals().map(|(_, total)| total.sum).sum::<u64>(), 7016);
        // Back by an hour.
        kept.record(&profile(100_000 + 400, &[3]));
        assert_eq!(waits(&kept).unwrap().minute.sum, 3);
    }

    #[test]
    fn dropped_connections_are_added_up_where_they_are_known() {
        let mut kept = Distributions::default();
        kept.record(&profile(1, &[]));
        assert_eq!(kept.listen_drops(), None);
        for (second, dropped) in [(2, Some(0)), (3, None), (4, Some(7)), (5, Some(2))] {
            let mut seen = profile(second, &[]);
            seen.tcp.listen_drops = dropped;
            kept.record(&seen);
        }
        assert_eq!(kept.listen_drops(), Some(9));
    }

    #[test]
    fn devices_and_operations_are_kept_apart() {
        let mut kept = Distributions::default();
        let block = |device: &str, operation, device_ns, queue_ns| BlockProfile {
            device: device.to_owned(),
            operation,
            bytes: 1,
            latency_ns: of(&[device_ns]),
            queue_ns: if queue_ns == 0 { Histogram::default() } else { of(&[queue_ns]) },
            not_split: 0,
            in_flight: 0.0,
        };
        let mut seen = profile(1, &[]);
        seen.block = vec![
            block("8:0", Operation::Read, 10, 1),
            block("8:0", Operation::Write, 20, 2),
            block("8:16", Operation::Flush, 30, 0),
        ];
        kept.record(&seen);
        let sums: Vec<u64> = kept.shown().map(|of| of.window.sum).collect();
        assert_eq!(sums, [10, 20, 30, 1, 2]);
    }

    #[test]
    fn an_hour_of_an_instance_that_uses_a_disk_takes_little() {
        let mut kept = Distributions::default();
        for second in 0..4000 {
            // Spread over four powers of two: 32 buckets.
            let waits: Vec<u64> = (0..300).map(|n| (1000 + n * 53) << (second % 2)).collect();
            let block = |operation| BlockProfile {
                device: "8:0".to_owned(),
                operation,
                bytes: 1,
                latency_ns: of(&waits),
                queue_ns: of(&waits),
                not_split: 0,
                in_flight: 0.0,
            };
            let mut seen = profile(second, &waits);
            (seen.cpu.on_cpu_ns, seen.tcp.rtt_us) = (of(&waits), of(&waits));
            seen.block = vec![block(Operation::Read), block(Operation::Write)];
            kept.record(&seen);
        }
        let bytes = kept.bytes();
        // As lists of buckets it was about four times as much.
        assert!(bytes < 30 << 10, "{bytes}");
        let waits = waits(&kept).unwrap();
        assert_eq!((waits.window.count, waits.total.count), (300, 4000 * 300));
        assert_eq!(waits.minute.count, 70 * 300);
        assert_eq!(waits.hour.count, 3700 * 300, "12 parts, and 100 seconds");
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked_the_same(values in prop::collection::vec(any::<u64>(), 0..40), more in prop::collection::vec(any::<u64>(), 0..40)) {
            let mut packed = Packed::of(&of(&values));
            prop_assert_eq!(packed.histogram(), of(&values));
            packed.add(&of(&more));
            let mut sum = of(&values);
            sum.merge(&of(&more));
            prop_assert_eq!(packed.histogram(), sum);
        }

        #[test]
        fn a_span_is_the_sum_of_its_windows(windows in prop::collection::vec((1..200u64, prop::collection::vec(0..1u64 << 30, 0..5)), 1..80)) {
            let mut kept = Distributions::default();
            let (mut now, mut all) = (1_000_000, Vec::new());
            for (seconds, waits_ns) in &windows {
                now += seconds;
                all.push((now, waits_ns.clone()));
                kept.record(&profile(now, waits_ns));
            }
            // What ended in the part that is being filled, and in the six before.
            let since = (now / 10 - 6) * 10;
            let within: Vec<u64> = all.iter().filter(|(at, _)| *at >= since).flat_map(|(_, waits)| waits.clone()).collect();
            let minute = waits(&kept).map(|of| of.minute).unwrap_or_default();
            prop_assert_eq!(minute, of(&within));
            let since = (now / 300 - 12) * 300;
            let within: Vec<u64> = all.iter().filter(|(at, _)| *at >= since).flat_map(|(_, waits)| waits.clone()).collect();
            prop_assert_eq!(waits(&kept).map(|of| of.hour).unwrap_or_default(), of(&within));
            let total: Vec<u64> = all.iter().flat_map(|(_, waits)| waits.clone()).collect();
            prop_assert_eq!(kept.totals().map(|(_, total)| total).find(|total| total.count > 0).unwrap_or_default(), of(&total));
        }
    }
}
