//! What is said of volumes, ports, and the order of several moves.

use rswap_types::LatencyPoint;

use crate::{Candidate, Decision, FlowNeed, FlowTerms, MoveKind, Step};

pub(super) const HEADER: &str = "needs/has requests/s, MB/s, MiB";

fn mb(bytes_per_s: f64) -> f64 {
    bytes_per_s / 1e6
}

pub(super) fn need(kind: MoveKind, need: &FlowNeed) -> String {
    let (expected, limit, at) = (need.expected, need.limit, need.quantile);
    if kind == MoveKind::Link {
        let mbit = |bytes_per_s: f64| bytes_per_s * 8.0 / 1e6;
        let (expected, limit) = (mbit(expected.bytes_per_s), mbit(limit.bytes_per_s));
        return format!("need: {expected:.2} Mbit/s expected in the fuller direction, {limit:.2} at {at:?}");
    }
    format!(
        "need: {:.1} requests/s and {:.2} MB/s expected, {:.1} and {:.2} at {at:?}; {} MiB of files",
        expected.operations_per_s,
        mb(expected.bytes_per_s),
        limit.operations_per_s,
        mb(limit.bytes_per_s),
        need.size_bytes >> 20
    )
}

fn latency_of(candidate: &Candidate) -> Option<LatencyPoint> {
    candidate.flow?.latency
}

/// How a latency is known.
fn source(latency: &LatencyPoint) -> String {
    match latency.is_experienced() {
        true => format!("experienced in {:.0} requests", latency.requests),
        false => "calibrated".to_owned(),
    }
}

/// What a request takes here and elsewhere, where it is known.
pub(super) fn latencies(decision: &Decision) -> Option<String> {
    let of = |candidate: &Candidate| {
        let latency = latency_of(candidate)?;
        Some(format!(
            "{:.0} us on {} at {:.0} requests/s ({})",
            latency.p50_us,
            candidate.pool,
            latency.operations_per_s,
            source(&latency)
        ))
    };
    let all: Vec<String> = decision.current.iter().chain(&decision.candidates).filter_map(of).collect();
    (!all.is_empty()).then(|| format!("a request takes {}", all.join(", ")))
}

/// That requests are slower here than where it goes, if they are, and instances have experienced that.
pub(super) fn slower_here(decision: &Decision, to: &str) -> Option<String> {
    let here = latency_of(decision.current.as_ref()?)?;
    let there = latency_of(decision.candidates.iter().find(|candidate| candidate.pool == to)?)?;
    let told = here.p50_us > there.p50_us && (here.is_experienced() || there.is_experienced());
    told.then(|| {
        let (here_us, there_us) = (here.p50_us, there.p50_us);
        format!(
            "a request takes {here_us:.0} us here ({}), {there_us:.0} us there ({})",
            source(&here),
            source(&there)
        )
    })
}

pub(super) fn needs_and_has(terms: &FlowTerms) -> String {
    let (limit, has) = (terms.limit, terms.available);
    format!(
        "{:.0} / {:.0}, {:.2} / {:.2}, {} / {}",
        limit.operations_per_s,
        has.operations_per_s,
        mb(limit.bytes_per_s),
        mb(has.bytes_per_s),
        terms.size_bytes >> 20,
        terms.free_bytes >> 20
    )
}

pub(super) fn would_stay(terms: &FlowTerms) -> String {
    let (limit, has) = (terms.limit, terms.available);
    format!(
        "if it needed {:.0} requests/s and {:.2} MB/s or less here instead of {:.0} and {:.2}",
        has.operations_per_s,
        mb(has.bytes_per_s),
        limit.operations_per_s,
        mb(limit.bytes_per_s)
    )
}

pub(super) fn steps(steps: &[Step]) -> String {
    let one = |(number, step): (usize, &Step)| {
        let what = match (&step.volume, step.kind) {
            (Some(volume), _) => format!("volume {volume}"),
            (None, MoveKind::Link) => "link".to_owned(),
            (None, MoveKind::Host) => "host".to_owned(),
            (None, _) => "cores".to_owned(),
        };
        let when = match step.due_ms {
            Some(ms) => format!("needed in {ms} ms"),
            None => "only saves".to_owned(),
        };
        format!("{}. {what} to {} ({when}, takes {} ms)", number + 1, step.to, step.takes_ms)
    };
    let all: Vec<String> = steps.iter().enumerate().map(one).collect();
    format!("one after the other: {}", all.join(", "))
}
