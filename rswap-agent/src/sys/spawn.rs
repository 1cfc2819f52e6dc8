//! Processes in new namespaces, and processes with a chosen pid.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `struct clone_args` of clone3(2), up to Linux 5.7 (`cgroup`).
#[repr(C)]
#[derive(Debug, Default)]
pub struct CloneArgs {
    /// `CLONE_*`.
    pub flags: u64,
    /// Where the pidfd goes.
    pub pidfd: u64,
    /// Where the child's tid goes in the child.
    pub child_tid: u64,
    /// Where the child's tid goes in the parent.
    pub parent_tid: u64,
    /// Signal to the parent when the child ends.
    pub exit_signal: u64,
    /// Lowest byte of the child's stack.
    pub stack: u64,
    /// Its size, in bytes.
    pub stack_size: u64,
    /// Thread-local storage.
    pub tls: u64,
    /// Pids to be given, one per PID namespace from the innermost outwards.
    pub set_tid: u64,
    /// How many.
    pub set_tid_size: u64,
    /// Descriptor of the cgroup v2 to be born in.
    pub cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88);

impl CloneArgs {
    /// The kernel's bytes, for a call made in another process.
    pub fn to_bytes(&self) -> [u8; 88] {
        let words = [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ];
        let mut bytes = [0; 88];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// Forks into the new namespaces `flags` (`CLONE_NEW*`) and the cgroup behind `cgroup`, and executes
/// `program` with `arguments` (the first is its name). Returns the child's pid.
///
/// The child inherits every descriptor that isn't close-on-exec, and those in `keep` besides.
pub fn spawn_in_namespaces(
    flags: i32,
    cgroup: BorrowedFd<'_>,
    program: &CString,
    arguments: &[CString],
    keep: &[BorrowedFd<'_>],
) -> io::Result<i32> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let args = CloneArgs {
        flags: flags as u64 | CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    let mut argv: Vec<*const libc::c_char> = arguments.iter().map(|a| a.as_ptr()).collect();
    argv.push(std::ptr::null());
    let keep: Vec<i32> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: clone3 without CLONE_VM is a fork. This process may have other threads, so the child calls
    // nothing but async-signal-safe functions, on memory that was prepared before, until it executes.
    unsafe {
        let pid = super::check(libc::syscall(libc::SYS_clone3, &args, size_of::<CloneArgs>()))?;
        if pid > 0 {
            return Ok(pid as i32);
        }
        for fd in &keep {
            libc::fcntl(*fd, libc::F_SETFD, 0);
        }
        libc::execv(program.as_ptr(), argv.as_ptr());
        libc::_exit(127);
    }
}

/// What [`fork`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// In the parent: the child's pid.
    Parent(i32),
    /// In the child.
    Child,
}

/// Forks a process that has one thread only; `pid` asks for that pid in the innermost PID namespace.
///
/// # Errors
/// `EEXIST` when the pid is taken, `EPERM` without the right to choose one.
pub fn fork(pid: Option<i32>) -> io::Result<Forked> {
    let wanted = pid.unwrap_or_default();
    let mut args = CloneArgs { exit_signal: libc::SIGCHLD as u64, ..CloneArgs::default() };
    if pid.is_some() {
        args.set_tid = &raw const wanted as u64;
        args.set_tid_size = 1;
    }
    // SAFETY: clone3 without CLONE_VM is a fork; the callers have a single thread, so the child's copy of
    // the memory is in a consistent state.
    match super::check(unsafe { libc::syscall(libc::SYS_clone3, &args, size_of::<CloneArgs>()) })? {
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as i32)),
    }
}

/// Waits for ever, for a tracer to take over.
pub fn pause_for_ever() -> ! {
    loop {
        // SAFETY: a plain system call without pointers.
        unsafe { libc::pause() };
    }
}

/// Sets the disposition of `signal` to the default or to ignoring it.
pub fn set_handler(
    signal: nix::sys::signal::Signal,
    handler: nix::sys::signal::SigHandler,
) -> nix::Result<()> {
    use nix::sys::signal::SigHandler;
    debug_assert!(matches!(handler, SigHandler::SigDfl | SigHandler::SigIgn));
    // SAFETY: no code of ours runs as a handler, so nothing can be called at a bad moment.
    unsafe { nix::sys::signal::signal(signal, handler) }.map(|_| ())
}

/// Closes every descriptor from `first` on. For a process that owns none of them as an object.
pub fn close_from(first: u32) {
    // SAFETY: a plain system call without pointers; the caller has no object left that owns one of them.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// Duplicates descriptor `from` as number `to`, which is closed first if it is open; it isn't close-on-exec. For a process
/// that owns neither as an object.
pub fn duplicate_as(from: std::os::fd::RawFd, to: std::os::fd::RawFd) -> io::Result<()> {
    // SAFETY: a plain system call without pointers; the caller has no object that owns `to`.
    super::check(unsafe { libc::dup2(from, to) }.into()).map(|_| ())
}

/// Takes over a descriptor that the parent process handed down by its number.
pub fn inherited_descriptor(fd: std::os::fd::RawFd) -> std::os::fd::OwnedFd {
    // SAFETY: the number is on the command line that the parent made, which keeps the descriptor open for
    // this process alone; nothing else in it uses it.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}
