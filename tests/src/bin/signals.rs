//! A program that checks its signals, timers and waits: `signals LOG`.
//!
//! A child queues numbered signals to it as fast as they are taken; each has to arrive once, and in order. Timers by
//! timer_create(2) have to expire as often as their interval says. Threads wait for twelve seconds in each of the calls
//! that the kernel goes on with by itself after an interruption, and one for an event without a limit of time.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicI32, AtomicI64, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use nix::{errno::Errno, libc};

/// The interval of the timer that sends signals.
const INTERVAL: Duration = Duration::from_millis(5);
/// Expirations that may be missing: the kernel does not tell what a timer missed while its signal waited at the freeze.
const MISSING: i64 = 1000;
/// How long the waits with a limit are.
const WAIT: Duration = Duration::from_secs(12);
/// By how much such a wait may be longer: this machine is busy, and moves.
const LATE: Duration = Duration::from_secs(6);
const TIMER_ID: i32 = 2;

static NEXT: AtomicI32 = AtomicI32::new(1);
static WRONG: AtomicI32 = AtomicI32::new(0);
static EXPIRED: AtomicI64 = AtomicI64::new(0);
static WOKEN: AtomicI32 = AtomicI32::new(0);
static LOG: Mutex<Option<File>> = Mutex::new(None);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(&format!("MISMATCH {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn log(line: &str) {
    if let Some(file) = LOG.lock().ok().as_mut().and_then(|file| file.as_mut()) {
        // Nobody to tell but the log itself.
        let _ = writeln!(file, "{line}");
    }
}

fn numbered() -> i32 {
    libc::SIGRTMIN() + 1
}

fn ticking() -> i32 {
    libc::SIGRTMIN() + 2
}

/// What `siginfo_t` holds besides its first three numbers, as the kernel has it.
fn sent(info: *const libc::siginfo_t) -> (i32, i32) {
    // SAFETY: the kernel gives every handler a whole siginfo. For timers: id and overruns; for queued signals the sender
    // is there, and their value behind it.
    unsafe {
        let words = info.cast::<i32>();
        let code = (*info).si_code;
        if code == libc::SI_TIMER { (*words.add(4), *words.add(5)) } else { (code, *words.add(6)) }
    }
}

extern "C" fn on_numbered(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let (_, number) = sent(info);
    if NEXT.swap(number + 1, Ordering::Relaxed) != number {
        WRONG.store(number, Ordering::Relaxed);
    }
}

extern "C" fn on_tick(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let (id, overruns) = sent(info);
    if id != TIMER_ID {
        WRONG.store(-1, Ordering::Relaxed);
    }
    EXPIRED.fetch_add(1 + i64::from(overruns), Ordering::Relaxed);
}

extern "C" fn on_wake(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    WOKEN.fetch_add(1, Ordering::Relaxed);
}

fn handle(
    signal: i32,
    handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void),
) -> nix::Result<()> {
    // SAFETY: the handlers only use atomics, which is safe at any moment; the struct is complete.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigaddset(&mut action.sa_mask, numbered());
        libc::sigaddset(&mut action.sa_mask, ticking());
        Errno::result(libc::sigaction(signal, &action, std::ptr::null_mut())).map(drop)
    }
}

/// Blocks or lets through, for this thread, the signals in `signals`.
fn mask(how: i32, signals: &[i32]) -> nix::Result<()> {
    // SAFETY: the set is a local that is made whole before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        Errno::result(libc::pthread_sigmask(how, &set, std::ptr::null_mut())).map(drop)
    }
}

