//! Fast and slow tiers with recorded demand: `cargo xtask bench tiers --traces DIR`.
//!
//! Cores (the CPU of virtual machines) and storage (their reads). The fast tier has room for all peaks, the slow one, at half the
//! speed and a quarter of the price, for the mean of all demand.

use std::{path::PathBuf, time::Instant};

use anyhow::Context;
use clap::Parser;
use comfy_table::{Table, presets};
use rswap_agent::forecast::Quantile;
use rswap_simulate::replay::{
    Act, MoveModel, Placement, Policy, Reactive, Report, Scenario, Shape, SimPool, Workload, forecast_for,
    plan_for, simulate,
};
use rswap_tests::traces::{self, Column, GRID_S};
use serde_json::json;

const RESULT: &str = "target/rswap/bench-tiers.json";
const TRACE: &str = "bitbrains.csv.gz";
/// Tier, column, its values per reference unit (MHz of a core; KB/s of a MB/s), how it is moved.
const TIERS: [(&str, &str, f64, Shape); 2] =
    [("cores", "cpu", 2600.0, Shape::Cores), ("storage", "disk_read", 1000.0, Shape::Host)];
const WINDOW_MS: u64 = GRID_S * 1000;
/// The last so many days.
const DAYS: usize = 10;
const SLOW_SPEED: f64 = 0.5;

/// Fast and slow tiers with recorded demand.
#[derive(Parser)]
struct Cli {
    /// Directory with bitbrains.csv.gz
    #[arg(long)]
    traces: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let Cli { traces } = Cli::parse();
    let columns = traces::read(&traces.join(TRACE))?;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    table.set_header(["tier", "policy", "money", "saved %", "violations %", "moves", "ping-pongs", "regret"]);
    let mut rows = Vec::new();
    for (tier, name, unit, shape) in TIERS {
        let column = columns.iter().find(|column| column.name == name);
        let column = column.with_context(|| format!("{TRACE} has no column {name}"))?;
        let scenario = scenario(column, unit, shape)?;
        let began = Instant::now();
        let report = compare(&scenario);
        println!(
            "==> {tier}: {} instances, {} windows, {:.1} s",
            scenario.workloads.len(),
            report.windows,
            began.elapsed().as_secs_f64()
        );
        let never = report.rows.iter().find(|row| row.policy == "static").map_or(0.0, |row| row.money);
        for row in &report.rows {
            let saved = 1.0 - row.money / never;
            table.add_row([
                tier.to_owned(),
                row.policy.clone(),
                format!("{:.2}", row.money),
                format!("{:.1}", saved * 100.0),
                format!("{:.3}", row.violations * 100.0),
                row.moves.to_string(),
                row.ping_pongs.to_string(),
                format!("{:.2}", row.regret),
            ]);
            rows.push(json!({
                "tier": tier, "policy": row.policy, "money": row.money, "saved": saved, "violations": row.violations,
                "moves": row.moves, "ping_pongs": row.ping_pongs, "regret": row.regret,
            }));
        }
    }
    println!("{table}");
    std::fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    std::fs::write(RESULT, serde_json::to_vec_pretty(&json!({ "rows": rows }))?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    println!("==> all of it is in {RESULT}");
    Ok(())
}

fn compare(scenario: &Scenario) -> Report {
    let acting = [Quantile::P99, Quantile::P95, Quantile::P90, Quantile::P50];
    let mut acting = acting.map(|quantile| Act::new(scenario, quantile));
    let (mut never, mut reactive) = (Reactive::never(), Reactive::by_thresholds());
    let first = Placement::by_peak(scenario);
    let acting = acting.iter_mut().map(|act| act as &mut dyn Policy);
    let others: [&mut dyn Policy; 2] = [&mut never, &mut reactive];
    simulate(scenario, &first, &mut acting.chain(others).collect::<Vec<_>>())
}

fn scenario(column: &Column, unit: f64, shape: Shape) -> anyhow::Result<Scenario> {
    let most = DAYS * 24 * 3600 / GRID_S as usize;
    let mut workloads = Vec::new();
    for (number, series) in column.series.iter().enumerate() {
        let skipped = series.values.len().saturating_sub(most);
        workloads.push(Workload {
            name: format!("vm-{number:04}").parse().context("a name was refused")?,
            demand: series.values[skipped..].iter().map(|value| value / unit).collect(),
            memory_bytes: 4 << 30,
        });
    }
    let of = |workload: &Workload, fold: fn(f64, f64) -> f64| {
        workload.demand.iter().copied().filter(|demand| demand.is_finite()).fold(0.0, fold)
    };
    let peaks: f64 = workloads.iter().map(|workload| of(workload, f64::max)).sum();
    let means: f64 = workloads
        .iter()
        .map(|workload| of(workload, |sum, demand| sum + demand) / workload.demand.len().max(1) as f64)
        .sum();
    let pool = |name: &str, cores: f64, cost: f64, performance: f64| SimPool {
        name: name.to_owned(),
        kind: shape,
        count: 1,
        cores,
        memory_gib: 1e6,
        cost_per_core_hour: cost,
        cost_per_gib_hour: 0.0,
        performance,
        idle_watts: 0.0,
        full_watts: 0.0,
    };
    let pools = [pool("fast", peaks * 1.2, 0.04, 1.0), pool("slow", means / SLOW_SPEED, 0.01, SLOW_SPEED)];
    let given = (plan_for(shape, WINDOW_MS), forecast_for(WINDOW_MS), MoveModel::default());
    Ok(Scenario::new(WINDOW_MS, workloads, &pools, given)?)
}
