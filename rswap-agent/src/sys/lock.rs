//! File locks (flock(2), fcntl(2)) and the signals of descriptors, through duplicates.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// Who gets a descriptor's signals (`struct f_owner_ex`): `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`, and its id as this
/// process sees it; an id of 0 for nobody.
pub type Owner = (i32, i32);

/// Tries to set the lock of an open file description (`F_OFD_SETLK`) on the bytes from `start` on; a `len` of 0 reaches to the
/// end, wherever that will be. `None` unlocks.
///
/// # Errors
/// `EAGAIN` when somebody else's lock is in the way.
pub fn set_description_lock(
    descriptor: &OwnedFd,
    exclusive: Option<bool>,
    start: i64,
    len: i64,
) -> io::Result<()> {
    // SAFETY: the struct is plain numbers, for which all zeros is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind(exclusive);
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start;
    lock.l_len = len;
    // SAFETY: the kernel reads the struct, which outlives the call.
    super::check(unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }.into())
        .map(|_| ())
}

/// Tries to set (or, with `None`, gives up) the flock(2) of a description.
///
/// # Errors
/// `EWOULDBLOCK` when somebody else's lock is in the way.
pub fn flock(descriptor: &OwnedFd, exclusive: Option<bool>) -> io::Result<()> {
    let operation = match exclusive {
        None => libc::LOCK_UN,
        Some(false) => libc::LOCK_SH | libc::LOCK_NB,
        Some(true) => libc::LOCK_EX | libc::LOCK_NB,
    };
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::flock(descriptor.as_raw_fd(), operation) }.into()).map(|_| ())
}

/// `l_type` of `struct flock`.
pub fn kind(exclusive: Option<bool>) -> i16 {
    (match exclusive {
        None => libc::F_UNLCK,
        Some(false) => libc::F_RDLCK,
        Some(true) => libc::F_WRLCK,
    }) as i16
}

/// Commands of fcntl(2) that the libc crate does not name (include/uapi/asm-generic/fcntl.h).
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

/// Who gets a descriptor's signals.
pub fn owner(descriptor: &OwnedFd) -> io::Result<Owner> {
    let mut owner = [0_i32; 2];
    // SAFETY: the kernel writes a `struct f_owner_ex`, two ints, to the array.
    super::check(unsafe { libc::fcntl(descriptor.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) }.into())?;
    Ok((owner[0], owner[1]))
}

/// Sets who gets a descriptor's signals.
pub fn set_owner(descriptor: &OwnedFd, owner: Owner) -> io::Result<()> {
    let owner = [owner.0, owner.1];
    // SAFETY: the kernel reads a `struct f_owner_ex`, two ints, from the array.
    super::check(unsafe { libc::fcntl(descriptor.as_raw_fd(), F_SETOWN_EX, owner.as_ptr()) }.into())
        .map(|_| ())
}

/// Which signal a descriptor sends; 0 for the default, SIGIO without details.
pub fn signal(descriptor: &OwnedFd) -> io::Result<i32> {
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::fcntl(descriptor.as_raw_fd(), F_GETSIG) }.into()).map(|signal| signal as i32)
}

/// Sets which signal a descriptor sends.
pub fn set_signal(descriptor: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::fcntl(descriptor.as_raw_fd(), F_SETSIG, signal) }.into()).map(|_| ())
}
