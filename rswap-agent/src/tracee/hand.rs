//! A task that makes calls for a process that stands still: it shares the process's memory, descriptors and directories, and
//! is in another cgroup.
//!
//! A frozen cgroup lets none of its threads make a call, not even for a tracer; and a process that is held by ptrace alone
//! goes on when its tracer is killed. So what must not be seen half done is done by such a task, while the process itself is
//! held by its cgroup. The task dies with its tracer.

use std::{
    fs,
    os::fd::{AsRawFd, RawFd},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, gettid},
};
use serde::{Deserialize, Serialize};

use super::{
    TraceeError, capture::Status, layout, leftovers, link::Link, remote::Remote, stopped::StoppedProcess,
    tree,
};
use crate::sys::ptrace::{self, Stop};

/// How long one whose tracer was killed may take to its end.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at it.
const NAP: Duration = Duration::from_millis(1);

/// A task beside a process. It ends when this is dropped; the thread that has made it must do all with it.
#[derive(Debug)]
pub struct Hand {
    pid: i32,
    task: Task,
    remote: Remote,
    link: Option<Link>,
}

/// What may be left of a [`Hand`] in its process, apart from its pid ([`bury`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// The process, as the agent sees it.
    pub process: i32,
    /// The process's number of the end of its socket.
    end: RawFd,
    /// The number that every descriptor gets which it is [given](Hand::give): it is closed before the next.
    #[serde(default = "no_descriptor")]
    given: RawFd,
}

/// One that was written down before there was such a number.
fn no_descriptor() -> RawFd {
    -1
}

impl Hand {
    /// Makes one beside a process all of whose threads are stopped, in `cgroup`.
    pub fn make(program: &StoppedProcess, cgroup: &Path) -> Result<Self, TraceeError> {
        let process = program.pid();
        let mappings = layout::read_mappings(process)?;
        let mut maker = Remote::of_mapped_program(program, &mappings)?;
        maker.map_scratch_in_program()?;
        let inner = maker.make_task_beside()?;
        let pid = tree::child_with(process, inner)?.ok_or(TraceeError::Gone(process))?;
        let stopped =
            ptrace::wait_stop(pid).map_err(TraceeError::call("waiting for a task beside", process))?;
        if stopped == Stop::Gone {
            return Err(TraceeError::Gone(pid));
        }
        ptrace::make_stub(pid).map_err(TraceeError::call("PTRACE_SETOPTIONS", pid))?;
        let moved = fs::write(cgroup.join("cgroup.procs"), pid.to_string());
        let remote = Remote::stub(pid)?;
        let task = Task { process, end: -1, given: -1 };
        let mut hand = Self { pid, task, remote, link: None };
        hand.remote.keep_changes();
        moved.map_err(TraceeError::call("moving a task to its cgroup", pid))?;
        hand.remote.map_scratch_beside(&mappings)?;
        hand.connect()?;
        Ok(hand)
    }

    fn connect(&mut self) -> Result<(), TraceeError> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        let at = self.remote.put(0, &[0; 8])?;
        let args = [libc::AF_UNIX as u64, kind as u64, 0, at, 0, 0];
        self.remote.call("socketpair", libc::SYS_socketpair, args)?;
        let ends: [u8; 8] = self.remote.get(0)?;
        let number = |at: usize| i32::from_ne_bytes([ends[at], ends[at + 1], ends[at + 2], ends[at + 3]]);
        self.task.end = number(0);
        let ours = self.remote.take_descriptor(number(4))?;
        // Whether there is room for one more descriptor is known before anything is changed.
        let trial = self.remote.share_descriptor(self.task.end)?;
        // From here on a descriptor may wait in it, and if we are killed, it is found by its name.
        leftovers::name_socket(&trial).map_err(TraceeError::call("naming a socket", self.task.process))?;
        self.link = Some(Link::of(ours));
        self.task.given = self.give(&trial)?;
        self.close(self.task.given)
    }

    /// The process whose calls it makes.
    pub fn process(&self) -> i32 {
        self.task.process
    }

    /// What may be left of it.
    pub fn task(&self) -> Task {
        self.task
    }

    /// For calls.
    pub fn remote(&mut self) -> &mut Remote {
        &mut self.remote
    }

    /// Gives the process a descriptor; returns its number there.
    pub fn give(&mut self, descriptor: &impl AsRawFd) -> Result<RawFd, TraceeError> {
        let link = self.link.as_ref().ok_or(TraceeError::Gone(self.pid))?;
        link.give(&mut self.remote, self.task.end, descriptor)
    }

    /// Closes what an earlier one has left in the process, which has stood still since: its socket, and what it was given at the moment of its
    /// end, which may be a file of either copy.
    pub fn clean_after(&mut self, earlier: &Task) -> Result<(), TraceeError> {
        for left in [earlier.end, earlier.given] {
            if left < 0 || left == self.task.end {
                continue;
            }
            match self.close(left) {
                Err(TraceeError::Remote { source, .. }) if source.raw_os_error() == Some(libc::EBADF) => {}
                closed => closed?,
            }
        }
        Ok(())
    }

    /// Closes a descriptor of the process.
    pub fn close(&mut self, fd: RawFd) -> Result<(), TraceeError> {
        self.remote.call("close", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]).map(|_| ())
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        if self.task.end >= 0
            && let Err(error) = self.close(self.task.end)
        {
            tracing::warn!(pid = self.task.process, %error, "a descriptor of ours is left in a process");
        }
        if let Err(error) = self.remote.unmap_scratch() {
            tracing::warn!(pid = self.task.process, %error, "a scratch mapping is left in a process");
        }
        // One that is gone already is no error.
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        while !matches!(ptrace::wait_stop(self.pid), Ok(Stop::Gone) | Err(_)) {}
    }
}

