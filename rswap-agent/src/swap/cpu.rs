//! Moving an instance to other cores of this host: by the cpuset controller of cgroup v2 where the instance's cgroup
//! has it, else by the affinity of every thread.
//!
//! Where a pool is a share of its cores, the cpu controller limits the instance.
//!
//! An affinity that the program set for its own threads holds within the pool, and in full where the pool allows it again.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use super::{
    Method, SwapError, SwapReport,
    affinity::Known,
    share::{Controller, Share},
    threads::{CgroupThreads, Threads as _},
};
use crate::{
    instance::{
        Instance,
        affinity::{Choices, Processors},
        launch::Place,
        registry::Registry,
    },
    pool::{CpuSet, cpu_list},
    sys::priority::Hurry,
};

/// Where an instance sits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seat {
    /// The processors of a pool, or all.
    pub cpus: Option<CpuSet>,
    /// What it may have of them.
    pub share: Share,
}

/// Moves all threads of `instance` to `to`. On an error they are on `from` (where the registry says that it is), unless the error
/// says otherwise. What threads chose for themselves is kept in the registry, before anything is changed: so an agent after this one can go on.
///
/// # Errors
/// See [`SwapError`].
pub fn move_to(place: &Place, instance: &Instance, from: &Seat, to: &Seat) -> Result<SwapReport, SwapError> {
    let started = Instant::now();
    // On a busy machine threads would otherwise be made faster than they are found.
    let _hurry = Hurry::begin().inspect_err(|error| tracing::debug!(%error, "moving cores without hurry"));
    let mut swap = CpuSwap::snapshot(place, instance, from, to)?;
    match swap.transfer().and_then(|()| swap.activate()).and_then(|()| swap.verify()) {
        Ok(()) => Ok(swap.deactivate(started)),
        Err(cause) => match swap.roll_back() {
            Ok(()) => Err(cause),
            Err(source) => Err(SwapError::NotRestored { cause: Box::new(cause), source: Box::new(source) }),
        },
    }
}

/// Whether a thread of `instance` is elsewhere than on `seat`, or its share another one: a program can change its threads' affinity, and an agent that is killed
/// leaves threads where they are.
///
/// # Errors
/// It could not be looked at.
pub fn is_astray(place: &Place, instance: &Instance, seat: &Seat) -> Result<bool, SwapError> {
    let known = Registry::open(&place.state_dir)?.choices(instance)?;
    if known.is_none() && *seat == Seat::default() {
        return Ok(false);
    }
    let Seat { cpus, share } = seat;
    let is_limited = known.as_ref().is_some_and(|choices| choices.stood.is_some());
    if known.as_ref().is_some_and(|choices| choices.places != BTreeSet::from([cpus.clone()]))
        || is_limited == share.is_all()
    {
        return Ok(true);
    }
    let stood = known.as_ref().and_then(|choices| choices.stood.as_deref());
    if let Some(stood) = stood
        && !Controller::of(place, instance)?.is_some_and(|controller| controller.says(share, stood))
    {
        return Ok(true);
    }
    let choices = known.unwrap_or_else(|| Choices::new(instance.cgroup_id, cpus.clone()));
    let mut known = Known { choices, host: Processors::of_host()? };
    let mut threads = CgroupThreads { cgroup: instance.cgroup.clone() };
    match known.verify(&mut threads, cpus.as_ref()) {
        Err(SwapError::Misplaced { .. }) => Ok(true),
        looked => looked.map(|()| false),
    }
}

struct CpuSwap<'a> {
    registry: Registry,
    instance: &'a Instance,
    threads: CgroupThreads,
    from: &'a Seat,
    to: &'a Seat,
    /// Where shares are involved.
    controller: Option<Controller>,
    known: Known,
    /// The controller's file and what stood in it, where there is one.
    cpuset: Option<(PathBuf, String)>,
    moved: u64,
    passes: u32,
}

