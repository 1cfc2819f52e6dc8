//! Follows the agent as a debugger does, and strikes before one of its system calls: so every step of what it does to a running program can be
//! chosen.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    thread::JoinHandle,
};

use anyhow::{Context, bail};
use nix::{
    errno::Errno,
    libc,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// A place in what the agent does to a program, by the ptrace request that it is about to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before its `nth` request of any kind, from 0; all others are of one thread of the agent, whichever comes there first.
    Step(usize),
    /// The frame is written, and the registers are about to be changed for the first time.
    FrameWritten,
    /// The registers are changed, and the signal mask not yet.
    BeforeMask,
    /// At the entry of the `nth` call.
    Entry(usize),
    /// At its exit.
    Exit(usize),
    /// The signal mask is about to be put back.
    BeforeMaskBack,
    /// The signal mask is put back, and the registers not yet.
    BeforeRegistersBack,
    /// Before the `nth` thread is given other processors (sched_setaffinity(2)), from 0.
    Affinity(usize),
    /// Before the `nth` time that the agent gives this advice about memory (process_madvise(2)), from 0.
    Advice(i32, usize),
    /// Before the `nth` time that it reads another one's memory (process_vm_readv(2)), from 0.
    Read(usize),
    /// Before it renames a file to a path that ends so.
    RenameTo(&'static str),
    /// Before it renames something to a path that has this in it.
    RenameInto(&'static str),
    /// Before it exchanges two names (`RENAME_EXCHANGE`).
    Exchange,
    /// Before its `nth` ptrace request, from 0, after it has exchanged two names once: it brings a volume to its new directory.
    WayThere(usize),
    /// The same after it has done so twice: it brings it back.
    WayBack(usize),
}

/// Requests that tell where the agent is (include/uapi/linux/ptrace.h).
const GET_REGISTERS: u64 = 12;
const SET_REGISTERS: u64 = 13;
const TO_CALL: u64 = 24;
const SET_MASK: u64 = 0x420b;

/// Follows one agent.
#[derive(Debug)]
pub struct Follower {
    agent: Pid,
    thread: JoinHandle<anyhow::Result<bool>>,
    over: Arc<AtomicBool>,
}

impl Follower {
    /// Follows agent `pid`, and sends it `signal` at `place`. Returns when it is followed.
    pub fn start(pid: u32, place: Place, signal: Signal) -> anyhow::Result<Self> {
        let agent = Pid::from_raw(i32::try_from(pid)?);
        Self::start_with(pid, place, move || kill(agent, signal).context("cannot strike"))
    }

    /// Follows agent `pid`, and does `strike` at `place`, while the thread that came there stands still.
    pub fn start_with(
        pid: u32,
        place: Place,
        strike: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let agent = Pid::from_raw(i32::try_from(pid)?);
        let (tell, told) = std::sync::mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        let follow = move || {
            let seized = seize(agent);
            let failed = seized.as_ref().err().map(ToString::to_string);
            tell.send(failed).context("nobody waits")?;
            seized?;
            follow(place, strike, &is_over)
        };
        let thread = thread::Builder::new().name("follower".into()).spawn(follow)?;
        match told.recv()? {
            None => Ok(Self { agent, thread, over }),
            Some(error) => bail!("cannot follow the agent: {error}"),
        }
    }

    /// Whether it has come to the place; it leaves the agent alone from here on.
    pub fn has_struck(self) -> anyhow::Result<bool> {
        self.over.store(true, Ordering::Release);
        // Nobody heeds this one, and it wakes the follower up. An agent that was struck may be gone.
        let _ = kill(self.agent, Signal::SIGURG);
        self.thread.join().map_err(|_| anyhow::anyhow!("the follower panicked"))?
    }
}

fn seize(agent: Pid) -> anyhow::Result<()> {
    for entry in fs::read_dir(format!("/proc/{agent}/task"))? {
        let tid: i32 = entry?.file_name().to_string_lossy().parse()?;
        let tid = Pid::from_raw(tid);
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
        match ptrace::seize(tid, options).and_then(|()| ptrace::interrupt(tid)) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).context("PTRACE_SEIZE"),
        }
    }
    Ok(())
}

