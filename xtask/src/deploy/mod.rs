//! `cargo xtask deploy`: one host after the other gets a release, and keeps the one before if the new one does not work there.
//!
//! ```text
//! release (here)      binary, units, HOST.toml, certificates; named after its version and the digest of all of it
//! for each host:
//!   look              what is there; refused before anything is touched where it can't be done
//!   copy, install     to /opt/rswap/RELEASE, digests compared, and the binary reads the configuration there
//!   switch            /opt/rswap/current, the unit; the agent starts anew, instances keep running
//!   health            the agent answers, works, and is the new one, and every instance that was watched is watched or has ended;
//!                     so does a controller
//!     or else         switched back, and the one before has to be in order; no further host is touched
//!   settle            /opt/rswap/good: whoever finds another release there than `current` knows that somebody was cut off
//! ```
//!
//! Where the release runs already, with each file as it was sent, it is looked at all the same (health), and settled.

mod host;
mod release;
mod rule;

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Args;
use xshell::Shell;

use crate::{compile, project_root, setup, step};
use host::Host;
use release::Release;
use rule::{Back, Found, Next};

/// Where everything comes from, and where it goes.
#[derive(Debug, Args)]
pub(crate) struct Deploy {
    /// Where to, as ssh takes it; the configuration is HOST.toml, the certificates are those that were issued to HOST
    #[arg(required = true, value_name = "USER@HOST")]
    hosts: Vec<String>,
    /// Directory with HOST.toml for each host
    #[arg(long, value_name = "DIRECTORY")]
    config: PathBuf,
    /// Directory of `rswap pki`: issued/HOST becomes /etc/rswap/tls. Without it, what is at /etc/rswap/tls is left alone
    #[arg(long, value_name = "DIRECTORY")]
    pki: Option<PathBuf>,
    /// This host (one of those above, without USER@) runs the controller, too
    #[arg(long, value_name = "HOST")]
    controller: Option<String>,
    /// A host that runs the controller, and is not --controller any more, is to stop it
    #[arg(long)]
    drop_controller: bool,
    /// A binary that is there, instead of one that is built now
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// A configuration of ssh other than the user's
    #[arg(long, value_name = "FILE")]
    ssh_config: Option<PathBuf>,
    /// How long an agent may take to be in order, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    within: u32,
    /// Say each step, and take none. Hosts are looked at
    #[arg(long)]
    dry_run: bool,
}

/// Deploys to every host, or stops at the first that does not take it.
pub(crate) fn run(deploy: &Deploy) -> anyhow::Result<()> {
    let shell = Shell::new()?;
    let names: Vec<&str> = deploy.hosts.iter().map(|target| release::host_name(target)).collect();
    if let Some(controller) = &deploy.controller {
        ensure!(
            names.contains(&controller.as_str()),
            "--controller {controller} is none of {}",
            names.join(", ")
        );
    }
    let twice = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    ensure!(twice.is_none(), "{} is named twice", twice.map_or("", |(_, name)| name));
    let binary = binary(deploy)?;
    // All of them before the first is touched: what is missing for the last one is said at once.
    let staging = shell.create_temp_dir()?;
    let mut releases = Vec::new();
    for name in &names {
        let to = staging.path().join(name);
        let release = Release::stage(&shell, deploy, &binary, name, &to);
        releases.push(
            release.with_context(|| format!("cannot put together what {name} gets: no host was touched"))?,
        );
    }
    let mut done = 0;
    for (target, release) in deploy.hosts.iter().zip(&releases) {
        let host = Host::new(&shell, deploy, target)?;
        if let Err(error) = one(&host, release, deploy) {
            let left = deploy.hosts[done + 1..].join(", ");
            let left = if left.is_empty() { String::new() } else { format!("; not touched: {left}") };
            return Err(
                error.context(format!("{target}: not deployed ({done} of {} hosts were{left})", names.len()))
            );
        }
        done += 1;
    }
    step(&format!("{done} of {} hosts are as they should be", names.len()));
    Ok(())
}

