//! Which features of the kernel are there, and what each lack costs. Leaves nothing changed.

use std::{fs, path::Path};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serde::Serialize;

use super::{
    ProbeState, ProbeStatus, ProfileConfig,
    btf::{KERNEL_BTF, KernelTypes},
    cgroup,
    connections::{CalledBy, called_by},
    fault_latency,
    probes::{Probes, SWITCH_STATE},
    sources::{Host, Source},
};
use crate::sys;

/// One feature that rswap uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// What it is called.
    pub name: String,
    /// Whether it is there.
    pub present: bool,
    /// What was found, or how it was missed.
    pub detail: String,
    /// What does not work without it.
    pub cost_of_lack: String,
    /// Who can't do without it.
    pub needed_by: Needed,
    /// How it is had, where somebody can't do without it.
    pub remedy: String,
}

/// Who can't do without a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Needed {
    /// Nobody: less is seen, or it is done otherwise.
    Never,
    /// A migration, at both ends.
    ByMigrations,
    /// A migration of an instance that has an address of its own, at both ends.
    ByAddresses,
    /// An arrival from a host that was started at another time.
    ByOtherClocks,
}

/// What was found, or how it was missed.
pub(super) type Finding = Result<String, String>;

pub(crate) fn feature(name: &str, finding: Finding, cost_of_lack: &str) -> Feature {
    let (present, detail) = match finding {
        Ok(detail) => (true, detail),
        Err(detail) => (false, detail),
    };
    let (name, cost_of_lack) = (name.to_owned(), cost_of_lack.to_owned());
    Feature { name, present, detail, cost_of_lack, needed_by: Needed::Never, remedy: String::new() }
}

/// Looks for everything that rswap uses of the kernel. Needs root, as the agent does.
pub fn features() -> Vec<Feature> {
    let types = KernelTypes::of_this_kernel();
    let mut found = vec![feature(
        "BTF",
        types.as_ref().map(|_| KERNEL_BTF.to_owned()).map_err(|error| format!("{error} ({KERNEL_BTF})")),
        "no eBPF probe loads: profiles hold only what cgroup and /proc say",
    )];
    let types = types.ok();
    // Nothing but loading and attaching them shows that they work; they are detached again at once.
    let probes = Probes::load(&ProfileConfig {
        slots: 1,
        exact: true,
        minor_faults: true,
        ..ProfileConfig::default()
    })
    .statuses;
    found.push(feature("eBPF typed tracepoints (tp_btf)", typed_tracepoints(&probes), "no eBPF probe loads"));
    for ProbeStatus { name, state } in probes {
        let finding = match state {
            ProbeState::Active => Ok("the program loads and attaches".to_owned()),
            ProbeState::Unavailable { reason } | ProbeState::Dropped { reason } => Err(reason),
            // All were asked for.
            ProbeState::Off { .. } => continue,
        };
        let kind = match (fault_latency::at_event(&name), called_by(&name)) {
            (Some(_), _) => "software event",
            (None, Some(CalledBy::Iterator(_))) => "iterator",
            (None, Some(CalledBy::Agent)) => "program",
            (None, None) => "tracepoint",
        };
        found.push(feature(&format!("{kind} {name}"), finding, probe_cost(&name)));
    }
    let host = Host::this();
    found.extend(Source::ALL.map(|source| source.feature(source.find(&host))));
    found.extend(control_group_features());
    found.extend(migration_features());
    for (name, structure) in [("bridge", "net_bridge"), ("veth", "veth_priv")] {
        found.push(feature(
            name,
            network_driver(name, structure, types.as_ref()),
            "instances get no network namespace of their own: they can't keep their address when they migrate",
        ));
    }
    found
}

fn probe_cost(tracepoint: &str) -> &'static str {
    match tracepoint {
        "sched_switch" => "no run-queue latency and no on-CPU times",
        "sched_migrate_task" => "no count of how often threads go from one core to another",
        "sched_waking" | "sched_wakeup_new" => "profile.exact has no effect",
        SWITCH_STATE => "time off the CPU is not told apart by its reason",
        "block_rq_complete" => "no block latency and no block bytes",
        "block_io_start" => "block I/O is charged to instances only where cgroup v2 has the io controller",
        "cgroup_mkdir" | "cgroup_release" => {
            "cgroups in an instance's own that live for less than a window are not counted"
        }
        "inet_sock_set_state" => {
            "no count of TCP connections, nor how long they last, nor of what goes over them"
        }
        "tcp_connections" => "no count of TCP bytes, and no round-trip times",
        "tcp_sockets" => "TCP connections that an instance has already when it comes are not counted",
        "tcp_retransmit_skb" => "no count of what TCP sends again",
        "page_fault_user" | "major_faults" => "how long page faults take is not told",
        "page_fault_kernel" => "how long page faults in system calls take is not told",
        "minor_faults" => "profile.minor_faults has no effect",
        _ => "some events are not counted",
    }
}

