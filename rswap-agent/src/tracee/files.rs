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
};

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
}

/// Where a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a volume: it goes along.
    Volume,
    /// In a directory that all hosts share: it is there already.
    Shared,
    /// On this host: the other one must have the same.
    Host,
}

impl Places {
    /// Where the file with this path is.
    pub fn of(&self, path: &str) -> Place {
        let lies_in = |directories: &[PathBuf]| directories.iter().any(|d| Path::new(path).starts_with(d));
        if lies_in(&self.volumes) {
            Place::Volume
        } else if lies_in(&self.shared) {
            Place::Shared
        } else {
            Place::Host
        }
    }
}

/// A regular file of this host: its path, and whether it is written. Files without contents (`/proc`, devices) are none.
fn of_this_host<'a>(descriptor: &'a Descriptor, places: &Places) -> Option<(&'a str, bool)> {
    match &descriptor.kind {
        DescriptorKind::File { path, size: Some(_), .. } if descriptor.flags & libc::O_PATH == 0 => {
            let kernels_own = ["/proc/", "/sys/"].iter().any(|root| path.starts_with(root));
            let writes = descriptor.flags & libc::O_ACCMODE != libc::O_RDONLY;
            (!kernels_own && places.of(path) == Place::Host).then_some((path, writes))
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
            digest => drop(found.insert(path.to_owned(), digest.map_err(TraceeError::proc(path))?)),
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
        let places = Places { volumes: vec!["/data".into()], shared: vec!["/mnt/nfs".into()] };
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
