//! What is written down of a storage swap, so that another process can bring it to its end.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    instance::{Instance, volume::Volume},
    tracee::{hand::Task, rehome::Plan},
    volume::place::Switch,
};

/// How often it is tried whether a record is free.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A storage swap that is under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) instance: Instance,
    pub(super) volume: Volume,
    /// From where to where. Which of them is the volume is what stands at its place, not what is written here.
    pub(super) switch: Switch,
    /// Where the copy is built.
    pub(super) built: PathBuf,
    /// What has to be brought to one side before the instance may go on; written before it is held by its cgroup.
    pub(super) plan: Option<Plan>,
    /// The tasks that were made for it.
    pub(super) tasks: Vec<Task>,
    /// Whoever brings it to its end has opened the instance's cgroup, and holds its threads alone: if it goes on so, it is on both sides.
    #[serde(default)]
    pub(super) opened: bool,
}

/// Where the records are.
pub(super) fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("volume-swaps")
}

/// Where each of them is.
pub(super) fn all(state_dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory(state_dir)).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension() == Some("json".as_ref()))
}

/// Keeps others from what the record in `path` tells of, as long as the file is open.
pub(super) fn lock(path: &Path) -> io::Result<File> {
    let file = lock_file(path)?;
    file.lock()?;
    Ok(file)
}

/// The same; `None` if somebody else keeps it for longer than `patience`.
pub(super) fn lock_within(path: &Path, patience: Duration) -> io::Result<Option<File>> {
    let file = lock_file(path)?;
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(LOOK_EVERY),
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

fn lock_file(path: &Path) -> io::Result<File> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    File::create(path.with_extension("lock"))
}

/// Where the record in `path` is once more, with the plan. It is written while the instance stands still, so it is not waited for
/// until it is on the disk, and may be there empty after a loss of power. It must not replace what is on the disk.
fn with_plan(path: &Path) -> PathBuf {
    path.with_extension("plan")
}

/// Removes the record in `path`.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    // This first: without the other one nobody would look for it.
    remove_plan(path)?;
    fs::remove_file(path)
}

/// Removes what the record in `path` says of processes.
pub(super) fn remove_plan(path: &Path) -> io::Result<()> {
    match fs::remove_file(with_plan(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

impl Record {
    /// Writes it, whole or not at all. It is on the disk when this returns.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent)?;
        // Of an earlier swap.
        remove_plan(path)?;
        self.put(path, true)?;
        File::open(parent)?.sync_all()
    }

    /// Writes it with its plan beside what [`Self::write`] wrote, whole or not at all for as long as the kernel runs: a plan speaks
    /// of processes, and need not outlive them.
    pub(super) fn write_plan(&self, path: &Path) -> io::Result<()> {
        self.put(&with_plan(path), false)
    }

    fn put(&self, path: &Path, through: bool) -> io::Result<()> {
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        if through {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)
    }

    /// With the plan, if there is one.
    pub(super) fn read(path: &Path) -> io::Result<Self> {
        let record: Self = serde_json::from_slice(&fs::read(path)?)?;
        let text = match fs::read(with_plan(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(record),
            text => text?,
        };
        // What a loss of power has left of it is as good as nothing: the processes are gone, too.
        let planned: Option<Self> = serde_json::from_slice(&text).ok();
        Ok(planned.filter(|planned| planned.switch == record.switch).unwrap_or(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{instance::Origin, volume::place};

    fn record(home: &Path, pool: &Path) -> Record {
        let instance = Instance {
            name: "db".parse().expect("a name"),
            labels: Default::default(),
            cgroup: "/nowhere".into(),
            cgroup_id: 1,
            origin: Origin::Run,
            init_pid: Some(1),
            command: Vec::new(),
            network: None,
            volumes: Vec::new(),
            pool: None,
            uplink: None,
            memory: None,
            since: Default::default(),
        };
        let volume = "data:/data".parse().expect("a volume");
        let switch = Switch::plan(home, "db", "data", pool).expect("plan");
        let (built, tasks) = (pool.join("built"), Vec::new());
        Record { instance, volume, switch, built, plan: None, tasks, opened: false }
    }

    #[test]
    fn of_an_instance_that_went_on_in_the_middle_both_copies_are_kept() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (home, pool) = (directory.path().join("home"), directory.path().join("pool"));
        let place = place::of(&home, "db", "data");
        fs::create_dir_all(&place).expect("create");
        let path = directory.path().join("volume-swaps/db.data.json");
        let mut record = record(&home, &pool);
        let copy = record.switch.after.clone();
        fs::create_dir_all(&copy).expect("create");
        record.write(&path).expect("write");
        record.opened = true;
        record.write_plan(&path).expect("write");
        let refused =
            crate::swap::storage::recover(&path).expect_err("nobody knows what is where").to_string();
        for named in [&copy, &path] {
            assert!(refused.contains(&named.display().to_string()), "{refused}");
        }
        assert!(place.is_dir() && copy.is_dir() && path.is_file());
        // Somebody has looked at them.
        fs::remove_file(&path).expect("remove");
        crate::swap::storage::recover(&path).expect("nothing to do");
        assert!(place.is_dir() && copy.is_dir());
    }

    #[test]
    fn what_is_left_of_a_plan_does_not_stand_for_the_record() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (home, pool) = (directory.path().join("home"), directory.path().join("pool"));
        fs::create_dir_all(place::of(&home, "db", "data")).expect("create");
        let path = directory.path().join("volume-swaps/db.data.json");
        let mut record = record(&home, &pool);
        record.write(&path).expect("write");
        assert!(Record::read(&path).expect("read").plan.is_none());
        record.plan = Some(Plan {
            point: "/data".into(),
            init: 1,
            mounts: 1,
            mounts_aside: 1,
            descriptions: Vec::new(),
            mappings: Vec::new(),
            working: Vec::new(),
            nameless: Vec::new(),
        });
        record.write_plan(&path).expect("write");
        assert_eq!(Record::read(&path).expect("read").plan, record.plan);
        // After a loss of power.
        for left in ["", "{\"instance\":"] {
            fs::write(with_plan(&path), left).expect("write");
            assert!(Record::read(&path).expect("read").plan.is_none());
        }
        // Of another swap.
        record.write_plan(&path).expect("write");
        let mut next = record.clone();
        next.switch = Switch::plan(&home, "db", "data", &directory.path().join("other")).expect("plan");
        next.plan = None;
        next.put(&path, true).expect("write");
        assert!(Record::read(&path).expect("read").plan.is_none());
        next.write(&path).expect("write");
        assert!(!with_plan(&path).exists());
        record.write_plan(&path).expect("write");
        remove(&path).expect("remove");
        let left = fs::read_dir(directory.path().join("volume-swaps")).expect("read");
        assert_eq!(left.count(), 0);
    }
}
