//! process_madvise(2) (Linux 5.10): advice about the memory of a process that goes on running.

use std::{io, ops::Range, os::fd::AsRawFd, os::fd::OwnedFd};

/// What a call takes at most (`UIO_MAXIOV`, include/uapi/linux/uio.h).
const RANGES: usize = 1024;
/// include/uapi/asm-generic/mman-common.h
const MADV_COLLAPSE: i32 = 25;

/// Has the kernel write the pages of `ranges` to swap and free them, whether they were used of late or not, and answers
/// how many bytes it has looked at, counted from the first range on. Pages that several processes map, that are pinned, or
/// that swap has no room for stay where they are.
///
/// # Errors
/// Of the first range that was not looked at, when it is the first of all: `EINVAL` for one that is locked, of huge pages
/// that were set aside, or a device's; `ENOMEM` for one that is not mapped; `ESRCH` when the process has ended.
pub fn page_out(process: &OwnedFd, ranges: &[Range<u64>]) -> io::Result<u64> {
    let vector: Vec<_> = ranges
        .iter()
        .take(RANGES)
        .map(|range| libc::iovec {
            iov_base: range.start as *mut libc::c_void,
            iov_len: (range.end - range.start) as usize,
        })
        .collect();
    // SAFETY: the call has no safe wrapper. `vector` outlives it and is only read; its addresses are the other process's, and
    // the kernel checks them against that. The advice changes where pages are, never what they hold.
    let advised = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_raw_fd(),
            vector.as_ptr(),
            vector.len(),
            libc::MADV_PAGEOUT,
            0,
        )
    };
    super::check(advised).map(|bytes| bytes as u64)
}

/// Puts the pages of `range`, which is as long and as aligned as a huge page, together to one, whatever is in swap of them (Linux 6.1). The
/// process waits for that if it uses them meanwhile.
///
/// # Errors
/// `EINVAL` where it can't be one, `EAGAIN` and `ENOMEM` where it could not now; `ESRCH` when the process has ended.
pub fn collapse(process: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let length = (range.end - range.start) as usize;
    let vector = libc::iovec { iov_base: range.start as *mut libc::c_void, iov_len: length };
    // SAFETY: the call has no safe wrapper. `vector` outlives it and is only read; its addresses are the other process's, and
    // the kernel checks them against that. The advice changes how pages are mapped, never what they hold.
    let advised = unsafe {
        libc::syscall(libc::SYS_process_madvise, process.as_raw_fd(), &vector, 1, MADV_COLLAPSE, 0)
    };
    super::check(advised).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{mem::PAGE_SIZE, process::pidfd_open};

    #[test]
    fn what_is_not_mapped_is_told_by_name() {
        let own = pidfd_open(std::process::id() as i32).expect("a pidfd of this process");
        let nowhere = PAGE_SIZE..2 * PAGE_SIZE;
        let error = page_out(&own, std::slice::from_ref(&nowhere)).expect_err("page 1 is never mapped");
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{error}");
    }
}
