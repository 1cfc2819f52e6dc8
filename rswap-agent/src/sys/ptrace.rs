//! The ptrace requests that surgery needs, on one thread at a time.
//!
//! ptrace is bound to the tracing thread: everything on one tracee must come from the thread that
//! seized it, and when that thread ends, the kernel lets its tracees go on.

use std::{
    io,
    time::{Duration, Instant},
};

/// General registers.
pub type Registers = libc::user_regs_struct;

/// A whole `siginfo_t`.
pub type SignalInfo = [u8; 128];

const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
const PTRACE_SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
const PTRACE_O_SUSPEND_SECCOMP: i32 = 1 << 21;
/// Options of a stub: its threads and children are traced as well, and die as well.
const STUB_OPTIONS: i32 = libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_EXITKILL;
/// Options of a running program's threads. The kernel marks their stops at calls by a number that is no signal's: one that
/// loses its tracer there gets no signal for it (`ptrace_report_syscall` in include/linux/ptrace.h).
const PROGRAM_OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD;
/// What marks them.
const CALL_STOP: i32 = libc::SIGTRAP | 0x80;
const NT_X86_XSTATE: usize = 0x202;
/// How often a thread that is to stop is looked at without sleeping in between: a few context switches.
const QUICK_LOOKS: u32 = 20;
/// Larger than any xsave area that x86-64 has today (AMX included: 11 KiB).
const XSTATE_MAX: usize = 32 * 1024;

/// Where a thread's restartable-sequence area is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RseqConfiguration {
    /// Address of the area, 0 when there is none.
    pub address: u64,
    /// Its length, in bytes.
    pub size: u32,
    /// The signature that abort handlers carry.
    pub signature: u32,
    /// Always 0.
    pub flags: u32,
    /// Padding.
    pub pad: u32,
}

fn request(number: libc::c_uint, tid: i32, addr: usize, data: usize) -> io::Result<libc::c_long> {
    // SAFETY: this module passes either plain numbers or pointers to locals that outlive the call and are
    // as large as the request says; the kernel checks that `tid` is a tracee of this thread.
    super::check(unsafe { libc::ptrace(number, tid, addr, data) })
}

/// Starts tracing `tid` without stopping it. As long as it is traced, seccomp forbids it nothing, where the kernel can do
/// that.
pub fn seize(tid: i32) -> io::Result<()> {
    match request(libc::PTRACE_SEIZE, tid, 0, (PROGRAM_OPTIONS | PTRACE_O_SUSPEND_SECCOMP) as usize) {
        // Without CONFIG_CHECKPOINT_RESTORE, or when seccomp is on here.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => {
            request(libc::PTRACE_SEIZE, tid, 0, PROGRAM_OPTIONS as usize).map(|_| ())
        }
        seized => seized.map(|_| ()),
    }
}

/// Starts tracing a stub without stopping it. New threads and children of it are traced as well, and all die with this
/// thread.
pub fn seize_stub(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, STUB_OPTIONS as usize).map(|_| ())
}

/// Makes a stopped tracee one that dies with this thread, and that seccomp forbids nothing, where the kernel can do that.
pub fn make_stub(tid: i32) -> io::Result<()> {
    match suspend_seccomp(tid) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => {
            request(libc::PTRACE_SETOPTIONS, tid, 0, STUB_OPTIONS as usize).map(|_| ())
        }
        made => made,
    }
}

/// From here on seccomp forbids a stopped stub nothing, until it is let go.
pub fn suspend_seccomp(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, (STUB_OPTIONS | PTRACE_O_SUSPEND_SECCOMP) as usize).map(|_| ())
}

/// A seccomp filter of a stopped thread, counted from the oldest on, as `struct sock_filter`s; `None` behind the last.
pub fn seccomp_filter(tid: i32, index: u64) -> io::Result<Option<Vec<u8>>> {
    let index = index as usize;
    let instructions = match request(PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        instructions => instructions? as usize,
    };
    let mut program = vec![0_u8; instructions * 8];
    request(PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr() as usize)?;
    Ok(Some(program))
}

/// The flags that such a filter was installed with.
pub fn seccomp_flags(tid: i32, index: u64) -> io::Result<u64> {
    let mut metadata = [index, 0];
    let size = size_of_val(&metadata);
    request(PTRACE_SECCOMP_GET_METADATA, tid, size, metadata.as_mut_ptr() as usize)?;
    Ok(metadata[1])
}

/// Whether system calls of a stopped thread may be handed to the program itself (`PR_SET_SYSCALL_USER_DISPATCH`). Kernels
/// before Linux 6.4 don't tell.
pub fn dispatches_calls(tid: i32) -> io::Result<bool> {
    // `struct ptrace_sud_config`: mode (0 for off), selector, offset, length.
    let mut config = [0_u64; 4];
    let size = size_of_val(&config);
    match request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, config.as_mut_ptr() as usize) {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
        told => told.map(|_| config[0] != 0),
    }
}

/// Replaces the options of a stub by none: the tracee outlives its tracer.
pub fn clear_options(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, 0).map(|_| ())
}

/// Asks a traced thread to stop; it has when [`wait_stop`] returns.
pub fn interrupt(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(|_| ())
}

/// How a thread stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// By [`interrupt`], or a new thread's first stop.
    Event,
    /// Its whole process is stopped, by this signal.
    Group(i32),
    /// About to receive this signal.
    Signal(i32),
    /// At the entry of a system call, or at its exit.
    Call,
    /// Another ptrace event.
    Other,
    /// It is gone.
    Gone,
}