/// Takes all such tasks of `process` that nobody uses any more out of the list of its children. The process runs, and stands still
/// for a moment, if there are any.
pub fn bury(process: i32) -> Result<(), TraceeError> {
    let began = Instant::now();
    let tasks = loop {
        let mut tasks: Vec<Left> = tree::children(process)?.into_iter().filter_map(Left::read).collect();
        tasks.iter_mut().for_each(Left::end_if_ours);
        // One whose tracer was killed is on its way out.
        if tasks.iter().all(|task| task.has_ended) || began.elapsed() > END_LIMIT {
            break tasks;
        }
        thread::sleep(NAP);
    };
    let ended: Vec<i32> = tasks.iter().filter(|task| task.has_ended).map(|task| task.inner).collect();
    if ended.len() < tasks.len() {
        tracing::warn!(pid = process, "a task of ours does not end: it is left in a list of children");
    }
    if ended.is_empty() {
        return Ok(());
    }
    let stopped = StoppedProcess::stop(process)?;
    let mut remote = Remote::of_program(&stopped)?;
    for inner in ended {
        let options = (libc::__WALL | libc::WNOHANG) as u64;
        remote.call("wait4", libc::SYS_wait4, [inner as u64, 0, options, 0, 0, 0])?;
    }
    Ok(())
}

/// A child of a process that is a task of ours, or was one.
struct Left {
    /// Its pid, as we see it, and as the process sees it.
    pid: i32,
    inner: i32,
    has_ended: bool,
    /// Its tracer has it stand still.
    is_held: bool,
}

impl Left {
    /// Nobody is told of its end (of an ordinary child's SIGCHLD tells), and it has blocked every signal but SIGTRAP.
    fn read(pid: i32) -> Option<Self> {
        const STATE: usize = 3;
        const EXIT_SIGNAL: usize = 38;
        const BLOCKED: u64 =
            !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1) | 1 << (libc::SIGTRAP - 1));
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
        // The first after the name is the third (proc_pid_stat(5)).
        let has_ended = matches!(fields.get(STATE - 3), Some(&"Z" | &"X"));
        let is_held = fields.get(STATE - 3) == Some(&"t");
        let status = Status::read(pid).ok()?;
        let blocked = status.radix("SigBlk:", 16).unwrap_or(0) & BLOCKED == BLOCKED;
        let ours = fields.get(EXIT_SIGNAL - 3) == Some(&"0") && blocked;
        let inner = status.last_number("NSpid:").filter(|_| ours)?;
        Some(Self { pid, inner, has_ended, is_held })
    }

    /// One that a thread has made late, when it was stopped by us: it is traced as that thread was, by us instead of the one that was killed, and
    /// stands still where it should come to its end. What another thread traces is at work for that one.
    fn end_if_ours(&mut self) {
        if self.has_ended || !self.is_held || tree::tracer(self.pid) != Some(gettid().as_raw()) {
            return;
        }
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        while !matches!(ptrace::wait_stop(self.pid), Ok(Stop::Gone) | Err(_)) {}
        self.has_ended = true;
    }
}
