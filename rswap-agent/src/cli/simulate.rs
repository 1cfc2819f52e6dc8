//! `simulate`: what would have been done with recorded demand, and what it would have cost. It touches no agent and no instance.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use flate2::read::MultiGzDecoder;
use rswap_simulate::{
    replay::{
        Act, MoveModel, Placement, Policy, Reactive, Report, Scenario, Shape, SimPool, Workload,
        forecast_for, plan_for, simulate,
    },
    traces::{self, GRID_S, Series},
};
use serde::Deserialize;

use super::{print_json, table};
use crate::{forecast::Quantile, plan::PlanConfig};

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum PolicyName {
    /// Forecast and plan, as an agent in mode act; one in 20 needs may be more than was planned for
    Act,
    /// The same; one in 100
    ActP99,
    /// Everything stays where it was put for its peak
    Static,
    /// Thresholds on what is used now
    Reactive,
}

#[derive(Debug, Args)]
pub(super) struct SimulateArguments {
    /// Recorded demand: a file, or a directory of them: *.csv or *.csv.gz with the columns trace, instance_id, class,
    /// timestamp_s, then measurements
    #[arg(long, value_name = "PATH")]
    traces: PathBuf,
    /// The pools, in TOML: [[pool]], and what differs from the defaults in [plan] and [moves] (docs/simulate.md)
    #[arg(long, value_name = "FILE")]
    pools: PathBuf,
    /// What is compared; the oracle always is
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["act", "act-p99", "static", "reactive"])]
    policy: Vec<PolicyName>,
    /// The column that is the demand
    #[arg(long, default_value = "cpu")]
    column: String,
    /// What a value is multiplied with to be reference cores: 0.01 for percent of a core
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Only the first so many instances
    #[arg(long)]
    instances: Option<usize>,
    /// Only the last so many days: 7 for "last week"
    #[arg(long)]
    days: Option<u64>,
    /// Write a page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The pools' file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    #[serde(rename = "pool", default)]
    pools: Vec<SimPool>,
    #[serde(default)]
    plan: toml::Table,
    #[serde(default)]
    moves: MoveModel,
}

