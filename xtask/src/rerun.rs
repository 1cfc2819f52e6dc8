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
    let failed = output.iter().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
    failed.filter(|name| !has_lost_data(name, output)).map(str::to_owned).collect()
}

fn has_lost_data(name: &str, output: &[String]) -> bool {
    let headline = format!("---- {name} stdout ----");
    let said = output.iter().skip_while(|line| **line != headline).skip(1);
    let mut said = said.take_while(|line| !line.starts_with("---- ") && line.as_str() != "failures:");
    said.any(|line| {
        let reports = line.match_indices(LOST).map(|(at, _)| &line[at + LOST.len()..]);
        UNFORGIVEN.iter().any(|word| line.contains(word))
            || reports.into_iter().any(|count| !count.starts_with("0"))
    })
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
            "---- lossy stdout ----",
            "ClientReport { acked_writes: 7, lost_writes: 3, reconnects: 1 }",
            "---- wrong stdout ----",
            "Error: line=7 was due, not \"MISMATCH page 3\"",
            "failures:",
            "    late",
        ]
        .map(str::to_owned)
        .into();
        assert_eq!(worth_a_second_try(&output), ["late"]);
    }
}
