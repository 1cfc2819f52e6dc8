//! Tracks instances and makes their profiles, window by window.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rswap_common::layout::MAX_SLOTS;
use rswap_types::bounds::{non_negative, share};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    AgesCost, BlockProfile, Bookkeeping, CpuProfile, HostBlock, IoProfile, MemoryProfile, ProbeState,
    ProbeStatus, Profile, ProfileCost, ProfileError, ProgramCost, TcpProfile,
    ages::{Means, Scanner},
    bookkeeping::tallies,
    cgroup,
    children::{CgroupsKnown, Children, Members},
    counting::Counting,
    device_list::DeviceList,
    disk_users, faults,
    instance_files::{InstanceFiles, Memory},
    listeners::Listeners,
    neighbours::{self, Names},
    pressure::{HostPressure, StalledFor},
    probes::Probes,
    slots::{self, Counters, Devices, FreeSlots},
    sources::{Found, Host, Source},
    tiers::{Change, Judge, Meter, Tier},
};
use crate::{instance::InstanceName, kept_files::Reader, units::UnixMillis};

/// How profiling is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProfileConfig {
    /// Most instances whose kernel events are counted apart (at most [`MAX_SLOTS`] - 1); those of others are counted together. Each takes about 11 KiB of
    /// kernel memory per CPU, 40 KiB for each of up to four block shards, and 40 KiB beside. Of the last two, 5 KiB for each block device of the host, and as much for
    /// all others, are in the agent's resident memory, too.
    pub slots: u32,
    /// Whether waits for a CPU are measured from when a thread is woken, or has to give way, at each of them: dearer than the kernel's own times, and with
    /// what an idle CPU takes.
    pub exact: bool,
    /// Whether minor page faults are timed beside major ones: dear for programs that have many.
    pub minor_faults: bool,
    /// Cgroups in an instance's own that live for less than so many seconds are left to an eBPF program, which counts them as the instance's from their first
    /// moment on. Where the kernel does not take it, they are known at the window's end.
    pub short_lived_s: u64,
    /// Whether the eBPF programs log each event that they count: slow, for developers.
    pub debug_programs: bool,
    /// Whether the kernel measures what the eBPF programs cost; measuring costs a little too.
    pub measure_program_cost: bool,
    /// What all eBPF programs together may take, in shares of one core. Where it is more, a tier of them is detached for a while. 0: whatever it takes.
    #[serde(deserialize_with = "non_negative")]
    pub budget: f64,
    /// After so many seconds a tier that was detached is tried again; after twice that, if it has to go again, and so on.
    pub budget_retry_s: u64,
    /// Share of one core that looking at the ages of memory may take; it is done less often where it would take more. 0: not done.
    #[serde(deserialize_with = "share")]
    pub memory_budget: f64,
    /// Share of one core that looking at what is written may take, and when. 0: not done, as it stops processes for a moment every few minutes, and splits huge
    /// pages that are written.
    #[serde(deserialize_with = "share")]
    pub written_budget: f64,
    /// Of about so many MiB of an instance's memory writes are noted, and told of as many times as there is.
    pub written_sample_mib: u64,
    /// Memory of processes that would be kept from mapping any for longer than so many milliseconds is left out of the ages.
    pub memory_lock_ms: u64,
}

impl Default for ProfileConfig {
    fn default() -> Self {
        Self {
            slots: MAX_SLOTS - 1,
            exact: false,
            minor_faults: false,
            short_lived_s: 2,
            debug_programs: false,
            measure_program_cost: false,
            budget: 0.25,
            budget_retry_s: 60,
            memory_budget: 0.0025,
            written_budget: 0.0,
            written_sample_mib: 256,
            memory_lock_ms: 20,
        }
    }
}

/// Watches the tracked instances. Everything stops and is undone when it is dropped.
pub struct Profiler {
    config: ProfileConfig,
    state: Mutex<State>,
    /// Looks at ages, or why nobody does.
    ages: Result<Scanner, ProbeState>,
    /// Looks at what is written, or why nobody does.
    written_ages: Result<Scanner, ProbeState>,
}

/// A look may wait for the kernel without an end: for a process's lock that a thread has which waits for a disk. A window must not.
const ALONE_LIMIT: Duration = Duration::from_secs(2);
/// A program tells when a cgroup comes or goes in an instance's. After so many windows without that they are looked for all the same: it may be in a way that
/// no program sees.
const LOOK_AFTER_WINDOWS: u32 = 30;

struct State {
    probes: Probes,
    meter: Meter,
    free: FreeSlots,
    devices: Devices,
    device_list: DeviceList,
    /// The programs don't know all of them.
    devices_untold: bool,
    names: Names,
    sources: Found,
    listeners: Listeners,
    /// Boxed: each is taken out and put back in every window.
    tracked: BTreeMap<InstanceName, Box<Tracked>>,
    /// Of the slot that is shared by those that have none of their own.
    shared: Option<Shared>,
    /// What had gone over TCP connections by then was taken over as the window began.
    connections_counted: bool,
    short_lived_ms: u64,
    slots: u32,
    reader: Reader,
    host_pressure: HostPressure,
}

