//! The results, as JSON and as a table.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context;
use comfy_table::{Table, presets};
use rswap_tests::traces::Column;
use serde_json::{Value, json};

use crate::{
    LEADS_MIN,
    cold::Cold,
    judge::{Cost, LeadScore, Score},
    methods::{LEVELS, METHODS},
};

/// What is to be reached, by trace, column and lead.
pub(crate) type Targets = BTreeMap<(String, String, usize), f64>;

/// Reads `targets.csv`, where there is one: trace, column, lead_min, target, ...
pub(crate) fn targets(dir: &Path) -> anyhow::Result<Targets> {
    let path = dir.join("targets.csv");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(Targets::new()) };
    text.lines()
        .skip(1)
        .map(|line| {
            let fields: Vec<&str> = line.split(',').collect();
            let [trace, column, lead, target, ..] = fields[..] else {
                anyhow::bail!("too few fields: {line}")
            };
            Ok(((trace.into(), column.into(), lead.parse()?), target.parse()?))
        })
        .collect::<anyhow::Result<_>>()
        .with_context(|| format!("cannot read {}", path.display()))
}

/// Weighted quantile loss: twice the pinball loss by the amount, mean of the levels.
fn wql(score: &LeadScore) -> f64 {
    2.0 * score.pinball.iter().sum::<f64>() / LEVELS.len() as f64 / score.amount
}

/// Everything.
pub(crate) fn json(
    columns: &[Column],
    scores: &[Vec<Score>],
    cold: &[[Cold; LEADS_MIN.len()]],
    cost: &Cost,
) -> Value {
    let (mut rows, mut frontier) = (Vec::new(), Vec::new());
    for (column, scores) in columns.iter().zip(scores) {
        for (method, score) in METHODS.iter().zip(scores) {
            let by_level = |values: &dyn Fn(usize) -> f64| {
                let by_level =
                    LEVELS.iter().enumerate().map(|(k, level)| (level.to_string(), json!(values(k))));
                Value::Object(by_level.collect())
            };
            for (lead, score) in LEADS_MIN.iter().zip(&score.leads) {
                rows.push(json!({
                    "trace": column.trace, "column": column.name, "lead_min": lead, "method": method,
                    "wql": wql(score),
                    "coverage": by_level(&|k| score.covered[k] / score.count),
                    "pinball": by_level(&|k| score.pinball[k] / score.amount),
                    "mase": score.error / score.change,
                    "forecasts": score.count,
                }));
            }
            for (level, held) in LEVELS.iter().zip(&score.held) {
                frontier.push(json!({
                    "trace": column.trace, "column": column.name, "method": method, "quantile": level,
                    "held_min": 60,
                    "slack": held.slack / held.demand,
                    "violations": held.violations / held.windows,
                }));
            }
        }
    }
    let cold = columns.iter().zip(cold).flat_map(|(column, cold)| {
        cold.iter().zip(LEADS_MIN).map(move |(cold, lead)| {
            json!({
                "trace": column.trace, "column": column.name, "lead_min": lead, "first_min": 120,
                "wql_alone": 2.0 * cold.alone / cold.amount, "wql_with_priors": 2.0 * cold.taught / cold.amount,
                "wql_with_alike": 2.0 * cold.alike / cold.amount,
            })
        })
    });
    json!({
        "rows": rows, "frontier": frontier, "cold_start": cold.collect::<Vec<_>>(),
        "updates_per_s": cost.updates_per_s, "bytes_per_series": cost.bytes_per_series,
    })
}

/// For people.
pub(crate) fn show(
    columns: &[Column],
    scores: &[Vec<Score>],
    targets: &Targets,
    cold: &[[Cold; LEADS_MIN.len()]],
    cost: &Cost,
) {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let losses = METHODS.map(|method| format!("{method} wql"));
    let head = ["trace", "column", "lead"].map(str::to_owned);
    let tail = ["target", "to it", "q95 covers"].map(str::to_owned);
    table.set_header(head.into_iter().chain(losses).chain(tail));
    let mut ratios = Vec::new();
    for (column, scores) in columns.iter().zip(scores) {
        for (lead, minutes) in LEADS_MIN.into_iter().enumerate() {
            let own = &scores[0].leads[lead];
            let target = targets.get(&(column.trace.clone(), column.name.clone(), minutes));
            let ratio = target.map(|target| wql(own) / target);
            ratios.extend(ratio);
            let mut row = vec![column.trace.clone(), column.name.clone(), format!("{minutes} min")];
            row.extend(scores.iter().map(|score| format!("{:.4}", wql(&score.leads[lead]))));
            row.push(target.map_or("-".into(), |target| format!("{target:.4}")));
            row.push(ratio.map_or("-".into(), |ratio| format!("{:+.1} %", (ratio - 1.0) * 100.0)));
            row.push(format!("{:.2} %", own.covered[2] / own.count * 100.0));
            table.add_row(row);
        }
    }
    println!("{table}");
    if !ratios.is_empty() {
        let reached = ratios.iter().filter(|ratio| **ratio <= 1.0).count();
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64 - 1.0;
        println!(
            "==> {reached} of {} targets reached; on average {:+.1} % to them",
            ratios.len(),
            mean * 100.0
        );
    }
    let less = |of: &dyn Fn(&Cold) -> f64, lead: usize| {
        let ratios: Vec<f64> =
            cold.iter().map(|c| of(&c[lead]) / c[lead].alone).filter(|r| r.is_finite()).collect();
        (1.0 - ratios.iter().sum::<f64>() / ratios.len().max(1) as f64) * 100.0
    };
    let all =
        |of: &dyn Fn(&Cold) -> f64| format!("{:.1} / {:.1} / {:.1} %", less(of, 0), less(of, 1), less(of, 2));
    println!(
        "==> in the first two hours, priors take {} off the loss; with those of a profile alike, {}",
        all(&|cold| cold.taught),
        all(&|cold| cold.alike)
    );
    println!(
        "==> {:.0} updates per second of one core, all leads and quantiles; at most {} bytes per series",
        cost.updates_per_s, cost.bytes_per_series
    );
}
