//! What is connected, and one window's way through it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use axum::http::StatusCode;
use rswap_audit::Audit;
use rswap_controller::reporter::Answered;
use rswap_trust::Name;
use tokio::sync::mpsc::{self, UnboundedSender};

use super::{
    cold::Cold,
    fleet::Membership,
    kin,
    learnt::Keeper,
    moves::{self, Ended, Order, Stake},
    parts::{Parts, PartsUsage},
    record::Recorder,
    remembered,
    swaps::Local,
    usage,
};
use crate::{
    config::{Config, Mode},
    control::{Command, LearnDone, MigrateEvent, MigrateRequest, SwapRequest, SwapVolumeEvent},
    forecast::{Forecaster, Lessons, Observation, Usage},
    instance::{
        Instance, InstanceName,
        launch::Place,
        main_process::MainProcess,
        registry::{Listing, Registry},
        volume::Volume,
    },
    migrate::{
        links::LinksView,
        recovery::{self, Doubt, Recovery},
    },
    plan::{Decision, InstanceView, MoveKind, Outcome, Plan, Planner},
    pool::{self, Cores, Disks, Inventory, Pool, Watch},
    profile::{Profile, Profiler},
    status::{ApiError, Board},
    swap::{share, storage},
    units::UnixMillis,
};

const IN_DOUBT_HINT: &str = "the agent asks the other host until it answers; if that host is gone for good, decide with \
                             `rswap recover NAME --here` or `--there`";

/// Every so many windows it is looked whether threads are where they belong: a system call for each.
pub(super) const CORES_EVERY_WINDOWS: u64 = 8;
/// Whom an instance is like is looked up again every so many windows: programs change their user, and what they run.
const KIN_EVERY_WINDOWS: u64 = 256;

/// All rooms' nouns, and what is under way.
pub(super) struct Wiring {
    pub(super) config: Config,
    pub(super) registry: Registry,
    listed: Listing,
    /// Those that could not be profiled when they were first seen.
    unprofiled: BTreeSet<InstanceName>,
    pub(super) board: Board,
    pub(super) ended: UnboundedSender<Ended>,
    pub(super) cold: Cold,
    /// Of the agent.
    pub(super) stopping: Arc<AtomicBool>,
    profiler: Arc<Profiler>,
    recorder: Option<Recorder>,
    pub(super) forecaster: Forecaster,
    /// Where the configuration names a controller.
    pub(super) member: Option<Membership>,
    keeper: Keeper,
    pub(super) parts: Parts,
    pub(super) cores: Cores,
    pub(super) disks: Disks,
    pub(super) windows: u64,
    pub(super) planner: Planner,
    pub(super) pools: Vec<Pool>,
    pub(super) watch: Watch,
    /// The instances of the last look, by name.
    pub(super) known: BTreeMap<InstanceName, Instance>,
    pub(super) moving: BTreeMap<InstanceName, String>,
    /// Frozen after a commit that was not answered.
    pub(super) in_doubt: BTreeMap<InstanceName, Doubt>,
    /// Those whose threads could not be brought to where they belong: the window in which that is tried again, and the pause then.
    pub(super) unsettled: BTreeMap<InstanceName, (u64, u64)>,
    pub(super) recovery: Recovery,
    /// What a plan decided, while the move that follows from it is being started.
    pub(super) acting: Option<Decision>,
}

impl Wiring {
    pub(super) fn new(
        config: Config,
        registry: Registry,
        board: Board,
        ended: UnboundedSender<Ended>,
        recovery: Recovery,
        answered: UnboundedSender<Answered>,
        audit: Audit,
    ) -> io::Result<Self> {
        let profiler = Arc::new(Profiler::start(&config.profile));
        let watch = Watch::start(&config);
        let pools = super::drain::first(&config, &watch, &board);
        board.write(|board| board.probes = profiler.probes());
        let keeper = Keeper::new(&config.learnt);
        let mut forecaster = keeper.forecaster(&config);
        let member = Membership::start(&config, &mut forecaster, answered, audit)?;
        let planner = remembered::planner(&config, &registry);
        let recorder = Recorder::new(&config.record);
        let cold = Cold::start(&config.memory);
        let (known, moving, in_doubt, stopping) = Default::default();
        Ok(Self {
            config,
            registry,
            listed: Listing::default(),
            unprofiled: BTreeSet::new(),
            board,
            ended,
            cold,
            stopping,
            profiler,
            recorder,
            forecaster,
            member,
            keeper,
            parts: Parts::new(),
            cores: Cores::default(),
            disks: Disks::default(),
            windows: 0,
            planner,
            pools,
            watch,
            known,
            moving,
            in_doubt,
            unsettled: BTreeMap::new(),
            recovery,
            acting: None,
        })
    }

