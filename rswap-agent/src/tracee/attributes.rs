//! What processes and threads have set for themselves besides what everybody has.

use std::fs;

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use procfs::process::Process;
use serde::{Deserialize, Serialize};

use super::{
    TraceeError,
    batch::{Arg, Batch},
    capture::Status,
    read_proc,
    remote::Remote,
};
use crate::{
    instance::affinity::{Choices, Processors},
    sys::{cpuid, process},
};

/// Memory may not become executable that was writable (`PR_SET_MDWE`, since Linux 6.3).
const PR_SET_MDWE: u64 = 65;
const PR_GET_MDWE: u64 = 66;
/// All memory may be merged with what is the same (ksm(7), since Linux 6.4).
const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_GET_MEMORY_MERGE: u64 = 68;
/// membarrier(2): which registrations there are (since Linux 6.3), and those that concern nobody but the process.
const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;
const REGISTER_PRIVATE: u32 = 1 << 4 | 1 << 6 | 1 << 8;
const MEMBARRIER_CMD_QUERY: u64 = 0;
/// arch_prctl(2): registers that a program has asked for.
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
/// What a thread may do about machine checks, and whether it may read the time stamp counter.
const PR_MCE_KILL_SET: u64 = 1;
const PR_MCE_KILL_DEFAULT: u64 = 2;
const PR_TSC_ENABLE: i32 = 1;
/// Which speculation a thread forbids itself, by the line of `/proc/PID/status`
/// (Documentation/userspace-api/spec_ctrl.rst).
const PR_SET_SPECULATION_CTRL: u64 = 53;
const SPECULATION: [(&str, u64); 2] = [("Speculation_Store_Bypass:", 0), ("SpeculationIndirectBranch:", 1)];
const PR_SPEC_DISABLE: u64 = 1 << 2;
const PR_SPEC_FORCE_DISABLE: u64 = 1 << 3;

/// Of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessAttributes {
    /// Which of its memory a core dump would have (`/proc/PID/coredump_filter`).
    pub core_filter: u32,
    /// `PR_GET_MDWE`.
    pub write_or_execute: u64,
    /// `PR_GET_MEMORY_MERGE`.
    pub merges_memory: bool,
    /// The commands by which it has registered with membarrier(2): without them, others would fail.
    pub barriers: u32,
    /// `ARCH_GET_XCOMP_PERM`: registers that it may use; 0 where all may use all.
    pub registers: u64,
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
    /// `PR_GET_TSC`.
    pub time_stamps: i32,
    /// `PR_MCE_KILL_GET`.
    pub machine_checks: u64,
    /// What it does not let the processor guess: (kind, `PR_SPEC_DISABLE` or `PR_SPEC_FORCE_DISABLE`).
    pub speculation: Vec<(u64, u64)>,
}

/// Those of the stopped process behind `leader`.
pub fn of_process(leader: &mut Remote) -> Result<ProcessAttributes, TraceeError> {
    let pid = leader.tid();
    let path = format!("/proc/{pid}/coredump_filter");
    let filter = read_proc(&path)?;
    // A kernel that doesn't know it has never set it.
    let write_or_execute = leader.call("prctl", libc::SYS_prctl, [PR_GET_MDWE, 0, 0, 0, 0, 0]).unwrap_or(0);
    let merges = leader.call("prctl", libc::SYS_prctl, [PR_GET_MEMORY_MERGE, 0, 0, 0, 0, 0]).unwrap_or(0);
    require_no_segments(leader)?;
    Ok(ProcessAttributes {
        core_filter: u32::from_str_radix(filter.trim(), 16)
            .map_err(|error| TraceeError::Proc { path, problem: error.to_string() })?,
        write_or_execute,
        merges_memory: merges != 0,
        barriers: barriers(leader),
        registers: registers_on_demand(leader)?,
    })
}

/// The registrations with membarrier(2). A kernel that doesn't tell them is taken to have all that it knows and that
/// concern nobody else.
fn barriers(leader: &mut Remote) -> u32 {
    let mut ask = |command| leader.call("membarrier", libc::SYS_membarrier, [command, 0, 0, 0, 0, 0]);
    match ask(MEMBARRIER_CMD_GET_REGISTRATIONS) {
        Ok(registered) => registered as u32,
        Err(_) => ask(MEMBARRIER_CMD_QUERY).unwrap_or(0) as u32 & REGISTER_PRIVATE,
    }
}

fn registers_on_demand(leader: &mut Remote) -> Result<u64, TraceeError> {
    if !cpuid::has_registers_on_demand() {
        return Ok(0);
    }
    let at = leader.put(0, &[0; 8])?;
    leader.call("arch_prctl", libc::SYS_arch_prctl, [ARCH_GET_XCOMP_PERM, at, 0, 0, 0, 0])?;
    Ok(u64::from_ne_bytes(leader.get(0)?))
}

