//! What profiles are made of beside the eBPF programs: by which name it is told of, whether this host has it, and what its lack costs. `rswap doctor` and
//! the status ask here, and so say the same.

mod queues;

use std::{fs, path::PathBuf};

use super::{
    ProbeState, ProbeStatus, ages, cgroup,
    doctor::{Feature, Finding, feature},
    listeners,
};
use queues::Queue;

/// After so many windows it is looked again at what may have changed.
const LOOK_AFTER_WINDOWS: u32 = 30;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The processor's marks on pages that are used.
    Ages,
    /// Writes that userfaultfd notes.
    WrittenAges,
    /// The memory controller of cgroup v2.
    MemoryController,
    /// Its io controller.
    IoController,
    /// When requests were made, and when the driver was given them: one of both.
    BlockTimes,
    /// Both.
    BlockSplit,
    /// What sock_diag(7) says of sockets that listen.
    ListenDrops,
    /// PSI of cgroups, for each resource.
    CpuPressure,
    /// The same.
    MemoryPressure,
    /// The same.
    IoPressure,
}

/// Where the kernel tells of this host.
#[derive(Debug)]
pub(super) struct Host {
    proc: PathBuf,
    block: PathBuf,
    /// Where cgroup v2 is mounted.
    unified: Option<PathBuf>,
}

impl Host {
    pub(super) fn this() -> Self {
        let unified = cgroup::unified_mount().ok();
        Self { proc: "/proc".into(), block: "/sys/block".into(), unified }
    }
}

impl Source {
    pub(super) const ALL: [Self; 10] = [
        Self::Ages,
        Self::WrittenAges,
        Self::MemoryController,
        Self::IoController,
        Self::BlockTimes,
        Self::BlockSplit,
        Self::ListenDrops,
        Self::CpuPressure,
        Self::MemoryPressure,
        Self::IoPressure,
    ];

    /// What it is called, and what does not work without it.
    fn told(self) -> (&'static str, &'static str) {
        match self {
            Self::Ages => ("memory.ages", "how much memory is used over which time is not told"),
            Self::WrittenAges => ("memory.written_ages", "profile.written_budget has no effect"),
            Self::MemoryController => (
                "cgroup.memory",
                "memory and page faults are added up over processes, so that what these share counts for each, and \
                 memory.refaults is null",
            ),
            Self::IoController => (
                "cgroup.io",
                "block I/O is charged to who makes the request, and what is written back later to nobody",
            ),
            Self::BlockTimes => {
                ("block.times", "requests of these devices count as if they had taken no time")
            }
            Self::BlockSplit => {
                ("block.split", "requests of these devices are not_split: queue_ns has no times of them")
            }
            Self::ListenDrops => {
                ("tcp.listen_drops", "connections that are dropped before they are accepted are not counted")
            }
            Self::CpuPressure => ("cpu.pressure", "cpu.pressure_some and pressure_full are null"),
            Self::MemoryPressure => ("memory.pressure", "memory.pressure_some and pressure_full are null"),
            Self::IoPressure => (
                "io.pressure",
                "what io says of pressure is null, and a volume that moves is copied as fast as it goes, whoever waits for I/O",
            ),
        }
    }

    pub(super) fn name(self) -> &'static str {
        self.told().0
    }

    /// Whether it may come and go while the agent runs: devices do, and what is set of them, and controllers are enabled.
    fn may_change(self) -> bool {
        matches!(self, Self::BlockTimes | Self::BlockSplit | Self::MemoryController | Self::IoController)
    }

    /// Looks whether the host has it.
    pub(super) fn find(self, host: &Host) -> Finding {
        match self {
            Self::Ages => ages::marks(&host.proc),
            Self::WrittenAges => ages::noted_writes(),
            Self::MemoryController => controller(host, "memory"),
            Self::IoController => controller(host, "io"),
            Self::BlockTimes => queues::times(&Queue::all_in(&host.block)),
            Self::BlockSplit => queues::split(&Queue::all_in(&host.block)),
            Self::ListenDrops => match listeners::is_told() {
                Ok(()) => Ok("sock_diag tells of sockets that listen".to_owned()),
                Err(error) => Err(format!("sock_diag: {error} (CONFIG_INET_DIAG, Linux 5.8)")),
            },
            Self::CpuPressure => pressure(host, "cpu"),
            Self::MemoryPressure => pressure(host, "memory"),
            Self::IoPressure => pressure(host, "io"),
        }
    }

    /// As `rswap doctor` shows it.
    pub(super) fn feature(self, finding: Finding) -> Feature {
        let (name, cost_of_lack) = self.told();
        feature(name, finding, cost_of_lack)
    }

    /// Why nothing is measured by it where something is missing, as the status shows it.
    pub(super) fn unavailable(self, missing: &str) -> ProbeState {
        ProbeState::Unavailable { reason: format!("{missing}: {}", self.told().1) }
    }

    /// As the status shows it in this state.
    pub(super) fn status(self, state: ProbeState) -> ProbeStatus {
        ProbeStatus { name: self.name().to_owned(), state }
    }
}

