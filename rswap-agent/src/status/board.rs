//! What the agent knows, in the form in which it is shown.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Decisions, Distributions, Moves, NeighbourNames, Series, decisions::kept_whole, series::windows_kept,
};
use crate::{
    forecast::{Demand, Kin, Usage},
    instance::{Instance, InstanceName},
    migrate::links::LinksView,
    plan::{Decision, Plan, VolumeView},
    pool::{Inventory, Pool},
    profile::{
        AgesCost, Bookkeeping, CgroupsKnown, HostBlock, ProbeStatus, Profile, ProfileCost, ProgramCost,
        SharedProfile,
    },
    swap::memory::InSwap,
    units::UnixMillis,
};

/// Ended migrations kept; the oldest go first. Running ones are always kept.
pub const MIGRATIONS_KEPT: usize = 100;

/// One instance with what was last measured and forecast.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceView {
    /// The instance itself.
    #[serde(flatten)]
    pub instance: Instance,
    /// Its last window.
    pub profile: Option<Profile>,
    /// Its last forecast.
    pub demand: Option<Demand>,
    /// Whom it learns from, and whom it teaches, once its main process was seen.
    #[serde(default)]
    pub kin: Option<Kin>,
    /// It was committed to this address, which did not answer yet: it is frozen here (`rswap recover`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_doubt: Option<String>,
    /// A swap of this volume failed, and so did the way back: it stands still, whole, until `rswap swap` of the volume or the next agent brings it to
    /// an end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stands_for: Option<InstanceName>,
    /// Where each of its volumes is on this host, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<InstanceName, String>)]
    pub volume_directories: BTreeMap<InstanceName, PathBuf>,
    /// How it fares on a swap pool, if it is on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_swap: Option<InSwap>,
    /// On which pool each of them is, how large it is, and what it did in the last window, as plans see it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volume_use: Vec<VolumeView>,
}

/// How far a running migration is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationProgress {
    /// What it is doing: `offer`, `transfer`, `snapshot`, `verify`, `activate`, `deactivate`.
    pub phase: String,
    /// Pre-copy round, from 1.
    pub round: u32,
    /// Pages sent in this round.
    pub round_pages_sent: u64,
    /// Pages that this round has to send.
    pub round_pages: u64,
    /// Pages sent in all rounds.
    pub pages_sent: u64,
    /// Bytes sent in all rounds, as they went over the wire.
    pub bytes_sent: u64,
    /// Bytes per second over the wire.
    pub bytes_per_s: f64,
    /// Bytes of memory written per second by the instance; unknown in the first round.
    pub dirty_bytes_per_s: Option<f64>,
    /// How long the instance would stand still if it were frozen now, in milliseconds; unknown in the first round.
    pub expected_unavailability_ms: Option<f64>,
}

/// Rounds kept of a migration; the oldest go first.
const ROUNDS_KEPT: usize = 64;

/// One pre-copy round of a migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationRound {
    /// When it was first heard of.
    pub started: UnixMillis,
    /// When it was last heard of.
    pub at: UnixMillis,
    /// How far it was then.
    #[serde(flatten)]
    pub progress: MigrationProgress,
}

/// What a completed migration took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationReport {
    /// From the freeze to the activation at the destination, in milliseconds.
    pub unavailability_ms: f64,
    /// From the offer to the end, in milliseconds.
    pub duration_ms: u64,
    /// Rounds, the last delta included.
    pub rounds: u32,
    /// Pages sent.
    pub pages_sent: u64,
    /// Pages found written after the first round.
    pub pages_dirtied: u64,
    /// Bytes sent, as they went over the wire.
    pub bytes_sent: u64,
    /// Bytes of memory transferred per second in the first round, which sends all of it.
    pub memory_bytes_per_s: f64,
    /// Where the unavailability went: (step, milliseconds).
    pub freeze_steps_ms: Vec<(String, f64)>,
    /// Connections that carried it.
    #[serde(default)]
    pub streams: u8,
    /// Digest of all memory and of the task's state, in hexadecimal, the same on both hosts.
    pub digest: String,
}

/// Where a migration stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum MigrationState {
    /// On its way.
    Running {
        /// Its latest progress.
        progress: MigrationProgress,
    },
    /// The instance runs at the destination, and no longer here.
    Done {
        /// What it took.
        report: MigrationReport,
        /// When it ended.
        ended: UnixMillis,
    },
    /// The commit was sent and not answered: the instance is frozen here until a person has looked.
    InDoubt {
        /// What went wrong, and what to do.
        error: String,
        /// When it ended.
        ended: UnixMillis,
    },
    /// The instance runs where it ran before.
    Failed {
        /// What went wrong, and what to do.
        error: String,
        /// When it ended.
        ended: UnixMillis,
    },
}

