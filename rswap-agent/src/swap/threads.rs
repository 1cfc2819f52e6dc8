//! The threads of a cgroup and their affinity, as the kernel has them.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sched::{self, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use super::SwapError;
use crate::pool::CpuSet;

/// Threads that come and go, each with the CPUs that it may run on.
pub(super) trait Threads {
    /// All of them, now.
    fn list(&mut self) -> Result<BTreeSet<i32>, SwapError>;
    /// `None` if the thread has ended.
    fn affinity(&mut self, tid: i32) -> Result<Option<CpuSet>, SwapError>;
    /// `false` if the thread has ended.
    fn set_affinity(&mut self, tid: i32, cpus: &CpuSet) -> Result<bool, SwapError>;
    /// When it was started, in clock ticks after the kernel's start; `None` if it has ended.
    fn started_ticks(&mut self, tid: i32) -> Option<u64>;
    /// Whether the kernel lets nobody move it.
    fn is_fixed(&mut self, tid: i32) -> bool;
    /// Waits until those that are just being made are listed.
    fn let_them_appear(&mut self);
}

/// The threads of a cgroup and of those below it.
pub(super) struct CgroupThreads {
    pub(super) cgroup: PathBuf,
}

impl Threads for CgroupThreads {
    fn list(&mut self) -> Result<BTreeSet<i32>, SwapError> {
        let mut tids = BTreeSet::new();
        collect(&self.cgroup, true, &mut tids)?;
        Ok(tids)
    }

    fn affinity(&mut self, tid: i32) -> Result<Option<CpuSet>, SwapError> {
        match sched_getaffinity(Pid::from_raw(tid)) {
            Ok(set) => {
                let is_in = |cpu: &usize| set.is_set(*cpu).unwrap_or(false);
                Ok(Some((0..sched::CpuSet::count()).filter(is_in).collect()))
            }
            Err(Errno::ESRCH) => Ok(None),
            Err(errno) => Err(SwapError::Thread { what: "reading", tid, source: errno.into() }),
        }
    }

    fn set_affinity(&mut self, tid: i32, cpus: &CpuSet) -> Result<bool, SwapError> {
        let failed = |errno: Errno| SwapError::Thread { what: "setting", tid, source: errno.into() };
        let mut set = sched::CpuSet::new();
        for &cpu in cpus {
            set.set(cpu).map_err(failed)?;
        }
        match sched_setaffinity(Pid::from_raw(tid), &set) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn started_ticks(&mut self, tid: i32) -> Option<u64> {
        // /proc/TID is there for every thread, though it is not listed.
        procfs::process::Process::new(tid).and_then(|thread| thread.stat()).ok().map(|stat| stat.starttime)
    }

    fn is_fixed(&mut self, tid: i32) -> bool {
        // As workers of io_uring were until Linux 6.3 (include/linux/sched.h).
        const PF_NO_SETAFFINITY: u32 = 0x0400_0000;
        let stat = procfs::process::Process::new(tid).and_then(|thread| thread.stat());
        stat.is_ok_and(|stat| stat.flags & PF_NO_SETAFFINITY != 0)
    }

    fn let_them_appear(&mut self) {
        // A call of clone(2) takes a fraction of that, unless its thread is waiting for a processor.
        thread::sleep(Duration::from_millis(2));
    }
}

/// `cgroup.threads` has the threads of every process of a cgroup; cgroups below have their own.
fn collect(cgroup: &Path, is_top: bool, tids: &mut BTreeSet<i32>) -> Result<(), SwapError> {
    // A cgroup below may be removed at any time: its threads ended, or are found elsewhere in the next pass.
    let gone = |error: &io::Error| {
        !is_top && (error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV))
    };
    let file = cgroup.join("cgroup.threads");
    match fs::read_to_string(&file) {
        // 0 stands for a thread that this PID namespace can't see.
        Ok(text) => {
            tids.extend(text.lines().filter_map(|line| line.trim().parse().ok()).filter(|&tid: &i32| tid > 0))
        }
        Err(error) if gone(&error) => return Ok(()),
        Err(source) => return Err(SwapError::File { what: "reading", path: file, source }),
    }
    let entries = match fs::read_dir(cgroup) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(()),
        Err(source) => return Err(SwapError::File { what: "listing", path: cgroup.to_owned(), source }),
    };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        collect(&entry.path(), false, tids)?;
    }
    Ok(())
}
