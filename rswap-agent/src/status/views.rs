//! Answers that are put together for a route.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    BoardState, CountsOver, Distribution, InstanceView, MigrationState, MigrationView, MoveView, Window,
};
use crate::{
    instance::{Instance, InstanceName},
    migrate::links::LinksView,
    plan::{Decision, in_words},
    profile::{
        AgesCost, Bookkeeping, CgroupsKnown, HostBlock, ProbeStatus, ProfileCost, ProgramCost, SharedProfile,
    },
    units::UnixMillis,
};

/// How the agent is. Counts are since its start.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Status {
    /// The agent's version.
    version: &'static str,
    /// This host's name.
    host: String,
    /// `observe` or `act`.
    mode: String,
    /// The agent's process.
    pid: u32,
    /// Now.
    at: UnixMillis,
    /// When the agent started.
    started: UnixMillis,
    /// For how long it has been running, in milliseconds.
    uptime_ms: u64,
    /// Windows that were sampled.
    windows: u64,
    /// How long the last window's work took the agent, in microseconds: its own cost.
    last_window_work_us: u64,
    /// How many instances there are.
    instances: usize,
    /// Migrations that are under way.
    migrations_running: usize,
    /// Migrations away from here that were completed.
    migrations_done: u64,
    /// Migrations away from here that failed and left the instance here.
    migrations_failed: u64,
    /// Moves of every kind that are under way.
    moves_running: usize,
    /// Moves of every kind that have been begun.
    moves_started: u64,
    /// Core swaps carried out.
    swaps_done: u64,
    /// Core swaps that failed and left the instance where it was.
    swaps_failed: u64,
    /// How links to other hosts are secured.
    links: Option<LinksView>,
    /// The profiler's probes.
    probes: Vec<ProbeStatus>,
    /// What its programs cost.
    programs: Vec<ProgramCost>,
    /// The cgroups that the programs know.
    cgroups: CgroupsKnown,
    /// What is remembered in the kernel, and what had no room there.
    bookkeeping: Bookkeeping,
    /// What counts events of instances that found no place of their own.
    without_slot: Option<SharedProfile>,
    /// What profiling costs, and what of it is left out for that.
    profile_cost: ProfileCost,
    /// What looking at the ages of memory costs.
    memory_ages: Option<AgesCost>,
    /// The same of what is written.
    written_ages: Option<AgesCost>,
    /// Block I/O that is in no instance's profile.
    block: HostBlock,
}

impl Status {
    pub(super) fn of(board: &BoardState, now: UnixMillis) -> Self {
        let running = |m: &&MigrationView| matches!(m.state, MigrationState::Running { .. });
        Self {
            version: env!("CARGO_PKG_VERSION"),
            host: board.host.clone(),
            mode: board.mode.clone(),
            pid: std::process::id(),
            at: now,
            started: board.started,
            uptime_ms: now.since(board.started),
            windows: board.windows,
            last_window_work_us: board.last_window_work_us,
            instances: board.instances.len(),
            migrations_running: board.migrations.iter().filter(running).count(),
            migrations_done: board.migrations_done,
            migrations_failed: board.migrations_failed,
            moves_running: board.moves.running(),
            moves_started: board.moves.started(),
            swaps_done: board.swaps_done,
            swaps_failed: board.swaps_failed,
            links: board.links.clone(),
            probes: board.probes.clone(),
            programs: board.programs.clone(),
            cgroups: board.cgroups,
            bookkeeping: board.bookkeeping,
            without_slot: board.shared.clone(),
            profile_cost: board.profile_cost.clone(),
            memory_ages: board.memory_ages,
            written_ages: board.written_ages,
            block: board.block.clone(),
        }
    }
}

/// An instance, without what is measured of it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = InstanceShown)]
pub(super) struct Shown {
    /// The instance itself.
    #[serde(flatten)]
    instance: Instance,
    /// It was committed to this address, which did not answer yet: it is frozen here (`rswap recover`).
    #[serde(skip_serializing_if = "Option::is_none")]
    in_doubt: Option<String>,
    /// A swap of this volume failed, and so did the way back: it stands still (`docs/pools.md`).
    #[serde(skip_serializing_if = "Option::is_none")]
    stands_for: Option<InstanceName>,
}

impl Shown {
    pub(super) fn of(view: &InstanceView) -> Self {
        let InstanceView { instance, in_doubt, stands_for, .. } = view;
        Self { instance: instance.clone(), in_doubt: in_doubt.clone(), stands_for: stands_for.clone() }
    }
}

/// How long things took one instance, and how often they happened.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct DistributionsOf {
    /// The instance.
    pub(crate) name: InstanceName,
    /// What had samples within the last hour.
    pub(crate) distributions: Vec<Distribution>,
    /// What was counted over the same spans.
    #[serde(default)]
    pub(crate) counts: CountsOver,
}

/// An instance's last windows.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Windows {
    /// The instance.
    pub(super) instance: InstanceName,
    /// How far ahead the forecasts were made that windows are shown with, in milliseconds; nothing before the first one.
    pub(super) horizon_ms: Option<u64>,
    /// Those that are kept and were asked for, oldest first.
    pub(super) windows: Vec<Window>,
}

/// A decision, with what stands in `rswap explain` next to its numbers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Explained {
    /// The decision in words.
    words: Vec<String>,
    /// Of pools that are out of the question: why.
    dropped: BTreeMap<String, String>,
    /// The decision.
    decision: Decision,
}

impl Explained {
    pub(super) fn of(decision: &Decision) -> Self {
        let pools = decision.current.iter().chain(&decision.candidates);
        let dropped = pools.filter_map(|pool| Some((pool.pool.clone(), pool.dropped.as_ref()?.to_string())));
        Self { words: in_words(decision), dropped: dropped.collect(), decision: decision.clone() }
    }
}

/// A move, with the decision that it came from, if a plan of this agent decided it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MovedView {
    /// The move.
    #[serde(rename = "move")]
    moved: MoveView,
    /// The decision in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    words: Option<Vec<String>>,
    /// Of pools that were out of the question: why.
    #[serde(skip_serializing_if = "Option::is_none")]
    dropped: Option<BTreeMap<String, String>>,
    /// The decision.
    #[serde(skip_serializing_if = "Option::is_none")]
    decision: Option<Decision>,
}

impl MovedView {
    pub(super) fn of(view: &MoveView) -> Self {
        let explained = view.decision.as_ref().map(Explained::of);
        let (words, dropped, decision) = match explained {
            Some(Explained { words, dropped, decision }) => (Some(words), Some(dropped), Some(decision)),
            None => (None, None, None),
        };
        Self { moved: view.clone(), words, dropped, decision }
    }
}

/// Why an instance is where it is.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Explanation {
    /// What the last plan says about it.
    pub(super) now: Vec<Explained>,
    /// Its last moves that are known, newest first.
    pub(super) moved: Vec<MovedView>,
}
