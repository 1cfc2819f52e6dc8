//! Files of an instance: which of them move with it, which are on every host, and which must be the same there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use xxhash_rust::xxh3::Xxh3Default;

use super::{
    TraceeError,
    descriptors::{IN_FLIGHT, Refused},
    image::{Descriptor, DescriptorKind},
    mounts::{Mount, Mounts},
};
use crate::instance::Instance;

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;
/// Digests that are remembered; more are forgotten all at once.
const REMEMBERED: usize = 1 << 14;

/// Where an instance's files are, by their paths as it sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// Directories that move with it.
    pub volumes: Vec<PathBuf>,
    /// Directories that are one and the same on every host (`files.shared`).
    pub shared: Vec<PathBuf>,
    /// Mounts that the instance has made, each with what is there.
    pub mounts: Vec<(PathBuf, Shown)>,
    /// Those of them that nobody may write to.
    pub read_only: Vec<PathBuf>,
}

/// What a mount of an instance's shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Files in memory, which move with it.
    Memory,
    /// What the kernel tells.
    Kernel,
    /// What the instance had under this path when it was started.
    Path(PathBuf),
}

/// Where a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a volume, or in memory: it goes along.
    Volume,
    /// In a directory that all hosts share: it is there already.
    Shared,
    /// In a file system of the kernel's.
    Kernel,
    /// On this host: the other one must have the same.
    Host,
}

impl Places {
    /// Those of `instance`, which has made `mounts`.
    pub fn of(instance: &Instance, mounts: &Mounts, shared: Vec<PathBuf>) -> Self {
        let volumes = instance.volumes.iter().map(|volume| volume.path.clone()).collect();
        let shown = |mount: &Mount| {
            let shown = mounts.shown(mount)?;
            mount.visible.then(|| (mount.point.clone(), shown))
        };
        let closed = mounts.list.iter().filter(|mount| mount.visible && mount.flags & libc::MS_RDONLY != 0);
        let read_only = closed.map(|mount| mount.point.clone()).collect();
        Self { volumes, shared, mounts: mounts.list.iter().filter_map(shown).collect(), read_only }
    }

    /// Whether the file with this path is in a mount of the instance's that nobody may write to.
    pub fn is_read_only(&self, path: &str) -> bool {
        let holds =
            self.mounts.iter().map(|(point, _)| point).filter(|point| Path::new(path).starts_with(point));
        holds.max_by_key(|point| point.as_os_str().len()).is_some_and(|point| self.read_only.contains(point))
    }

    /// Where the file with this path is.
    pub fn find(&self, path: &str) -> Place {
        self.locate(Path::new(path)).0
    }

    /// Under which path the host has a file that isn't in a mount of the instance's alone.
    pub fn on_host(&self, path: &str) -> String {
        self.locate(Path::new(path)).1.to_string_lossy().into_owned()
    }

    fn locate(&self, path: &Path) -> (Place, PathBuf) {
        // The longest: one lies in the other. Of two at one point the later one lies over the other.
        let mount = self.mounts.iter().filter(|(point, _)| path.starts_with(point));
        let mount = mount.max_by_key(|(point, _)| point.as_os_str().len());
        let volume = self.volumes.iter().filter(|volume| path.starts_with(volume));
        let volume = volume.map(|volume| volume.as_os_str().len()).max().unwrap_or(0);
        match mount.filter(|(point, _)| point.as_os_str().len() >= volume) {
            Some((_, Shown::Memory)) => (Place::Volume, path.to_owned()),
            Some((_, Shown::Kernel)) => (Place::Kernel, path.to_owned()),
            Some((point, Shown::Path(from))) => match path.strip_prefix(point) {
                Ok(rest) if !rest.as_os_str().is_empty() => self.outside_of_mounts(from.join(rest)),
                _ => self.outside_of_mounts(from.clone()),
            },
            None => self.outside_of_mounts(path.to_owned()),
        }
    }

    fn outside_of_mounts(&self, path: PathBuf) -> (Place, PathBuf) {
        let lies_in = |directories: &[PathBuf]| directories.iter().any(|d| path.starts_with(d));
        let place = if lies_in(&self.volumes) {
            Place::Volume
        } else if lies_in(&self.shared) {
            Place::Shared
        } else if ["/proc", "/sys"].iter().any(|root| path.starts_with(root)) {
            Place::Kernel
        } else {
            Place::Host
        };
        (place, path)
    }
}

