//! Waits with a limit of time that a stop interrupts.
//!
//! The kernel goes on with some of them by itself, and keeps what is left of their time where nobody can read it
//! (`struct restart_block`). So the time at which a wait began is read from the scheduler before the thread is stopped, and
//! at the destination the same call is made with what is left, and interrupted: the kernel there then goes on with it as
//! the source's would have. Time that a hypervisor took from the processor does not count as passed.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{TraceeError, capture::instance_clock_ns, remote::Remote};
use crate::sys::{
    clock::Clocks,
    mem::{self, RemoteAddr},
    ptrace::{self, Registers},
};

/// The kernel's internal result of a call that it goes on with by restart_syscall(2) (include/linux/errno.h).
const ERESTART_RESTARTBLOCK: i64 = -516;

/// An interrupted wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimedWait {
    /// The system call by which it began: nanosleep, clock_nanosleep, poll or futex.
    pub call: i64,
    /// When it ends, in nanoseconds of the instance's CLOCK_MONOTONIC; the greatest number where the call, made again,
    /// knows by itself.
    pub deadline_ns: i64,
}

/// The waits that were interrupted by us and go on, by the thread as the agent sees it: when they are interrupted again, the
/// kernel tells neither how they began nor by which call. An agent that was started anew has forgotten them.
static GOING_ON: Mutex<BTreeMap<i32, (TimedWait, Place)>> = Mutex::new(BTreeMap::new());

fn going_on() -> MutexGuard<'static, BTreeMap<i32, (TimedWait, Place)>> {
    GOING_ON.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where in its program a wait is: it tells one wait from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place([u64; 6]);

impl Place {
    fn of(registers: &Registers) -> Self {
        let Registers { rip, rsp, rdi, rsi, rdx, r10, .. } = *registers;
        Self([rip, rsp, rdi, rsi, rdx, r10])
    }
}

/// What a thread that is about to be stopped is waiting in.
#[derive(Clone, Copy, Debug)]
pub struct Sleep {
    call: i64,
    began_ns: i64,
}

/// The present time by the scheduler's clock, of which each processor has its own: it leaves out what interrupts and a
/// hypervisor took from that processor.
#[derive(Debug, Default)]
pub struct Now(BTreeMap<usize, Option<Moment>>);

/// The kernel's CLOCK_MONOTONIC, with a processor's scheduler clock at the same moment.
#[derive(Clone, Copy, Debug)]
struct Moment {
    monotonic_ns: i64,
    scheduler_ns: i64,
}

impl Moment {
    /// Reads both on processor `cpu`; `None` when this thread may not run there.
    fn read(cpu: usize) -> Option<Self> {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).ok()?;
        let mut there = CpuSet::new();
        there.set(cpu).ok()?;
        sched_setaffinity(this, &there).ok()?;
        // The scheduler notes the time when a thread goes on, or offers to let others go on.
        std::thread::yield_now();
        let scheduler_ns = last_run_ns("thread-self");
        let monotonic_ns = Clocks::of_this_kernel().map(|clocks| clocks.monotonic_ns);
        sched_setaffinity(this, &before).ok()?;
        Some(Self { monotonic_ns: monotonic_ns.ok()?, scheduler_ns: scheduler_ns? })
    }
}

impl Now {
    /// What thread `tid` waits in; `None` when it is in no wait that the kernel would go on with.
    pub fn look(&mut self, tid: i32) -> Option<Sleep> {
        let text = fs::read_to_string(format!("/proc/{tid}/syscall")).ok()?;
        let call = text.split_whitespace().next()?.parse().ok()?;
        if !is_continued(call) && call != libc::SYS_restart_syscall {
            return None;
        }
        let cpu = last_cpu(tid)?;
        let now = (*self.0.entry(cpu).or_insert_with(|| Moment::read(cpu)))?;
        let slept_ns = now.scheduler_ns.saturating_sub(last_run_ns(tid)?).max(0);
        Some(Sleep { call, began_ns: now.monotonic_ns - slept_ns })
    }
}

/// The processor on which a thread last ran (proc_pid_stat(5), field 39).
fn last_cpu(tid: i32) -> Option<usize> {
    let text = fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    text.rsplit_once(')')?.1.split_whitespace().nth(39 - 3)?.parse().ok()
}

