//! A migration as the command line shows it: a line of JSON per event.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context, bail};
use rswap_agent::{
    control::MigrateEvent,
    status::{MigrationProgress, MigrationReport},
};

use crate::pauses;

/// A running `rswap migrate --json`.
#[derive(Debug)]
pub struct Migration {
    instance: String,
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Migration {
    pub(crate) fn start(instance: &str, mut command: Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start rswap migrate")?;
        let stdout = child.stdout.take().context("rswap migrate has no output")?;
        Ok(Self { instance: instance.to_owned(), child, lines: BufReader::new(stdout) })
    }

    /// The next event; `None` when there are no more.
    pub fn next_event(&mut self) -> anyhow::Result<Option<MigrateEvent>> {
        let mut line = String::new();
        if self.lines.read_line(&mut line).context("cannot read from rswap migrate")? == 0 {
            return Ok(None);
        }
        let event = serde_json::from_str(&line).with_context(|| format!("not an event: {line}"))?;
        Ok(Some(event))
    }

    /// Reads events until `reached` says so; what ended the migration before that is an error.
    pub fn wait_until(
        &mut self,
        what: &str,
        mut reached: impl FnMut(&MigrationProgress) -> bool,
    ) -> anyhow::Result<()> {
        loop {
            match self.next_event()? {
                Some(MigrateEvent::Progress(progress)) if reached(&progress) => return Ok(()),
                Some(MigrateEvent::Progress(_)) => {}
                Some(other) => bail!("the migration was to reach {what}, but ended: {other:?}"),
                None => bail!("the migration was to reach {what}, but ended: {}", self.said()),
            }
        }
    }

    /// Waits for the end: the report, or the reason for which the instance stays where it was.
    pub fn end(mut self) -> anyhow::Result<Result<MigrationReport, String>> {
        loop {
            match self.next_event()? {
                Some(MigrateEvent::Progress(_)) => {}
                Some(MigrateEvent::Done(report)) => {
                    pauses::frozen(&self.instance, report.unavailability_ms);
                    return Ok(Ok(report));
                }
                Some(MigrateEvent::Failed(error) | MigrateEvent::InDoubt(error)) => {
                    return Ok(Err(error.to_string()));
                }
                None => return Ok(Err(self.said())),
            }
        }
    }

    /// Waits for an end that has to be a success.
    pub fn succeed(self) -> anyhow::Result<MigrationReport> {
        self.end()?.map_err(|reason| anyhow::anyhow!("the migration failed: {reason}"))
    }

    fn said(&mut self) -> String {
        let mut text = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            // Only for the message: what can't be read is left out.
            let _ = stderr.read_to_string(&mut text);
        }
        text.trim().to_owned()
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        // It has ended already, unless the test failed before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
