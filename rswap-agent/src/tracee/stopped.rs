//! A process with every thread held still.

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use super::{
    TraceeError,
    capture::Status,
    lifeline, tree,
    waits::{self, Now, TimedWait},
};
use crate::sys::ptrace::{self, Registers, Stop};

/// How long one thread may take to stop: in a wait that no signal ends (for a disk, or for a child to execute a program)
/// it stops when that is over.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How long a thread may take to come back from a call that an earlier agent was killed in, and to begin the handlers of
/// signals that reach it.
const READY_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at one that is coming back.
const NAP: Duration = Duration::from_micros(200);
/// How often the threads are listed again before a process that spawns faster than we stop is given up.
const MAX_PASSES: usize = 100;

/// A traced process whose threads are all stopped. Dropping it lets them go on.
#[derive(Debug)]
pub struct StoppedProcess {
    pid: i32,
    /// The stopped threads, the leader first.
    threads: Vec<StoppedThread>,
    /// The signal by which the program itself was stopped before.
    stop_signal: Option<i32>,
}

/// One stopped thread.
#[derive(Clone, Copy, Debug)]
struct StoppedThread {
    tid: i32,
    /// It makes the call again that the stop has interrupted: with these registers it would find it interrupted.
    interrupted: Option<Registers>,
    /// The wait that the stop has interrupted.
    wait: Option<TimedWait>,
}

impl StoppedProcess {
    /// Stops every thread of `pid`, none missed: the threads are listed until a pass finds no new one.
    pub fn stop(pid: i32) -> Result<Self, TraceeError> {
        let mut stopped = Self { pid, threads: Vec::new(), stop_signal: None };
        let mut now = Now::default();
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
                let sleep = now.look(tid);
                let Some(stop) = stop_thread(tid)? else { continue };
                // Before any call is made in it, which would be handed to the program.
                if ptrace::dispatches_calls(tid)
                    .map_err(TraceeError::call("PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG", tid))?
                {
                    return Err(TraceeError::Unsupported(format!(
                        "thread {tid} of process {pid} takes system calls itself (PR_SET_SYSCALL_USER_DISPATCH, Wine): \
                         not carried in this version"
                    )));
                }
                let registers = waits::registers(tid)?;
                if let Stop::Group(signal) = stop {
                    stopped.stop_signal = Some(signal);
                }
                let repeats = waits::may_be_repeated(&registers) && !has_signals(tid);
                let wait = waits::find(tid, &registers, sleep);
                let thread = StoppedThread { tid, interrupted: repeats.then_some(registers), wait };
                stopped.threads.push(thread);
                if repeats {
                    // At once: if we are killed, it makes the call again all the same.
                    ptrace::set_registers(tid, &waits::repeated(registers))
                        .map_err(TraceeError::call("PTRACE_SETREGS", tid))?;
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

    /// The registers of thread `tid` as it was stopped, if others were set to have it make its interrupted call again.
    pub fn interrupted(&self, tid: i32) -> Option<Registers> {
        self.threads.iter().find(|thread| thread.tid == tid)?.interrupted
    }

    /// Whether thread `tid` is to make its interrupted call again.
    pub fn repeats(&self, tid: i32) -> bool {
        self.interrupted(tid).is_some() && !has_signals(tid)
    }

    /// The wait that thread `tid` is in.
    pub fn wait(&self, tid: i32) -> Option<TimedWait> {
        self.threads.iter().find(|thread| thread.tid == tid)?.wait
    }

    /// The signal by which the program was stopped before it was stopped for us.
    pub fn stop_signal(&self) -> Option<i32> {
        self.stop_signal
    }
}

/// Whether a signal waits that the thread does not block.
fn has_signals(tid: i32) -> bool {
    let Ok(status) = Status::read(tid) else { return false };
    let set = |name| status.radix(name, 16).unwrap_or(0);
    (set("SigPnd:") | set("ShdPnd:")) & !set("SigBlk:") != 0
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        for thread in &self.threads {
            // A thread that was killed meanwhile can't be detached, and needn't be.
            let _ = thread.release();
        }
    }
}

impl StoppedThread {
    fn release(&self) -> std::io::Result<()> {
        // A signal came meanwhile: it interrupts the call.
        if let Some(registers) = self.interrupted.filter(|_| has_signals(self.tid)) {
            ptrace::set_registers(self.tid, &registers)?;
        }
        ptrace::detach(self.tid, 0)
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
fn stop_thread(tid: i32) -> Result<Option<Stop>, TraceeError> {
    if let Err(error) = ptrace::seize(tid) {
        return match error.raw_os_error() {
            // What ends, or has a tracer, is not permitted either (`ptrace_attach` in kernel/ptrace.c).
            Some(libc::ESRCH | libc::EPERM) if tree::has_thread_ended(tid) => Ok(None),
            _ => Err(TraceeError::Call { what: "PTRACE_SEIZE", pid: tid, source: error }),
        };
    }
    ptrace::interrupt(tid).map_err(TraceeError::call("PTRACE_INTERRUPT", tid))?;
    let began = Instant::now();
    loop {
        let stop = ptrace::wait_stop_within(tid, STOP_LIMIT).map_err(TraceeError::call("stopping", tid))?;
        let signal = match stop {
            Stop::Gone => return Ok(None),
            // It is in no queue any more, and if we were killed with it, nobody would know of it: it is delivered, and
            // the thread stops again before its handler's first instruction.
            Stop::Signal(signal) => signal,
            _ if lifeline::is_coming_back(tid, &waits::registers(tid)?) => 0,
            stop => return Ok(Some(stop)),
        };
        if began.elapsed() > READY_LIMIT {
            let _ = ptrace::detach(tid, signal);
            return Err(TraceeError::Unsupported(format!("thread {tid} does not come to rest: try again")));
        }
        if signal != 0 {
            ptrace::interrupt(tid).map_err(TraceeError::call("PTRACE_INTERRUPT", tid))?;
        }
        match ptrace::resume(tid, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            resumed => resumed.map_err(TraceeError::call("PTRACE_CONT", tid))?,
        }
        if signal == 0 {
            std::thread::sleep(NAP);
            // One that has ended is found by the wait.
            let _ = ptrace::interrupt(tid);
        }
    }
}