/// When a thread last ran, by the scheduler's clock.
fn last_run_ns(thread: impl std::fmt::Display) -> Option<i64> {
    let text = fs::read_to_string(format!("/proc/{thread}/sched")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("se.exec_start"))?;
    let (ms, ns) = line.rsplit_once(':')?.1.trim().split_once('.')?;
    Some(ms.parse::<i64>().ok()? * 1_000_000 + ns.parse::<i64>().ok()?)
}

fn is_continued(call: i64) -> bool {
    [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex].contains(&call)
}

/// The wait of thread `tid`, which stopped with `registers`; `sleep` is what was seen before. `None` if it is in none, or nobody
/// knows.
pub fn find(tid: i32, registers: &Registers, sleep: Option<Sleep>) -> Option<TimedWait> {
    let known = going_on().remove(&tid);
    if (registers.orig_rax as i64) < 0 || registers.rax as i64 != ERESTART_RESTARTBLOCK {
        return None;
    }
    let call = registers.orig_rax as i64;
    let now = Clocks::of_this_kernel().ok()?.monotonic_ns;
    let offset = Clocks::offsets_of(tid).ok()?.monotonic_ns;
    let wait = if call == libc::SYS_restart_syscall {
        // After anybody else's stop its time is not known any more.
        let goes_on = |(wait, place): &(TimedWait, Place)| {
            *place == Place::of(registers) && wait.deadline_ns > now.saturating_add(offset)
        };
        known.filter(goes_on)?.0
    } else {
        let began = sleep.filter(|sleep| sleep.call == call).map_or(now, |sleep| sleep.began_ns);
        let deadline = match limit_ns(tid, call, registers)? {
            Limit::Whole(limit) => began.saturating_add(limit),
            Limit::Left(left) => now.saturating_add(left),
            Limit::None => i64::MAX,
        };
        TimedWait { call, deadline_ns: deadline.saturating_add(offset) }
    };
    goes_on(tid, wait, registers);
    Some(wait)
}

/// Takes note of a wait that goes on in thread `tid`, from `registers`.
pub fn goes_on(tid: i32, wait: TimedWait, registers: &Registers) {
    let mut all = going_on();
    all.retain(|tid, _| fs::metadata(format!("/proc/{tid}")).is_ok());
    all.insert(tid, (wait, Place::of(registers)));
}

/// In nanoseconds.
#[derive(Debug, PartialEq, Eq)]
enum Limit {
    /// From the beginning.
    Whole(i64),
    /// From now.
    Left(i64),
    /// None, or a moment: made again, the call waits as long as it was to.
    None,
}

/// How long the call may wait, from the arguments that it was made with.
fn limit_ns(tid: i32, call: i64, registers: &Registers) -> Option<Limit> {
    let Registers { rdi, rsi, rdx, r10, .. } = *registers;
    // Where the kernel has noted what is left (its second pointer), that is exact.
    let sleep = |asked: u64, left: u64| match left {
        0 => Some(Limit::Whole(read_timespec(tid, asked)?)),
        left => Some(Limit::Left(read_timespec(tid, left)?)),
    };
    match call {
        libc::SYS_nanosleep => sleep(rdi, rsi),
        libc::SYS_clock_nanosleep => sleep(rdx, r10),
        libc::SYS_poll if (rdx as i32) < 0 => Some(Limit::None),
        libc::SYS_poll => Some(Limit::Whole(i64::from(rdx as i32) * 1_000_000)),
        libc::SYS_futex if is_relative_futex(rsi) => Some(Limit::Whole(read_timespec(tid, r10)?)),
        libc::SYS_futex => Some(Limit::None),
        _ => None,
    }
}

fn is_relative_futex(operation: u64) -> bool {
    const COMMAND: u64 = 0x7f;
    operation & COMMAND == libc::FUTEX_WAIT as u64
}

fn read_timespec(tid: i32, at: u64) -> Option<i64> {
    let mut bytes = [0; 16];
    mem::read_exact(tid, RemoteAddr(at), &mut bytes).ok()?;
    let (s, ns) = bytes.split_at(8);
    let (s, ns) = (i64::from_ne_bytes(s.try_into().ok()?), i64::from_ne_bytes(ns.try_into().ok()?));
    s.checked_mul(1_000_000_000)?.checked_add(ns)
}

