//! What is read of each instance in every window: small files of its cgroup and of its processes. They are kept open, as opening one takes the kernel
//! longer than reading it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use super::{
    ProfileError, cgroup, faults,
    pressure::{self, HostPressure, Pressure, StalledFor},
};
use crate::kept_files::{Kept, Reader, has_gone};

/// The files of one instance.
#[derive(Debug)]
pub(super) struct InstanceFiles {
    cgroup: PathBuf,
    cpu_stat: Kept,
    cpu_pressure: Kept,
    memory_pressure: Pressure,
    io_pressure: Pressure,
    /// `memory.current` and `memory.stat`, where the memory controller is in cgroup v2.
    memory: Option<[Kept; 2]>,
    /// Where the processes are listed, of its cgroup and each below.
    procs: BTreeMap<PathBuf, Kept>,
    /// `stat` and `statm` of each process; empty where its cgroup tells.
    processes: BTreeMap<i32, [Kept; 2]>,
    /// What each `stat` said when they were read last.
    faults: Option<FaultsRead>,
}

/// Faults of processes, as they were when so many had been seen to begin, and to end.
#[derive(Debug)]
struct FaultsRead {
    seen: u64,
    windows_since: u32,
    of: BTreeMap<i32, faults::Process>,
}

/// After so many windows the faults of processes are read, and processes listed, even if none was seen to begin: those that the kernel makes for itself are not seen,
/// as for `O_DIRECT`, nor is a process that somebody moves into the cgroup.
const FAULTS_READ_AFTER_WINDOWS: u32 = 10;

/// An instance's memory at one moment.
pub(super) struct Memory {
    /// What its cgroup is charged where the memory controller is there, else the sum of its processes' resident sets (memory shared between them is then
    /// counted for each).
    pub(super) resident_bytes: u64,
    pub(super) faults: faults::Reading,
}

impl InstanceFiles {
    /// Knows only of the cgroup itself: [`Self::follow`] tells of those below.
    pub(super) fn new(cgroup: &Path) -> Self {
        let file = |name: &str| Kept::new(cgroup.join(name));
        let mut this = Self {
            cgroup: cgroup.to_owned(),
            cpu_stat: file("cpu.stat"),
            cpu_pressure: file("cpu.pressure"),
            memory_pressure: Pressure::new(cgroup.join("memory.pressure")),
            io_pressure: Pressure::new(cgroup.join("io.pressure")),
            memory: None,
            procs: BTreeMap::new(),
            processes: BTreeMap::new(),
            faults: None,
        };
        this.follow(&[cgroup.to_owned()]);
        this
    }

    /// These are its cgroups now, its own and all below it.
    pub(super) fn follow(&mut self, cgroups: &[PathBuf]) {
        let present: BTreeSet<&Path> = cgroups.iter().map(PathBuf::as_path).collect();
        self.procs.retain(|cgroup, _| present.contains(cgroup.as_path()));
        for cgroup in cgroups {
            if !self.procs.contains_key(cgroup) {
                self.procs.insert(cgroup.clone(), Kept::new(cgroup.join("cgroup.procs")));
            }
        }
        let file = |name: &str| Kept::new(self.cgroup.join(name));
        match (self.memory.is_some(), self.cgroup.join("memory.current").exists()) {
            (false, true) => self.memory = Some([file("memory.current"), file("memory.stat")]),
            (true, false) => self.memory = None,
            _ => {}
        }
    }

    /// How many are open.
    pub(super) fn open_files(&self) -> usize {
        let own = [&self.cpu_stat, &self.cpu_pressure];
        let others = self.memory.iter().flatten().chain(self.procs.values());
        let of_processes = self.processes.values().flatten();
        let pressures = [&self.memory_pressure, &self.io_pressure];
        own.into_iter().chain(others).chain(of_processes).filter(|file| file.is_open()).count()
            + pressures.into_iter().filter(|file| file.is_open()).count()
    }

    /// CPU time used by the cgroup and all below it, and time for which a limit of it held its CPUs back (0 where there is none), in microseconds.
    pub(super) fn cpu_stat_us(&mut self, reader: &mut Reader) -> Result<(u64, u64), ProfileError> {
        match reader.read(&mut self.cpu_stat) {
            Ok(text) => cgroup::cpu_stat_us(&text, self.cpu_stat.path()),
            Err(source) => Err(ProfileError::Read { path: self.cpu_stat.path().to_owned(), source }),
        }
    }

