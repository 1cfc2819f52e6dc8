//! Reading recorded demand: tidy CSV files, gzipped, one row per instance and moment.
//!
//! Columns: trace, instance_id, class, timestamp_s, then measurements; an empty field was not measured. Rows of one
//! instance follow each other, oldest first.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use flate2::read::MultiGzDecoder;

/// The grid that every trace is put on, in seconds: the mean of what falls into a cell.
pub const GRID_S: u64 = 300;
/// Columns before the measurements.
const KEYS: usize = 4;

/// One measurement of one instance, on the grid; NaN where nothing was measured.
pub struct Series {
    /// Which instance.
    pub instance: String,
    /// Its kind, by the trace's own notion.
    pub class: String,
    /// Number of the first cell since the trace's beginning.
    pub first: u64,
    /// One per cell.
    pub values: Vec<f64>,
}

/// One measured column of one trace.
pub struct Column {
    /// Name of the trace.
    pub trace: String,
    /// Name of the column.
    pub name: String,
    /// Per instance.
    pub series: Vec<Series>,
}

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
    let mut lines = BufReader::with_capacity(1 << 20, MultiGzDecoder::new(file)).lines();
    let header = lines.next().context("the file is empty")?.with_context(|| path.display().to_string())?;
    let names: Vec<&str> = header.split(',').skip(KEYS).collect();
    let mut reading = Reading::default();
    for (number, line) in lines.enumerate() {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        reading.row(&line, names.len()).with_context(|| format!("{}, row {}", path.display(), number + 2))?;
    }
    reading.end_instance();
    let trace = reading.trace;
    let columns = names.iter().zip(reading.columns).map(|(name, series)| Column {
        trace: trace.clone(),
        name: (*name).to_owned(),
        series,
    });
    Ok(columns.filter(|column| !column.series.is_empty()).collect())
}

#[derive(Default)]
struct Reading {
    trace: String,
    instance: String,
    class: String,
    first: u64,
    /// (sum, count) per cell, per column.
    cells: Vec<Vec<(f64, u32)>>,
    columns: Vec<Vec<Series>>,
}

impl Reading {
    fn row(&mut self, line: &str, columns: usize) -> anyhow::Result<()> {
        let mut fields = line.split(',');
        let mut key = || fields.next().context("a key is missing");
        let (trace, instance, class, at) = (key()?, key()?, key()?, key()?);
        let at: f64 = at.parse().context("timestamp_s is no number")?;
        let cell = (at.max(0.0) / GRID_S as f64) as u64;
        if instance != self.instance || self.cells.is_empty() {
            self.end_instance();
            self.trace = trace.to_owned();
            self.instance = instance.to_owned();
            self.class = class.to_owned();
            self.first = cell;
            self.cells = vec![Vec::new(); columns];
            self.columns.resize_with(columns, Vec::new);
        }
        ensure!(cell >= self.first, "it is older than the row before");
        let place = (cell - self.first) as usize;
        for cells in &mut self.cells {
            let value =
                fields.next().unwrap_or_default().parse::<f64>().ok().filter(|value| value.is_finite());
            if cells.len() <= place {
                cells.resize(place + 1, (0.0, 0));
            }
            if let Some(value) = value {
                cells[place].0 += value;
                cells[place].1 += 1;
            }
        }
        Ok(())
    }

    fn end_instance(&mut self) {
        for (cells, column) in std::mem::take(&mut self.cells).into_iter().zip(&mut self.columns) {
            if cells.iter().all(|(_, count)| *count == 0) {
                continue;
            }
            column.push(Series {
                instance: self.instance.clone(),
                class: self.class.clone(),
                first: self.first,
                values: cells.iter().map(|(sum, count)| sum / f64::from(*count)).collect(),
            });
        }
    }
}
