//! A benchmark of several cases: what each binary of this kind does around them.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, ensure};
use comfy_table::Table;
use serde::Serialize;

#[derive(Serialize)]
struct Output<'a, C> {
    cases: &'a BTreeMap<String, C>,
}

/// Measures the cases whose name contains `only`, prints them as a table, and writes them to `output` as JSON. One that
/// fails does not keep the others from being measured.
///
/// # Errors
/// A case failed, or the output can't be written.
pub fn measure<S: Copy, C: Serialize>(
    subjects: &[(&str, S)],
    only: Option<&str>,
    output: &Path,
    measured: impl Fn(S) -> anyhow::Result<C>,
    table: impl FnOnce(&BTreeMap<String, C>) -> Table,
) -> anyhow::Result<()> {
    let mut cases = BTreeMap::new();
    let mut failed = Vec::new();
    for (name, subject) in subjects.iter().filter(|(name, _)| only.is_none_or(|text| name.contains(text))) {
        println!("{name}");
        match measured(*subject) {
            Ok(case) => drop(cases.insert((*name).to_owned(), case)),
            Err(error) => {
                println!("  FAILED: {error:#}");
                failed.push(*name);
            }
        }
    }
    println!("{}", table(&cases));
    if let Some(directory) = output.parent() {
        fs::create_dir_all(directory).context("cannot make the output's directory")?;
    }
    fs::write(output, serde_json::to_vec_pretty(&Output { cases: &cases })?)
        .context("cannot write the output")?;
    println!("written to {}", output.display());
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}
