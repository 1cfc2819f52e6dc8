//! The eBPF programs: what each needs of the kernel, loading them, and what became of each.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData},
    programs::{BtfTracePoint, ProgramFd, perf_event::PerfEventLink, tp_btf::BtfTracePointLink},
    sys::{Stats, enable_stats},
};
use rswap_common::{
    globals as g,
    layout::{
        FaultRecord, MAX_DEVICES, SlotRecord, TallyRecord, UnownedRecord, block_records, block_shards,
        map_names,
    },
    neighbours::NeighbourRecord,
    tables::{FAULT_PLACES, WAITER_PLACES},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    ProfileConfig, Tier,
    block_records::BlockRecords,
    btf::KernelTypes,
    cgroup_table::CgroupTable,
    children::{CHILD_PROBES, Children},
    connections::{self, CONNECTION_PROBES, Connections, SOCK_CGROUP, called_by},
    disk_users::DiskUsers,
    fault_latency::{self, FAULT_PROBES, MAJOR_FAULTS, MINOR_FAULTS, PAGE_FAULT},
    tiers::ByTier,
};
use crate::sys::{
    bpf_iter::Walk,
    bpf_mmap::{BpfRecord, MappedArray, MappedWords},
};

/// The object that `cargo xtask build` made, if it was there when the agent was built.
#[cfg(rswap_ebpf_object)]
pub(super) static OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(env!("RSWAP_EBPF_OBJECT")));
/// The object that `cargo xtask build` made, if it was there when the agent was built.
#[cfg(not(rswap_ebpf_object))]
pub(super) static OBJECT: Option<&[u8]> = None;

/// Lines kept of a verifier's log: the reason, and three lines of statistics with the error code.
const VERIFIER_LINES: usize = 6;

pub(super) const NO_OBJECT: &str = "built without eBPF programs: use `cargo xtask build`";

/// Whether a probe counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ProbeState {
    /// It does.
    Active,
    /// It does not, as the configuration does not ask for it: nothing is wrong.
    Off {
        /// Which setting, for people.
        reason: String,
    },
    /// It does not, and why.
    Unavailable {
        /// For people.
        reason: String,
    },
    /// It could, and costs more than it may: it is tried again after a while.
    Dropped {
        /// For people.
        reason: String,
    },
}

/// What became of one probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProbeStatus {
    /// The tracepoint or event that it sits on, or its own name, where the agent has the kernel call it.
    pub name: String,
    /// Whether it counts.
    #[serde(flatten)]
    pub state: ProbeState,
}

/// What one program has cost so far, from the kernel's own statistics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProgramCost {
    /// The tracepoint or event that it sits on, or its own name, where the agent has the kernel call it.
    pub name: String,
    /// How often it ran while the statistics were on.
    pub runs: u64,
    /// Mean time of a run, in nanoseconds (the measuring included).
    pub ns_per_run: f64,
    /// Share of one core that it took in the last window that was measured, on all CPUs together.
    #[serde(default)]
    pub core_share: Option<f64>,
    /// How often the kernel did not run it, as it was running on that CPU already: what happened then is not counted. `None` before Linux 5.12.
    #[serde(default)]
    pub missed: Option<u64>,
}

/// A program, and what it relies on. Tracepoints and structures change between kernels, at no version that
/// could be asked for (vendors backport): hence every one is looked up.
pub(super) struct Probe {
    /// Name of the program and of its tracepoint, or of one that is called otherwise ([`called_by`]).
    pub(super) tracepoint: &'static str,
    /// The arguments' types, as far as they are used.
    pub(super) arguments: &'static [&'static str],
    /// (global, structure, field)
    pub(super) fields: &'static [(&'static str, &'static str, &'static str)],
}

pub(super) const CGROUP_FIELDS: [(&str, &str, &str); 2] =
    [(g::CGROUP_KN, "cgroup", "kn"), (g::KERNFS_ID, "kernfs_node", "id")];

const BLOCK_IO_START: &str = "block_io_start";

const TCP_RETRANSMIT: &str = "tcp_retransmit_skb";

const SCHED_SWITCH: &str = "sched_switch";

/// Sees tasks go from one CPU to another.
pub(super) const SCHED_MIGRATE: &str = "sched_migrate_task";

/// What the program at [`SCHED_SWITCH`] does beside, where it can: it counts why tasks go.
pub(super) const SWITCH_STATE: &str = "sched_switch.prev_state";