    /// Whether moves are under way.
    pub(super) fn is_moving(&self) -> bool {
        !self.moving.is_empty()
    }

    /// One window: registry -> profile -> forecast -> plan -> board, and swap in mode `act`.
    pub(super) fn window(&mut self, now: UnixMillis) {
        let began = Instant::now();
        if let Err(error) = self.look() {
            tracing::warn!(%error, "going on with the instances known");
        }
        self.look_at_pools(now);
        // Whoever moves has its memory read; and who stands still can't make the call by which its writes are noted.
        let still = self.listed.still();
        let left_alone = |name: &InstanceName| {
            self.moving.contains_key(name) || self.in_doubt.contains_key(name) || still.contains(name)
        };
        self.profiler.disturbed(left_alone);
        let mut profiles = self.profiler.sample(now);
        self.look_at_cores(now, &profiles);
        self.parts.begin_window(|name| self.known.contains_key(name));
        let (inventory, apart) = (self.watch.latest(), self.profiler.devices());
        super::cores::tell_classes(&inventory, &mut profiles);
        let mut usages = Vec::with_capacity(profiles.len());
        for profile in &profiles {
            let parts = self.look_at_parts(profile, &apart, &inventory);
            let usage = usage::of(profile, self.performance_under(&profile.instance), parts);
            self.look_at_kin(&profile.instance);
            if let Some(recorder) = &mut self.recorder {
                let class = self.forecaster.kin(&profile.instance).map_or("", |kin| &kin.class);
                recorder.window(profile, class, &usage);
            }
            if let Some(member) = &mut self.member {
                member.window(&profile.instance, &usage);
            }
            self.forecaster.observe(&Observation { instance: &profile.instance, at: profile.at, usage });
            usages.push(usage);
        }
        self.look_at_disks(now, &profiles, &apart, &inventory);
        self.windows += 1;
        if self.windows.is_multiple_of(CORES_EVERY_WINDOWS) {
            self.settle_cores();
        }
        self.keeper.window(&self.forecaster, now);
        let seen: Vec<_> =
            profiles.iter().map(|profile| (profile, self.pool_of(&profile.instance))).collect();
        let mut pools = pool::with_usage(self.pools.clone(), &seen);
        let on_links: Vec<_> = self
            .known
            .values()
            .filter_map(|instance| Some((instance.name.clone(), self.link_under(instance)?)))
            .collect();
        self.parts.leave_others(&mut pools, &on_links);
        self.tell_of_cores(now, &mut pools);
        self.tell_of_disks(now, &inventory, &mut pools);
        let views: Vec<InstanceView> =
            profiles.iter().filter_map(|profile| self.view(profile, now)).collect();
        self.follow_cold(&views);
        let plan = self.planner.plan(now, &views, &pools);
        if self.config.agent.mode == Mode::Act {
            self.act(&plan, now);
        }
        self.report(&views, &pools, now);
        self.show((profiles, usages), views, pools, plan, began);
    }

    /// What its volumes and its port did.
    fn look_at_parts(&mut self, profile: &Profile, apart: &[String], inventory: &Inventory) -> PartsUsage {
        let Some(instance) = self.known.get(&profile.instance) else { return PartsUsage::default() };
        let directories = volume_directories(&self.recovery.place, instance);
        let has_port = instance.network.is_some();
        self.parts.window(profile, &directories, has_port, apart, &self.config, inventory)
    }

    /// Tells the forecaster whom an instance is like, when it is new and now and then.
    fn look_at_kin(&mut self, name: &InstanceName) {
        let known = self.forecaster.kin(name).is_some_and(|kin| !kin.class.is_empty());
        let Some(instance) = self.known.get(name) else { return };
        // Not all in the same window.
        let is_due = (self.windows.wrapping_add(instance.cgroup_id)).is_multiple_of(KIN_EVERY_WINDOWS);
        if known && !is_due {
            return;
        }
        let kin = kin::of(instance, MainProcess::of(instance).as_ref(), &self.config.learnt.class_labels);
        // Between two programs it has none.
        if !known || !kin.class.is_empty() {
            self.forecaster.introduce(name, kin, instance.since.0);
        }
    }

