//! A process with every thread held still.

use std::{collections::BTreeSet, fs, time::Duration};

use super::{TraceeError, tree};
use crate::sys::ptrace::{self, Stop};

/// How long one thread may take to stop: in a wait that no signal ends (for a disk, or for a child to execute a program)
/// it stops when that is over.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How often the threads are listed again before a process that spawns faster than we stop is given up.
const MAX_PASSES: usize = 100;

/// A traced process whose threads are all stopped. Dropping it lets them go on.
#[derive(Debug)]
pub struct StoppedProcess {
    pid: i32,
    /// The stopped threads, the leader first.
    threads: Vec<StoppedThread>,
}

/// One stopped thread.
#[derive(Clone, Copy, Debug)]
struct StoppedThread {
    tid: i32,
    /// The signal that it was about to receive when it stopped, to be delivered when it goes on; or 0.
    held_signal: i32,
}

impl StoppedProcess {
    /// Stops every thread of `pid`, none missed: the threads are listed until a pass finds no new one.
    pub fn stop(pid: i32) -> Result<Self, TraceeError> {
        let mut stopped = Self { pid, threads: Vec::new() };
        let mut known = BTreeSet::new();
        for _ in 0..MAX_PASSES {
            let fresh: Vec<i32> = list_threads(pid)?.into_iter().filter(|tid| !known.contains(tid)).collect();
            if fresh.is_empty() {
                stopped.threads.sort_by_key(|thread| (thread.tid != pid, thread.tid));
                return match stopped.threads.first() {
                    Some(leader) if leader.tid == pid => Ok(stopped),
                    Some(_) => Err(TraceeError::Unsupported(format!(
                        "the first thread of process {pid} has ended, and others go on: not carried in this version"
                    ))),
                    None => Err(TraceeError::Gone(pid)),
                };
            }
            for tid in fresh {
                known.insert(tid);
                if let Some(thread) = stop_thread(tid)? {
                    stopped.threads.push(thread);
                }
            }
        }
        Err(TraceeError::Unsupported(format!("process {pid} makes threads faster than they can be stopped")))
    }

    /// Its pid, as the agent sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its threads' ids, as the agent sees them, the leader first.
    pub fn tids(&self) -> Vec<i32> {
        self.threads.iter().map(|thread| thread.tid).collect()
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        for thread in &self.threads {
            // A thread that was killed meanwhile can't be detached, and needn't be.
            let _ = ptrace::detach(thread.tid, thread.held_signal);
        }
    }
}

/// The threads of `pid`.
pub fn list_threads(pid: i32) -> Result<Vec<i32>, TraceeError> {
    let path = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&path).map_err(|_| TraceeError::Gone(pid))?;
    let mut tids = Vec::new();
    for entry in entries {
        let entry = entry.map_err(TraceeError::proc(path.as_str()))?;
        if let Some(tid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            tids.push(tid);
        }
    }
    Ok(tids)
}

/// Stops one thread, or returns `None` when it ended first.
fn stop_thread(tid: i32) -> Result<Option<StoppedThread>, TraceeError> {
    if let Err(error) = ptrace::seize(tid, false, false) {
        return match error.raw_os_error() {
            // What ends, or has a tracer, is not permitted either (`ptrace_attach` in kernel/ptrace.c).
            Some(libc::ESRCH | libc::EPERM) if tree::has_thread_ended(tid) => Ok(None),
            _ => Err(TraceeError::Call { what: "PTRACE_SEIZE", pid: tid, source: error }),
        };
    }
    ptrace::interrupt(tid).map_err(TraceeError::call("PTRACE_INTERRUPT", tid))?;
    match ptrace::wait_stop_within(tid, STOP_LIMIT).map_err(TraceeError::call("stopping", tid))? {
        Stop::Event | Stop::Other => Ok(Some(StoppedThread { tid, held_signal: 0 })),
        Stop::Signal(signal) => Ok(Some(StoppedThread { tid, held_signal: signal })),
        Stop::Gone => Ok(None),
    }
}
