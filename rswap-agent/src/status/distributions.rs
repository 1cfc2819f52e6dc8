//! How long things took an instance over more than a window: the last minute, the last hour, and since it is shown. Histograms are added up in
//! parts, so that a span is a sum of parts, with exact numbers and sums.

use std::{collections::VecDeque, mem};

use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

use super::packed::with_bytes;
use crate::{
    profile::{OffCpuProfile, OffCpuReason, Operation, Profile, histogram::Histogram},
    units::UnixMillis,
};

/// Windows of a part are added up when they take so many bytes. Of an instance that does little, all of them fit.
const MOST_BYTES: usize = 256;

/// What is distributed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "metric")]
pub enum Metric {
    /// From runnable to running, in nanoseconds.
    RunQueueNs,
    /// On a CPU between two switches, in nanoseconds.
    OnCpuNs,
    /// Off the CPU until a thread could run again, in nanoseconds.
    OffCpuNs {
        /// Why.
        reason: OffCpuReason,
    },
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
    /// In their order. A list, as they are few, and hardly ever a new one comes.
    of: Vec<(Metric, Kept)>,
    listen_drops: Option<u64>,
}

/// A metric's samples, each kept once: a part of a minute is added to the hour's and to the total when it is full.
#[derive(Clone, Debug, Default)]
struct Kept {
    minute: Parts,
    hour: Parts,
    /// Without what is in the part of a minute that is being filled.
    total: Packed,
}

/// A histogram as it is packed. Of hundreds of buckets few have samples: they are `(distance from the one before, samples)`.
struct Short<'a>(&'a Histogram);

impl Serialize for Short<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Histogram { buckets, count, sum } = self.0;
        (count, sum, Distances(buckets)).serialize(serializer)
    }
}

struct Distances<'a>(&'a [(u16, u64)]);

impl Serialize for Distances<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut before = 0;
        serializer.collect_seq(self.0.iter().map(|&(index, count)| {
            let distance = index - mem::replace(&mut before, index);
            (distance, count)
        }))
    }
}

/// The sum of histograms that are packed one behind the other.
fn unpacked(mut bytes: &[u8]) -> Histogram {
    type Unpacked = (u64, u64, Vec<(u16, u64)>);
    let mut all = Histogram::default();
    while !bytes.is_empty() {
        let (next, others): (Unpacked, _) =
            postcard::take_from_bytes(bytes).expect("as it was packed by this process");
        let (count, sum, mut buckets) = next;
        let mut index = 0;
        for bucket in &mut buckets {
            index += bucket.0;
            bucket.0 = index;
        }
        let one = Histogram { buckets, count, sum };
        if all.count == 0 {
            all = one;
        } else {
            all.merge(&one);
        }
        bytes = others;
    }
    all
}

/// A histogram as bytes; of one without samples, none.
#[derive(Clone, Debug, Default)]
struct Packed(Box<[u8]>);

impl Packed {
    fn of(histogram: &Histogram) -> Self {
        if histogram.count == 0 {
            return Self::default();
        }
        Self(with_bytes(&Short(histogram), |bytes| bytes.into()))
    }

    fn histogram(&self) -> Histogram {
        unpacked(&self.0)
    }

    fn add(&mut self, histogram: &Histogram) {
        let mut sum = self.histogram();
        sum.merge(histogram);
        *self = Self::of(&sum);
    }
}

/// What has come of a part that is being filled. To add to it takes no more than to pack what is added: it is added up when somebody looks.
#[derive(Clone, Debug, Default)]
struct Filling {
    /// Histograms with samples, packed one behind the other.
    bytes: Vec<u8>,
    /// So many of the bytes are one that was added up; behind them is what came since.
    summed: usize,
    /// Where that of the last window begins; at the end, if it had no samples.
    last: usize,
}

impl Filling {
    /// A window begins, and has no samples yet.
    fn begin_window(&mut self) {
        self.last = self.bytes.len();
    }

    fn add(&mut self, histogram: &Histogram) {
        if self.bytes.len() - self.summed >= MOST_BYTES {
            self.sum_up();
        }
        self.last = self.bytes.len();
        with_bytes(&Short(histogram), |bytes| self.bytes.extend_from_slice(bytes));
    }

