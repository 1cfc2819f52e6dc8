//! Takes the image of a process that is stopped, but for its descriptors.

use std::fs;

use super::{
    TraceeError, advice,
    attributes::{self, InstanceProcessors},
    image::{Credentials, MemoryMap, StopImage, TaskImage, ThreadImage},
    layout::Layout,
    posix_timers, privileges, read_proc,
    remote::Remote,
    seccomp,
    snapshot::Frozen,
    stopped::StoppedProcess,
    tables::{self, Directories, Table, ThreadTables},
    waits,
};
use crate::sys::{
    clock::Clocks,
    process::{self, Common},
    ptrace::{self, Registers},
};

/// What a process has that was made by clone(2) in an unusual way.
pub(super) const OTHER_EXIT_SIGNAL: &str =
    "another signal than SIGCHLD by which its parent is told of its end";

/// Takes the image of `process`, whose instance has the processors `home`, by the thread that holds it.
pub(super) fn capture(process: &Frozen, home: &InstanceProcessors) -> Result<TaskImage, TraceeError> {
    let stopped = &process.threads;
    let (pid, mappings) = (stopped.pid(), process.mappings.clone());
    let status = Status::read(pid)?;
    let mut leader = Remote::of_mapped_program(stopped, &mappings)?;
    leader.map_scratch_in_program()?;
    let brk = leader.call("brk", libc::SYS_brk, [0; 6])?;
    let image = TaskImage {
        layout: Layout { mappings, huge_pages_off: status.number("THP_enabled:") == Some(0) },
        kernel_mappings: process.kernel_mappings.clone(),
        advice: advice::complete(&mut leader, process.advice.clone())?,
        memory_map: memory_map(pid, brk)?,
        auxv: read_bytes(&format!("/proc/{pid}/auxv"))?,
        exe: link(pid, "exe")?,
        directories: Directories::read(pid, &status)?,
        attributes: attributes::of_process(&mut leader)?,
        limits: limits(pid)?,
        oom_score_adj: read_proc(&format!("/proc/{pid}/oom_score_adj"))?.trim().parse().unwrap_or(0),
        dumpable: leader.call("prctl", libc::SYS_prctl, [libc::PR_GET_DUMPABLE as u64, 0, 0, 0, 0, 0])?,
        child_subreaper: read_back(&mut leader, libc::PR_GET_CHILD_SUBREAPER as u64)? != 0,
        parent_death_signal: read_back(&mut leader, libc::PR_GET_PDEATHSIG as u64)?,
        signal_actions: signal_actions(&mut leader, &status)?,
        pending_signals: pending(pid, true)?,
        interval_timers: interval_timers(&mut leader)?,
        posix_timers: posix_timers::capture(&mut leader)?,
        taken_ns: instance_clock_ns(pid)?,
        stopped: stopped.stop_signal().map(|signal| StopImage { signal, unread: false }),
        descriptors: Vec::new(),
        threads: Vec::new(),
    };
    let mut threads = vec![thread(stopped, pid, &mut leader, &status, home)?];
    let tids = stopped.tids();
    let descriptors = tables::owners(&tids, Common::Descriptors)?;
    let directories = tables::owners(&tids, Common::Directories)?;
    for (&tid, owners) in tids.iter().zip(descriptors.into_iter().zip(directories)).skip(1) {
        let status = Status::read(tid)?;
        let mut remote = leader.thread_of_program(stopped, tid)?;
        let mut described = thread(stopped, tid, &mut remote, &status, home)?;
        drop(remote);
        let inner = |tid: i32| Ok(Status::read(tid)?.last_number("NSpid:").unwrap_or(tid));
        described.tables = ThreadTables {
            descriptors: match owners.0 {
                owner if owner == pid => Table::Process,
                owner if owner == tid => Table::Own(Vec::new()),
                owner => Table::Of(inner(owner)?),
            },
            directories: match owners.1 {
                owner if owner == pid => Table::Process,
                owner if owner == tid => Table::Own(Directories::read(tid, &status)?),
                owner => Table::Of(inner(owner)?),
            },
        };
        threads.push(described);
    }
    Ok(TaskImage { threads, ..image })
}

