//! Two hosts and a program that checks itself, which goes there and back: what the migration scenarios have in common.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::ensure;

use crate::{Fleet, Host, HostOptions, moves, wait_for};

/// How long a program may take for what a scenario waits for.
pub const LIMIT: Duration = Duration::from_secs(40);

/// Two hosts, and a file in which a program logs.
#[derive(Debug)]
pub struct Scene {
    /// Where the program starts.
    pub a: Host,
    /// Where it goes.
    pub b: Host,
    /// Its log.
    pub log: PathBuf,
    /// The network; the last to go, with the hosts' logs.
    pub fleet: Fleet,
}

impl Scene {
    /// Starts both hosts.
    pub fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        // How long the freeze takes is not what these scenarios are about.
        let options = HostOptions { max_unavailability_ms: 10_000, ..HostOptions::default() };
        let (a, b) = (fleet.host("a", &options)?, fleet.host("b", &options)?);
        let log = fleet.scratch().join("program.log");
        Ok(Self { fleet, a, b, log })
    }

    /// Starts `programs/NAME.py LOG ARGUMENTS...` at the first host, as instance NAME.
    pub fn python(&self, name: &str, options: &[&str], arguments: &[&str]) -> anyhow::Result<()> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("programs/{name}.py"));
        let (program, log) = (program.to_string_lossy(), self.log.to_string_lossy());
        self.run(name, options, &[&["python3", &program, &log], arguments].concat())
    }

    /// Starts a command at the first host, and waits until its agent watches it.
    pub fn run(&self, name: &str, options: &[&str], command: &[&str]) -> anyhow::Result<()> {
        self.a.run(name, options, command)?;
        wait_for("the agent to watch the instance", LIMIT, || Ok(self.a.has_instance(name)?.then_some(())))
    }

    /// Moves an instance. What can't be carried at the moment is tried again, as the refusal says.
    pub fn moved(&self, name: &str, from: &Host, to: &Host) -> anyhow::Result<()> {
        let report = moves::moved(name, from, to)?;
        println!("{report:?}");
        Ok(())
    }

    /// Three moves there and back; the program must go on after each.
    pub fn three_moves(
        &self,
        name: &str,
        goes_on: impl Fn(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for (from, to) in [(&self.a, &self.b), (&self.b, &self.a), (&self.a, &self.b)] {
            self.moved(name, from, to)?;
            ensure!(
                !from.has_instance(name)? && to.has_instance(name)?,
                "{name} is listed at the wrong host"
            );
            ensure!(!from.has_processes()?, "something is left at the source");
            goes_on(&self.log)?;
        }
        Ok(())
    }
}

/// Waits until a program like `programs/files.py` has checked everything that it holds twice more, and then emptied
/// and filled all of its queues once more.
pub fn holds_everything(log: &Path) -> anyhow::Result<()> {
    further(log, "checked", 2)?;
    fs::write(log.with_extension("log.drain"), "")?;
    further(log, "drained", 1)
}

/// Waits for `count` further lines that begin with `word=` in the log of a program that checks itself; a MISMATCH in it is
/// an error.
pub fn further(log: &Path, word: &str, count: usize) -> anyhow::Result<()> {
    let before = lines(log, word)?;
    wait_for(&format!("{count} further lines {word}="), LIMIT, || {
        Ok((lines(log, word)? >= before + count).then_some(()))
    })
}

/// How many lines begin with `word=`.
pub fn lines(log: &Path, word: &str) -> anyhow::Result<usize> {
    let text = fs::read_to_string(log).unwrap_or_default();
    if let Some(at) = text.find("MISMATCH").or_else(|| text.find("Traceback")) {
        anyhow::bail!("the program found: {}", &text[at..]);
    }
    Ok(text.lines().filter(|line| line.starts_with(word) && line[word.len()..].starts_with('=')).count())
}