    /// Time in which tasks were held up for lack of a CPU, for lack of memory, and by I/O. The last two are not read where no task of the host was.
    pub(super) fn stalled(&mut self, reader: &mut Reader, host: &HostPressure) -> StalledFor {
        StalledFor {
            cpu: pressure::read(reader, &mut self.cpu_pressure),
            memory: self.memory_pressure.stalled(reader, &host.memory),
            io: self.io_pressure.stalled(reader, &host.io),
        }
    }

    /// Its processes, as far as they were looked at when its memory was read last.
    pub(super) fn processes(&self) -> impl Iterator<Item = i32> {
        self.processes.keys().copied()
    }

    /// Its memory, and its faults so far. `seen` is how many of these were seen to begin, and to end, where that is counted: the files that tell of each process's are the dearest of all,
    /// and are not read again where none was. Nor are its processes listed then: none begins without a fault.
    pub(super) fn memory(&mut self, reader: &mut Reader, seen: Option<u64>) -> Result<Memory, ProfileError> {
        if let Some([current, stat]) = &mut self.memory {
            let resident_bytes = reader.read(current).ok().and_then(|text| text.trim().parse().ok());
            let faults = reader.read(stat).ok().and_then(|text| faults::Reading::of_cgroup(&text));
            if let (Some(resident_bytes), Some(faults)) = (resident_bytes, faults) {
                self.processes.clear();
                self.faults = None;
                self.procs.values_mut().for_each(Kept::close);
                return Ok(Memory { resident_bytes, faults });
            }
        }
        let is_recent =
            |known: &FaultsRead| seen == Some(known.seen) && known.windows_since < FAULTS_READ_AFTER_WINDOWS;
        let known = self.faults.take().filter(is_recent);
        let known = known.map(|known| FaultsRead { windows_since: known.windows_since + 1, ..known });
        let as_listed = if known.is_some() { self.resident_as_listed(reader) } else { None };
        let (resident_bytes, now) = match (as_listed, known) {
            (Some(resident_bytes), Some(known)) => (resident_bytes, known),
            (_, known) => self.list(reader, known, seen)?,
        };
        let of = now.of.clone();
        self.faults = seen.map(|_| now);
        Ok(Memory { resident_bytes, faults: faults::Reading::OfProcesses(of) })
    }

    /// Lists its processes, and adds up their resident sets. Their faults are read, unless they are `known` of the same processes.
    fn list(
        &mut self,
        reader: &mut Reader,
        known: Option<FaultsRead>,
        seen: Option<u64>,
    ) -> Result<(u64, FaultsRead), ProfileError> {
        let pids = self.pids(reader)?;
        let known = known.filter(|_| self.processes.keys().eq(&pids));
        self.processes.retain(|pid, _| pids.contains(pid));
        let (mut pages, mut of) = (0, BTreeMap::new());
        for pid in pids {
            let files = |name: &str| Kept::new(format!("/proc/{pid}/{name}").into());
            let [stat, statm] = self.processes.entry(pid).or_insert_with(|| [files("stat"), files("statm")]);
            // A process that has ended meanwhile holds nothing.
            if known.is_none() {
                of.extend(unless_gone(reader, stat, faults::process)?.map(|process| (pid, process)));
            }
            // The resident set in `stat` is not exact.
            pages += unless_gone(reader, statm, resident_pages)?.unwrap_or(0);
        }
        let new = || FaultsRead { seen: seen.unwrap_or_default(), windows_since: 0, of };
        Ok((pages * procfs::page_size(), known.unwrap_or_else(new)))
    }

    /// The resident sets of the processes that were listed last; `None` if one of them has ended, or not all are open: its number may be another one's.
    fn resident_as_listed(&mut self, reader: &mut Reader) -> Option<u64> {
        let mut pages = 0;
        for [_, statm] in self.processes.values_mut() {
            pages += resident_pages(&reader.read_open(statm)?)?;
        }
        Some(pages * procfs::page_size())
    }