/// Segments of the program's own (modify_ldt(2)) are not carried.
fn require_no_segments(leader: &mut Remote) -> Result<(), TraceeError> {
    const READ: u64 = 0;
    const ENTRY_BYTES: u64 = 8;
    let at = leader.put(0, &[0; ENTRY_BYTES as usize])?;
    // A kernel without the call has none.
    let bytes =
        leader.call("modify_ldt", libc::SYS_modify_ldt, [READ, at, ENTRY_BYTES, 0, 0, 0]).unwrap_or(0);
    if bytes == 0 {
        return Ok(());
    }
    let text =
        format!("process {} has segments of its own (modify_ldt): not carried in this version", leader.tid());
    Err(TraceeError::Unsupported(text))
}

/// The processors of an instance, while its image is taken.
#[derive(Debug)]
pub struct InstanceProcessors {
    /// Those that it may use.
    pub usual: Vec<usize>,
    /// What its threads chose before a pool limited them, if it was moved between pools here.
    pub chosen: Option<(Choices, Processors)>,
}

impl InstanceProcessors {
    /// What thread `tid` chose for itself that is found with `found`; nothing if it did not choose.
    fn chosen_by(&self, tid: i32, found: Vec<usize>) -> Vec<usize> {
        let own = self.chosen.as_ref().map(|(choices, host)| {
            let started =
                || Process::new(tid).and_then(|thread| thread.stat()).ok().map(|stat| stat.starttime);
            choices.of(tid, &found.iter().copied().collect(), host, started)
        });
        match own {
            Some(None) => Vec::new(),
            Some(Some(own)) => own.into_iter().collect(),
            None if found == self.usual => Vec::new(),
            None => found,
        }
    }
}

/// Those of the stopped thread behind `remote`, in an instance that has `home`; `status` is its own.
pub(super) fn of_thread(
    remote: &mut Remote,
    status: &Status,
    home: &InstanceProcessors,
) -> Result<ThreadAttributes, TraceeError> {
    let tid = remote.tid();
    let path = format!("/proc/{tid}/personality");
    let personality = u32::from_str_radix(read_proc(&path)?.trim(), 16)
        .map_err(|error| TraceeError::Proc { path, problem: error.to_string() })?;
    let slack = remote.call("prctl", libc::SYS_prctl, [libc::PR_GET_TIMERSLACK as u64, 0, 0, 0, 0, 0])?;
    let at = remote.put(0, &[0; 4])?;
    remote.call("prctl", libc::SYS_prctl, [libc::PR_GET_TSC as u64, at, 0, 0, 0, 0])?;
    let time_stamps = i32::from_ne_bytes(remote.get(0)?);
    let machine_checks =
        remote.call("prctl", libc::SYS_prctl, [libc::PR_MCE_KILL_GET as u64, 0, 0, 0, 0, 0])?;
    let processors = processors(tid)?;
    Ok(ThreadAttributes {
        personality,
        timer_slack_ns: slack,
        io_priority: process::io_priority(tid).map_err(TraceeError::call("ioprio_get", tid))?,
        processors: home.chosen_by(tid, processors),
        time_stamps,
        machine_checks,
        speculation: speculation(status),
    })
}

fn speculation(status: &Status) -> Vec<(u64, u64)> {
    let forbidden = |(line, kind): (&str, u64)| match status.text(line) {
        "thread force mitigated" | "conditional force disabled" => Some((kind, PR_SPEC_FORCE_DISABLE)),
        "thread mitigated" | "conditional disabled" => Some((kind, PR_SPEC_DISABLE)),
        _ => None,
    };
    SPECULATION.into_iter().filter_map(forbidden).collect()
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
    fs::write(&path, format!("{:#x}", wanted.core_filter)).map_err(TraceeError::proc(path))?;
    let mut batch = leader.batch();
    if wanted.merges_memory {
        batch.call("prctl", libc::SYS_prctl, &[PR_SET_MEMORY_MERGE.into(), 1.into()])?;
    }
    for command in (0..u32::BITS).map(|bit| 1 << bit).filter(|command| wanted.barriers & command != 0) {
        batch.call("membarrier", libc::SYS_membarrier, &[u64::from(command).into()])?;
    }
    batch.run()?;
    let missing = wanted.registers & !registers_on_demand(leader)?;
    for component in (0..u64::from(u64::BITS)).filter(|component| missing >> component & 1 == 1) {
        leader.call("arch_prctl", libc::SYS_arch_prctl, [ARCH_REQ_XCOMP_PERM, component, 0, 0, 0, 0])?;
    }
    Ok(())
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
    let mut prctl = |args: &[u64]| {
        let args: Vec<Arg<'_>> = args.iter().map(|arg| (*arg).into()).collect();
        batch.call("prctl", libc::SYS_prctl, &args).map(drop)
    };
    prctl(&[libc::PR_SET_TIMERSLACK as u64, wanted.timer_slack_ns])?;
    if wanted.time_stamps != PR_TSC_ENABLE {
        prctl(&[libc::PR_SET_TSC as u64, wanted.time_stamps as u64])?;
    }
    if wanted.machine_checks != PR_MCE_KILL_DEFAULT {
        prctl(&[libc::PR_MCE_KILL as u64, PR_MCE_KILL_SET, wanted.machine_checks])?;
    }
    wanted.speculation.iter().try_for_each(|&(kind, how)| prctl(&[PR_SET_SPECULATION_CTRL, kind, how]))
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
