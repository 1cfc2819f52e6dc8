//! Recorded demand: tidy CSV, one row per instance and moment.
//!
//! Columns: trace, instance_id, class, timestamp_s, then measurements; an empty field was not measured. Rows of one
//! instance follow each other, oldest first.

use std::io::{self, BufRead};

/// The grid that every trace is put on, in seconds: the mean of what falls into a cell.
pub const GRID_S: u64 = 300;
/// Cells of one instance: ten years of five minutes.
const MOST_CELLS: usize = 10 * 366 * 288;
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

/// Why a trace could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The source failed.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// There is no header.
    #[error("it is empty")]
    Empty,
    /// A row is not as it has to be.
    #[error("row {number}: {what}")]
    Row {
        /// Which, from 1.
        number: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Reads the columns of one trace of which at least one instance has values.
///
/// # Errors
///
/// If it can't be read, or isn't one.
pub fn parse(source: impl BufRead) -> Result<Vec<Column>, TraceError> {
    let mut lines = source.lines();
    let header = lines.next().ok_or(TraceError::Empty)?.map_err(TraceError::Read)?;
    let names: Vec<&str> = header.split(',').skip(KEYS).collect();
    let mut reading = Reading::default();
    for (number, line) in lines.enumerate() {
        let line = line.map_err(TraceError::Read)?;
        reading.row(&line, names.len()).map_err(|what| TraceError::Row { number: number + 2, what })?;
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
    fn row(&mut self, line: &str, columns: usize) -> Result<(), &'static str> {
        let mut fields = line.split(',');
        let mut key = || fields.next().ok_or("a key is missing");
        let (trace, instance, class, at) = (key()?, key()?, key()?, key()?);
        let at: f64 = at.parse().map_err(|_| "timestamp_s is no number")?;
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
        if cell < self.first {
            return Err("it is older than the row before");
        }
        let place = (cell - self.first) as usize;
        if place >= MOST_CELLS {
            return Err("it is years after the first row of its instance");
        }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_fall_into_cells() {
        let text = "trace,instance_id,class,timestamp_s,cpu,mem\nt,a,x,600,2,\nt,a,x,700,4,\nt,a,x,1200,1,\nt,b,x,0,5,\n";
        let columns = parse(text.as_bytes()).unwrap();
        assert_eq!(columns.len(), 1);
        let a = &columns[0].series[0];
        assert_eq!((a.first, a.values[0], a.values[2]), (2, 3.0, 1.0));
        assert!(a.values[1].is_nan());
        assert_eq!(columns[0].series[1].instance, "b");
    }

    #[test]
    fn a_bad_row_is_named() {
        let error =
            parse("trace,instance_id,class,timestamp_s,cpu\nt,a,x,soon,1\n".as_bytes()).err().unwrap();
        assert_eq!(error.to_string(), "row 2: timestamp_s is no number");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(trace,i,c,t,cpu\n)?([a-c,0-9.\n-]{0,80})") {
            let _ = parse(text.as_bytes());
        }
    }
}
