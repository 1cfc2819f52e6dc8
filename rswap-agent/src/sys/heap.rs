//! The agent's own heap: how much of what it has freed goes back to the kernel (glibc's mallopt(3), malloc_trim(3)).

use std::io;

/// Threads share this many arenas at most.
///
/// By default glibc makes eight per processor, and each keeps the pages that its busiest moment needed. The agent's threads
/// come and go with moves and spend their time in system calls, not in the allocator.
const ARENAS: libc::c_int = 1;

/// What is larger, in bytes, is mapped by itself, and goes back to the kernel at once when it is freed.
///
/// By default glibc raises this to the largest that was ever freed (up to 32 MiB), and keeps twice as much at the end of the heap:
/// what the forecaster's state needs for a moment, once a minute, would stay for good. Buffers of moves are smaller (1 MiB): to
/// map these anew each time would cost more than it saves.
const MAPPED_FROM: libc::c_int = 4 << 20;
/// So much may lie free at the end of the heap, in bytes, before it goes back to the kernel: a window's work.
const FREE_AT_THE_END: libc::c_int = 4 << 20;

/// Limits how many arenas the heap has, and what it keeps of what was freed. To be called before there are threads.
///
/// # Errors
/// The allocator refuses it. On another C library than glibc there is nothing to limit.
pub fn limit() -> io::Result<()> {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS),
        (libc::M_MMAP_THRESHOLD, MAPPED_FROM),
        (libc::M_TRIM_THRESHOLD, FREE_AT_THE_END),
    ] {
        // SAFETY: mallopt takes two numbers and has no memory of ours.
        if unsafe { libc::mallopt(parameter, value) } == 0 {
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
