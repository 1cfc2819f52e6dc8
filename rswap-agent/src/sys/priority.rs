//! How soon a thread gets a processor.

use std::{io, marker::PhantomData};

/// The calling thread runs before all usual ones, as long as this is there (`SCHED_FIFO`, sched(7)).
///
/// For work of milliseconds that a busy machine must not stretch: nothing else of this class waits behind it.
#[derive(Debug)]
pub struct Hurry {
    policy: i32,
    parameters: libc::sched_param,
    /// It is a thread's own.
    _stays: PhantomData<*const ()>,
}

impl Hurry {
    /// Begins it.
    ///
    /// # Errors
    /// `EPERM`: the agent may not, or its cgroup has no share of real time.
    pub fn begin() -> io::Result<Self> {
        // SAFETY: plain system calls; 0 is the calling thread, and the structure is written before it is read.
        let (policy, parameters) = unsafe {
            let mut parameters: libc::sched_param = std::mem::zeroed();
            super::check(libc::sched_getparam(0, &raw mut parameters).into())?;
            (super::check(libc::sched_getscheduler(0).into())? as i32, parameters)
        };
        set(libc::SCHED_FIFO, &libc::sched_param { sched_priority: 1 })?;
        Ok(Self { policy, parameters, _stays: PhantomData })
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if let Err(error) = set(self.policy, &self.parameters) {
            tracing::error!(%error, "a thread of the agent keeps its real-time priority");
        }
    }
}

fn set(policy: i32, parameters: &libc::sched_param) -> io::Result<()> {
    // SAFETY: a plain system call; the structure is only read.
    super::check(unsafe { libc::sched_setscheduler(0, policy, parameters) }.into()).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> i32 {
        // SAFETY: a plain system call without pointers.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn a_thread_is_what_it_was_when_the_hurry_is_over() {
        let before = policy();
        match Hurry::begin() {
            Ok(hurry) => {
                assert_eq!(policy(), libc::SCHED_FIFO);
                drop(hurry);
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
        }
        assert_eq!(policy(), before);
    }
}
