//! What the planner remembers, in a file of the state directory: it is about instances, none of which outlives a new start of the host.

use std::{collections::BTreeSet, fs, io, path::PathBuf};

use crate::{
    config::Config,
    instance::{InstanceName, registry::Registry},
    plan::{Planner, Remembered},
};

fn path(config: &Config) -> PathBuf {
    config.agent.state_dir.join("planner.json")
}

/// The planner that goes on from the file, for the instances that are still there.
pub(super) fn planner(config: &Config, registry: &Registry) -> Planner {
    let path = path(config);
    let read = fs::read(&path).and_then(|text| serde_json::from_slice(&text).map_err(io::Error::other));
    let remembered = read.unwrap_or_else(|error| {
        if error.kind() != io::ErrorKind::NotFound {
            tracing::warn!(%error, path = %path.display(), "which moves were made and failed is not known");
        }
        Remembered::default()
    });
    let listed = registry.list().inspect_err(|error| tracing::warn!(%error, "no instance is known yet"));
    let present: BTreeSet<InstanceName> =
        listed.into_iter().flatten().map(|instance| instance.name).collect();
    let planner = Planner::with_memory(config.plan.clone(), remembered, |name| present.contains(name));
    planner.with_windows(config.agent.window_ms)
}

/// Writes it, whole or not at all.
pub(super) fn keep(config: &Config, planner: &Planner) {
    let path = path(config);
    let half = path.with_extension("new");
    let text = serde_json::to_vec(&planner.remembered()).map_err(io::Error::other);
    let kept = text.and_then(|text| fs::write(&half, text)).and_then(|()| fs::rename(&half, &path));
    if let Err(error) = kept {
        tracing::warn!(%error, path = %path.display(), "a new agent will not know which moves were made and failed");
    }
}