/// `status` is the thread's own: the kernel needs long for it, and it stays as it is.
fn thread(
    stopped: &StoppedProcess,
    tid: i32,
    remote: &mut Remote,
    status: &Status,
    home: &InstanceProcessors,
) -> Result<ThreadImage, TraceeError> {
    let (pid, call) = (stopped.pid(), TraceeError::call);
    let wait = stopped.wait(tid);
    let registers = waits::carried(
        stopped.interrupted(tid).unwrap_or(*remote.saved_registers()),
        stopped.repeats(tid),
        wait,
    );
    let at = remote.put(0, &[0; 24])?;
    remote.call("sigaltstack", libc::SYS_sigaltstack, [0, at, 0, 0, 0, 0])?;
    let alternate_stack = remote.get(0)?;
    const PR_GET_TID_ADDRESS: u64 = 40;
    let at = remote.put(0, &[0; 8])?;
    remote.call("prctl", libc::SYS_prctl, [PR_GET_TID_ADDRESS, at, 0, 0, 0, 0])?;
    let clear_child_tid = u64::from_ne_bytes(remote.get(0)?);
    Ok(ThreadImage {
        tid: status.last_number("NSpid:").unwrap_or(tid),
        comm: read_proc(&format!("/proc/{pid}/task/{tid}/comm"))?.trim_end_matches('\n').to_owned(),
        registers: registers_to_bytes(&registers),
        extended_state: ptrace::extended_state(tid).map_err(call("PTRACE_GETREGSET", tid))?,
        signal_mask: remote.saved_mask(),
        wait,
        pending_signals: pending(tid, false)?,
        alternate_stack,
        clear_child_tid,
        robust_list: process::robust_list(tid).map_err(call("get_robust_list", tid))?,
        rseq: ptrace::rseq_configuration(tid).map_err(call("PTRACE_GET_RSEQ_CONFIGURATION", tid))?,
        scheduling: process::sched_getattr(tid).map_err(call("sched_getattr", tid))?.to_vec(),
        credentials: privileges::capture(remote, status)?,
        seccomp: seccomp::capture(tid, status)?,
        tables: ThreadTables::default(),
        attributes: attributes::of_thread(remote, status, home)?,
    })
}

/// The registers' words, in the kernel's order.
pub(super) fn registers_to_bytes(registers: &Registers) -> Vec<u8> {
    words(registers).iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The reverse of [`registers_to_bytes`]; `None` when the length is wrong.
pub(super) fn registers_from_bytes(bytes: &[u8]) -> Option<Registers> {
    let words: Vec<u64> =
        bytes.chunks_exact(8).filter_map(|c| Some(u64::from_ne_bytes(c.try_into().ok()?))).collect();
    let [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    ] = <[u64; 27]>::try_from(words).ok()?;
    Some(Registers {
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    })
}

fn words(r: &Registers) -> [u64; 27] {
    [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi,
        r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ]
}

/// Fields of `/proc/PID/status`.
pub(super) struct Status(String);

impl Status {
    /// Reads it.
    pub(super) fn read(pid: i32) -> Result<Self, TraceeError> {
        read_proc(&format!("/proc/{pid}/status")).map(Self)
    }

    /// The last of a line's numbers.
    pub(super) fn last_number(&self, name: &str) -> Option<i32> {
        self.text(name).split_whitespace().last()?.parse().ok()
    }

    /// What follows a name.
    pub(super) fn text(&self, name: &str) -> &str {
        self.0.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim()
    }

    /// A number in base `radix`.
    pub(super) fn radix(&self, name: &str, radix: u32) -> Option<u64> {
        u64::from_str_radix(self.text(name).split_whitespace().next()?, radix).ok()
    }

    /// A decimal number.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.radix(name, 10)
    }

    /// The signals that are ignored or have a handler, bit n-1 for signal n; all if that isn't told.
    pub(super) fn acted_on(&self) -> u64 {
        self.radix("SigIgn:", 16).unwrap_or(!0) | self.radix("SigCgt:", 16).unwrap_or(!0)
    }

    fn ids<const N: usize>(&self, name: &str) -> [u32; N] {
        let mut ids = [0; N];
        for (id, word) in ids.iter_mut().zip(self.text(name).split_whitespace()) {
            *id = word.parse().unwrap_or_default();
        }
        ids
    }

    /// Users, groups and capabilities.
    pub(super) fn credentials(&self) -> Credentials {
        let capability = |name| self.radix(name, 16).unwrap_or_default();
        Credentials {
            uids: self.ids("Uid:"),
            gids: self.ids("Gid:"),
            groups: self.text("Groups:").split_whitespace().filter_map(|word| word.parse().ok()).collect(),
            capabilities: ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"].map(capability),
            no_new_privs: self.number("NoNewPrivs:") == Some(1),
            // Not in this file.
            secure_bits: 0,
        }
    }
}