fn typed_tracepoints(probes: &[ProbeStatus]) -> Finding {
    let is_off = |state: &ProbeState| matches!(state, ProbeState::Off { .. });
    let programs = || probes.iter().filter(|probe| probe.name != SWITCH_STATE && !is_off(&probe.state));
    let active = programs().filter(|probe| probe.state == ProbeState::Active).count();
    match (active, probes.first()) {
        (0, Some(ProbeStatus { state: ProbeState::Unavailable { reason }, .. })) => Err(reason.clone()),
        _ => Ok(format!("{active} of {} programs attach", programs().count())),
    }
}

fn control_group_features() -> Vec<Feature> {
    let mount = cgroup::unified_mount();
    let cpuset = match &mount {
        Ok(mount) if cgroup::has_controller(mount, "cpuset") => Ok("in cgroup.controllers".to_owned()),
        Ok(mount) => Err(format!("not in {}/cgroup.controllers", mount.display())),
        Err(_) => Err("no cgroup v2".to_owned()),
    };
    vec![
        feature(
            "cgroup v2",
            mount.map(|mount| mount.display().to_string()).map_err(|error| error.to_string()),
            "no instance can be started or adopted",
        ),
        feature("cgroup v2 cpuset", cpuset, "cores are set thread by thread instead (affinity)"),
    ]
}

/// What migrations need of the kernel, or some of them. Cheap enough to be asked before each.
pub fn migration_features() -> Vec<Feature> {
    let scan = pagemap_scan();
    // Both came with the same version of Linux (6.7), and userfaultfd shows this file since 5.2.
    let uffd = match &scan {
        Ok(_) if Path::new("/proc/sys/vm/unprivileged_userfaultfd").exists() => {
            Ok("userfaultfd, and a kernel new enough for asynchronous write protection".to_owned())
        }
        Ok(_) => Err("no userfaultfd".to_owned()),
        Err(_) => Err("asynchronous write protection came with PAGEMAP_SCAN".to_owned()),
    };
    let there = |path: &str| {
        if Path::new(path).exists() { Ok(path.to_owned()) } else { Err(format!("no {path}")) }
    };
    let namespace = |kind: &str| there(&format!("/proc/self/ns/{kind}"));
    let own = std::process::id() as i32;
    let kcmp = match sys::process::has_in_common(own, own, sys::process::Common::Descriptors) {
        Ok(_) => Ok("answers".to_owned()),
        Err(error) => Err(format!("kcmp: {error}")),
    };
    let no_tracking = "instances can't be migrated while they run: writes can't be tracked";
    let no_restore = "instances can't be migrated: what they are can't all be seen, nor made again";
    let no_namespaces =
        "instances can't be migrated: their pids, names and SysV objects could be taken at the destination";
    let of_namespaces = "a kernel with CONFIG_PID_NS, CONFIG_UTS_NS, CONFIG_IPC_NS and CONFIG_NET_NS";
    use Needed::{ByAddresses, ByMigrations, ByOtherClocks};
    [
        (
            feature("userfaultfd, asynchronous write protection", uffd, no_tracking),
            ByMigrations,
            "Linux 6.7 or later with CONFIG_USERFAULTFD",
        ),
        (
            feature("PAGEMAP_SCAN", scan, no_tracking),
            ByMigrations,
            "Linux 6.7 or later with CONFIG_PROC_PAGE_MONITOR",
        ),
        (
            // It has come with the other things of this setting, of which some have nothing to be seen by.
            feature("checkpoint and restore", there("/proc/self/timers"), no_restore),
            ByMigrations,
            "a kernel with CONFIG_CHECKPOINT_RESTORE and CONFIG_POSIX_TIMERS",
        ),
        (feature("kcmp", kcmp, no_restore), ByMigrations, "a kernel with CONFIG_KCMP"),
        (feature("PID namespaces", namespace("pid"), no_namespaces), ByMigrations, of_namespaces),
        (feature("UTS namespaces", namespace("uts"), no_namespaces), ByMigrations, of_namespaces),
        (feature("IPC namespaces", namespace("ipc"), no_namespaces), ByMigrations, of_namespaces),
        (
            feature(
                "network namespaces",
                namespace("net"),
                "instances get no address of their own, which could go with them",
            ),
            ByAddresses,
            of_namespaces,
        ),
        (
            feature(
                "time namespaces",
                namespace("time"),
                "instances can't be taken from hosts that were started at another time: their clocks would jump",
            ),
            ByOtherClocks,
            "Linux 5.6 or later with CONFIG_TIME_NS",
        ),
        (
            feature("TCP_REPAIR", tcp_repair(), "established connections can't go along with a migration"),
            ByAddresses,
            "an agent that runs as root with CAP_NET_ADMIN",
        ),
    ]
    .map(|(feature, needed_by, remedy)| Feature { needed_by, remedy: remedy.to_owned(), ..feature })
    .into()
}

