//! What an instance needs of another host, and what stands against it there. The comparison only reads: the same answers
//! a migration's offer and `rswap check INSTANCE HOST`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{traits::TaskError, volumes::SourceVolumes};
use crate::{
    instance::Instance,
    sys::{clock::Clocks, cpuid::Processor},
    tracee::{
        TraceeError, advice, cgroups,
        descriptors::{self, Around},
        files::{self, Place, Places},
        layout::{self, Mapping},
        mounts::Mounts,
        objects::shared_huge_pages,
        stopped,
        tree::{self, INIT, Member},
    },
};

/// What the destination must have, so that the instance can go on there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Requirements {
    /// The instance as the source knows it.
    pub instance: Instance,
    /// The main process's id in the instance's PID namespace.
    pub main_pid: i32,
    /// What must be the same on both hosts.
    pub host: HostTraits,
    /// The instance's clocks when the offer was made.
    pub clocks: Clocks,
    /// By how much they are ahead of the source's kernel.
    pub clock_offsets: Clocks,
    /// Digest of each file that is mapped or read and does not go along, by path.
    pub files: BTreeMap<String, u128>,
    /// The highest id of its processes and threads in its PID namespace.
    pub highest_pid: i32,
    /// What its volumes take: bytes on the disk, and inodes.
    pub volumes: (u64, u64),
    /// The mounts that it has made.
    pub mounts: Mounts,
    /// Bytes that its file systems in memory hold.
    pub memory_files_bytes: u64,
    /// Resident memory, in bytes: there must be room for it.
    pub resident_bytes: u64,
    /// Huge pages, of the usual size, that its mappings have claimed.
    pub huge_pages: u64,
    /// Controllers by which its own cgroups have limits.
    pub controllers: Vec<String>,
}

/// What must be the same on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostTraits {
    /// Kernel release: the vDSO and the meaning of the image come with it.
    pub kernel: String,
    /// Processor features, as the kernel lists them.
    pub cpu_features: Vec<String>,
    /// What programs see that ask the processor itself.
    pub processor: Processor,
    /// Digest of the vDSO's code, which the program calls into: it is moved, not copied.
    pub vdso: u128,
    /// The running kernel's identity: CLOCK_MONOTONIC counts from its start.
    pub boot_id: String,
}

impl HostTraits {
    /// This host's.
    pub fn here() -> Result<Self, std::io::Error> {
        let features = procfs_flags(&std::fs::read_to_string("/proc/cpuinfo")?);
        Ok(Self {
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpu_features: features,
            processor: Processor::here(),
            vdso: layout::vdso_digest()?,
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
        })
    }
}

fn procfs_flags(cpuinfo: &str) -> Vec<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    let words = line.and_then(|line| line.split_once(':')).map(|(_, words)| words).unwrap_or_default();
    words.split_whitespace().map(str::to_owned).collect()
}

/// Something that a host refuses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objection {
    /// What: a file, a processor feature, room.
    pub item: String,
    /// Why, and what would make it possible.
    pub reason: String,
}

impl Objection {
    /// One of this host's.
    pub fn new(item: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { item: item.into(), reason: reason.into() }
    }
}