/// A regular file of this host: its path, and whether it is written. Files without contents (`/proc`, devices) are none.
fn of_this_host<'a>(descriptor: &'a Descriptor, places: &Places) -> Option<(&'a str, bool)> {
    match &descriptor.kind {
        DescriptorKind::File { path, size: Some(_), .. } if descriptor.flags & libc::O_PATH == 0 => {
            let writes = descriptor.flags & libc::O_ACCMODE != libc::O_RDONLY;
            (places.find(path) == Place::Host).then_some((path, writes))
        }
        _ => None,
    }
}

/// Files to which processes append their output (descriptors 1 and 2): what `rswap run --log` and a shell's `>>` make.
pub fn logs(processes: &[(i32, &[Descriptor])], places: &Places) -> BTreeSet<String> {
    let all = processes.iter().flat_map(|(_, list)| list.iter());
    let outputs = all.filter(|descriptor| {
        let access = descriptor.flags & (libc::O_ACCMODE | libc::O_APPEND);
        access == libc::O_WRONLY | libc::O_APPEND
            && descriptor.numbers.iter().any(|(fd, _)| matches!(fd, 1 | 2))
    });
    outputs
        .filter_map(|descriptor| of_this_host(descriptor, places))
        .map(|(path, _)| path.to_owned())
        .collect()
}

/// Files that are written and would stay behind: (pid, descriptor). `processes`: pids that the agent sees, with their
/// descriptors.
pub fn left_behind(processes: &[(i32, &[Descriptor])], places: &Places) -> Vec<(i32, Refused)> {
    let logs = logs(processes, places);
    let all = processes.iter().flat_map(|(pid, list)| list.iter().map(move |descriptor| (*pid, descriptor)));
    let refused = all.filter_map(|(pid, descriptor)| {
        let (path, writes) = of_this_host(descriptor, places)?;
        let is_log = descriptor.flags & libc::O_APPEND != 0 && logs.contains(path);
        (writes && !is_log).then(|| {
            let remedy = "it stays on this host: put it into a volume (rswap run --volume NAME:PATH), or name a \
                          directory that all hosts share in files.shared";
            (pid, Refused { fd: descriptor.numbers[0].0, what: format!("{path}, open for writing"), remedy })
        })
    });
    refused.collect()
}

/// The digests of the files of this host that `descriptors` of process `pid` read, by path.
pub fn digests_of_read(
    pid: i32,
    descriptors: &[Descriptor],
    places: &Places,
) -> Result<BTreeMap<String, u128>, TraceeError> {
    let mut found = BTreeMap::new();
    for descriptor in descriptors {
        let found_here = of_this_host(descriptor, places).filter(|_| !is_in_flight(descriptor));
        let Some((path, false)) = found_here else { continue };
        // By its path: the program runs, and the number may be another file's by now.
        match digest(Path::new(&format!("/proc/{pid}/root{path}"))) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            digest => drop(found.insert(places.on_host(path), digest.map_err(TraceeError::proc(path))?)),
        }
    }
    Ok(found)
}

/// Notes in the image what the destination's files must be: the digest of those that are read, and nothing of logs.
pub fn note(
    pid: i32,
    descriptors: &mut [Descriptor],
    logs: &BTreeSet<String>,
    places: &Places,
) -> Result<(), TraceeError> {
    for descriptor in descriptors {
        let Some((path, writes)) = of_this_host(descriptor, places) else { continue };
        if is_in_flight(descriptor) {
            continue;
        }
        let found = match writes {
            true if logs.contains(path) => None,
            true => continue,
            false => Some(digest_behind(pid, descriptor)?),
        };
        if let DescriptorKind::File { digest, size, .. } = &mut descriptor.kind {
            *size = size.filter(|_| found.is_some());
            *digest = found;
        }
    }
    Ok(())
}

/// Whether it is in no process's table, but waits in a queue: its length is compared, and nothing else.
fn is_in_flight(descriptor: &Descriptor) -> bool {
    descriptor.numbers[0].0 >= IN_FLIGHT
}

fn digest_behind(pid: i32, descriptor: &Descriptor) -> Result<u128, TraceeError> {
    let path = format!("/proc/{pid}/fd/{}", descriptor.numbers[0].0);
    digest(Path::new(&path)).map_err(TraceeError::proc(path))
}

