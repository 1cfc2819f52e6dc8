//! System calls made inside a stopped tracee.
//!
//! In a running program the tracee's registers are set to the call and to a `syscall` instruction that the program has, and the
//! thread goes to the call's entry and to its exit. Nothing is written to its code, and its registers and signal mask are
//! put back when the [`Remote`] is dropped. If this process is killed in between, the thread makes the call that it is
//! at, and puts itself back: see [`lifeline`](super::lifeline).
//!
//! A stub has nothing to be put back to, and dies with its tracer: it makes calls by single steps over the `syscall` of its
//! vDSO, which need half as many stops, or many of them in one go (see [`batch`](super::batch)).

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    TraceeError,
    batch::{self, Batch},
    layout::{self, Mapping},
    leftovers::{self, SCRATCH_BYTES},
    lifeline::{self, Lifeline, Ways},
    stopped::StoppedProcess,
    tree, waits,
};
use crate::sys::{
    mem::{self, ForcedMemory, PAGE_SIZE, RemoteAddr},
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

/// A stub's scratch mappings: a page for what calls point to, the page of its lists of calls, and the code that makes those.
pub(super) const STUB_SCRATCH_BYTES: u64 = CODE_OFFSET + PAGE_SIZE;
const LIST_OFFSET: u64 = PAGE_SIZE;
const CODE_OFFSET: u64 = 2 * PAGE_SIZE;

/// A stopped thread that makes system calls for us.
#[derive(Debug)]
pub struct Remote {
    tid: i32,
    saved: Registers,
    saved_mask: u64,
    /// Where a stub's `syscall` is.
    syscall_at: u64,
    scratch: Option<RemoteAddr>,
    scratch_bytes: u64,
    owns_scratch: bool,
    restore_on_drop: bool,
    /// What a running program's thread comes back by.
    lifeline: Option<Lifeline>,
    /// Where a running program has room for a scratch mapping.
    places: Vec<u64>,
}

impl Remote {
    /// Takes over stopped stub `tid` until it is dropped.
    pub fn stub(tid: i32) -> Result<Self, TraceeError> {
        let syscall_at = find_syscall(tid)?;
        Self::take_over(tid, syscall_at)
    }

    /// Takes over another stopped thread of the same stub, with the same scratch page.
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
        let mut taken = Self::of_registers(tid, ptrace::registers(tid))?;
        taken.syscall_at = syscall_at;
        // A signal would run a handler of the program's in the middle of our calls. SIGTRAP is ours: the kernel would
        // forget the program's handler if it were blocked (`force_sig_info_to_task` in kernel/signal.c).
        ptrace::set_signal_mask(tid, !TRAP).map_err(TraceeError::call("PTRACE_SETSIGMASK", tid))?;
        Ok(taken)
    }

    fn of_registers(tid: i32, registers: io::Result<Registers>) -> Result<Self, TraceeError> {
        Ok(Self {
            tid,
            saved: registers.map_err(TraceeError::call("PTRACE_GETREGS", tid))?,
            saved_mask: ptrace::signal_mask(tid).map_err(TraceeError::call("PTRACE_GETSIGMASK", tid))?,
            syscall_at: 0,
            scratch: None,
            scratch_bytes: 0,
            owns_scratch: false,
            restore_on_drop: true,
            lifeline: None,
            places: Vec::new(),
        })
    }

    /// Looks for what calls in the running program `pid` will need.
    pub fn prepare(pid: i32) -> Result<(), TraceeError> {
        Ways::find(pid, &layout::read_mappings(pid)?).map(drop)
    }

    /// Takes over the first thread of a running program, all of whose threads are stopped, until it is dropped.
    pub fn of_program(program: &StoppedProcess) -> Result<Self, TraceeError> {
        // Once: the kernel needs longer to list them than for anything else here.
        Self::of_mapped_program(program, &layout::read_mappings(program.pid())?)
    }

    /// The same, where its mappings are known; the kernel's own are not needed.
    pub fn of_mapped_program(program: &StoppedProcess, mappings: &[Mapping]) -> Result<Self, TraceeError> {
        let pid = program.pid();
        let ways = Ways::find(pid, mappings)?;
        let registers = ptrace::registers(pid).map_err(TraceeError::call("PTRACE_GETREGS", pid))?;
        let area = lifeline::area_of_leader(pid, mappings, registers.rsp)?;
        let mut taken = Self::with_lifeline(program, pid, ways, area)?;
        taken.places = leftovers::places_for_scratch(mappings);
        Ok(taken)
    }

    /// Takes over another of its threads, with the same scratch page; one at a time.
    pub fn thread_of_program(&self, program: &StoppedProcess, tid: i32) -> Result<Self, TraceeError> {
        let (Some(lifeline), Some(scratch)) = (&self.lifeline, self.scratch) else {
            return Err(TraceeError::Unsupported("a thread's frame needs a scratch mapping".into()));
        };
        let ways = lifeline.ways();
        let area = scratch.0 + PAGE_SIZE..scratch.0 + SCRATCH_BYTES;
        let mut other = Self::with_lifeline(program, tid, ways, area)?;
        other.scratch = self.scratch;
        Ok(other)
    }

    /// Has the program make a task that shares its memory, descriptors and directories, and is traced by this thread; returns
    /// its pid as the program would see it. It waits for its first instruction; if it loses us there, it ends.
    ///
    /// No signal tells the program of its end, and wait(2) finds it only with `__WALL`.
    pub(super) fn make_task_beside(&mut self) -> Result<i32, TraceeError> {
        let (Some(lifeline), Some(scratch)) = (&self.lifeline, self.scratch) else {
            return Err(TraceeError::Unsupported("a task beside a program needs a scratch mapping".into()));
        };
        let ends = lifeline.call(&self.saved, libc::SYS_exit as u64, [0; 6]);
        let area = scratch.0 + PAGE_SIZE..scratch.0 + SCRATCH_BYTES;
        let frame = Lifeline::lay(self.tid, lifeline.ways(), area, &ends, !0)?;
        let stack = frame.back(&self.saved).rsp;
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_PTRACE;
        Ok(self.call("clone", libc::SYS_clone, [flags as u64, stack, 0, 0, 0, 0])? as i32)
    }

    fn with_lifeline(
        program: &StoppedProcess,
        tid: i32,
        ways: Ways,
        area: std::ops::Range<u64>,
    ) -> Result<Self, TraceeError> {
        let registers = ptrace::registers(tid).map(|registers| lifeline::out_of_sequence(tid, registers));
        let mut taken = Self::of_registers(tid, registers)?;
        let context = waits::left_alone(taken.saved, program.wait(tid));
        let lifeline = Lifeline::lay(tid, ways, area, &context, taken.saved_mask)?;
        let ready = lifeline.back(&taken.saved);
        // From here on it is put back.
        taken.lifeline = Some(lifeline);
        ptrace::set_registers(tid, &ready).map_err(TraceeError::call("PTRACE_SETREGS", tid))?;
        // A signal would run a handler of the program's in the middle of our calls.
        ptrace::set_signal_mask(tid, !0).map_err(TraceeError::call("PTRACE_SETSIGMASK", tid))?;
        Ok(taken)
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

    /// Maps a stub's scratch memory at `at`, where nothing may be.
    pub fn map_scratch(&mut self, at: u64) -> Result<(), TraceeError> {
        self.map(at, CODE_OFFSET, libc::MAP_FIXED_NOREPLACE)?;
        self.scratch_bytes = STUB_SCRATCH_BYTES;
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let code = at + CODE_OFFSET;
        self.call("mmap", libc::SYS_mmap, [code, PAGE_SIZE, protection, flags, !0, 0])?;
        ForcedMemory::open(self.tid)
            .and_then(|memory| memory.write(RemoteAddr(code), batch::CODE))
            .map_err(TraceeError::call("writing a stub's code", self.tid))
    }

    /// Maps a scratch page for calls of a program that take pointers, and room for another thread's frame behind it.
    pub fn map_scratch_in_program(&mut self) -> Result<(), TraceeError> {
        for at in std::mem::take(&mut self.places) {
            match self.map(at, SCRATCH_BYTES, libc::MAP_FIXED_NOREPLACE) {
                // Lower than this program may map, or taken.
                Err(TraceeError::Remote { source, .. })
                    if matches!(source.raw_os_error(), Some(libc::EPERM | libc::EEXIST)) => {}
                Err(error) => return Err(error),
                Ok(()) => return leftovers::mark_scratch(self.tid, at),
            }
        }
        Err(TraceeError::Unsupported(format!("process {} has no place for a scratch mapping", self.tid)))
    }

    /// Maps a scratch page for the calls of a task beside a program, at the last place that `mappings` leave free.
    pub(super) fn map_scratch_beside(&mut self, mappings: &[Mapping]) -> Result<(), TraceeError> {
        self.places = leftovers::places_for_scratch(mappings);
        // The program itself has the first for the moment.
        self.places.reverse();
        self.map_scratch_in_program()
    }

    fn map(&mut self, at: u64, bytes: u64, fixed: i32) -> Result<(), TraceeError> {
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed) as u64;
        let args = [at, bytes, protection, flags, !0, 0];
        self.scratch = Some(RemoteAddr(self.call("mmap", libc::SYS_mmap, args)?));
        self.scratch_bytes = bytes;
        self.owns_scratch = true;
        Ok(())
    }

    /// Removes the scratch page.
    pub fn unmap_scratch(&mut self) -> Result<(), TraceeError> {
        let bytes = self.scratch_bytes;
        if let Some(at) = self.scratch.take().filter(|_| self.owns_scratch) {
            self.call("munmap", libc::SYS_munmap, [at.0, bytes, 0, 0, 0, 0])?;
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

    /// Several calls of a stub, to be made in one go.
    pub fn batch(&mut self) -> Batch<'_> {
        Batch::new(self)
    }

    /// Where a stub's list of calls is.
    pub(super) fn list_at(&self) -> u64 {
        self.scratch_at() + LIST_OFFSET
    }

    /// Has a stub make the calls of a list, the first `bytes` of `page`. Returns the list as far as they were made.
    pub(super) fn run_list(&mut self, page: &[u8], bytes: u64) -> Result<Vec<u8>, TraceeError> {
        if self.scratch.is_none() || self.lifeline.is_some() {
            return Err(TraceeError::Unsupported(format!("process {} has no room for a list", self.tid)));
        }
        let (list, code) = (self.list_at(), self.scratch_at() + CODE_OFFSET);
        let failed = |what| TraceeError::call(what, self.tid);
        mem::write(self.tid, RemoteAddr(list), page).map_err(failed("writing a list of calls"))?;
        let registers = Registers { rip: code, rbx: list, rbp: list + bytes, orig_rax: !0, ..self.saved };
        ptrace::set_registers(self.tid, &registers).map_err(failed("PTRACE_SETREGS"))?;
        let after = self.go_on(|tid| ptrace::resume(tid, 0), "PTRACE_CONT")?;
        let mut made = vec![0; after.rbx.saturating_sub(list).min(bytes) as usize];
        mem::read_exact(self.tid, RemoteAddr(list), &mut made)
            .map_err(TraceeError::call("reading a list of calls", self.tid))?;
        Ok(made)
    }

    fn raw_call(&mut self, number: libc::c_long, args: [u64; 6]) -> Result<i64, TraceeError> {
        self.set_call(number, args)?;
        let after = match self.lifeline {
            Some(_) => self.go_on(ptrace::go_to_call, "PTRACE_SYSCALL")?,
            None => self.go_on(ptrace::single_step, "PTRACE_SINGLESTEP")?,
        };
        Ok(after.rax as i64)
    }

    /// Lets the thread go by `step`, until it has made its call, or its list. Returns its registers then.
    fn go_on(
        &mut self,
        step: fn(i32) -> io::Result<()>,
        what: &'static str,
    ) -> Result<Registers, TraceeError> {
        let in_program = self.lifeline.is_some();
        let mut stop_arrived = false;
        let mut entered = false;
        loop {
            step(self.tid).map_err(TraceeError::call(what, self.tid))?;
            match ptrace::wait_stop(self.tid).map_err(TraceeError::call("waiting for a step", self.tid))? {
                Stop::Call if in_program => {
                    if std::mem::replace(&mut entered, true) {
                        break;
                    }
                }
                Stop::Signal(libc::SIGTRAP) if !in_program => break,
                Stop::Gone => return Err(TraceeError::Gone(self.tid)),
                // The stop of a new thread, or of an interrupt that came late: the step is still to be made.
                Stop::Call | Stop::Event | Stop::Group(_) | Stop::Other => {}
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
        ptrace::registers(self.tid).map_err(TraceeError::call("PTRACE_GETREGS", self.tid))
    }

    /// Makes the thread ready for a call, which it makes with its next step.
    pub(super) fn set_call(&self, number: libc::c_long, args: [u64; 6]) -> Result<(), TraceeError> {
        if let Some(lifeline) = &self.lifeline {
            let registers = lifeline.call(&self.saved, number as u64, args);
            return ptrace::set_registers(self.tid, &registers)
                .map_err(TraceeError::call("PTRACE_SETREGS", self.tid));
        }
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
                    Stop::Call | Stop::Event | Stop::Group(_) | Stop::Other
                        if registers.rip == self.syscall_at =>
                    {
                        break;
                    }
                    // The step's own stop follows.
                    Stop::Call | Stop::Event | Stop::Group(_) | Stop::Other => {
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
        let tid = self.tid;
        let unmapped = self.unmap_scratch();
        // The mask first: with the registers that it has, a thread that loses us here puts both back.
        let masked = ptrace::set_signal_mask(tid, self.saved_mask)
            .map_err(TraceeError::call("PTRACE_SETSIGMASK", tid));
        let set = ptrace::set_registers(tid, &self.saved).map_err(TraceeError::call("PTRACE_SETREGS", tid));
        let cleared = match (&set, &self.lifeline) {
            (Ok(()), Some(lifeline)) => lifeline.clear(),
            _ => Ok(()),
        };
        // One that was killed meanwhile needs nothing.
        if let Err(error) = unmapped.and(masked).and(set).and(cleared)
            && !tree::has_thread_ended(tid)
        {
            tracing::error!(tid, %error, "could not put a thread's registers back");
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
