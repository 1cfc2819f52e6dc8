//! What an agent that was killed has left in a running program, apart from a thread on its way back: a userfaultfd that was not
//! taken out yet, a scratch mapping, and the end of a socket. None does anything there, but nobody else would remove them.
//!
//! What was write-protected for an agent that is gone is so no more: the kernel has closed its userfaultfd.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::sys::socket::{UnixAddr, bind};

use super::{
    TraceeError,
    layout::{self, Mapping},
    lifeline,
    remote::Remote,
    stopped::StoppedProcess,
};
use crate::sys::{
    mem::{self, PAGE_SIZE, RemoteAddr},
    socket, uffd,
};

/// A scratch mapping: a page for what calls point to, and a thread's frame.
pub(super) const SCRATCH_BYTES: u64 = PAGE_SIZE + lifeline::AREA_BYTES;
/// Where scratch mappings lie: at a multiple of this, below what programs map. So none is merged with a neighbour.
const STEP: u64 = 0x1_0000;
/// How many such places there are.
const PLACES: u64 = 60;
/// What a scratch mapping ends with.
const MARK: [u8; 16] = *b"rswap scratch\x00\x00\x01";
/// What the names of sockets begin with, in the abstract namespace (unix(7)).
const SOCKET: &str = "rswap-hand-";
/// A program that has just made a userfaultfd for itself will have set it up by then.
const PATIENCE: Duration = Duration::from_millis(50);

/// Places for a scratch mapping where a process with these mappings has nothing.
pub(super) fn places_for_scratch(mappings: &[Mapping]) -> Vec<u64> {
    let low: Vec<&Mapping> = mappings.iter().filter(|mapping| mapping.start < (PLACES + 1) * STEP).collect();
    let free = |at: &u64| !low.iter().any(|mapping| mapping.start < at + STEP && *at < mapping.end);
    (1..=PLACES).map(|number| number * STEP).filter(free).collect()
}

/// Marks the scratch mapping at `at` as ours.
pub(super) fn mark_scratch(pid: i32, at: u64) -> Result<(), TraceeError> {
    mem::write(pid, mark_of(at), &MARK).map_err(TraceeError::call("marking the scratch mapping", pid))
}

fn mark_of(at: u64) -> RemoteAddr {
    RemoteAddr(at + SCRATCH_BYTES - MARK.len() as u64)
}

/// Waits until no thread of process `pid`, which runs, is on its way back from a call that a killed agent has had it make. A thread that has lost
/// its tracer makes that call when it gets a processor, which may be later than whoever looks for what the call leaves.
pub fn wait_until_back(pid: i32) -> Result<(), TraceeError> {
    let mappings = layout::read_mappings(pid)?;
    if scratch_of(pid, &mappings).is_empty() && !lifeline::lies_in_stack(pid, &mappings) {
        return Ok(());
    }
    // It is stopped behind that.
    StoppedProcess::stop(pid).map(drop)
}

/// Removes what a killed agent has left in process `pid`, which runs.
pub fn remove(pid: i32) -> Result<(), TraceeError> {
    wait_until_back(pid)?;
    let before = userfaultfds(pid);
    if before.is_empty() && scratch_mappings(pid)?.is_empty() && sockets(pid).is_empty() {
        return Ok(());
    }
    std::thread::sleep(PATIENCE);
    let stopped = StoppedProcess::stop(pid)?;
    let mut remote = Remote::of_program(&stopped)?;
    for fd in userfaultfds(pid).into_iter().filter(|fd| before.contains(fd)) {
        tracing::warn!(pid, fd, "closing a userfaultfd that an earlier agent has left");
        remote.call("close", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0])?;
    }
    for fd in sockets(pid) {
        tracing::warn!(pid, fd, "closing a socket that an earlier agent has left");
        remote.call("close", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0])?;
    }
    for mapping in scratch_mappings(pid)? {
        tracing::warn!(pid, at = mapping.start, "removing a scratch mapping that an earlier agent has left");
        remote.call("munmap", libc::SYS_munmap, [mapping.start, mapping.len(), 0, 0, 0, 0])?;
    }
    Ok(())
}

/// Names a socket of ours in a program, by which it is found if we are killed. Names are one for each network namespace.
pub(super) fn name_socket(socket: &OwnedFd) -> io::Result<()> {
    let cookie = socket::option_bytes(socket, libc::SOL_SOCKET, libc::SO_COOKIE, 8)?;
    let cookie = cookie.first_chunk().map_or(0, |cookie| u64::from_ne_bytes(*cookie));
    let name = UnixAddr::new_abstract(format!("{SOCKET}{cookie:x}").as_bytes())?;
    Ok(bind(socket.as_raw_fd(), &name)?)
}

/// Descriptors of `pid` that are such sockets.
fn sockets(pid: i32) -> Vec<RawFd> {
    let listed = fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    // The last two words of a line are the inode and the name, in which '@' begins an abstract one.
    let inode = |line: &str| {
        let (before, _) = line.split_once(&format!(" @{SOCKET}"))?;
        Some(format!("socket:[{}]", before.split_whitespace().last()?))
    };
    let ours: Vec<String> = listed.lines().filter_map(inode).collect();
    if ours.is_empty() {
        return Vec::new();
    }
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let is_ours = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|to| ours.iter().any(|ours| to.as_os_str() == ours.as_str()))
    };
    let numbers = entries.filter(is_ours).filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.collect()
}

fn scratch_mappings(pid: i32) -> Result<Vec<Mapping>, TraceeError> {
    Ok(scratch_of(pid, &layout::read_mappings(pid)?))
}

fn scratch_of(pid: i32, mappings: &[Mapping]) -> Vec<Mapping> {
    let is_scratch = |mapping: &&Mapping| {
        let Mapping { start, protection, shared, inode, name, .. } = mapping;
        let place = start % STEP == 0 && start / STEP <= PLACES && mapping.len() == SCRATCH_BYTES;
        let kind =
            *protection == libc::PROT_READ | libc::PROT_WRITE && !shared && *inode == 0 && name.is_empty();
        place && kind && is_marked(pid, *start)
    };
    mappings.iter().filter(is_scratch).cloned().collect()
}

/// Whether it ends with our mark, or is empty: there was no time for the mark.
fn is_marked(pid: i32, at: u64) -> bool {
    let mut bytes = vec![0; SCRATCH_BYTES as usize];
    let read = mem::read_exact(pid, RemoteAddr(at), &mut bytes).is_ok();
    read && (bytes.ends_with(&MARK) || bytes.iter().all(|byte| *byte == 0))
}

/// Descriptors of `pid` that are userfaultfds which nobody has set up, with the flags of ours: the agent sets one up when it has
/// taken it out.
fn userfaultfds(pid: i32) -> Vec<RawFd> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let of_kind = entries.filter(|entry| {
        fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[userfaultfd]")
    });
    let numbers = of_kind.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|fd| is_fresh(pid, *fd)).collect()
}

fn is_fresh(pid: i32, fd: RawFd) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")) else { return false };
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let flags = u64::from_str_radix(value("flags:"), 8).unwrap_or(0);
    let ours = uffd::OPEN_FLAGS & (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    // The interface's number, the features that were agreed upon, what it can do.
    flags & ours == ours && value("API:").split(':').nth(1) == Some("0")
}