/// The digest by which files are compared between hosts. A file that has not changed since is not read again.
pub fn digest(path: &Path) -> io::Result<u128> {
    digest_of(&File::open(path)?)
}

/// As [`digest`], of an open file, whose offset stays.
pub fn digest_of(file: &File) -> io::Result<u128> {
    static KNOWN: Mutex<BTreeMap<Version, u128>> = Mutex::new(BTreeMap::new());
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let version = Version::of(&file.metadata()?);
    if let Some(digest) = known().get(&version) {
        return Ok(*digest);
    }
    let digest = read(file)?;
    // One that is written meanwhile is read again next time.
    if Version::of(&file.metadata()?) == version {
        let mut known = known();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(version, digest);
    }
    Ok(digest)
}

fn read(file: &File) -> io::Result<u128> {
    let mut hash = Xxh3Default::new();
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    loop {
        match file.read_at(&mut chunk, at) {
            Ok(0) => return Ok(hash.digest128()),
            Ok(got) => {
                hash.update(&chunk[..got]);
                at += got as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What changes when a file does: device, inode, size, and both times of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version([i64; 7]);

impl Version {
    fn of(m: &Metadata) -> Self {
        let numbers = [m.dev() as i64, m.ino() as i64, m.size() as i64];
        let [device, inode, size] = numbers;
        Self([device, inode, size, m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, number: i32, flags: i32) -> Descriptor {
        let kind = DescriptorKind::File { path: path.into(), position: 0, size: Some(1), digest: None };
        Descriptor { numbers: vec![(number, false)], flags, signals: None, locks: Vec::new(), kind }
    }

    fn refused(descriptors: &[Descriptor]) -> Vec<i32> {
        let places =
            Places { volumes: vec!["/data".into()], shared: vec!["/mnt/nfs".into()], ..Places::default() };
        left_behind(&[(7, descriptors)], &places).into_iter().map(|(_, refused)| refused.fd).collect()
    }

    #[test]
    fn only_what_is_written_on_this_host_is_refused() {
        let (written, read) = (libc::O_RDWR, libc::O_RDONLY);
        let descriptors = [
            file("/data/base/1", 3, written),
            file("/mnt/nfs/1", 4, written),
            file("/etc/passwd", 5, read),
            file("/var/lib/x", 6, written),
            // A name that only begins alike lies elsewhere.
            file("/database", 8, written),
            file("/proc/self/oom_score_adj", 9, written),
        ];
        assert_eq!(refused(&descriptors), [6, 8]);
    }

    #[test]
    fn what_lies_in_a_mount_is_where_that_comes_from() {
        let mounts = [
            ("/jail", Shown::Memory),
            ("/jail/usr", Shown::Path("/usr".into())),
            ("/jail/data", Shown::Path("/data/sub".into())),
            ("/jail/proc", Shown::Kernel),
        ];
        let mounts = mounts.map(|(point, shown)| (point.into(), shown)).to_vec();
        let places = Places { volumes: vec!["/data".into()], mounts, ..Places::default() };
        let found = |path: &str| (places.find(path), places.on_host(path));
        assert_eq!(found("/jail/tmp/x").0, Place::Volume);
        assert_eq!(found("/jail/usr/lib/x.so"), (Place::Host, "/usr/lib/x.so".to_owned()));
        assert_eq!(found("/jail/data/x"), (Place::Volume, "/data/sub/x".to_owned()));
        assert_eq!(found("/jail/proc/self/stat").0, Place::Kernel);
        assert_eq!(found("/jailed/x"), (Place::Host, "/jailed/x".to_owned()));
    }

    #[test]
    fn a_log_is_what_outputs_are_appended_to() {
        let append = libc::O_WRONLY | libc::O_APPEND;
        assert_eq!(refused(&[file("/log", 1, append), file("/log", 7, append)]), [0; 0]);
        assert_eq!(refused(&[file("/aof", 7, append)]), [7]);
        assert_eq!(refused(&[file("/out", 1, libc::O_WRONLY)]), [1]);
    }

    #[test]
    fn a_changed_file_has_another_digest() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("file");
        std::fs::write(&path, "one").expect("write");
        let first = digest(&path).expect("read");
        assert_eq!(digest(&path).expect("read"), first);
        assert_eq!(first, xxhash_rust::xxh3::xxh3_128(b"one"));
        std::fs::write(&path, "two").expect("write");
        assert_ne!(digest(&path).expect("read"), first);
    }
}
