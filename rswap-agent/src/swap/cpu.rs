//! Moving an instance to other cores of this host: by the cpuset controller of cgroup v2 where the instance's cgroup
//! has it, else by the affinity of every thread.
//!
//! An affinity that the program set for its own threads is replaced by the pool: keeping it would leave threads outside.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use super::{
    Method, SwapError, SwapReport,
    affinity::{self, Snapshot},
    threads::{CgroupThreads, Threads as _},
};
use crate::{
    instance::Instance,
    pool::{CpuSet, cpu_list},
    sys::priority::Hurry,
};

const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Moves all threads of `instance` to `cpus`. On an error they are where they were, unless the error says otherwise.
pub fn move_to(instance: &Instance, cpus: &CpuSet) -> Result<SwapReport, SwapError> {
    let started = Instant::now();
    // On a busy machine threads would otherwise be made faster than they are found.
    let _hurry = Hurry::begin().inspect_err(|error| tracing::debug!(%error, "moving cores without hurry"));
    let mut swap = CpuSwap::snapshot(&instance.cgroup, cpus)?;
    match swap.transfer().and_then(|()| swap.activate()).and_then(|()| swap.verify()) {
        Ok(()) => Ok(swap.deactivate(started)),
        Err(cause) => match swap.roll_back() {
            Ok(()) => Err(cause),
            Err(source) => Err(SwapError::NotRestored { cause: Box::new(cause), source: Box::new(source) }),
        },
    }
}

struct CpuSwap<'a> {
    threads: CgroupThreads,
    target: &'a CpuSet,
    before: Snapshot,
    /// The controller's file and what stood in it, where there is one.
    cpuset: Option<(PathBuf, String)>,
    moved: u64,
    passes: u32,
}

impl<'a> CpuSwap<'a> {
    /// Checks the target, and keeps what is there now. Nothing is changed.
    fn snapshot(cgroup: &Path, target: &'a CpuSet) -> Result<Self, SwapError> {
        if target.is_empty() {
            return Err(SwapError::NoCpus);
        }
        let online = cpu_list::parse(&read(Path::new(ONLINE))?).unwrap_or_default();
        let missing: CpuSet = target.difference(&online).copied().collect();
        if !missing.is_empty() {
            return Err(SwapError::NotOnline { cpus: missing });
        }
        let mut threads = CgroupThreads { cgroup: cgroup.to_owned() };
        if threads.list()?.is_empty() {
            return Err(SwapError::NoThreads { cgroup: cgroup.to_owned() });
        }
        let before = affinity::snapshot(&mut threads)?;
        let file = cgroup.join("cpuset.cpus");
        let cpuset = if file.exists() { Some((file.clone(), read(&file)?)) } else { None };
        Ok(Self { threads, target, before, cpuset, moved: 0, passes: 0 })
    }

    /// Moves what runs now. By the controller it is one write, and the kernel moves every thread.
    fn transfer(&mut self) -> Result<(), SwapError> {
        if let Some((file, _)) = &self.cpuset {
            write(file, &cpu_list::format(self.target))?;
        }
        self.moved += affinity::pass(&mut self.threads, self.target, &mut self.before)?;
        self.passes += 1;
        Ok(())
    }

    /// Repeats until no thread was missed, those included that were made meanwhile.
    fn activate(&mut self) -> Result<(), SwapError> {
        let (moved, passes) = affinity::settle(&mut self.threads, self.target, &mut self.before)?;
        self.moved += moved;
        self.passes += passes;
        Ok(())
    }

    /// Reads every thread's placement back.
    fn verify(&mut self) -> Result<(), SwapError> {
        affinity::verify(&mut self.threads, self.target)
    }

    /// Gives up the old placement: nothing of it is left but this report.
    fn deactivate(self, started: Instant) -> SwapReport {
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
        affinity::restore(&mut self.threads, self.target, &self.before)
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
