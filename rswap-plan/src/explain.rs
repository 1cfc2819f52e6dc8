//! A decision in words and numbers, for people.

use std::fmt::Write as _;

use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};

mod cores;
mod flow;

use super::{Candidate, Decision, Lead, MoveKind, Outcome, StayReason, TimedBy, Timing};

/// The whole decision: the need it rests on, every pool with its numbers, the result and why.
pub fn explain(decision: &Decision) -> String {
    let lines = |lines: Vec<String>| lines.into_iter().map(|line| line + "\n").collect::<String>();
    lines(result_and_need(decision)) + &table(decision) + &lines(alternatives(decision))
}

/// [`explain`] without its table: the result and why, the need that it rests on, and what would change it.
pub fn in_words(decision: &Decision) -> Vec<String> {
    [result_and_need(decision), alternatives(decision)].concat()
}

/// What stands before the table; the first line is the result.
fn result_and_need(decision: &Decision) -> Vec<String> {
    let kind = match decision.kind {
        MoveKind::Cpu => "core pool",
        MoveKind::Host => "host",
        MoveKind::Storage => "storage pool",
        MoveKind::Link => "link",
    };
    let kind = match &decision.volume {
        Some(volume) => format!("{kind} of its volume {volume}"),
        None => kind.to_owned(),
    };
    let result = match &decision.outcome {
        Outcome::Stay { reason } => format!("stays: {reason}"),
        Outcome::Move { to, start_by, forced } => {
            let mut why = why(decision, *forced);
            let slower = flow::slower_here(decision, to).or_else(|| cores::slower_here(decision, to));
            if let Some(because) = if *forced { cores::others_here(decision) } else { slower } {
                let _ = write!(why, ": {because}");
            }
            format!("moves to {to} in {} ms: {why}", start_by.since(decision.at))
        }
    };
    let mut lines = vec![format!("{} ({kind}) {result}", decision.instance)];
    if let Some(need) = &decision.need {
        lines.push(format!(
            "need: {:.3} reference cores expected, {:.3} at {:?}; memory {} MiB expected, {} MiB at {:?}",
            need.expected_cores,
            need.limit_cores,
            need.quantile,
            need.expected_bytes >> 20,
            need.limit_bytes >> 20,
            need.quantile,
        ));
    }
    lines.extend(decision.flow.as_ref().map(|need| flow::need(decision.kind, need)));
    lines.extend(flow::latencies(decision));
    lines.extend(cores::others(decision));
    lines.extend(cores::slowdowns(decision));
    if !decision.steps.is_empty() {
        lines.push(flow::steps(&decision.steps));
    }
    if let Some(writing) = &decision.writing {
        let (now, quiet) = (writing.bytes_per_s / 1e6, writing.quiet_bytes_per_s / 1e6);
        let word = if writing.is_quiet() { "a quiet time" } else { "it waits for that while it can" };
        lines.push(format!(
            "memory: {now:.1} MB/s written now, {quiet:.1} or less a quarter of the time: {word}"
        ));
    }
    lines.extend(decision.timing.as_ref().map(when));
    match decision.crossing_in_ms {
        Some(ms) => lines.push(format!("the need exceeds the present pool in {ms} ms")),
        None if decision.need.is_some() || decision.flow.is_some() && decision.current.is_some() => {
            lines.push("the need stays within the present pool over the horizon".to_owned());
        }
        None => {}
    }
    if let (Some(lead), Outcome::Move { start_by, .. }) = (&decision.lead, &decision.outcome) {
        lines.push(ahead(lead, start_by.since(decision.at)));
    }
    lines
}

/// How long before the need it begins, if it does in `start_ms`, and why so long.
fn ahead(lead: &Lead, start_ms: u64) -> String {
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1e3);
    let foreseen = if lead.is_short() { ", as soon as that is foreseen" } else { "" };
    let known = match (lead.took_ms, lead.measured) {
        (None, _) => "no such move was measured yet".to_owned(),
        (Some(took_ms), 1) => format!("such a move took {}", seconds(took_ms)),
        (Some(took_ms), measured) => {
            format!("such moves took up to {} ({measured} measured)", seconds(took_ms))
        }
    };
    let careful = match lead.took_ms {
        Some(took_ms) if took_ms == lead.takes_ms => String::new(),
        _ => format!(
            ", {} are expected, and reckoned with {}",
            seconds(lead.expected_ms),
            seconds(lead.takes_ms)
        ),
    };
    let before = seconds(lead.due_ms.saturating_sub(start_ms));
    format!("begins {before} before it is needed{foreseen}: {known}{careful}")
}

/// Every pool with its numbers; nothing, if none was looked at.
fn table(decision: &Decision) -> String {
    let rows: Vec<_> = decision.current.iter().chain(&decision.candidates).collect();
    if rows.is_empty() {
        return String::new();
    }
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY);
    table.set_header([
        "pool",
        if decision.flow.is_some() { flow::HEADER } else { "needs/has cores" },
        "demand x cost /h",
        "performance x weight /h",
        "violations /h",
        "ROS /h",
        "move",
        "total /h",
        "remark",
    ]);
    for candidate in rows {
        table.add_row(row(candidate));
    }
    format!(
        "{table}\nROS = (predicted demand x current cost) - (current performance x weight) + expected violations, money per \
         hour, lower is better; threshold {:.5}, margin for an unforced move {:.5}\n",
        decision.threshold, decision.hysteresis,
    )
}

/// What stands after the table.
fn alternatives(decision: &Decision) -> Vec<String> {
    let mut lines = Vec::new();
    if decision.left_out > 0 {
        lines.push(format!("{} more pools were compared, none of them better", decision.left_out));
    }
    lines.extend(what_would_change(decision).map(|change| format!("it would be decided otherwise {change}")));
    lines
}