pub(super) const PROBES: [Probe; 5] = [
    Probe {
        tracepoint: SCHED_SWITCH,
        arguments: &["bool", "struct task_struct *", "struct task_struct *"],
        fields: &[
            CGROUP_FIELDS[0],
            CGROUP_FIELDS[1],
            (g::TASK_PID, "task_struct", "pid"),
            (g::TASK_FLAGS, "task_struct", "flags"),
            (g::TASK_CGROUPS, "task_struct", "cgroups"),
            (g::TASK_LAST_QUEUED, "task_struct", "sched_info.last_queued"),
            (g::TASK_LAST_ARRIVAL, "task_struct", "sched_info.last_arrival"),
            (g::TASK_CFS_RQ, "task_struct", "se.cfs_rq"),
            (g::CFS_RQ_RQ, "cfs_rq", "rq"),
            (g::RQ_CLOCK, "rq", "clock"),
            (g::CSS_SET_DFL_CGRP, "css_set", "dfl_cgrp"),
        ],
    },
    Probe {
        tracepoint: SCHED_MIGRATE,
        arguments: &["struct task_struct *", "int"],
        fields: &[
            CGROUP_FIELDS[0],
            CGROUP_FIELDS[1],
            (g::TASK_CGROUPS, "task_struct", "cgroups"),
            (g::CSS_SET_DFL_CGRP, "css_set", "dfl_cgrp"),
        ],
    },
    Probe {
        tracepoint: "block_rq_complete",
        arguments: &["struct request *", "blk_status_t", "int"],
        fields: &[
            CGROUP_FIELDS[0],
            CGROUP_FIELDS[1],
            (g::REQUEST_Q, "request", "q"),
            (g::REQUEST_BIO, "request", "bio"),
            (g::REQUEST_CMD_FLAGS, "request", "cmd_flags"),
            (g::REQUEST_DATA_LEN, "request", "__data_len"),
            (g::REQUEST_START_NS, "request", "start_time_ns"),
            (g::REQUEST_IO_START_NS, "request", "io_start_time_ns"),
            (g::QUEUE_DISK, "request_queue", "disk"),
            (g::DISK_MAJOR, "gendisk", "major"),
            (g::DISK_FIRST_MINOR, "gendisk", "first_minor"),
            (g::BIO_BLKG, "bio", "bi_blkg"),
            (g::BLKG_BLKCG, "blkcg_gq", "blkcg"),
            (g::BLKCG_CGROUP, "blkcg", "css.cgroup"),
        ],
    },
    Probe {
        tracepoint: BLOCK_IO_START,
        arguments: &["struct request *"],
        fields: &[
            CGROUP_FIELDS[0],
            CGROUP_FIELDS[1],
            (g::TASK_FLAGS, "task_struct", "flags"),
            (g::TASK_CGROUPS, "task_struct", "cgroups"),
            (g::CSS_SET_DFL_CGRP, "css_set", "dfl_cgrp"),
        ],
    },
    Probe {
        tracepoint: TCP_RETRANSMIT,
        arguments: &["struct sock *"],
        fields: &[CGROUP_FIELDS[0], CGROUP_FIELDS[1], SOCK_CGROUP],
    },
];

const WAKER_FIELDS: [(&str, &str, &str); 1] = [(g::TASK_PID, "task_struct", "pid")];

const SCHED_WAKING: &str = "sched_waking";
const SCHED_WAKEUP_NEW: &str = "sched_wakeup_new";

/// Those that are loaded beside where waits for a CPU are measured exactly.
pub(super) const EXACT_PROBES: [Probe; 2] = [
    Probe { tracepoint: SCHED_WAKING, arguments: &["struct task_struct *"], fields: &WAKER_FIELDS },
    Probe { tracepoint: SCHED_WAKEUP_NEW, arguments: &["struct task_struct *"], fields: &WAKER_FIELDS },
];

/// What has to count for [`ProfileConfig::exact`].
pub(super) const EXACT: [&str; 4] = [SCHED_SWITCH, SWITCH_STATE, SCHED_WAKING, SCHED_WAKEUP_NEW];

/// All that the configuration asks for. Those that know cgroups come first: what is made while the others are attached is known.
fn wanted(config: &ProfileConfig) -> impl Iterator<Item = &'static Probe> + Clone {
    let exact: &[Probe] = if config.exact { &EXACT_PROBES } else { &[] };
    CHILD_PROBES.iter().chain(&PROBES).chain(&CONNECTION_PROBES).chain(exact).chain(&FAULT_PROBES)
}

/// The same of programs at software events.
fn wanted_events(config: &ProfileConfig) -> impl Iterator<Item = &'static str> {
    [MAJOR_FAULTS].into_iter().chain(config.minor_faults.then_some(MINOR_FAULTS))
}

/// What the configuration does not ask for.
fn switched_off(config: &ProfileConfig) -> impl Iterator<Item = ProbeStatus> {
    let exact: &[Probe] = if config.exact { &[] } else { &EXACT_PROBES };
    let exact = exact.iter().map(|probe| (probe.tracepoint, "profile.exact"));
    let events = (!config.minor_faults).then_some((MINOR_FAULTS, "profile.minor_faults"));
    exact.chain(events).map(|(name, setting)| {
        let state = ProbeState::Off { reason: format!("{setting} is false") };
        ProbeStatus { name: name.to_owned(), state }
    })
}