fn run() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).context("usage: signals LOG")?;
    *LOG.lock().map_err(|_| anyhow::anyhow!("the log is broken"))? =
        Some(OpenOptions::new().create(true).append(true).open(path)?);
    handle(numbered(), on_numbered)?;
    handle(ticking(), on_tick)?;
    handle(libc::SIGUSR1, on_wake)?;
    // SAFETY: there is no other thread yet.
    if unsafe { libc::fork() } == 0 {
        return send();
    }
    let blocked = [numbered(), ticking(), libc::SIGUSR1];
    mask(libc::SIG_BLOCK, &blocked)?;
    let (event, waker) = (event()?, event()?);
    wait_again_and_again("nanosleep", nanosleep);
    wait_again_and_again("poll", poll);
    wait_again_and_again("futex", futex);
    thread::spawn(move || wait_for_events(event, waker));
    let suspended = thread::spawn(suspend);
    let far = arm()?;
    let began = Instant::now();
    mask(libc::SIG_UNBLOCK, &[numbered(), ticking()])?;
    for line in 1.. {
        // Signals queue up meanwhile, and come all at once.
        mask(libc::SIG_BLOCK, &[numbered()])?;
        thread::sleep(Duration::from_millis(5));
        mask(libc::SIG_UNBLOCK, &[numbered()])?;
        thread::sleep(Duration::from_millis(15));
        let wrong = WRONG.load(Ordering::Relaxed);
        ensure!(wrong == 0, "signal {wrong} came out of order");
        let due = (began.elapsed().as_nanos() / INTERVAL.as_nanos()) as i64;
        let expired = EXPIRED.load(Ordering::Relaxed);
        ensure!(
            expired <= due + 2 && expired + MISSING >= due,
            "the timer expired {expired} times, {due} were due"
        );
        check_far(far, began)?;
        add_one(event)?;
        take_one(waker).context("nobody waits for events")?;
        // SAFETY: the thread never ends.
        unsafe {
            libc::pthread_kill(std::os::unix::thread::JoinHandleExt::as_pthread_t(&suspended), libc::SIGUSR1)
        };
        let signals = NEXT.load(Ordering::Relaxed);
        log(&format!(
            "line={line} signals={signals} expired={expired} woken={}",
            WOKEN.load(Ordering::Relaxed)
        ));
    }
    Ok(())
}

/// The child: queues numbers to its parent.
fn send() -> anyhow::Result<()> {
    let parent = nix::unistd::getppid().as_raw();
    let mut number = 1;
    loop {
        let value = libc::sigval { sival_ptr: number as usize as *mut libc::c_void };
        // SAFETY: the value is a number, which nobody takes for a pointer.
        match Errno::result(unsafe { libc::sigqueue(parent, numbered(), value) }) {
            Ok(_) => number += 1,
            Err(Errno::EAGAIN) => {}
            Err(_) => return Ok(()),
        }
        if number % 10 == 0 {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Three timers, of which the first is deleted again: one that expires all the time, and has [`TIMER_ID`], and one that
/// never does. Returns the latter's id.
fn arm() -> anyhow::Result<i32> {
    let gone = make_timer(libc::SIGEV_NONE, 0)?;
    let far = make_timer(libc::SIGEV_NONE, 0)?;
    let ticks = make_timer(libc::SIGEV_SIGNAL, ticking())?;
    ensure!(ticks == TIMER_ID, "the timer has id {ticks}");
    // SAFETY: a plain system call.
    Errno::result(unsafe { libc::syscall(libc::SYS_timer_delete, gone) })?;
    set_timer(far, Duration::from_secs(1000), Duration::ZERO)?;
    set_timer(ticks, INTERVAL, INTERVAL)?;
    Ok(far)
}

fn make_timer(notify: i32, signal: i32) -> anyhow::Result<i32> {
    let mut id = 0;
    // SAFETY: the struct is plain numbers, and the kernel writes an int.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = notify;
        event.sigev_signo = signal;
        Errno::result(libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, &event, &mut id))?;
    }
    Ok(id)
}

fn set_timer(id: i32, value: Duration, interval: Duration) -> anyhow::Result<()> {
    let spec = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(value) };
    // SAFETY: the kernel reads the struct.
    let set = unsafe { libc::syscall(libc::SYS_timer_settime, id, 0, &spec, std::ptr::null_mut::<u8>()) };
    Errno::result(set).map(drop).context("timer_settime")
}

fn check_far(id: i32, began: Instant) -> anyhow::Result<()> {
    let mut spec =
        libc::itimerspec { it_interval: timespec(Duration::ZERO), it_value: timespec(Duration::ZERO) };
    // SAFETY: the kernel writes the struct.
    Errno::result(unsafe { libc::syscall(libc::SYS_timer_gettime, id, &mut spec) })
        .context("timer_gettime")?;
    let left = Duration::new(spec.it_value.tv_sec as u64, spec.it_value.tv_nsec as u32);
    let wrong = (left + began.elapsed()).abs_diff(Duration::from_secs(1000));
    ensure!(wrong < Duration::from_secs(2), "the far timer is wrong by {wrong:?}");
    Ok(())
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
}