fn pagemap_scan() -> Finding {
    let mut pagemap = sys::pagemap::Pagemap::open(std::process::id() as i32)
        .map_err(|error| format!("open pagemap: {error}"))?;
    // Nothing is ever mapped at the lowest page: the scan finds nothing, but says whether it is known.
    pagemap
        .scan(0, 4096, sys::pagemap::Query::default(), &mut Vec::new())
        .map(|()| "answers".to_owned())
        .map_err(|error| format!("ioctl on /proc/self/pagemap: {error}"))
}

fn tcp_repair() -> Finding {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|error| format!("make a TCP socket: {error}"))?;
    sys::socket::set_option(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)
        .map(|()| "a socket of ours went into repair mode".to_owned())
        .map_err(|error| format!("setsockopt TCP_REPAIR (root is needed): {error}"))
}

/// Whether a network driver is built in, loaded, or there to be loaded. None is made to find out.
fn network_driver(module: &str, structure: &str, types: Option<&KernelTypes>) -> Finding {
    if types.is_some_and(|types| types.has_struct(structure)) {
        return Ok("built into the kernel".to_owned());
    }
    if Path::new("/sys/module").join(module).exists() {
        return Ok("loaded".to_owned());
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release.trim());
    let listed = |file: &str| {
        let text = fs::read_to_string(modules.join(file)).unwrap_or_default();
        text.lines().any(|line| line.contains(&format!("/{module}.ko")))
    };
    if listed("modules.builtin") || listed("modules.dep") {
        return Ok(format!("in {}", modules.display()));
    }
    Err(format!("neither in the kernel nor among {}", modules.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Profiler;

    #[test]
    fn every_feature_says_what_was_found_and_what_its_lack_costs() {
        let features = features();
        for feature in &features {
            println!("{} {}: {}", if feature.present { "+" } else { "-" }, feature.name, feature.detail);
            assert!(!feature.detail.is_empty() && !feature.cost_of_lack.is_empty(), "{feature:?}");
            assert_eq!(feature.needed_by == Needed::Never, feature.remedy.is_empty(), "{feature:?}");
        }
        assert!(features.len() >= 15);
    }

    #[test]
    fn the_status_says_the_same_of_what_profiles_are_made_of() {
        let features = features();
        let config = ProfileConfig { slots: 1, written_budget: 0.1, ..ProfileConfig::default() };
        let statuses = Profiler::start(&config).probes();
        for source in Source::ALL {
            let of_source = |name: &str| name == source.name();
            let feature = features.iter().find(|of| of_source(&of.name));
            let feature = feature.unwrap_or_else(|| panic!("no {}", source.name()));
            let told: Vec<_> = statuses.iter().filter(|of| of_source(&of.name)).collect();
            let [status] = told[..] else { panic!("{}: {told:?}", source.name()) };
            // Devices may have come or gone meanwhile.
            if !matches!(source, Source::BlockTimes | Source::BlockSplit) {
                let reason = format!("{}: {}", feature.detail, feature.cost_of_lack);
                let missing = ProbeState::Unavailable { reason };
                assert_eq!(status.state, if feature.present { ProbeState::Active } else { missing });
            }
        }
    }
}
