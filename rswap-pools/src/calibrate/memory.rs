//! Memory: how long one load takes that waits for the one before, and how fast much is read.

use std::{hint::black_box, io, time::Duration};

use super::{CalibrateError, Result, Stop, best_rate, failed, next, pin};

/// A cache line: each holds where the next one is.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Line {
    next: u64,
    rest: [u64; 7],
}

const LINE_BYTES: u64 = 64;
const LEAST_BYTES: u64 = 64 << 20;
const MOST_BYTES: u64 = 512 << 20;
/// Of what is free.
const SHARE_OF_FREE: u64 = 8;
const EACH: Duration = Duration::from_millis(300);
const STEPS: u64 = 1 << 14;

/// How much memory is read for caches of `cache_bytes`: four times that, within bounds; `None` if not so much is to be had.
pub fn memory_bytes(cache_bytes: u64, free_bytes: u64) -> Option<u64> {
    let wanted = cache_bytes.saturating_mul(4).clamp(LEAST_BYTES, MOST_BYTES);
    let bytes = wanted.min(free_bytes / SHARE_OF_FREE);
    (bytes >= LEAST_BYTES).then_some(bytes)
}

/// Measures `bytes` of memory from `cpu`. `bind` puts what the calling thread allocates from then on where it is to be; it is called
/// on the thread that measures.
pub fn memory(
    cpu: Option<usize>,
    bytes: u64,
    bind: &(dyn Fn() -> io::Result<()> + Sync),
    stop: &Stop,
) -> std::result::Result<Vec<Result>, CalibrateError> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            cpu.map_or(Ok(()), pin)?;
            bind().map_err(failed("bind memory to its node"))?;
            measure(bytes, stop)
        });
        thread.join().unwrap_or_else(|_| Err(CalibrateError::Refused("the benchmark panicked".to_owned())))
    })
}

fn measure(bytes: u64, stop: &Stop) -> std::result::Result<Vec<Result>, CalibrateError> {
    let mut lines = vec![Line::default(); (bytes / LINE_BYTES) as usize];
    one_cycle(&mut lines, stop)?;
    let mut at = 0u64;
    // The order is random: every pass of a millisecond or two goes through all of the memory.
    let steps_per_s = best_rate(EACH, stop, || {
        for _ in 0..STEPS {
            at = lines[at as usize].next;
        }
        black_box(at);
        STEPS
    })?;
    let latency_ns = 1e9 / steps_per_s;
    let read = best_rate(EACH, stop, || {
        let sum = lines.iter().fold(0u64, |sum, line| {
            line.rest.iter().fold(sum.wrapping_add(line.next), |sum, word| sum.wrapping_add(*word))
        });
        black_box(sum);
        lines.len() as u64 * LINE_BYTES
    })?;
    let mut value = 0;
    let written = best_rate(EACH, stop, || {
        value += 1;
        lines.fill(Line { next: value, rest: [value; 7] });
        black_box(&lines);
        lines.len() as u64 * LINE_BYTES
    })?;
    Ok(vec![("latency_ns", latency_ns), ("read_bytes_per_s", read), ("write_bytes_per_s", written)])
}

/// Links all lines into one cycle in an order that no prefetcher foresees (Sattolo's algorithm).
fn one_cycle(lines: &mut [Line], stop: &Stop) -> std::result::Result<(), CalibrateError> {
    for (place, line) in lines.iter_mut().enumerate() {
        line.next = place as u64;
    }
    let mut state = 0x9e37_79b9_7f4a_7c15;
    for place in (1..lines.len()).rev() {
        let other = (next(&mut state) % place as u64) as usize;
        let (one, two) = (lines[place].next, lines[other].next);
        (lines[place].next, lines[other].next) = (two, one);
        if place % (1 << 16) == 0 {
            stop.check()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_as_beats_the_caches_and_no_more_than_is_to_be_had() {
        let plenty = 64 << 30;
        assert_eq!(memory_bytes(1 << 20, plenty), Some(LEAST_BYTES));
        assert_eq!(memory_bytes(100 << 20, plenty), Some(400 << 20));
        assert_eq!(memory_bytes(u64::MAX, plenty), Some(MOST_BYTES));
        assert_eq!(memory_bytes(100 << 20, 1 << 30), Some(128 << 20));
        assert_eq!(memory_bytes(0, LEAST_BYTES * SHARE_OF_FREE - 1), None);
    }

    #[test]
    fn the_cycle_leads_through_every_line() {
        let mut lines = vec![Line::default(); 4099];
        one_cycle(&mut lines, &Stop::default()).unwrap();
        let mut at = 0;
        let length = (1..=lines.len()).find(|_| {
            at = lines[at as usize].next;
            at == 0
        });
        assert_eq!(length, Some(lines.len()));
    }

    #[test]
    fn memory_is_measured_and_a_refused_binding_is_an_error() {
        let stop = Stop::default();
        let found = memory(None, 8 << 20, &|| Ok(()), &stop).unwrap();
        let value = |what| found.iter().find(|(name, _)| *name == what).unwrap().1;
        assert!((0.5..10_000.0).contains(&value("latency_ns")), "{found:?}");
        assert!(value("read_bytes_per_s") > 1e8 && value("write_bytes_per_s") > 1e8, "{found:?}");
        let refused = memory(None, 8 << 20, &|| Err(io::ErrorKind::PermissionDenied.into()), &stop);
        assert!(matches!(refused, Err(CalibrateError::Io { .. })));
    }
}
