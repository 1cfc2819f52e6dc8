//! What is read of each instance in every window: small files of its cgroup and of its processes. They are kept open, as opening one takes the kernel
//! longer than reading it.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::sys::resource::{Resource, getrlimit};

use super::{ProfileError, cgroup, faults};

/// What is asked for at once. The kernel gives these files from a page; those that are one record, whole (fs/seq_file.c).
const AT_ONCE: usize = 8192;
/// A file of many records gives about a page at a time: with less than this, there is no more.
const IS_ALL: usize = 2048;

/// Reads files, and says which may stay open.
pub(super) struct Reader {
    buffer: Vec<u8>,
    /// How many more files may stay open.
    room: usize,
    most: usize,
}

impl Default for Reader {
    fn default() -> Self {
        // The other half is for connections, and for what a migration holds.
        let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft as usize / 2);
        Self { buffer: Vec::new(), room: most, most }
    }
}

impl Reader {
    /// So many files are open now.
    pub(super) fn are_open(&mut self, files: usize) {
        self.room = self.most.saturating_sub(files);
    }

    fn read(&mut self, file: &mut Kept) -> io::Result<Cow<'_, str>> {
        // What it is of may have gone, and another one have come by this name.
        let found = file.open.as_ref().and_then(|open| self.whole(open).ok());
        let length = match found {
            Some(length) => length,
            None => {
                let was_open = file.open.take().is_some();
                let open = File::open(&file.path)?;
                let length = self.whole(&open)?;
                if was_open || self.room > 0 {
                    self.room -= usize::from(!was_open);
                    file.open = Some(open);
                }
                length
            }
        };
        // A program's name in its `stat` may be any bytes.
        Ok(String::from_utf8_lossy(&self.buffer[..length]))
    }

    /// Reads a file from its beginning into the buffer, and answers how many bytes there are.
    fn whole(&mut self, file: &File) -> io::Result<usize> {
        let mut length = 0;
        loop {
            if self.buffer.len() < length + AT_ONCE {
                self.buffer.resize(length + AT_ONCE, 0);
            }
            let more = file.read_at(&mut self.buffer[length..], length as u64)?;
            length += more;
            if more < IS_ALL {
                return Ok(length);
            }
        }
    }
}

/// A file that may be open.
#[derive(Debug)]
struct Kept {
    path: PathBuf,
    open: Option<File>,
}

impl Kept {
    fn new(path: PathBuf) -> Self {
        Self { path, open: None }
    }
}

