//! `rswap doctor`: what there is of the kernel, and what the agent may.

use std::{io, os::unix::net::UnixStream, process::ExitCode};

use super::{Output, Session, print_json, table::table};
use crate::{
    config::Config,
    migrate::links::{Links, LinksView},
    privilege,
    profile::doctor as features,
    sys::{
        capability::{self, Held},
        socket,
    },
    units::UnixMillis,
};

/// Whether links to other hosts are safe, as a feature of this host.
fn links(config: &Config) -> features::Feature {
    let finding = match Links::open(config) {
        Err(error) => Err(format!("{:#}", anyhow::Error::new(error))),
        Ok(links) => match links.view(UnixMillis::now()) {
            LinksView::Closed => Err("[tls] is not set".to_owned()),
            view => match (view.problem(), &view) {
                (None, LinksView::Tls { identity, .. }) => Ok(format!("TLS, as {identity}")),
                (problem, _) => Err(problem.unwrap_or_default().to_owned()),
            },
        },
    };
    features::feature("links to other hosts ([tls])", finding, "no other host is spoken to, or not safely")
}

/// Whose capabilities count: the running agent's, or those that one would have that was started like this program.
fn held(session: &Session) -> (String, io::Result<Held>) {
    let agent = UnixStream::connect(&session.config.agent.control_socket)
        .and_then(|stream| socket::peer_credentials(&stream.into()));
    match agent {
        Ok((pid, ..)) => (format!("the agent (pid {pid})"), capability::of_process(pid as u32)),
        Err(_) => ("whoever asks".to_owned(), capability::of_process(std::process::id())),
    }
}

pub(super) fn doctor(session: &Session, output: Output) -> anyhow::Result<ExitCode> {
    let mut found = features::features();
    let (whom, held) = held(session);
    found.push(privilege::needed_feature(&whom, &held));
    found.push(privilege::used_feature(&whom, &held));
    found.push(privilege::bounding_feature(&whom, &held));
    found.push(links(&session.config));
    if output.json {
        print_json(&found)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(&["FEATURE", "", "FOUND", "WITHOUT IT"]);
    for feature in &found {
        let mark = if feature.present { "yes" } else { "no" };
        let lack = match (feature.present, feature.remedy.as_str()) {
            (true, _) => String::new(),
            (false, "") => feature.cost_of_lack.clone(),
            (false, remedy) => format!("{}: {remedy} is needed", feature.cost_of_lack),
        };
        rows.add_row([feature.name.as_str(), mark, feature.detail.as_str(), &lack]);
    }
    println!("{rows}");
    Ok(ExitCode::SUCCESS)
}
