//! Recorded traces in a directory: `*.csv.gz`.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use flate2::read::MultiGzDecoder;
pub use rswap_simulate::traces::{Column, GRID_S, Series};

/// The traces in `dir`: `*.csv.gz`, without what is said about instances (`*.meta.csv`).
pub fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", dir.display()))?.path();
        if path.to_string_lossy().ends_with(".csv.gz") {
            files.push(path);
        }
    }
    files.sort();
    ensure!(!files.is_empty(), "no *.csv.gz in {}", dir.display());
    Ok(files)
}

/// Reads the columns of one file of which at least one instance has values.
pub fn read(path: &Path) -> anyhow::Result<Vec<Column>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let lines = BufReader::with_capacity(1 << 20, MultiGzDecoder::new(file));
    rswap_simulate::traces::parse(lines).with_context(|| path.display().to_string())
}
