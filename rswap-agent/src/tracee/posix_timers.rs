//! Timers made by timer_create(2).

use serde::{Deserialize, Serialize};

use super::{TraceeError, capture::Status, read_proc, remote::Remote};

/// `prctl` option (Linux 6.16): timer_create(2) gives the id that it is asked for.
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// Timers that are made and deleted, where the kernel gives no chosen ids, until the one that is wanted comes.
const MOST_TRIES: i32 = 20_000;
/// A timer that is due so soon is about to count anew.
const DUE_SOON_NS: i64 = 20_000_000;
/// How long the signal of a timer that was due long ago may take (`struct timespec`): a hundredth of a second.
const TAKEN_WITHIN: [u8; 16] = (10_000_000_u128 << 64).to_ne_bytes();
const SECOND: i64 = 1_000_000_000;
/// `SI_TIMER` (include/uapi/asm-generic/siginfo.h).
const SI_TIMER: i32 = -2;

/// One timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// Its id in its process.
    pub id: i32,
    /// Its clock.
    pub clock: i32,
    /// The signal that it sends.
    pub signal: i32,
    /// What it sends along.
    pub value: u64,
    /// `SIGEV_*`.
    pub notify: i32,
    /// With `SIGEV_THREAD_ID`: to which thread, by its id in the instance's PID namespace.
    pub thread: i32,
    /// Interval and time left, in nanoseconds.
    pub interval_ns: i64,
    /// 0 when it is not armed.
    pub left_ns: i64,
    /// `timer_getoverrun`: of the signal that was delivered last.
    pub overruns: i32,
}

impl PosixTimer {
    /// Whether its clock goes on while the process doesn't run.
    fn counts_freezes(&self) -> bool {
        self.clock >= 0
            && ![libc::CLOCK_PROCESS_CPUTIME_ID, libc::CLOCK_THREAD_CPUTIME_ID].contains(&self.clock)
    }
}

/// The timers of the process behind `leader`, which is stopped.
pub fn capture(leader: &mut Remote) -> Result<Vec<PosixTimer>, TraceeError> {
    let path = format!("/proc/{}/timers", leader.tid());
    let problem = || TraceeError::Proc { path: path.clone(), problem: "unexpected format".into() };
    let mut timers = parse(&read_proc(&path)?).ok_or_else(problem)?;
    for timer in &mut timers {
        if timer.notify & libc::SIGEV_THREAD_ID != 0 {
            // One that has ended gets no signal any more; nor does it where it never was.
            let status = Status::read(timer.thread);
            timer.thread = status.ok().and_then(|status| status.last_number("NSpid:")).unwrap_or(0);
        }
        let at = leader.put(0, &[0; 32])?;
        leader.call("timer_gettime", libc::SYS_timer_gettime, [timer.id as u64, at, 0, 0, 0, 0])?;
        let bytes: [u8; 32] = leader.get(0)?;
        let word = |n: usize| bytes[n * 8..].first_chunk().map_or(0, |word| i64::from_ne_bytes(*word));
        let ns = |s: i64, ns: i64| s.saturating_mul(SECOND).saturating_add(ns);
        (timer.interval_ns, timer.left_ns) = (ns(word(0), word(1)), ns(word(2), word(3)));
        let args = [timer.id as u64, 0, 0, 0, 0, 0];
        timer.overruns = leader.call("timer_getoverrun", libc::SYS_timer_getoverrun, args)? as i32;
    }
    Ok(timers)
}

/// Four lines for each timer (proc_pid_timers(5)).
fn parse(text: &str) -> Option<Vec<PosixTimer>> {
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks(4).map(parse_one).collect()
}

fn parse_one(lines: &[&str]) -> Option<PosixTimer> {
    let [id, signal, notify, clock] = lines else { return None };
    let (signal, value) = signal.strip_prefix("signal: ")?.split_once('/')?;
    let (kind, to) = notify.strip_prefix("notify: ")?.split_once('/')?;
    let (to, thread) = to.split_once('.')?;
    let kind = match kind {
        "signal" => libc::SIGEV_SIGNAL,
        "none" => libc::SIGEV_NONE,
        "thread" => libc::SIGEV_THREAD,
        _ => return None,
    };
    Some(PosixTimer {
        id: id.strip_prefix("ID: ")?.parse().ok()?,
        clock: clock.strip_prefix("ClockID: ")?.parse().ok()?,
        signal: signal.parse().ok()?,
        value: u64::from_str_radix(value.trim_start_matches("0x"), 16).ok()?,
        notify: kind | if to == "tid" { libc::SIGEV_THREAD_ID } else { 0 },
        thread: thread.parse().ok()?,
        interval_ns: 0,
        left_ns: 0,
        overruns: 0,
    })
}