/// Holds a program where it is called.
pub(super) enum Link {
    Tracepoint(#[expect(dead_code, reason = "it holds as long as it is kept")] BtfTracePointLink),
    Event(#[expect(dead_code, reason = "as above, one for each CPU")] Vec<PerfEventLink>),
    /// It is called by the agent.
    Called,
    /// The program itself: it is called when the agent walks over the files of a process.
    Sockets(ProgramFd),
}

impl Probe {
    /// The offsets that the program needs in this kernel, or why it can't run here.
    pub(super) fn resolve(&self, types: &KernelTypes) -> Result<Vec<(&'static str, u64)>, String> {
        let found = match called_by(self.tracepoint) {
            Some(_) => Vec::new(),
            None => types.tracepoint_arguments(self.tracepoint).map_err(|error| error.to_string())?,
        };
        let same = |expected: &&str, found: &String| *expected == found || integers(expected, found);
        if found.len() < self.arguments.len() || !self.arguments.iter().zip(&found).all(|(e, f)| same(e, f)) {
            return Err(format!(
                "this kernel's tracepoint {} has the arguments ({}), not ({}, ..)",
                self.tracepoint,
                found.join(", "),
                self.arguments.join(", ")
            ));
        }
        let offset = |&(global, in_struct, field): &(&'static str, &str, &str)| {
            let offset = types.field_offset(in_struct, field).map_err(|error| error.to_string())?;
            Ok((global, offset))
        };
        self.fields.iter().map(offset).collect()
    }
}

/// Where the kernel keeps that a task waits for I/O: a byte of it, and the mask there; or why it can't be told why tasks go.
pub(super) fn switch_states(types: &KernelTypes) -> Result<(u64, u8), String> {
    let found = types.tracepoint_arguments(SCHED_SWITCH).map_err(|error| error.to_string())?;
    if !found.get(3).is_some_and(|argument| integers("unsigned int", argument)) {
        return Err(format!(
            "this kernel's tracepoint {SCHED_SWITCH} does not say in which state a task goes"
        ));
    }
    types.bit("task_struct", "in_iowait").map_err(|error| error.to_string())
}

/// Whether the kernel tells of what could not be sent again, too, and says so.
pub(super) fn retransmit_has_error(types: &KernelTypes) -> bool {
    let found = types.tracepoint_arguments(TCP_RETRANSMIT).unwrap_or_default();
    found.get(2).is_some_and(|argument| integers("int", argument))
}

/// Numbers pass in a register of one size whatever their C type is called.
fn integers(expected: &str, found: &str) -> bool {
    let integer = |name: &str| matches!(name, "int" | "unsigned int" | "blk_status_t" | "u32" | "u8");
    integer(expected) && integer(found)
}

/// What the loaded programs share with the agent.
pub(super) struct Maps {
    /// kernfs cgroup id -> slot.
    pub(super) cgroups: CgroupTable,
    /// The same of cgroups that were made in those, where the kernel takes the programs.
    pub(super) children: Option<Children>,
    /// The table of devices, one entry.
    pub(super) devices: Array<MapData, [u32; MAX_DEVICES as usize]>,
    /// Scheduler and TCP records per CPU and slot.
    pub(super) slots: MappedArray<SlotRecord>,
    /// Block records per shard, slot, device and operation.
    pub(super) blocks: BlockRecords,
    /// For whom instances waited, per CPU and slot.
    pub(super) neighbours: MappedArray<NeighbourRecord>,
    /// Who uses disks beside instances.
    pub(super) disk_users: DiskUsers,
    /// How long page faults took, per CPU, slot and kind.
    pub(super) faults: MappedArray<FaultRecord>,
    /// Requests that were nobody's, by CPU.
    pub(super) unowned: MappedArray<UnownedRecord>,
    /// What the programs count of themselves, by CPU.
    pub(super) tallies: MappedArray<TallyRecord>,
    /// Tasks that wait for a CPU, where waits are measured exactly.
    waiters: Option<MappedWords>,
    /// TCP connections of instances.
    pub(super) connections: Connections,
    /// How often the programs that know connections were away.
    tcp_era: (Array<MapData, u64>, u64),
    /// Tasks in page faults, and since when.
    faults_begun: MappedWords,
    /// Kinds of faults in `faults`.
    pub(super) fault_kinds: u32,
    /// CPUs in `slots`.
    pub(super) cpus: u32,
}

/// The programs, as long as they are attached.
pub(super) struct Probes {
    pub(super) statuses: Vec<ProbeStatus>,
    pub(super) maps: Option<Maps>,
    ebpf: Option<Ebpf>,
    /// What holds each program at its tracepoint or event.
    links: BTreeMap<&'static str, Link>,
    flush_log: Option<Box<dyn FnMut() + Send>>,
    /// The kernel measures the programs as long as it is open.
    statistics: Option<OwnedFd>,
    /// It does always.
    always_measured: bool,
    /// Since when the window is measured, and how long each program had run then, in nanoseconds.
    measured_since: Option<(Instant, BTreeMap<String, u64>)>,
    /// What each has cost by the end of the last window that was measured.
    costs: Vec<ProgramCost>,
}

impl Probes {
    /// Loads and attaches what this kernel takes. Never fails as a whole.
    pub(super) fn load(config: &ProfileConfig) -> Self {
        let (statuses, maps, ebpf, links, flush_log, statistics) = Default::default();
        let (measured_since, costs) = Default::default();
        let mut this = Self {
            statuses,
            maps,
            ebpf,
            links,
            flush_log,
            statistics,
            always_measured: config.measure_program_cost,
            measured_since,
            costs,
        };
        if let Err(reason) = this.try_load(config) {
            this.maps = None;
            this.ebpf = None;
            this.links.clear();
            let all = wanted(config).map(|probe| probe.tracepoint).chain(wanted_events(config));
            this.statuses = all.map(|name| status(name, Err(reason.clone()))).collect();
            let state = ProbeState::Unavailable { reason };
            this.statuses.push(ProbeStatus { name: SWITCH_STATE.to_owned(), state });
        }
        this.statuses.extend(switched_off(config));
        if config.measure_program_cost {
            this.measure();
        }
        this
    }

    fn try_load(&mut self, config: &ProfileConfig) -> Result<(), String> {
        let object = OBJECT.ok_or(NO_OBJECT)?;
        let types = KernelTypes::of_this_kernel().map_err(|error| error.to_string())?;
        let resolved: Vec<_> = wanted(config).map(|probe| probe.resolve(&types)).collect();
        let states = switch_states(&types);
        // Half of it would be neither.
        let exact = config.exact
            && states.is_ok()
            && wanted(config).zip(&resolved).all(|(probe, found)| !is_of_exact_mode(probe) || found.is_ok());
        // A kernel without this flag has no such requests either, as far as could be told.
        let background = types.enumerator("req_flag_bits", "__REQ_BACKGROUND");
        let background = background.and_then(|bit| 1u32.checked_shl(bit)).unwrap_or(0);
        let retransmit_has_error = retransmit_has_error(&types);
        let sock_done = connections::done_flag(&types);
        drop(types);

        let cpus =
            aya::util::nr_cpus().map_err(|(what, error)| format!("count the CPUs ({what}): {error}"))? as u32;
        let shards = block_shards(cpus);
        let by_blkcg =
            super::cgroup::unified_mount().is_ok_and(|mount| super::cgroup::has_controller(&mount, "io"));
        let resolves = |name: &str| {
            wanted(config).zip(&resolved).any(|(probe, found)| probe.tracepoint == name && found.is_ok())
        };
        let by_submitter = resolves(BLOCK_IO_START);
        let faults_begin = resolves(PAGE_FAULT);
        let fault_kinds = wanted_events(config).count() as u32;
        let children_known = CHILD_PROBES.iter().all(|probe| resolves(probe.tracepoint));
        let words = [
            (g::SLOT_COUNT, config.slots),
            (g::BLOCK_SHARD_MASK, shards - 1),
            (g::BLOCK_SHARDS_SHARED, (shards < cpus).into()),
            (g::SWITCH_HAS_STATE, states.is_ok().into()),
            (g::EXACT, exact.into()),
            (g::FAULT_KINDS, fault_kinds),
            (g::RETRANSMIT_HAS_ERROR, retransmit_has_error.into()),
            (g::SOCK_DONE, sock_done),
            (g::TASK_IN_IOWAIT_MASK, states.as_ref().map_or(0, |(_, mask)| u32::from(*mask))),
            (g::REQUEST_BACKGROUND, background),
            (g::BLOCK_BY_BLKCG, by_blkcg.into()),
            (g::BLOCK_BY_SUBMITTER, by_submitter.into()),
            (g::CHILDREN_KNOWN, children_known.into()),
        ];
        let log_level: u8 = if config.debug_programs { 4 } else { 0 };
        let mut offsets: Vec<(&str, u64)> = resolved.iter().flatten().flatten().copied().collect();
        offsets.extend(states.as_ref().ok().map(|(byte, _)| (g::TASK_IN_IOWAIT, *byte)));

        let block_entries = block_records(shards, config.slots);
        let btf =
            Btf::from_sys_fs().map_err(|error| format!("read the kernel's type information: {error}"))?;
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf)).override_global(g::AYA_LOG_LEVEL, &log_level, true);
        loader.map_max_entries(map_names::SLOTS, cpus * config.slots);
        loader.map_max_entries(map_names::NEIGHBOURS, cpus * config.slots);
        loader.map_max_entries(map_names::FAULTS, cpus * config.slots * fault_kinds);
        loader.map_max_entries(map_names::BLOCKS, block_entries);
        loader.map_max_entries(map_names::UNOWNED, cpus);
        loader.map_max_entries(map_names::TALLIES, cpus);
        loader.map_max_entries(map_names::WAITERS, if exact { WAITER_PLACES } else { 1 });
        for (name, value) in &words {
            loader.override_global(name, value, true);
        }
        for (name, offset) in &offsets {
            loader.override_global(name, offset, true);
        }
        let mut ebpf =
            loader.load(object).map_err(|error| format!("load the eBPF object: {}", chain(&error)))?;

        let map = |name: &str, ebpf: &mut Ebpf| {
            ebpf.take_map(name).ok_or_else(|| format!("the eBPF object has no map {name}: build it again"))
        };
        let unmapped =
            |name: &str, error: &dyn std::fmt::Display| format!("use the eBPF map {name}: {error}");
        // The programs find their maps by file descriptor when they are loaded: the maps stay open in `Maps`.
        let cgroups = Array::try_from(map(map_names::CGROUPS, &mut ebpf)?)
            .map_err(|error| unmapped(map_names::CGROUPS, &error))?;
        let devices = Array::try_from(map(map_names::DEVICES, &mut ebpf)?)
            .map_err(|error| unmapped(map_names::DEVICES, &error))?;
        let disk_users = HashMap::try_from(map(map_names::DISK_USERS, &mut ebpf)?)
            .map_err(|error| unmapped(map_names::DISK_USERS, &error))?;
        let slots = mapped(&ebpf, map_names::SLOTS, cpus * config.slots)?;
        let blocks = BlockRecords::new(&ebpf, config.slots, shards)?;
        let neighbours = mapped(&ebpf, map_names::NEIGHBOURS, cpus * config.slots)?;
        let faults = mapped(&ebpf, map_names::FAULTS, cpus * config.slots * fault_kinds)?;
        let faults_begun = mapped_words(&ebpf, map_names::FAULTS_BEGUN, FAULT_PLACES, size_of::<u64>())?;
        let unowned = mapped(&ebpf, map_names::UNOWNED, cpus)?;
        let tallies = mapped(&ebpf, map_names::TALLIES, cpus)?;
        let waiters = if exact {
            Some(mapped_words(&ebpf, map_names::WAITERS, WAITER_PLACES, size_of::<u64>())?)
        } else {
            None
        };
        let connections = Connections::new(&mut ebpf)?;
        let tcp_era = Array::try_from(map(map_names::TCP_ERA, &mut ebpf)?)
            .map_err(|error| unmapped(map_names::TCP_ERA, &error))?;

        let without_exact = "not attached: profile.exact can't be had here, as others of its programs can't";
        let links = &mut self.links;
        let children = if children_known { Some(Children::new(&ebpf)?) } else { None };
        self.statuses = wanted(config)
            .zip(resolved)
            .map(|(probe, found)| {
                let name = probe.tracepoint;
                let attached = match found {
                    Err(reason) => Err(reason),
                    // They would be called at every wake-up, for nothing.
                    Ok(_) if is_of_exact_mode(probe) && !exact => Err(without_exact.to_owned()),
                    Ok(_) => match called_by(name) {
                        Some(by) => connections::attach(&mut ebpf, name, by, Some(&btf)),
                        None => attach(&mut ebpf, name, &btf).map(Link::Tracepoint),
                    },
                };
                status(name, attached.map(|link| _ = links.insert(name, link)))
            })
            .collect();
        for name in wanted_events(config) {
            let attached = if faults_begin {
                fault_latency::attach(&mut ebpf, name, true)
            } else {
                Err(format!("without {PAGE_FAULT} it has nothing to time"))
            };
            let outcome = attached.map(|all| _ = links.insert(name, Link::Event(all)));
            self.statuses.push(status(name, outcome));
        }
        self.drop_idle_faults();
        let counts = |name| self.statuses.iter().any(|of| of.name == name && of.state == ProbeState::Active);
        let states = match states {
            Ok(_) if counts(SCHED_SWITCH) => ProbeState::Active,
            Ok(_) => ProbeState::Unavailable { reason: format!("without {SCHED_SWITCH} there is none") },
            Err(reason) => ProbeState::Unavailable { reason },
        };
        self.statuses.push(ProbeStatus { name: SWITCH_STATE.to_owned(), state: states });
        if config.debug_programs {
            self.flush_log = log_reader(&mut ebpf);
        }
        let children = children.filter(|_| self.are_active(&CHILD_PROBES.map(|probe| probe.tracepoint)));
        let cgroups = CgroupTable::new(cgroups);
        let disk_users = DiskUsers::new(disk_users);
        self.maps = Some(Maps {
            cgroups,
            children,
            devices,
            slots,
            blocks,
            neighbours,
            disk_users,
            faults,
            unowned,
            tallies,
            waiters,
            connections,
            tcp_era: (tcp_era, 0),
            faults_begun,
            fault_kinds,
            cpus,
        });
        self.ebpf = Some(ebpf);
        Ok(())
    }