/// What instances without a slot of their own did.
struct Shared {
    at: UnixMillis,
    counters: Counters,
    shown: Option<SharedProfile>,
}

/// What instances did in the last window for which there was no slot left, all together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SharedProfile {
    /// How many.
    pub instances: usize,
    /// Length of the window, in milliseconds.
    pub window_ms: u64,
    /// Waiting for CPUs, and turns on them.
    pub cpu: CpuProfile,
    /// Block I/O.
    pub block: Vec<BlockProfile>,
    /// Whether it was counted.
    #[serde(default)]
    pub block_counted: bool,
    /// TCP, without connections: those of an instance that gets a slot meanwhile would never be seen to end.
    pub tcp: TcpProfile,
    /// Whether its bytes were counted.
    #[serde(default)]
    pub tcp_counted: bool,
}

struct Tracked {
    cgroup: PathBuf,
    files: InstanceFiles,
    looked: Option<LookedFor>,
    /// `None`: there is no slot left, or no probe.
    slot: Option<u32>,
    /// The cgroups that the programs know as this instance's.
    members: Members,
    /// Its own is among them.
    is_known: bool,
    last: Reading,
    /// [`Counters::came_and_stayed`] when it began, or got its slot, or TCP was counted again.
    connections_then: u64,
    /// Those that it had when it began, or TCP was counted again, were looked for.
    connections_found: bool,
    dirty_bytes_per_s: Option<f64>,
}

/// When the cgroups below an instance's own were looked for.
struct LookedFor {
    /// How many had been made in instances', and gone, by then.
    changes: (u64, u64),
    windows_since: u32,
    /// One may have been made in one that the programs did not know yet, or be counted before it can be seen.
    once_more: bool,
}

/// Everything that is counted for an instance, at one moment.
struct Reading {
    /// `None` until the first sample: `track` has no clock, so the first window begins with that sample.
    at: Option<UnixMillis>,
    counters: Option<Counters>,
    cpu_usage_us: u64,
    cpu_held_back_us: u64,
    /// As far as profiles have told it.
    stalled: StalledFor,
    resident_bytes: u64,
    faults: faults::Reading,
}

impl Profiler {
    /// Loads the probes that are asked for and that this kernel takes; the others are in [`Self::probes`], with the reason.
    pub fn start(config: &ProfileConfig) -> Self {
        // The last one is shared by those for whom there is none left.
        let slots = config.slots.clamp(1, MAX_SLOTS - 1) + 1;
        let config = ProfileConfig { slots, ..config.clone() };
        let probes = Probes::load(&config);
        for status in &probes.statuses {
            tracing::debug!(probe = status.name, state = ?status.state, "probe");
        }
        let judge = Judge::new(config.budget, Duration::from_secs(config.budget_retry_s));
        let mut state = State {
            probes,
            meter: Meter::new(judge),
            free: FreeSlots::new(slots - 1),
            devices: Devices::default(),
            device_list: DeviceList::default(),
            devices_untold: false,
            names: Names::default(),
            sources: Found::on(Host::this()),
            listeners: Listeners::default(),
            tracked: BTreeMap::new(),
            shared: None,
            connections_counted: false,
            short_lived_ms: config.short_lived_s.saturating_mul(1000),
            slots,
            reader: Reader::default(),
            host_pressure: HostPressure::default(),
        };
        state.look_for_devices();
        let marks = Means::Marks { lock_limit: Duration::from_millis(config.memory_lock_ms) };
        let writes = Means::Writes { sample_bytes: config.written_sample_mib.saturating_mul(1 << 20) };
        let ages = Scanner::start(config.memory_budget, marks);
        let written_ages = Scanner::start(config.written_budget, writes);
        Self { config, state: Mutex::new(state), ages, written_ages }
    }

    /// What became of each probe, and of what else profiles are made of.
    pub fn probes(&self) -> Vec<ProbeStatus> {
        let state = self.lock();
        let mut all = state.probes.statuses.clone();
        for (source, scanner) in [(Source::Ages, &self.ages), (Source::WrittenAges, &self.written_ages)] {
            let state = match scanner {
                Ok(_) => ProbeState::Active,
                Err(state) => state.clone(),
            };
            all.push(source.status(state));
        }
        all.extend(state.sources.statuses());
        all
    }

    fn scanners(&self) -> impl Iterator<Item = &Scanner> {
        [&self.ages, &self.written_ages].into_iter().flatten()
    }

    /// What looking at the ages of memory costs; nothing where that is not done.
    pub fn ages_cost(&self) -> Option<AgesCost> {
        self.ages.as_ref().ok().map(Scanner::cost)
    }

    /// The same of what is written.
    pub fn written_ages_cost(&self) -> Option<AgesCost> {
        self.written_ages.as_ref().ok().map(Scanner::cost)
    }

