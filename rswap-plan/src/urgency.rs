//! Who chooses first.

use crate::{Decision, Outcome, StayReason};

/// How soon a decided move has to be made.
pub(crate) struct Urgency {
    forced: bool,
    crossing_ms: u64,
    gain: f64,
}

impl Urgency {
    /// Of an instance that moves, or that has to and finds no place yet.
    pub(crate) fn of(decisions: &[Decision]) -> Option<Self> {
        let stuck = Outcome::Stay { reason: StayReason::NoPoolFits };
        let decision = decisions.iter().find(|d| matches!(d.outcome, Outcome::Move { .. }));
        let decision = decision.or_else(|| decisions.iter().find(|d| d.outcome == stuck))?;
        let forced = !matches!(decision.outcome, Outcome::Move { forced: false, .. });
        let best = decision.candidates.first().map_or(0.0, |best| best.total);
        Some(Self {
            forced,
            crossing_ms: decision.crossing_in_ms.unwrap_or(u64::MAX),
            gain: decision.current.as_ref().map_or(0.0, |current| current.score - best),
        })
    }

    /// Who is forced before who isn't; of those, who has less time; then who gains more.
    pub(crate) fn order(&self, other: &Self) -> std::cmp::Ordering {
        let forced = other.forced.cmp(&self.forced);
        let sooner = if self.forced { self.crossing_ms.cmp(&other.crossing_ms) } else { forced };
        forced.then(sooner).then_with(|| other.gain.total_cmp(&self.gain))
    }
}
