//! When to freeze. Pure.

/// What is known of the transfer when a round has arrived.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observed {
    /// Rounds that have arrived, the first, which sends everything, included.
    pub rounds: u32,
    /// Memory sent per second in the last round, in bytes.
    pub bytes_per_s: f64,
    /// Milliseconds since the look that found what was sent in it: what is written in this time, a freeze has still to send.
    pub since_look_ms: f64,
    /// Milliseconds of a round that finds nothing to send.
    pub round_ms: f64,
    /// How much the instance wrote per second before that look, in bytes: pages that were written twice count once.
    pub dirty_bytes_per_s: f64,
    /// Milliseconds of a freeze in which nothing was written: task image, restoring, commit.
    pub fixed_ms: f64,
    /// What [`expected_ms`] was at its least after an earlier round; `None` after the first.
    pub least_expected_ms: Option<f64>,
    /// Rounds in a row, before this one, after which it was not less.
    pub fruitless_rounds: u32,
}

/// What may be spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Milliseconds of unavailability.
    pub unavailability_ms: u64,
    /// Rounds.
    pub rounds: u32,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Another round while the instance runs.
    Continue,
    /// Freeze now.
    Freeze,
    /// It can't be done within the budget.
    GiveUp,
}

/// Fewer rounds leave pages cold that are written all the time: their deltas have no base yet.
const MIN_ROUNDS: u32 = 3;

/// Part of the freeze by which another round has to make it shorter.
const WORTH_A_ROUND: f64 = 0.1;
/// The same in milliseconds, at least: less than the freeze differs by from one time to the next.
const WORTH_A_ROUND_MS: f64 = 2.0;
/// Rounds in a row that may bring nothing, where another one promises much.
const PATIENCE_ROUNDS: u32 = 2;
/// Part of the freeze that is much.
const MUCH: f64 = 0.3;
/// Rounds in a row that may bring nothing, where an earlier one has shown that a freeze can be shorter: that one took long is
/// chance on a busy host, and one of the next is as short again.
const CHANCES: u32 = 6;

/// Bytes that the instance writes in `ms` milliseconds.
fn written_bytes(observed: &Observed, ms: f64) -> f64 {
    observed.dirty_bytes_per_s * ms / 1e3
}

/// Milliseconds that sending what is written in `ms` milliseconds takes.
fn sending_ms(observed: &Observed, ms: f64) -> f64 {
    written_bytes(observed, ms) / observed.bytes_per_s.max(1.0) * 1e3
}

/// Unavailability if the instance were frozen now, in milliseconds: it was written to since the last look.
pub fn expected_ms(observed: &Observed) -> f64 {
    observed.fixed_ms + sending_ms(observed, observed.since_look_ms)
}

/// By how many milliseconds another round would make the freeze shorter: what is written while it is sent is left then.
fn gain_ms(observed: &Observed) -> f64 {
    let next_ms = observed.round_ms + sending_ms(observed, observed.since_look_ms);
    sending_ms(observed, observed.since_look_ms) - sending_ms(observed, next_ms)
}

/// By how many milliseconds a round has to make a freeze of `expected_ms` shorter.
fn worth_a_round_ms(expected_ms: f64) -> f64 {
    (WORTH_A_ROUND * expected_ms).max(WORTH_A_ROUND_MS)
}

/// Whether the last round has made the freeze shorter than it would have been after any before.
pub fn is_shorter(observed: &Observed) -> bool {
    let expected_ms = expected_ms(observed);
    observed.least_expected_ms.is_none_or(|least| least - expected_ms > worth_a_round_ms(expected_ms))
}

/// Whether the freeze would be longer now than it would have been after an earlier round.
fn is_longer(observed: &Observed) -> bool {
    let expected_ms = expected_ms(observed);
    observed.least_expected_ms.is_some_and(|least| expected_ms - least > worth_a_round_ms(least))
}