/// Whether an interrupted call, without any limit of time, tells of nothing but the interruption: it can be made again,
/// where the kernel itself never does that (signal(7)).
pub fn may_be_repeated(registers: &Registers) -> bool {
    let Registers { rax, orig_rax, rdx, r10, .. } = *registers;
    if rax as i64 != -i64::from(libc::EINTR) {
        return false;
    }
    match orig_rax as i64 {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (r10 as i32) < 0,
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => r10 == 0,
        libc::SYS_rt_sigtimedwait => rdx == 0,
        libc::SYS_semop => true,
        _ => false,
    }
}

/// The registers of a thread that makes its interrupted call again.
pub fn repeated(mut registers: Registers) -> Registers {
    registers.rax = registers.orig_rax;
    registers.rip -= 2;
    registers.orig_rax = !0;
    registers
}

/// The kernel's internal results of calls that it makes again when nothing was delivered: ERESTARTSYS, ERESTARTNOINTR and
/// ERESTARTNOHAND.
const ERESTART: [i64; 3] = [-512, -513, -514];

/// The registers with which a thread that was stopped with `registers` goes on by itself from a signal's frame: there the
/// kernel makes no call again, and forgets how it would have gone on with one. A wait of which it knew the rest begins
/// anew, with its whole time.
pub fn left_alone(registers: Registers, wait: Option<TimedWait>) -> Registers {
    let Registers { rax, orig_rax, .. } = registers;
    match rax as i64 {
        _ if (orig_rax as i64) < 0 => registers,
        result if ERESTART.contains(&result) => repeated(registers),
        ERESTART_RESTARTBLOCK => match wait {
            Some(wait) => repeated(Registers { orig_rax: wait.call as u64, ..registers }),
            None if orig_rax as i64 != libc::SYS_restart_syscall => repeated(registers),
            // Nobody knows which call it was.
            None => Registers { rax: -i64::from(libc::EINTR) as u64, orig_rax: !0, ..registers },
        },
        _ => registers,
    }
}

/// Makes the thread behind `remote`, whose other state is there, wait as `wait` says, and returns the registers that it
/// goes on with, from those that it was stopped with.
pub fn resume(
    remote: &mut Remote,
    wait: &TimedWait,
    mut registers: Registers,
) -> Result<Registers, TraceeError> {
    registers.orig_rax = wait.call as u64;
    if wait.deadline_ns == i64::MAX {
        return Ok(repeated(registers));
    }
    let tid = remote.tid();
    let left = wait.deadline_ns.saturating_sub(instance_clock_ns(tid)?);
    let is_futex = wait.call == libc::SYS_futex;
    let over = Registers {
        rax: if is_futex { -i64::from(libc::ETIMEDOUT) as u64 } else { 0 },
        orig_rax: !0,
        ..registers
    };
    if left <= 0 {
        return Ok(over);
    }
    let time = [left / 1_000_000_000, left % 1_000_000_000].map(i64::to_ne_bytes).concat();
    let at = remote.put(0, &time)?;
    let Registers { rdi, rsi, rdx, r10, r8, r9, .. } = registers;
    let args = match wait.call {
        libc::SYS_nanosleep => [at, rsi, 0, 0, 0, 0],
        libc::SYS_clock_nanosleep => [rdi, rsi, at, r10, 0, 0],
        libc::SYS_poll => [rdi, rsi, (left as u64).div_ceil(1_000_000), 0, 0, 0],
        libc::SYS_futex => [rdi, rsi, rdx, at, r8, r9],
        call => return Err(TraceeError::Unsupported(format!("a wait by system call {call} in the image"))),
    };
    match remote.interrupted_call(wait.call, args)? {
        ERESTART_RESTARTBLOCK => {
            goes_on(tid, *wait, &registers);
            Ok(Registers { rax: ERESTART_RESTARTBLOCK as u64, ..registers })
        }
        _ if wait.call == libc::SYS_nanosleep || wait.call == libc::SYS_clock_nanosleep => Ok(over),
        // What it waits for is there.
        _ => Ok(repeated(registers)),
    }
}

/// The registers with which a thread goes on elsewhere, where nobody knows of a wait: the kernel there does with an
/// interrupted call what the source's would have done.
pub fn carried(registers: Registers, repeat: bool, wait: Option<TimedWait>) -> Registers {
    match registers.rax as i64 {
        _ if registers.orig_rax as i64 >= 0 && repeat => repeated(registers),
        ERESTART_RESTARTBLOCK if registers.orig_rax as i64 >= 0 && wait.is_none() => {
            Registers { rax: -i64::from(libc::EINTR) as u64, orig_rax: !0, ..registers }
        }
        _ => registers,
    }
}

