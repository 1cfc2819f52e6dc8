//! Puts a process's image into a stub whose memory is already there.
//!
//! Everything that a program could see is set while the threads are stopped; [`Rebuilt::park`] only
//! lets them go. The restartable-sequence areas come last of all: from then on the kernel writes to them.

use super::{
    TraceeError, advice, attributes,
    batch::{Arg, Batch},
    capture::{Status, instance_clock_ns, limits, registers_from_bytes},
    descriptors::{Finals, Restorer},
    image::{TaskImage, ThreadImage},
    posix_timers, privileges,
    reconnect::Reconnected,
    remote::Remote,
    seccomp::{self, Seccomp},
    space::Space,
    threads,
    turns::Turns,
    waits,
};
use crate::sys::{process, ptrace, ptrace::Registers};

/// Flags of an alternate stack (sigaltstack(2)): a handler runs on it; there is none.
const SS_ONSTACK: u8 = 1;
const SS_DISABLE: u8 = 2;

/// Processes that are ready to run, every thread stopped.
#[derive(Debug, Default)]
pub struct Rebuilt {
    tids: Vec<i32>,
    /// Each process's connections.
    reconnected: Vec<Reconnected>,
}

/// Processes that are ready to run, and held still by their cgroup: they no longer die with their tracer.
#[derive(Debug, Default)]
pub struct Parked {
    /// Each process's connections.
    reconnected: Vec<Reconnected>,
    finals: Finals,
    resumed: bool,
}

impl Rebuilt {
    /// Lets the threads go by ptrace, by the thread of ours that holds them. Their cgroup sees to it that they run no further.
    pub fn park(self) -> Result<Parked, TraceeError> {
        for &tid in &self.tids {
            ptrace::clear_options(tid).map_err(TraceeError::call("PTRACE_SETOPTIONS", tid))?;
        }
        for &tid in &self.tids {
            ptrace::detach(tid, 0).map_err(TraceeError::call("PTRACE_DETACH", tid))?;
        }
        Ok(Parked { reconnected: self.reconnected, finals: Finals::default(), resumed: false })
    }
}

impl Parked {
    /// Takes in other processes.
    pub fn add(&mut self, other: Self) {
        self.reconnected.extend(other.reconnected);
    }

    /// Leaves something to be done when the source is committed.
    pub fn leave(&mut self, finals: Finals) {
        self.finals = finals;
    }

    /// Does what had to wait for the commit, and lets the connections go on; the port is up. A second call does nothing.
    pub fn resume(&mut self) {
        if std::mem::replace(&mut self.resumed, true) {
            return;
        }
        std::mem::take(&mut self.finals).carry_out();
        self.reconnected.iter_mut().for_each(Reconnected::resume);
    }

    /// Sends again what got lost on its way, now that the processes run.
    pub fn repeat_lost(self) {
        for reconnected in self.reconnected.into_iter().filter(|process| !process.waiting.is_empty()) {
            // Nobody waits for it: the source has to hear that the instance runs.
            std::thread::spawn(move || reconnected.repeat_lost());
        }
    }
}

impl Rebuilt {
    /// Takes in the threads of another process.
    pub fn add(&mut self, other: Self) {
        self.tids.extend(other.tids);
        self.reconnected.extend(other.reconnected);
    }
}

/// What of a process's tables is to be set: one that several have is set with one of them.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// The descriptors: with the first process that has them.
    pub descriptors: bool,
    /// The directories: with the last one, as the others' files are opened by paths from the root.
    pub directories: bool,
}

