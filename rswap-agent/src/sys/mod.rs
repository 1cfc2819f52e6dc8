//! All unsafe code and raw system calls: one choke point, so that the other rooms stay safe Rust.
//!
//! Nothing here decides anything. A wrapper checks lengths, turns errno into [`std::io::Error`] and
//! says why its unsafe block is sound; policy lives with the callers.

pub mod bpf_iter;
pub mod bpf_mmap;
pub mod capability;
pub mod clock;
pub mod cpuid;
pub mod datagram;
pub mod file;
pub mod filter;
pub mod handle;
pub mod heap;
pub mod lock;
pub mod mem;
pub mod mempolicy;
pub mod namespace;
pub mod neighbour;
pub mod netlink;
pub mod packet;
pub mod pagemap;
pub mod priority;
pub mod process;
pub mod ptrace;
pub mod reclaim;
pub mod shared_word;
pub mod socket;
pub mod spawn;
pub mod sysv;
pub mod tcp;
pub mod timer;
pub mod tty;
pub mod uffd;
pub mod xsave;

use std::io;

/// Turns a C return value into a result, with errno as the error.
pub(crate) fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}