impl Requirements {
    /// Those of an instance whose living processes are `members`. Nothing is touched.
    pub fn of(
        instance: &Instance,
        members: &[Member],
        digests: &mut FileDigests,
        volumes: &SourceVolumes,
    ) -> Result<Self, TaskError> {
        let main = members.iter().find(|member| member.node.parent == INIT);
        let main = *main.ok_or("the instance has no main process")?;
        let (mut resident_kib, mut highest_pid, mut huge_bytes) = (0, 0, 0);
        // Once, however many map it.
        let mut shared_huge = BTreeMap::new();
        for member in members {
            // One that has ended since needs nothing.
            let Ok(mappings) = layout::read_mappings(member.pid) else { continue };
            digests.add(&mappings)?;
            let private = mappings.iter().filter(|mapping| mapping.is_huge() && !mapping.shared);
            huge_bytes += private.map(Mapping::len).sum::<u64>();
            shared_huge.extend(mappings.iter().filter_map(|mapping| shared_huge_pages(member.pid, mapping)));
            match digests.add_read_by(member.pid) {
                Err(_) if tree::has_ended(member.pid) => continue,
                added => added?,
            }
            let status = fs::read_to_string(format!("/proc/{}/status", member.pid)).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
            resident_kib +=
                line.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
            for tid in stopped::list_threads(member.pid).unwrap_or_default() {
                highest_pid = highest_pid.max(inner_pid(tid).unwrap_or(0));
            }
        }
        huge_bytes += shared_huge.values().sum::<u64>();
        let clock_offsets = Clocks::offsets_of(main.pid)?;
        Ok(Self {
            instance: instance.clone(),
            main_pid: main.node.pid,
            host: HostTraits::here()?,
            clocks: Clocks::of_this_kernel()?.plus(clock_offsets),
            clock_offsets,
            files: digests.all(),
            highest_pid,
            volumes: volumes.need()?,
            mounts: volumes.mounts().clone(),
            memory_files_bytes: volumes.memory_need()?,
            resident_bytes: resident_kib * 1024,
            huge_pages: huge_bytes.div_ceil(advice::USUAL_HUGE_PAGE),
            controllers: cgroups::controllers(&instance.cgroup)?,
        })
    }

    /// What of it this host can't give.
    pub fn objections(&self) -> Result<Vec<Objection>, TaskError> {
        let (here, there) = (HostTraits::here()?, &self.host);
        let mut found = Vec::new();
        let mut object = |item: &str, reason: String| found.push(Objection::new(item, reason));
        if here.kernel != there.kernel {
            let text = format!("this host runs {} and the source {}", here.kernel, there.kernel);
            object("kernel", format!("{text}: use the same kernel build on both"));
        }
        let lacking: Vec<&String> =
            there.cpu_features.iter().filter(|f| !here.cpu_features.contains(f)).collect();
        if !lacking.is_empty() {
            object("processor", format!("this host's lacks {lacking:?}, which the program may use"));
        }
        let lacking = there.processor.lacking_on(&here.processor);
        if !lacking.is_empty() {
            let text = format!("this host's lacks {}", lacking.join(", "));
            object(
                "processor",
                format!("{text}, which the program may use: choose a host with the same processor"),
            );
        }
        if here.vdso != there.vdso {
            let text = "code of the kernel's that programs call into, differs: use the same kernel build";
            object("vDSO", text.into());
        }
        let available = available_memory_bytes()?;
        let wanted = self.resident_bytes.saturating_add(self.memory_files_bytes);
        if wanted > available {
            object("memory", format!("no room: {wanted} bytes are needed, {available} are available"));
        }
        let free = free_huge_pages()?;
        if self.huge_pages > free {
            let wanted = self.huge_pages;
            let text = format!("no room: {wanted} huge pages are needed, {free} are free (vm.nr_hugepages)");
            object("huge pages", text);
        }
        let pids: i32 = fs::read_to_string("/proc/sys/kernel/pid_max")?.trim().parse()?;
        if self.highest_pid >= pids {
            let text =
                format!("ids up to {} are in use, and this host gives none from {pids} on", self.highest_pid);
            object("process ids", format!("{text}: raise kernel.pid_max"));
        }
        found.extend(compare_files(&self.files));
        match self.mounts.is_sound() {
            true => {
                let volumes: Vec<PathBuf> = self.instance.volumes.iter().map(|v| v.path.clone()).collect();
                let lacking = self.mounts.lacking(&volumes).into_iter();
                found.extend(lacking.map(|(path, what)| {
                    Objection::new(
                        path.display().to_string(),
                        format!("{what}, and it isn't on this host: make it"),
                    )
                }));
            }
            false => found.push(Objection::new("mounts", "no instance has such")),
        }
        Ok(found)
    }
}

/// Refuses with everything that stands against it.
pub fn require_none(objections: &[Objection]) -> Result<(), TraceeError> {
    if objections.is_empty() {
        return Ok(());
    }
    let all: Vec<_> = objections.iter().map(|o| format!("{}: {}", o.item, o.reason)).collect();
    Err(TraceeError::Unsupported(all.join("; ")))
}