    /// Ages of these are not looked at for now: somebody else reads their memory, which looks as if they used it, and notes their writes himself. What noted
    /// them is let go of soon: no window waits for that.
    pub fn disturbed(&self, is_disturbed: impl Fn(&InstanceName) -> bool) {
        self.scanners().for_each(|scanner| scanner.disturbed(&is_disturbed));
    }

    /// The same of one, from now on.
    pub fn disturb(&self, name: &InstanceName) {
        self.scanners().for_each(|scanner| scanner.disturb(name));
    }

    /// The same, and waits for a look that is under way, and until what noted its writes is closed, for two seconds at most: `true` says that nothing of
    /// the profile's is in its way any more.
    #[must_use]
    pub fn leave_alone(&self, name: &InstanceName) -> bool {
        // All first: none of them begins another look while one is waited for.
        self.disturb(name);
        let deadline = Instant::now() + ALONE_LIMIT;
        self.scanners().all(|scanner| scanner.leave_alone(name, deadline))
    }

    /// Begins to profile an instance; its window begins with the next [`Self::sample`]. Past
    /// [`ProfileConfig::slots`] instances the kernel's events are counted together ([`Self::shared`]); CPU time and memory are told of each.
    pub fn track(&self, name: &InstanceName, cgroup: &Path) -> Result<(), ProfileError> {
        let mut state = self.lock();
        if let Some(tracked) = state.tracked.get(name) {
            if tracked.cgroup == cgroup {
                return Ok(());
            }
            return Err(ProfileError::AlreadyTracked { name: name.clone(), path: tracked.cgroup.clone() });
        }
        // Read first: an instance whose cgroup is not there takes no slot.
        let mut files = InstanceFiles::new(cgroup);
        let State { reader, host_pressure, .. } = &mut *state;
        let mut reading = Reading::take(&mut files, reader, host_pressure, None)?;
        let slot = if state.probes.maps.is_some() { state.free.take() } else { None };
        match (&state.probes.maps, slot) {
            (Some(maps), Some(slot)) => {
                reading.counters = Some(Counters::read(maps, self.config.slots, slot, None));
            }
            (Some(_), None) => tracing::warn!(
                %name, slots = self.config.slots - 1,
                "all slots are taken: this instance's kernel events are counted with those of others (raise profile.slots)"
            ),
            (None, _) => {}
        }
        let (members, is_known) = Default::default();
        let mut tracked = Box::new(Tracked {
            cgroup: cgroup.to_owned(),
            files,
            looked: None,
            slot,
            members,
            is_known,
            connections_then: reading.counters.as_ref().map_or(0, Counters::came_and_stayed),
            connections_found: false,
            last: reading,
            dirty_bytes_per_s: None,
        });
        let registered = state.register_cgroups(&mut tracked, None);
        state.tracked.insert(name.clone(), tracked);
        if let Err(error) = registered {
            state.forget(name);
            return Err(error);
        }
        self.scanners().for_each(|scanner| scanner.track(name, cgroup));
        Ok(())
    }

    /// Stops profiling an instance; nothing happens if it is not tracked.
    pub fn untrack(&self, name: &InstanceName) {
        self.lock().forget(name);
        self.scanners().for_each(|scanner| scanner.untrack(name));
    }

    /// What the write tracker measured for an instance, in bytes per second; `None` when it no longer tracks.
    pub fn set_dirty_rate(&self, name: &InstanceName, bytes_per_s: Option<f64>) {
        if let Some(tracked) = self.lock().tracked.get_mut(name) {
            tracked.dirty_bytes_per_s = bytes_per_s;
        }
    }

    /// The profile of every tracked instance for the window since the last call. An instance's first call
    /// only begins its first window; one whose cgroup has gone has none.
    pub fn sample(&self, now: UnixMillis) -> Vec<Profile> {
        let mut state = self.lock();
        state.probes.flush_log();
        state.look_for_devices();
        state.sources.look_again();
        state.give_free_slots();
        state.look_at_listeners(now);
        let open = state.tracked.values().map(|tracked| tracked.files.open_files()).sum();
        state.reader.are_open(open);
        let State { reader, host_pressure, .. } = &mut *state;
        host_pressure.look(reader);
        let counted = state.count_connections();
        let counting = Counting::of(&state.probes, counted);
        let State { tracked, names, .. } = &mut *state;
        names.begin(tracked.iter().flat_map(|(name, of)| of.members.all().map(move |id| (id, name))));
        let names: Vec<InstanceName> = state.tracked.keys().cloned().collect();
        let sampled =
            names.iter().filter_map(|name| state.sample_one(name, now, self.config.slots, &counting));
        let ages = |of: &Result<Scanner, ProbeState>, name: &InstanceName| of.as_ref().ok()?.ages(name);
        let with_ages = |mut profile: Profile| {
            profile.memory.ages = ages(&self.ages, &profile.instance);
            profile.memory.written_ages = ages(&self.written_ages, &profile.instance);
            profile
        };
        let mut profiles: Vec<Profile> = sampled.map(with_ages).collect();
        disk_users::add_neighbours(&mut profiles, state.disks_used());
        state.sample_shared(now, &counting);
        // Behind the last one: a window is counted as a whole, or not.
        state.keep_budget(now);
        profiles
    }

