//! Moving a volume of a running instance to another directory, on another device.
//!
//! ```text
//! snapshot     what can't be re-homed is refused; there is room; the record is written
//! transfer     passes while the instance runs, throttled by how much it waits for I/O; both copies are read again and compared
//!              all stopped; what is left is copied; both digests are compared
//! activate     all held by the cgroup; the new copy is the volume (one rename); the mount, descriptors, mappings,
//!              locks and working directories are brought to it
//! verify       nothing is on the old copy any more
//! deactivate   all go on; the old copy is removed
//! ```
//!
//! While the instance is held by its cgroup both copies are the same. Which of them counts is what stands at the volume's place;
//! whoever finds a record (this agent after a failure, the guard, the next agent) brings everything to that one, and only then lets
//! the instance go on.

mod copy;
mod error;
mod freeze;
mod hold;
mod pace;
mod record;
mod recover;
mod room;
mod work;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::{copy::Copy, freeze::Left, record::Record};
pub use self::{
    error::StorageError,
    recover::{bury_left, recover, recover_all},
};
use crate::{
    config::VolumePool,
    instance::{Instance, InstanceName, cgroup, launch::Place, volume::Volume},
    tracee::{
        rehome::survey::{self, Refused, Subject},
        tree,
    },
    volume::{
        place::{self, Switch},
        tree::Tree,
    },
};

/// Looks at an instance that changes all the time, before what was found is taken as it is.
const LOOKS: usize = 5;
/// How long what an earlier swap left may take to be removed, before the next one is refused.
const EARLIER_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks.
const NAP: Duration = Duration::from_millis(2);

/// Lets the instance go on when this process can't: its recovery is [`recover`].
pub trait Watch {
    /// From here on it does.
    fn arm(&self) -> Result<(), String>;
    /// From here on it leaves the instance alone.
    fn disarm(&self);
}

/// What is to be moved.
#[derive(Clone, Debug)]
pub struct StorageOrder {
    /// Where instances are.
    pub place: Place,
    /// Whose.
    pub instance: Instance,
    /// Which volume.
    pub volume: Volume,
    /// Where to.
    pub pool: VolumePool,
    /// How long the instance may stand still for copying.
    pub allowed: Duration,
    /// How long the instance may stand still, in all, until the new disk has done its part.
    pub patience: Duration,
    /// How long copying may take in all.
    pub limit: Duration,
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StorageProgress {
    /// Passes that were made.
    pub passes: u32,
    /// Bytes that were written to the copy.
    pub bytes_copied: u64,
    /// How long the instance would stand still for copying, by the last pass, in milliseconds.
    pub expected_ms: f64,
}

/// What it took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StorageReport {
    /// Where the volume is now.
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// How long the instance stood still, in milliseconds.
    pub unavailability_ms: f64,
    /// All of it, in milliseconds.
    pub duration_ms: f64,
    /// Passes, the last one included.
    pub passes: u32,
    /// Bytes that were written to the copy.
    pub bytes_copied: u64,
    /// Bytes that the copy shares with the volume as it was: both were on one file system.
    #[serde(default)]
    pub bytes_shared: u64,
    /// Bytes of the volume and of the copy that were read again and compared, before the freeze.
    #[serde(default)]
    pub bytes_compared: u64,
    /// Descriptions and mappings that were re-homed.
    pub rehomed: usize,
    /// Where the unavailability went: (step, milliseconds).
    pub freeze_steps_ms: Vec<(String, f64)>,
    /// Of both copies, in hexadecimal.
    pub digest: String,
}

/// The record of a swap of this volume.
pub fn record_path(order: &StorageOrder) -> PathBuf {
    record::directory(&order.place.state_dir)
        .join(format!("{}.{}.json", order.instance.name, order.volume.name))
}

/// Keeps others from a volume's record. What an earlier swap left on a disk that hangs is not waited for.
fn own(path: &Path) -> Result<std::fs::File, StorageError> {
    let locked = record::lock_within(path, EARLIER_LIMIT);
    locked.map_err(StorageError::io(format!("locking {}", path.display())))?.ok_or_else(|| {
        StorageError::Unfit(
            "what an earlier swap of it left is still being removed: the disk that it is on does not answer"
                .into(),
        )
    })
}

