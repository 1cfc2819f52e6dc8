//! The end of a swap, whoever brings it about: what is not needed any more goes, and what was broken off is completed.

use std::{
    collections::BTreeMap,
    fs, io,
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use super::{
    StorageError, freeze,
    hold::{self, Stopped},
    record::{self, Record},
};
use crate::{
    instance::{Instance, cgroup},
    tracee::tree,
};

/// How long an instance stands still, once more, for a disk that it was brought to.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an agent that starts waits until instances are let go: longer than a guard, which may be at it and waits for the disk first.
const START_LIMIT: Duration = Duration::from_secs(12);

/// Takes away what only the swap needed, and the copy that is not the volume.
pub(super) fn finish(record: &Record, path: &Path) {
    if record.built.exists()
        && let Err(error) = fs::remove_dir_all(&record.built)
    {
        tracing::warn!(path = %record.built.display(), %error, "a copy that was not finished is left");
    }
    if let Err(error) = record.switch.clean() {
        tracing::error!(%error, "both copies of a volume are left, and the record of its swap");
        return;
    }
    if let Err(error) = record::remove(path) {
        tracing::warn!(path = %path.display(), %error, "the record of a storage swap is left");
    }
}

/// A swap that is over for its instance: what is left of it is still to be removed, which may take long.
struct Over {
    record: Record,
    lock: fs::File,
}

impl Over {
    fn finish(self, path: &Path) {
        finish(&self.record, path);
        drop(self.lock);
    }
}

/// Brings the swap that `path` tells of to its end: to the side that is the volume. Waits for whoever is at it.
pub fn recover(path: &Path) -> Result<(), StorageError> {
    if let Some(over) = let_go(path)? {
        over.finish(path);
    }
    Ok(())
}

/// The same as far as the instance is concerned: nobody waits for what is removed.
pub(super) fn let_go_aside(path: &Path) -> Result<(), StorageError> {
    if let Some(over) = let_go(path)? {
        let path = path.to_owned();
        thread::spawn(move || over.finish(&path));
    }
    Ok(())
}

/// The same without what is to be removed; `None` if there was nothing to do any more. By a thread that ends: what does not stop in time, as it
/// waits for a disk, is left to its own only by the end of the thread that has tried.
fn let_go(path: &Path) -> Result<Option<Over>, StorageError> {
    let over = thread::scope(|scope| scope.spawn(|| let_go_from_here(path)).join());
    over.unwrap_or_else(|panic| resume_unwind(panic))
}

fn let_go_from_here(path: &Path) -> Result<Option<Over>, StorageError> {
    let began = Instant::now();
    let lock = record::lock(path).map_err(StorageError::io(format!("locking {}", path.display())))?;
    let mut record = match Record::read(path) {
        // Done meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        record => record.map_err(StorageError::io(format!("reading {}", path.display())))?,
    };
    let Record { instance, switch, plan, tasks, .. } = record.clone();
    let (instance, switch) = (&instance, &switch);
    // Where that isn't known, nothing is taken away: one that stands still may be on either copy.
    let here = instance.is_alive()?;
    let stands = here && cgroup::try_is_frozen(&instance.cgroup)?;
    if record.opened && !stands {
        let (old, new) = (switch.old()?.display(), switch.after.display());
        return Err(StorageError::Unfit(format!(
            "{} may have written to both {old} and {new}, as whoever brought a swap of its volume {} to an end was killed in the middle of it: \
             both are kept until you have looked at them and removed {}",
            instance.name,
            record.volume.name,
            path.display()
        )));
    }
    if let (true, Some(plan)) = (stands, &plan) {
        tracing::warn!(
            instance = %instance.name,
            volume = %record.volume.name,
            moved = switch.is_made()?,
            "a storage swap that was broken off is brought to its end"
        );
        let note = |record: &Record| {
            record.write_plan(path).map_err(StorageError::io(format!("writing {}", path.display())))
        };
        let stopped = Stopped::all(instance)?;
        record.opened = true;
        note(&record)?;
        // Every thread is held by this one.
        cgroup::freeze(&instance.cgroup, false)?;
        let mut hands = stopped.hand_over(instance, plan, true, |made| {
            record.tasks.extend(made);
            note(&record)
        })?;
        record.opened = false;
        note(&record)?;
        for earlier in &tasks {
            if let Some(hand) = hands.get_mut(&earlier.process) {
                hand.clean_after(earlier)?;
            }
        }
        freeze::bring(switch, plan, &mut hands, PATIENCE)?;
        // Whoever was killed may have been so before.
        switch.sync()?;
        freeze::let_go(instance, path, hands)?;
    }
    // Whoever was waited for has cleaned up, and other work on the instance may be under way by now.
    if here && began.elapsed() < START_LIMIT {
        hold::clean(instance);
    }
    Ok(Some(Over { record, lock }))
}

/// Brings all swaps of this host to their ends that an agent has left. What is on a disk that hangs is not waited for: it is done when that
/// answers.
pub fn recover_all(state_dir: &Path) {
    let mut of_instances: BTreeMap<PathBuf, Vec<(bool, PathBuf)>> = BTreeMap::new();
    for path in record::all(state_dir) {
        // What can't be read is said by whoever does it.
        let (instance, stood) = Record::read(&path)
            .map_or_else(|_| (path.clone(), false), |record| (record.instance.cgroup, record.plan.is_some()));
        of_instances.entry(instance).or_default().push((!stood, path));
    }
    let begun: Vec<_> = of_instances
        .into_values()
        .map(|mut of_one| {
            // The one in whose middle it stands comes first: the others look for what was left in its programs.
            of_one.sort_unstable();
            begin(of_one.into_iter().map(|(_, path)| path).collect())
        })
        .collect();
    let deadline = Instant::now() + START_LIMIT;
    for over in begun {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Err(RecvTimeoutError::Timeout) = over.recv_timeout(left) {
            tracing::error!(
                "a storage swap that was broken off is not at its end yet: who is at it, or a disk, does not answer"
            );
        }
    }
}

/// Takes away what is left of tasks of ours in these instances' programs: what a swap that is over could not, as a process did not stop in time.
pub fn bury_left(instances: &[Instance]) {
    let moved = |instance: &&Instance| !instance.volumes.is_empty() && !cgroup::is_frozen(&instance.cgroup);
    for instance in instances.iter().filter(moved) {
        // By a thread that ends, as above.
        let bury = || hold::bury(tree::listed(instance).unwrap_or_default());
        if thread::scope(|scope| scope.spawn(bury).join()).is_err() {
            tracing::error!(instance = %instance.name, "looking for what swaps have left panicked");
        }
    }
}

/// Brings those of one instance to their ends, one after the other, on a thread of their own, which tells when the instance is let go.
fn begin(paths: Vec<PathBuf>) -> mpsc::Receiver<()> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let over: Vec<_> = paths.into_iter().map(|path| (let_go(&path), path)).collect();
        // Nobody may wait for it any more.
        let _ = tell.send(());
        for (over, path) in over {
            match over {
                Ok(Some(over)) => over.finish(&path),
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a storage swap could not be brought to its end");
                }
            }
        }
    });
    told
}