/// Decides after a round. What fits the budget is still made shorter, as long as the last round did so and the next one is
/// worth it: pages that are written all the time are there again, however soon one looks. After a round that took longer than
/// others more was written than need be: then one of the next is waited for that is as short as the shortest.
pub fn decide(observed: &Observed, budget: &Budget) -> Step {
    let expected_ms = expected_ms(observed);
    let fits = expected_ms <= budget.unavailability_ms as f64;
    let more = observed.rounds < budget.rounds.max(MIN_ROUNDS);
    let gain_ms = gain_ms(observed);
    let pays = is_shorter(observed) && gain_ms > worth_a_round_ms(expected_ms);
    let promises_much = gain_ms > MUCH * expected_ms && observed.fruitless_rounds < PATIENCE_ROUNDS;
    let was_chance = is_longer(observed) && observed.fruitless_rounds < CHANCES;
    let worthwhile = observed.rounds < MIN_ROUNDS || pays || promises_much || was_chance;
    match fits {
        true if more && worthwhile => Step::Continue,
        true => Step::Freeze,
        false if more => Step::Continue,
        false => Step::GiveUp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDLE: Observed = Observed {
        rounds: 3,
        bytes_per_s: 1e9,
        since_look_ms: 5.0,
        round_ms: 5.0,
        dirty_bytes_per_s: 0.0,
        fixed_ms: 10.0,
        least_expected_ms: None,
        fruitless_rounds: 0,
    };
    const BUDGET: Budget = Budget { unavailability_ms: 50, rounds: 10 };
    const PATIENT: Budget = Budget { unavailability_ms: 2000, rounds: 30 };

    #[test]
    fn an_idle_instance_freezes_after_the_least_rounds() {
        assert_eq!(decide(&IDLE, &BUDGET), Step::Freeze);
        assert_eq!(decide(&Observed { rounds: 2, ..IDLE }, &BUDGET), Step::Continue);
    }

    #[test]
    fn what_fits_is_made_shorter_as_long_as_a_round_pays() {
        // A second's worth of writes, of which a tenth is written again while they are sent.
        let much = Observed { since_look_ms: 1e3, dirty_bytes_per_s: 1e8, ..IDLE };
        assert_eq!(expected_ms(&much), 110.0);
        assert_eq!(decide(&much, &PATIENT), Step::Continue);
        assert_eq!(decide(&Observed { rounds: 30, ..much }, &PATIENT), Step::Freeze);
        // As fast as it is sent: nothing is won by waiting.
        assert_eq!(decide(&Observed { dirty_bytes_per_s: 1e9, ..much }, &PATIENT), Step::Freeze);
        // The last rounds were for nothing: once, it may be chance.
        let fruitless = Observed { least_expected_ms: Some(110.0), ..much };
        assert_eq!(decide(&fruitless, &PATIENT), Step::Continue);
        assert_eq!(decide(&Observed { fruitless_rounds: 2, ..fruitless }, &PATIENT), Step::Freeze);
        // A millisecond: not worth it.
        assert_eq!(
            decide(&Observed { since_look_ms: 10.0, dirty_bytes_per_s: 1e8, ..IDLE }, &PATIENT),
            Step::Freeze
        );
    }

    #[test]
    fn after_a_round_that_took_long_a_short_one_is_waited_for() {
        // Rounds of 15 ms were seen, and in them a freeze of 14 ms.
        let short = Observed {
            rounds: 8,
            since_look_ms: 15.0,
            round_ms: 10.0,
            dirty_bytes_per_s: 8e7,
            bytes_per_s: 3e8,
            ..IDLE
        };
        let seen = Some(expected_ms(&short));
        let short = Observed { least_expected_ms: seen, fruitless_rounds: 1, ..short };
        assert_eq!(decide(&short, &PATIENT), Step::Freeze);
        // This one took 50 ms, and the next one promises nothing by itself, as little was sent in so much time.
        let long = Observed { since_look_ms: 50.0, bytes_per_s: 9e7, ..short };
        assert!(gain_ms(&long) < 2.0, "{}", gain_ms(&long));
        assert_eq!(decide(&long, &PATIENT), Step::Continue);
        // The host stays as busy.
        assert_eq!(decide(&Observed { fruitless_rounds: CHANCES, ..long }, &PATIENT), Step::Freeze);
        assert_eq!(decide(&Observed { rounds: 30, ..long }, &PATIENT), Step::Freeze);
    }

    #[test]
    fn a_link_slower_than_the_writes_gives_up_at_the_last_round() {
        let observed =
            Observed { rounds: 9, bytes_per_s: 1e6, since_look_ms: 1e3, dirty_bytes_per_s: 1e6, ..IDLE };
        assert_eq!(decide(&observed, &BUDGET), Step::Continue);
        assert_eq!(decide(&Observed { rounds: 10, ..observed }, &BUDGET), Step::GiveUp);
    }

    /// Rounds of an instance that writes `dirty_bytes_per_s`, over a link that sends `bytes_per_s` and takes as many milliseconds
    /// longer in each round as `delays` says: how long the last one took, and the shortest.
    fn rounds_until_the_freeze(dirty_bytes_per_s: f64, bytes_per_s: f64, delays: &[f64]) -> (f64, f64, u32) {
        let (mut least, mut shortest_ms, mut fruitless_rounds) = (None, f64::INFINITY, 0);
        let mut since_look_ms = 500.0;
        for (rounds, delay) in (2..).zip(delays.iter().cycle()) {
            let bytes = dirty_bytes_per_s * since_look_ms / 1e3;
            since_look_ms = 8.0 + delay + bytes / bytes_per_s * 1e3;
            shortest_ms = since_look_ms.min(shortest_ms);
            let observed = Observed {
                rounds,
                bytes_per_s: bytes / (since_look_ms - 8.0) * 1e3,
                since_look_ms,
                round_ms: 8.0,
                dirty_bytes_per_s,
                least_expected_ms: least,
                fruitless_rounds,
                ..IDLE
            };
            let expected = expected_ms(&observed);
            if decide(&observed, &PATIENT) != Step::Continue {
                return (since_look_ms, shortest_ms, rounds);
            }
            fruitless_rounds = if is_shorter(&observed) { 0 } else { fruitless_rounds + 1 };
            least = Some(least.map_or(expected, |least: f64| least.min(expected)));
        }
        unreachable!("there is a last round")
    }

    proptest! {
        #[test]
        fn it_never_freezes_above_the_budget(
            rounds in 0_u32..40, rate in 0.0..1e10, since in 0.0..1e4, writing in 0.0..1e10,
            before in prop::option::of(0.0..1e4), fruitless in 0_u32..8
        ) {
            let observed = Observed {
                rounds, bytes_per_s: rate, since_look_ms: since, round_ms: 5.0, dirty_bytes_per_s: writing,
                fixed_ms: 5.0, least_expected_ms: before, fruitless_rounds: fruitless
            };
            let step = decide(&observed, &BUDGET);
            if step == Step::Freeze {
                prop_assert!(expected_ms(&observed) <= 50.0);
            }
            // And it comes to an end.
            prop_assert!(rounds < BUDGET.rounds || step != Step::Continue);
        }

        #[test]
        fn on_a_busy_host_it_freezes_after_a_short_round(
            delays in prop::collection::vec(prop::sample::select(vec![0.0, 0.0, 1.0, 2.0, 30.0, 45.0]), 40..60)
        ) {
            // What it can know of, and no more: where one round in two is short, seven long ones in a row are rare.
            let long = |delays: &[f64]| delays.iter().all(|delay| *delay > 2.0);
            prop_assume!(!delays.windows(5).any(long));
            let (last_ms, shortest_ms, rounds) = rounds_until_the_freeze(8e7, 4e8, &delays);
            prop_assert!(last_ms < shortest_ms + 8.0, "{last_ms} ms, and {shortest_ms} ms were possible");
            prop_assert!(rounds < 20);
        }
    }
}
