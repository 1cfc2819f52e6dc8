//! Cgroups v2 of instances. Only directories that rswap made are ever removed.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::InstanceError;

/// How long a cgroup may take to become empty after its processes were killed.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the cgroup v2 hierarchy is mounted: with v1 controllers in use it is not at `/sys/fs/cgroup`.
pub fn mount_point() -> Result<PathBuf, InstanceError> {
    let what = "reading /proc/self/mountinfo";
    let process = procfs::process::Process::myself()
        .and_then(|process| process.mountinfo())
        .map_err(|error| InstanceError::io(what)(io::Error::other(error)))?;
    let found = process.into_iter().find(|mount| mount.fs_type == "cgroup2").map(|mount| mount.mount_point);
    found.ok_or_else(|| {
        InstanceError::Invalid("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup".into())
    })
}

/// Makes the cgroup `parent/name` and returns its path.
///
/// # Errors
/// When it exists already and has processes.
pub fn create(parent: &str, name: &str) -> Result<PathBuf, InstanceError> {
    let path = mount_point()?.join(parent).join(name);
    fs::create_dir_all(&path).map_err(InstanceError::io(format!("making the cgroup {}", path.display())))?;
    if is_populated(&path) {
        return Err(InstanceError::Invalid(format!(
            "{} has processes already: choose another name",
            path.display()
        )));
    }
    Ok(path)
}

/// The kernel's id of a cgroup: its directory's inode number.
pub fn id(path: &Path) -> Result<u64, InstanceError> {
    let metadata = fs::metadata(path).map_err(InstanceError::io(format!("looking at {}", path.display())))?;
    Ok(metadata.ino())
}

/// Whether any process is in the cgroup or below it.
pub fn is_populated(path: &Path) -> bool {
    says(path, "cgroup.events", |events| events.contains("populated 1"))
}

/// Whether a small file of a cgroup says so; no, if it can't be read. One call has all of it.
fn says(cgroup: &Path, file: &str, it: impl Fn(&str) -> bool) -> bool {
    let mut buffer = [0; 256];
    let read = fs::File::open(cgroup.join(file)).and_then(|mut file| file.read(&mut buffer));
    read.is_ok_and(|length| std::str::from_utf8(&buffer[..length]).is_ok_and(it))
}

/// Holds every process in the cgroup still, or lets all go on. None of them executes another instruction of its program
/// when this returns, those that a tracer lets go included: they stop on their way out of the kernel.
pub fn freeze(path: &Path, frozen: bool) -> Result<(), InstanceError> {
    let file = path.join("cgroup.freeze");
    let word = if frozen { "1" } else { "0" };
    fs::write(&file, word).map_err(InstanceError::io(format!("writing {}", file.display())))
}

/// Whether the cgroup is held still, or about to be.
pub fn is_frozen(path: &Path) -> bool {
    says(path, "cgroup.freeze", |word| word.trim() == "1")
}

/// Whether the cgroup stands still or is about to, by itself or with one that it is in.
pub fn stands_still(path: &Path) -> bool {
    // With a process in a wait that nothing ends, it is never said to be frozen.
    is_frozen(path) || says(path, "cgroup.events", |events| events.contains("frozen 1"))
}

/// Kills every process in the cgroup at once and waits until it is empty.
pub fn kill(path: &Path) -> Result<(), InstanceError> {
    let file = path.join("cgroup.kill");
    fs::write(&file, "1").map_err(InstanceError::io(format!("writing {}", file.display())))?;
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    while is_populated(path) {
        if Instant::now() > deadline {
            return Err(InstanceError::Invalid(format!(
                "{} still has processes after a kill",
                path.display()
            )));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Removes an empty cgroup with those that were made below it; one that is gone already is no error.
pub fn remove(path: &Path) -> Result<(), InstanceError> {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(InstanceError::io(format!("removing {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}
