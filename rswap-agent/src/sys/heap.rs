//! The agent's own heap: how much of what it has freed goes back to the kernel (glibc's mallopt(3), malloc_trim(3)).

use std::io;

/// Threads share this many arenas at most.
///
/// By default glibc makes eight per processor, and each keeps the pages that its busiest moment needed. The agent's threads
/// come and go with moves and spend their time in system calls, not in the allocator.
const ARENAS: libc::c_int = 1;

/// Limits how many arenas the heap has. To be called before there are threads.
///
/// # Errors
/// The allocator refuses it. On another C library than glibc there is nothing to limit.
pub fn limit_arenas() -> io::Result<()> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt takes two numbers and has no memory of ours.
        if unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) } == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
    }
    Ok(())
}

/// When this is dropped, whole pages of freed memory go back to the kernel.
///
/// For the end of work that needs much for a moment: what is freed below something that stays would otherwise be kept for good.
#[derive(Debug)]
pub struct GiveBack;

impl Drop for GiveBack {
    fn drop(&mut self) {
        #[cfg(target_env = "gnu")]
        // SAFETY: it takes a number, and touches only what is free. That nothing could be given back is no failure.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}