    /// Where nothing would be told of faults, takes the programs away that see them begin, or end: each fault on the host would pay for nothing.
    fn drop_idle_faults(&mut self) {
        let needed = [PAGE_FAULT, MAJOR_FAULTS];
        let Some(missing) = needed.into_iter().find(|name| !self.are_active(&[*name])) else { return };
        let is_idle = |name: &str| Tier::of(name) == Some(Tier::Faults);
        self.links.retain(|name, _| !is_idle(name));
        for status in self.statuses.iter_mut().filter(|of| is_idle(&of.name)) {
            if status.state == ProbeState::Active {
                let reason = format!("not attached: without {missing} it would cost something for nothing");
                status.state = ProbeState::Unavailable { reason };
            }
        }
    }

    /// Whether all of these count.
    pub(super) fn are_active(&self, names: &[&str]) -> bool {
        let active = |name: &&str| {
            self.statuses.iter().any(|status| status.name == *name && status.state == ProbeState::Active)
        };
        names.iter().all(active)
    }

    /// Takes over what has gone over the connections that are known; `false`: nobody knows.
    pub(super) fn count_connections(&self) -> bool {
        let (Some(_), Some(ebpf), Some(maps)) = (self.links.get(connections::KNOWN), &self.ebpf, &self.maps)
        else {
            return false;
        };
        let counted = maps.connections.count(ebpf);
        if let Err(error) = &counted {
            tracing::warn!(error, "what went over TCP connections can't be counted");
        }
        counted.is_ok()
    }