    /// Block devices that are told apart, as `major:minor`.
    pub fn devices(&self) -> Vec<String> {
        self.lock().devices.names()
    }

    /// Block I/O that is in no instance's profile, since [`Self::start`], and devices as [`Self::sample`] saw them last.
    pub fn host_block(&self) -> HostBlock {
        let state = self.lock();
        let unowned = state.probes.maps.as_ref().map(|maps| slots::unowned(maps, &state.devices));
        HostBlock { unowned: unowned.unwrap_or_default(), not_covered: state.devices.not_covered() }
    }

    /// Which cgroups the programs know.
    pub fn cgroups_known(&self) -> CgroupsKnown {
        let state = self.lock();
        let Some(maps) = &state.probes.maps else { return CgroupsKnown::default() };
        let children = maps.children.as_ref();
        let counts = children.map(Children::counts).unwrap_or_default();
        CgroupsKnown {
            known: maps.cgroups.len(),
            children: children.map_or(0, Children::present),
            children_made: counts.made,
            children_displaced: counts.displaced,
            unplaced: state.tracked.values().map(|tracked| tracked.members.unplaced()).sum(),
            instances_without_slot: state.without_slot() as u64,
        }
    }

    /// What is remembered in the kernel, and what had no room there.
    pub fn bookkeeping(&self) -> Bookkeeping {
        let state = self.lock();
        let Some(maps) = &state.probes.maps else { return Bookkeeping::default() };
        Bookkeeping {
            slots_free: state.free.len() as u64,
            connections: maps.connections.known(),
            disk_users: maps.disk_users.len() as u64,
            lost: tallies(maps).into(),
        }
    }

    /// What instances without a slot of their own did in the last window, together; `None` where each has one.
    pub fn shared(&self) -> Option<SharedProfile> {
        self.lock().shared.as_ref()?.shown.clone()
    }

    /// What each program has cost since [`Self::start`], in the windows that were measured: all with
    /// [`ProfileConfig::measure_program_cost`], else those that [`ProfileConfig::budget`] needs.
    pub fn program_costs(&self) -> Vec<ProgramCost> {
        self.lock().probes.costs()
    }

