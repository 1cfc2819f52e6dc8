//! A window's profile as what the forecast takes in.

use super::parts::PartsUsage;
use crate::{forecast::Usage, profile::Profile};

/// The share of a window's requests whose latency is the window's.
const LATENCY_OF: f64 = 0.99;

/// What was used in a window, on cores of this speed.
pub(super) fn of(profile: &Profile, speed: f64, parts: PartsUsage) -> Usage {
    let net = profile.net_bytes_per_s();
    Usage {
        reference_cores: profile.cpu.cores * speed,
        memory_bytes: profile.memory.resident_bytes as f64,
        io_bytes_per_s: profile.io_bytes_per_s(),
        io_latency_ns: profile.io_latency_ns().quantile(LATENCY_OF).map(|ns| ns as f64),
        net_in_bytes_per_s: net.map(|(bytes, _)| bytes),
        net_out_bytes_per_s: net.map(|(_, bytes)| bytes),
        written_bytes_per_s: profile.memory.dirty_bytes_per_s,
        volume_operations_per_s: parts.volumes.map(|flow| flow.operations_per_s),
        volume_bytes_per_s: parts.volumes.map(|flow| flow.bytes_per_s),
        port_bytes_per_s: parts.port_bytes_per_s,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        profile::{BlockProfile, CpuProfile, MemoryProfile, Operation, TcpProfile, histogram::Histogram},
        units::UnixMillis,
    };

    fn profile(counted: bool, latencies: &[u64]) -> Profile {
        let mut latency_ns = Histogram::default();
        latencies.iter().for_each(|&ns| latency_ns.record(ns));
        let block = |operation, bytes| BlockProfile {
            device: "8:0".to_owned(),
            operation,
            bytes,
            latency_ns: latency_ns.clone(),
            queue_ns: Histogram::default(),
            not_split: 0,
            in_flight: 0.0,
        };
        let did = counted && !latencies.is_empty();
        // Nothing is moved by a discard, however much it is of.
        let block = vec![
            block(Operation::Read, 3_000),
            block(Operation::Write, 1_000),
            block(Operation::Discard, 1 << 30),
        ];
        Profile {
            instance: "a".parse().unwrap(),
            at: UnixMillis(5_000),
            window_ms: 500,
            cpu: CpuProfile { cores: 0.5, ..CpuProfile::default() },
            block: if did { block } else { Vec::new() },
            block_counted: counted,
            disk_neighbours: Vec::new(),
            io: Default::default(),
            tcp: TcpProfile { bytes_in: 10, bytes_out: 20, ..TcpProfile::default() },
            tcp_counted: counted,
            memory: MemoryProfile { resident_bytes: 7, ..MemoryProfile::default() },
        }
    }

    #[test]
    fn a_window_is_told_per_second() {
        let usage = of(&profile(true, &[1 << 20; 3]), 2.0, PartsUsage::default());
        assert_eq!((usage.reference_cores, usage.memory_bytes), (1.0, 7.0));
        assert_eq!(usage.io_bytes_per_s, Some(8_000.0));
        assert_eq!((usage.net_in_bytes_per_s, usage.net_out_bytes_per_s), (Some(20.0), Some(40.0)));
        let latency = usage.io_latency_ns.unwrap();
        assert!((latency / f64::from(1 << 20) - 1.0).abs() < 1.0 / 16.0, "{latency}");
    }

    #[test]
    fn no_request_is_no_latency_and_nothing_counted_is_nothing_known() {
        let usage = of(&profile(true, &[]), 1.0, PartsUsage::default());
        assert_eq!((usage.io_bytes_per_s, usage.io_latency_ns), (Some(0.0), None));
        let usage = of(&profile(false, &[5]), 1.0, PartsUsage::default());
        assert_eq!(
            (usage.io_bytes_per_s, usage.net_in_bytes_per_s, usage.written_bytes_per_s),
            (None, None, None)
        );
    }
}