/// Waits until `tid` stops.
pub fn wait_stop(tid: i32) -> io::Result<Stop> {
    loop {
        if let Some(stop) = look_for_stop(tid, 0)? {
            return Ok(stop);
        }
    }
}

/// Waits until `tid` stops, but no longer than `limit`: a thread in an uninterruptible wait does not stop before that ends.
pub fn wait_stop_within(tid: i32, limit: Duration) -> io::Result<Stop> {
    let began = Instant::now();
    let mut pause = Duration::from_micros(10);
    let mut looks = 0;
    loop {
        if let Some(stop) = look_for_stop(tid, libc::WNOHANG)? {
            return Ok(stop);
        }
        // Most threads stop at once, and a sleep is longer than that.
        if looks < QUICK_LOOKS {
            looks += 1;
            std::thread::yield_now();
            continue;
        }
        if began.elapsed() > limit {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("it does not stop within {limit:?}"),
            ));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}

fn look_for_stop(tid: i32, flags: i32) -> io::Result<Option<Stop>> {
    let mut status = 0;
    loop {
        // Not nix's waitpid: it has no word for real-time signals.
        // SAFETY: the kernel writes the status to a local that outlives the call.
        let found = super::check(unsafe { libc::waitpid(tid, &mut status, flags | libc::__WALL) }.into());
        return match found {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(stop_of(status))),
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(Some(Stop::Gone)),
            Err(error) => Err(error),
        };
    }
}

/// What a status of wait(2) says of a tracee (ptrace(2)).
fn stop_of(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Gone;
    }
    match (status >> 16, libc::WSTOPSIG(status)) {
        (0, CALL_STOP) => Stop::Call,
        (0, signal) => Stop::Signal(signal),
        (libc::PTRACE_EVENT_STOP, libc::SIGTRAP) => Stop::Event,
        (libc::PTRACE_EVENT_STOP, signal) => Stop::Group(signal),
        _ => Stop::Other,
    }
}

/// Runs one instruction (for a `syscall` instruction: the whole call).
pub fn single_step(tid: i32) -> io::Result<()> {
    single_step_with(tid, 0)
}

/// The same, delivering `signal` if it isn't 0.
pub fn single_step_with(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SINGLESTEP, tid, 0, signal as usize).map(|_| ())
}

/// Lets a stopped thread go on to the entry of a system call, or to its exit.
pub fn go_to_call(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(|_| ())
}

/// Lets a stopped thread go on, delivering `signal` if it isn't 0.
pub fn resume(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(|_| ())
}

/// Stops tracing a stopped thread and lets it go on, delivering `signal` if it isn't 0.
pub fn detach(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(|_| ())
}

/// General registers of a stopped thread.
pub fn registers(tid: i32) -> io::Result<Registers> {
    // SAFETY: the struct is plain numbers, for which all zeros is a value.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut registers as usize)?;
    Ok(registers)
}

/// Sets the general registers of a stopped thread.
pub fn set_registers(tid: i32, registers: &Registers) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, registers as *const Registers as usize).map(|_| ())
}

/// The xsave area (x87, SSE, AVX, pkeys ...) of a stopped thread.
pub fn extended_state(tid: i32) -> io::Result<Vec<u8>> {
    let mut area = vec![0_u8; XSTATE_MAX];
    let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize)?;
    area.truncate(iov.iov_len);
    Ok(area)
}

/// Sets the xsave area of a stopped thread.
pub fn set_extended_state(tid: i32, area: &[u8]) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize).map(|_| ())
}

/// The signal that a thread in [`Stop::Signal`] is about to receive.
pub fn signal_info(tid: i32) -> io::Result<SignalInfo> {
    let mut info: SignalInfo = [0; 128];
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

/// Says what the signal is that a thread in [`Stop::Signal`] is let go with.
pub fn set_signal_info(tid: i32, info: &SignalInfo) -> io::Result<()> {
    request(libc::PTRACE_SETSIGINFO, tid, 0, info.as_ptr() as usize).map(|_| ())
}

/// The blocked signals of a stopped thread, bit n-1 for signal n.
pub fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0_u64;
    request(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the blocked signals of a stopped thread.
pub fn set_signal_mask(tid: i32, mask: u64) -> io::Result<()> {
    request(PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(|_| ())
}

/// The restartable-sequence area of a stopped thread.
pub fn rseq_configuration(tid: i32) -> io::Result<RseqConfiguration> {
    let mut rseq = RseqConfiguration::default();
    let size = size_of::<RseqConfiguration>();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, &raw mut rseq as usize)?;
    Ok(rseq)
}

/// The signals queued to a stopped thread (or, with `shared`, to its process), whole `siginfo_t`s.
pub fn pending_signals(tid: i32, shared: bool) -> io::Result<Vec<SignalInfo>> {
    #[repr(C)]
    struct PeekArgs {
        offset: u64,
        flags: u32,
        count: i32,
    }
    let mut found = Vec::new();
    loop {
        let args = PeekArgs { offset: found.len() as u64, flags: u32::from(shared), count: 1 };
        let mut info: SignalInfo = [0; 128];
        let got =
            request(libc::PTRACE_PEEKSIGINFO, tid, &raw const args as usize, info.as_mut_ptr() as usize)?;
        if got == 0 {
            return Ok(found);
        }
        found.push(info);
    }
}
