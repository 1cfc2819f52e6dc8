//! A window's profile as what the forecast takes in.

use super::parts::PartsUsage;
use crate::{
    forecast::Usage,
    profile::{Profile, SPANS_S},
};

/// The share of a window's requests whose latency is the window's.
const LATENCY_OF: f64 = 0.99;
/// The share of an instance's memory that a look at writes may leave out. Up to there it is mostly what is of files and never written, and what of it is
/// written is missing; beyond, nobody knows what is missing.
const LEFT_OUT_AT_MOST: f64 = 0.25;

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
        written_bytes_per_s: profile.memory.dirty_bytes_per_s.or_else(|| written_at_look(profile)),
        volume_operations_per_s: parts.volumes.map(|flow| flow.operations_per_s),
        volume_bytes_per_s: parts.volumes.map(|flow| flow.bytes_per_s),
        port_bytes_per_s: parts.port_bytes_per_s,
    }
}

/// Bytes written per second, by the look at writes that ended in this window. There is one every few minutes; windows without are unseen, and what an
/// earlier one found is not said again of them.
fn written_at_look(profile: &Profile) -> Option<f64> {
    let ages = profile.memory.written_ages.as_ref()?;
    // The shortest: a round of a migration is no longer. The longer the span, the more often is a page written in it that counts once.
    let look = ages.within(SPANS_S[0])?;
    let began = profile.at.0.saturating_sub(profile.window_ms);
    let is_of_window = look.at.0 > began && look.at <= profile.at;
    let is_of_most = ages.left_out_bytes as f64 <= ages.resident_bytes as f64 * LEFT_OUT_AT_MOST;
    (is_of_window && is_of_most && look.within_ms > 0)
        .then(|| look.bytes as f64 * 1e3 / look.within_ms as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        profile::{
            BlockProfile, CpuProfile, MemoryProfile, Operation, PageAges, TcpProfile, UsedWithin,
            histogram::Histogram,
        },
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

    /// A window with what a look at `at` found of 100 bytes, and longer ones after it.
    fn with_look(at: u64, left_out_bytes: u64) -> Profile {
        let of = |span_s: u64, bytes, after| UsedWithin {
            span_s,
            within_ms: span_s * 1250,
            bytes,
            at: UnixMillis(at + after),
        };
        let ages = PageAges {
            used: vec![of(1, 50, 0), of(2, 60, 200), of(4, 60, 400)],
            resident_bytes: 100,
            left_out_bytes,
            at: UnixMillis(at + 400),
        };
        let mut profile = profile(true, &[]);
        profile.memory.written_ages = Some(ages);
        profile
    }

    fn written(profile: &Profile) -> Option<f64> {
        of(profile, 1.0, PartsUsage::default()).written_bytes_per_s
    }

    #[test]
    fn a_look_at_writes_is_of_the_one_window_in_which_it_ended() {
        // The window is from 4500 to 5000, and looks at longer spans that end in it are none.
        let by_end = [4_100, 4_500, 4_501, 5_000, 5_001].map(|at| written(&with_look(at, 0)));
        assert_eq!(by_end, [None, None, Some(40.0), Some(40.0), None]);
        let mut late = with_look(4_800, 0);
        late.memory.written_ages.as_mut().unwrap().used.remove(0);
        assert_eq!(written(&late), None, "the shortest was passed over");
    }

    #[test]
    fn a_look_that_leaves_out_much_tells_nothing() {
        assert_eq!(written(&with_look(4_800, 25)), Some(40.0));
        assert_eq!(written(&with_look(4_800, 26)), None);
    }

    #[test]
    fn what_a_move_measures_counts_before_a_look() {
        let mut moving = with_look(4_800, 0);
        moving.memory.dirty_bytes_per_s = Some(7.0);
        assert_eq!(written(&moving), Some(7.0));
    }
}