/// Puts `image` into `space`, whose layout and contents are complete. Others may be rebuilt beside it; its descriptors are made
/// in turn `number`.
pub fn rebuild(
    space: &mut Space,
    image: &TaskImage,
    parts: Parts,
    (descriptors, number): (&Turns<Restorer<'_>>, usize),
) -> Result<Rebuilt, TraceeError> {
    let pid = space.pid();
    let leader = &mut space.remote;
    memory_map(leader, image)?;
    advice::restore(leader, &image.advice)?;
    let mut reconnected = Vec::new();
    let mut end = None;
    let mut tids = None;
    descriptors.take(number, |descriptors| {
        if parts.descriptors {
            let (connections, link_end) = descriptors.restore(leader, &image.descriptors)?;
            reconnected.push(connections);
            end = Some(link_end);
        }
        // What later processes have in common with a thread has to be there.
        if threads::have_own_descriptors(image) {
            let tids = tids.insert(make_threads(leader, image)?);
            reconnected.extend(threads::restore_descriptors(leader, image, tids, end, descriptors)?);
        }
        Ok(())
    })?;
    let tids = tids.map_or_else(|| make_threads(leader, image), Ok)?;
    threads::restore_directories(leader, image, &tids)?;
    if let Some(end) = end {
        Restorer::close_link(leader, end)?;
    }
    if parts.directories {
        image.directories.enter(leader)?;
    }

    let mut threads = Vec::with_capacity(tids.len());
    let in_common = filters_in_common(image);
    for (&tid, thread) in tids.iter().zip(&image.threads) {
        let mut remote = leader.for_thread(tid)?;
        restore_thread(&mut remote, pid, thread)?;
        attributes::restore_thread(tid, &thread.attributes)?;
        if in_common.is_none() {
            seccomp::install(&mut remote, &thread.seccomp)?;
        }
        privileges::restore(&mut remote, &thread.credentials)?;
        threads.push(remote);
    }
    let leader = &mut space.remote;
    let mut batch = leader.batch();
    let args = [libc::PR_SET_DUMPABLE.into(), image.dumpable.min(1).into()];
    batch.call("prctl", libc::SYS_prctl, &args)?;
    if image.parent_death_signal != 0 {
        // A change of user resets it: hence only now.
        let args = [libc::PR_SET_PDEATHSIG.into(), image.parent_death_signal.into()];
        batch.call("prctl", libc::SYS_prctl, &args)?;
    }
    batch.run()?;
    set_oom_score(pid, image.oom_score_adj)?;
    let frozen_ns = instance_clock_ns(pid)?.saturating_sub(image.taken_ns).max(0);
    posix_timers::make(leader, &image.posix_timers)?;
    let waiting = timers_that_wait(image);
    let mut done = posix_timers::arm_with_overruns(leader, &image.posix_timers, &waiting, frozen_ns)?;
    done.extend(requeue_signals(leader, &mut threads, image, frozen_ns)?);
    posix_timers::arm(leader, &image.posix_timers, frozen_ns, &done)?;
    let mut batch = leader.batch();
    for (which, timer) in (0_u64..).zip(&image.interval_timers).filter(|(_, timer)| **timer != [0; 32]) {
        let timer = as_it_waits(which, timer);
        batch.call("setitimer", libc::SYS_setitimer, &[which.into(), Arg::Data(&timer)])?;
    }
    batch.run()?;
    let mut registers = Vec::with_capacity(threads.len());
    for (remote, thread) in threads.iter_mut().zip(&image.threads) {
        registers.push(registers_of(remote, thread)?);
    }
    attributes::restrict_process(&mut space.remote, &image.attributes)?;
    space.remote.unmap_scratch()?;
    for ((remote, thread), registers) in threads.iter_mut().zip(&image.threads).zip(&registers) {
        set_going(remote, thread, registers)?;
    }
    Ok(Rebuilt { tids, reconnected })
}

/// Sets what a process's threads have in common, and makes them; returns their ids as the agent sees them.
fn make_threads(leader: &mut Remote, image: &TaskImage) -> Result<Vec<i32>, TraceeError> {
    let here = limits(leader.tid())?;
    let acted_on = Status::read(leader.tid())?.acted_on();
    let mut batch = leader.batch();
    // A stub has handlers of the agent's, whose code is not there any more.
    let has = |signal: i32| image.signal_actions.iter().any(|(wanted, _)| *wanted == signal);
    for signal in (1..=64).filter(|signal| acted_on >> (signal - 1) & 1 == 1 && !has(*signal)) {
        let args = [signal.into(), Arg::Data(&[0; 32]), 0.into(), 8.into()];
        batch.call("rt_sigaction", libc::SYS_rt_sigaction, &args)?;
    }
    for (signal, action) in &image.signal_actions {
        // SIGKILL and SIGSTOP can't be set, and nobody could have set them.
        let args = [(*signal).into(), Arg::Data(action), 0.into(), 8.into()];
        batch.call("rt_sigaction", libc::SYS_rt_sigaction, &args)?;
    }
    if image.child_subreaper {
        batch.call("prctl", libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()])?;
    }
    set_limits(&mut batch, image, &here)?;
    batch.run()?;
    attributes::restore_process(leader, &image.attributes)?;
    filters_in_common(image).map_or(Ok(()), |filters| seccomp::install(leader, filters))?;
    threads::make(leader, image)
}