/// Moves the volume. Blocks; the thread must live until it returns.
pub fn move_to(
    order: &StorageOrder,
    watch: &dyn Watch,
    on_progress: &mut dyn FnMut(&StorageProgress),
) -> Result<StorageReport, StorageError> {
    let began = Instant::now();
    let StorageOrder { place, instance, volume, pool, .. } = order;
    let (name, volume_name) = (instance.name.as_str(), volume.name.as_str());
    let path = record_path(order);
    if path.exists() {
        drop(own(&path)?);
        // It would be forgotten by this one; and of one whose way back failed the instance stands still. If this process is killed in it, the guard
        // goes on with it. What is removed is waited for below, for a while.
        let armed = watch.arm().map_err(StorageError::Watch);
        let brought = armed.and_then(|()| recover::let_go_aside(&path));
        watch.disarm();
        brought.map_err(|source| StorageError::NotAtItsEnd { source: Box::new(source) })?;
    }
    require_fit(order)?;
    let lock = own(&path)?;
    place::require_mounted(&pool.mount_point, &pool.directory)?;
    let switch = Switch::plan(&place.volumes, name, volume_name, &pool.directory)?;
    place::make(&pool.directory)?;
    let built = place::arriving(&pool.directory)?;
    require_rehomable(order, switch.old()?)?;
    let mut record = Record {
        instance: instance.clone(),
        volume: volume.clone(),
        switch: switch.clone(),
        built: built.clone(),
        plan: None,
        tasks: Vec::new(),
        opened: false,
    };
    record.write(&path).map_err(StorageError::io(format!("writing {}", path.display())))?;
    let mut left = Left::default();
    let done = copied(order, &mut record, &path, watch, on_progress, &mut left);
    // One whose way back failed is brought to its end by the next agent.
    let is_over = !matches!(done, Err(StorageError::NotRestored { .. }));
    let lock = is_over.then_some(lock);
    // Nobody has to wait for that but who comes next.
    std::thread::spawn(move || {
        drop(left);
        if let Some(lock) = lock {
            recover::finish(&record, &path);
            drop(lock);
        }
    });
    let mut report = done?;
    report.directory = switch.after;
    report.duration_ms = began.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}

fn require_fit(order: &StorageOrder) -> Result<(), StorageError> {
    let StorageOrder { place, instance, volume, .. } = order;
    if instance.init_pid.is_none() {
        let text = format!("{} has no mount namespace of its own: start it with `rswap run`", instance.name);
        return Err(StorageError::Unfit(text));
    }
    if !instance.volumes.contains(volume) {
        return Err(StorageError::Unfit(format!("{} has no volume {}", instance.name, volume.name)));
    }
    if let Some(reason) = frozen(&place.state_dir, instance) {
        return Err(StorageError::Unfit(reason));
    }
    Ok(())
}

/// Why nothing can be done in an instance that is frozen, if it is.
pub fn frozen(state_dir: &Path, instance: &Instance) -> Option<String> {
    let name = &instance.name;
    if !cgroup::is_frozen(&instance.cgroup) {
        return None;
    }
    Some(match standing(state_dir).remove(&instance.cgroup_id) {
        // To let it go on by hand would give it two halves of a volume.
        Some(volume) => format!(
            "{name} stands still until a swap of its volume {volume} is brought to its end: `rswap swap {name} POOL --volume {volume}` tries \
             that again, and so does an agent that is started anew"
        ),
        None => format!("{name} is frozen (cgroup.freeze): let it go on first"),
    })
}

/// The instances that stand still for a swap of a volume, by their cgroups' ids, and the volume: one under way, or one that failed, and whose way
/// back did, too.
pub fn standing(state_dir: &Path) -> BTreeMap<u64, InstanceName> {
    let all = record::all(state_dir).filter_map(|path| Record::read(&path).ok());
    all.filter(|record| record.plan.is_some() && cgroup::is_frozen(&record.instance.cgroup))
        .map(|record| (record.instance.cgroup_id, record.volume.name))
        .collect()
}

/// Before anything is done: the program runs, so what stands against it has to be found twice in a row.
fn require_rehomable(order: &StorageOrder, directory: &Path) -> Result<(), StorageError> {
    let StorageOrder { instance, volume, .. } = order;
    let open =
        || fs::File::open(directory).map_err(StorageError::io(format!("opening {}", directory.display())));
    let mut before: Option<Vec<Refused>> = None;
    for _ in 0..LOOKS {
        let tree = crate::volume::tree::scan(std::os::fd::AsFd::as_fd(&open()?), &Tree::new())?;
        let subject = Subject { instance, volume, directory, tree: &tree };
        let (_, mut refused) = survey::survey(&subject, &tree::listed(instance)?)?;
        refused.sort();
        if refused.is_empty() {
            return Ok(());
        }
        if before.as_ref() == Some(&refused) {
            return Err(StorageError::Refused(refused));
        }
        before = Some(refused);
        std::thread::sleep(NAP);
    }
    // It changes all the time: the freeze tells.
    Ok(())
}

/// What was used is left to the caller: it goes when nobody waits any more, and nobody watches.
fn copied(
    order: &StorageOrder,
    record: &mut Record,
    path: &Path,
    watch: &dyn Watch,
    on_progress: &mut dyn FnMut(&StorageProgress),
    left: &mut Left,
) -> Result<StorageReport, StorageError> {
    let StorageOrder { instance, volume, allowed, limit, .. } = order;
    let copy = left.copy.insert(Copy::begin(record.switch.old()?, &record.built)?);
    let deadline = Instant::now() + *limit;
    copy.run(instance, volume, *allowed, deadline, &mut |passes, bytes_copied, took| {
        let expected_ms = took.as_secs_f64() * 1e3;
        tracing::debug!(passes, bytes_copied, expected_ms, "a pass over a volume");
        on_progress(&StorageProgress { passes, bytes_copied, expected_ms });
    })?;
    record.switch.prepare()?;
    hold::prepare(instance)?;
    watch.arm().map_err(StorageError::Watch)?;
    let moved = freeze::run(order, record, path, left);
    watch.disarm();
    // One that could not be brought back still stands, held by its cgroup: no call can be made in it.
    if !matches!(moved, Err(StorageError::NotRestored { .. })) {
        hold::bury(std::mem::take(&mut left.processes));
    }
    moved
}
