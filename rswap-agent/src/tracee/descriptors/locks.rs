//! Locks on files: flock(2)'s and those of fcntl(2), of processes and of descriptions. The program never runs without
//! a lock that it holds.
//!
//! Where both hosts have the same file under the same kernel, the source's own lock is in the way until it gives it up, right
//! after the commit. Such locks of descriptions are set after that, before the first thread runs. A process's own could be set
//! by nobody but the process, which stands still then: an exclusive one that is in the way ends the migration before the commit.

use std::{
    fs, io,
    os::fd::{OwnedFd, RawFd},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::super::{TraceeError, remote::Remote};
use crate::sys::{lock, process};

/// How long the source may take to give up its locks once it is committed. It has done so before it says that it is.
const DEFERRED_LIMIT: Duration = Duration::from_millis(500);

/// Whose a lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    /// flock(2): the description's, for the whole file.
    Whole,
    /// `F_SETLK`: the process's.
    Process,
    /// `F_OFD_SETLK`: the description's.
    Description,
}

/// One lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// Whose it is.
    pub kind: LockKind,
    /// Nobody else may have one; else others may read.
    pub exclusive: bool,
    /// First byte.
    pub start: i64,
    /// Length in bytes; 0 to the end of the file, wherever that will be.
    pub len: i64,
}

/// The locks that fdinfo tells of, each with the file that it is on, as the kernel names it; or what can't be carried.
///
/// A line is `lock:\t1: FLOCK  ADVISORY  WRITE 71 fe:01:4242 0 EOF`.
pub(super) fn parse(text: &str) -> Result<Vec<(Lock, String)>, (String, &'static str)> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("lock:"));
    lines.map(|line| one(line).ok_or_else(|| refuse(line))).collect()
}