/// The files that are not the same on this host.
pub fn compare_files<'a>(wanted: impl IntoIterator<Item = (&'a String, &'a u128)>) -> Vec<Objection> {
    let compare = |(path, digest): (&String, &u128)| match files::digest(Path::new(path)) {
        Ok(here) if here == *digest => None,
        Ok(_) => Some(Objection::new(path, "differs: install the same version on both hosts")),
        Err(error) => Some(Objection::new(path, format!("can't be read on this host: {error}"))),
    };
    wanted.into_iter().filter_map(compare).collect()
}

/// Huge pages, of the usual size, that nobody has claimed.
fn free_huge_pages() -> Result<u64, TaskError> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    // A kernel without huge pages has none.
    let free = number("HugePages_Free:").unwrap_or(0);
    Ok(free.saturating_sub(number("HugePages_Rsvd:").unwrap_or(0)))
}

/// Memory that can be had without swapping, in bytes (`MemAvailable` in proc_meminfo(5)).
pub(super) fn available_memory_bytes() -> Result<u64, TaskError> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    Ok(line.split_whitespace().next().unwrap_or("0").parse::<u64>()? * 1024)
}

/// A thread's id in its own PID namespace.
fn inner_pid(tid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?.parse().ok()
}

/// The digests of the files that must be the same at the destination: those that are mapped, and those that are read.
#[derive(Debug, Default)]
pub struct FileDigests {
    known: BTreeMap<String, u128>,
    places: Places,
}

impl FileDigests {
    /// For files that are at these places.
    pub fn new(places: Places) -> Self {
        Self { known: BTreeMap::new(), places }
    }

    /// Takes in the files of `mappings`.
    pub fn add(&mut self, mappings: &[Mapping]) -> std::io::Result<()> {
        for mapping in mappings.iter().filter(|mapping| mapping.is_file() && !mapping.is_object()) {
            let goes_along = self.places.find(&mapping.name) == Place::Volume;
            let path = self.places.on_host(&mapping.name);
            if !goes_along && !self.known.contains_key(&path) {
                let digest = files::digest(Path::new(&path))?;
                self.known.insert(path, digest);
            }
        }
        Ok(())
    }

    /// Takes in the files that process `pid` reads.
    fn add_read_by(&mut self, pid: i32) -> Result<(), TraceeError> {
        let (open, _) = descriptors::describe(pid, &Around::of(&[pid]), false)?;
        self.known.extend(files::digests_of_read(pid, &open, &self.places)?);
        Ok(())
    }

    /// All of them, by path.
    pub fn all(&self) -> BTreeMap<String, u128> {
        self.known.clone()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        instance::Origin,
        tracee::mounts::{Mount, What},
        units::UnixMillis,
    };

    /// What nothing stands against.
    pub(in crate::migrate) fn modest() -> Requirements {
        let instance = Instance {
            name: "one".parse().expect("a name"),
            labels: BTreeMap::new(),
            cgroup: PathBuf::new(),
            cgroup_id: 1,
            origin: Origin::Run,
            init_pid: None,
            command: Vec::new(),
            network: None,
            volumes: Vec::new(),
            pool: None,
            uplink: None,
            memory: None,
            since: UnixMillis::default(),
        };
        Requirements {
            instance,
            main_pid: 2,
            host: HostTraits::here().expect("this host's traits"),
            clocks: Clocks::default(),
            clock_offsets: Clocks::default(),
            files: BTreeMap::new(),
            highest_pid: 3,
            volumes: (0, 0),
            mounts: Mounts::default(),
            memory_files_bytes: 0,
            resident_bytes: 4096,
            huge_pages: 0,
            controllers: Vec::new(),
        }
    }

    fn objections(change: impl FnOnce(&mut Requirements)) -> Vec<(String, String)> {
        let mut requirements = modest();
        change(&mut requirements);
        let found = requirements.objections().expect("looking at this host");
        found.into_iter().map(|objection| (objection.item, objection.reason)).collect()
    }