    /// Ends swaps that only wait for pages to become cold: what is out comes back.
    pub(super) fn stop_waiting(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// The last word of this agent.
    pub(super) fn end(&mut self) {
        self.keeper.end(&self.forecaster);
        remembered::keep(&self.config, &self.planner);
    }

    fn learn(&mut self, lessons: &Lessons) -> Result<LearnDone, ApiError> {
        self.forecaster.learn(lessons).map_err(|error| {
            let text = format!("cannot learn from that: {error}");
            ApiError::new(
                StatusCode::CONFLICT,
                text,
                "export it with the same release, window_ms and horizons_ms",
            )
        })?;
        Ok(LearnDone { identities: lessons.identities() })
    }

    /// Follows the registry: what came is profiled, what went is forgotten.
    pub(super) fn look(&mut self) -> Result<(), ApiError> {
        let listed = self
            .registry
            .list_again(&mut self.listed)
            .map_err(|error| refused("list the instances", &error))?;
        self.registry.forget_dead(&mut self.listed);
        // In nearly all windows there is nothing to follow.
        let has_changed = listed.is_some();
        let new = listed.map_or_else(Vec::new, |listed| self.follow(listed));
        self.profile_late();
        new.iter().for_each(|instance| self.begin_to_watch(instance));
        self.look_for_doubts();
        let found_some = !new.is_empty();
        for instance in new {
            self.settle_uplink(instance);
        }
        if found_some {
            // One whose uplink comes first has its turn later.
            self.settle_cores();
        }
        let mut standing = storage::standing(&self.config.agent.state_dir);
        self.board.write(|board| {
            if has_changed {
                board.set_instances(self.known.values().cloned());
            }
            for (name, view) in &mut board.instances {
                let doubt = self.in_doubt.get(name);
                let under_way = self.moving.contains_key(name);
                view.volume_directories = volume_directories(&self.recovery.place, &view.instance);
                view.in_doubt =
                    doubt.map(|doubt| doubt.peer.map_or_else(String::new, |peer| peer.to_string()));
                view.stands_for = standing.remove(&view.instance.cgroup_id).filter(|_| !under_way);
            }
        });
        Ok(())
    }

    /// These are the instances from now on. Who went is forgotten; who is new is answered.
    fn follow(&mut self, listed: Vec<Instance>) -> Vec<Instance> {
        let present: BTreeMap<_, _> = listed.into_iter().map(|i| (i.name.clone(), i)).collect();
        for (name, before) in &self.known {
            // A name whose cgroup changed is another instance.
            if present.get(name).is_none_or(|now| now.cgroup_id != before.cgroup_id) {
                tracing::info!(instance = %name, "gone");
                self.profiler.untrack(name);
                self.forecaster.forget(name);
                self.recorder.iter_mut().for_each(|recorder| recorder.forget(name));
                if !self.moving.contains_key(name) && !self.in_doubt.contains_key(name) {
                    self.planner.forget(name);
                }
            }
        }
        let is_new = |instance: &&Instance| {
            self.known.get(&instance.name).is_none_or(|before| before.cgroup_id != instance.cgroup_id)
        };
        let new = present.values().filter(is_new).cloned().collect();
        let some_went = self.known.keys().any(|name| !present.contains_key(name));
        self.known = present;
        self.unsettled.retain(|name, _| self.known.contains_key(name));
        if some_went && self.moving.is_empty() {
            share::sweep(&self.recovery.place);
        }
        // Also those that only the agent before knew.
        self.forecaster.forget_others(|name| self.known.contains_key(name));
        new
    }

    /// Profiles those that could not be when they were first seen.
    fn profile_late(&mut self) {
        self.unprofiled.retain(|name| {
            let Some(instance) = self.known.get(name) else { return false };
            let is_profiled = self.profiler.track(name, &instance.cgroup).is_ok();
            if is_profiled {
                tracing::info!(instance = %name, "it is profiled now");
            }
            !is_profiled
        });
    }

    fn begin_to_watch(&mut self, instance: &Instance) {
        let name = &instance.name;
        tracing::info!(instance = %name, cgroup = %instance.cgroup.display(), "watching");
        // The forecaster may know another one of this name, from before this agent.
        let kin = self.forecaster.kin(name).cloned().unwrap_or_default();
        self.forecaster.introduce(name, kin, instance.since.0);
        if let Err(error) = self.profiler.track(name, &instance.cgroup) {
            self.unprofiled.insert(name.clone());
            tracing::warn!(instance = %name, error = %refused("profile it", &error), "not profiled");
        }
    }

    /// Follows the journals: what is in doubt, the planner takes for being on its way.
    fn look_for_doubts(&mut self) {
        let found = match recovery::doubts(self.recovery.directory()) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "going on with the doubts known");
                return;
            }
        };
        let under_way = |name: &InstanceName| self.moving.contains_key(name);
        let found: BTreeMap<_, _> = found
            .into_iter()
            .map(|doubt| (doubt.instance.name.clone(), doubt))
            .filter(|(name, doubt)| {
                !under_way(name)
                    && self.known.get(name).is_some_and(|i| i.cgroup_id == doubt.instance.cgroup_id)
            })
            .collect();
        for (name, doubt) in found.iter().filter(|(name, _)| !self.in_doubt.contains_key(name)) {
            tracing::error!(instance = %name, id = %doubt.id, "in doubt: frozen here, and perhaps running elsewhere");
            self.planner.started(name, "a host that did not answer");
        }
        for name in self.in_doubt.keys().filter(|name| !found.contains_key(name)) {
            tracing::warn!(instance = %name, "no longer in doubt");
            match self.known.contains_key(name) {
                true => self.planner.failed(name, MoveKind::Host, UnixMillis::now()),
                false => self.planner.forget(name),
            }
        }
        self.in_doubt = found;
    }

    fn pool_of(&self, name: &InstanceName) -> Option<&str> {
        self.known.get(name)?.pool.as_deref()
    }

    /// Speed of the cores that the instance runs on.
    pub(super) fn performance_under(&self, name: &InstanceName) -> f64 {
        let sits_on = self.pool_of(name);
        let pool = self.pools.iter().find(|pool| Some(pool.name.as_str()) == sits_on);
        pool.map_or(self.config.this_host.performance, |pool| pool.performance)
    }

    fn view(&self, profile: &Profile, now: UnixMillis) -> Option<InstanceView> {
        let instance = self.known.get(&profile.instance)?;
        let demand = self.forecaster.demand(&profile.instance, now)?;
        // Only what has a PID namespace of its own can be rebuilt elsewhere.
        // The same of the mount namespace in which a volume is replaced.
        let mut movable = match instance.init_pid {
            Some(_) => vec![MoveKind::Cpu, MoveKind::Host, MoveKind::Storage],
            None => vec![MoveKind::Cpu],
        };
        if instance.network.is_some() {
            movable.push(MoveKind::Link);
        }
        Some(InstanceView {
            instance: instance.name.clone(),
            host: None,
            cpu_pool: instance.pool.clone(),
            demand,
            cores: profile.cpu.cores,
            resident_bytes: profile.memory.resident_bytes,
            dirty_bytes_per_s: profile.memory.dirty_bytes_per_s,
            movable,
            labels: instance.labels.clone(),
            volumes: self.parts.volumes(&instance.name),
            port: self.parts.port(&instance.name, self.link_under(instance)),
        })
    }

    /// Starts every move that would be late if it waited for the next window.
    fn act(&mut self, plan: &Plan, now: UnixMillis) {
        let next_window = UnixMillis(now.0 + self.config.agent.window_ms);
        let by_fleet =
            self.member.as_ref().is_some_and(|member| member.is_placed_by_fleet(&self.config, now));
        for decision in &plan.decisions {
            let Outcome::Move { to, start_by, .. } = &decision.outcome else { continue };
            let placed_by_fleet = decision.kind == MoveKind::Host && by_fleet;
            if *start_by > next_window || placed_by_fleet {
                continue;
            }
            let instance = decision.instance.clone();
            let volume = decision.volume.as_deref();
            self.acting = Some(decision.clone());
            let started = match decision.kind {
                MoveKind::Cpu => {
                    let started = self.start_swap(SwapRequest { instance, pool: to.clone() }, None);
                    started.map_err(|(error, _)| error)
                }
                MoveKind::Host => {
                    let request = MigrateRequest { instance, host: to.clone(), stop_and_copy: false };
                    self.start_migration(request, None, None).map_err(|(error, _)| error)
                }
                MoveKind::Storage => self.start_planned_volume_swap(instance, volume, to),
                MoveKind::Link => self.start_planned_uplink_swap(instance, to),
            };
            self.acting = None;
            if let Err(error) = started {
                tracing::warn!(instance = %decision.instance, to, %error, "a planned move did not start");
                let error = error.to_string();
                self.planner.part_failed(&decision.instance, decision.kind, volume, &error, now);
            }
        }
    }

    fn show(
        &self,
        (profiles, usages): (Vec<Profile>, Vec<Usage>),
        views: Vec<InstanceView>,
        pools: Vec<Pool>,
        plan: Plan,
        began: Instant,
    ) {
        let (programs, block) = (self.profiler.program_costs(), self.profiler.host_block());
        let ages = (self.profiler.ages_cost(), self.profiler.written_ages_cost());
        let (cost, probes) = (self.profiler.cost(), self.profiler.probes());
        let (cgroups, shared) = (self.profiler.cgroups_known(), self.profiler.shared());
        let bookkeeping = self.profiler.bookkeeping();
        let mut in_swap = self.cold.shown();
        let links = self.look_at_links();
        self.board.write(|board| {
            board.links = Some(links);
            // Views are of some of the profiles, in their order.
            let mut views = views.into_iter().peekable();
            for (profile, usage) in profiles.into_iter().zip(&usages) {
                let planned = views.next_if(|view| view.instance == profile.instance);
                board.keep_window(&profile, usage, planned.as_ref().map(|view| &view.demand));
                let Some(view) = board.instances.get_mut(&profile.instance) else { continue };
                let kin = self.forecaster.kin(&profile.instance).filter(|kin| !kin.class.is_empty());
                if view.kin.as_ref() != kin {
                    view.kin = kin.cloned();
                }
                view.profile = Some(profile);
                if let Some(InstanceView { demand, volumes, .. }) = planned {
                    (view.demand, view.volume_use) = (Some(demand), volumes);
                }
            }
            for (name, view) in &mut board.instances {
                view.in_swap = in_swap.remove(name);
            }
            board.keep_plan(plan);
            (board.pools, board.programs, board.block) = (pools, programs, block);
            (board.cgroups, board.bookkeeping, board.shared) = (cgroups, bookkeeping, shared);
            (board.memory_ages, board.written_ages) = ages;
            (board.profile_cost, board.probes) = (cost, probes);
            board.windows += 1;
            board.last_window_work_us = began.elapsed().as_micros() as u64;
        });
    }

    /// How links are secured now: certificates are exchanged, and expire, while the agent runs.
    fn look_at_links(&self) -> LinksView {
        let now = self.recovery.links.view(UnixMillis::now());
        let before = self.board.read().links.as_ref().and_then(|links| links.problem().map(str::to_owned));
        match now.problem() {
            Some(problem) if before.as_deref() != Some(problem) => tracing::warn!("{problem}"),
            _ => {}
        }
        now
    }

    pub(super) fn command(&mut self, command: Command) {
        // A caller that went away doesn't need its answer: hence the drops.
        match command {
            Command::Adopt(request, reply) => drop(reply.send(self.adopt(request))),
            Command::Register(request, reply) => drop(reply.send(self.register(&request))),
            Command::Learn(lessons, reply) => drop(reply.send(self.learn(&lessons))),
            Command::Drain(request, reply) => drop(reply.send(self.drain(request))),
            Command::Recover(request, reply) => self.recover(request, reply),
            Command::Swap(request, reply) => match self.local_of(&request.pool) {
                Some(Local::Link(uplink)) => self.start_uplink_swap(request, uplink, reply),
                Some(Local::Memory(kind)) => self.start_memory_swap(request, &kind, reply),
                None => {
                    if let Err((error, Stake::Swap { reply: Some(reply), .. })) =
                        self.start_swap(request, Some(reply))
                    {
                        drop(reply.send(Err(error)));
                    }
                }
            },
            Command::SwapVolume(request, events) => {
                if let Err(error) = self.start_volume_swap(&request, Some(events.clone())) {
                    drop(events.try_send(SwapVolumeEvent::Failed(error)));
                }
            }
            Command::Migrate(request, events) => {
                if let Err((error, Stake::Migration { events: Some(events), .. })) =
                    self.start_migration(request, None, Some(events))
                {
                    drop(events.try_send(MigrateEvent::Failed(error)));
                }
            }
        }
    }

    pub(super) fn start_migration(
        &mut self,
        request: MigrateRequest,
        whose: Option<Name>,
        events: Option<mpsc::Sender<MigrateEvent>>,
    ) -> Result<(), (ApiError, Stake)> {
        let ready = self.free_instance(&request.instance).and_then(|instance| {
            let address = super::host_address(&self.pools, &request.host);
            let address = address.map_err(|error| {
                ApiError::new(StatusCode::NOT_FOUND, error.to_string(), "see `rswap pools`")
            })?;
            self.leave_alone(&instance.name)?;
            Ok((instance, address))
        });
        match ready {
            Ok((instance, address)) => {
                let MigrateRequest { instance: name, host, stop_and_copy } = request;
                let id = self.board.write(|b| b.begin_migration(name, host.clone(), UnixMillis::now()));
                let progress = moves::ProgressSink::new(
                    self.board.clone(),
                    self.profiler.clone(),
                    instance.name.clone(),
                    id,
                    events.clone(),
                );
                let order = Order::Migration { instance, address, whose, stop_and_copy, progress };
                self.begin(order, host, Stake::Migration { id, events });
                Ok(())
            }
            Err(error) => Err((error, Stake::Migration { id: 0, events })),
        }
    }

    /// The instance, if no move of it is under way.
    pub(super) fn free_instance(&mut self, name: &InstanceName) -> Result<Instance, ApiError> {
        if let Some(to) = self.moving.get(name) {
            let error = format!("{name} is on its way to {to} already");
            return Err(ApiError::new(StatusCode::CONFLICT, error, "wait until it has arrived"));
        }
        self.look_for_doubts();
        if self.in_doubt.contains_key(name) {
            let error =
                format!("{name} was committed to another host, which did not answer: it is frozen here");
            return Err(ApiError::new(StatusCode::CONFLICT, error, IN_DOUBT_HINT));
        }
        self.known_now(name)
    }

    /// Sees to it that no look at its memory is in the way of a move that stops its processes: none is stopped by two, nor are its writes noted by two.
    pub(super) fn leave_alone(&self, name: &InstanceName) -> Result<(), ApiError> {
        if self.profiler.leave_alone(name) {
            return Ok(());
        }
        let error = format!(
            "{name} can't be moved now: its memory is being looked at, and that does not end: a process of it waits in the kernel (for a disk?), or has \
             very much memory"
        );
        let hint = "try again; `ps -eo pid,stat,wchan,comm` shows who waits (state D)";
        Err(ApiError::new(StatusCode::CONFLICT, error, hint))
    }

    pub(super) fn begin(&mut self, order: Order, to: String, stake: Stake) {
        let name = order.instance().name.clone();
        tracing::info!(instance = %name, to, kind = ?stake.kind(), "moving");
        if let Some(kind) = stake.kind() {
            self.planner.part_started(&name, kind, stake.volume(), &to);
        }
        self.show_begin(&order, &to, &stake);
        self.cold.leave(&name);
        // Where it matters that no look is under way, that was waited for before.
        self.profiler.disturb(&name);
        self.moving.insert(name, to.clone());
        moves::spawn(order, to, stake, self.recovery.clone(), &self.config, self.ended.clone());
    }

    /// Shows at once who is here now.
    pub(super) fn refresh(&mut self) {
        if let Err(error) = self.look() {
            tracing::warn!(%error, "the next window looks again");
        }
    }
}

/// Where each volume of `instance` is.
fn volume_directories(place: &Place, instance: &Instance) -> BTreeMap<InstanceName, PathBuf> {
    let at = |volume: &Volume| {
        let place = place.volume(&instance.name, volume);
        (volume.name.clone(), std::fs::read_link(&place).unwrap_or(place))
    };
    instance.volumes.iter().map(at).collect()
}

/// An answer that keeps the error's causes.
pub(super) fn refused(attempted: &str, error: &dyn std::error::Error) -> ApiError {
    let mut text = format!("cannot {attempted}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text, "see the agent's log, and `rswap doctor`")
}
