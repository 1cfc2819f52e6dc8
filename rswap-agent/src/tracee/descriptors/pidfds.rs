//! pidfd_open(2).

use std::os::fd::RawFd;

use super::{
    super::{TraceeError, capture::link, image::DescriptorKind, remote::Remote, tree},
    Look,
    info::{Info, Kind},
};
use crate::sys::{
    process,
    ptrace::{self, Stop},
    spawn::CloneArgs,
};

/// `PIDFD_THREAD`.
const FOR_THREAD: i32 = libc::O_EXCL;

/// A pidfd. fdinfo tells the pid in the reader's namespace and, at the end of `NSpid:`, in the process's own; both are -1 when
/// it was collected by its parent.
pub(super) fn describe(info: &Info, look: &Look<'_>) -> Kind {
    let number = |name| {
        let line = info.text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().last().and_then(|word| word.parse::<i32>().ok())
    };
    if info.flags & FOR_THREAD != 0 {
        return Err(("a pidfd of a thread".into(), "not carried in this version"));
    }
    match (number("Pid:"), number("NSpid:")) {
        (Some(-1), _) => Ok(DescriptorKind::Process { pid: None }),
        (Some(outer), Some(inner)) if outer > 0 && is_inside(outer, look.pid) => {
            Ok(DescriptorKind::Process { pid: Some(inner) })
        }
        _ => {
            Err(("a pidfd of a process outside of the instance".into(), "that process stays here: close it"))
        }
    }
}

/// Whether a process is in the PID namespace of another: a zombie is too.
fn is_inside(pid: i32, other: i32) -> bool {
    match (link(pid, "ns/pid"), link(other, "ns/pid")) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// Makes it in the stub.
pub(super) fn make(remote: &mut Remote, pid: Option<i32>) -> Result<RawFd, TraceeError> {
    match pid {
        Some(pid) => {
            Ok(remote.call("pidfd_open", libc::SYS_pidfd_open, [pid as u64, 0, 0, 0, 0, 0])? as RawFd)
        }
        None => make_of_nobody(remote),
    }
}

/// A pidfd of a process that has ended and was collected. It has to be one of the same PID namespace, so the stub has a child
/// for a moment.
fn make_of_nobody(remote: &mut Remote) -> Result<RawFd, TraceeError> {
    const PIDFD_AT: u64 = 96;
    let stub = remote.tid();
    let pidfd = remote.put(PIDFD_AT, &[0; 4])?;
    // Without a signal at its end.
    let args = CloneArgs { flags: libc::CLONE_PIDFD as u64, pidfd, ..CloneArgs::default() };
    let bytes = args.to_bytes();
    let at = remote.put(0, &bytes)?;
    let inner = remote.call("clone3", libc::SYS_clone3, [at, bytes.len() as u64, 0, 0, 0, 0])?;
    let number = i32::from_ne_bytes(remote.get(PIDFD_AT)?);
    let child = tree::child_with(stub, inner as i32)?.ok_or(TraceeError::Gone(stub))?;
    let ours = process::pidfd_open(child).map_err(TraceeError::call("pidfd_open", child))?;
    process::pidfd_send_signal(&ours, libc::SIGKILL).map_err(TraceeError::call("ending", child))?;
    while ptrace::wait_stop(child).map_err(TraceeError::call("waiting for the end", child))? != Stop::Gone {}
    let options = libc::__WALL as u64;
    remote.call("wait4", libc::SYS_wait4, [inner, 0, options, 0, 0, 0])?;
    Ok(number)
}
