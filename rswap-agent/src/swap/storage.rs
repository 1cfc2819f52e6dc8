//! Moving a volume of a running instance to another directory, on another device.
//!
//! ```text
//! snapshot     what can't be re-homed is refused; there is room; the record is written
//! transfer     passes while the instance runs, throttled by how much it waits for I/O
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
mod hold;
mod pace;
mod record;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use self::{copy::Copy, hold::Stopped, record::Record};
use crate::{
    instance::{Instance, InstanceError, cgroup, launch::Place, volume::Volume},
    tracee::{
        TraceeError,
        rehome::{
            Plan,
            apply::{self, Hands},
            side::Side,
            survey::{self, Refused, Subject},
        },
        tree,
    },
    volume::{
        VolumeError,
        place::{self, Switch},
        tree::Tree,
    },
};

/// Looks at an instance that changes all the time, before what was found is taken as it is.
const LOOKS: usize = 5;
/// Between two looks.
const NAP: Duration = Duration::from_millis(2);

/// Why a volume did not move. Unless it says so, the instance goes on with the volume where it was.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Something can't be re-homed.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Refused(Vec<Refused>),
    /// The instance or the volume isn't such that it could move.
    #[error("{0}")]
    Unfit(String),
    /// The pool is too small.
    #[error(
        "no room in {}: {bytes} bytes and {inodes} inodes are needed, {free_bytes} and {free_inodes} are free",
        .pool.display()
    )]
    NoRoom {
        /// Its directory.
        pool: PathBuf,
        /// Needed.
        bytes: u64,
        /// Needed.
        inodes: u64,
        /// Free.
        free_bytes: u64,
        /// Free.
        free_inodes: u64,
    },
    /// Passes did not become short enough for a freeze.
    #[error(
        "it changes too fast: after {passes} passes it would stand still for {expected_ms:.0} ms, and {allowed_ms:.0} ms \
         are allowed (migrate.max_unavailability_ms)"
    )]
    TooFast {
        /// How many there were.
        passes: u32,
        /// How long the last one took.
        expected_ms: f64,
        /// How long it may take.
        allowed_ms: f64,
    },
    /// The copy is another than the volume.
    #[error("the copy is not what was copied (digest {there:032x} instead of {here:032x})")]
    Digest {
        /// Of the volume.
        here: u128,
        /// Of the copy.
        there: u128,
    },
    /// Copying failed.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Surgery failed.
    #[error(transparent)]
    Tracee(#[from] TraceeError),
    /// The cgroup could not be held.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// A file could not be read or written.
    #[error("{what}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The freeze was too long.
    #[error("{0}")]
    Watch(String),
    /// It failed, and so did the way back: the instance stands still, and the next agent tries again.
    #[error(
        "it failed ({cause}), and the way back failed, too: the instance stands still until an agent is started anew"
    )]
    NotRestored {
        /// Why the swap failed.
        cause: Box<StorageError>,
        /// Why the way back failed.
        #[source]
        source: Box<StorageError>,
    },
}

impl StorageError {
    fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |error| Self::Io { what: what.into(), source: error.into() }
    }
}

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
    /// The directory of the pool.
    pub pool: PathBuf,
    /// How long the instance may stand still for copying.
    pub allowed: Duration,
    /// How long copying may take in all.
    pub limit: Duration,
}

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StorageProgress {
    /// Passes that were made.
    pub passes: u32,
    /// Bytes that were written to the copy.
    pub bytes_copied: u64,
    /// How long the instance would stand still for copying, by the last pass, in milliseconds.
    pub expected_ms: f64,
}

/// What it took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StorageReport {
    /// Where the volume is now.
    pub directory: PathBuf,
    /// How long the instance stood still, in milliseconds.
    pub unavailability_ms: f64,
    /// All of it, in milliseconds.
    pub duration_ms: f64,
    /// Passes, the last one included.
    pub passes: u32,
    /// Bytes that were written to the copy.
    pub bytes_copied: u64,
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