    /// Finds connections that a process has, and that were there before they could be seen to begin; `true`: those of all processes, as this kernel knows no
    /// other way.
    pub(super) fn find_connections(&self, pid: i32) -> io::Result<bool> {
        let Some(Link::Sockets(program)) = self.links.get(connections::SOCKETS) else { return Ok(false) };
        let (walk, is_of_all) = Walk::over_process(program.as_fd(), pid)?;
        walk.run()?;
        Ok(is_of_all)
    }

    /// Passes the programs' own messages on to the agent's log.
    pub(super) fn flush_log(&mut self) {
        if let Some(flush) = &mut self.flush_log {
            flush();
        }
    }

    /// What each program has cost while the statistics were on; empty if they never were.
    pub(super) fn costs(&self) -> Vec<ProgramCost> {
        match &self.measured_since {
            // To ask the kernel is some system calls: they are asked for in each window.
            Some(measured) if self.always_measured => self.costs_since(measured),
            _ => self.costs.clone(),
        }
    }

    /// A window ends: if it was measured, what each program has cost is known anew.
    pub(super) fn note_costs(&mut self) {
        let Some(measured) = self.measured_since.take() else { return };
        self.costs = self.costs_since(&measured);
        if self.always_measured {
            self.begin_to_measure();
        }
    }

