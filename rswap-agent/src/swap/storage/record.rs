//! What is written down of a storage swap, so that another process can bring it to its end.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    instance::{Instance, volume::Volume},
    tracee::{hand::Task, rehome::Plan},
    volume::place::Switch,
};

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
}

/// Where the records are.
pub(super) fn directory(state_dir: &Path) -> PathBuf {
    state_dir.join("volume-swaps")
}

/// Keeps others from what the record in `path` tells of, as long as the file is open.
pub(super) fn lock(path: &Path) -> io::Result<File> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    let file = File::create(path.with_extension("lock"))?;
    file.lock()?;
    Ok(file)
}

impl Record {
    /// Writes it, whole or not at all. With `through`, it is on the disk when this returns: a plan speaks of processes, and
    /// need not outlive them.
    pub(super) fn write(&self, path: &Path, through: bool) -> io::Result<()> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent)?;
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        if through {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)?;
        if through { File::open(parent)?.sync_all() } else { Ok(()) }
    }

    pub(super) fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }
}
