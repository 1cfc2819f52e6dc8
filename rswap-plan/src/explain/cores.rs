//! What is said of cores: what others take of them, and how much longer work takes there for waiting.

use rswap_types::SlowdownPoint;

use crate::{Candidate, Decision};

/// Less than this of a core is not worth a word.
const WORTH_A_WORD: f64 = 0.005;

fn all(decision: &Decision) -> impl Iterator<Item = &Candidate> {
    decision.current.iter().chain(&decision.candidates)
}

/// What others than instances take of each pool's cores, where they do.
pub(super) fn others(decision: &Decision) -> Option<String> {
    let taken = all(decision).filter(|candidate| candidate.terms.others_cores >= WORTH_A_WORD);
    let taken: Vec<String> =
        taken.map(|of| format!("{:.2} cores of {}", of.terms.others_cores, of.pool)).collect();
    (!taken.is_empty()).then(|| format!("others than instances take {}", taken.join(", ")))
}

/// That what others take is what is missing here, if it is.
pub(super) fn others_here(decision: &Decision) -> Option<String> {
    let here = decision.current.as_ref().filter(|_| decision.exchange.is_none())?;
    let terms = &here.terms;
    let is_missing = here.dropped.as_ref().is_some_and(crate::Dropped::is_for_want_of_room)
        && terms.limit_cores > terms.available_cores
        && terms.limit_cores <= terms.available_cores + terms.others_cores;
    is_missing.then(|| format!("others than instances take {:.2} of its cores", terms.others_cores))
}

/// How it is known.
fn source(point: &SlowdownPoint) -> String {
    match point.is_experienced() {
        true => format!("experienced in {:.1} s", point.seconds),
        false => "not experienced yet".to_owned(),
    }
}

/// How much longer work takes here and elsewhere, where it is known.
pub(super) fn slowdowns(decision: &Decision) -> Option<String> {
    let of = |candidate: &Candidate| {
        let point = candidate.terms.slowdown?;
        let (times, load) = (point.times, point.load * 100.0);
        Some(format!(
            "{times:.2} times as long on {} at a load of {load:.0} % ({})",
            candidate.pool,
            source(&point)
        ))
    };
    let known: Vec<String> = all(decision).filter_map(of).collect();
    (!known.is_empty()).then(|| format!("for waiting, work takes {}", known.join(", ")))
}

/// That work takes longer here than where it goes, if it does, and instances have experienced that.
pub(super) fn slower_here(decision: &Decision, to: &str) -> Option<String> {
    let here = decision.current.as_ref()?.terms.slowdown.filter(SlowdownPoint::is_experienced)?;
    let there = decision.candidates.iter().find(|candidate| candidate.pool == to)?.terms.slowdown;
    let (there_times, there_known) = match &there {
        Some(point) => (point.times, source(point)),
        None => (1.0, "not experienced yet".to_owned()),
    };
    (here.times > there_times + 0.01).then(|| {
        format!(
            "work takes {:.2} times as long here for waiting ({}), {there_times:.2} times there ({there_known})",
            here.times,
            source(&here)
        )
    })
}