/// Whether instances' cgroups have a controller of cgroup v2.
fn controller(host: &Host, name: &str) -> Finding {
    let Some(mount) = &host.unified else { return Err("no cgroup v2 is mounted".to_owned()) };
    let listed_in = |file: &str| {
        let text = fs::read_to_string(mount.join(file)).unwrap_or_default();
        text.split_whitespace().any(|listed| listed == name)
    };
    if listed_in("cgroup.subtree_control") {
        return Ok(format!("in {}/cgroup.subtree_control", mount.display()));
    }
    if listed_in("cgroup.controllers") {
        return Err(format!("not enabled (`echo +{name} > {}/cgroup.subtree_control`)", mount.display()));
    }
    // Name, hierarchy, how many cgroups, enabled. The hierarchy of v2 is 0.
    let old_name = if name == "io" { "blkio" } else { name };
    let text = fs::read_to_string(host.proc.join("cgroups")).unwrap_or_default();
    let is_of_v1 = text.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some(old_name) && words.next().is_some_and(|hierarchy| hierarchy != "0")
    });
    Err(if is_of_v1 {
        format!("cgroup v1 has the controller (`cgroup_no_v1={name}` on the kernel's command line)")
    } else {
        format!("not in {}/cgroup.controllers", mount.display())
    })
}

/// Whether the kernel keeps for each cgroup how long tasks wait for a resource.
fn pressure(host: &Host, resource: &str) -> Finding {
    let file = format!("{resource}.pressure");
    if host.unified.as_ref().is_some_and(|mount| mount.join(&file).exists()) {
        return Ok("per cgroup".to_owned());
    }
    Err(if host.proc.join("pressure").join(resource).exists() {
        "only for the whole host".to_owned()
    } else {
        format!("no /proc/pressure/{resource} (CONFIG_PSI, or psi=1 on the kernel's command line)")
    })
}

/// What of them a host has; without those of ages: who looks at these says so.
#[derive(Debug)]
pub(super) struct Found {
    host: Host,
    all: Vec<(Source, Finding)>,
    windows_since: u32,
}

impl Found {
    pub(super) fn on(host: Host) -> Self {
        let all = Source::ALL.into_iter().filter(|of| !matches!(of, Source::Ages | Source::WrittenAges));
        let all = all.map(|of| (of, of.find(&host))).collect();
        Self { host, all, windows_since: 0 }
    }

    /// A window ends: now and then, what may have changed is looked at again.
    pub(super) fn look_again(&mut self) {
        self.windows_since += 1;
        if self.windows_since < LOOK_AFTER_WINDOWS {
            return;
        }
        self.windows_since = 0;
        for (of, finding) in self.all.iter_mut().filter(|(of, _)| of.may_change()) {
            *finding = of.find(&self.host);
        }
    }

