//! eBPF programs that the kernel calls for each of its things of a kind, whenever it is asked to (its iterators).

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

// Of `enum bpf_cmd` and `enum bpf_attach_type` (include/uapi/linux/bpf.h).
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_TRACE_ITER: u32 = 28;

/// `bpf_attr.link_create`, as far as iterators use it.
#[repr(C)]
struct LinkCreate {
    prog_fd: i32,
    target_fd: i32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    padding: u32,
}

/// `bpf_attr.iter_create`.
#[repr(C)]
struct IterCreate {
    link_fd: i32,
    flags: u32,
}

/// `union bpf_iter_link_info.task`, as far as it is used.
#[repr(C)]
struct OfProcess {
    tid: u32,
    pid: u32,
}

/// A program at an iterator.
#[derive(Debug)]
pub struct Walk {
    link: OwnedFd,
}

impl Walk {
    /// Puts a program that is loaded for an iterator over what processes have at one process; before Linux 6.1 at all of them, which is `true` then.
    ///
    /// # Errors
    /// Those of bpf(2), `BPF_LINK_CREATE`.
    pub fn over_process(program: BorrowedFd<'_>, pid: i32) -> io::Result<(Self, bool)> {
        match Self::with(program, Some(&OfProcess { tid: 0, pid: pid as u32 })) {
            // It knows of no processes.
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => {
                Ok((Self::with::<()>(program, None)?, true))
            }
            linked => Ok((linked?, false)),
        }
    }

    fn with<T>(program: BorrowedFd<'_>, over: Option<&T>) -> io::Result<Self> {
        let attributes = LinkCreate {
            prog_fd: program.as_raw_fd(),
            target_fd: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
            iter_info: over.map_or(0, |over| std::ptr::from_ref(over) as u64),
            iter_info_len: over.map_or(0, |_| size_of::<T>() as u32),
            padding: 0,
        };
        // SAFETY: the attributes are those of this command, and what they point to outlives the call.
        Ok(Self { link: unsafe { bpf(BPF_LINK_CREATE, &attributes) }? })
    }

    /// Has the program called for each of them.
    ///
    /// # Errors
    /// Those of bpf(2), `BPF_ITER_CREATE`, and of the walk itself. Some may have been walked over then.
    pub fn run(&self) -> io::Result<()> {
        let attributes = IterCreate { link_fd: self.link.as_fd().as_raw_fd(), flags: 0 };
        // SAFETY: the attributes are those of this command.
        let mut walk = File::from(unsafe { bpf(BPF_ITER_CREATE, &attributes) }?);
        // What the program would write; after a million the kernel takes a breath (bpf_seq_read).
        let mut written = [0; 64];
        loop {
            match walk.read(&mut written) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// bpf(2), of a command that answers a file descriptor.
///
/// # Safety
/// `T` is the command's part of `union bpf_attr`, whose addresses are valid.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let attributes: *const T = attributes;
    // SAFETY: by the caller's promise; the kernel reads no more than it is told.
    let fd = super::check(unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) })?;
    // SAFETY: the kernel has just made it, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