    fn sum_up(&mut self) {
        let bytes = with_bytes(&Short(&self.histogram()), <[u8]>::to_vec);
        *self = Self { summed: bytes.len(), last: bytes.len(), bytes };
    }

    fn histogram(&self) -> Histogram {
        unpacked(&self.bytes)
    }

    /// The last window's.
    fn last(&self) -> Histogram {
        unpacked(&self.bytes[self.last..])
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// The parts of a span.
#[derive(Clone, Debug, Default)]
struct Parts {
    /// Number of the part that is being filled, from the epoch.
    filling: u64,
    now: Filling,
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
                let now = mem::take(&mut self.now).histogram();
                self.whole.push_back((self.filling, Packed::of(&now)));
                full = Some((UnixMillis(self.filling * part_ms), now));
            }
            self.filling = number;
        }
        while self.whole.front().is_some_and(|(oldest, _)| oldest + (kept as u64) < self.filling) {
            self.whole.pop_front();
        }
        full
    }

    /// What its whole parts have, and `now`.
    fn with(&self, now: &Histogram) -> Histogram {
        let mut sum = now.clone();
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
            // One in ten seconds at most: added up at once, it takes the least room.
            self.hour.now.sum_up();
            self.total.add(&full);
        }
        self.hour.go_on_to(at, Span::Hour);
    }

    fn shown(&self, metric: Metric) -> Distribution {
        let now = self.minute.now.histogram();
        let mut hour = self.hour.now.histogram();
        hour.merge(&now);
        Distribution {
            metric,
            window: self.minute.now.last(),
            minute: self.minute.with(&now),
            hour: self.hour.with(&hour),
            total: self.total(),
        }
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
        let at = profile.at;
        if let Some(dropped) = profile.tcp.listen_drops {
            *self.listen_drops.get_or_insert_default() += dropped;
        }
        for (_, kept) in &mut self.of {
            kept.minute.now.begin_window();
            kept.go_on_to(at);
        }
        self.add(at, Metric::RunQueueNs, &profile.cpu.run_queue_ns);
        self.add(at, Metric::OnCpuNs, &profile.cpu.on_cpu_ns);
        for (reason, times) in profile.cpu.off_cpu.iter().flat_map(OffCpuProfile::by_reason) {
            self.add(at, Metric::OffCpuNs { reason }, times);
        }
        self.add(at, Metric::TcpRttUs, &profile.tcp.rtt_us);
        if let Some(connections) = &profile.tcp.connections {
            self.add(at, Metric::TcpLifeUs, &connections.life_us);
        }
        if let Some(faults) = &profile.memory.fault_latency {
            self.add(at, Metric::MajorFaultNs, &faults.major_ns);
            faults.minor_ns.iter().for_each(|minor| self.add(at, Metric::MinorFaultNs, minor));
        }
        for block in &profile.block {
            let (device, operation) = (&block.device, block.operation);
            let on_device = |metric: &Metric| match metric {
                Metric::BlockDeviceNs { device: of, operation: does } => (of, *does) == (device, operation),
                _ => false,
            };
            let in_queue = |metric: &Metric| match metric {
                Metric::BlockQueueNs { device: of, operation: does } => (of, *does) == (device, operation),
                _ => false,
            };
            let new_on_device = || Metric::BlockDeviceNs { device: device.clone(), operation };
            let new_in_queue = || Metric::BlockQueueNs { device: device.clone(), operation };
            self.add_to(at, on_device, new_on_device, &block.latency_ns);
            self.add_to(at, in_queue, new_in_queue, &block.queue_ns);
        }
    }

    fn add(&mut self, at: UnixMillis, metric: Metric, histogram: &Histogram) {
        self.add_to(at, |known| *known == metric, || metric.clone(), histogram);
    }

    /// Adds to the metric that is meant. It is made only if there is none yet: that of a device has its name.
    fn add_to(
        &mut self,
        at: UnixMillis,
        is_meant: impl Fn(&Metric) -> bool,
        new: impl FnOnce() -> Metric,
        histogram: &Histogram,
    ) {
        if histogram.count == 0 {
            return;
        }
        let known = self.of.iter().position(|(metric, _)| is_meant(metric));
        let place = known.unwrap_or_else(|| {
            let metric = new();
            let place = self.of.partition_point(|(other, _)| *other < metric);
            // Hardly ever: room for more of them would stand empty.
            self.of.reserve_exact(1);
            self.of.insert(place, (metric, Kept::default()));
            place
        });
        let kept = &mut self.of[place].1;
        kept.go_on_to(at);
        kept.minute.now.add(histogram);
    }

    /// All that had samples in the last hour.
    pub fn shown(&self) -> impl Iterator<Item = Distribution> {
        let of = self.of.iter().filter(|(_, kept)| kept.had_some_in_the_hour());
        of.map(|(metric, kept)| kept.shown(metric.clone()))
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
            let packed = parts.whole.iter().map(|(_, part)| part.0.len()).sum::<usize>();
            whole + packed + parts.now.bytes.capacity()
        };
        let of = |kept: &Kept| kept.total.0.len() + parts(&kept.minute) + parts(&kept.hour);
        let packed: usize = self.of.iter().map(|(_, kept)| of(kept)).sum();
        self.of.capacity() * size_of::<(Metric, Kept)>() + packed
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
            io: Default::default(),
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

    /// The same, of one metric, with all of its windows by themselves.
    #[derive(Default)]
    struct Plain {
        /// Number of the part of a minute that is being filled, once it has had samples.
        filling: Option<u64>,
        last: Histogram,
        /// By the part that was filled then.
        windows: Vec<(u64, Histogram)>,
    }

    impl Plain {
        fn record(&mut self, at_s: u64, samples: &[u64]) {
            self.last = of(samples);
            if self.filling.is_some() || !samples.is_empty() {
                let filling = self.filling.unwrap_or(0).max(at_s / 10);
                self.filling = Some(filling);
                if !samples.is_empty() {
                    self.windows.push((filling, of(samples)));
                }
            }
        }

        fn sum(&self, is_within: impl Fn(u64) -> bool) -> Histogram {
            let mut sum = Histogram::default();
            let within = self.windows.iter().filter(|(part, _)| is_within(*part));
            within.for_each(|(_, window)| sum.merge(window));
            sum
        }

        fn total(&self) -> Histogram {
            self.sum(|_| true)
        }

        fn shown(&self) -> Option<Distribution> {
            let filling = self.filling?;
            let hour = self.sum(|part| part / 30 + 12 >= filling / 30);
            (hour.count > 0).then(|| Distribution {
                metric: Metric::RunQueueNs,
                window: self.last.clone(),
                minute: self.sum(|part| part + 6 >= filling),
                hour,
                total: self.total(),
            })
        }
    }

    /// Seconds from one window to the next: mostly one; now and then the clock is set, or nothing was looked at for long.
    fn steps() -> impl Strategy<Value = i64> {
        prop_oneof![20 => 0..2_i64, 2 => 2..400_i64, 1 => 3_000..5_000_i64, 1 => -5_000..0_i64]
    }

    proptest! {
        #[test]
        fn windows_that_are_added_up_late_are_those_that_came(
            windows in prop::collection::vec(
                (steps(), prop::collection::vec(0..1u64 << 42, 0..24), prop::bool::weighted(0.05)), 1..60,
            ),
        ) {
            let (mut kept, mut plain) = (Distributions::default(), Plain::default());
            let mut now = 1_000_000_u64;
            let last = windows.len() - 1;
            for (number, (seconds, waits_ns, is_looked_at)) in windows.iter().enumerate() {
                now = now.saturating_add_signed(*seconds);
                kept.record(&profile(now, waits_ns));
                plain.record(now, waits_ns);
                if *is_looked_at || number == last {
                    prop_assert_eq!(waits(&kept), plain.shown());
                    let total = kept.totals().map(|(_, total)| total).next().unwrap_or_default();
                    prop_assert_eq!(total, plain.total());
                }
            }
        }

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