/// The end of this thread lets the agent go.
fn follow(
    place: Place,
    strike: impl FnOnce() -> anyhow::Result<()>,
    over: &AtomicBool,
) -> anyhow::Result<bool> {
    // Each of the agent's threads makes its calls in a program of its own.
    let mut threads: BTreeMap<i32, Progress> = BTreeMap::new();
    let (mut requests, mut calls) = (0.., Calls::default());
    while !over.load(Ordering::Acquire) {
        // Not for the children of the test's other threads.
        let stop = match waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
            Err(Errno::ECHILD) => return Ok(false),
            Err(Errno::EINTR) => continue,
            stop => stop.context("waiting for the agent")?,
        };
        let (tid, deliver) = match stop {
            WaitStatus::PtraceSyscall(tid) => {
                if let Ok(registers) = ptrace::getregs(tid)
                    // At its entry a call has this for a result.
                    && registers.rax as i64 == -i64::from(libc::ENOSYS)
                    && match registers.orig_rax as i64 {
                        libc::SYS_ptrace => {
                            let progress = threads.entry(tid.as_raw()).or_default();
                            // Each takes note of it.
                            calls.goes_on(place) | progress.reaches(place, registers.rdi, requests.next())
                        }
                        _ => calls.reaches(place, tid, &registers),
                    }
                {
                    strike()?;
                    return Ok(true);
                }
                (tid, None)
            }
            WaitStatus::Stopped(tid, signal) => (tid, Some(signal)),
            WaitStatus::PtraceEvent(tid, ..) => (tid, None),
            _ => continue,
        };
        match ptrace::syscall(tid, deliver) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).context("PTRACE_SYSCALL"),
        }
    }
    Ok(false)
}

/// What the agent has called so far, besides ptrace.
#[derive(Debug, Default)]
struct Calls {
    placed: usize,
    read: usize,
    advised: BTreeMap<i32, usize>,
    exchanged: usize,
    /// ptrace requests since then.
    since: usize,
}

impl Calls {
    /// Takes note of a call that is about to be made; whether it is at `place`.
    fn reaches(&mut self, place: Place, tid: Pid, registers: &libc::user_regs_struct) -> bool {
        let count = |calls: &mut usize| {
            *calls += 1;
            *calls - 1
        };
        match registers.orig_rax as i64 {
            libc::SYS_sched_setaffinity => place == Place::Affinity(count(&mut self.placed)),
            libc::SYS_process_vm_readv => place == Place::Read(count(&mut self.read)),
            libc::SYS_process_madvise => {
                let advice = registers.r10 as i32;
                place == Place::Advice(advice, count(self.advised.entry(advice).or_default()))
            }
            libc::SYS_renameat2 if registers.r8 & u64::from(libc::RENAME_EXCHANGE) != 0 => {
                (self.exchanged, self.since) = (self.exchanged + 1, 0);
                place == Place::Exchange
            }
            libc::SYS_rename => match place {
                Place::RenameTo(end) => {
                    path_at(tid, registers.rsi).is_some_and(|path| path.ends_with(end.as_bytes()))
                }
                Place::RenameInto(part) => path_at(tid, registers.rsi)
                    .is_some_and(|path| path.windows(part.len()).any(|found| found == part.as_bytes())),
                _ => false,
            },
            _ => false,
        }
    }
}

impl Calls {
    /// Takes note of a ptrace request that is about to be made; whether it is at `place`.
    fn goes_on(&mut self, place: Place) -> bool {
        self.since += 1;
        match place {
            Place::WayThere(nth) => (self.exchanged, self.since) == (1, nth + 1),
            Place::WayBack(nth) => (self.exchanged, self.since) == (2, nth + 1),
            _ => false,
        }
    }
}

/// The path at an address of the agent.
fn path_at(tid: Pid, address: u64) -> Option<Vec<u8>> {
    let memory = fs::File::open(format!("/proc/{tid}/mem")).ok()?;
    let mut path = vec![0; libc::PATH_MAX as usize];
    // It may lie near the end of what is mapped.
    let read = memory.read_at(&mut path, address).ok()?;
    path.truncate(path[..read].iter().position(|byte| *byte == 0)?);
    Some(path)
}

/// What a thread of the agent did so far.
#[derive(Debug, Default)]
struct Progress {
    /// Calls that were begun, and how many of their two steps the last one has made.
    calls: usize,
    half: usize,
    set: usize,
    masked: usize,
}

impl Progress {
    /// Takes note of a request that is about to be made, the agent's `number`th; whether it is at `place`.
    fn reaches(&mut self, place: Place, request: u64, number: Option<usize>) -> bool {
        let at = match place {
            Place::Step(nth) => number == Some(nth),
            Place::FrameWritten => request == SET_REGISTERS && self.set == 0,
            Place::BeforeMask => request == SET_MASK && self.masked == 0,
            Place::Entry(nth) => request == TO_CALL && self.half == 1 && self.calls == nth + 1,
            Place::Exit(nth) => request == GET_REGISTERS && self.half == 2 && self.calls == nth + 1,
            Place::BeforeMaskBack => request == SET_MASK && self.masked == 1,
            Place::BeforeRegistersBack => request == SET_REGISTERS && self.masked == 2,
            Place::Affinity(_) | Place::Advice(..) | Place::Read(_) => false,
            Place::RenameTo(_) | Place::RenameInto(_) | Place::Exchange => false,
            Place::WayThere(_) | Place::WayBack(_) => false,
        };
        match request {
            TO_CALL if self.half == 1 => self.half = 2,
            TO_CALL => (self.half, self.calls) = (1, self.calls + 1),
            SET_REGISTERS => self.set += 1,
            SET_MASK => self.masked += 1,
            _ => {}
        }
        at
    }
}
