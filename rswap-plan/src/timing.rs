//! When a migration begins: in the time, between now and the latest start, in which least is expected to be written.

use rswap_forecast::Resource;
use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Decision, InstanceView, MoveKind, Outcome, Planner, compare::Round, need};

/// A time must be quieter by this share to be moved to: forecasts waver.
const CLEARLY: f64 = 0.2;
/// Of times that are nearly as quiet as the quietest, the first is taken.
const NEARLY: f64 = 0.05;
/// Moments of a migration at which the forecast is looked up.
const MOMENTS: u32 = 8;

/// What tells when little is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TimedBy {
    /// The forecast of what is written, in bytes per second.
    Written,
    /// The forecast of CPU use, in reference cores, where writes are not tracked, and no time stands out in what is forecast of them: who does little
    /// writes little.
    Cpu,
}

/// Which times a migration could begin at, and which was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Timing {
    /// What the amounts are of.
    pub by: TimedBy,
    /// Possible starts, in milliseconds from now, with the mean amount that is expected while the migration then goes on. The first is
    /// now, the last is the latest.
    pub starts: Vec<(u64, f64)>,
    /// The one that was chosen.
    pub chosen_ms: u64,
}

/// The choice. `expected` are (milliseconds from now, amount), now first; the migration takes `takes_ms` and begins within
/// `latest_ms`. Where no time is clearly quieter than `otherwise_ms`, it is that one.
pub(crate) fn choose(
    by: TimedBy,
    expected: &[(u64, f64)],
    takes_ms: u64,
    latest_ms: u64,
    otherwise_ms: u64,
) -> Timing {
    let otherwise_ms = otherwise_ms.min(latest_ms);
    let mut starts: Vec<u64> = expected.iter().map(|(at, _)| *at).filter(|at| *at < latest_ms).collect();
    starts.extend([0, otherwise_ms, latest_ms]);
    starts.sort_unstable();
    starts.dedup();
    let mean = |start: u64| {
        let moments =
            (0..MOMENTS).map(|moment| start + takes_ms * u64::from(moment) / u64::from(MOMENTS - 1));
        moments.map(|moment| at(expected, moment)).sum::<f64>() / f64::from(MOMENTS)
    };
    let starts: Vec<(u64, f64)> = starts.into_iter().map(|start| (start, mean(start))).collect();
    let usual = mean(otherwise_ms);
    let least = starts.iter().map(|(_, amount)| *amount).fold(f64::INFINITY, f64::min);
    let quiet = |amount: f64| amount <= least + NEARLY * (usual - least);
    let quietest = starts.iter().find(|(_, amount)| quiet(*amount)).map(|(start, _)| *start);
    let clearly = least < usual * (1.0 - CLEARLY);
    let chosen_ms = quietest.filter(|_| clearly).unwrap_or(otherwise_ms);
    Timing { by, starts, chosen_ms }
}

/// The amount at a moment: along the line between two that are known, and after the last as it is there.
fn at(expected: &[(u64, f64)], moment: u64) -> f64 {
    let next = expected.partition_point(|(at, _)| *at <= moment);
    let Some(&(from, amount)) = next.checked_sub(1).and_then(|last| expected.get(last)) else {
        return expected.first().map_or(0.0, |(_, amount)| *amount);
    };
    let Some(&(to, then)) = expected.get(next) else { return amount };
    amount + (then - amount) * (moment - from) as f64 / (to - from) as f64
}

impl Timing {
    /// The amount that is expected while it goes on, if it begins at this one of the starts.
    pub fn amount(&self, start_ms: u64) -> Option<f64> {
        self.starts.iter().find(|(start, _)| *start == start_ms).map(|(_, amount)| *amount)
    }

    /// The latest start, in milliseconds from now.
    pub fn latest_ms(&self) -> u64 {
        self.starts.last().map_or(0, |(start, _)| *start)
    }
}

