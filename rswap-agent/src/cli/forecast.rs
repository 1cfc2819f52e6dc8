//! `forecast`: what is forecast of an instance, and what was learnt, from one host to another.

use std::{fs, path::PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

use super::{
    Output, Session, print_json,
    table::{bytes, nanoseconds, table},
};
use crate::{
    agent::learnt,
    control::LearnDone,
    forecast::{Evidence, Lessons, Resource},
    instance::InstanceName,
    status::InstanceView,
};

#[derive(Debug, Args)]
pub(super) struct ForecastArguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Show what an instance is expected to need, per resource and time ahead
    Show {
        /// Which instance
        instance: InstanceName,
        #[command(flatten)]
        output: Output,
    },
    /// Print what this host's instances have taught, as JSON: as the agent last wrote it (learnt.save_every_s)
    Export,
    /// Print several exports as one
    Merge {
        /// The exports; what two of them know from the same instances counts twice
        #[arg(required = true, value_name = "FILE")]
        exports: Vec<PathBuf>,
    },
    /// Let this host's agent learn from an export: instances that come from now on start from it, too
    Import {
        /// The export
        #[arg(value_name = "FILE")]
        export: PathBuf,
        #[command(flatten)]
        output: Output,
    },
}

pub(super) async fn forecast(session: &Session, arguments: ForecastArguments) -> anyhow::Result<()> {
    match arguments.command {
        What::Show { instance, output } => show(session, &instance, output).await,
        What::Export => {
            let file = &session.config.learnt.file;
            let state = learnt::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            print_json(&Lessons::of_state(&state).with_context(|| format!("cannot use {}", file.display()))?)
        }
        What::Merge { exports } => {
            let mut all: Option<Lessons> = None;
            for path in exports {
                let one = read(&path)?;
                match &mut all {
                    Some(all) => all.merge(&one).with_context(|| format!("cannot use {}", path.display()))?,
                    None => all = Some(one),
                }
            }
            print_json(&all)
        }
        What::Import { export, output } => {
            let done: LearnDone = session.client.post("/v1/learn", &read(&export)?).await?;
            if output.json {
                return print_json(&done);
            }
            println!("learnt from {} instances", done.identities);
            Ok(())
        }
    }
}

fn read(path: &PathBuf) -> anyhow::Result<Lessons> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lessons: Lessons =
        serde_json::from_slice(&text).with_context(|| format!("{} is no export", path.display()))?;
    lessons.check().with_context(|| format!("cannot use {}", path.display()))?;
    Ok(lessons)
}

async fn show(session: &Session, instance: &InstanceName, output: Output) -> anyhow::Result<()> {
    let views: Vec<InstanceView> = session.client.get("/v1/profiles").await?;
    let Some(view) = views.into_iter().find(|view| view.instance.name == *instance) else {
        bail!("there is no instance {instance} on this host: see `rswap ps`");
    };
    if output.json {
        return print_json(&view.demand);
    }
    if let Some(kin) = &view.kin {
        println!("class {}, identity {}", kin.class, kin.identity);
    }
    let Some(demand) = view.demand else {
        println!("nothing is forecast of {instance} yet: it needs a few windows first");
        return Ok(());
    };
    let mut rows = table(&["RESOURCE", "AHEAD", "P50", "P90", "P95", "P99", "SEEN", "UNDER P95"]);
    for point in &demand.points {
        let amount = |value: f64| amount(point.resource, value);
        let (seen, covered) = match point.evidence {
            Evidence::TooLittle { seen, needed } => (format!("{seen} of {needed}"), "-".to_owned()),
            Evidence::Enough { seen, p95_coverage } => {
                (seen.to_string(), format!("{:.1} %", p95_coverage * 100.0))
            }
        };
        let need = &point.need;
        rows.add_row([
            point.resource.name().to_owned(),
            format!("{} s", point.horizon_ms as f64 / 1e3),
            amount(need.p50),
            amount(need.p90),
            amount(need.p95),
            amount(need.p99),
            seen,
            covered,
        ]);
    }
    println!("{rows}");
    Ok(())
}

/// An amount of a resource, for people.
fn amount(resource: Resource, value: f64) -> String {
    match resource {
        Resource::Cpu => format!("{value:.3}"),
        Resource::IoLatency => nanoseconds(value),
        Resource::VolumeOperations => format!("{value:.1}"),
        Resource::Memory
        | Resource::Io
        | Resource::NetIn
        | Resource::NetOut
        | Resource::Written
        | Resource::VolumeBytes
        | Resource::Port => bytes(value),
    }
}
