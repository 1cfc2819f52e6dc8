//! What is said of volumes, ports, and the order of several moves.

use crate::{FlowNeed, FlowTerms, MoveKind, Step};

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
