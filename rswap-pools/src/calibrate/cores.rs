//! Cores: steps per second of one thread, on each core of a set.

use std::{hint::black_box, time::Duration};

use rswap_types::CpuSet;

use super::{CalibrateError, Result, Stop, best_rate, next, pin, quantile};

/// Words of the table that the steps go through: 256 KiB, more than first-level caches have.
const TABLE_WORDS: usize = 32 * 1024;
/// Steps of a pass: under a millisecond on present cores, so that some passes are not interrupted.
const STEPS: u64 = 1 << 18;
const EACH: Duration = Duration::from_millis(250);
const ALL: Duration = Duration::from_secs(10);
const EACH_AT_LEAST: Duration = Duration::from_millis(20);

/// How long each of `count` cores is loaded.
pub fn each_core_for(count: usize) -> Duration {
    (ALL / u32::try_from(count.max(1)).unwrap_or(u32::MAX)).clamp(EACH_AT_LEAST, EACH)
}

/// Loads one core of `cpus` after the other. `operations_per_s` is the median over the cores.
pub fn cores(cpus: &CpuSet, stop: &Stop) -> std::result::Result<Vec<Result>, CalibrateError> {
    let time = each_core_for(cpus.len());
    let mut rates = Vec::with_capacity(cpus.len());
    for &cpu in cpus {
        // A thread for each: the affinity ends with it.
        let measured = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                pin(cpu)?;
                let mut table: Vec<u64> = (0..TABLE_WORDS as u64).collect();
                let mut state = 0x9e37_79b9_7f4a_7c15;
                best_rate(time, stop, || {
                    steps(&mut table, &mut state);
                    STEPS
                })
            });
            thread
                .join()
                .unwrap_or_else(|_| Err(CalibrateError::Refused("the benchmark panicked".to_owned())))
        })?;
        rates.push(measured);
    }
    rates.sort_by(f64::total_cmp);
    let slowest = *rates.first().ok_or_else(|| CalibrateError::Refused("it has no cores".to_owned()))?;
    Ok(vec![("operations_per_s", quantile(&rates, 0.5)), ("slowest_core_operations_per_s", slowest)])
}

/// A step: three shifts, a load, a multiplication, and a store at a place that depends on the steps before.
fn steps(table: &mut [u64], state: &mut u64) {
    for _ in 0..STEPS {
        let place = (next(state) >> 32) as usize % TABLE_WORDS;
        let word = table[place].wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(*state);
        table[place] = word;
        *state ^= word & 1;
        // xorshift stays at 0 for ever.
        *state |= 2;
    }
    black_box(table);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_bounded_however_many_cores() {
        assert_eq!(each_core_for(1), EACH);
        assert_eq!(each_core_for(100), Duration::from_millis(100));
        assert_eq!(each_core_for(100_000), EACH_AT_LEAST);
    }

    #[test]
    fn a_core_is_measured() {
        let found = cores(&CpuSet::from([0]), &Stop::default()).unwrap();
        assert!(found[0].1 > 1e6 && found[0].1 < 1e11, "{found:?}");
        assert!(matches!(cores(&CpuSet::from([100_000]), &Stop::default()), Err(CalibrateError::Refused(_))));
        assert!(matches!(cores(&CpuSet::new(), &Stop::default()), Err(CalibrateError::Refused(_))));
    }
}