/// Threads that have the same filters have them in common.
fn filters_in_common(image: &TaskImage) -> Option<&Seccomp> {
    let filters = image.threads.first().map(|leader| &leader.seccomp);
    filters.filter(|f| !f.strict && image.threads.iter().all(|thread| thread.seccomp == **f))
}

fn memory_map(leader: &mut Remote, image: &TaskImage) -> Result<(), TraceeError> {
    const PR_SET_MM: u64 = 35;
    const PR_SET_MM_MAP: u64 = 14;
    /// `struct prctl_mm_map` (include/uapi/linux/prctl.h): eleven addresses, the auxiliary vector's
    /// address, its size and the executable's descriptor.
    const SIZE: u64 = 104;
    let path = [image.exe.as_bytes(), &[0]].concat();
    let at = leader.put(0, &path)?;
    let exe = leader.call("open", libc::SYS_open, [at, 0, 0, 0, 0, 0])?;
    let auxv_at = leader.put(SIZE, &image.auxv)?;
    let mut map = Vec::new();
    for word in image.memory_map.bounds.iter().chain([&auxv_at]) {
        map.extend(word.to_ne_bytes());
    }
    map.extend((image.auxv.len() as u32).to_ne_bytes());
    map.extend((exe as u32).to_ne_bytes());
    let mut batch = leader.batch();
    let args = [PR_SET_MM.into(), PR_SET_MM_MAP.into(), Arg::Data(&map), SIZE.into(), 0.into()];
    batch.call("prctl", libc::SYS_prctl, &args)?;
    batch.call("close", libc::SYS_close, &[exe.into()])?;
    batch.run().map(drop)
}

fn set_limits(batch: &mut Batch<'_>, image: &TaskImage, here: &[(u64, u64)]) -> Result<(), TraceeError> {
    for (number, (limit, here)) in (0_u64..).zip(image.limits.iter().zip(here)) {
        if limit != here {
            let bytes = [limit.0, limit.1].map(u64::to_ne_bytes).concat();
            let args = [0.into(), number.into(), Arg::Data(&bytes), 0.into()];
            batch.call("prlimit64", libc::SYS_prlimit64, &args)?;
        }
    }
    Ok(())
}

fn restore_thread(remote: &mut Remote, pid: i32, thread: &ThreadImage) -> Result<(), TraceeError> {
    let tid = remote.tid();
    let mut batch = remote.batch();
    let name = [thread.comm.as_bytes(), &[0]].concat();
    batch.call("prctl", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), Arg::Data(&name)])?;
    // A new thread has none; a stub has that of the program that it was.
    if tid == pid || thread.alternate_stack[8] & SS_DISABLE == 0 {
        let mut stack = thread.alternate_stack;
        // sigaltstack(2) refuses to set SS_ONSTACK, and the kernel finds out by itself from the stack pointer.
        stack[8] &= !SS_ONSTACK;
        batch.call("sigaltstack", libc::SYS_sigaltstack, &[Arg::Data(&stack)])?;
    }
    batch.call("set_tid_address", libc::SYS_set_tid_address, &[thread.clear_child_tid.into()])?;
    if thread.robust_list.0 != 0 {
        let args = [thread.robust_list.0.into(), thread.robust_list.1.into()];
        batch.call("set_robust_list", libc::SYS_set_robust_list, &args)?;
    }
    attributes::restore_by(&mut batch, &thread.attributes)?;
    batch.run()?;
    let wrong =
        |what| TraceeError::Unsupported(format!("thread {}: {what} in its image is damaged", thread.tid));
    let scheduling = thread.scheduling.as_slice().try_into().map_err(|_| wrong("the scheduling"))?;
    process::sched_setattr(tid, &scheduling).map_err(TraceeError::call("sched_setattr", tid))?;
    ptrace::set_extended_state(tid, &thread.extended_state)
        .map_err(TraceeError::call("PTRACE_SETREGSET of the xsave area", tid))
}