    /// The processes of the cgroup and of all below it.
    fn pids(&mut self, reader: &mut Reader) -> Result<BTreeSet<i32>, ProfileError> {
        let mut pids = BTreeSet::new();
        for (cgroup, file) in &mut self.procs {
            match reader.read(file) {
                Ok(text) => pids.extend(cgroup::pids_in(&text)),
                // A threaded cgroup lists no processes of its own: they are listed above it.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(error) if has_gone(&error) && *cgroup != self.cgroup => {}
                Err(source) => return Err(ProfileError::Read { path: file.path().to_owned(), source }),
            }
        }
        Ok(pids)
    }
}

/// What `parse` finds in a file; nothing where that has gone.
fn unless_gone<T>(
    reader: &mut Reader,
    file: &mut Kept,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, ProfileError> {
    match reader.read(file) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if has_gone(&error) => Ok(None),
        Err(source) => Err(ProfileError::Read { path: file.path().to_owned(), source }),
    }
}

/// `/proc/PID/statm`, in pages.
fn resident_pages(statm: &str) -> Option<u64> {
    statm.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_this_process_has_is_read_again_and_again() {
        let mut reader = Reader::default();
        let mut stat = Kept::new("/proc/self/stat".into());
        let mut statm = Kept::new("/proc/self/statm".into());
        let before = faults::process(&reader.read(&mut stat).unwrap()).unwrap();
        let memory = vec![1_u8; 32 << 20];
        assert_eq!(memory.iter().map(|byte| u64::from(*byte)).sum::<u64>(), 32 << 20);
        let after = faults::process(&reader.read(&mut stat).unwrap()).unwrap();
        assert!(after != before, "{after:?}");
        let resident = resident_pages(&reader.read(&mut statm).unwrap()).unwrap() * procfs::page_size();
        assert!(resident >= 32 << 20, "{resident}");
        drop(memory);
        // Of a process that has ended, nothing is told, whoever has its number.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let mut stat = Kept::new(format!("/proc/{}/stat", child.id()).into());
        reader.read(&mut stat).unwrap();
        assert!(stat.is_open());
        child.wait().unwrap();
        assert!(reader.read(&mut stat).is_err());
        assert!(!stat.is_open());
    }

    #[test]
    fn refaults_are_told_as_long_as_the_cgroup_tells_of_its_memory() {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = directory.path();
        fs::write(cgroup.join("cgroup.procs"), format!("{}\n", std::process::id())).unwrap();
        let mut files = InstanceFiles::new(cgroup);
        let mut reader = Reader::default();
        let mut read = |files: &mut InstanceFiles| files.memory(&mut reader, None).unwrap();
        let stat = |refaults| {
            let text = faults::memory_stat(&[("workingset_refault_file", refaults)]);
            fs::write(cgroup.join("memory.stat"), text).unwrap();
        };
        let resident = |memory: &Memory| memory.resident_bytes;
        let refaults = |now: &Memory, before: &Memory| now.faults.since(&before.faults).map(|(_, of)| of);

        // Without the controller: of its processes, which tell of no refaults.
        let (a, b) = (read(&mut files), read(&mut files));
        assert!(resident(&a) > 1 << 20, "this test's own");
        assert_eq!(refaults(&b, &a), Some(None));
        // It is enabled, and its files are seen when cgroups are looked for: from the window after that on.
        fs::write(cgroup.join("memory.current"), "83886080\n").unwrap();
        stat(600);
        assert_eq!(refaults(&read(&mut files), &b), Some(None));
        files.follow(&[cgroup.to_owned()]);
        let c = read(&mut files);
        assert_eq!((resident(&c), refaults(&c, &b)), (83_886_080, None), "counted otherwise before");
        stat(625);
        let d = read(&mut files);
        assert_eq!(refaults(&d, &c), Some(Some(25)));
        // One of the two files alone tells nothing.
        fs::write(cgroup.join("memory.stat"), "anon 4096\n").unwrap();
        let e = read(&mut files);
        assert_eq!((resident(&e) == 83_886_080, refaults(&e, &d)), (false, None));
        stat(640);
        let f = read(&mut files);
        // And gone again.
        fs::remove_file(cgroup.join("memory.stat")).unwrap();
        fs::remove_file(cgroup.join("memory.current")).unwrap();
        files.follow(&[cgroup.to_owned()]);
        let (g, h) = (read(&mut files), read(&mut files));
        assert_eq!(
            (refaults(&f, &d), refaults(&g, &f), refaults(&h, &g)),
            (Some(Some(15)), None, Some(None))
        );
    }
}
