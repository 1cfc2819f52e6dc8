//! Pipes without names.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{
    super::{TraceeError, image::DescriptorKind},
    Look,
    info::{Info, Kind},
};
use crate::sys::socket;

/// More queued bytes than the largest pipe of an unprivileged user holds are not carried.
pub(super) const LIMIT: usize = 1 << 20;

/// One end of a pipe.
pub(super) fn describe(info: &Info, look: &Look<'_>) -> Result<Kind, TraceeError> {
    let pid = look.pid;
    let pipe = look.ours()?;
    let inode = nix::sys::stat::fstat(&pipe)
        .map_err(|error| TraceeError::call("fstat of a pipe", pid)(error.into()))?
        .st_ino;
    if info.flags & libc::O_DIRECT != 0 {
        let remedy = "the limits of its packets can't be seen: make the pipe without O_DIRECT";
        return Ok(Err(("a pipe in packet mode".into(), remedy)));
    }
    let (capacity, queued) = contents(&pipe, info.flags, look)?;
    Ok(Ok(DescriptorKind::Pipe { inode, queued, capacity }))
}

/// The capacity of a pipe, and at a read end with [`Look::contents`] what is queued in it.
pub(super) fn contents(pipe: &OwnedFd, flags: i32, look: &Look<'_>) -> Result<(i32, Vec<u8>), TraceeError> {
    let pid = look.pid;
    let capacity = nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_GETPIPE_SZ)
        .map_err(|error| TraceeError::call("F_GETPIPE_SZ", pid)(error.into()))?;
    let reads = flags & libc::O_ACCMODE != libc::O_WRONLY;
    let queued = match reads && look.contents {
        true => {
            socket::peek_pipe(pipe, LIMIT).map_err(TraceeError::call("reading a pipe's contents", pid))?
        }
        false => Vec::new(),
    };
    Ok((capacity, queued))
}

/// Fills an empty pipe through its write end, without waiting for room: nobody would make any.
pub(super) fn fill(writer: BorrowedFd<'_>, queued: &[u8]) -> Result<(), TraceeError> {
    use nix::fcntl::{
        FcntlArg::{F_GETFL, F_SETFL},
        OFlag, fcntl,
    };
    let write = || {
        let flags = OFlag::from_bits_retain(fcntl(writer, F_GETFL)?);
        fcntl(writer, F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let written = nix::unistd::write(writer, queued);
        fcntl(writer, F_SETFL(flags))?;
        written
    };
    write()
        .ok()
        .filter(|written| *written == queued.len())
        .map(|_| ())
        .ok_or_else(|| TraceeError::Unsupported("a pipe could not be filled again".into()))
}

/// Read and write end of the pipes made so far, by the source's inode.
#[derive(Default)]
pub(super) struct Pipes(BTreeMap<u64, [OwnedFd; 2]>);

impl Pipes {
    /// The end for a descriptor with these `flags`, with `queued` put into the pipe.
    pub(super) fn end(
        &mut self,
        (inode, capacity): (u64, i32),
        queued: &[u8],
        flags: i32,
        pid: i32,
    ) -> Result<&OwnedFd, TraceeError> {
        let reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
        let ends = match self.0.entry(inode) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(missing) => {
                missing.insert(make(capacity).map_err(TraceeError::call("making a pipe", pid))?)
            }
        };
        if !queued.is_empty() {
            fill(ends[1].as_fd(), queued)?;
        }
        Ok(&ends[usize::from(!reads)])
    }
}

/// Makes a pipe of `capacity` bytes: its read end and its write end.
fn make(capacity: i32) -> std::io::Result<[OwnedFd; 2]> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(capacity))?;
    Ok([reader, writer])
}