fn binary(deploy: &Deploy) -> anyhow::Result<PathBuf> {
    match &deploy.binary {
        Some(binary) => {
            std::fs::canonicalize(binary).with_context(|| format!("cannot find {}", binary.display()))
        }
        None if deploy.dry_run => {
            let built = compile::target_dir().join("release/rswap");
            let hint =
                "a dry run builds nothing: `cargo xtask build --release` first, or name one with --binary";
            ensure!(built.exists(), "{} is missing: {hint}", built.display());
            Ok(built)
        }
        None => {
            setup::run()?;
            Ok(compile::everything(true)?.join("rswap"))
        }
    }
}

/// Brings one host to `release`.
fn one(host: &Host<'_>, release: &Release, deploy: &Deploy) -> anyhow::Result<()> {
    let dry_run = deploy.dry_run;
    let (target, name) = (host.target(), &release.name);
    step(&format!("{target}: looking at it"));
    let found = host.look(release)?;
    let from = found.current.as_deref().unwrap_or("nothing");
    if let Some(good) = found.good.as_deref().filter(|good| *good != from) {
        step(&format!("{target}: a deployment of {from} was cut off; {good} was last in order there"));
    }
    let say = |what: String| {
        step(&format!("{target}: {what}{}", if dry_run { " (dry run: not done)" } else { "" }));
        !dry_run
    };
    let outcome = match rule::next(&found, release, deploy.drop_controller) {
        Next::Refuse(why) => bail!("{why}"),
        Next::Check => {
            let outcome = host.health(name, &found.instances);
            if outcome.is_ok() {
                step(&format!("{target}: {name} runs there already, and is in order: nothing to do"));
            } else if dry_run {
                return outcome.context(format!("{name} runs there, and is not in order (dry run: left so)"));
            }
            outcome
        }
        Next::Install { to_copy } => {
            if to_copy && found.current.as_deref() == Some(name) {
                step(&format!("{target}: {name} is there, and its files are not those that were sent"));
            }
            if to_copy && say(format!("copying {} files, {} bytes", release.files.len(), release.bytes)) {
                host.copy(release)?;
            }
            if say(format!("reading its configuration with /opt/rswap/{name}/rswap")) {
                host.try_out(release).context("nothing was switched: what ran there before still does")?;
            }
            let controller = if release.controller { ", and the controller" } else { "" };
            let mut outcome = Ok(());
            if say(format!("switching from {from} to {name}, and starting the agent{controller} anew")) {
                outcome = host.switch(name);
            }
            if outcome.is_ok() && say("waiting for it to be in order".to_owned()) {
                outcome = host.health(name, &found.instances);
            }
            outcome
        }
    };
    match outcome {
        Err(error) => {
            eprintln!("{target}: {name} does not work there: {error:#}\n{}", host.last_words());
            roll_back(host, release, &found, error)
        }
        Ok(()) if dry_run => Ok(()),
        Ok(()) => match rule::back(&found, release) {
            Back::To(before) => host.settle(name, Some(&before)),
            Back::Stay | Back::Remove => host.settle(name, None),
        },
    }
}

/// Goes back to what was there before, and says what came of it. Always an error.
fn roll_back(host: &Host<'_>, release: &Release, found: &Found, why: anyhow::Error) -> anyhow::Result<()> {
    let target = host.target();
    let before = match rule::back(found, release) {
        Back::To(before) => before,
        Back::Stay => {
            let stays = "it stays as it is, since nothing else is known to have been in order there: see to this host";
            return Err(why.context(format!("{}: {stays}", release.name)));
        }
        Back::Remove => {
            step(&format!(
                "{target}: nothing was there before: stopping the agent, and taking it out of the way"
            ));
            host.remove().context("ROLL BACK FAILED: see to this host")?;
            return Err(why.context("rolled back: no agent runs there, as before"));
        }
    };
    step(&format!("{target}: going back to {before}"));
    let back = host.switch(&before).and_then(|()| host.health(&before, &found.instances));
    match back.and_then(|()| host.settle(&before, None)) {
        Ok(()) => Err(why.context(format!("rolled back: {before} runs there again"))),
        Err(error) => Err(why.context(format!(
            "ROLL BACK FAILED: see to this host: {before} is not in order either: {error:#}"
        ))),
    }
}

/// The units, as they are in the project.
pub(super) fn packaging() -> PathBuf {
    project_root().join("packaging")
}
