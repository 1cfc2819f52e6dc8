//! When to freeze. Pure.

/// What is known of the transfer after a round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observed {
    /// Rounds made so far.
    pub rounds: u32,
    /// Memory sent per second in the last round, in bytes.
    pub bytes_per_s: f64,
    /// Memory that has to be sent now, in bytes: what was written during the last round.
    pub dirty_bytes: f64,
    /// How much of it the instance wrote per second, in bytes: pages that were written twice count once.
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
const MIN_ROUNDS: u32 = 2;

/// Part of the freeze by which another round has to make it shorter.
const WORTH_A_ROUND: f64 = 0.1;
/// Rounds in a row that may bring nothing, where another one promises much: under load it is chance that one took so long.
const PATIENCE_ROUNDS: u32 = 2;
/// Part of the freeze that is much.
const MUCH: f64 = 0.3;
/// The same in milliseconds, at least: less than the freeze differs by from one time to the next.
const WORTH_A_ROUND_MS: f64 = 2.0;

/// Unavailability if the instance were frozen now, in milliseconds.
pub fn expected_ms(observed: &Observed) -> f64 {
    observed.fixed_ms + observed.dirty_bytes / observed.bytes_per_s.max(1.0) * 1e3
}

/// By how many milliseconds another round would make the freeze shorter: it leaves what is written while it is sent.
fn gain_ms(observed: &Observed) -> f64 {
    let bytes_per_s = observed.bytes_per_s.max(1.0);
    let left = observed.dirty_bytes_per_s * observed.dirty_bytes / bytes_per_s;
    (observed.dirty_bytes - left) / bytes_per_s * 1e3
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

/// Decides after a round. What fits the budget is still made shorter, as long as the last round did so and the next one is
/// worth it: pages that are written all the time are there again, however soon one looks.
pub fn decide(observed: &Observed, budget: &Budget) -> Step {
    let expected_ms = expected_ms(observed);
    let fits = expected_ms <= budget.unavailability_ms as f64;
    let more = observed.rounds < budget.rounds.max(MIN_ROUNDS);
    let worth_it = worth_a_round_ms(expected_ms);
    let gain_ms = gain_ms(observed);
    let patient = gain_ms > MUCH * expected_ms && observed.fruitless_rounds < PATIENCE_ROUNDS;
    let worthwhile = observed.rounds < MIN_ROUNDS || (is_shorter(observed) || patient) && gain_ms > worth_it;
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
        rounds: 2,
        bytes_per_s: 1e9,
        dirty_bytes: 0.0,
        dirty_bytes_per_s: 0.0,
        fixed_ms: 10.0,
        least_expected_ms: None,
        fruitless_rounds: 0,
    };
    const BUDGET: Budget = Budget { unavailability_ms: 50, rounds: 10 };

    #[test]
    fn an_idle_instance_freezes_after_the_least_rounds() {
        assert_eq!(decide(&IDLE, &BUDGET), Step::Freeze);
        assert_eq!(decide(&Observed { rounds: 1, ..IDLE }, &BUDGET), Step::Continue);
    }

    #[test]
    fn what_fits_is_made_shorter_as_long_as_a_round_pays() {
        let patient = Budget { unavailability_ms: 2000, rounds: 10 };
        // A second's worth of sending, of which a tenth is written again meanwhile.
        let much = Observed { dirty_bytes: 1e9, dirty_bytes_per_s: 1e8, ..IDLE };
        assert_eq!(decide(&much, &patient), Step::Continue);
        assert_eq!(decide(&Observed { rounds: 10, ..much }, &patient), Step::Freeze);
        // As fast as it is sent: nothing is won by waiting.
        assert_eq!(decide(&Observed { dirty_bytes_per_s: 1e9, ..much }, &patient), Step::Freeze);
        // The last rounds were for nothing: once, it may be chance.
        let fruitless = Observed { least_expected_ms: Some(1010.0), ..much };
        assert_eq!(decide(&fruitless, &patient), Step::Continue);
        assert_eq!(decide(&Observed { fruitless_rounds: 2, ..fruitless }, &patient), Step::Freeze);
        // Nor is there much to be won by another one.
        let slow = Observed { dirty_bytes_per_s: 8e8, ..fruitless };
        assert_eq!(decide(&slow, &patient), Step::Freeze);
        // A millisecond: not worth it.
        assert_eq!(decide(&Observed { dirty_bytes: 1e6, ..IDLE }, &patient), Step::Freeze);
    }

    #[test]
    fn a_link_slower_than_the_writes_gives_up_at_the_last_round() {
        let observed =
            Observed { rounds: 9, bytes_per_s: 1e6, dirty_bytes: 1e6, dirty_bytes_per_s: 1e6, ..IDLE };
        assert_eq!(decide(&observed, &BUDGET), Step::Continue);
        assert_eq!(decide(&Observed { rounds: 10, ..observed }, &BUDGET), Step::GiveUp);
    }

    proptest! {
        #[test]
        fn it_never_freezes_above_the_budget(
            rounds in 0_u32..40, rate in 0.0..1e10, dirty in 0.0..1e10, writing in 0.0..1e10,
            before in prop::option::of(0.0..1e4), fruitless in 0_u32..5
        ) {
            let observed = Observed {
                rounds, bytes_per_s: rate, dirty_bytes: dirty, dirty_bytes_per_s: writing, fixed_ms: 5.0,
                least_expected_ms: before, fruitless_rounds: fruitless
            };
            let step = decide(&observed, &BUDGET);
            if step == Step::Freeze {
                prop_assert!(expected_ms(&observed) <= 50.0);
            }
            // And it comes to an end.
            prop_assert!(rounds < BUDGET.rounds || step != Step::Continue);
        }
    }
}