/// Makes timers with their ids, not armed yet.
pub fn make(leader: &mut Remote, timers: &[PosixTimer]) -> Result<(), TraceeError> {
    if timers.is_empty() {
        return Ok(());
    }
    let switch = |leader: &mut Remote, on: u64| {
        leader.call("prctl", libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0, 0])
    };
    let chooses = switch(leader, 1).is_ok();
    for timer in timers {
        // `struct sigevent`: value, signal, how, thread; then the id.
        let mut event = [0_u8; 64];
        event[..8].copy_from_slice(&timer.value.to_ne_bytes());
        event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
        event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
        event[16..20].copy_from_slice(&timer.thread.to_ne_bytes());
        let event_at = leader.put(0, &event)?;
        for attempt in 0.. {
            let id_at = leader.put(64, &timer.id.to_ne_bytes())?;
            let args = [timer.clock as u64, event_at, id_at, 0, 0, 0];
            leader.call("timer_create", libc::SYS_timer_create, args)?;
            let made = i32::from_ne_bytes(leader.get(64)?);
            if made == timer.id {
                break;
            }
            leader.call("timer_delete", libc::SYS_timer_delete, [made as u64, 0, 0, 0, 0, 0])?;
            if chooses || made > timer.id || attempt == MOST_TRIES {
                let text = format!("this kernel gives a timer no id {}: use Linux 6.16 or later", timer.id);
                return Err(TraceeError::Unsupported(text));
            }
        }
    }
    if chooses {
        switch(leader, 0)?;
    }
    Ok(())
}

/// Arms those timers that are to tell overruns as they did before, `frozen_ns` after they were looked at, and returns their
/// ids. No signal may wait in the process yet; `waiting`: the timers whose signal is to.
///
/// timer_settime(2) clears the count, so it can't be set and the timer armed afterwards: it is armed as if it had been due
/// first so long ago that it was missed as often as it was, and is due next when it is.
pub fn arm_with_overruns(
    leader: &mut Remote,
    timers: &[PosixTimer],
    waiting: &[i32],
    frozen_ns: i64,
) -> Result<Vec<i32>, TraceeError> {
    let mut armed = Vec::new();
    for timer in timers.iter().filter(|timer| timer.overruns > 0 && !waiting.contains(&timer.id)) {
        // The signal to a thread can't be taken by another, and what counts its process's time can't be due in the past.
        if timer.notify != libc::SIGEV_SIGNAL || !timer.counts_freezes() {
            continue;
        }
        let now = clock_ns(leader, timer.clock)?;
        let Some(first) = first_due_ns(timer, now, frozen_ns) else { continue };
        settime(leader, timer.id, libc::TIMER_ABSTIME, timer.interval_ns, first)?;
        armed.push(timer.id);
        let at =
            leader.put(0, &[&(1_u64 << (timer.signal - 1)).to_ne_bytes()[..], &TAKEN_WITHIN].concat())?;
        match leader.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, [at, 0, at + 8, 8, 0, 0]) {
            // A signal that the program ignores does not come.
            Err(TraceeError::Remote { source, .. }) if source.raw_os_error() == Some(libc::EAGAIN) => {}
            taken => drop(taken?),
        }
    }
    Ok(armed)
}

/// When a timer must have been due first, so that it was missed as often as it was by `now`, and is due next when it is.
/// `None` when it was due meanwhile, which counts anew, or that is before the clock began.
fn first_due_ns(timer: &PosixTimer, now_ns: i64, frozen_ns: i64) -> Option<i64> {
    let due = now_ns.saturating_sub(frozen_ns).saturating_add(timer.left_ns);
    let missed = timer.interval_ns.checked_mul(i64::from(timer.overruns) + 1)?;
    let soon = due.saturating_sub(now_ns) < DUE_SOON_NS || timer.interval_ns == 0 || timer.left_ns == 0;
    (!soon).then(|| due.saturating_sub(missed)).filter(|first| *first > 0)
}

/// Arms the timers, `frozen_ns` after they were looked at, but for those in `done`.
pub fn arm(
    leader: &mut Remote,
    timers: &[PosixTimer],
    frozen_ns: i64,
    done: &[i32],
) -> Result<(), TraceeError> {
    for timer in timers.iter().filter(|timer| timer.left_ns > 0 && !done.contains(&timer.id)) {
        if timer.counts_freezes() {
            // What was missed in the freeze is missed as it would have been anywhere.
            let now = clock_ns(leader, timer.clock)?;
            let due = now.saturating_sub(frozen_ns).saturating_add(timer.left_ns);
            settime(leader, timer.id, libc::TIMER_ABSTIME, timer.interval_ns, due.max(1))?;
        } else {
            settime(leader, timer.id, 0, timer.interval_ns, timer.left_ns)?;
        }
    }
    Ok(())
}