fn wait_again_and_again(name: &'static str, wait: fn() -> anyhow::Result<()>) {
    thread::spawn(move || {
        loop {
            let began = Instant::now();
            let ended = wait();
            let took = began.elapsed();
            match ended {
                Ok(()) if took >= WAIT && took < WAIT + LATE => log(&format!("{name}={took:?}")),
                Ok(()) => log(&format!("MISMATCH {name} took {took:?}")),
                Err(error) => log(&format!("MISMATCH {name} after {took:?}: {error:#}")),
            }
        }
    });
}

fn nanosleep() -> anyhow::Result<()> {
    // SAFETY: the kernel reads the time; it is to write nothing.
    let slept = unsafe { libc::syscall(libc::SYS_nanosleep, &timespec(WAIT), std::ptr::null::<u8>()) };
    Errno::result(slept).map(drop).context("nanosleep")
}

fn poll() -> anyhow::Result<()> {
    let (reader, _writer) = std::io::pipe()?;
    let mut fds =
        [libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(&reader), events: libc::POLLIN, revents: 0 }];
    // SAFETY: one whole pollfd.
    let ready = unsafe { libc::syscall(libc::SYS_poll, fds.as_mut_ptr(), 1, WAIT.as_millis() as i32) };
    match Errno::result(ready).context("poll")? {
        0 => Ok(()),
        ready => bail!("poll found {ready}"),
    }
}

fn futex() -> anyhow::Result<()> {
    let word = AtomicU32::new(7);
    // SAFETY: a word that lives as long as the call, and a time.
    let waited = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            7,
            &timespec(WAIT),
        )
    };
    match Errno::result(waited) {
        Err(Errno::ETIMEDOUT) => Ok(()),
        other => bail!("futex: {other:?}"),
    }
}

fn event() -> anyhow::Result<i32> {
    // SAFETY: a plain system call.
    Errno::result(unsafe { libc::eventfd(0, 0) }).context("eventfd")
}

fn add_one(event: i32) -> anyhow::Result<()> {
    let one = 1_u64.to_ne_bytes();
    // SAFETY: eight bytes, as an eventfd wants them.
    Errno::result(unsafe { libc::write(event, one.as_ptr().cast(), 8) })
        .map(drop)
        .context("writing an eventfd")
}

fn take_one(event: i32) -> anyhow::Result<()> {
    let mut count = [0_u8; 8];
    // SAFETY: eight bytes, as an eventfd wants them.
    Errno::result(unsafe { libc::read(event, count.as_mut_ptr().cast(), 8) })
        .map(drop)
        .context("reading an eventfd")
}

/// Waits without a limit, with epoll; an interruption that is no event is an error.
fn wait_for_events(event: i32, waker: i32) {
    let wait = || -> anyhow::Result<()> {
        // SAFETY: plain system calls with whole structs.
        unsafe {
            let epoll = Errno::result(libc::epoll_create1(0))?;
            let mut wanted = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 77 };
            Errno::result(libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, event, &mut wanted))?;
            loop {
                let mut got = libc::epoll_event { events: 0, u64: 0 };
                Errno::result(libc::epoll_wait(epoll, &mut got, 1, -1)).context("epoll_wait")?;
                ensure!({ got.u64 } == 77, "epoll gave something else");
                take_one(event)?;
                add_one(waker)?;
            }
        }
    };
    if let Err(error) = wait() {
        log(&format!("MISMATCH {error:#}"));
    }
}

/// Lets SIGUSR1 through only while it waits: each time that it goes on, one has come.
fn suspend() {
    // SAFETY: a local set that is made whole before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set);
        libc::sigdelset(&mut set, libc::SIGUSR1);
        loop {
            let before = WOKEN.load(Ordering::Relaxed);
            libc::sigsuspend(&set);
            let after = WOKEN.load(Ordering::Relaxed);
            if after != before + 1 {
                log(&format!("MISMATCH sigsuspend went on after {} signals", after - before));
            }
        }
    }
}
