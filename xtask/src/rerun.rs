//! Which failed scenarios are run once more.
//!
//! Scenarios measure real programs on a machine that others use as well, and wait for what takes its time: a few of some
//! hundred fail for want of a core. Such a one is run again, alone, and named at the end, so that it is mended. What lost
//! data has failed, whatever a second run says.

/// What a test or its programs say when memory or an acknowledged write is not as it must be.
const UNFORGIVEN: &[&str] = &["MISMATCH", "was lost", "were lost", "the last look had to repair"];
/// A client's report names what it lost by this field.
const LOST: &str = "lost_writes: ";

/// The failed tests of a runner's output that are worth a second try, by name.
pub(crate) fn worth_a_second_try(output: &[String]) -> Vec<String> {
    failed(output).filter(|name| !has_lost_data(name, output)).map(str::to_owned).collect()
}

fn has_lost_data(name: &str, output: &[String]) -> bool {
    said_by(name, output).any(|line| {
        let reports = line.match_indices(LOST).map(|(at, _)| &line[at + LOST.len()..]);
        UNFORGIVEN.iter().any(|word| line.contains(word))
            || reports.into_iter().any(|count| !count.starts_with("0"))
    })
}

/// What a failed test said, by the runner's summary of failures.
fn said_by<'a>(name: &str, output: &'a [String]) -> impl Iterator<Item = &'a str> {
    let headline = format!("---- {name} stdout ----");
    let said = output.iter().skip_while(move |line| **line != headline).skip(1).map(String::as_str);
    said.take_while(|line| {
        let next = line.strip_prefix("---- ").is_some_and(|line| line.ends_with(" stdout ----"));
        !next && *line != "failures:"
    })
}

/// Why a test failed, in few lines: the last that it said, without the stack.
pub(crate) fn account(name: &str, output: &[String]) -> Vec<String> {
    const LINES: usize = 12;
    const COLUMNS: usize = 400;
    let said = said_by(name, output).take_while(|line| !line.starts_with("Stack backtrace:"));
    let mut lines: Vec<String> = said
        .filter(|line| !line.trim().is_empty())
        .map(|line| line.chars().take(COLUMNS).collect())
        .collect();
    lines.split_off(lines.len().saturating_sub(LINES))
}

/// The tests that failed in a runner's output.
pub(crate) fn failed(output: &[String]) -> impl Iterator<Item = &str> {
    output.iter().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_late_is_tried_again_and_what_was_lost_is_not() {
        let output: Vec<String> = [
            "test late ... FAILED",
            "test fine ... ok",
            "test lossy ... FAILED",
            "test wrong ... FAILED",
            "failures:",
            "---- late stdout ----",
            "ClientReport { acked_writes: 7, lost_writes: 0, reconnects: 1 }",
            "Error: waited 20 s for the client",
            "Stack backtrace:",
            "   0: anyhow::error",
            "---- lossy stdout ----",
            "---- the agent of host a said last:",
            "ClientReport { acked_writes: 7, lost_writes: 3, reconnects: 1 }",
            "---- wrong stdout ----",
            "Error: line=7 was due, not \"MISMATCH page 3\"",
            "failures:",
            "    late",
        ]
        .map(str::to_owned)
        .into();
        assert_eq!(worth_a_second_try(&output), ["late"]);
        assert_eq!(account("late", &output), &output[6..8]);
        assert_eq!(account("wrong", &output), &output[14..15]);
    }
}
