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

/// Moves all to the copy while the instance stands still. After an error it goes on where it was, unless the error says otherwise. The copy
/// stays the caller's: to remove it takes time, which nobody should stand still for.
pub(super) fn run(
    order: &StorageOrder,
    record: &mut Record,
    path: &Path,
    copy: &mut Copy,
) -> Result<StorageReport, StorageError> {
    let StorageOrder { instance, volume, .. } = order;
    let readiness = hold::Readiness::begin();
    let mut steps = Steps::begin();
    let stopped = Stopped::all(instance)?;
    steps.step("stop");
    let pids = stopped.pids();
    let written = copy.complete(volume, &pids, &record.switch.after)?;
    steps.step("last delta");
    let digest = copy.digest()?;
    steps.step("digests");
    let old = record.switch.old().to_owned();
    let subject = Subject { instance, volume, directory: &old, tree: copy.source.tree() };
    let (plan, refused) = survey::survey(&subject, &pids)?;
    if !refused.is_empty() {
        return Err(StorageError::Refused(refused));
    }
    steps.step("survey");
    let mut sides = sides(&record.switch, &plan)?;
    // All that could be missing is missing now.
    sides.1.open_all(&plan, None).map_err(StorageError::io("opening the files of the new copy"))?;
    // The way back must not depend on the new disk.
    sides.0.hold_nameless(&plan);
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
    let exchanged = written.wait(order.patience).and_then(|()| {
        steps.step("write through");
        Ok(record.switch.make()?)
    });
    if let Err(cause) = exchanged {
        return Err(stay(instance, &plan, hands, cause));
    }
    let moved = activate(&record.switch, &plan, &sides, &mut hands);
    steps.step("re-home and verify");
    if let Err(cause) = moved {
        return Err(back(&record.switch, instance, &plan, sides, hands, cause));
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

/// Lets an instance go on of which nothing was re-homed; returns why it failed. Nothing of the new copy is needed: it is mostly its disk that
/// has failed.
fn stay(instance: &Instance, plan: &Plan, hands: Hands, cause: StorageError) -> StorageError {
    tracing::warn!(instance = %instance.name, error = %cause, "a volume stays where it is");
    let_go_after(instance, plan, hands, Ok(()), cause)
}

/// Brings all to the old copy after a failure; returns why it failed.
fn back(
    switch: &Switch,
    instance: &Instance,
    plan: &Plan,
    sides: (Side, Side),
    mut hands: Hands,
    cause: StorageError,
) -> StorageError {
    tracing::warn!(instance = %instance.name, error = %cause, "a volume goes back to where it was");
    let brought = go_back(switch, plan, &sides, &mut hands);
    let_go_after(instance, plan, hands, brought, cause)
}

/// Lets an instance go on when all of it is where it was; returns why the swap failed.
fn let_go_after(
    instance: &Instance,
    plan: &Plan,
    hands: Hands,
    brought: Result<(), StorageError>,
    cause: StorageError,
) -> StorageError {
    match brought.and_then(|()| hold::let_go(instance, hands)) {
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
    Ok((side(switch.old(), plan)?, side(&switch.after, plan)?))
}

fn side(directory: &Path, plan: &Plan) -> Result<Side, StorageError> {
    Side::open_for(directory, plan).map_err(StorageError::io(format!("mounting {}", directory.display())))
}

/// What follows from the exchange, which is the commit.
fn activate(
    switch: &Switch,
    plan: &Plan,
    (old, new): &(Side, Side),
    hands: &mut Hands,
) -> Result<(), StorageError> {
    // The instance may go on when it is through, and when what stands at the place is on the disk. Files that are cached can be opened on a disk
    // that has failed, too.
    let (brought, on_disk) = thread::scope(|scope| {
        let on_disk = scope.spawn(|| switch.sync().and_then(|()| switch.require_disk()));
        (apply::apply(plan, new, old, hands), on_disk.join())
    });
    brought?;
    Ok(on_disk.unwrap_or(Err(VolumeError::Damaged("syncing panicked")))?)
}

/// What is on the new disk isn't needed for it: the disk may be what has failed.
fn go_back(
    switch: &Switch,
    plan: &Plan,
    (old, new): &(Side, Side),
    hands: &mut Hands,
) -> Result<(), StorageError> {
    if switch.is_made() {
        switch.make()?;
        switch.sync()?;
    }
    bring_to(plan, switch.old(), new, Some(old), hands)
}

/// Brings everything to the copy that is the volume, from wherever it is.
pub(super) fn bring(switch: &Switch, plan: &Plan, hands: &mut Hands) -> Result<(), StorageError> {
    if switch.is_made() {
        return bring_to(plan, &switch.after, &side(switch.old(), plan)?, None, hands);
    }
    // The new disk need not be there any more.
    match apply::stays(plan, &side(switch.old(), plan)?) {
        Ok(true) => return Ok(()),
        Ok(false) => {}
        Err(error) => tracing::debug!(%error, "whether anything was re-homed can't be told"),
    }
    bring_to(plan, switch.old(), &side(&switch.after, plan)?, None, hands)
}

/// Brings everything to the copy in `directory`, from wherever it is. `before`: that copy, if it was open before anything was re-homed.
fn bring_to(
    plan: &Plan,
    directory: &Path,
    other: &Side,
    before: Option<&Side>,
    hands: &mut Hands,
) -> Result<(), StorageError> {
    side(directory, plan)?.mount(plan, other).map_err(StorageError::io("mounting the valid copy"))?;
    // By the mount that is there: some may be open by it already.
    let mut there = side(directory, plan)?;
    there.open_all(plan, before).map_err(StorageError::io("opening the files of the valid copy"))?;
    Ok(apply::apply(plan, &there, other, hands)?)
}
