//! System calls made inside a stopped tracee.
//!
//! The tracee's registers are set to the call, its instruction pointer to the `syscall` instruction that
//! every vDSO has, and one step is made. Nothing is written to its code, and its registers and signal
//! mask are put back when the [`Remote`] is dropped. If this process is killed in between, they aren't:
//! keep the time in which a live program is held by a `Remote` short.

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{TraceeError, layout};
use crate::sys::{
    mem::{self, PAGE_SIZE, RemoteAddr},
    process,
    ptrace::{self, Registers, Stop},
};

/// SIGTRAP's bit in a signal mask.
const TRAP: u64 = 1 << (libc::SIGTRAP - 1);

/// The machine code of `syscall`.
const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// How long a call that is to be interrupted is given to begin its wait.
const FIRST_PAUSE: Duration = Duration::from_micros(50);
/// The same, at most, after it had not.
const LAST_PAUSE: Duration = Duration::from_millis(20);

/// A stopped thread that makes system calls for us.
#[derive(Debug)]
pub struct Remote {
    tid: i32,
    saved: Registers,
    saved_mask: u64,
    syscall_at: u64,
    scratch: Option<RemoteAddr>,
    owns_scratch: bool,
    restore_on_drop: bool,
}

impl Remote {
    /// Takes over stopped thread `tid` until it is dropped.
    pub fn new(tid: i32) -> Result<Self, TraceeError> {
        let syscall_at = find_syscall(tid)?;
        Self::take_over(tid, syscall_at)
    }

    /// Takes over another stopped thread of the same process, with the same scratch page.
    pub fn for_thread(&self, tid: i32) -> Result<Self, TraceeError> {
        let mut other = Self::take_over(tid, self.syscall_at)?;
        other.scratch = self.scratch;
        other.restore_on_drop = self.restore_on_drop;
        Ok(other)
    }

    /// Takes over a child that this process was made to have: its memory is a copy.
    pub fn for_process(&self, pid: i32) -> Result<Self, TraceeError> {
        let mut child = Self::take_over(pid, self.syscall_at)?;
        child.restore_on_drop = false;
        Ok(child)
    }

    fn take_over(tid: i32, syscall_at: u64) -> Result<Self, TraceeError> {
        let saved = ptrace::registers(tid).map_err(TraceeError::call("PTRACE_GETREGS", tid))?;
        let saved_mask = ptrace::signal_mask(tid).map_err(TraceeError::call("PTRACE_GETSIGMASK", tid))?;
        // A signal would run a handler of the program's in the middle of our calls. SIGTRAP is ours: the kernel would
        // forget the program's handler if it were blocked (`force_sig_info_to_task` in kernel/signal.c).
        ptrace::set_signal_mask(tid, !TRAP).map_err(TraceeError::call("PTRACE_SETSIGMASK", tid))?;
        let (scratch, owns_scratch) = (None, false);
        Ok(Self { tid, saved, saved_mask, syscall_at, scratch, owns_scratch, restore_on_drop: true })
    }

    /// The registers that the thread had when it was taken over.
    pub fn saved_registers(&self) -> &Registers {
        &self.saved
    }

    /// The signals that the thread blocked when it was taken over.
    pub fn saved_mask(&self) -> u64 {
        self.saved_mask
    }

    /// The thread.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Never puts the registers and the mask back: for a stub, which gets others.
    pub fn keep_changes(&mut self) {
        self.restore_on_drop = false;
    }

    /// The vDSO was moved by `to - from`.
    pub fn vdso_moved(&mut self, from: u64, to: u64) {
        self.syscall_at = self.syscall_at - from + to;
    }