fn one(line: &str) -> Option<(Lock, String)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, kind, _, mode, _, file, start, end] = words[..] else { return None };
    let kind = match kind {
        "FLOCK" => LockKind::Whole,
        "POSIX" => LockKind::Process,
        "OFDLCK" => LockKind::Description,
        _ => return None,
    };
    let exclusive = match mode {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let start: i64 = start.parse().ok()?;
    let len = match end {
        "EOF" => 0,
        end => end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some((Lock { kind, exclusive, start, len }, file.to_owned()))
}

fn refuse(line: &str) -> (String, &'static str) {
    match line.contains("LEASE") || line.contains("DELEG") {
        true => ("a file with a lease".into(), "leases aren't carried in this version: give it up"),
        false => (
            format!("a file with a lock of an unknown kind ({})", line.trim()),
            "not carried in this version",
        ),
    }
}

/// Whether somebody waits for a lock on `file`, as [`parse`] names it. Of a frozen instance nobody does.
pub(super) fn is_waited_for(file: &str) -> Result<bool, TraceeError> {
    let path = "/proc/locks";
    let text = fs::read_to_string(path).map_err(TraceeError::proc(path))?;
    Ok(text.lines().any(|line| line.contains(" -> ") && line.split_whitespace().any(|word| word == file)))
}

/// A description's lock that could not be had before the commit, with our duplicate of a descriptor of it.
#[derive(Debug)]
pub(super) struct Deferred {
    ours: OwnedFd,
    lock: Lock,
}

/// Sets `lock` on descriptor `fd` of the stub. With `may_wait`, a description's that is taken is returned, to be tried again.
pub(super) fn set(
    remote: &mut Remote,
    fd: RawFd,
    lock: Lock,
    may_wait: bool,
) -> Result<Option<Deferred>, TraceeError> {
    let taken = |who| TraceeError::Unsupported(format!("the file of descriptor {fd} is locked by {who}"));
    if lock.kind == LockKind::Process {
        return match set_of_process(remote, fd, lock) {
            Err(error) if is_taken(&error) && may_wait => Err(taken(
                "its process at the source, which both hosts see: an exclusive lock of a process (F_SETLK) can't be \
                 carried on a file that the hosts share: try again when it is given up, or put the file into a volume",
            )),
            Err(error) if is_taken(&error) => Err(taken("somebody else at the destination")),
            done => done.map(|()| None),
        };
    }
    let ours = remote.share_descriptor(fd)?;
    match apply(&ours, lock, Some(lock.exclusive)) {
        Ok(()) => Ok(None),
        Err(error) if is_lock_taken(&error) && may_wait => Ok(Some(Deferred { ours, lock })),
        Err(error) if is_lock_taken(&error) => Err(taken("somebody else at the destination")),
        Err(error) => Err(TraceeError::call("locking a file", remote.tid())(error)),
    }
}

/// Gives up `lock` of descriptor `fd` of process `pid`, which never runs again. A process's own goes with it.
pub fn give_up(pid: i32, fd: RawFd, lock: Lock) -> Result<(), TraceeError> {
    if lock.kind == LockKind::Process {
        return Ok(());
    }
    let pidfd = process::pidfd_open(pid).map_err(TraceeError::call("pidfd_open", pid))?;
    let ours = process::pidfd_getfd(&pidfd, fd).map_err(TraceeError::call("pidfd_getfd", pid))?;
    apply(&ours, lock, None).map_err(TraceeError::call("giving a lock up", pid))
}

impl Deferred {
    /// Sets it, now that the source is committed.
    pub(super) fn set(&self) -> io::Result<()> {
        let deadline = Instant::now() + DEFERRED_LIMIT;
        loop {
            match apply(&self.ours, self.lock, Some(self.lock.exclusive)) {
                Err(error) if is_lock_taken(&error) && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                done => return done,
            }
        }
    }
}

/// The locks that a descriptor's fdinfo tells of, or what can't be set again.
pub fn of_fdinfo(text: &str) -> Result<Vec<Lock>, (String, &'static str)> {
    Ok(parse(text)?.into_iter().map(|(lock, _)| lock).collect())
}

/// Sets `lock` by descriptor `fd` of the process that `remote` makes calls in; a lock that it has already stays.
pub fn set_here(remote: &mut Remote, fd: RawFd, lock: Lock) -> Result<(), TraceeError> {
    if lock.kind == LockKind::Process {
        return set_of_process(remote, fd, lock);
    }
    let ours = remote.share_descriptor(fd)?;
    apply(&ours, lock, Some(lock.exclusive)).map_err(TraceeError::call("locking a file", remote.tid()))
}

fn is_lock_taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

fn is_taken(error: &TraceeError) -> bool {
    matches!(error, TraceeError::Remote { source, .. } if is_lock_taken(source))
}

/// Sets a description's lock through a duplicate, or gives it up.
fn apply(ours: &OwnedFd, lock: Lock, exclusive: Option<bool>) -> io::Result<()> {
    match lock.kind {
        LockKind::Whole => lock::flock(ours, exclusive),
        _ => lock::set_description_lock(ours, exclusive, lock.start, lock.len),
    }
}

/// Sets a process's lock: only the process itself can have one.
fn set_of_process(remote: &mut Remote, fd: RawFd, lock: Lock) -> Result<(), TraceeError> {
    // `struct flock`: l_type, l_whence (0: from the start), l_start, l_len, l_pid.
    let mut bytes = [0; 32];
    bytes[..2].copy_from_slice(&lock::kind(Some(lock.exclusive)).to_ne_bytes());
    bytes[8..16].copy_from_slice(&lock.start.to_ne_bytes());
    bytes[16..24].copy_from_slice(&lock.len.to_ne_bytes());
    let at = remote.put(0, &bytes)?;
    remote.call("fcntl(F_SETLK)", libc::SYS_fcntl, [fd as u64, libc::F_SETLK as u64, at, 0, 0, 0]).map(|_| ())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "pos:\t0\nflags:\t0100002\nlock:\t1: FLOCK  ADVISORY  WRITE 71 fe:01:4242 0 EOF\n\
                        lock:\t2: POSIX  ADVISORY  READ 71 fe:01:4242 100 199\nlock:\t3: OFDLCK ADVISORY  WRITE -1 fe:01:4242 7 EOF\n";

    #[test]
    fn locks_of_all_kinds_are_read() {
        let lock =
            |kind, exclusive, start, len| (Lock { kind, exclusive, start, len }, "fe:01:4242".to_owned());
        let wanted = vec![
            lock(LockKind::Whole, true, 0, 0),
            lock(LockKind::Process, false, 100, 100),
            lock(LockKind::Description, true, 7, 0),
        ];
        assert_eq!(parse(TEXT), Ok(wanted));
    }

    #[test]
    fn a_lease_is_refused_by_its_name() {
        let refused = parse("lock:\t1: LEASE  ACTIVE    READ 71 fe:01:4242 0 EOF\n");
        assert!(refused.is_err_and(|(what, _)| what == "a file with a lease"));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,120}") {
            let _ = parse(&format!("lock:{text}"));
        }
    }
}
