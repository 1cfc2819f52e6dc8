//! How long things took an instance over more than a window: the last minute, the last hour, and since it is shown. Histograms are added up in
//! parts, so that a span is a sum of parts, with exact numbers and sums.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use crate::{
    profile::{Operation, Profile, histogram::Histogram},
    units::UnixMillis,
};

/// What is distributed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
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
#[derive(Clone, Debug, PartialEq, Serialize)]
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
}

#[derive(Clone, Debug, Default)]
struct Kept {
    last: Histogram,
    total: Histogram,
    minute: Parts,
    hour: Parts,
}

/// The parts of a span.
#[derive(Clone, Debug, Default)]
struct Parts {
    /// Number of the part that is being filled, from the epoch.
    filling: u64,
    now: Histogram,
    /// Whole parts that had samples, oldest first, by their number.
    whole: VecDeque<(u64, Histogram)>,
}

impl Parts {
    fn go_on_to(&mut self, at: UnixMillis, span: Span) {
        let (part_ms, kept) = span.parts();
        let number = at.0 / part_ms;
        // The clock of the host may have been set back: then the part that is being filled is filled on.
        if number > self.filling {
            let mut full = std::mem::take(&mut self.now);
            if full.count > 0 {
                full.buckets.shrink_to_fit();
                self.whole.push_back((self.filling, full));
            }
            self.filling = number;
        }
        while self.whole.front().is_some_and(|(oldest, _)| oldest + (kept as u64) < self.filling) {
            self.whole.pop_front();
        }
    }

    fn sum(&self) -> Histogram {
        let mut sum = self.now.clone();
        self.whole.iter().for_each(|(_, part)| sum.merge(part));
        sum
    }

    fn is_empty(&self) -> bool {
        self.now.count == 0 && self.whole.is_empty()
    }
}

impl Distributions {
    /// Takes in a window.
    pub fn record(&mut self, profile: &Profile) {
        for kept in self.of.values_mut() {
            kept.last = Histogram::default();
            kept.minute.go_on_to(profile.at, Span::Minute);
            kept.hour.go_on_to(profile.at, Span::Hour);
        }
        self.add(profile.at, Metric::RunQueueNs, &profile.cpu.run_queue_ns);
        self.add(profile.at, Metric::OnCpuNs, &profile.cpu.on_cpu_ns);
        self.add(profile.at, Metric::TcpRttUs, &profile.tcp.rtt_us);
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
        for (parts, span) in [(&mut kept.minute, Span::Minute), (&mut kept.hour, Span::Hour)] {
            parts.go_on_to(at, span);
            parts.now.merge(histogram);
        }
        kept.total.merge(histogram);
        kept.last = histogram.clone();
    }

    /// All that had samples in the last hour.
    pub fn shown(&self) -> impl Iterator<Item = Distribution> {
        self.of.iter().filter(|(_, kept)| !kept.hour.is_empty()).map(|(metric, kept)| Distribution {
            metric: metric.clone(),
            window: kept.last.clone(),
            minute: kept.minute.sum(),
            hour: kept.hour.sum(),
            total: kept.total.clone(),
        })
    }

    /// Everything since the instance is shown.
    pub fn totals(&self) -> impl Iterator<Item = (&Metric, &Histogram)> {
        self.of.iter().map(|(metric, kept)| (metric, &kept.total))
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

    proptest! {
        #[test]
        fn a_span_is_the_sum_of_its_windows(windows in prop::collection::vec((1..20u64, prop::collection::vec(0..1u64 << 30, 0..5)), 1..80)) {
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
        }
    }
}