/// The files of one instance.
#[derive(Debug)]
pub(super) struct InstanceFiles {
    cgroup: PathBuf,
    cpu_stat: Kept,
    cpu_pressure: Kept,
    memory_pressure: Kept,
    /// `memory.current` and `memory.stat`, where the memory controller is in cgroup v2.
    memory: Option<[Kept; 2]>,
    /// Where the processes are listed, of its cgroup and each below.
    procs: BTreeMap<PathBuf, Kept>,
    /// `stat` and `statm` of each process; empty where its cgroup tells.
    processes: BTreeMap<i32, [Kept; 2]>,
}

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
            memory_pressure: file("memory.pressure"),
            memory: None,
            procs: BTreeMap::new(),
            processes: BTreeMap::new(),
        };
        this.follow(&[cgroup.to_owned()]);
        this
    }

    /// These are its cgroups now, its own and all below it.
    pub(super) fn follow(&mut self, cgroups: &[PathBuf]) {
        self.procs.retain(|cgroup, _| cgroups.contains(cgroup));
        for cgroup in cgroups {
            let listed = || Kept::new(cgroup.join("cgroup.procs"));
            self.procs.entry(cgroup.clone()).or_insert_with(listed);
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
        let own = [&self.cpu_stat, &self.cpu_pressure, &self.memory_pressure];
        let others = self.memory.iter().flatten().chain(self.procs.values());
        let of_processes = self.processes.values().flatten();
        own.into_iter().chain(others).chain(of_processes).filter(|file| file.open.is_some()).count()
    }

    /// CPU time used by the cgroup and all below it, and time for which a limit of it held its CPUs back (0 where there is none), in microseconds.
    pub(super) fn cpu_stat_us(&mut self, reader: &mut Reader) -> Result<(u64, u64), ProfileError> {
        match reader.read(&mut self.cpu_stat) {
            Ok(text) => cgroup::cpu_stat_us(&text, &self.cpu_stat.path),
            Err(source) => Err(ProfileError::Read { path: self.cpu_stat.path.clone(), source }),
        }
    }

    /// Time in which some task was held up for lack of a CPU, in microseconds, where the kernel keeps it.
    pub(super) fn cpu_pressure_us(&mut self, reader: &mut Reader) -> Option<u64> {
        cgroup::pressure_some_us(&reader.read(&mut self.cpu_pressure).ok()?)
    }

    /// The same for lack of memory.
    pub(super) fn memory_pressure_us(&mut self, reader: &mut Reader) -> Option<u64> {
        cgroup::pressure_some_us(&reader.read(&mut self.memory_pressure).ok()?)
    }

    /// Its memory, and its faults so far.
    pub(super) fn memory(&mut self, reader: &mut Reader) -> Result<Memory, ProfileError> {
        if let Some([current, stat]) = &mut self.memory {
            let resident_bytes = reader.read(current).ok().and_then(|text| text.trim().parse().ok());
            let faults = reader.read(stat).ok().and_then(|text| faults::Reading::of_cgroup(&text));
            if let (Some(resident_bytes), Some(faults)) = (resident_bytes, faults) {
                self.processes.clear();
                return Ok(Memory { resident_bytes, faults });
            }
        }
        let pids = self.pids(reader)?;
        self.processes.retain(|pid, _| pids.contains(pid));
        let (mut resident_bytes, mut counted) = (0, BTreeMap::new());
        for pid in pids {
            let files = |name: &str| Kept::new(format!("/proc/{pid}/{name}").into());
            let [stat, statm] = self.processes.entry(pid).or_insert_with(|| [files("stat"), files("statm")]);
            // A process that has ended meanwhile holds nothing. The resident set in `stat` is not exact.
            let process = reader.read(stat).ok().and_then(|text| faults::process(&text));
            counted.extend(process.map(|process| (pid, process)));
            let pages = reader.read(statm).ok().and_then(|text| resident_pages(&text));
            resident_bytes += pages.unwrap_or(0) * procfs::page_size();
        }
        Ok(Memory { resident_bytes, faults: faults::Reading::OfProcesses(counted) })
    }

    /// The processes of the cgroup and of all below it.
    fn pids(&mut self, reader: &mut Reader) -> Result<BTreeSet<i32>, ProfileError> {
        let mut pids = BTreeSet::new();
        for (cgroup, file) in &mut self.procs {
            match reader.read(file) {
                Ok(text) => pids.extend(cgroup::pids_in(&text)),
                Err(source) if *cgroup == self.cgroup && source.kind() == io::ErrorKind::NotFound => {
                    return Err(ProfileError::Read { path: file.path.clone(), source });
                }
                // A threaded cgroup lists no processes of its own (EOPNOTSUPP): they are listed above it. Or it has gone.
                Err(_) => {}
            }
        }
        Ok(pids)
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
    fn a_file_is_read_as_it_is_now_and_found_again_when_another_one_has_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut reader = Reader { room: 1, ..Reader::default() };
        let mut file = Kept::new(path.clone());
        assert!(reader.read(&mut file).is_err());
        for text in ["a 1\n".to_owned(), "b".repeat(3 * AT_ONCE + 5), String::new()] {
            fs::write(&path, &text).unwrap();
            assert_eq!(reader.read(&mut file).unwrap(), text);
        }
        assert!(file.open.is_some() && reader.room == 0);
        let mut other = Kept::new(path);
        assert_eq!(reader.read(&mut other).unwrap(), "");
        assert!(other.open.is_none(), "there was room for one");
    }

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
        assert!(stat.open.is_some());
        child.wait().unwrap();
        assert!(reader.read(&mut stat).is_err());
        assert!(stat.open.is_none());
    }
}