/// When it begins, and why then.
fn when(timing: &Timing) -> String {
    let (unit, how) = match timing.by {
        TimedBy::Written => ("MB/s of writing", ""),
        TimedBy::Cpu => ("cores of CPU use", " (its writes are not tracked: who does little writes little)"),
    };
    let number = |amount: f64| match timing.by {
        TimedBy::Written => format!("{:.1}", amount / 1e6),
        TimedBy::Cpu => format!("{amount:.2}"),
    };
    let chosen = timing.chosen_ms;
    let others = timing.starts.iter().filter(|(start, _)| *start != chosen);
    let others: String =
        others.map(|(start, amount)| format!(", {} in {start} ms", number(*amount))).collect();
    let expected = number(timing.amount(chosen).unwrap_or(0.0));
    format!("begins in {chosen} ms: {expected} {unit} are expected then{others}{how}")
}

/// Why it moves.
fn why(decision: &Decision, forced: bool) -> String {
    let here = decision.current.as_ref().and_then(|current| current.dropped.as_ref());
    let other = here.filter(|dropped| !dropped.is_for_want_of_room());
    match (&decision.exchange, other) {
        (Some(with), _) if forced => {
            format!("the present one can't meet the need; it changes places with {with}")
        }
        (Some(with), _) => format!("it makes room for {with}, which comes here"),
        (None, Some(dropped)) if forced => format!("the present one won't do: {dropped}"),
        (None, _) if forced => "the present one can't meet the need".to_owned(),
        (None, _) => "its score is better".to_owned(),
    }
}

/// The nearest change of the numbers that would have led to another decision.
fn what_would_change(decision: &Decision) -> Option<String> {
    let current = decision.current.as_ref();
    let best = decision.candidates.first();
    Some(match &decision.outcome {
        Outcome::Move { .. } if decision.exchange.is_some() => {
            format!("if {} could not change places with it", decision.exchange.as_ref()?)
        }
        Outcome::Move { forced: true, .. } => {
            let here = current?;
            if let Some(dropped) = here.dropped.as_ref().filter(|dropped| !dropped.is_for_want_of_room()) {
                return Some(format!("if this did not hold of {}: {dropped}", here.pool));
            }
            if let Some(terms) = &here.flow {
                return Some(flow::would_stay(terms));
            }
            let (needed, has) = (here.terms.limit_cores, here.terms.available_cores);
            format!("if it needed {has:.2} cores or less here instead of {needed:.2}, or had {needed:.2}")
        }
        Outcome::Move { to, .. } => {
            let gain = decision.gain_per_hour()?;
            format!(
                "if {to} cost {:.5}/h more, or the margin were above {gain:.5}/h",
                gain - decision.hysteresis
            )
        }
        Outcome::Stay { reason: StayReason::TooLittleSeen { seen, needed } } => {
            format!("after {} more forecasts have met their outcome", needed.saturating_sub(*seen))
        }
        Outcome::Stay { reason: StayReason::UnderThreshold } => {
            format!("if the threshold were under its score of {:.5}/h", current?.score)
        }
        Outcome::Stay { reason: StayReason::NothingBetter { best_gain: Some(gain), hysteresis } } => {
            format!(
                "if {} were {:.5}/h cheaper, or the margin under {gain:.5}/h",
                best?.pool,
                hysteresis - gain
            )
        }
        Outcome::Stay { reason: StayReason::NoPoolFits | StayReason::NothingBetter { .. } } => {
            let dropped = best?.dropped.as_ref()?;
            format!("if {} were possible: {dropped}", best?.pool)
        }
        Outcome::Stay { reason: StayReason::CoolDown { left_ms } | StayReason::BackOff { left_ms, .. } } => {
            format!("in {left_ms} ms")
        }
        Outcome::Stay { reason: StayReason::ToldToStay } => {
            format!("without its label {}", crate::rules::STAY)
        }
        Outcome::Stay { reason: StayReason::JustLeft { .. } } => "if the need forced it".to_owned(),
        Outcome::Stay { reason: StayReason::Unmeasured { .. } } => "if that were known".to_owned(),
        Outcome::Stay {
            reason: StayReason::InFlight | StayReason::OtherMoveFirst | StayReason::OnNoPool,
        } => {
            return None;
        }
    })
}

fn row(candidate: &Candidate) -> Vec<String> {
    let terms = &candidate.terms;
    let (moving, remark) = match &candidate.move_price {
        None => ("-".to_owned(), "here".to_owned()),
        Some(price) => (
            format!(
                "{:.2} s, {} MiB, {:.0} ms still",
                price.seconds,
                price.bytes >> 20,
                price.unavailability_ms
            ),
            String::new(),
        ),
    };
    let remark = match &candidate.dropped {
        Some(reason) if remark.is_empty() => format!("dropped: {reason}"),
        Some(reason) => format!("{remark}; {reason}"),
        None => remark,
    };
    vec![
        candidate.pool.clone(),
        match &candidate.flow {
            Some(flow) => flow::needs_and_has(flow),
            None => format!("{:.2} / {:.2}", terms.limit_cores, terms.available_cores),
        },
        format!("{:.5}", terms.cost_per_hour),
        format!("{:.3} x {:.4} = {:.5}", terms.performance, terms.weight, terms.performance * terms.weight),
        format!("{:.5}", terms.violation_per_hour),
        format!("{:.5}", candidate.score),
        moving,
        format!("{:.5}", candidate.total),
        remark,
    ]
}
