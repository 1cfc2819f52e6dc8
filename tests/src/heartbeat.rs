//! The log of a program that checks itself: numbered lines, each with how much it has verified. A line that is missing or
//! comes twice shows that the program was rolled back, or ran in two places.

use std::{fs, path::Path, time::Duration};

use anyhow::Context;

use crate::wait_for;

const LIMIT: Duration = Duration::from_secs(30);

/// Waits for fifty further heartbeats and many verified pages; a line out of order, or a mismatch, is an error.
pub fn wait_for_progress(log: &Path) -> anyhow::Result<()> {
    wait_for_more(log, 50, 1000)
}

/// Waits for so many further heartbeats and verified pages, as [`wait_for_progress`] does.
pub fn wait_for_more(log: &Path, lines: u64, pages: u64) -> anyhow::Result<()> {
    let before = read(log)?;
    wait_for("the program to go on", LIMIT, || {
        let now = read(log)?;
        Ok((now.lines >= before.lines + lines && now.verified > before.verified + pages).then_some(()))
    })
}

/// How many lines the log has; a line out of order, or a mismatch, is an error.
pub fn lines(log: &Path) -> anyhow::Result<u64> {
    Ok(read(log)?.lines)
}

/// What a log says.
#[derive(Clone, Copy, Debug, Default)]
struct Log {
    lines: u64,
    verified: u64,
}

fn read(path: &Path) -> anyhow::Result<Log> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut log = Log::default();
    // A last line without its end is still being written.
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        let wanted = format!("line={} verified=", log.lines);
        let verified =
            line.strip_prefix(&wanted).with_context(|| format!("{wanted}... was due, not {line:?}"))?;
        let verified: u64 = verified.parse().with_context(|| format!("{line:?} has no count"))?;
        anyhow::ensure!(verified >= log.verified, "it counted backwards in {line:?}");
        log = Log { lines: log.lines + 1, verified };
    }
    Ok(log)
}
