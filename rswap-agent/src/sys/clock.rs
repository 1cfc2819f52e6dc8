//! Clocks, and the offsets that a time namespace gives them (time_namespaces(7)).

use std::{fs, io, time::Duration};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Time that this thread has spent on a CPU; 0 where the kernel does not tell.
pub fn thread_cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// A value for each of the two clocks that a time namespace shifts, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// `CLOCK_MONOTONIC`.
    pub monotonic_ns: i64,
    /// `CLOCK_BOOTTIME`.
    pub boottime_ns: i64,
}

impl Clocks {
    /// The kernel's own clocks, whatever time namespace this process is in.
    pub fn of_this_kernel() -> io::Result<Self> {
        let read = |clock| -> io::Result<i64> {
            let now = clock_gettime(clock)?;
            Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
        };
        let seen = Self {
            monotonic_ns: read(ClockId::CLOCK_MONOTONIC)?,
            boottime_ns: read(ClockId::CLOCK_BOOTTIME)?,
        };
        Ok(seen.minus(Self::offsets_of("self")?))
    }

    /// By how much the clocks of `process` (a pid, or `self`) are ahead of the kernel's; 0 without time namespaces.
    pub fn offsets_of(process: impl std::fmt::Display) -> io::Result<Self> {
        let text = match fs::read_to_string(format!("/proc/{process}/timens_offsets")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text?,
        };
        parse(&text).ok_or_else(|| io::Error::other(format!("not offsets of clocks: {text:?}")))
    }

    /// Clock by clock.
    pub fn plus(self, other: Self) -> Self {
        Self {
            monotonic_ns: self.monotonic_ns.saturating_add(other.monotonic_ns),
            boottime_ns: self.boottime_ns.saturating_add(other.boottime_ns),
        }
    }

    /// Clock by clock.
    pub fn minus(self, other: Self) -> Self {
        Self {
            monotonic_ns: self.monotonic_ns.saturating_sub(other.monotonic_ns),
            boottime_ns: self.boottime_ns.saturating_sub(other.boottime_ns),
        }
    }

    /// Makes a time namespace with these offsets. The children of this process will be in it, not the process itself.
    ///
    /// # Errors
    /// `EINVAL` from a kernel without `CONFIG_TIME_NS`, `EPERM` without `CAP_SYS_TIME`.
    pub fn make_namespace(self) -> io::Result<()> {
        // SAFETY: a plain system call without pointers.
        super::check(unsafe { libc::unshare(libc::CLONE_NEWTIME) }.into())?;
        let line = |name: &str, ns: i64| {
            format!("{name} {} {}\n", ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000))
        };
        let offsets = [line("monotonic", self.monotonic_ns), line("boottime", self.boottime_ns)].concat();
        fs::write("/proc/self/timens_offsets", offsets)
    }
}

/// Lines such as `monotonic           3    500000000`: seconds and nanoseconds.
fn parse(text: &str) -> Option<Clocks> {
    let mut found = Clocks::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let (s, ns) = (words.next()?.parse::<i64>().ok()?, words.next()?.parse::<i64>().ok()?);
        let total = s.checked_mul(1_000_000_000)?.checked_add(ns)?;
        match name {
            "monotonic" => found.monotonic_ns = total,
            "boottime" => found.boottime_ns = total,
            _ => {}
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_read_as_the_kernel_writes_them() {
        let text = "monotonic          -2     500000000\nboottime            7             0\n";
        let wanted = Clocks { monotonic_ns: -1_500_000_000, boottime_ns: 7_000_000_000 };
        assert_eq!(parse(text), Some(wanted));
        assert_eq!(parse("monotonic x y\n"), None);
        assert_eq!(parse("monotonic 9223372036854775807 1\n"), None);
    }

    #[test]
    fn this_processes_clocks_can_be_read() {
        let here = Clocks::of_this_kernel().expect("clocks");
        assert!(here.monotonic_ns > 0 && here.boottime_ns >= here.monotonic_ns);
    }
}