impl Planner {
    /// A migration begins when little memory is written: by the forecast of that, where there is one; else at once in a time that is
    /// quieter than most, where it is known what it usually writes; else, where writes are not tracked now, by the forecast of its CPU use.
    /// It waits no longer than it can, and, where nothing forces it, no longer than a planning horizon.
    pub(crate) fn time(&self, view: &InstanceView, round: &Round<'_, '_>, decision: &mut Decision) {
        let now = decision.at;
        let wanted = self.memory.get(&decision.instance).and_then(|memory| memory.wanted).unwrap_or(now);
        let Outcome::Move { to, start_by, forced } = &decision.outcome else { return };
        let latest = match forced {
            true => *start_by,
            false => now.max(UnixMillis(wanted.0.saturating_add(self.config.horizon_ms))),
        };
        let price =
            decision.candidates.iter().find(|candidate| candidate.pool == *to).and_then(|to| to.move_price);
        let takes_ms = price.map_or(0, |price| (price.seconds * 1000.0) as u64);
        let by = |by, resource, here: Option<f64>| {
            let mut expected = need::expected(view, resource, &self.config);
            let here = here.or(expected.first().map(|(_, amount)| *amount))?;
            expected.insert(0, (0, here.max(0.0)));
            let known = expected.len() > 1 && here.is_finite();
            known.then(|| choose(by, &expected, takes_ms, latest.since(now), start_by.since(now)))
        };
        let mut timing = by(TimedBy::Written, Resource::Written, view.dirty_bytes_per_s);
        // What looks taught that are minutes apart may not tell the times of the next minute apart, where CPU use does.
        let otherwise_ms = start_by.since(now).min(latest.since(now));
        let tells_none = timing.as_ref().is_none_or(|timing| timing.chosen_ms == otherwise_ms);
        if view.dirty_bytes_per_s.is_none() && tells_none {
            let on = round.current(view, MoveKind::Cpu).or_else(|| round.current(view, MoveKind::Host));
            let speed = on.map_or(1.0, |index| round.pools[index].performance);
            timing = by(TimedBy::Cpu, Resource::Cpu, Some(view.cores * speed)).or(timing);
        }
        let chosen = match (&timing, decision.writing) {
            (Some(timing), _) => timing.chosen_ms,
            (None, Some(writing)) if writing.is_quiet() => 0,
            (None, Some(_)) => latest.since(now),
            (None, None) => start_by.since(now),
        };
        decision.timing = timing;
        if let Outcome::Move { start_by, .. } = &mut decision.outcome {
            *start_by = UnixMillis(now.0.saturating_add(chosen));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUSY_LATER: [(u64, f64); 4] = [(0, 5.0), (5_000, 1.0), (15_000, 1.0), (30_000, 9.0)];

    #[test]
    fn the_first_quiet_time_is_taken() {
        let timing = choose(TimedBy::Written, &BUSY_LATER, 2_000, 29_000, 29_000);
        assert_eq!(timing.chosen_ms, 5_000);
        assert_eq!(timing.starts.len(), 4, "{timing:?}");
        assert_eq!((timing.amount(5_000), timing.latest_ms()), (Some(1.0), 29_000));
        // One that takes long would reach the rise from there: what is loud at first counts less.
        let long = choose(TimedBy::Written, &BUSY_LATER, 16_000, 29_000, 29_000);
        assert_eq!(long.chosen_ms, 0, "{long:?}");
    }

    #[test]
    fn where_nothing_is_quieter_it_is_as_it_was() {
        let even = [(0, 3.0), (5_000, 2.8), (30_000, 3.1)];
        for otherwise in [0, 20_000] {
            assert_eq!(choose(TimedBy::Cpu, &even, 1_000, 20_000, otherwise).chosen_ms, otherwise);
        }
        let none = [(0, 0.0), (5_000, 0.0)];
        assert_eq!(choose(TimedBy::Cpu, &none, 1_000, 20_000, 20_000).chosen_ms, 20_000);
        assert_eq!(choose(TimedBy::Cpu, &BUSY_LATER, 1_000, 0, 0).chosen_ms, 0, "there is no time to wait");
    }

    proptest! {
        /// It is never later than it may be, never louder than it would have been, and no other unit of the amounts changes it.
        #[test]
        fn a_choice_is_possible_and_no_worse(
            steps in prop::collection::vec((1u64..20_000, 0.0..1e9f64), 1..8),
            takes_ms in 0u64..60_000, latest_ms in 0u64..120_000, otherwise_ms in 0u64..120_000,
        ) {
            let mut expected = vec![(0, steps[0].1)];
            for (step, amount) in &steps {
                expected.push((expected[expected.len() - 1].0 + step, *amount));
            }
            let timing = choose(TimedBy::Written, &expected, takes_ms, latest_ms, otherwise_ms);
            prop_assert!(timing.chosen_ms <= latest_ms);
            let chosen = timing.amount(timing.chosen_ms).unwrap();
            let otherwise = otherwise_ms.min(latest_ms);
            let usual = timing.amount(otherwise).unwrap();
            prop_assert!(chosen <= usual, "{} and {}", chosen, usual);
            if timing.chosen_ms != otherwise {
                prop_assert!(chosen < usual * (1.0 - CLEARLY) + usual * NEARLY + 1e-9);
            }
            let doubled: Vec<(u64, f64)> = expected.iter().map(|(at, amount)| (*at, amount * 2.0)).collect();
            let again = choose(TimedBy::Written, &doubled, takes_ms, latest_ms, otherwise_ms);
            prop_assert_eq!(again.chosen_ms, timing.chosen_ms);
        }
    }
}