/// The timer, among `timers`, whose signal `info` is: the kernel keeps that signal with the timer, and counts what is missed
/// as long as it waits.
pub fn sender<'a>(timers: &'a [PosixTimer], info: &[u8]) -> Option<&'a PosixTimer> {
    let number = |at: usize| info.get(at..)?.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
    let (signal, code, id) = (number(0)?, number(8)?, number(16)?);
    if code != SI_TIMER {
        return None;
    }
    timers.iter().find(|timer| timer.id == id && timer.signal == signal)
}

/// Lets a timer expire at once, so that its signal waits as it did; what it missed is counted from the last time on that it
/// was due.
pub fn expire(leader: &mut Remote, timer: &PosixTimer, frozen_ns: i64) -> Result<(), TraceeError> {
    if timer.interval_ns == 0 || timer.left_ns == 0 || !timer.counts_freezes() {
        return settime(leader, timer.id, 0, timer.interval_ns, 1);
    }
    let now = clock_ns(leader, timer.clock)?;
    let last = now.saturating_sub(frozen_ns).saturating_add(timer.left_ns).saturating_sub(timer.interval_ns);
    settime(leader, timer.id, libc::TIMER_ABSTIME, timer.interval_ns, last.max(1))
}

fn clock_ns(leader: &mut Remote, clock: i32) -> Result<i64, TraceeError> {
    let at = leader.put(0, &[0; 16])?;
    leader.call("clock_gettime", libc::SYS_clock_gettime, [clock as u64, at, 0, 0, 0, 0])?;
    let bytes: [u8; 16] = leader.get(0)?;
    let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| i64::from_ne_bytes(*word));
    Ok(word(0).saturating_mul(SECOND).saturating_add(word(8)))
}

fn settime(leader: &mut Remote, id: i32, flags: i32, interval: i64, value: i64) -> Result<(), TraceeError> {
    let spec = [interval / SECOND, interval % SECOND, value / SECOND, value % SECOND];
    let at = leader.put(0, &spec.map(i64::to_ne_bytes).concat())?;
    let args = [id as u64, flags as u64, at, 0, 0, 0];
    leader.call("timer_settime", libc::SYS_timer_settime, args).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "ID: 0\nsignal: 34/00007fff86e452a8\nnotify: signal/tid.2634\nClockID: 1\n\
                        ID: 3\nsignal: 0/0000000000000000\nnotify: none/pid.2633\nClockID: -22\n";

    #[test]
    fn the_kernels_list_is_understood() {
        let timers = parse(TEXT).expect("two timers");
        assert_eq!(
            timers.iter().map(|t| (t.id, t.clock, t.signal)).collect::<Vec<_>>(),
            [(0, 1, 34), (3, -22, 0)]
        );
        assert_eq!(timers[0].value, 0x7fff_86e4_52a8);
        assert_eq!((timers[0].notify, timers[0].thread), (libc::SIGEV_SIGNAL | libc::SIGEV_THREAD_ID, 2634));
        assert_eq!(timers[1].notify, libc::SIGEV_NONE);
        assert!(timers[0].counts_freezes() && !timers[1].counts_freezes());
    }

    #[test]
    fn the_sender_of_a_signal_is_found() {
        let timers = parse(TEXT).expect("two timers");
        let info = |code: i32, id: i32| [34, 0, code, 0, id, 0, 0, 0].map(i32::to_ne_bytes).concat();
        assert_eq!(sender(&timers, &info(SI_TIMER, 0)).map(|timer| timer.id), Some(0));
        assert_eq!(sender(&timers, &info(SI_TIMER, 1)), None);
        assert_eq!(sender(&timers, &info(-1, 0)), None);
        assert_eq!(sender(&timers, &[]), None);
    }

    proptest! {
        /// As the kernel forwards it (`hrtimer_forward`): missed are the whole intervals since the first time.
        #[test]
        fn one_that_was_missed_is_missed_as_often_again_and_due_in_time(
            overruns in 1_i32..1000, interval_ns in 50_000_000_i64..10_000_000_000, part in 0.5_f64..1.0, frozen_ns in 0_i64..1_000_000
        ) {
            let left_ns = (interval_ns as f64 * part) as i64;
            let timer = PosixTimer { overruns, interval_ns, left_ns, ..parse(TEXT).expect("two timers").remove(0) };
            let now = 1 << 50;
            let first = first_due_ns(&timer, now, frozen_ns).expect("it is possible");
            prop_assert_eq!((now - first) / interval_ns, i64::from(overruns));
            prop_assert_eq!(first + (i64::from(overruns) + 1) * interval_ns, now - frozen_ns + left_ns);
            prop_assert_eq!(first_due_ns(&timer, 1, frozen_ns), None);
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,200}") {
            let _ = parse(&text);
        }
    }
}
