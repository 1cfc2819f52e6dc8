//! Measures the forecast on recorded traces, next to what others do: `cargo xtask bench forecast --traces DIR`.
//!
//! Every trace is put on a grid of five minutes. A method sees each series from its beginning, one window after the other,
//! and is judged on each forecast after the first day (of a shorter series, after its first quarter). Losses are summed
//! over the instances of a column: big instances count for more, as they cost more.

#![allow(clippy::needless_range_loop, reason = "quantiles run in step over several arrays of one length")]

mod cold;
mod judge;
mod methods;
mod report;

use std::{
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::Context;
use judge::Score;
use rswap_tests::traces;

/// Leads, in minutes.
pub(crate) const LEADS_MIN: [usize; 3] = [5, 30, 60];
/// Windows in a day.
pub(crate) const DAY: usize = 86_400 / traces::GRID_S as usize;
/// Columns that are judged: the resources that are forecast.
const COLUMNS: [&str; 6] = ["cpu", "cpu_max", "mem", "disk_write", "net_in", "io_lat"];
const RESULT: &str = "target/rswap/bench-forecast.json";

fn main() -> anyhow::Result<()> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from).context("say where the traces are")?;
    let mut columns = Vec::new();
    for file in traces::files(&dir)? {
        columns.extend(traces::read(&file)?.into_iter().filter(|c| COLUMNS.contains(&c.name.as_str())));
    }
    let scores = run(&columns);
    let cold: Vec<_> = columns.iter().map(cold::column).collect();
    let cost = judge::cost(&columns)?;
    let targets = report::targets(&dir)?;
    let result = report::json(&columns, &scores, &cold, &cost);
    report::show(&columns, &scores, &targets, &cold, &cost);
    std::fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    std::fs::write(RESULT, serde_json::to_vec_pretty(&result)?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    println!("==> all of it is in {RESULT}");
    Ok(())
}

/// Judges every method on every series; the result is by column and method.
fn run(columns: &[traces::Column]) -> Vec<Vec<Score>> {
    let jobs: Vec<(usize, usize)> = columns
        .iter()
        .enumerate()
        .flat_map(|(column, it)| (0..it.series.len()).map(move |series| (column, series)))
        .collect();
    let next = AtomicUsize::new(0);
    let done = Mutex::new(vec![None; jobs.len()]);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&(column, series)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let scores = judge::series(&columns[column].series[series].values);
                    let place = jobs.binary_search(&(column, series)).unwrap_or_default();
                    if let Ok(mut done) = done.lock() {
                        done[place] = Some(scores);
                    }
                }
            });
        }
    });
    // Summed in the order of the jobs: floating point does not commute, and the result is to be the same each time.
    let mut sums = vec![vec![Score::default(); methods::METHODS.len()]; columns.len()];
    for ((column, _), scores) in jobs.iter().zip(done.into_inner().unwrap_or_default()) {
        for (sum, score) in sums[*column].iter_mut().zip(scores.unwrap_or_default()) {
            sum.add(&score);
        }
    }
    sums
}