/// One migration, away from this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationView {
    /// Unique since the agent's start; they count up.
    pub id: u64,
    /// Which instance.
    pub instance: InstanceName,
    /// Where to: the host pool's name.
    pub host: String,
    /// When it began.
    pub started: UnixMillis,
    /// Where it stands.
    #[serde(flatten)]
    pub state: MigrationState,
    /// Its rounds, in their order, the present one included.
    #[serde(default)]
    #[schema(value_type = Vec<MigrationRound>)]
    pub rounds: VecDeque<MigrationRound>,
}

impl MigrationView {
    /// Takes note of how far it is.
    fn note_round(&mut self, progress: &MigrationProgress, at: UnixMillis) {
        let same = |last: &&mut MigrationRound| last.progress.round == progress.round;
        if let Some(last) = self.rounds.back_mut().filter(same) {
            (last.at, last.progress) = (at, progress.clone());
            return;
        }
        if self.rounds.len() == ROUNDS_KEPT {
            self.rounds.pop_front();
        }
        self.rounds.push_back(MigrationRound { started: at, at, progress: progress.clone() });
    }
}

/// The last plan, as a [`Plan`] is shown. Its decisions are kept with their instances', too, and are not copied for that: each has a kilobyte or two.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ShownPlan {
    /// When it was made.
    pub at: UnixMillis,
    /// One per instance and pool kind looked at.
    pub decisions: Vec<Arc<Decision>>,
}

/// All that is shown.
#[derive(Clone, Debug, Default)]
pub struct BoardState {
    /// This host's name.
    pub host: String,
    /// `observe` or `act`.
    pub mode: String,
    /// When the agent started.
    pub started: UnixMillis,
    /// Windows sampled since then.
    pub windows: u64,
    /// How long the last window's work took the agent, in microseconds: its own cost.
    pub last_window_work_us: u64,
    /// How links to other hosts are secured.
    pub links: Option<LinksView>,
    /// The profiler's probes.
    pub probes: Vec<ProbeStatus>,
    /// What its programs cost.
    pub programs: Vec<ProgramCost>,
    /// Which cgroups they know.
    pub cgroups: CgroupsKnown,
    /// What is remembered in the kernel, and what had no room there.
    pub bookkeeping: Bookkeeping,
    /// What instances did that share a slot.
    pub shared: Option<SharedProfile>,
    /// What all of them cost, and which had to go for that.
    pub profile_cost: ProfileCost,
    /// What looking at the ages of memory costs; `None` where that is not done.
    pub memory_ages: Option<AgesCost>,
    /// The same of what is written.
    pub written_ages: Option<AgesCost>,
    /// Block I/O that is in no instance's profile.
    pub block: HostBlock,
    /// Instances by name.
    pub instances: BTreeMap<InstanceName, InstanceView>,
    /// Pools as plans see them, this host's and others.
    pub pools: Vec<Pool>,
    /// All that this host has to sit on.
    pub inventory: Arc<Inventory>,
    /// The last plan.
    pub plan: ShownPlan,
    /// Past decisions per instance, oldest first.
    pub decisions: BTreeMap<InstanceName, Decisions>,
    /// What instances did window by window.
    pub series: BTreeMap<InstanceName, Series>,
    /// How long things took instances over more than a window.
    pub distributions: BTreeMap<InstanceName, Distributions>,
    /// Cgroups beside instances that are called by their names in metrics.
    pub neighbour_names: NeighbourNames,
    /// Migrations, oldest first.
    pub migrations: VecDeque<MigrationView>,
    /// Moves of every kind.
    pub moves: Moves,
    /// Core swaps carried out.
    pub swaps_done: u64,
    /// Core swaps that failed and left the instance where it was.
    pub swaps_failed: u64,
    /// Migrations away from here that were completed.
    pub migrations_done: u64,
    /// Migrations away from here that failed and left the instance here.
    pub migrations_failed: u64,
    /// The id that the newest migration has.
    pub last_migration_id: u64,
}

