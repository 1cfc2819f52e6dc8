//! Compares placement policies on recorded days, on the model of the literature: `cargo xtask bench placement --traces DIR`.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use comfy_table::{Table, presets};
use rswap_simulate::cloudsim::{Classic, Detector, Ours, Outcome, Policy, SAMPLES, run};
use rswap_tests::traces::{self, Series};
use serde_json::json;

const RESULT: &str = "target/rswap/bench-placement.json";
/// The trace, its column, and what that counts in.
const TRACE: &str = "planetlab.csv.gz";
const COLUMN: &str = "cpu";
const PERCENT: f64 = 100.0;

const CLASSIC: [(&str, Detector); 4] = [
    ("thr-mmt-0.8", Detector::Threshold(0.8)),
    ("iqr-mmt-1.5", Detector::InterquartileRange(1.5)),
    ("mad-mmt-2.5", Detector::MedianDeviation(2.5)),
    ("lr-mmt-1.2", Detector::LocalRegression(1.2)),
];

/// Placement policies on recorded days.
#[derive(Parser)]
struct Cli {
    /// Directory with planetlab.csv.gz
    #[arg(long)]
    traces: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let Cli { traces } = Cli::parse();
    let columns = traces::read(&traces.join(TRACE))?;
    let column = columns.into_iter().find(|column| column.name == COLUMN);
    let days = days(column.with_context(|| format!("{TRACE} has no column {COLUMN}"))?.series)?;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    table.set_header(["day", "policy", "kWh", "migrations", "SLATAH %", "PDM %", "ESV x 1e-3", "took s"]);
    let mut rows = Vec::new();
    let mut reached = true;
    for (day, demand) in &days {
        let mut classic = Vec::new();
        let mut play = |name: &str, policy: &mut dyn Policy| {
            let began = Instant::now();
            let outcome = run(demand, policy);
            let Outcome { kwh, migrations, slatah, pdm, esv } = outcome;
            table.add_row([
                day.clone(),
                name.to_owned(),
                format!("{kwh:.1}"),
                migrations.to_string(),
                format!("{:.2}", slatah * 100.0),
                format!("{:.4}", pdm * 100.0),
                format!("{:.3}", esv * 1e3),
                format!("{:.1}", began.elapsed().as_secs_f64()),
            ]);
            rows.push(json!({
                "day": day, "policy": name, "kwh": kwh, "migrations": migrations, "slatah": slatah, "pdm": pdm, "esv": esv,
            }));
            outcome
        };
        for (name, detector) in CLASSIC {
            classic.push(play(name, &mut Classic::new(detector)));
        }
        let ours = play("rswap", &mut Ours::new(demand.len()));
        let least = |of: fn(&Outcome) -> f64| classic.iter().map(of).fold(f64::MAX, f64::min);
        reached &= ours.kwh <= classic[3].kwh
            && ours.esv <= least(|outcome| outcome.esv) / 4.0
            && ours.migrations as f64 <= least(|outcome| outcome.migrations as f64) / 3.0;
    }
    println!("{table}");
    let word = if reached { "holds" } else { "does not hold" };
    println!(
        "==> on every day: energy no higher than lr-mmt's, ESV at most a quarter of the best, a third of the migrations: {word}"
    );
    std::fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    std::fs::write(RESULT, serde_json::to_vec_pretty(&json!({ "rows": rows }))?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    println!("==> all of it is in {RESULT}");
    Ok(())
}

/// Per day, the machines' demand in the order of their names.
fn days(mut series: Vec<Series>) -> anyhow::Result<Vec<(String, Vec<Vec<f64>>)>> {
    series.sort_by(|a, b| a.instance.cmp(&b.instance));
    let mut days: Vec<(String, Vec<Vec<f64>>)> = Vec::new();
    for Series { instance, values, .. } in series {
        let (day, _) = instance.split_once('/').with_context(|| format!("{instance} names no day"))?;
        ensure!(values.len() == SAMPLES, "{instance} has {} samples, not {SAMPLES}", values.len());
        let shares = values.iter().map(|percent| percent / PERCENT).collect();
        match days.last_mut().filter(|(last, _)| last == day) {
            Some((_, demand)) => demand.push(shares),
            None => days.push((day.to_owned(), vec![shares])),
        }
    }
    Ok(days)
}
