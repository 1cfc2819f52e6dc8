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
    /// Milliseconds of a freeze in which nothing was written: task image, restoring, commit.
    pub fixed_ms: f64,
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

/// Unavailability if the instance were frozen now, in milliseconds.
pub fn expected_ms(observed: &Observed) -> f64 {
    observed.fixed_ms + observed.dirty_bytes / observed.bytes_per_s.max(1.0) * 1e3
}

/// Decides after a round.
pub fn decide(observed: &Observed, budget: &Budget) -> Step {
    let fits = expected_ms(observed) <= budget.unavailability_ms as f64;
    if fits && observed.rounds >= MIN_ROUNDS {
        Step::Freeze
    } else if observed.rounds < budget.rounds.max(MIN_ROUNDS) {
        Step::Continue
    } else {
        Step::GiveUp
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUDGET: Budget = Budget { unavailability_ms: 50, rounds: 10 };

    #[test]
    fn an_idle_instance_freezes_after_the_least_rounds() {
        let observed = Observed { rounds: 2, bytes_per_s: 1e9, dirty_bytes: 0.0, fixed_ms: 10.0 };
        assert_eq!(decide(&observed, &BUDGET), Step::Freeze);
        assert_eq!(decide(&Observed { rounds: 1, ..observed }, &BUDGET), Step::Continue);
    }

    #[test]
    fn a_link_slower_than_the_writes_gives_up_at_the_last_round() {
        let observed = Observed { rounds: 9, bytes_per_s: 1e6, dirty_bytes: 1e6, fixed_ms: 10.0 };
        assert_eq!(decide(&observed, &BUDGET), Step::Continue);
        assert_eq!(decide(&Observed { rounds: 10, ..observed }, &BUDGET), Step::GiveUp);
    }

    proptest! {
        #[test]
        fn it_never_freezes_above_the_budget(rounds in 0_u32..40, rate in 0.0..1e10, dirty in 0.0..1e10) {
            let observed = Observed { rounds, bytes_per_s: rate, dirty_bytes: dirty, fixed_ms: 5.0 };
            if decide(&observed, &BUDGET) == Step::Freeze {
                prop_assert!(expected_ms(&observed) <= 50.0);
            }
        }
    }
}