    #[test]
    fn what_this_host_lacks_is_named() {
        assert_eq!(objections(|_| {}), []);
        type Change = fn(&mut Requirements);
        let cases: [(Change, &str, &str); 11] = [
            (|r| r.host.kernel = "5.0.0".into(), "kernel", "the source 5.0.0"),
            (|r| r.host.cpu_features.push("avx1024".into()), "processor", "avx1024"),
            (
                |r| r.host.processor.components.push((62, 64, 4096)),
                "processor",
                "component 62 of the XSAVE area",
            ),
            (
                |r| r.host.processor.features.push((7, 9, [0, 4, 0, 0])),
                "processor",
                "bits 0x4 of CPUID 0x7.9:EBX",
            ),
            (|r| r.host.vdso ^= 1, "vDSO", "the same kernel build"),
            (|r| r.resident_bytes = 1 << 60, "memory", "no room"),
            (|r| r.memory_files_bytes = 1 << 60, "memory", "no room"),
            (|r| r.huge_pages = 1 << 50, "huge pages", "vm.nr_hugepages"),
            (|r| r.highest_pid = i32::MAX, "process ids", "raise kernel.pid_max"),
            (|r| r.files.extend([("/no/such/file".into(), 1)]), "/no/such/file", "can't be read"),
            (|r| r.files.extend([("/proc/self/exe".into(), 1)]), "/proc/self/exe", "differs"),
        ];
        for (change, item, reason) in cases {
            let found = objections(change);
            let [(named, why)] = found.as_slice() else { panic!("{item}: {found:?}") };
            assert!(named == item && why.contains(reason), "{found:?}");
        }
    }

    #[test]
    fn the_numbers_are_those_of_the_processes() {
        let mut children = [0; 2].map(|_| {
            let mut command = std::process::Command::new("sleep");
            command.arg("1000").stdin(std::process::Stdio::null()).spawn().expect("sleep")
        });
        let pids = children.each_ref().map(|child| child.id() as i32);
        let member = |pid, parent| Member {
            pid,
            node: tree::Node { pid, parent, session: 0, group: 0, status: None },
        };
        let members = [member(pids[0], INIT), member(pids[1], pids[0])];
        let kib = |pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0)
        };
        // They have read what they need, and wait, before they are looked at.
        let asleep = |pid| {
            fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|at| at.contains("nanosleep"))
                || fs::read_to_string(format!("/proc/{pid}/syscall"))
                    .is_ok_and(|call| call.starts_with("230 "))
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !pids.iter().all(|pid| asleep(*pid)) && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let cgroup = tempfile::tempdir().expect("a temporary directory");
        let instance = Instance { cgroup: cgroup.path().to_owned(), ..modest().instance };
        let volumes = SourceVolumes::default();
        let found = Requirements::of(&instance, &members, &mut FileDigests::default(), &volumes);
        let resident: u64 = pids.iter().map(|pid| kib(*pid) * 1024).sum();
        let highest = pids.iter().filter_map(|pid| inner_pid(*pid)).max();
        for child in &mut children {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
        let found = found.expect("requirements");
        assert!(resident > 1 << 18, "{resident}");
        assert_eq!((found.resident_bytes, Some(found.highest_pid)), (resident, highest));
        assert!(found.main_pid == pids[0] && found.files.keys().any(|path| path.ends_with("/sleep")));
    }

    #[test]
    fn mounts_that_this_host_has_no_place_for_are_named() {
        let mount = |point: &str, what| Mount {
            point: point.into(),
            what,
            flags: 0,
            follows_host: false,
            visible: true,
        };
        let bind = |from: &str| What::Bind { from: from.into(), directory: true };
        let found = |list: Vec<Mount>| {
            let found = objections(|requirements| requirements.mounts.list = list);
            found.into_iter().map(|(item, _)| item).collect::<Vec<_>>()
        };
        assert_eq!(found(vec![mount("/tmp", bind("/usr"))]), [""; 0]);
        assert_eq!(found(vec![mount("/no/such/point", bind("/usr"))]), ["/no/such/point"]);
        assert_eq!(found(vec![mount("/tmp", bind("/no/such/source"))]), ["/no/such/source"]);
        // It must be a directory here, too.
        assert_eq!(found(vec![mount("/tmp", bind("/etc/passwd"))]), ["/etc/passwd"]);
        assert_eq!(found(vec![mount("/tmp", bind("/usr")), mount("/tmp/no", bind("/usr"))]), ["/usr/no"]);
        for unsound in ["relative", "/a/../b", "/"] {
            assert_eq!(found(vec![mount(unsound, bind("/usr"))]), ["mounts"]);
        }
        assert_eq!(found(vec![mount("/tmp", What::Memory(0))]), ["mounts"]);
    }
}
