//! Timer descriptors (timerfd) of other processes, through a duplicate.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::time::{ClockId, clock_gettime};

const NS_PER_S: i64 = 1_000_000_000;

/// `struct itimerspec`: interval and time left, in seconds and nanoseconds.
pub type TimerSpec = [i64; 4];

/// `_IOW('T', 0, u64)` (include/uapi/linux/timerfd.h).
const TFD_IOC_SET_TICKS: libc::c_ulong = (1 << 30) | (8 << 16) | (0x54 << 8);

/// Interval and time left.
///
/// Unlike `/proc/PID/fdinfo` this is also right for a periodic timer that has expired and was not read: the kernel
/// arms that one again only when somebody asks. For the program nothing changes by it.
pub fn remaining(timer: &OwnedFd) -> io::Result<TimerSpec> {
    // SAFETY: the struct is plain numbers, for which all zeros is a value.
    let mut spec: libc::itimerspec = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `itimerspec` to the local.
    super::check(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &mut spec) }.into())?;
    Ok([spec.it_interval.tv_sec, spec.it_interval.tv_nsec, spec.it_value.tv_sec, spec.it_value.tv_nsec])
}

/// What [`remaining`] told just now, as a time on CLOCK_REALTIME: never before the timer's own. One that is not armed stays so.
pub fn at_a_time(left: TimerSpec) -> io::Result<TimerSpec> {
    let [every, every_ns, seconds, nanoseconds] = left;
    if (seconds, nanoseconds) == (0, 0) {
        return Ok(left);
    }
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    let ns = nanoseconds + now.tv_nsec();
    let whole = seconds.saturating_add(now.tv_sec()).saturating_add(ns / NS_PER_S);
    Ok([every, every_ns, whole, ns % NS_PER_S])
}

/// Sets the number of expirations that the next read will return.
///
/// # Errors
/// `ENOTTY` from a kernel without `CONFIG_CHECKPOINT_RESTORE`.
pub fn set_ticks(timer: &OwnedFd, ticks: u64) -> io::Result<()> {
    // SAFETY: the ioctl has no safe wrapper; the kernel reads one u64, which outlives the call.
    super::check(unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &ticks) }.into()).map(|_| ())
}