pub(super) fn run(arguments: &SimulateArguments) -> anyhow::Result<()> {
    ensure!(
        arguments.scale.is_finite() && arguments.scale > 0.0,
        "--scale {} is not above 0",
        arguments.scale
    );
    let scenario = scenario(arguments)?;
    let report = compare(&scenario, &arguments.policy);
    if let Some(path) = &arguments.html {
        let hours = scenario.windows() as u64 * GRID_S / 3600;
        let title = format!(
            "{} instances of {} on {} pools, {hours} hours",
            scenario.workloads.len(),
            arguments.traces.display(),
            scenario.sites().len(),
        );
        let page = report.page(&title).context("cannot write the report as JSON")?;
        std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if arguments.json {
        return print_json(&report);
    }
    let mut rows = table::table(&Report::HEADS);
    for row in report.table() {
        rows.add_row(row);
    }
    println!("{rows}");
    if let Some(path) = &arguments.html {
        println!("plots are in {}", path.display());
    }
    Ok(())
}

fn compare(scenario: &Scenario, names: &[PolicyName]) -> Report {
    let mut act = Act::new(scenario, Quantile::P95);
    let mut strict = Act::new(scenario, Quantile::P99);
    let (mut never, mut reactive) = (Reactive::never(), Reactive::by_thresholds());
    let asked = |name| names.contains(&name);
    let mut policies: Vec<&mut dyn Policy> = Vec::new();
    if asked(PolicyName::Act) {
        policies.push(&mut act);
    }
    if asked(PolicyName::ActP99) {
        policies.push(&mut strict);
    }
    if asked(PolicyName::Static) {
        policies.push(&mut never);
    }
    if asked(PolicyName::Reactive) {
        policies.push(&mut reactive);
    }
    let mut report = simulate(scenario, &Placement::by_peak(scenario), &mut policies);
    let shown = if asked(PolicyName::Act) { act } else { strict };
    report.focus = shown.into_focus();
    report
}

fn scenario(arguments: &SimulateArguments) -> anyhow::Result<Scenario> {
    let window_ms = GRID_S * 1000;
    let path = &arguments.pools;
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let described: Described =
        toml::from_str(&text).with_context(|| format!("cannot use {}", path.display()))?;
    let shape = described.pools.first().map_or(Shape::Host, |pool| pool.kind);
    let plan = overlaid(&plan_for(shape, window_ms), described.plan)
        .with_context(|| format!("cannot use [plan] of {}", path.display()))?;
    let series = demand(arguments)?;
    let workloads = workloads(series, arguments, described.moves.memory_gib)?;
    let given = (plan, forecast_for(window_ms), described.moves);
    Scenario::new(window_ms, workloads, &described.pools, given)
        .with_context(|| format!("cannot replay {} on {}", arguments.traces.display(), path.display()))
}

/// `defaults` with the keys of `given`.
fn overlaid(defaults: &PlanConfig, given: toml::Table) -> anyhow::Result<PlanConfig> {
    let mut whole = toml::Table::try_from(defaults)?;
    whole.extend(given);
    Ok(whole.try_into()?)
}

/// The demand column of every trace.
fn demand(arguments: &SimulateArguments) -> anyhow::Result<Vec<Series>> {
    let mut found = Vec::new();
    let mut names: BTreeMap<String, ()> = BTreeMap::new();
    for path in files(&arguments.traces)? {
        let columns = read(&path)?;
        for column in columns {
            names.insert(column.name.clone(), ());
            if column.name == arguments.column {
                found.extend(column.series);
            }
        }
    }
    if found.is_empty() {
        let names: Vec<&str> = names.keys().map(String::as_str).collect();
        bail!("no trace has a column {:?}: there are {}", arguments.column, names.join(", "));
    }
    Ok(found)
}

fn files(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.with_context(|| format!("cannot read {}", path.display()))?.path();
        let name = file.to_string_lossy().into_owned();
        if (name.ends_with(".csv") || name.ends_with(".csv.gz")) && !name.contains(".meta.csv") {
            files.push(file);
        }
    }
    files.sort();
    ensure!(!files.is_empty(), "no *.csv or *.csv.gz in {}", path.display());
    Ok(files)
}

fn read(path: &Path) -> anyhow::Result<Vec<traces::Column>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let source: Box<dyn BufRead> = if path.extension().is_some_and(|extension| extension == "gz") {
        Box::new(BufReader::with_capacity(1 << 20, MultiGzDecoder::new(file)))
    } else {
        Box::new(BufReader::new(file))
    };
    traces::parse(source).with_context(|| format!("cannot read {}", path.display()))
}

/// Series on one time axis, with names that instances may have.
fn workloads(
    mut series: Vec<Series>,
    arguments: &SimulateArguments,
    memory_gib: f64,
) -> anyhow::Result<Vec<Workload>> {
    if let Some(most) = arguments.instances {
        series.truncate(most);
    }
    let end = series.iter().map(|one| one.first + one.values.len() as u64).max().unwrap_or(0);
    let begin = series.iter().map(|one| one.first).min().unwrap_or(0);
    let begin = arguments.days.map_or(begin, |days| begin.max(end.saturating_sub(days * 24 * 3600 / GRID_S)));
    let memory_bytes = (memory_gib * (1u64 << 30) as f64) as u64;
    series
        .into_iter()
        .enumerate()
        .map(|(number, one)| {
            let name = format!("i{number}-{}", one.instance.to_lowercase());
            let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
            let name: String = name.chars().map(plain).take(63).collect();
            let before = one.first.saturating_sub(begin) as usize;
            let skipped = begin.saturating_sub(one.first) as usize;
            // What was not measured stays NaN.
            let amount = |value: &f64| if *value < 0.0 { 0.0 } else { value * arguments.scale };
            let values = one.values.iter().skip(skipped).map(amount);
            let demand = std::iter::repeat_n(f64::NAN, before).chain(values).collect();
            Ok(Workload { name: name.parse()?, demand, memory_bytes })
        })
        .collect()
}
