//! What the forecaster has learnt, in a file: read at the start, written now and then and at the end.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use crate::{
    config::{Config, LearntConfig},
    forecast::{ForecastConfig, Forecaster},
    units::UnixMillis,
};

/// A file is never longer: some thousand running instances. With more of them, only what they have taught is kept.
const MOST_BYTES: usize = 256 << 20;

/// Keeps it.
pub(super) struct Keeper {
    file: PathBuf,
    every_ms: u64,
    last: Option<UnixMillis>,
    writing: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(super) fn new(config: &LearntConfig) -> Self {
        let every_ms = config.save_every_s.saturating_mul(1000);
        Self { file: config.file.clone(), every_ms, last: None, writing: None }
    }

    /// The forecaster that goes on from the file; one that knows nothing where there is none. What can't be used is set aside.
    pub(super) fn forecaster(&self, config: &Config) -> Forecaster {
        begin(&self.file, &config.forecast, config.agent.window_ms)
    }

    /// Writes what is known, on a thread of its own, if it is time.
    pub(super) fn window(&mut self, forecaster: &Forecaster, now: UnixMillis) {
        let last = *self.last.get_or_insert(now);
        let busy = self.writing.as_ref().is_some_and(|writing| !writing.is_finished());
        if now.since(last) < self.every_ms || busy {
            return;
        }
        self.last = Some(now);
        self.wait();
        let (file, state) = (self.file.clone(), forecaster.state(MOST_BYTES));
        self.writing = Some(std::thread::spawn(move || keep(&file, &state)));
    }

    /// Writes it at once: the agent ends.
    pub(super) fn end(&mut self, forecaster: &Forecaster) {
        self.wait();
        keep(&self.file, &forecaster.state(MOST_BYTES));
    }

    fn wait(&mut self) {
        if let Some(writing) = self.writing.take()
            && writing.join().is_err()
        {
            tracing::warn!(file = %self.file.display(), "writing what was learnt panicked");
        }
    }
}

fn begin(file: &Path, config: &ForecastConfig, window_ms: u64) -> Forecaster {
    let unusable = |error: &dyn std::fmt::Display| {
        let aside = file.with_extension("aside");
        let moved = fs::rename(file, &aside);
        tracing::warn!(
            file = %file.display(), %error, aside = %aside.display(), moved = moved.is_ok(),
            "what was learnt can't be used, and is set aside: forecasts begin anew"
        );
        Forecaster::new(config.clone(), window_ms)
    };
    match read(file) {
        Ok(state) => {
            Forecaster::with_state(config.clone(), window_ms, &state).unwrap_or_else(|error| unusable(&error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Forecaster::new(config.clone(), window_ms),
        Err(error) => unusable(&error),
    }
}

/// The file's contents.
///
/// # Errors
///
/// If it can't be read, or is longer than any that was written.
pub(crate) fn read(file: &Path) -> io::Result<Vec<u8>> {
    let mut state = Vec::new();
    fs::File::open(file)?.take(MOST_BYTES as u64 + 1).read_to_end(&mut state)?;
    if state.len() > MOST_BYTES {
        return Err(io::Error::other(format!("it has more than {MOST_BYTES} bytes")));
    }
    Ok(state)
}

fn keep(file: &Path, state: &[u8]) {
    if let Err(error) = write(file, state) {
        tracing::warn!(%error, file = %file.display(), "what was learnt could not be kept (learnt.file)");
    }
}

/// Whole or not at all, also if the host loses its power.
fn write(file: &Path, state: &[u8]) -> io::Result<()> {
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory)?;
    }
    let half = file.with_extension("new");
    let mut to = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&half)?;
    to.write_all(state)?;
    to.sync_all()?;
    fs::rename(&half, file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::{Kin, Observation, Usage};

    fn shown(windows: u64) -> Forecaster {
        let mut forecaster = Forecaster::new(ForecastConfig::default(), 1_000);
        let name = "a".parse().unwrap();
        forecaster.introduce(&name, Kin::default(), 1);
        for window in 1..=windows {
            let usage = Usage { reference_cores: 0.5, memory_bytes: 1.0, ..Usage::default() };
            forecaster.observe(&Observation { instance: &name, at: UnixMillis(window * 1_000), usage });
        }
        forecaster
    }

    fn keeper(directory: &Path) -> (Keeper, Config) {
        let mut config = Config::default();
        config.learnt.file = directory.join("deep/learnt");
        (Keeper::new(&config.learnt), config)
    }

    #[test]
    fn what_was_known_is_known_again() {
        let directory = tempfile::tempdir().unwrap();
        let (mut keeper, config) = keeper(directory.path());
        let before = shown(100);
        let now = UnixMillis(100_000);
        let demand = |forecaster: &Forecaster| forecaster.demand(&"a".parse().unwrap(), now);
        assert_eq!(demand(&keeper.forecaster(&config)), None, "there is no file yet");
        keeper.window(&before, now);
        assert!(!config.learnt.file.exists(), "it is not time yet");
        keeper.window(&before, UnixMillis(160_000));
        keeper.wait();
        assert_eq!(demand(&keeper.forecaster(&config)), demand(&before));
        assert!(demand(&before).is_some());
        keeper.end(&shown(10));
        assert_eq!(demand(&keeper.forecaster(&config)), None, "the last word counts");
    }

    #[test]
    fn what_cannot_be_used_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let (mut keeper, config) = keeper(directory.path());
        keeper.end(&shown(100));
        let mut bytes = fs::read(&config.learnt.file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&config.learnt.file, &bytes).unwrap();
        let new = keeper.forecaster(&config);
        assert_eq!(new.demand(&"a".parse().unwrap(), UnixMillis(100_000)), None);
        assert_eq!(fs::read(config.learnt.file.with_extension("aside")).unwrap(), bytes);
        assert!(!config.learnt.file.exists());
    }

    #[test]
    fn a_directory_that_is_none_does_not_stop_anything() {
        let directory = tempfile::tempdir().unwrap();
        let (mut keeper, mut config) = keeper(directory.path());
        fs::write(directory.path().join("file"), "").unwrap();
        config.learnt.file = directory.path().join("file/learnt");
        keeper = Keeper { file: config.learnt.file.clone(), ..keeper };
        keeper.end(&shown(1));
        assert_eq!(keeper.forecaster(&config).demand(&"a".parse().unwrap(), UnixMillis(1_000)), None);
    }
}