    /// What the programs cost, and which were dropped for that.
    pub fn cost(&self) -> ProfileCost {
        self.lock().meter.judge.cost()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything that may panic, so the state is sound even then.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tracked {
    /// Whether the cgroups below its own are to be looked for, after as many `changes` as the programs have seen, if they see any.
    fn are_cgroups_due(&mut self, changes: Option<(u64, u64)>) -> bool {
        let Some((looked, changes)) = self.looked.as_mut().zip(changes) else { return true };
        looked.windows_since += 1;
        looked.changes != changes
            || looked.once_more
            || looked.windows_since >= LOOK_AFTER_WINDOWS
            || self.members.are_unsettled()
    }
}

impl Reading {
    fn take(
        files: &mut InstanceFiles,
        reader: &mut Reader,
        host: &HostPressure,
        faults_seen: Option<u64>,
    ) -> Result<Self, ProfileError> {
        let (cpu_usage_us, cpu_held_back_us) = files.cpu_stat_us(reader)?;
        let stalled = files.stalled(reader, host);
        let Memory { resident_bytes, faults } = files.memory(reader, faults_seen)?;
        Ok(Self { at: None, counters: None, cpu_usage_us, cpu_held_back_us, stalled, resident_bytes, faults })
    }
}

impl State {
    /// Has the programs measured now and then, and takes those away that cost more than they may.
    fn keep_budget(&mut self, now: UnixMillis) {
        let probes = &self.probes;
        let change = self.meter.end(now, || probes.ran_by_tier());
        self.probes.note_costs();
        match change {
            Some(Change::Drop(tier)) => {
                let cost = self.meter.judge.cost();
                let (used, budget) = (cost.used_share.unwrap_or(0.0) * 100.0, cost.budget_share * 100.0);
                let reason = format!(
                    "the programs take {used:.3} % of a core, and profile.budget is {budget:.3} %: not measured for now"
                );
                tracing::warn!(%tier, "{reason}");
                self.probes.drop_tier(tier, &reason);
            }
            Some(Change::Return(tier)) => {
                tracing::info!(%tier, "measured again");
                if tier == Tier::Tcp {
                    self.forget_connections();
                }
                if !self.probes.return_tier(tier) {
                    self.meter.judge.did_not_return(now, tier);
                } else if tier == Tier::Tcp {
                    // What is there now is where the next window begins.
                    self.count_connections();
                }
            }
            None => {}
        }
        if self.meter.is_due() {
            self.probes.measure();
            self.meter.begin(self.probes.ran_by_tier());
        } else {
            self.probes.stop_measuring();
        }
    }

    /// Nobody has seen which of them ended while they were not counted.
    fn forget_connections(&mut self) {
        let Some(maps) = &self.probes.maps else { return };
        for tracked in self.tracked.values_mut() {
            tracked.connections_found = false;
            if let Some(slot) = tracked.slot {
                tracked.connections_then = Counters::read(maps, self.slots, slot, None).came_and_stayed();
            }
        }
    }

    /// Looks for connections that instances had before they could be seen to begin.
    fn find_connections(&mut self) {
        let mut all_are_found = false;
        for (name, tracked) in self.tracked.iter_mut().filter(|(_, of)| !of.connections_found) {
            tracked.connections_found = true;
            for pid in cgroup::pids(&tracked.cgroup).unwrap_or_default() {
                if all_are_found {
                    break;
                }
                // One that has ended meanwhile has none.
                match self.probes.find_connections(pid) {
                    Ok(is_of_all) => all_are_found = is_of_all,
                    Err(error) => {
                        tracing::warn!(%name, pid, %error, "TCP connections that it has already are not counted");
                    }
                }
            }
        }
    }

    /// Takes over what has gone over connections; whether it was taken over at the window's beginning, too.
    fn count_connections(&mut self) -> bool {
        self.find_connections();
        let counted = self.probes.count_connections();
        std::mem::replace(&mut self.connections_counted, counted) && counted
    }

    fn look_for_devices(&mut self) {
        let Some(maps) = &mut self.probes.maps else { return };
        let has_new = self.device_list.may_have_changed(&mut self.reader) && self.devices.rescan();
        if !has_new && !self.devices_untold {
            return;
        }
        // Their records first: nothing is counted there that can't be read.
        let told = maps
            .blocks
            .follow(&self.devices)
            .and_then(|()| maps.devices.set(0, self.devices.table(), 0).map_err(|error| error.to_string()));
        let was_told = !std::mem::replace(&mut self.devices_untold, told.is_err());
        if let Err(error) = told
            && was_told
        {
            tracing::warn!(error, "block devices can't be told apart");
        }
    }

    fn look_at_listeners(&mut self, now: UnixMillis) {
        let instances = self.tracked.iter().map(|(name, of)| {
            let processes = move || of.files.processes();
            (name, of.cgroup.as_path(), processes, of.members.registered())
        });
        self.listeners.look(now, instances);
    }

    /// Tells the programs about cgroups of the instance that are new, and to forget those that have gone. When it is tracked first, about all.
    fn register_cgroups(
        &mut self,
        tracked: &mut Tracked,
        now: Option<UnixMillis>,
    ) -> Result<(), ProfileError> {
        let children = self.probes.maps.as_ref().and_then(|maps| maps.children.as_ref());
        let changes = children.map(Children::counts).map(|counts| (counts.made, counts.gone));
        if now.is_some() && !tracked.are_cgroups_due(changes) {
            return Ok(());
        }
        let own = cgroup::id(&tracked.cgroup)?;
        let slot = tracked.slot.unwrap_or(self.slots - 1);
        if let (Some(maps), None) = (&mut self.probes.maps, now) {
            // What is made in it from now on, a program makes known; the others are found afterwards.
            tracked.members.told(own, maps.cgroups.insert(own, slot).is_ok());
        }
        let (cgroups, present): (Vec<_>, BTreeSet<_>) = cgroup::tree(&tracked.cgroup)?.into_iter().unzip();
        tracked.files.follow(&cgroups);
        let before = tracked.looked.as_ref().map(|looked| looked.changes);
        // Not all in the same window.
        let windows_since = if now.is_none() { own as u32 % LOOK_AFTER_WINDOWS } else { 0 };
        tracked.looked = changes.map(|changes| {
            let once_more = before != Some(changes);
            LookedFor { changes, windows_since, once_more }
        });
        let Some(maps) = &mut self.probes.maps else { return Ok(()) };
        let short_lived_ms = now.and(maps.children.as_ref()).map(|_| self.short_lived_ms);
        let due = tracked.members.look(&present, now.unwrap_or_default(), short_lived_ms);
        for id in due.forget {
            maps.cgroups.remove(id);
        }
        if let Some(looked) = &mut tracked.looked {
            looked.once_more |= !due.insert.is_empty();
        }
        // Nobody may have known them when connections of theirs began.
        tracked.connections_found &= due.insert.is_empty();
        for id in due.insert {
            let told = maps.cgroups.insert(id, slot);
            if let Err(error) = &told {
                tracing::debug!(%error, id, cgroup = %tracked.cgroup.display(), "not counted");
            }
            tracked.members.told(id, told.is_ok());
        }
        tracked.is_known = tracked.members.registered().contains(&own);
        Ok(())
    }

    /// Who used disks since this was called last, beside instances.
    fn disks_used(&mut self) -> Vec<disk_users::Used> {
        let Some(maps) = &mut self.probes.maps else { return Vec::new() };
        let used = disk_users::used(maps).into_iter().map(|(id, device, device_ns)| {
            // It may be an instance's cgroup that the agent did not know yet.
            disk_users::Used { device: self.devices.name(device), who: self.who(id, None), device_ns }
        });
        used.collect()
    }

    /// Whose cgroup this is; the instance that is looked at is not among those who are tracked.
    fn who(&mut self, id: u64, looked_at: Option<(&InstanceName, &Tracked)>) -> neighbours::Who {
        let mut all = self.tracked.iter().map(|(name, of)| (name, &**of)).chain(looked_at);
        self.names
            .who(id, |path| all.find(|(_, of)| path.starts_with(&of.cgroup)).map(|(name, _)| name.clone()))
    }

    fn forget(&mut self, name: &InstanceName) {
        let Some(tracked) = self.tracked.remove(name) else { return };
        let Some(maps) = &mut self.probes.maps else { return };
        for id in tracked.members.registered() {
            maps.cgroups.remove(*id);
        }
        if tracked.slot.is_none()
            && let Some(children) = &maps.children
        {
            let ids = || {
                // Of a cgroup that has gone, nothing is made in any more.
                let mut all = cgroup::ids(&tracked.cgroup).unwrap_or_default();
                all.extend(tracked.members.all());
                all
            };
            // As in `Children::forget`.
            while children.forget_these(self.slots - 1, &ids()) > 0 {}
        }
        if let Some(slot) = tracked.slot {
            if let Some(children) = &maps.children {
                children.forget(slot);
            }
            // Its connections are nobody's from here on.
            self.probes.count_connections();
            self.free.give_back(slot);
        }
    }

    fn without_slot(&self) -> usize {
        let without = self.tracked.values().filter(|tracked| tracked.slot.is_none());
        if self.probes.maps.is_some() { without.count() } else { 0 }
    }

    /// Slots that have become free go to those that have none.
    fn give_free_slots(&mut self) {
        let Some(maps) = &mut self.probes.maps else { return };
        for tracked in self.tracked.values_mut().filter(|tracked| tracked.slot.is_none()) {
            let Some(slot) = self.free.take() else { return };
            let counters = Counters::read(maps, self.slots, slot, None);
            tracked.connections_then = counters.came_and_stayed();
            tracked.last.counters = Some(counters);
            for id in tracked.members.registered() {
                // It is there: it is given another slot, which takes no place.
                if let Err(error) = maps.cgroups.insert(*id, slot) {
                    tracing::warn!(%error, id, "a cgroup is counted with others");
                }
            }
            tracked.slot = Some(slot);
        }
    }

    fn sample_shared(&mut self, now: UnixMillis, counting: &Counting) {
        let instances = self.without_slot();
        let Some(maps) = self.probes.maps.as_ref().filter(|_| instances > 0) else {
            self.shared = None;
            return;
        };
        let before = self.shared.as_ref().map(|shared| &shared.counters);
        let counters = Counters::read(maps, self.slots, self.slots - 1, before);
        let window_ms = self.shared.as_ref().map_or(0, |shared| now.since(shared.at));
        let shown = self.shared.as_ref().filter(|_| window_ms > 0).map(|before| {
            let mut cpu = CpuProfile::default();
            let earlier = &before.counters;
            // As in `window`.
            if counting.scheduler {
                counters.add_cpu_since(earlier, &mut cpu);
            }
            cpu.exact = counting.exact;
            cpu.counted = counting.turns;
            cpu.off_cpu = counting.off_cpu.then(|| counters.off_cpu_since(earlier));
            cpu.migrations = counting.migrations.then(|| counters.migrations_since(earlier));
            cpu.cores = cpu.on_cpu_ns.sum as f64 / (window_ms as f64 * 1e6);
            let mut tcp = TcpProfile::default();
            if counting.tcp {
                tcp = counters.tcp_since(earlier);
                tcp.retransmits = counting.retransmits.then(|| counters.retransmits_since(earlier));
            }
            let block = if counting.block {
                counters.block_since(earlier, &self.devices, window_ms)
            } else {
                Vec::new()
            };
            SharedProfile {
                instances,
                window_ms,
                cpu,
                block,
                block_counted: counting.requests,
                tcp,
                tcp_counted: counting.bytes,
            }
        });
        self.shared = Some(Shared { at: now, counters, shown });
    }

    fn sample_one(
        &mut self,
        name: &InstanceName,
        now: UnixMillis,
        slots: u32,
        counting: &Counting,
    ) -> Option<Profile> {
        let mut tracked = self.tracked.remove(name)?;
        let profile = self.window(name, &mut tracked, now, slots, counting);
        self.tracked.insert(name.clone(), tracked);
        match profile {
            Ok(profile) => profile,
            Err(error) => {
                tracing::debug!(%name, error = &error as &dyn std::error::Error, "no profile for this window");
                None
            }
        }
    }

    fn window(
        &mut self,
        name: &InstanceName,
        tracked: &mut Tracked,
        now: UnixMillis,
        slots: u32,
        counting: &Counting,
    ) -> Result<Option<Profile>, ProfileError> {
        self.register_cgroups(tracked, Some(now))?;
        let mut counters = None;
        if let (Some(maps), Some(slot), true) = (&self.probes.maps, tracked.slot, tracked.is_known) {
            counters = Some(Counters::read(maps, slots, slot, tracked.last.counters.as_ref()));
        }
        // Behind it: a fault that begins meanwhile is one that the next reading sees begun.
        // One that waits may end long after it has begun.
        let counted = counters.as_ref().filter(|_| counting.faults_begun);
        let faults = counted.map(|of| of.faults_begun().wrapping_add(of.faults.ended()));
        let mut reading = Reading::take(&mut tracked.files, &mut self.reader, &self.host_pressure, faults)?;
        (reading.at, reading.counters) = (Some(now), counters);
        let last = std::mem::replace(&mut tracked.last, reading);

        let Some(started) = last.at else { return Ok(None) };
        let window_ms = now.since(started);
        if window_ms == 0 {
            // Nothing can be said per second of no time; what was counted belongs to the next window.
            tracked.last = last;
            return Ok(None);
        }
        let (stalled, window_us) = (&mut tracked.last.stalled, window_ms.saturating_mul(1000));
        let [cpu_some, cpu_full] = stalled.cpu.shares_since(&last.stalled.cpu, window_us);
        let [memory_some, memory_full] = stalled.memory.shares_since(&last.stalled.memory, window_us);
        let [io_some, io_full] = stalled.io.shares_since(&last.stalled.io, window_us);
        let reading = &tracked.last;
        let faults = reading.faults.since(&last.faults);
        let mut profile = Profile {
            instance: name.clone(),
            at: now,
            window_ms,
            cpu: CpuProfile {
                cores: reading.cpu_usage_us.saturating_sub(last.cpu_usage_us) as f64
                    / (window_ms as f64 * 1e3),
                pressure_some: cpu_some,
                pressure_full: cpu_full,
                ..CpuProfile::default()
            },
            block: Vec::new(),
            block_counted: false,
            disk_neighbours: Vec::new(),
            io: IoProfile { pressure_some: io_some, pressure_full: io_full },
            tcp: TcpProfile::default(),
            tcp_counted: false,
            memory: MemoryProfile {
                resident_bytes: reading.resident_bytes,
                dirty_bytes_per_s: tracked.dirty_bytes_per_s,
                pressure_some: memory_some,
                pressure_full: memory_full,
                faults: faults.map(|(faults, _)| faults),
                fault_latency: None,
                refaults: faults.and_then(|(_, refaults)| refaults),
                ages: None,
                written_ages: None,
            },
        };
        if let (Some(earlier), Some(later)) = (&last.counters, &reading.counters) {
            if counting.scheduler {
                later.add_cpu_since(earlier, &mut profile.cpu);
                let others_ns = profile.cpu.by_cpu.iter().map(|of| of.others_wait_ns).sum();
                let waited = later.waits_since(earlier);
                let looked_at = Some((name, &*tracked));
                let waited = waited.into_iter().map(|(id, ns)| (self.who(id, looked_at), ns));
                profile.cpu.neighbours = neighbours::ranked(waited.collect::<Vec<_>>(), others_ns);
                profile.cpu.without_own_limit(
                    reading.cpu_held_back_us.saturating_sub(last.cpu_held_back_us).saturating_mul(1000),
                );
            }
            profile.cpu.exact = counting.exact;
            profile.cpu.counted = counting.turns;
            profile.cpu.off_cpu = counting.off_cpu.then(|| later.off_cpu_since(earlier));
            profile.cpu.migrations = counting.migrations.then(|| later.migrations_since(earlier));
            if counting.tcp {
                profile.tcp = later.tcp_since(earlier);
                profile.tcp.retransmits = counting.retransmits.then(|| later.retransmits_since(earlier));
                profile.tcp.connections =
                    counting.connections.then(|| later.connections_since(earlier, tracked.connections_then));
            }
            if counting.block {
                profile.block = later.block_since(earlier, &self.devices, window_ms);
            }
            profile.memory.fault_latency =
                counting.fault_latency.then(|| later.faults.since(&earlier.faults));
            profile.block_counted = counting.requests;
            profile.tcp_counted = counting.bytes;
        }
        profile.tcp.listen_drops = self.listeners.drops(name);
        Ok(Some(profile))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Write};

    use super::*;
    use crate::profile::connections::KNOWN;

    #[test]
    fn ages_that_nobody_asks_for_are_off_and_not_unavailable() {
        let config = ProfileConfig { slots: 1, memory_budget: 0.0, ..ProfileConfig::default() };
        let probes = serde_json::to_value(Profiler::start(&config).probes()).unwrap();
        for (source, setting) in [(Source::Ages, "memory_budget"), (Source::WrittenAges, "written_budget")] {
            let expected = serde_json::json!({
                "name": source.name(), "state": "off", "reason": format!("profile.{setting} is 0"),
            });
            assert!(probes.as_array().unwrap().contains(&expected), "no {expected} in {probes}");
        }
    }

    #[test]
    fn a_window_has_the_refaults_between_two_looks_at_the_cgroup() {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = directory.path();
        let write = |file: &str, text: &str| std::fs::write(cgroup.join(file), text).unwrap();
        write("cpu.stat", "usage_usec 0\nuser_usec 0\nsystem_usec 0\n");
        write("cgroup.procs", "");
        write("memory.current", "83886080\n");
        let stat = |all, major, anon, file| {
            let values = [
                ("pgfault", all),
                ("pgmajfault", major),
                ("workingset_refault_anon", anon),
                ("workingset_refault_file", file),
            ];
            write("memory.stat", &faults::memory_stat(&values));
        };
        stat(31_552, 12, 3, 609);
        let profiler = Profiler::start(&ProfileConfig { slots: 1, ..ProfileConfig::default() });
        profiler.track(&"refaults".parse().unwrap(), cgroup).unwrap();
        assert!(profiler.sample(UnixMillis(1000)).is_empty());
        let window = |second: u64| {
            let memory = profiler.sample(UnixMillis(second * 1000)).pop().unwrap().memory;
            let faults = memory.faults.unwrap();
            (memory.resident_bytes, faults.minor, faults.major, memory.refaults)
        };
        stat(31_600, 14, 10, 620);
        assert_eq!(window(2), (83_886_080, 46, 2, Some(7 + 11)));
        write("memory.current", "4096\n");
        assert_eq!(window(3), (4096, 0, 0, Some(0)));
        // Back to less, as of a cgroup that was made anew: nothing is told of what that one did before.
        stat(100, 1, 0, 5);
        assert_eq!(window(4), (4096, 0, 0, Some(0)));
        stat(103, 2, 1, 5);
        assert_eq!(window(5), (4096, 2, 1, Some(1)));
        // Before Linux 5.9 both kinds of pages were counted together.
        let old = faults::memory_stat(&[("pgfault", 103), ("pgmajfault", 2)]);
        let lines = old.lines().filter(|line| !line.starts_with("workingset_refault_"));
        let old: String = lines.map(|line| format!("{line}\n")).collect();
        write("memory.stat", &format!("{old}workingset_refault 50\n"));
        assert_eq!(window(6).3, Some(44));
        write("memory.stat", &old);
        assert_eq!(window(7), (4096, 0, 0, None), "a kernel that does not count them");
    }

    /// Two connections with itself, of a program that opens the second one, or sends a byte from one end of the newest to the other, when it is told so.
    const TALKER: &str = "import socket, sys\nserver = socket.create_server(('127.0.0.1', 0))\n\
        for line in sys.stdin:\n    if line == 'open\\n':\n        one = socket.create_connection(server.getsockname())\n        \
        two, _ = server.accept()\n    else:\n        one.sendall(b'x')\n        two.recv(1)\n    print('done', flush=True)\n";

    #[test]
    fn what_goes_over_connections_while_tcp_is_not_measured_is_not_counted() {
        let profiler = Profiler::start(&ProfileConfig { slots: 1, ..ProfileConfig::default() });
        if !profiler.lock().probes.are_active(&[KNOWN]) {
            eprintln!("not tested: {:?}", profiler.probes());
            return;
        }
        let path = cgroup::unified_mount().unwrap().join(format!("rswap-test-era-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "echo 0 > \"$0/cgroup.procs\" && exec python3 -c \"$1\""]).arg(&path).arg(TALKER);
        let piped = std::process::Stdio::piped;
        let mut child = command.stdin(piped()).stdout(piped()).spawn().unwrap();
        let mut to = child.stdin.take().unwrap();
        let mut from = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut tell = |what: &str| {
            writeln!(to, "{what}").unwrap();
            let mut line = String::new();
            from.read_line(&mut line).unwrap();
            assert_eq!(line, "done\n");
        };
        tell("open");
        profiler.track(&"talker".parse().unwrap(), &path).unwrap();
        let window = || {
            std::thread::sleep(Duration::from_millis(10));
            let profile = profiler.sample(UnixMillis::now()).pop();
            profile.map(|profile| (profile.tcp_counted, profile.tcp.bytes_in, profile.tcp.bytes_out))
        };
        assert_eq!(window(), None);
        tell("send");
        assert_eq!(window(), Some((true, 1, 1)));
        profiler.lock().probes.drop_tier(Tier::Tcp, "a test");
        tell("send");
        assert_eq!(window(), Some((false, 0, 0)));
        // One that has come meanwhile is found.
        ["send", "open", "send"].into_iter().for_each(&mut tell);
        {
            let mut state = profiler.lock();
            state.forget_connections();
            assert!(state.probes.return_tier(Tier::Tcp));
            state.count_connections();
        }
        tell("send");
        assert_eq!(window(), Some((true, 1, 1)));
        assert_eq!(window(), Some((true, 0, 0)));
        drop(to);
        child.wait().unwrap();
        std::fs::remove_dir(&path).unwrap();
    }
}
