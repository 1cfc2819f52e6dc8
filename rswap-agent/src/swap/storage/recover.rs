//! The end of a swap, whoever brings it about: what is not needed any more goes, and what was broken off is completed.

use std::{fs, io, path::Path};

use super::{
    StorageError, freeze,
    hold::{self, Stopped},
    record::{self, Record},
};
use crate::instance::cgroup;

/// Takes away what only the swap needed, and the copy that is not the volume.
pub(super) fn finish(record: &Record, path: &Path) {
    if record.built.exists()
        && let Err(error) = fs::remove_dir_all(&record.built)
    {
        tracing::warn!(path = %record.built.display(), %error, "a copy that was not finished is left");
    }
    record.switch.clean();
    if let Err(error) = record::remove(path) {
        tracing::warn!(path = %path.display(), %error, "the record of a storage swap is left");
    }
}

/// Brings the swap that `path` tells of to its end: to the side that is the volume. Waits for whoever is at it.
pub fn recover(path: &Path) -> Result<(), StorageError> {
    let _lock = record::lock(path).map_err(StorageError::io(format!("locking {}", path.display())))?;
    let mut record = match Record::read(path) {
        // Done meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        record => record.map_err(StorageError::io(format!("reading {}", path.display())))?,
    };
    let Record { instance, switch, plan, tasks, .. } = record.clone();
    let (instance, switch) = (&instance, &switch);
    let here = cgroup::id(&instance.cgroup).is_ok_and(|id| id == instance.cgroup_id)
        && cgroup::is_populated(&instance.cgroup);
    if let (true, true, Some(plan)) = (here, cgroup::is_frozen(&instance.cgroup), &plan) {
        tracing::warn!(
            instance = %instance.name,
            volume = %record.volume.name,
            moved = switch.is_made(),
            "a storage swap that was broken off is brought to its end"
        );
        let stopped = Stopped::all(instance)?;
        // Every thread is held by this one.
        cgroup::freeze(&instance.cgroup, false)?;
        let mut hands = stopped.hand_over(instance, plan, true, |made| {
            record.tasks.extend(made);
            record.write_plan(path).map_err(StorageError::io(format!("writing {}", path.display())))
        })?;
        for earlier in &tasks {
            if let Some(hand) = hands.get_mut(&earlier.process) {
                hand.clean_after(earlier)?;
            }
        }
        freeze::bring(switch, plan, &mut hands)?;
        // Whoever was killed may have been so before.
        switch.sync()?;
        hold::let_go(instance, hands)?;
    }
    if here {
        hold::clean(instance);
    }
    finish(&record, path);
    Ok(())
}

/// Brings all swaps of this host to their ends that an agent has left.
pub fn recover_all(state_dir: &Path) {
    for entry in fs::read_dir(record::directory(state_dir)).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "json")
            && let Err(error) = recover(&path)
        {
            tracing::error!(path = %path.display(), %error, "a storage swap could not be brought to its end");
        }
    }
}
