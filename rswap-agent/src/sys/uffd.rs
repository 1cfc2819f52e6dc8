//! userfaultfd in asynchronous write-protect mode: the kernel lets every write through and only notes it.
//! Source: Documentation/admin-guide/mm/userfaultfd.rst and include/uapi/linux/userfaultfd.h.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

const fn iowr(number: libc::c_ulong, size: usize) -> libc::c_ulong {
    (3 << 30) | ((size as libc::c_ulong) << 16) | (0xAA << 8) | number
}

const UFFDIO_API: libc::c_ulong = iowr(0x3F, size_of::<Api>());
const UFFDIO_REGISTER: libc::c_ulong = iowr(0x00, size_of::<Register>());
const UFFDIO_WRITEPROTECT: libc::c_ulong = iowr(0x06, size_of::<WriteProtect>());
const _: () = assert!(UFFDIO_API == 0xc018_aa3f);
const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);

/// Without this only a privileged program may make one (`vm.unprivileged_userfaultfd`). It forbids to stop the kernel's own
/// writes for somebody to decide; the asynchronous mode stops none, and notes those as well (`do_wp_page` in mm/memory.c).
const UFFD_USER_MODE_ONLY: u64 = 1;

/// The flags for the `userfaultfd(2)` call that the tracee makes.
pub const OPEN_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | UFFD_USER_MODE_ONLY;

/// Write tracking of one address space; closing it ends the tracking.
#[derive(Debug)]
pub struct WriteTracker(OwnedFd);

impl WriteTracker {
    /// Takes over a fresh userfaultfd of the address space to be tracked.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut api =
            Api { api: UFFD_API, features: UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED, ioctls: 0 };
        // SAFETY: no safe wrapper exists. `api` is the kernel's struct; size and number are asserted above.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api) };
        super::check(done.into())?;
        Ok(Self(fd))
    }

    /// Starts tracking `start..end`, one whole mapping or a part of it, and protects it.
    pub fn track(&self, start: u64, end: u64) -> io::Result<()> {
        self.register(start, end)?;
        let len = end - start;
        let mut protect = WriteProtect { range: Range { start, len }, mode: 1 };
        // SAFETY: as in `register`; protecting only makes the kernel note the next write of each page.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &mut protect) };
        super::check(done.into())?;
        Ok(())
    }

    /// Lets pages of `start..end` be protected, by [`super::pagemap::Pagemap::protect`]: none is yet.
    pub fn register(&self, start: u64, end: u64) -> io::Result<()> {
        let len = end - start;
        let mut register = Register { range: Range { start, len }, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: no safe wrapper exists. `register` is the kernel's struct; the kernel checks the range
        // against the tracked address space.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &mut register) };
        super::check(done.into())?;
        Ok(())
    }
}
