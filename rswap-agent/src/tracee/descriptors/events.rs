//! eventfd, timerfd and signalfd.

use std::{fs, io::Write, os::fd::RawFd};

use super::{
    super::{TraceeError, image::DescriptorKind, remote::Remote},
    Look,
    info::{Info, Kind},
};
use crate::sys::timer::{self, TimerSpec};

const TFD_TIMER_ABSTIME: i32 = 1;
/// Clocks that somebody may set, so that a time on them is not a time from now.
const SETTABLE: [i32; 2] = [libc::CLOCK_REALTIME, libc::CLOCK_REALTIME_ALARM];

/// eventfd(2).
pub(super) fn describe_event(info: &Info) -> Kind {
    match info.number("eventfd-count:", 16) {
        Some(count) => {
            Ok(DescriptorKind::Event { count, semaphore: info.number("eventfd-semaphore:", 10) == Some(1) })
        }
        None => Err((info.target.clone(), "the kernel doesn't tell its count")),
    }
}

/// signalfd(2).
pub(super) fn describe_signal(info: &Info) -> Kind {
    match info.number("sigmask:", 16) {
        Some(mask) => Ok(DescriptorKind::Signal { mask }),
        None => Err((info.target.clone(), "the kernel doesn't tell its signals")),
    }
}

/// timerfd_create(2).
pub(super) fn describe_timer(info: &Info, look: &Look<'_>) -> Result<Kind, TraceeError> {
    let left = timer::remaining(&look.ours()?).map_err(TraceeError::call("timerfd_gettime", look.pid))?;
    // Asking may have counted expirations: what the kernel tells of them is read afterwards.
    let now = Info::read(look.pid, look.fd)?;
    let told = now.and_then(|now| {
        let flags = now.number("settime flags:", 8)? as i32;
        Some((now.number("clockid:", 10)? as i32, flags, now.number("ticks:", 10)?))
    });
    Ok(match told {
        Some((clock, flags, ticks)) if SETTABLE.contains(&clock) && flags & TFD_TIMER_ABSTIME != 0 => {
            let spec = timer::at_a_time(left).map_err(TraceeError::call("clock_gettime", look.pid))?;
            Ok(DescriptorKind::Timer { clock, spec, flags, ticks })
        }
        Some((clock, _, ticks)) => Ok(DescriptorKind::Timer { clock, spec: left, flags: 0, ticks }),
        None => Err((info.target.clone(), "the kernel doesn't tell its clock")),
    })
}

/// Makes an eventfd.
pub(super) fn make_event(remote: &mut Remote, count: u64, semaphore: bool) -> Result<RawFd, TraceeError> {
    let flags = if semaphore { libc::EFD_SEMAPHORE } else { 0 } as u64;
    // The initial count of eventfd2 has 32 bits; the rest is added by a write.
    let made = remote.call("eventfd2", libc::SYS_eventfd2, [0, flags, 0, 0, 0, 0])? as RawFd;
    if count > 0 {
        fs::File::from(remote.share_descriptor(made)?)
            .write_all(&count.to_ne_bytes())
            .map_err(TraceeError::call("setting an eventfd", remote.tid()))?;
    }
    Ok(made)
}

/// Makes a signalfd.
pub(super) fn make_signal(remote: &mut Remote, mask: u64) -> Result<RawFd, TraceeError> {
    let at = remote.put(0, &mask.to_ne_bytes())?;
    let made = remote.call("signalfd4", libc::SYS_signalfd4, [!0, at, 8, 0, 0, 0])?;
    Ok(made as RawFd)
}

/// Makes a timerfd.
pub(super) fn make_timer(
    remote: &mut Remote,
    clock: i32,
    (spec, flags): (&TimerSpec, i32),
    ticks: u64,
) -> Result<RawFd, TraceeError> {
    let made = remote.call("timerfd_create", libc::SYS_timerfd_create, [clock as u64, 0, 0, 0, 0, 0])?;
    let at = remote.put(0, &spec.map(i64::to_ne_bytes).concat())?;
    remote.call("timerfd_settime", libc::SYS_timerfd_settime, [made, flags as u64, at, 0, 0, 0])?;
    if ticks > 0 {
        let what = "setting a timer's expirations (CONFIG_CHECKPOINT_RESTORE)";
        timer::set_ticks(&remote.share_descriptor(made as RawFd)?, ticks)
            .map_err(TraceeError::call(what, remote.tid()))?;
    }
    Ok(made as RawFd)
}
