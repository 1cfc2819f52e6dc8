//! Work that has to be done in another process's namespaces.

use std::{fs::File, io, os::fd::AsFd};

use nix::sched::{CloneFlags, setns, unshare};

/// Does `work` on a thread of its own that has entered the namespaces `kinds` (names as in `/proc/PID/ns`) of process `pid`,
/// and ends with it.
///
/// # Errors
/// When a namespace can't be entered, or when `work` fails.
pub fn inside<T: Send>(
    pid: i32,
    kinds: &[&str],
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let open = |kind: &&str| File::open(format!("/proc/{pid}/ns/{kind}"));
    let files = kinds.iter().map(open).collect::<io::Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            // A mount namespace is entered by who shares root and working directory with nobody.
            if kinds.contains(&"mnt") {
                unshare(CloneFlags::CLONE_FS)?;
            }
            // The kernel knows by the file which kind it is.
            files.iter().try_for_each(|file| setns(file.as_fd(), CloneFlags::empty()))?;
            work()
        });
        entered.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespaces has panicked")))
    })
}