    fn costs_since(&self, (since, before): &(Instant, BTreeMap<String, u64>)) -> Vec<ProgramCost> {
        let elapsed_ns = since.elapsed().as_nanos().max(1) as f64;
        let cost = |(name, runs, ran_ns): (&str, u64, u64)| {
            let missed = self.missed(name);
            let ns_per_run = if runs == 0 { 0.0 } else { ran_ns as f64 / runs as f64 };
            let ran_before = before.get(name).copied().unwrap_or(0);
            let core_share = Some(ran_ns.saturating_sub(ran_before) as f64 / elapsed_ns);
            ProgramCost { name: name.to_owned(), runs, ns_per_run, core_share, missed }
        };
        self.ran().map(cost).collect()
    }

    /// How often the kernel did not run a program as it was running already.
    fn missed(&self, name: &str) -> Option<u64> {
        let fd = self.ebpf.as_ref()?.program(name)?.fd().ok()?;
        // No library asks for it otherwise.
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd())).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"))?;
        line.trim().parse().ok()
    }

    fn begin_to_measure(&mut self) {
        let ran = self.ran().map(|(name, _, ran_ns)| (name.to_owned(), ran_ns)).collect();
        self.measured_since = Some((Instant::now(), ran));
    }

    /// How long the programs of each tier, and those in none, ran while the statistics were on, in nanoseconds.
    pub(super) fn ran_by_tier(&self) -> ByTier<u64> {
        let mut all: ByTier<u64> = Tier::ALL.into_iter().map(|tier| (Some(tier), 0)).collect();
        for (name, _, ran_ns) in self.ran() {
            *all.entry(Tier::of(name)).or_default() += ran_ns;
        }
        all
    }

    /// Each program, how often it ran, and for how long in nanoseconds.
    fn ran(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        let of = |(name, program): (_, &aya::programs::Program)| {
            let info = program.info().ok()?;
            Some((name, info.run_count(), info.run_time().as_nanos() as u64))
        };
        self.ebpf.iter().flat_map(Ebpf::programs).filter_map(of)
    }

    /// From now on the kernel measures the programs.
    pub(super) fn measure(&mut self) {
        if self.statistics.is_none() {
            match enable_stats(Stats::RunTime) {
                Ok(statistics) => self.statistics = Some(statistics),
                Err(error) => {
                    tracing::warn!(%error, "the cost of the eBPF programs can't be measured");
                    return;
                }
            }
        }
        if self.measured_since.is_none() {
            self.begin_to_measure();
        }
    }

    /// No longer, unless it is always to.
    pub(super) fn stop_measuring(&mut self) {
        if !self.always_measured {
            self.statistics = None;
        }
    }

    /// Takes a tier's programs off their tracepoints and events: they cost nothing any more.
    pub(super) fn drop_tier(&mut self, tier: Tier, reason: &str) {
        self.links.retain(|name, _| Tier::of(name) != Some(tier));
        for status in &mut self.statuses {
            if Tier::of(&status.name) == Some(tier) && status.state == ProbeState::Active {
                status.state = ProbeState::Dropped { reason: reason.to_owned() };
            }
        }
    }

    /// Whether a tier's programs are off their tracepoints and events.
    pub(super) fn is_dropped(&self, tier: Tier) -> bool {
        let dropped = |of: &ProbeStatus| matches!(of.state, ProbeState::Dropped { .. });
        self.statuses.iter().any(|of| Tier::of(&of.name) == Some(tier) && dropped(of))
    }

    /// Puts them back: all of them, else none, and `false`: they are still dropped then, and it may be tried again.
    pub(super) fn return_tier(&mut self, tier: Tier) -> bool {
        let Some(ebpf) = &mut self.ebpf else { return true };
        let mut failed = None;
        if let Some(maps) = &mut self.maps {
            maps.forget_begun(tier);
        }
        let is_due = |of: &ProbeStatus| {
            Tier::of(&of.name) == Some(tier) && matches!(of.state, ProbeState::Dropped { .. })
        };
        for status in self.statuses.iter_mut().filter(|of| is_due(of)) {
            let Some(name) = with_program(&status.name) else { continue };
            let attached = if fault_latency::at_event(name).is_some() {
                fault_latency::attach(ebpf, name, false).map(Link::Event)
            } else if let Some(by) = called_by(name) {
                connections::attach(ebpf, name, by, None)
            } else {
                attach_again(ebpf, name).map(Link::Tracepoint)
            };
            status.state = match attached {
                Ok(link) => {
                    self.links.insert(name, link);
                    ProbeState::Active
                }
                Err(reason) => {
                    let reason = format!("it could not be attached again: {reason}");
                    failed = Some(format!("{}: {reason}", status.name));
                    ProbeState::Dropped { reason }
                }
            };
        }
        // It has no program of its own: it is there if that is there which it belongs to.
        let switch = self.statuses.iter().find(|of| of.name == SCHED_SWITCH).map(|of| of.state.clone());
        let due = self.statuses.iter_mut().find(|of| of.name == SWITCH_STATE && is_due(of));
        if let (Some(status), Some(state)) = (due, switch) {
            status.state = state;
        }
        if let Some(reason) = &failed {
            tracing::warn!(%tier, "{reason}");
            self.drop_tier(tier, reason);
        }
        failed.is_none()
    }
}

