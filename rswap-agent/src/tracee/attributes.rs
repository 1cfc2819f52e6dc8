//! What processes and threads have set for themselves besides what everybody has.

use std::fs;

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{TraceeError, batch::Batch, read_proc, remote::Remote};
use crate::sys::process;

/// Memory may not become executable that was writable (`PR_SET_MDWE`, since Linux 6.3).
const PR_SET_MDWE: u64 = 65;
const PR_GET_MDWE: u64 = 66;

/// Of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessAttributes {
    /// Which of its memory a core dump would have (`/proc/PID/coredump_filter`).
    pub core_filter: u32,
    /// `PR_GET_MDWE`.
    pub write_or_execute: u64,
}

/// Of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadAttributes {
    /// Its execution domain and what it changes (personality(2)).
    pub personality: u32,
    /// By how much its waits may be late, in nanoseconds.
    pub timer_slack_ns: u64,
    /// `ioprio_get`.
    pub io_priority: i32,
    /// The processors that it chose for itself; empty when it has those of its instance.
    pub processors: Vec<usize>,
}

/// Those of the stopped process behind `leader`.
pub fn of_process(leader: &mut Remote) -> Result<ProcessAttributes, TraceeError> {
    let pid = leader.tid();
    let path = format!("/proc/{pid}/coredump_filter");
    let filter = read_proc(&path)?;
    // A kernel that doesn't know it has never set it.
    let write_or_execute = leader.call("prctl", libc::SYS_prctl, [PR_GET_MDWE, 0, 0, 0, 0, 0]).unwrap_or(0);
    Ok(ProcessAttributes {
        core_filter: u32::from_str_radix(filter.trim(), 16)
            .map_err(|error| TraceeError::Proc { path, problem: error.to_string() })?,
        write_or_execute,
    })
}

/// Those of the stopped thread behind `remote`, in an instance that may use `usual` processors.
pub fn of_thread(remote: &mut Remote, usual: &[usize]) -> Result<ThreadAttributes, TraceeError> {
    let tid = remote.tid();
    let path = format!("/proc/{tid}/personality");
    let personality = u32::from_str_radix(read_proc(&path)?.trim(), 16)
        .map_err(|error| TraceeError::Proc { path, problem: error.to_string() })?;
    let slack = remote.call("prctl", libc::SYS_prctl, [libc::PR_GET_TIMERSLACK as u64, 0, 0, 0, 0, 0])?;
    let processors = processors(tid)?;
    Ok(ThreadAttributes {
        personality,
        timer_slack_ns: slack,
        io_priority: process::io_priority(tid).map_err(TraceeError::call("ioprio_get", tid))?,
        processors: if processors == usual { Vec::new() } else { processors },
    })
}

/// The processors that thread `tid` may use.
pub fn processors(tid: i32) -> Result<Vec<usize>, TraceeError> {
    let set = sched_getaffinity(Pid::from_raw(tid))
        .map_err(|error| TraceeError::call("sched_getaffinity", tid)(error.into()))?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).collect())
}

/// Sets what has to be set before a process gives up its privileges.
pub fn restore_process(leader: &mut Remote, wanted: &ProcessAttributes) -> Result<(), TraceeError> {
    let pid = leader.tid();
    let path = format!("/proc/{pid}/coredump_filter");
    fs::write(&path, format!("{:#x}", wanted.core_filter)).map_err(TraceeError::proc(path))
}

/// Sets what forbids the process something: nothing is mapped any more.
pub fn restrict_process(leader: &mut Remote, wanted: &ProcessAttributes) -> Result<(), TraceeError> {
    match wanted.write_or_execute {
        0 => Ok(()),
        bits => leader.call("prctl", libc::SYS_prctl, [PR_SET_MDWE, bits, 0, 0, 0, 0]).map(drop),
    }
}

/// Sets what a thread can only set by itself.
pub(super) fn restore_by(batch: &mut Batch<'_>, wanted: &ThreadAttributes) -> Result<(), TraceeError> {
    batch.call("personality", libc::SYS_personality, &[u64::from(wanted.personality).into()])?;
    let args = [libc::PR_SET_TIMERSLACK.into(), wanted.timer_slack_ns.into()];
    batch.call("prctl", libc::SYS_prctl, &args).map(drop)
}

/// Sets what else thread `tid` has. Processors that this host, or its share for the instance, does not have are not chosen.
pub fn restore_thread(tid: i32, wanted: &ThreadAttributes) -> Result<(), TraceeError> {
    if wanted.io_priority != 0 {
        process::set_io_priority(tid, wanted.io_priority).map_err(TraceeError::call("ioprio_set", tid))?;
    }
    let here = processors(tid)?;
    if !wanted.processors.is_empty() && wanted.processors.iter().all(|cpu| here.contains(cpu)) {
        let mut set = CpuSet::new();
        let failed = |error: nix::Error| TraceeError::call("sched_setaffinity", tid)(error.into());
        for cpu in &wanted.processors {
            set.set(*cpu).map_err(failed)?;
        }
        sched_setaffinity(Pid::from_raw(tid), &set).map_err(failed)?;
    }
    Ok(())
}
