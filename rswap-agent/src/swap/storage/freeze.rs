//! The freeze: what is left is copied, all that refers to the volume is brought to the copy, or back.

use std::{
    collections::BTreeSet,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::{
    StorageError, StorageOrder, StorageReport,
    copy::Copy,
    hold::{self, Stopped},
    record::{self, Record},
    work::Work,
};
use crate::{
    instance::{Instance, cgroup},
    tracee::rehome::{
        Plan,
        apply::{self, Hands},
        side::Side,
        survey::{self, Subject},
    },
    volume::place::Switch,
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

/// What a freeze has used and is not needed any more. To drop it takes time, or does not end: its last files may have no name any more, or be on
/// a disk that hangs. Nobody may stand still for that, nor may a guard count it as a part of the freeze.
#[derive(Default)]
pub(super) struct Left {
    /// The first to go: what is still at work has to end before anything is removed that it works on.
    work: Option<Work>,
    sides: Option<(Side, Side)>,
    /// The copy, unless a thread has it that waits for its disk.
    pub(super) copy: Option<Copy>,
    /// What tasks have left in these processes, which go on, is still to be taken [away](hold::bury).
    pub(super) processes: BTreeSet<i32>,
}

/// Moves all to the copy, which is in `left`, while the instance stands still. After an error it goes on where it was, unless the error says
/// otherwise. All that asks the new disk is done by other threads, and nobody waits for them for longer than the order's patience.
pub(super) fn run(
    order: &StorageOrder,
    record: &mut Record,
    path: &Path,
    left: &mut Left,
) -> Result<StorageReport, StorageError> {
    let StorageOrder { instance, volume, .. } = order;
    let Left { work, sides, copy: kept, processes } = left;
    let work = work.insert(Work::begin(order.patience));
    let mut copy = kept.take().ok_or_else(|| StorageError::Unfit("there is no copy".into()))?;
    let readiness = hold::Readiness::begin();
    let mut steps = Steps::begin();
    let stopped = Stopped::all(instance)?;
    steps.step("stop");
    let pids = stopped.pids();
    let (of, all, place) = (volume.clone(), pids.clone(), record.switch.after.clone());
    let (copy, completed) = work.call(move |given_up| {
        let completed = copy.complete(&of, &all, &place, given_up);
        (copy, completed)
    })?;
    let unwritten = match completed {
        Ok(unwritten) => unwritten,
        Err(error) => {
            *kept = Some(copy);
            return Err(error);
        }
    };
    // The instance waits for it only where it has to.
    let written = work.start(|_| unwritten.write_through());
    steps.step("last delta");
    let (copy, digest) = work.call(move |_| {
        let digest = copy.digest();
        (copy, digest)
    })?;
    let copy = kept.insert(copy);
    let digest = digest?;
    steps.step("digests");
    let old = record.switch.old()?.to_owned();
    let subject = Subject { instance, volume, directory: &old, tree: copy.source.tree() };
    let (plan, refused) = survey::survey(&subject, &pids)?;
    if !refused.is_empty() {
        return Err(StorageError::Refused(refused));
    }
    steps.step("survey");
    let (switch, of) = (record.switch.clone(), plan.clone());
    let sides = sides.insert(work.call(move |_| open_sides(&switch, &of))??);
    *processes = plan.processes();
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
    let exchanged = work.wait(&written).and_then(|written| {
        written?;
        steps.step("write through");
        Ok(record.switch.make()?)
    });
    if let Err(cause) = exchanged {
        return Err(stay(instance, path, hands, cause));
    }
    let moved = activate(&record.switch, &plan, sides, &mut hands, work);
    steps.step("re-home and verify");
    if let Err(cause) = moved {
        return Err(back(&record.switch, (instance, path), &plan, sides, hands, cause));
    }
    let_go(instance, path, hands).map_err(|source| StorageError::NotRestored {
        cause: Box::new(StorageError::Unfit("it could not be let go".into())),
        source: Box::new(source),
    })?;
    let unavailability_ms = steps.began.elapsed().as_secs_f64() * 1e3;
    steps.step("let go");
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
fn stay(instance: &Instance, path: &Path, hands: Hands, cause: StorageError) -> StorageError {
    tracing::warn!(instance = %instance.name, error = %cause, "a volume stays where it is");
    let_go_after(instance, path, hands, Ok(()), cause)
}

/// Brings all to the old copy after a failure; returns why it failed.
fn back(
    switch: &Switch,
    (instance, path): (&Instance, &Path),
    plan: &Plan,
    sides: &(Side, Side),
    mut hands: Hands,
    cause: StorageError,
) -> StorageError {
    tracing::warn!(instance = %instance.name, error = %cause, "a volume goes back to where it was");
    let brought = go_back(switch, plan, sides, &mut hands);
    let_go_after(instance, path, hands, brought, cause)
}

/// Lets an instance go on when all of it is where it was; returns why the swap failed.
fn let_go_after(
    instance: &Instance,
    path: &Path,
    hands: Hands,
    brought: Result<(), StorageError>,
    cause: StorageError,
) -> StorageError {
    match brought.and_then(|()| let_go(instance, path, hands)) {
        Ok(()) => cause,
        Err(source) => StorageError::NotRestored { cause: Box::new(cause), source: Box::new(source) },
    }
}

/// Lets the instance go on. The record in `path` must speak of nothing that the program may have changed since: who finds it frozen another time, for
/// some other reason, would put descriptors of today to numbers of yesterday.
pub(super) fn let_go(instance: &Instance, path: &Path, hands: Hands) -> Result<(), StorageError> {
    hold::let_go(instance, hands)?;
    if let Err(error) = record::remove_plan(path) {
        tracing::error!(path = %path.display(), %error, "what a record says of processes is left: it is not true any more");
    }
    Ok(())
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
fn open_sides(switch: &Switch, plan: &Plan) -> Result<(Side, Side), StorageError> {
    let (mut old, mut new) = (side(switch.old()?, plan)?, side(&switch.after, plan)?);
    // All that could be missing is missing now.
    new.open_all(plan, None).map_err(StorageError::io("opening the files of the new copy"))?;
    // The way back must not depend on the new disk.
    old.hold_nameless(plan);
    Ok((old, new))
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
    work: &mut Work,
) -> Result<(), StorageError> {
    // The instance may go on when it is through, and when what stands at the place is on the disk. Files that are cached can be opened on a disk
    // that has failed, too.
    let made = switch.clone();
    let on_disk = work.start(move |_| made.sync().and_then(|()| made.require_disk()));
    apply::apply(plan, new, Some(old), hands)?;
    Ok(work.wait(&on_disk)??)
}

/// What is on the new disk isn't needed for it: the disk may be what has failed.
fn go_back(
    switch: &Switch,
    plan: &Plan,
    (old, new): &(Side, Side),
    hands: &mut Hands,
) -> Result<(), StorageError> {
    if switch.is_made()? {
        switch.make()?;
        switch.sync()?;
    }
    bring_to(plan, switch.old()?, Some(new), Some(old), hands)
}

/// Brings everything to the copy that is the volume, from wherever it is. If that is the new one, and its disk does not do its part within `patience`,
/// the old one, which is the same, becomes the volume again.
pub(super) fn bring(
    switch: &Switch,
    plan: &Plan,
    hands: &mut Hands,
    patience: Duration,
) -> Result<(), StorageError> {
    if !switch.is_made()? {
        return bring_back(switch, plan, hands);
    }
    let (mut work, mut sides) = (Work::begin(patience), None);
    let brought = bring_there(switch, plan, hands, &mut work, &mut sides);
    // Nobody stands still for a thread that waits for the disk, nor for files that have no name there.
    thread::spawn(move || drop((work, sides)));
    let Err(error) = brought else { return Ok(()) };
    tracing::warn!(%error, "the new directory of a volume can't be had: it goes back to where it was");
    switch.make()?;
    switch.sync()?;
    bring_back(switch, plan, hands)
}

/// Brings everything to the new copy, from wherever it is. What is opened is left in `sides`.
fn bring_there(
    switch: &Switch,
    plan: &Plan,
    hands: &mut Hands,
    work: &mut Work,
    sides: &mut Option<(Side, Side)>,
) -> Result<(), StorageError> {
    let (made, of) = (switch.clone(), plan.clone());
    let (old, new) = work.call(move |_| -> Result<_, StorageError> {
        made.require_disk()?;
        Ok((side(made.old()?, &of)?, side(&made.after, &of)?))
    })??;
    // Not by a thread that may be late: it would mount it again when all is back.
    new.mount(plan, Some(&old)).map_err(StorageError::io("mounting the valid copy"))?;
    let (made, of) = (switch.clone(), plan.clone());
    let there = work.call(move |_| open_there(&made.after, &of, None))??;
    let (there, old) = sides.insert((there, old));
    Ok(apply::apply(plan, there, Some(old), hands)?)
}

/// Brings everything to the old copy, from wherever it is. The new disk need not be there any more.
fn bring_back(switch: &Switch, plan: &Plan, hands: &mut Hands) -> Result<(), StorageError> {
    match apply::stays(plan, &side(switch.old()?, plan)?) {
        // Whoever was at it may have been killed before it had set all of it.
        Ok(true) => return Ok(apply::renew(plan, hands)?),
        Ok(false) => {}
        Err(error) => tracing::debug!(%error, "whether anything was re-homed can't be told"),
    }
    bring_to(plan, switch.old()?, None, None, hands)
}

/// Brings everything to the copy in `directory`, from wherever it is. `before`: that copy, if it was open before anything was re-homed.
fn bring_to(
    plan: &Plan,
    directory: &Path,
    other: Option<&Side>,
    before: Option<&Side>,
    hands: &mut Hands,
) -> Result<(), StorageError> {
    side(directory, plan)?.mount(plan, other).map_err(StorageError::io("mounting the valid copy"))?;
    let there = open_there(directory, plan, before)?;
    Ok(apply::apply(plan, &there, other, hands)?)
}

/// Opens the copy in `directory` by the mount that is there: some may be open by it already.
fn open_there(directory: &Path, plan: &Plan, before: Option<&Side>) -> Result<Side, StorageError> {
    let mut there = side(directory, plan)?;
    there.open_all(plan, before).map_err(StorageError::io("opening the files of the valid copy"))?;
    Ok(there)
}
