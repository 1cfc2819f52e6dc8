//! The freeze: what is left is copied, all that refers to the volume is brought to the copy, or back.

use std::{path::Path, thread, time::Instant};

use super::{
    StorageError, StorageOrder, StorageReport,
    copy::Copy,
    hold::{self, Stopped},
    record::Record,
};
use crate::{
    instance::{Instance, cgroup},
    tracee::rehome::{
        Plan,
        apply::{self, Hands},
        side::Side,
        survey::{self, Subject},
    },
    volume::{VolumeError, place::Switch},
};

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

/// Moves all to the copy while the instance stands still. After an error it goes on where it was, unless the error says otherwise.
pub(super) fn run(
    order: &StorageOrder,
    record: &mut Record,
    path: &Path,
    copy: Copy,
) -> Result<StorageReport, StorageError> {
    let StorageOrder { instance, volume, .. } = order;
    let readiness = hold::Readiness::begin();
    let mut steps = Steps::begin();
    let stopped = Stopped::all(instance)?;
    steps.step("stop");
    let pids = stopped.pids();
    let completed = copy.complete(volume, &pids, &record.switch.after)?;
    steps.step("last delta");
    let digest = completed.digest()?;
    steps.step("digests");
    let old = record.switch.old().to_owned();
    let subject = Subject { instance, volume, directory: &old, tree: completed.copy.source.tree() };
    let (plan, refused) = survey::survey(&subject, &pids)?;
    if !refused.is_empty() {
        return Err(StorageError::Refused(refused));
    }
    steps.step("survey");
    let mut sides = sides(&record.switch, &plan)?;
    // All that could be missing is missing now.
    sides.1.open_all(&plan).map_err(StorageError::io("opening the files of the new copy"))?;
    record.plan = Some(plan.clone());
    steps.step("open");
    let note = |tasks| {
        record.tasks = tasks;
        record.write_plan(path).map_err(StorageError::io(format!("writing {}", path.display())))
    };
    let mut hands =
        stopped.hand_over(instance, &plan, false, note).inspect_err(|_| thaw_unchanged(instance))?;
    drop(readiness);
    steps.step("hand over");
    // Only what is on the disk may become the volume.
    let moved = completed.wait().and_then(|copy| {
        steps.step("write through");
        activate(&record.switch, &plan, &sides, &mut hands).map(|()| copy)
    });
    steps.step("re-home and verify");
    let copy = match moved {
        Ok(copy) => copy,
        Err(cause) => return Err(back(&record.switch, instance, &plan, hands, cause)),
    };
    hold::let_go(instance, hands).map_err(|source| StorageError::NotRestored {
        cause: Box::new(StorageError::Unfit("it could not be let go".into())),
        source: Box::new(source),
    })?;
    let unavailability_ms = steps.began.elapsed().as_secs_f64() * 1e3;
    steps.step("let go");
    hold::bury(plan.processes());
    Ok(StorageReport {
        unavailability_ms,
        passes: copy.passes,
        bytes_copied: copy.bytes,
        bytes_shared: copy.shared_bytes,
        bytes_compared: copy.compared_bytes,
        rehomed: plan.descriptions.len() + plan.mappings.len() + plan.working.len(),
        freeze_steps_ms: steps.list,
        digest: format!("{digest:032x}"),
        ..StorageReport::default()
    })
}

/// Brings all to the old copy after a failure; returns why it failed.
fn back(
    switch: &Switch,
    instance: &Instance,
    plan: &Plan,
    mut hands: Hands,
    cause: StorageError,
) -> StorageError {
    tracing::warn!(instance = %instance.name, error = %cause, "a volume goes back to where it was");
    match go_back(switch, plan, &mut hands).and_then(|()| hold::let_go(instance, hands)) {
        Ok(()) => {
            hold::bury(plan.processes());
            cause
        }
        Err(source) => StorageError::NotRestored { cause: Box::new(cause), source: Box::new(source) },
    }
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
    // The instance may go on when it is through, and when what stands at the place is on the disk.
    let (brought, on_disk) = thread::scope(|scope| {
        let on_disk = scope.spawn(|| switch.sync());
        (apply::apply(plan, new, old, hands), on_disk.join())
    });
    brought?;
    Ok(on_disk.unwrap_or(Err(VolumeError::Damaged("syncing panicked")))?)
}

fn go_back(switch: &Switch, plan: &Plan, hands: &mut Hands) -> Result<(), StorageError> {
    if switch.is_made() {
        switch.make()?;
        switch.sync()?;
    }
    bring(switch, plan, hands)
}

/// Brings everything to the copy that is the volume, from wherever it is.
pub(super) fn bring(switch: &Switch, plan: &Plan, hands: &mut Hands) -> Result<(), StorageError> {
    let (old, new) = sides(switch, plan)?;
    let (side, other, directory) =
        if switch.is_made() { (new, old, switch.after.as_path()) } else { (old, new, switch.old()) };
    side.mount(plan, &other).map_err(StorageError::io("mounting the valid copy"))?;
    // By the mount that is there: some may be open by it already.
    let mut side = Side::open_for(directory, plan).map_err(StorageError::io("opening the valid copy"))?;
    side.open_all(plan).map_err(StorageError::io("opening the files of the valid copy"))?;
    Ok(apply::apply(plan, &side, &other, hands)?)
}
