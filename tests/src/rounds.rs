//! The log of a program that numbers its rounds: a line that is missing or comes twice shows that the program was rolled
//! back, or ran in two places.

use std::{fs, path::Path, time::Duration};

use anyhow::Context;

use crate::wait_for;

/// What such a log says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rounds {
    /// How many rounds the program has made.
    pub made: u64,
    /// How many zombies it has collected, with their status.
    pub reaped: u64,
}

/// Reads a log; what the program found wrong, or a round out of order, is an error.
pub fn read(log: &Path) -> anyhow::Result<Rounds> {
    parse(&fs::read_to_string(log).unwrap_or_default())
}

fn parse(text: &str) -> anyhow::Result<Rounds> {
    let mut rounds = Rounds::default();
    // A last line without its end is still being written.
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        let due = rounds.made + 1;
        let rest = line.strip_prefix(&format!("round={due}"));
        match rest.with_context(|| format!("round {due} was due, not {line:?}"))? {
            "" => {}
            " reaped=7" => rounds.reaped += 1,
            other => anyhow::bail!("{other:?} in round {due}"),
        }
        rounds.made = due;
    }
    Ok(rounds)
}

/// Waits for so many further rounds.
pub fn wait_for_more(log: &Path, more: u64, limit: Duration) -> anyhow::Result<()> {
    let before = read(log)?.made;
    wait_for(
        &format!("{more} further rounds"),
        limit,
        || Ok((read(log)?.made >= before + more).then_some(())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_counted_and_a_break_is_an_error() {
        let rounds = parse("round=1\nround=2 reaped=7\nround=3\nrou").expect("it is in order");
        assert_eq!(rounds, Rounds { made: 3, reaped: 1 });
        for broken in
            ["round=2\n", "round=1\nround=1\n", "round=1 reaped=8\n", "WRONG: page 3\n", "round=10\n"]
        {
            assert!(parse(broken).is_err(), "{broken:?}");
        }
    }
}