    /// Maps a scratch page for calls that take pointers: at `at`, where nothing may be, or in any gap.
    pub fn map_scratch(&mut self, at: Option<u64>) -> Result<(), TraceeError> {
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let fixed = if at.is_some() { libc::MAP_FIXED_NOREPLACE } else { 0 };
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed) as u64;
        let args = [at.unwrap_or_default(), PAGE_SIZE, protection, flags, !0, 0];
        self.scratch = Some(RemoteAddr(self.call("mmap", libc::SYS_mmap, args)?));
        self.owns_scratch = true;
        Ok(())
    }

    /// Removes the scratch page.
    pub fn unmap_scratch(&mut self) -> Result<(), TraceeError> {
        if let Some(at) = self.scratch.take().filter(|_| self.owns_scratch) {
            self.call("munmap", libc::SYS_munmap, [at.0, PAGE_SIZE, 0, 0, 0, 0])?;
        }
        Ok(())
    }

    /// Where the scratch page is; 0 without one.
    pub fn scratch_at(&self) -> u64 {
        self.scratch.unwrap_or_default().0
    }

    /// Writes `data` to the scratch page, `offset` bytes in, and returns its address.
    pub fn put(&self, offset: u64, data: &[u8]) -> Result<u64, TraceeError> {
        let Some(scratch) = self.scratch else {
            return Err(TraceeError::Unsupported("a call with a pointer needs a scratch page".into()));
        };
        if offset + data.len() as u64 > PAGE_SIZE {
            let text = format!("{} bytes don't fit the scratch page of process {}", data.len(), self.tid);
            return Err(TraceeError::Unsupported(text));
        }
        let at = RemoteAddr(scratch.0 + offset);
        mem::write(self.tid, at, data).map_err(TraceeError::call("writing the scratch page", self.tid))?;
        Ok(at.0)
    }

    /// Reads back `N` bytes of the scratch page.
    pub fn get<const N: usize>(&self, offset: u64) -> Result<[u8; N], TraceeError> {
        let mut data = [0; N];
        let at = RemoteAddr(self.scratch.unwrap_or_default().0 + offset);
        mem::read_exact(self.tid, at, &mut data)
            .map_err(TraceeError::call("reading the scratch page", self.tid))?;
        Ok(data)
    }

    /// Makes the call `number`, named `name` in errors.
    pub fn call(
        &mut self,
        name: &'static str,
        number: libc::c_long,
        args: [u64; 6],
    ) -> Result<u64, TraceeError> {
        let value = self.raw_call(number, args)?;
        if (-4095..0).contains(&value) {
            let source = io::Error::from_raw_os_error(-value as i32);
            return Err(TraceeError::Remote { call: name, pid: self.tid, source });
        }
        Ok(value as u64)
    }

    fn raw_call(&mut self, number: libc::c_long, args: [u64; 6]) -> Result<i64, TraceeError> {
        self.set_call(number, args)?;
        let mut stop_arrived = false;
        loop {
            ptrace::single_step(self.tid).map_err(TraceeError::call("PTRACE_SINGLESTEP", self.tid))?;
            match ptrace::wait_stop(self.tid).map_err(TraceeError::call("waiting for a step", self.tid))? {
                Stop::Signal(libc::SIGTRAP) => break,
                Stop::Gone => return Err(TraceeError::Gone(self.tid)),
                // The stop of a new thread, or of an interrupt that came late: the step is still to be made.
                Stop::Event | Stop::Group(_) | Stop::Other => {}
                // Nobody can block it. It waits until the thread goes on.
                Stop::Signal(libc::SIGSTOP) => stop_arrived = true,
                Stop::Signal(signal) => {
                    let text = format!("process {} got signal {signal} in a call made for us", self.tid);
                    return Err(TraceeError::Unsupported(text));
                }
            }
        }
        if stop_arrived {
            kill(Pid::from_raw(self.tid), Signal::SIGSTOP)
                .map_err(|error| TraceeError::call("keeping SIGSTOP", self.tid)(error.into()))?;
        }
        let after = ptrace::registers(self.tid).map_err(TraceeError::call("PTRACE_GETREGS", self.tid))?;
        Ok(after.rax as i64)
    }

    /// Makes the thread ready for a call, which it makes with its next step.
    pub(super) fn set_call(&self, number: libc::c_long, args: [u64; 6]) -> Result<(), TraceeError> {
        let mut registers = self.saved;
        registers.rip = self.syscall_at;
        registers.rax = number as u64;
        // Else the kernel would take an interrupted call's registers for one to be restarted.
        registers.orig_rax = !0;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = args;
        ptrace::set_registers(self.tid, &registers).map_err(TraceeError::call("PTRACE_SETREGS", self.tid))
    }

    /// Makes a call that waits, and interrupts it in its wait. Returns its result: in it the kernel says how it would go
    /// on, or that the call did not wait.
    pub fn interrupted_call(&mut self, number: libc::c_long, args: [u64; 6]) -> Result<i64, TraceeError> {
        let tid = self.tid;
        let mut pause = FIRST_PAUSE;
        loop {
            self.set_call(number, args)?;
            ptrace::single_step(tid).map_err(TraceeError::call("PTRACE_SINGLESTEP", tid))?;
            std::thread::sleep(pause);
            ptrace::interrupt(tid).map_err(TraceeError::call("PTRACE_INTERRUPT", tid))?;
            loop {
                let stop = ptrace::wait_stop(tid).map_err(TraceeError::call("interrupting a call", tid))?;
                let registers = ptrace::registers(tid).map_err(TraceeError::call("PTRACE_GETREGS", tid))?;
                match stop {
                    Stop::Signal(libc::SIGTRAP) => return Ok(registers.rax as i64),
                    Stop::Gone => return Err(TraceeError::Gone(tid)),
                    Stop::Signal(signal) => {
                        let text = format!("process {tid} got signal {signal} in a call made for us");
                        return Err(TraceeError::Unsupported(text));
                    }
                    // The interrupt came before the call was made.
                    Stop::Event | Stop::Group(_) | Stop::Other if registers.rip == self.syscall_at => break,
                    // The step's own stop follows.
                    Stop::Event | Stop::Group(_) | Stop::Other => {
                        ptrace::resume(tid, 0).map_err(TraceeError::call("PTRACE_CONT", tid))?;
                    }
                }
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Takes descriptor `fd` of the tracee over and closes it there.
    pub fn take_descriptor(&mut self, fd: RawFd) -> Result<OwnedFd, TraceeError> {
        let ours = self.share_descriptor(fd)?;
        self.call("close", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0])?;
        Ok(ours)
    }

    /// A duplicate of descriptor `fd` of the tracee, here.
    pub fn share_descriptor(&self, fd: RawFd) -> Result<OwnedFd, TraceeError> {
        let pidfd = process::pidfd_open(self.tid).map_err(TraceeError::call("pidfd_open", self.tid))?;
        process::pidfd_getfd(&pidfd, fd).map_err(TraceeError::call("pidfd_getfd", self.tid))
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if !self.restore_on_drop {
            return;
        }
        let restored = self
            .unmap_scratch()
            .and_then(|()| {
                ptrace::set_signal_mask(self.tid, self.saved_mask)
                    .map_err(TraceeError::call("PTRACE_SETSIGMASK", self.tid))
            })
            .and_then(|()| {
                ptrace::set_registers(self.tid, &self.saved)
                    .map_err(TraceeError::call("PTRACE_SETREGS", self.tid))
            });
        if let Err(error) = restored {
            tracing::error!(tid = self.tid, %error, "could not put a thread's registers back");
        }
    }
}

/// The address of a `syscall` instruction in the tracee's vDSO.
fn find_syscall(pid: i32) -> Result<u64, TraceeError> {
    let mappings = layout::read_mappings(pid)?;
    let missing =
        || TraceeError::Unsupported(format!("process {pid} has no vDSO with a syscall instruction"));
    let vdso = mappings.iter().find(|mapping| mapping.name == "[vdso]").ok_or_else(missing)?;
    let mut code = vec![0; (vdso.end - vdso.start) as usize];
    mem::read_exact(pid, RemoteAddr(vdso.start), &mut code)
        .map_err(TraceeError::call("reading the vDSO", pid))?;
    let offset = code.windows(2).position(|bytes| bytes == SYSCALL_INSTRUCTION).ok_or_else(missing)?;
    Ok(vdso.start + offset as u64)
}