/// Soft and hard limits, in the order of their numbers: that of the lines of `/proc/PID/limits`, which
/// can be read where prlimit(2) on another user's process needs a capability.
pub(super) fn limits(pid: i32) -> Result<Vec<(u64, u64)>, TraceeError> {
    let text = read_proc(&format!("/proc/{pid}/limits"))?;
    let value = |word: Option<&str>| match word {
        Some("unlimited") => Some(u64::MAX),
        word => word?.parse().ok(),
    };
    let parse = |line: &str| {
        let mut words = line.get(26..)?.split_whitespace();
        Some((value(words.next())?, value(words.next())?))
    };
    Ok(text.lines().skip(1).filter_map(parse).collect())
}

/// Code, data, heap, stack, arguments and environment, from `/proc/PID/stat` (proc_pid_stat(5)).
fn memory_map(pid: i32, brk: u64) -> Result<MemoryMap, TraceeError> {
    let path = format!("/proc/{pid}/stat");
    let text = read_proc(&path)?;
    let after_name = text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    // The first of them is field 3.
    let field = |number: usize| fields.get(number - 3).and_then(|word| word.parse().ok());
    let bounds = || {
        Some([
            field(26)?,
            field(27)?,
            field(45)?,
            field(46)?,
            field(47)?,
            brk,
            field(28)?,
            field(48)?,
            field(49)?,
            field(50)?,
            field(51)?,
        ])
    };
    if field(38) != Some(libc::SIGCHLD as u64) {
        return Err(TraceeError::Unsupported(format!("process {pid} has {OTHER_EXIT_SIGNAL}")));
    }
    let bounds = bounds().ok_or_else(|| TraceeError::Proc { path, problem: "too few fields".into() })?;
    Ok(MemoryMap { bounds })
}

fn signal_actions(remote: &mut Remote, status: &Status) -> Result<Vec<(i32, [u8; 32])>, TraceeError> {
    let set = status.acted_on();
    let mut actions = Vec::new();
    // The flags of SIGCHLD mean something at its default, too: SA_NOCLDWAIT, SA_NOCLDSTOP.
    for signal in (1..=64).filter(|signal| set & (1 << (signal - 1)) != 0 || *signal == libc::SIGCHLD) {
        let at = remote.put(0, &[0; 32])?;
        remote.call("rt_sigaction", libc::SYS_rt_sigaction, [signal as u64, 0, at, 8, 0, 0])?;
        let action = remote.get(0)?;
        if action != [0; 32] {
            actions.push((signal, action));
        }
    }
    Ok(actions)
}

fn interval_timers(remote: &mut Remote) -> Result<Vec<[u8; 32]>, TraceeError> {
    let mut timers = Vec::new();
    for which in [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF] {
        let at = remote.put(0, &[0; 32])?;
        remote.call("getitimer", libc::SYS_getitimer, [which as u64, at, 0, 0, 0, 0])?;
        timers.push(remote.get(0)?);
    }
    Ok(timers)
}

/// A prctl(2) that writes an int to the address that it is given.
fn read_back(remote: &mut Remote, option: u64) -> Result<i32, TraceeError> {
    let at = remote.put(0, &[0; 4])?;
    remote.call("prctl", libc::SYS_prctl, [option, at, 0, 0, 0, 0])?;
    Ok(i32::from_ne_bytes(remote.get(0)?))
}

/// CLOCK_MONOTONIC as process `pid` has it, in nanoseconds.
pub(super) fn instance_clock_ns(pid: i32) -> Result<i64, TraceeError> {
    let clocks = Clocks::of_this_kernel().and_then(|now| Ok(now.plus(Clocks::offsets_of(pid)?)));
    Ok(clocks.map_err(TraceeError::call("reading the clocks", pid))?.monotonic_ns)
}

fn pending(tid: i32, shared: bool) -> Result<Vec<Vec<u8>>, TraceeError> {
    let signals =
        ptrace::pending_signals(tid, shared).map_err(TraceeError::call("PTRACE_PEEKSIGINFO", tid))?;
    Ok(signals.into_iter().map(|info| info.to_vec()).collect())
}

pub(super) fn link(pid: i32, name: &str) -> Result<String, TraceeError> {
    let path = format!("/proc/{pid}/{name}");
    let target = fs::read_link(&path).map_err(TraceeError::proc(path))?;
    Ok(target.to_string_lossy().into_owned())
}

fn read_bytes(path: &str) -> Result<Vec<u8>, TraceeError> {
    fs::read(path).map_err(TraceeError::proc(path))
}