/// The interval timer (`struct itimerval`: interval, then time left) to be set so that it is as it was.
///
/// One of real time that has expired has no time left until its signal is taken, and goes on by its interval only then. A
/// timer that is set without time left has no interval either: so it expires once more, which the signal that waits hides.
fn as_it_waits(which: u64, timer: &[u8; 32]) -> [u8; 32] {
    let mut timer = *timer;
    if which == libc::ITIMER_REAL as u64 && timer[16..] == [0; 16] {
        timer[24..].copy_from_slice(&1_i64.to_ne_bytes());
    }
    timer
}

fn set_oom_score(pid: i32, score: i32) -> Result<(), TraceeError> {
    let path = format!("/proc/{pid}/oom_score_adj");
    if super::read_proc(&path)?.trim().parse() == Ok(score) {
        return Ok(());
    }
    std::fs::write(&path, score.to_string()).map_err(TraceeError::proc(path))
}

/// The timers whose signals are to wait in the process.
fn timers_that_wait(image: &TaskImage) -> Vec<i32> {
    let of_threads = image.threads.iter().flat_map(|thread| &thread.pending_signals);
    let waiting = image.pending_signals.iter().chain(of_threads);
    waiting.filter_map(|info| Some(posix_timers::sender(&image.posix_timers, info)?.id)).collect()
}

/// Only the process itself may queue a siginfo that claims to be the kernel's, or tgkill(2)'s, and for a thread only that
/// thread. `threads`: all of them, in the image's order. Returns the timers whose signals wait.
fn requeue_signals(
    leader: &mut Remote,
    threads: &mut [Remote],
    image: &TaskImage,
    frozen_ns: i64,
) -> Result<Vec<i32>, TraceeError> {
    let mut expired = Vec::new();
    let Some(inner_pid) = image.threads.first().map(|thread| thread.tid as u64) else { return Ok(expired) };
    let mut is_timers = |leader: &mut Remote, info: &[u8]| -> Result<bool, TraceeError> {
        let Some(timer) = posix_timers::sender(&image.posix_timers, info) else { return Ok(false) };
        expired.push(timer.id);
        posix_timers::expire(leader, timer, frozen_ns).map(|()| true)
    };
    let signal = |info: &[u8]| info.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes)) as u64;
    for info in &image.pending_signals {
        if is_timers(leader, info)? {
            continue;
        }
        let at = leader.put(0, info)?;
        let args = [inner_pid, signal(info), at, 0, 0, 0];
        leader.call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, args)?;
    }
    for (remote, thread) in threads.iter_mut().zip(&image.threads) {
        for info in &thread.pending_signals {
            if is_timers(leader, info)? {
                continue;
            }
            let at = leader.put(0, info)?;
            let args = [inner_pid, thread.tid as u64, signal(info), at, 0, 0];
            remote.call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, args)?;
        }
    }
    Ok(expired)
}

/// The registers that a thread goes on with: from here on the kernel knows of its wait.
fn registers_of(remote: &mut Remote, thread: &ThreadImage) -> Result<Registers, TraceeError> {
    let damaged =
        || TraceeError::Unsupported(format!("thread {}: the registers in its image are damaged", thread.tid));
    let registers = registers_from_bytes(&thread.registers).ok_or_else(damaged)?;
    match &thread.wait {
        Some(wait) => waits::resume(remote, wait, registers),
        None => Ok(registers),
    }
}

/// Registers the restartable-sequence area and sets mask and registers: nothing may run in it afterwards.
fn set_going(remote: &mut Remote, thread: &ThreadImage, registers: &Registers) -> Result<(), TraceeError> {
    let tid = remote.tid();
    if thread.rseq.address != 0 {
        let rseq = thread.rseq;
        let args = [rseq.address, rseq.size.into(), 0, rseq.signature.into(), 0, 0];
        remote.call("rseq", libc::SYS_rseq, args)?;
    }
    ptrace::set_signal_mask(tid, thread.signal_mask).map_err(TraceeError::call("PTRACE_SETSIGMASK", tid))?;
    ptrace::set_registers(tid, registers).map_err(TraceeError::call("PTRACE_SETREGS", tid))
}