/// Moves the volume. Blocks; the thread must live until it returns.
pub fn move_to(
    order: &StorageOrder,
    watch: &dyn Watch,
    on_progress: &mut dyn FnMut(&StorageProgress),
) -> Result<StorageReport, StorageError> {
    let began = Instant::now();
    let StorageOrder { place, instance, volume, pool, .. } = order;
    let (name, volume_name) = (instance.name.as_str(), volume.name.as_str());
    require_fit(order)?;
    let path = record_path(order);
    if path.exists() {
        // It would be forgotten by this one.
        recover(&path)?;
    }
    let lock = record::lock(&path).map_err(StorageError::io(format!("locking {}", path.display())))?;
    let switch = Switch::plan(&place.volumes, name, volume_name, pool)?;
    place::make(pool)?;
    let built = place::arriving(pool)?;
    require_rehomable(order, switch.old())?;
    let mut record = Record {
        instance: instance.clone(),
        volume: volume.clone(),
        switch: switch.clone(),
        built: built.clone(),
        plan: None,
        tasks: Vec::new(),
    };
    record.write(&path, true).map_err(StorageError::io(format!("writing {}", path.display())))?;
    let done = copied(order, &mut record, &path, watch, on_progress);
    // One whose way back failed is brought to its end by the next agent.
    if !matches!(done, Err(StorageError::NotRestored { .. })) {
        // Nobody has to wait for that but who comes next.
        std::thread::spawn(move || {
            finish(&record, &path);
            drop(lock);
        });
    }
    let mut report = done?;
    report.directory = switch.after;
    report.duration_ms = began.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}