impl BoardState {
    /// Shows a plan, and keeps each instance's decisions, of the older ones as many as fit next to those of the other instances.
    pub fn keep_plan(&mut self, plan: Plan) {
        let whole = kept_whole(self.instances.len());
        self.plan.at = plan.at;
        self.plan.decisions.clear();
        for mut decision in plan.decisions {
            // It stays for long.
            decision.candidates.shrink_to_fit();
            let decision = Arc::new(decision);
            let kept = self.decisions.entry(decision.instance.clone()).or_default();
            kept.keep(decision.clone(), whole);
            self.plan.decisions.push(decision);
        }
    }

    /// Keeps what was used in a window, next to what was shown of it before.
    pub fn keep_window(&mut self, profile: &Profile, usage: &Usage, demand: Option<&Demand>) {
        let keep = windows_kept(self.instances.len());
        self.neighbour_names.note(profile);
        if self.instances.contains_key(&profile.instance) {
            self.series.entry(profile.instance.clone()).or_default().record(profile, usage, demand, keep);
            self.distributions.entry(profile.instance.clone()).or_default().record(profile);
        }
    }

    /// Replaces the instances by those that are `present`, and keeps what is known of those that stay.
    /// The decisions of those that left are kept as long as a migration of theirs is shown.
    pub fn set_instances(&mut self, present: impl IntoIterator<Item = Instance>) {
        let mut before = std::mem::take(&mut self.instances);
        for instance in present {
            let name = instance.name.clone();
            let view = match before.remove(&name) {
                Some(view) => InstanceView { instance, ..view },
                None => {
                    let (profile, demand, kin, in_doubt, stands_for) = Default::default();
                    let (volume_directories, in_swap, volume_use) = Default::default();
                    InstanceView {
                        instance,
                        profile,
                        demand,
                        kin,
                        in_doubt,
                        stands_for,
                        volume_directories,
                        in_swap,
                        volume_use,
                    }
                }
            };
            self.instances.insert(name, view);
        }
        let instances = &self.instances;
        self.series.retain(|name, _| instances.contains_key(name));
        self.distributions.retain(|name, _| instances.contains_key(name));
        self.forget_decisions();
    }

    /// Forgets decisions about those that are neither here nor in a migration that is shown.
    fn forget_decisions(&mut self) {
        let (instances, migrations) = (&self.instances, &self.migrations);
        self.decisions
            .retain(|name, _| instances.contains_key(name) || migrations.iter().any(|m| m.instance == *name));
    }

    /// Shows a new migration, and answers with its id.
    pub fn begin_migration(&mut self, instance: InstanceName, host: String, started: UnixMillis) -> u64 {
        self.last_migration_id += 1;
        let id = self.last_migration_id;
        let state = MigrationState::Running { progress: MigrationProgress::default() };
        self.migrations.push_back(MigrationView {
            id,
            instance,
            host,
            started,
            state,
            rounds: VecDeque::new(),
        });
        let ended = |m: &MigrationView| !matches!(m.state, MigrationState::Running { .. });
        while self.migrations.iter().filter(|m| ended(m)).count() > MIGRATIONS_KEPT {
            match self.migrations.iter().position(ended) {
                Some(oldest) => self.migrations.remove(oldest),
                None => break,
            };
        }
        self.forget_decisions();
        id
    }

    /// Shows how far the migration is.
    pub fn migration_went_on(&mut self, id: u64, progress: MigrationProgress, at: UnixMillis) {
        if let Some(migration) = self.migrations.iter_mut().find(|m| m.id == id) {
            migration.note_round(&progress, at);
            migration.state = MigrationState::Running { progress };
        }
    }

    /// Shows where the migration stands now.
    pub fn set_migration(&mut self, id: u64, state: MigrationState) {
        match &state {
            MigrationState::Running { .. } => {}
            MigrationState::Done { .. } => self.migrations_done += 1,
            MigrationState::Failed { .. } | MigrationState::InDoubt { .. } => self.migrations_failed += 1,
        }
        if let Some(migration) = self.migrations.iter_mut().find(|m| m.id == id) {
            migration.state = state;
        }
    }
}

/// The shared [`BoardState`].
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<RwLock<BoardState>>);

impl Board {
    /// A board that shows `state`.
    pub fn new(state: BoardState) -> Self {
        Self(Arc::new(RwLock::new(state)))
    }

    /// Reads. Hold it briefly: the wiring waits meanwhile.
    pub fn read(&self) -> RwLockReadGuard<'_, BoardState> {
        // A panic elsewhere must not take the status with it: every write leaves a state that can be shown.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is shown.
    pub fn write<T>(&self, change: impl FnOnce(&mut BoardState) -> T) -> T {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}