/// The registers of stopped thread `tid`.
pub fn registers(tid: i32) -> Result<Registers, TraceeError> {
    ptrace::registers(tid).map_err(TraceeError::call("PTRACE_GETREGS", tid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(call: i64, result: i64) -> Registers {
        let zero =
            crate::tracee::capture::registers_from_bytes(&[0; 216]).expect("as many bytes as registers have");
        Registers { orig_rax: call as u64, rax: result as u64, rip: 0x1002, ..zero }
    }

    #[test]
    fn the_clock_of_the_scheduler_can_be_read() {
        // This thread runs.
        assert!(Now::default().look(nix::unistd::gettid().as_raw()).is_none());
    }

    #[test]
    fn a_sleep_began_when_it_began_on_whichever_processor() {
        let cpus: Vec<usize> = (0..CpuSet::count())
            .filter(|&cpu| sched_getaffinity(Pid::from_raw(0)).is_ok_and(|set| set.is_set(cpu) == Ok(true)))
            .collect();
        for cpu in cpus {
            let (tell, told) = std::sync::mpsc::channel();
            let sleeper = std::thread::spawn(move || {
                let mut there = CpuSet::new();
                there.set(cpu).expect("a processor's number");
                sched_setaffinity(Pid::from_raw(0), &there).expect("a processor that we may use");
                let began = Clocks::of_this_kernel().expect("the clocks").monotonic_ns;
                tell.send((nix::unistd::gettid().as_raw(), began)).expect("somebody listens");
                std::thread::sleep(std::time::Duration::from_millis(300));
            });
            let (tid, began) = told.recv().expect("the thread says when it sleeps");
            std::thread::sleep(std::time::Duration::from_millis(100));
            let sleep = Now::default().look(tid).expect("it sleeps");
            let off_ms = (sleep.began_ns - began).abs() / 1_000_000;
            assert!(off_ms < 90, "a sleep on processor {cpu} seems to have begun {off_ms} ms off");
            sleeper.join().expect("it ends");
        }
    }

    #[test]
    fn only_endless_waits_are_made_again() {
        let eintr = -i64::from(libc::EINTR);
        let endless = Registers { r10: u64::MAX, ..registers(libc::SYS_epoll_wait, eintr) };
        assert!(may_be_repeated(&endless));
        assert!(!may_be_repeated(&Registers { r10: 1000, ..endless }));
        assert!(!may_be_repeated(&Registers { rax: 1, ..endless }));
        assert!(!may_be_repeated(&registers(libc::SYS_read, eintr)));
        assert_eq!(repeated(endless).rip, 0x1000);
    }

    #[test]
    fn a_thread_that_is_left_alone_makes_its_call_again() {
        let read = registers(libc::SYS_read, -512);
        assert_eq!(left_alone(read, None), Registers { rip: 0x1000, rax: 0, orig_rax: !0, ..read });
        let sleep = registers(libc::SYS_restart_syscall, ERESTART_RESTARTBLOCK);
        let wait = TimedWait { call: libc::SYS_poll, deadline_ns: 1 };
        let poll = left_alone(sleep, Some(wait));
        assert_eq!((poll.rip, poll.rax as i64), (0x1000, libc::SYS_poll));
        let lost = left_alone(sleep, None);
        assert_eq!((lost.rip, lost.rax as i64), (0x1002, -i64::from(libc::EINTR)));
        let done = registers(libc::SYS_read, 7);
        assert_eq!(left_alone(done, None), done);
        let in_code = registers(-1, -512);
        assert_eq!(left_alone(in_code, None), in_code);
    }

    #[test]
    fn a_wait_that_nobody_knows_the_rest_of_is_interrupted() {
        let stopped = registers(libc::SYS_nanosleep, ERESTART_RESTARTBLOCK);
        assert_eq!(carried(stopped, false, None).rax as i64, -i64::from(libc::EINTR));
        let wait = TimedWait { call: libc::SYS_nanosleep, deadline_ns: 1 };
        assert_eq!(carried(stopped, false, Some(wait)).rax as i64, ERESTART_RESTARTBLOCK);
    }
}
