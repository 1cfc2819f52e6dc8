//! Over how long the times are that are shown.

use crate::{
    profile::{BlockProfile, OffCpuProfile, Operation, Profile, histogram::Histogram},
    status::{Distribution, Metric},
};

/// Over what. Everything else that is shown is of the last window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Shown {
    #[default]
    Window,
    Minute,
    Hour,
}

impl Shown {
    /// What it is called.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Window => "window",
            Self::Minute => "minute",
            Self::Hour => "hour",
        }
    }

    /// The next longer one; the shortest after the longest.
    pub(super) fn next(self) -> Self {
        match self {
            Self::Window => Self::Minute,
            Self::Minute => Self::Hour,
            Self::Hour => Self::Window,
        }
    }

    fn of(self, distribution: &Distribution) -> &Histogram {
        match self {
            Self::Window => &distribution.window,
            Self::Minute => &distribution.minute,
            Self::Hour => &distribution.hour,
        }
    }

    /// Puts the times of the span into the place of those of the last window, which are what a profile comes with.
    pub(super) fn put(self, profile: &mut Profile, distributions: &[Distribution]) {
        if self == Self::Window {
            return;
        }
        // What had no sample within the hour is not told of.
        let cpu = &mut profile.cpu;
        for times in [&mut cpu.run_queue_ns, &mut cpu.on_cpu_ns, &mut profile.tcp.rtt_us] {
            *times = Histogram::default();
        }
        cpu.off_cpu = cpu.off_cpu.take().map(|_| OffCpuProfile::default());
        for connections in profile.tcp.connections.iter_mut() {
            connections.life_us = Histogram::default();
        }
        for faults in profile.memory.fault_latency.iter_mut() {
            faults.major_ns = Histogram::default();
            faults.minor_ns = faults.minor_ns.take().map(|_| Histogram::default());
        }
        for block in &mut profile.block {
            (block.latency_ns, block.queue_ns) = Default::default();
        }
        for distribution in distributions {
            let times = self.of(distribution).clone();
            match &distribution.metric {
                Metric::RunQueueNs => profile.cpu.run_queue_ns = times,
                Metric::OnCpuNs => profile.cpu.on_cpu_ns = times,
                Metric::OffCpuNs { reason } => {
                    *profile.cpu.off_cpu.get_or_insert_default().of_mut(*reason) = times;
                }
                Metric::TcpRttUs => profile.tcp.rtt_us = times,
                // Where they are not counted now, there is nothing to show them with.
                Metric::TcpLifeUs => {
                    profile.tcp.connections.iter_mut().for_each(|of| of.life_us = times.clone());
                }
                Metric::MajorFaultNs => {
                    profile.memory.fault_latency.get_or_insert_default().major_ns = times;
                }
                Metric::MinorFaultNs => {
                    profile.memory.fault_latency.get_or_insert_default().minor_ns = Some(times);
                }
                // None within the span, but within the hour.
                Metric::BlockDeviceNs { .. } | Metric::BlockQueueNs { .. } if times.count == 0 => {}
                Metric::BlockDeviceNs { device, operation } => {
                    block(profile, device, *operation).latency_ns = times;
                }
                Metric::BlockQueueNs { device, operation } => {
                    block(profile, device, *operation).queue_ns = times;
                }
            }
        }
    }
}

/// What the profile has of a device and operation: nothing but these times, if there were no requests in the last window.
fn block<'p>(profile: &'p mut Profile, device: &str, operation: Operation) -> &'p mut BlockProfile {
    let is_it = |block: &BlockProfile| block.device == device && block.operation == operation;
    let place = profile.block.iter().position(is_it).unwrap_or_else(|| {
        profile.block.push(BlockProfile {
            device: device.to_owned(),
            operation,
            bytes: 0,
            latency_ns: Histogram::default(),
            queue_ns: Histogram::default(),
            not_split: 0,
            in_flight: 0.0,
        });
        profile.block.len() - 1
    });
    &mut profile.block[place]
}
