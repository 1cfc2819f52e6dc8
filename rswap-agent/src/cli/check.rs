//! `check`: what a migration would not carry, and what another host would refuse.

use std::process::ExitCode;

use anyhow::{Context, bail};
use serde::Serialize;

use super::{CheckArguments, Session, print_json, table::table};
use crate::{
    agent,
    instance::{Instance, registry::Registry},
    migrate::{links::Links, linux},
    pool,
    tracee::{
        check::{self, Finding, Severity},
        mounts,
    },
};

/// A finding, and which host found it.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    finding: Finding,
    /// The other host; not there for what this one found.
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
}

pub(super) fn check(session: &Session, arguments: &CheckArguments) -> anyhow::Result<ExitCode> {
    let registry = Registry::open(&session.config.agent.state_dir)?;
    let Some(instance) = registry.get(&arguments.instance)? else {
        bail!("there is no instance {} on this host: see `rswap ps`", arguments.instance);
    };
    let place = agent::place(&session.config);
    let mounts = mounts::survey(&instance)?.mounts;
    let findings = check::check(&instance, &place.places_of(&instance, &mounts))?;
    let mut rows: Vec<Row> = findings.into_iter().map(|finding| Row { finding, host: None }).collect();
    if let Some(host) = &arguments.host {
        rows.extend(refused_by(session, &instance, host)?);
    }
    let refused = rows.iter().any(|row| row.finding.severity == Severity::Refused);
    let code = if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    if arguments.output.json {
        print_json(&rows)?;
        return Ok(code);
    }
    print(&rows);
    let to = arguments.host.as_ref().map(|host| format!(" to {host}")).unwrap_or_default();
    println!("{} {}{to}", instance.name, if refused { "can't migrate" } else { "can migrate" });
    Ok(code)
}

/// Sends the offer as a question to the agent at `host`.
fn refused_by(session: &Session, instance: &Instance, host: &str) -> anyhow::Result<Vec<Row>> {
    let address = agent::host_address(&pool::discover(&session.config), host)?;
    let links = Links::open(&session.config)?;
    let asked = linux::ask(&agent::place(&session.config), &links, instance, address);
    let objections = asked.with_context(|| {
        format!("cannot ask {host} at {address}: is migrate.listen set there, and an agent up?")
    })?;
    let row = |objection: crate::migrate::offer::Objection| {
        let (item, reason) = (objection.item, objection.reason);
        let finding = Finding { pid: 0, item, reason, severity: Severity::Refused };
        Row { finding, host: Some(host.to_owned()) }
    };
    Ok(objections.into_iter().map(row).collect())
}

fn print(rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    let mut shown = table(&["HOST", "PID", "", "ITEM", "WHY, AND WHAT TO DO"]);
    for Row { finding, host } in rows {
        let severity = match finding.severity {
            Severity::Refused => "refused",
            Severity::Lost => "lost",
        };
        let host = host.as_deref().unwrap_or("this");
        let pid = if finding.pid == 0 { "-".to_owned() } else { finding.pid.to_string() };
        shown.add_row([host, &pid, severity, &finding.item, &finding.reason]);
    }
    println!("{shown}");
}
