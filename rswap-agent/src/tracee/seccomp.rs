//! Seccomp: strict mode, and filters (seccomp(2)).
//!
//! A filter would forbid the calls that are made in its process for us, and so the kernel is asked to look away as long as a
//! process is traced (`PTRACE_O_SUSPEND_SECCOMP`). At the destination the filters are installed by the processes
//! themselves, before they give up what that takes.

use serde::{Deserialize, Serialize};

use super::{TraceeError, capture::Status, remote::Remote};
use crate::sys::{mem, mem::RemoteAddr, ptrace};

const SET_MODE_STRICT: u64 = 0;
const SET_MODE_FILTER: u64 = 1;
/// `SECCOMP_FILTER_FLAG_LOG`.
const FLAG_LOG: u64 = 1 << 1;
/// `SECCOMP_FILTER_FLAG_SPEC_ALLOW`: what the processor may guess is another setting, and stays as it is.
const FLAG_SPEC_ALLOW: u64 = 1 << 2;

/// What a thread is forbidden.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// It may only read, write and end.
    pub strict: bool,
    /// Its filters, the oldest first.
    pub filters: Vec<Filter>,
}

/// One filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// `struct sock_filter`s, of 8 bytes each.
    pub program: Vec<u8>,
    /// What it forbids is logged.
    pub log: bool,
}

/// What stopped thread `tid` is forbidden; `status` is its own.
pub(super) fn capture(tid: i32, status: &Status) -> Result<Seccomp, TraceeError> {
    let mut found = Seccomp::default();
    match status.number("Seccomp:") {
        Some(1) => found.strict = true,
        Some(2) => {
            let failed = |error| TraceeError::call("PTRACE_SECCOMP_GET_FILTER", tid)(error);
            while let Some(program) =
                ptrace::seccomp_filter(tid, found.filters.len() as u64).map_err(failed)?
            {
                let flags = ptrace::seccomp_flags(tid, found.filters.len() as u64).map_err(failed)?;
                found.filters.push(Filter { program, log: flags & FLAG_LOG != 0 });
            }
        }
        _ => {}
    }
    Ok(found)
}

/// Forbids the thread behind `remote` what `wanted` says; what is done for us goes on until it is let go.
pub fn install(remote: &mut Remote, wanted: &Seccomp) -> Result<(), TraceeError> {
    if *wanted == Seccomp::default() {
        return Ok(());
    }
    let tid = remote.tid();
    ptrace::suspend_seccomp(tid).map_err(TraceeError::call("PTRACE_O_SUSPEND_SECCOMP", tid))?;
    if wanted.strict {
        return remote.call("seccomp", libc::SYS_seccomp, [SET_MODE_STRICT, 0, 0, 0, 0, 0]).map(drop);
    }
    for filter in &wanted.filters {
        let len = filter.program.len() as u64;
        // It may be longer than the scratch page.
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let at = remote.call("mmap", libc::SYS_mmap, [0, len, access as u64, flags as u64, !0, 0])?;
        mem::write(tid, RemoteAddr(at), &filter.program)
            .map_err(TraceeError::call("writing a seccomp filter", tid))?;
        // `struct sock_fprog`: how many, and where.
        let program = remote.put(0, &[len / 8, at].map(u64::to_ne_bytes).concat())?;
        let flags = FLAG_SPEC_ALLOW | if filter.log { FLAG_LOG } else { 0 };
        remote.call("seccomp", libc::SYS_seccomp, [SET_MODE_FILTER, flags, program, 0, 0, 0])?;
        remote.call("munmap", libc::SYS_munmap, [at, len, 0, 0, 0, 0])?;
    }
    Ok(())
}