impl<'a> CpuSwap<'a> {
    /// Checks the target, and keeps what is there now. Nothing is changed.
    fn snapshot(
        place: &Place,
        instance: &'a Instance,
        from: &'a Seat,
        to: &'a Seat,
    ) -> Result<Self, SwapError> {
        let (registry, host) = (Registry::open(&place.state_dir)?, Processors::of_host()?);
        if let Some(target) = &to.cpus {
            if target.is_empty() {
                return Err(SwapError::NoCpus);
            }
            let missing: CpuSet = target.difference(&host.online).copied().collect();
            if !missing.is_empty() {
                return Err(SwapError::NotOnline { cpus: missing });
            }
        }
        let cgroup = &instance.cgroup;
        let mut threads = CgroupThreads { cgroup: cgroup.clone() };
        if threads.list()?.is_empty() {
            return Err(SwapError::NoThreads { cgroup: cgroup.clone() });
        }
        let file = cgroup.join("cpuset.cpus");
        let cpuset = if file.exists() { Some((file.clone(), read(&file)?)) } else { None };
        let choices = registry.choices(instance)?;
        let choices = choices.unwrap_or_else(|| Choices::new(instance.cgroup_id, from.cpus.clone()));
        let mut known = Known { choices, host };
        known.learn(&mut threads)?;
        let mut controller = None;
        if !to.share.is_all() || known.choices.stood.is_some() {
            let found = Controller::of(place, instance);
            let found = found
                .and_then(|found| found.ok_or_else(|| SwapError::NoCpuController { cgroup: cgroup.clone() }));
            controller = match found {
                Ok(found) => {
                    if known.choices.stood.is_none() {
                        known.choices.stood = Some(found.stands()?);
                    }
                    Some(found)
                }
                // What limited it has been taken away: nothing is left to be lifted.
                Err(error) if to.share.is_all() => {
                    tracing::warn!(instance = %instance.name, %error, "its share is somebody else's matter now");
                    None
                }
                Err(error) => return Err(error),
            };
        }
        known.choices.places.insert(to.cpus.clone());
        registry.put_choices(&instance.name, &known.choices)?;
        Ok(Self { registry, instance, threads, from, to, controller, known, cpuset, moved: 0, passes: 0 })
    }

    /// Moves what runs now. By the controller it is one write, and the kernel moves every thread.
    fn transfer(&mut self) -> Result<(), SwapError> {
        if let Some((file, _)) = &self.cpuset {
            // Empty: what the cgroup above has.
            write(file, &self.to.cpus.as_ref().map(cpu_list::format).unwrap_or_default())?;
        }
        self.moved += self.known.pass(&mut self.threads, self.to.cpus.as_ref())?;
        self.passes += 1;
        Ok(())
    }

    /// Repeats until no thread was missed, those included that were made meanwhile; then the new share holds.
    fn activate(&mut self) -> Result<(), SwapError> {
        let (moved, passes) = self.known.settle(&mut self.threads, self.to.cpus.as_ref())?;
        self.moved += moved;
        self.passes += passes;
        self.limit(&self.to.share)
    }

    fn limit(&self, share: &Share) -> Result<(), SwapError> {
        match (&self.controller, &self.known.choices.stood) {
            (Some(controller), Some(stood)) if share.is_all() => controller.leave(stood),
            (Some(controller), Some(stood)) => controller.set(&self.instance.cgroup, share, stood),
            _ => Ok(()),
        }
    }

    /// Reads every thread's placement back.
    fn verify(&mut self) -> Result<(), SwapError> {
        self.known.verify(&mut self.threads, self.to.cpus.as_ref())?;
        let share = self.to.share;
        match (&self.controller, &self.known.choices.stood) {
            (Some(controller), Some(stood)) if !share.is_all() && !controller.says(&share, stood) => {
                Err(SwapError::NotLimited { share })
            }
            _ => Ok(()),
        }
    }

    /// Gives up the old placement.
    fn deactivate(mut self, started: Instant) -> SwapReport {
        self.settled_on(self.to);
        SwapReport {
            method: if self.cpuset.is_some() { Method::Cpuset } else { Method::Affinity },
            threads_moved: self.moved,
            passes: self.passes,
            duration_us: started.elapsed().as_micros() as u64,
        }
    }

    fn roll_back(&mut self) -> Result<(), SwapError> {
        if let Some((file, before)) = &self.cpuset {
            // First, or the old affinities would be outside of what the controller allows.
            write(file, before)?;
        }
        self.known.restore(&mut self.threads, self.from.cpus.as_ref())?;
        self.limit(&self.from.share)?;
        self.settled_on(self.from);
        Ok(())
    }

    fn settled_on(&mut self, seat: &Seat) {
        self.known.choices.places = BTreeSet::from([seat.cpus.clone()]);
        if seat.share.is_all() {
            self.known.choices.stood = None;
        }
        if let Err(error) = self.registry.put_choices(&self.instance.name, &self.known.choices) {
            // What is kept says that they may be on either pool, which is right, too.
            tracing::warn!(instance = %self.instance.name, %error, "what its threads chose is not up to date");
        }
    }
}

fn read(file: &Path) -> Result<String, SwapError> {
    fs::read_to_string(file).map_err(|source| SwapError::File {
        what: "reading",
        path: file.to_owned(),
        source,
    })
}

fn write(file: &Path, text: &str) -> Result<(), SwapError> {
    // An empty set is written as a line end: an empty write would not reach the kernel.
    let line = format!("{}\n", text.trim());
    fs::write(file, line).map_err(|source| SwapError::File { what: "writing", path: file.to_owned(), source })
}