impl Maps {
    /// What began before a tier's programs were taken away: they have not seen how it went on.
    fn forget_begun(&mut self, tier: Tier) {
        let words = match tier {
            Tier::Scheduler => self.waiters.as_ref(),
            Tier::Faults => Some(&self.faults_begun),
            Tier::Block => None,
            Tier::Tcp => {
                let (map, era) = &mut self.tcp_era;
                *era += 1;
                if let Err(error) = map.set(0, *era, 0) {
                    tracing::warn!(%error, "what went over TCP connections meanwhile is counted at once");
                }
                None
            }
        };
        if let Some(words) = words {
            words.clear(|word| word != 0);
        }
    }
}

/// What is in a tier and a program of its own.
fn with_program(name: &str) -> Option<&'static str> {
    let all = PROBES.iter().chain(&CONNECTION_PROBES).chain(&EXACT_PROBES).chain(&FAULT_PROBES);
    let all = all.map(|probe| probe.tracepoint);
    all.chain(fault_latency::at_event(name)).find(|found| *found == name)
}

fn is_of_exact_mode(probe: &Probe) -> bool {
    EXACT_PROBES.iter().any(|of| of.tracepoint == probe.tracepoint)
}

/// Maps a table of sets, each of so many bytes, into memory.
pub(super) fn mapped_words(
    ebpf: &Ebpf,
    name: &str,
    sets: u32,
    set_bytes: usize,
) -> Result<MappedWords, String> {
    let Some(Map::Array(map)) = ebpf.map(name) else {
        return Err(format!("the eBPF object has no array map {name}: build it again"));
    };
    let words = sets * (set_bytes / size_of::<u64>()) as u32;
    MappedWords::new(map.fd(), words).map_err(|error| format!("map {name} into memory: {error}"))
}

pub(super) fn mapped<T: BpfRecord>(ebpf: &Ebpf, name: &str, entries: u32) -> Result<MappedArray<T>, String> {
    let Some(Map::Array(map)) = ebpf.map(name) else {
        return Err(format!("the eBPF object has no array map {name}: build it again"));
    };
    MappedArray::new(map.fd(), entries).map_err(|error| format!("map {name} into memory: {error}"))
}

pub(super) fn attach(ebpf: &mut Ebpf, tracepoint: &str, btf: &Btf) -> Result<BtfTracePointLink, String> {
    attach_program(ebpf, tracepoint, tracepoint, btf)
}

/// The same for a program that is not called as its tracepoint is.
pub(super) fn attach_program(
    ebpf: &mut Ebpf,
    name: &str,
    tracepoint: &str,
    btf: &Btf,
) -> Result<BtfTracePointLink, String> {
    let program = typed(ebpf, name)?;
    program
        .load(tracepoint, btf)
        .map_err(|error| format!("the kernel refuses the program: {}", chain(&error)))?;
    attach_again(ebpf, name)
}

/// Attaches a program that is loaded.
fn attach_again(ebpf: &mut Ebpf, name: &str) -> Result<BtfTracePointLink, String> {
    let program = typed(ebpf, name)?;
    let attached = program.attach().and_then(|link| program.take_link(link));
    attached.map_err(|error| format!("attach to the tracepoint: {}", chain(&error)))
}

fn typed<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut BtfTracePoint, String> {
    let program = ebpf.program_mut(name).ok_or("the eBPF object has no such program: build it again")?;
    program.try_into().map_err(|error| chain(&error))
}

fn log_reader(ebpf: &mut Ebpf) -> Option<Box<dyn FnMut() + Send>> {
    match aya_log::EbpfLogger::init(ebpf) {
        Ok(mut logger) => Some(Box::new(move || logger.flush())),
        Err(error) => {
            tracing::warn!(%error, "the eBPF programs' messages can't be read");
            None
        }
    }
}

fn status(name: &str, outcome: Result<(), String>) -> ProbeStatus {
    let state = match outcome {
        Ok(()) => ProbeState::Active,
        Err(reason) => ProbeState::Unavailable { reason },
    };
    ProbeStatus { name: name.to_owned(), state }
}

