//! What instances used, a file per instance, for `rswap simulate`: "what would have been done last week?"

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use crate::{config::RecordConfig, instance::InstanceName, units::UnixMillis};

const HEADER: &str = "trace,instance_id,class,timestamp_s,cpu,cpu_max,mem\n";
/// A file that is longer is put aside, and replaces the one put aside before: months, at a row a minute.
const LONGEST_BYTES: u64 = 16 << 20;

/// Writes rows of means.
pub(super) struct Recorder {
    directory: PathBuf,
    every_ms: u64,
    sums: BTreeMap<InstanceName, Sum>,
}

/// Windows since the last row.
#[derive(Clone, Copy)]
struct Sum {
    since: UnixMillis,
    cores: f64,
    most: f64,
    bytes: u64,
    windows: u32,
}

impl Recorder {
    /// `None` where nothing is to be recorded.
    pub(super) fn new(config: &RecordConfig) -> Option<Self> {
        let directory = config.directory.clone()?;
        Some(Self { directory, every_ms: config.every_s.saturating_mul(1000), sums: BTreeMap::new() })
    }

    /// A window of an instance: reference cores, and bytes of memory.
    pub(super) fn window(&mut self, name: &InstanceName, at: UnixMillis, cores: f64, bytes: u64) {
        if !cores.is_finite() {
            return;
        }
        let fresh = Sum { since: at, cores: 0.0, most: 0.0, bytes: 0, windows: 0 };
        let sum = self.sums.entry(name.clone()).or_insert(fresh);
        *sum = Sum {
            since: sum.since,
            cores: sum.cores + cores,
            most: sum.most.max(cores),
            bytes,
            windows: sum.windows + 1,
        };
        if at.since(sum.since) < self.every_ms {
            return;
        }
        let row = format!(
            "recorded,{name},,{:.1},{:.4},{:.4},{}\n",
            sum.since.0 as f64 / 1000.0,
            sum.cores / f64::from(sum.windows),
            sum.most,
            sum.bytes
        );
        *sum = fresh;
        if let Err(error) = append(&self.directory, name, &row) {
            tracing::warn!(%error, directory = %self.directory.display(), instance = %name, "not recorded");
        }
    }

    /// The instance is gone.
    pub(super) fn forget(&mut self, name: &InstanceName) {
        self.sums.remove(name);
    }
}

fn append(directory: &Path, name: &InstanceName, row: &str) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let path = directory.join(format!("{name}.csv"));
    let length = match fs::metadata(&path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let full = length > LONGEST_BYTES;
    if full {
        fs::rename(&path, directory.join(format!("{name}.csv.old")))?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
    let header = if full || length == 0 { HEADER } else { "" };
    file.write_all(format!("{header}{row}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_means_that_the_simulator_reads() {
        let directory = tempfile::tempdir().unwrap();
        let config = RecordConfig { directory: Some(directory.path().to_owned()), every_s: 60 };
        let mut recorder = Recorder::new(&config).unwrap();
        let name: InstanceName = "web".parse().unwrap();
        for second in 0..=600 {
            recorder.window(&name, UnixMillis(second * 1000), f64::from(second as u32 % 2), 5);
        }
        let text = fs::read(directory.path().join("web.csv")).unwrap();
        let columns = rswap_simulate::traces::parse(text.as_slice()).unwrap();
        let cpu = columns.iter().find(|column| column.name == "cpu").unwrap();
        assert_eq!((cpu.series[0].instance.as_str(), cpu.series[0].values.len()), ("web", 2));
        assert!((cpu.series[0].values[0] - 0.5).abs() < 0.01);
    }
}
