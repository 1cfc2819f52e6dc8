//! What an image can't say, because no source would: the destination looks at it before anything is done by it.
//!
//! It comes from another host. Most of it is the argument of a system call, which the kernel judges. Here is what the kernel would
//! do, and nobody wants (madvise(2) has more to give than advice), and what the code that puts an image back relies on.

use std::{collections::BTreeSet, ops::Range};

use super::{
    TraceeError,
    advice::{self, Advice},
    image::{InstanceImage, TaskImage, ThreadImage},
    posix_timers::PosixTimer,
};

/// `RLIM_NLIMITS`.
const LIMITS: usize = 16;
/// `_NSIG`.
const SIGNALS: i32 = 64;
/// `siginfo_t`.
const SIGNAL_INFO: usize = 128;
/// `struct user_regs_struct`.
const REGISTERS: usize = 27 * 8;
/// The part of the xsave area that every processor has: the legacy region and the header.
const EXTENDED_STATE: usize = 512 + 64;
/// `struct sched_attr`, first version.
const SCHEDULING: usize = 48;
/// A thread's name, without its end.
const NAME: usize = 15;
/// As [`crate::migrate::wire`]: no address of a program is larger.
const ADDRESSES: Range<u64> = 0..1 << 56;

impl InstanceImage {
    /// Refuses an image that no source sends.
    pub fn require_sound(&self) -> Result<(), TraceeError> {
        let mut spaces = BTreeSet::new();
        let mut ids = BTreeSet::new();
        let nodes = self.processes.iter().map(|process| &process.node).chain(&self.zombies);
        if self.processes.is_empty() || !nodes.clone().all(|node| node.pid > 0 && ids.insert(node.pid)) {
            return Err(unsound("its processes have no pids of their own"));
        }
        for process in &self.processes {
            let pid = process.node.pid;
            let at = |what: &str| unsound(&format!("process {pid}: {what}"));
            if !spaces.insert(process.space) {
                return Err(at("its memory is another one's, too"));
            }
            task(&process.task).map_err(at)?;
            let mut threads = process.task.threads.iter().map(|thread| thread.tid);
            if threads.next() != Some(pid) || !threads.all(|tid| tid > 0 && ids.insert(tid)) {
                return Err(at("the ids of its threads"));
            }
        }
        match self.sysctls.unsound() {
            Some(name) => Err(unsound(&format!("the sysctl {name} is none of a network namespace"))),
            None => Ok(()),
        }
    }
}

fn unsound(what: &str) -> TraceeError {
    TraceeError::Unsupported(format!("the image is damaged: {what}"))
}

fn require(holds: bool, what: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(what) }
}

fn task(task: &TaskImage) -> Result<(), &'static str> {
    require(task.limits.len() <= LIMITS, "its limits")?;
    require(task.interval_timers.len() <= 3, "its interval timers")?;
    require(task.taken_ns >= 0, "its clock")?;
    require(task.signal_actions.iter().all(|(signal, _)| is_signal(*signal)), "its signal actions")?;
    require(task.pending_signals.iter().all(|info| is_signal_info(info)), "its pending signals")?;
    require(task.stopped.is_none_or(|stop| is_signal(stop.signal)), "the signal that it was stopped by")?;
    require((0..=SIGNALS).contains(&task.parent_death_signal), "its parent-death signal")?;
    let mut timers = BTreeSet::new();
    let timer_is_sound = |timer: &PosixTimer| {
        // One without a signal has none.
        let signal = is_signal(timer.signal) || timer.notify & libc::SIGEV_NONE != 0;
        let times = [timer.interval_ns, timer.left_ns, timer.overruns.into()];
        timer.id >= 0 && signal && times.into_iter().all(|ns| ns >= 0)
    };
    require(
        task.posix_timers.iter().all(|timer| timer_is_sound(timer) && timers.insert(timer.id)),
        "its timers",
    )?;
    advice(&task.advice)?;
    task.threads.iter().try_for_each(thread)
}

fn advice(wanted: &Advice) -> Result<(), &'static str> {
    let is_range =
        |start: u64, end: u64| start < end && ADDRESSES.contains(&start) && ADDRESSES.contains(&end);
    for part in &wanted.parts {
        require(is_range(part.start, part.end), "a part of its memory")?;
        require(part.advice.iter().all(|what| advice::is_carried(*what)), "advice on its memory")?;
    }
    require(wanted.guards.iter().all(|guard| is_range(guard.start, guard.end)), "its guard pages")
}

fn thread(thread: &ThreadImage) -> Result<(), &'static str> {
    require(thread.registers.len() == REGISTERS, "the registers of a thread")?;
    require(thread.extended_state.len() >= EXTENDED_STATE, "the extended state of a thread")?;
    require(thread.scheduling.len() == SCHEDULING, "the scheduling of a thread")?;
    require(thread.comm.len() <= NAME && !thread.comm.contains('\0'), "the name of a thread")?;
    require(thread.pending_signals.iter().all(|info| is_signal_info(info)), "the pending signals of a thread")
}

fn is_signal(signal: i32) -> bool {
    (1..=SIGNALS).contains(&signal)
}

fn is_signal_info(info: &[u8]) -> bool {
    let signal = info.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
    info.len() == SIGNAL_INFO && signal.is_some_and(is_signal)
}