    /// As the status shows them.
    pub(super) fn statuses(&self) -> impl Iterator<Item = ProbeStatus> {
        self.all.iter().map(|(of, finding)| match finding {
            Ok(_) => of.status(ProbeState::Active),
            Err(missing) => of.status(of.unavailable(missing)),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A host without anything, and the directory where its files are.
    fn empty() -> (Host, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let below = |name: &str| {
            let path = directory.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let host = Host { proc: below("proc"), block: below("block"), unified: Some(below("cgroup")) };
        (host, directory)
    }

    #[test]
    fn all_are_told_of_by_doctor_and_status_in_the_same_words() {
        let names: BTreeSet<&str> = Source::ALL.map(Source::name).into();
        assert_eq!(names.len(), Source::ALL.len());
        for source in Source::ALL {
            let feature = source.feature(Err("no such thing".to_owned()));
            let status = source.status(source.unavailable("no such thing"));
            assert_eq!((feature.name, feature.present), (status.name, false));
            let reason = format!("{}: {}", feature.detail, feature.cost_of_lack);
            assert_eq!(status.state, ProbeState::Unavailable { reason });
        }
    }

    #[test]
    fn every_name_is_explained() {
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/profile.md");
        let docs = fs::read_to_string(docs).unwrap();
        for source in Source::ALL {
            assert!(docs.contains(&format!("| `{}` |", source.name())), "{}", source.name());
        }
    }

    #[test]
    fn a_controller_that_instances_do_not_have_is_missed_with_what_to_do() {
        let (host, directory) = empty();
        let root = directory.path().join("cgroup");
        let missing = |name| controller(&host, name).unwrap_err();
        assert!(missing("io").contains("cgroup/cgroup.controllers"));
        let v1 = "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t4\t2\t1\nblkio\t7\t1\t1\n";
        fs::write(directory.path().join("proc/cgroups"), v1).unwrap();
        assert!(missing("memory").contains("`cgroup_no_v1=memory`"));
        assert!(missing("io").contains("`cgroup_no_v1=io`"));
        fs::write(directory.path().join("proc/cgroups"), v1.replace("7", "0")).unwrap();
        assert!(missing("io").contains("cgroup.controllers"), "v2's, as far as that can be seen");
        fs::write(root.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        fs::write(root.join("cgroup.subtree_control"), "cpu memory\n").unwrap();
        assert!(missing("io").contains("echo +io > "));
        assert!(controller(&host, "memory").is_ok());
        let none = Host { unified: None, ..host };
        assert_eq!(controller(&none, "memory"), Err("no cgroup v2 is mounted".to_owned()));
    }

    #[test]
    fn pressure_counts_where_it_is_kept_for_each_cgroup() {
        let (host, directory) = empty();
        assert!(pressure(&host, "io").unwrap_err().contains("psi=1"));
        fs::create_dir(directory.path().join("proc/pressure")).unwrap();
        fs::write(directory.path().join("proc/pressure/io"), "").unwrap();
        assert_eq!(pressure(&host, "io"), Err("only for the whole host".to_owned()));
        fs::write(directory.path().join("cgroup/io.pressure"), "").unwrap();
        assert!(pressure(&host, "io").is_ok() && pressure(&host, "cpu").is_err());
    }

    #[test]
    fn marks_are_missed_where_they_can_not_be_taken_away_or_counted() {
        let (host, directory) = empty();
        fs::create_dir(directory.path().join("proc/self")).unwrap();
        for file in ["clear_refs", "smaps_rollup"] {
            assert!(Source::Ages.find(&host).unwrap_err().contains(file));
            fs::write(directory.path().join("proc/self").join(file), "").unwrap();
        }
        assert!(Source::Ages.find(&host).is_ok());
    }

    #[test]
    fn devices_are_looked_at_again_now_and_then_and_controllers_are_not() {
        let (host, directory) = empty();
        let mut found = Found::on(host);
        let state = |found: &Found, source: Source| {
            let mut all = found.statuses();
            let status = all.find(|of| of.name == source.name()).unwrap();
            status.state
        };
        assert_eq!(state(&found, Source::BlockTimes), ProbeState::Active);
        let device = directory.path().join("block/vda");
        fs::create_dir_all(device.join("mq/0")).unwrap();
        fs::create_dir(device.join("queue")).unwrap();
        fs::write(device.join("size"), "8\n").unwrap();
        fs::write(device.join("queue/iostats"), "0\n").unwrap();
        fs::write(directory.path().join("cgroup/cpu.pressure"), "").unwrap();
        (1..LOOK_AFTER_WINDOWS).for_each(|_| found.look_again());
        assert_eq!(state(&found, Source::BlockTimes), ProbeState::Active);
        found.look_again();
        for source in [Source::BlockTimes, Source::BlockSplit] {
            let ProbeState::Unavailable { reason } = state(&found, source) else { panic!("{found:?}") };
            assert!(reason.starts_with("vda: "), "{reason}");
        }
        assert!(matches!(state(&found, Source::CpuPressure), ProbeState::Unavailable { .. }));
    }
}