/// An error with its causes. Of a verifier's log, which goes to the debug log whole, the last lines say why.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() <= VERIFIER_LINES + 1 {
        return text;
    }
    tracing::debug!(%text, "refused eBPF program");
    format!("{} .. {}", lines[0], lines[lines.len() - VERIFIER_LINES..].join("; "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_a_tier_loses_is_found_again() {
        let all = PROBES.iter().chain(&CONNECTION_PROBES).chain(&EXACT_PROBES).chain(&FAULT_PROBES);
        let all = all.map(|probe| probe.tracepoint);
        for name in all.filter(|name| Tier::of(name).is_some()).chain([MAJOR_FAULTS, MINOR_FAULTS]) {
            assert_eq!(with_program(name), Some(name));
            assert!(Tier::of(name).is_some());
        }
        assert!(EXACT.iter().all(|name| *name == SWITCH_STATE || with_program(name).is_some()));
        assert!(with_program(SWITCH_STATE).is_none() && Tier::of(SWITCH_STATE) == Some(Tier::Scheduler));
    }

    fn there(probes: &Probes) -> Vec<&'static str> {
        probes.links.keys().copied().collect()
    }

    #[test]
    fn a_tier_that_can_not_return_as_a_whole_stays_dropped_and_may_return_later() {
        let mut probes = Probes::load(&ProfileConfig { slots: 1, ..ProfileConfig::default() });
        if !probes.are_active(&[SCHED_SWITCH, SWITCH_STATE]) {
            eprintln!("not tested: {:?}", probes.statuses);
            return;
        }
        let (links, statuses) = (there(&probes), probes.statuses.clone());
        probes.drop_tier(Tier::Scheduler, "a test");
        // It was never loaded: it can't be attached, and the others can.
        let waking = statuses.iter().position(|of| of.name == SCHED_WAKING).unwrap();
        probes.statuses[waking].state = ProbeState::Dropped { reason: "a test".to_owned() };
        assert!(!probes.return_tier(Tier::Scheduler));
        assert!(there(&probes).iter().all(|name| Tier::of(name) != Some(Tier::Scheduler)));
        assert!(probes.is_dropped(Tier::Scheduler) && !probes.is_dropped(Tier::Block));
        let is_off = |of: &ProbeStatus| matches!(of.state, ProbeState::Off { .. });
        let of_tier = probes.statuses.iter().filter(|of| Tier::of(&of.name) == Some(Tier::Scheduler));
        for status in of_tier.filter(|of| !is_off(of)) {
            let ProbeState::Dropped { reason } = &status.state else { panic!("{status:?}") };
            assert!(reason.contains("it could not be attached again"), "{status:?}");
        }
        probes.statuses[waking] = statuses[waking].clone();
        assert!(probes.return_tier(Tier::Scheduler));
        assert_eq!((there(&probes), &probes.statuses), (links, &statuses));
    }

    #[test]
    fn what_the_configuration_does_not_ask_for_is_off_and_stays_so() {
        let off = |probes: &Probes| {
            let off = probes.statuses.iter().filter_map(|of| match &of.state {
                ProbeState::Off { reason } => Some(format!("{}: {reason}", of.name)),
                _ => None,
            });
            off.collect::<Vec<_>>()
        };
        let config = ProfileConfig { slots: 1, ..ProfileConfig::default() };
        let mut probes = Probes::load(&config);
        if probes.maps.is_none() {
            eprintln!("not tested: {:?}", probes.statuses);
            return;
        }
        let expected = [
            "sched_waking: profile.exact is false",
            "sched_wakeup_new: profile.exact is false",
            "minor_faults: profile.minor_faults is false",
        ];
        assert_eq!(off(&probes), expected);
        for tier in Tier::ALL {
            probes.drop_tier(tier, "a test");
            assert!(probes.return_tier(tier));
        }
        assert_eq!(off(&probes), expected);
        let all = Probes::load(&ProfileConfig { exact: true, minor_faults: true, ..config });
        assert!(off(&all).is_empty(), "{:?}", all.statuses);
        let names = |of: &Probes| of.statuses.iter().map(|of| of.name.clone()).collect::<BTreeSet<_>>();
        assert_eq!(names(&probes), names(&all), "all are told of, whatever is asked for");
        assert_eq!(names(&probes).len(), probes.statuses.len(), "once: {:?}", probes.statuses);
    }

    #[test]
    fn a_tier_that_returns_has_all_of_its_programs_again() {
        let mut probes = Probes::load(&ProfileConfig {
            slots: 1,
            exact: true,
            minor_faults: true,
            ..ProfileConfig::default()
        });
        if probes.maps.is_none() {
            eprintln!("not tested: {:?}", probes.statuses);
            return;
        }
        let (links, statuses) = (there(&probes), probes.statuses.clone());
        for tier in Tier::ALL {
            probes.drop_tier(tier, "a test");
            assert!(there(&probes).iter().all(|name| Tier::of(name) != Some(tier)));
            assert!(probes.return_tier(tier));
            assert_eq!((there(&probes), &probes.statuses), (links.clone(), &statuses));
        }
    }
}
