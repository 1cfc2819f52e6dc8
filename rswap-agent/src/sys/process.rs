//! Processes seen from outside: pidfds, their descriptors, comparisons, limits, signals.

use std::{
    cmp::Ordering,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// A pidfd of process `pid`, or of a thread that isn't the first of its process (since Linux 6.9).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    /// `PIDFD_THREAD` (include/uapi/linux/pidfd.h).
    const THREAD: i32 = libc::O_EXCL;
    // SAFETY: a plain system call without pointers; a non-negative result is a descriptor that is ours.
    let open = |flags: i32| super::check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) });
    let fd = match open(0) {
        // Older kernels know the first of these two.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => open(THREAD),
        fd => fd,
    }?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Starts `command`, which inherits the descriptors `keep` by their numbers.
pub fn spawn_with_descriptors(
    command: &mut std::process::Command,
    keep: Vec<RawFd>,
) -> io::Result<std::process::Child> {
    use std::os::unix::process::CommandExt;
    let inherit = move || {
        for fd in &keep {
            // SAFETY: a plain system call without pointers.
            super::check(unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) }.into())?;
        }
        Ok(())
    };
    // SAFETY: between fork and execve the closure makes system calls only: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(inherit) };
    command.spawn()
}

/// A duplicate, here, of descriptor `fd` of the process behind `pidfd`.
pub fn pidfd_getfd(pidfd: &OwnedFd, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call without pointers; a non-negative result is a descriptor that is ours.
    let fd = super::check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends `signal` to the process behind `pidfd`; a process that is gone is not an error.
pub fn pidfd_send_signal(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: no safe wrapper; a null siginfo makes the kernel fill it in as kill(2) does.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, no_info, 0) };
    match super::check(sent) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
        _ => Ok(()),
    }
}

/// Takes over a descriptor that the kernel has just made for us.
pub fn adopt_descriptor(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller got the number from the kernel a moment ago (SCM_RIGHTS), and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Whether descriptors `a` and `b` of process `pid` share one open file description.
pub fn same_description(pid: i32, a: RawFd, b: RawFd) -> io::Result<bool> {
    same_description_of(pid, a, pid, b)
}

/// Whether descriptor `a` of process `pid` and `b` of process `other` are one open file description.
pub fn same_description_of(pid: i32, a: RawFd, other: i32, b: RawFd) -> io::Result<bool> {
    const KCMP_FILE: i32 = 0;
    kcmp(pid, other, KCMP_FILE, a, b)
}

/// Whether descriptor `fd` of process `pid` is what its epoll `epoll` watches under `number`; of several under one number, the
/// one with `before` others before it.
pub fn is_watched_by(pid: i32, fd: RawFd, epoll: RawFd, number: RawFd, before: u32) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    // `struct kcmp_epoll_slot`.
    let slot = [epoll as u32, number as u32, before];
    // SAFETY: no safe wrapper; for this type the kernel reads a slot, three numbers, at the last argument.
    let order =
        super::check(unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, fd, slot.as_ptr()) })?;
    Ok(order == 0)
}

/// What processes can have in common besides memory and descriptors that are shared one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Common {
    /// The whole address space (`KCMP_VM`).
    Memory = 1,
    /// The table of descriptors (`KCMP_FILES`).
    Descriptors = 2,
    /// Root, working directory and umask (`KCMP_FS`).
    Directories = 3,
    /// What semaphore operations are undone at the end (`KCMP_SYSVSEM`); processes that have none have that in common.
    SemaphoreUndo = 6,
}

/// Whether two processes or threads have this in common.
pub fn has_in_common(pid: i32, other: i32, what: Common) -> io::Result<bool> {
    kcmp(pid, other, what as i32, 0, 0)
}

/// In which order the kernel has this of two processes or threads: equal, if they have it in common.
pub fn compare(pid: i32, other: i32, what: Common) -> io::Result<Ordering> {
    // SAFETY: a plain system call without pointers.
    let order = super::check(unsafe { libc::syscall(libc::SYS_kcmp, pid, other, what as i32, 0, 0) })?;
    Ok(match order {
        0 => Ordering::Equal,
        1 => Ordering::Less,
        _ => Ordering::Greater,
    })
}

fn kcmp(pid: i32, other: i32, what: i32, a: i32, b: i32) -> io::Result<bool> {
    // SAFETY: a plain system call without pointers.
    let order = super::check(unsafe { libc::syscall(libc::SYS_kcmp, pid, other, what, a, b) })?;
    Ok(order == 0)
}

/// Queues `info` (a whole `siginfo_t`) to thread `tid`, or to its process as a whole.
pub fn queue_signal(pid: i32, tid: Option<i32>, info: &[u8; 128]) -> io::Result<()> {
    let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
    // SAFETY: no safe wrapper takes a ready siginfo. `info` is as large as the kernel's siginfo_t.
    let sent = unsafe {
        match tid {
            Some(tid) => libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, info.as_ptr()),
            None => libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info.as_ptr()),
        }
    };
    super::check(sent).map(|_| ())
}

/// Head and length of a thread's robust futex list.
pub fn robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0_u64, 0_u64);
    // SAFETY: the kernel writes one pointer-sized number to each of the two locals.
    super::check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &mut head, &mut len) })?;
    Ok((head, len))
}

/// Scheduling of a thread as `sched_getattr(2)` tells it (`struct sched_attr`, first version).
pub type SchedAttr = [u8; 48];

/// Reads the scheduling of thread `tid`.
pub fn sched_getattr(tid: i32) -> io::Result<SchedAttr> {
    let mut attr = [0_u8; 48];
    // SAFETY: the kernel writes at most the size that is passed, which is the buffer's.
    super::check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, attr.as_mut_ptr(), attr.len(), 0) })?;
    Ok(attr)
}

/// Sets the scheduling of thread `tid`.
pub fn sched_setattr(tid: i32, attr: &SchedAttr) -> io::Result<()> {
    let mut attr = *attr;
    // What it says of its own size may come from another host.
    attr[..4].copy_from_slice(&(size_of::<SchedAttr>() as u32).to_ne_bytes());
    // SAFETY: the kernel only reads the struct, whose first field is its size.
    super::check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid, attr.as_ptr(), 0) }).map(|_| ())
}

/// `IOPRIO_WHO_PROCESS`.
const ONE_THREAD: i32 = 1;

/// The I/O priority of thread `tid` (ioprio_get(2)).
pub fn io_priority(tid: i32) -> io::Result<i32> {
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::syscall(libc::SYS_ioprio_get, ONE_THREAD, tid) }).map(|value| value as i32)
}

/// Sets the I/O priority of thread `tid`.
pub fn set_io_priority(tid: i32, value: i32) -> io::Result<()> {
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::syscall(libc::SYS_ioprio_set, ONE_THREAD, tid, value) }).map(|_| ())
}
