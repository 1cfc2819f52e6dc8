//! Two hosts and a program that checks itself, which goes there and back: what the migration scenarios have in common.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::ensure;

use crate::{Fleet, Host, HostOptions, wait_for};

/// How long a program may take for what a scenario waits for.
pub const LIMIT: Duration = Duration::from_secs(40);

/// Two hosts, and a file in which a program logs.
#[derive(Debug)]
pub struct Scene {
    /// The network.
    pub fleet: Fleet,
    /// Where the program starts.
    pub a: Host,
    /// Where it goes.
    pub b: Host,
    /// Its log.
    pub log: PathBuf,
}

impl Scene {
    /// Starts both hosts.
    pub fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let a = fleet.host("a", &HostOptions::default())?;
        let b = fleet.host("b", &HostOptions::default())?;
        let log = fleet.scratch().join("program.log");
        Ok(Self { fleet, a, b, log })
    }

    /// Starts `programs/NAME.py LOG ARGUMENTS...` at the first host, as instance NAME.
    pub fn python(&self, name: &str, options: &[&str], arguments: &[&str]) -> anyhow::Result<()> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("programs/{name}.py"));
        let (program, log) = (program.to_string_lossy(), self.log.to_string_lossy());
        self.a.run(name, options, &[&["python3", &program, &log], arguments].concat())
    }

    /// Three moves there and back; the program must go on after each.
    pub fn three_moves(
        &self,
        name: &str,
        goes_on: impl Fn(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for (from, to) in [(&self.a, &self.b), (&self.b, &self.a), (&self.a, &self.b)] {
            let report = from.migrate(name, &to.migrate_address())?.succeed()?;
            println!("{report:?}");
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
