//! Cgroups v2 of instances. Only directories that rswap made are ever removed.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::InstanceError;
use crate::kept_files::has_gone;

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
/// When it exists already and has processes, or may have some.
pub fn create(parent: &str, name: &str) -> Result<PathBuf, InstanceError> {
    let path = mount_point()?.join(parent).join(name);
    fs::create_dir_all(&path).map_err(InstanceError::io(format!("making the cgroup {}", path.display())))?;
    if is_populated(&path)? {
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

/// Whether any process is in the cgroup or below it; none is, if it has gone.
///
/// # Errors
/// It can't be read now: that says nothing of its processes.
pub fn is_populated(path: &Path) -> Result<bool, InstanceError> {
    says(path, "cgroup.events", |events| events.contains("populated 1"))
}

/// Whether a small file of a cgroup says so; no, if the cgroup has gone. One call has all of it.
fn says(cgroup: &Path, file: &str, it: impl Fn(&str) -> bool) -> Result<bool, InstanceError> {
    let path = cgroup.join(file);
    let mut buffer = [0; 256];
    match fs::File::open(&path).and_then(|mut file| file.read(&mut buffer)) {
        Ok(length) => Ok(std::str::from_utf8(&buffer[..length]).is_ok_and(it)),
        Err(error) if has_gone(&error) => Ok(false),
        Err(error) => Err(InstanceError::io(format!("reading {}", path.display()))(error)),
    }
}

/// Holds every process in the cgroup still, or lets all go on. None of them executes another instruction of its program
/// when this returns, those that a tracer lets go included: they stop on their way out of the kernel.
pub fn freeze(path: &Path, frozen: bool) -> Result<(), InstanceError> {
    let file = path.join("cgroup.freeze");
    let word = if frozen { "1" } else { "0" };
    fs::write(&file, word).map_err(InstanceError::io(format!("writing {}", file.display())))
}

/// Whether the cgroup is held still, or about to be; no, if it can't be read.
pub fn is_frozen(path: &Path) -> bool {
    try_is_frozen(path).unwrap_or(false)
}

/// The same, for who would take away what one that is held still needs.
///
/// # Errors
/// It can't be read now.
pub fn try_is_frozen(path: &Path) -> Result<bool, InstanceError> {
    says(path, "cgroup.freeze", |word| word.trim() == "1")
}

/// Whether the cgroup stands still or is about to, by itself or with one that it is in; no, if it can't be read.
pub fn stands_still(path: &Path) -> bool {
    // With a process in a wait that nothing ends, it is never said to be frozen.
    is_frozen(path) || says(path, "cgroup.events", |events| events.contains("frozen 1")).unwrap_or(false)
}

/// Kills every process in the cgroup at once and waits until it is empty.
///
/// # Errors
/// It can't be killed, or is not empty, as far as is known, after five seconds.
pub fn kill(path: &Path) -> Result<(), InstanceError> {
    let file = path.join("cgroup.kill");
    fs::write(&file, "1").map_err(InstanceError::io(format!("writing {}", file.display())))?;
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    loop {
        let populated = is_populated(path);
        if let Ok(false) = populated {
            return Ok(());
        }
        if Instant::now() > deadline {
            // Whoever has it killed takes away what its processes use: one that can't be read is not empty.
            populated?;
            return Err(InstanceError::Invalid(format!(
                "{} still has processes after a kill",
                path.display()
            )));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_that_can_not_be_read_is_not_empty() {
        let directory = tempfile::tempdir().unwrap();
        let events = directory.path().join("cgroup.events");
        assert!(!is_populated(directory.path()).unwrap(), "it has gone");
        // It can be opened, and not be read.
        fs::create_dir(&events).unwrap();
        let error = is_populated(directory.path()).unwrap_err();
        assert!(error.to_string().contains("cgroup.events"), "{error}");
        fs::remove_dir(&events).unwrap();
        for (text, expected) in [("populated 0\nfrozen 0\n", false), ("populated 1\nfrozen 1\n", true)] {
            fs::write(&events, text).unwrap();
            assert_eq!(is_populated(directory.path()).unwrap(), expected);
        }
    }

    #[test]
    fn the_end_of_what_is_killed_is_waited_for_while_it_can_not_be_read() {
        const UNREADABLE: Duration = Duration::from_millis(50);
        let directory = tempfile::tempdir().unwrap();
        let events = directory.path().join("cgroup.events");
        fs::create_dir(&events).unwrap();
        let began = Instant::now();
        let goes = std::thread::spawn(move || {
            std::thread::sleep(UNREADABLE);
            fs::remove_dir(events).unwrap();
        });
        kill(directory.path()).unwrap();
        assert!(began.elapsed() >= UNREADABLE, "after {:?}", began.elapsed());
        goes.join().unwrap();
    }
}