fn require_fit(order: &StorageOrder) -> Result<(), StorageError> {
    let StorageOrder { instance, volume, .. } = order;
    if instance.init_pid.is_none() {
        let text = format!("{} has no mount namespace of its own: start it with `rswap run`", instance.name);
        return Err(StorageError::Unfit(text));
    }
    if !instance.volumes.contains(volume) {
        return Err(StorageError::Unfit(format!("{} has no volume {}", instance.name, volume.name)));
    }
    if cgroup::is_frozen(&instance.cgroup) {
        let text = format!("{} is frozen (cgroup.freeze): let it go on first", instance.name);
        return Err(StorageError::Unfit(text));
    }
    Ok(())
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

fn copied(
    order: &StorageOrder,
    record: &mut Record,
    path: &Path,
    watch: &dyn Watch,
    on_progress: &mut dyn FnMut(&StorageProgress),
) -> Result<StorageReport, StorageError> {
    let StorageOrder { instance, volume, allowed, limit, .. } = order;
    let mut copy = Copy::begin(record.switch.old(), &record.built)?;
    let deadline = Instant::now() + *limit;
    copy.run(instance, volume, *allowed, deadline, &mut |passes, bytes_copied, took| {
        let expected_ms = took.as_secs_f64() * 1e3;
        tracing::debug!(passes, bytes_copied, expected_ms, "a pass over a volume");
        on_progress(&StorageProgress { passes, bytes_copied, expected_ms });
    })?;
    record.switch.prepare()?;
    hold::prepare(instance)?;
    watch.arm().map_err(StorageError::Watch)?;
    let moved = in_freeze(order, record, path, copy);
    watch.disarm();
    moved
}

/// Times the steps of a freeze.
struct Steps {
    began: Instant,
    last: Instant,
    list: Vec<(String, f64)>,
}

impl Steps {
    fn begin() -> Self {
        let now = Instant::now();
        Self { began: now, last: now, list: Vec::new() }
    }

    fn step(&mut self, name: &str) {
        let now = Instant::now();
        self.list.push((name.to_owned(), (now - self.last).as_secs_f64() * 1e3));
        self.last = now;
    }
}

fn in_freeze(
    order: &StorageOrder,
    record: &mut Record,
    path: &Path,
    mut copy: Copy,
) -> Result<StorageReport, StorageError> {
    let StorageOrder { instance, volume, .. } = order;
    let mut steps = Steps::begin();
    let readiness = hold::Readiness::begin();
    let stopped = Stopped::all(instance)?;
    steps.step("stop");
    let pids = stopped.pids();
    let digest = copy.complete(volume, &pids)?;
    steps.step("last delta and digests");
    let old = record.switch.old().to_owned();
    let subject = Subject { instance, volume, directory: &old, tree: copy.source.tree() };
    let (plan, refused) = survey::survey(&subject, &pids)?;
    if !refused.is_empty() {
        return Err(StorageError::Refused(refused));
    }
    steps.step("survey");
    let (passes, bytes_copied) = (copy.passes, copy.bytes);
    copy.built.keep(&record.switch.after)?;
    let mut sides = sides(&record.switch, &plan)?;
    // All that could be missing is missing now.
    sides.1.open_all(&plan).map_err(StorageError::io("opening the files of the new copy"))?;
    record.plan = Some(plan.clone());
    steps.step("open");
    let note = |tasks| {
        record.tasks = tasks;
        record.write(path, false).map_err(StorageError::io(format!("writing {}", path.display())))
    };
    let mut hands =
        stopped.hand_over(instance, &plan, false, note).inspect_err(|_| thaw_unchanged(instance))?;
    drop(readiness);
    steps.step("hand over");
    let moved = activate(&record.switch, &plan, &sides, &mut hands);
    steps.step("re-home and verify");
    if let Err(cause) = moved {
        tracing::warn!(instance = %instance.name, error = %cause, "a volume goes back to where it was");
        let back = go_back(&record.switch, &plan, &mut hands);
        return match back.and_then(|()| hold::let_go(instance, hands)) {
            Ok(()) => {
                hold::bury(plan.processes());
                Err(cause)
            }
            Err(source) => {
                Err(StorageError::NotRestored { cause: Box::new(cause), source: Box::new(source) })
            }
        };
    }
    hold::let_go(instance, hands).map_err(|source| StorageError::NotRestored {
        cause: Box::new(StorageError::Unfit("it could not be let go".into())),
        source: Box::new(source),
    })?;
    let unavailability_ms = steps.began.elapsed().as_secs_f64() * 1e3;
    steps.step("let go");
    hold::bury(plan.processes());
    Ok(StorageReport {
        unavailability_ms,
        passes,
        bytes_copied,
        rehomed: plan.descriptions.len() + plan.mappings.len() + plan.working.len(),
        freeze_steps_ms: steps.list,
        digest: format!("{digest:032x}"),
        ..StorageReport::default()
    })
}

/// Nothing was re-homed yet.
fn thaw_unchanged(instance: &Instance) {
    if cgroup::is_frozen(&instance.cgroup)
        && let Err(error) = cgroup::freeze(&instance.cgroup, false)
    {
        tracing::error!(instance = %instance.name, %error, "an instance could not be let go");
    }
}

/// The old copy, and the new one.
fn sides(switch: &Switch, plan: &Plan) -> Result<(Side, Side), StorageError> {
    let open = |path: &Path| {
        Side::open_for(path, plan).map_err(StorageError::io(format!("mounting {}", path.display())))
    };
    Ok((open(switch.old())?, open(&switch.after)?))
}

/// The commit, and what follows from it.
fn activate(
    switch: &Switch,
    plan: &Plan,
    (old, new): &(Side, Side),
    hands: &mut Hands,
) -> Result<(), StorageError> {
    switch.make()?;
    Ok(apply::apply(plan, new, old, hands)?)
}

fn go_back(switch: &Switch, plan: &Plan, hands: &mut Hands) -> Result<(), StorageError> {
    if switch.is_made() {
        switch.make()?;
    }
    bring(switch, plan, hands)
}

/// Brings everything to the copy that is the volume, from wherever it is.
fn bring(switch: &Switch, plan: &Plan, hands: &mut Hands) -> Result<(), StorageError> {
    let (old, new) = sides(switch, plan)?;
    let (side, other, directory) =
        if switch.is_made() { (new, old, switch.after.as_path()) } else { (old, new, switch.old()) };
    side.mount(plan, &other).map_err(StorageError::io("mounting the valid copy"))?;
    // By the mount that is there: some may be open by it already.
    let mut side = Side::open_for(directory, plan).map_err(StorageError::io("opening the valid copy"))?;
    side.open_all(plan).map_err(StorageError::io("opening the files of the valid copy"))?;
    Ok(apply::apply(plan, &side, &other, hands)?)
}

/// Takes away what only the swap needed, and the copy that is not the volume.
fn finish(record: &Record, path: &Path) {
    if record.built.exists()
        && let Err(error) = fs::remove_dir_all(&record.built)
    {
        tracing::warn!(path = %record.built.display(), %error, "a copy that was not finished is left");
    }
    record.switch.clean();
    if let Err(error) = fs::remove_file(path) {
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
            record.write(path, false).map_err(StorageError::io(format!("writing {}", path.display())))
        })?;
        for earlier in &tasks {
            if let Some(hand) = hands.get_mut(&earlier.process) {
                hand.clean_after(earlier)?;
            }
        }
        bring(switch, plan, &mut hands)?;
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
