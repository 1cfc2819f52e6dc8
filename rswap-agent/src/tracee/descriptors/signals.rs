//! Whom a descriptor sends signals, and which (fcntl(2), `F_SETOWN_EX` and `F_SETSIG`).

use std::{collections::BTreeMap, os::fd::OwnedFd};

use serde::{Deserialize, Serialize};

use super::super::{TraceeError, capture::Status, stopped::list_threads};
use crate::sys::lock;

const F_OWNER_TID: i32 = 0;
const F_OWNER_PGRP: i32 = 2;

/// Whom a descriptor sends signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalTarget {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// The thread's, process's or group's id in the instance's namespace; 0 for nobody.
    pub id: i32,
    /// Which signal; 0 for SIGIO without details.
    pub signal: i32,
}

/// Whom the descriptor behind our duplicate sends signals; `None` when nothing of it was ever set.
pub(super) fn describe(ours: &OwnedFd, pid: i32) -> Result<Option<SignalTarget>, TraceeError> {
    let (kind, outer) = lock::owner(ours).map_err(TraceeError::call("F_GETOWN_EX", pid))?;
    let signal = lock::signal(ours).map_err(TraceeError::call("F_GETSIG", pid))?;
    // One that has ended gets no signals.
    let status = if outer == 0 { None } else { Status::read(outer).ok() };
    let name = if kind == F_OWNER_PGRP { "NSpgid:" } else { "NSpid:" };
    let id = status.and_then(|status| status.last_number(name)).unwrap_or(0);
    Ok((id != 0 || signal != 0).then_some(SignalTarget { kind, id, signal }))
}

/// Sets it, when all processes and threads are there. `stubs`: the pids that the agent sees, by those inside.
pub(super) fn set(
    ours: &OwnedFd,
    target: SignalTarget,
    stubs: &BTreeMap<i32, i32>,
) -> Result<(), TraceeError> {
    let SignalTarget { kind, id, signal } = target;
    let outer = match kind {
        _ if id == 0 => None,
        F_OWNER_TID => thread(id, stubs)?,
        // A group has its leader's number; one whose leader has ended is refused with its processes.
        _ => stubs.get(&id).copied(),
    };
    if let Some(outer) = outer {
        lock::set_owner(ours, (kind, outer)).map_err(TraceeError::call("F_SETOWN_EX", outer))?;
    }
    lock::set_signal(ours, signal).map_err(TraceeError::call("F_SETSIG", outer.unwrap_or(0)))
}

/// The thread with id `inner` in the instance's namespace, as the agent sees it.
fn thread(inner: i32, stubs: &BTreeMap<i32, i32>) -> Result<Option<i32>, TraceeError> {
    for &pid in stubs.values() {
        for tid in list_threads(pid)? {
            let status = super::super::read_proc(&format!("/proc/{pid}/task/{tid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
            if line.split_whitespace().last().and_then(|word| word.parse().ok()) == Some(inner) {
                return Ok(Some(tid));
            }
        }
    }
    Ok(None)
}
