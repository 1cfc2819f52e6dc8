//! How long things took an instance, and how often they happened, over more than a window: the last minute, the last hour, and since it is shown.
//! Numbers and sums are exact.

use std::mem;

use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

use super::{
    counts::{Counts, CountsOver},
    spans::{Kept, Sum},
};
use crate::{
    profile::{OffCpuProfile, OffCpuReason, Operation, Profile, histogram::Histogram},
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
    of: Vec<(Metric, Kept<Histogram>)>,
    counts: Kept<Counts>,
}

impl Sum for Histogram {
    fn is_nothing(&self) -> bool {
        self.count == 0
    }

    fn add(&mut self, other: &Self) {
        self.merge(other);
    }

    fn packed(&self) -> impl Serialize {
        Short(self)
    }

    fn unpack(bytes: &[u8]) -> postcard::Result<(Self, &[u8])> {
        type Unpacked = (u64, u64, Vec<(u16, u64)>);
        let ((count, sum, mut buckets), others): (Unpacked, _) = postcard::take_from_bytes(bytes)?;
        let mut index = 0;
        for bucket in &mut buckets {
            index += bucket.0;
            bucket.0 = index;
        }
        Ok((Self { buckets, count, sum }, others))
    }
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

impl Distributions {
    /// Takes in a window.
    pub fn record(&mut self, profile: &Profile) {
        let at = profile.at;
        self.counts.begin_window(at);
        self.counts.add(&Counts::of(profile));
        self.of.iter_mut().for_each(|(_, kept)| kept.begin_window(at));
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
            let mut kept = Kept::default();
            kept.begin_window(at);
            self.of.insert(place, (metric, kept));
            place
        });
        self.of[place].1.add(histogram);
    }

    /// All that had samples in the last hour.
    pub fn shown(&self) -> impl Iterator<Item = Distribution> {
        let of = self.of.iter().filter(|(_, kept)| kept.had_some_in_the_hour());
        of.map(|(metric, kept)| {
            let [window, minute, hour, total] = kept.spans();
            Distribution { metric: metric.clone(), window, minute, hour, total }
        })
    }

    /// Everything since the instance is shown.
    pub fn totals(&self) -> impl Iterator<Item = (&Metric, Histogram)> {
        self.of.iter().map(|(metric, kept)| (metric, kept.total()))
    }

    /// What was counted, over the same spans.
    pub fn counts(&self) -> CountsOver {
        let [window, minute, hour, total] = self.counts.spans();
        CountsOver { window, minute, hour, total }
    }

    /// What was counted since the instance is shown.
    pub fn counted(&self) -> Counts {
        self.counts.total()
    }

    /// What it takes of memory, in bytes, as far as it grows with the samples.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        let packed: usize = self.of.iter().map(|(_, kept)| kept.bytes()).sum();
        self.of.capacity() * size_of::<(Metric, Kept<Histogram>)>() + packed + self.counts.bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::profile::{BlockProfile, CpuProfile, Faults, MemoryProfile, TcpProfile, histogram::of};

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
    fn counts_are_added_up_where_they_are_known() {
        let mut kept = Distributions::default();
        let counted = |second, dropped, retransmits| {
            let mut seen = profile(second, &[]);
            (seen.tcp.listen_drops, seen.tcp.retransmits) = (dropped, retransmits);
            seen
        };
        kept.record(&counted(100_001, None, None));
        assert_eq!(kept.counted().tcp_listen_drops, None);
        for (second, dropped) in [(2, Some(0)), (3, None), (4, Some(7)), (5, Some(2))] {
            kept.record(&counted(100_000 + second, dropped, None));
        }
        kept.record(&counted(100_075, None, Some(3)));
        let CountsOver { window, minute, hour, total } = kept.counts();
        let drops = [&window, &minute, &hour, &total].map(|of| of.tcp_listen_drops);
        assert_eq!(drops, [None, None, Some(9), Some(9)]);
        let retransmits = [&window, &minute, &hour, &total].map(|of| of.tcp_retransmits);
        assert_eq!(retransmits, [Some(3); 4]);
        assert_eq!(kept.counted(), total);
        kept.record(&counted(104_000, None, Some(0)));
        let CountsOver { hour, total, .. } = kept.counts();
        assert_eq!((hour.tcp_listen_drops, hour.tcp_retransmits), (None, Some(0)));
        assert_eq!((total.tcp_listen_drops, total.tcp_retransmits), (Some(9), Some(3)));
    }

    #[test]
    fn counts_of_an_hour_take_little() {
        let mut kept = Distributions::default();
        for second in 0..4000 {
            let mut seen = profile(second, &[]);
            (seen.cpu.cores, seen.cpu.migrations, seen.cpu.pressure_some) = (1.7, Some(5_000), Some(0.5));
            (seen.tcp.bytes_in, seen.tcp.bytes_out) = (100_000_000, 200_000_000);
            (seen.tcp.retransmits, seen.tcp.connections) = (Some(40), Some(Default::default()));
            seen.memory.faults = Some(Faults { minor: 30_000, major: 100 });
            for (device, operation) in
                [("8:0", Operation::Read), ("8:0", Operation::Write), ("259:1", Operation::Read)]
            {
                let times = Histogram::default();
                seen.block.push(BlockProfile {
                    device: device.to_owned(),
                    operation,
                    bytes: 300_000_000,
                    latency_ns: times.clone(),
                    queue_ns: times,
                    not_split: 0,
                    in_flight: 1.0,
                });
            }
            kept.record(&seen);
        }
        let bytes = kept.bytes();
        assert!(bytes < 4 << 10, "{bytes}");
        let CountsOver { minute, hour, total, .. } = kept.counts();
        let spans = [&minute, &hour, &total].map(|of| (of.cpu_us, of.block[2].bytes));
        // 7 parts, the last one whole; 12 parts, and 100 seconds.
        assert_eq!(spans, [70, 3700, 4000].map(|s| (Some(s * 1_700_000), s * 300_000_000)));
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
