//! Brings all that refers to a directory to one of its copies.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{
        fd::{OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

use super::{
    super::{TraceeError, descriptors, hand::Hand, layout, tree},
    Description, Part, Plan, Target,
    side::Side,
};
use crate::sys::{
    mem::{self, ForcedMemory, RemoteAddr},
    pagemap::{Pagemap, Query, category},
    process,
};

/// Bytes of a private mapping that are copied at once.
const CHUNK: u64 = 256 << 10;

/// The tasks that make calls, by process.
pub type Hands = BTreeMap<i32, Hand>;

/// Brings all that `plan` names to `side`, which has all of it open, from `other`. The instance is held by its cgroup. Processes
/// may be killed all the same: what they had needs nothing.
pub fn apply(plan: &Plan, side: &Side, other: &Side, hands: &mut Hands) -> Result<(), TraceeError> {
    let mut plan = plan.clone();
    loop {
        let ended = |plan: &Plan| plan.processes().into_iter().find(|pid| tree::has_ended(*pid));
        while let Some(pid) = ended(&plan) {
            plan.forget(pid);
        }
        match once(&plan, side, other, hands) {
            Err(error) if ended(&plan).is_some() => tracing::debug!(%error, "a process was killed"),
            done => return done,
        }
    }
}

fn once(plan: &Plan, side: &Side, other: &Side, hands: &mut Hands) -> Result<(), TraceeError> {
    side.mount(plan, other).map_err(TraceeError::call("mounting a volume in the namespace", plan.init))?;
    for one in &plan.descriptions {
        description(one, side, hands)?;
    }
    // Only now: a process that closes any descriptor of a file loses all its locks on it.
    for one in &plan.descriptions {
        for member in one.members.iter().filter(|member| !member.locks.is_empty()) {
            let hand = hand(hands, member.pid)?;
            for lock in &member.locks {
                descriptors::set_here(hand.remote(), member.fd, *lock)?;
            }
        }
    }
    for part in &plan.mappings {
        mapping(part, plan, side, hands)?;
    }
    for (pid, target) in &plan.working {
        let directory = side.describe(target, libc::O_PATH | libc::O_DIRECTORY);
        let hand = hand(hands, *pid)?;
        let given = hand.give(&directory.map_err(TraceeError::call("opening a directory", *pid))?)?;
        hand.remote().call("fchdir", libc::SYS_fchdir, [given as u64, 0, 0, 0, 0, 0])?;
        hand.close(given)?;
    }
    verify(plan, side)?;
    other.forget_mount(plan).map_err(TraceeError::call("unmounting a volume in the namespace", plan.init))
}

/// Whether all that `plan` names is still on `side`, on which it was found, and no mount of the other copy is left. The other copy is not
/// looked at: it may be on a disk that has failed. The instance is held by its cgroup.
pub fn stays(plan: &Plan, side: &Side) -> Result<bool, TraceeError> {
    let mut plan = plan.clone();
    for pid in plan.processes().into_iter().filter(|pid| tree::has_ended(*pid)) {
        plan.forget(pid);
    }
    let failed = || TraceeError::call("looking at a mount", plan.init);
    if Side::any_is_aside(&plan).map_err(failed())? {
        return Ok(false);
    }
    let misplaced = misplaced(&plan, side, &|target| side.original(&plan, target))?;
    Ok(misplaced.is_none())
}

/// Whether all that `plan` names is on `side`.
pub fn verify(plan: &Plan, side: &Side) -> Result<(), TraceeError> {
    match misplaced(plan, side, &|target| side.inode(target))? {
        Some(what) => Err(TraceeError::Unsupported(format!("{what} is not on the other copy"))),
        None => Ok(()),
    }
}

/// The first of what `plan` names that is not on `side`, where `inode` tells which file is which.
fn misplaced(
    plan: &Plan,
    side: &Side,
    inode: &dyn Fn(&Target) -> io::Result<(u64, u64)>,
) -> Result<Option<String>, TraceeError> {
    let inode = |target: &Target| inode(target).map_err(TraceeError::call("looking at a file", plan.init));
    if !side.is_mounted(plan).map_err(TraceeError::call("looking at a mount", plan.init))? {
        return Ok(Some(format!("what is mounted at {}", plan.point.display())));
    }
    for one in &plan.descriptions {
        let wanted = inode(&one.target)?;
        for member in &one.members {
            let failed = TraceeError::call("looking at a descriptor", member.pid);
            if !side.is_of(wanted, member.pid, member.fd).map_err(failed)? {
                return Ok(Some(format!("descriptor {} of process {}", member.fd, member.pid)));
            }
        }
    }
    for part in &plan.mappings {
        if !is_mapped(part, plan, inode(&part.target)?)? {
            return Ok(Some(format!("the mapping at {:#x} of process {}", part.start, part.pid)));
        }
    }
    for (pid, target) in &plan.working {
        let path = format!("/proc/{pid}/cwd");
        let found = fs::metadata(&path).map_err(TraceeError::proc(path))?;
        if (found.dev(), found.ino()) != inode(target)? {
            return Ok(Some(format!("the working directory of process {pid}")));
        }
    }
    Ok(None)
}

fn hand(hands: &mut Hands, pid: i32) -> Result<&mut Hand, TraceeError> {
    hands.get_mut(&pid).ok_or(TraceeError::Gone(pid))
}

fn description(one: &Description, side: &Side, hands: &mut Hands) -> Result<(), TraceeError> {
    let Some(first) = one.members.first() else { return Ok(()) };
    let failed = |what| TraceeError::call(what, first.pid);
    let mut there = Vec::new();
    for member in &one.members {
        let has = side.has(&one.target, member.pid, member.fd);
        there.push(has.map_err(failed("looking at a descriptor"))?);
    }
    // All that are there share one: whoever made the first gave it to the others.
    let made: OwnedFd = match there.iter().position(|there| *there) {
        Some(at) => {
            let pidfd = process::pidfd_open(one.members[at].pid).map_err(failed("pidfd_open"))?;
            process::pidfd_getfd(&pidfd, one.members[at].fd).map_err(failed("pidfd_getfd"))?
        }
        None => {
            let made = side.describe(&one.target, one.flags).map_err(failed("opening a file of a volume"))?;
            if one.flags & libc::O_PATH == 0 && one.position != 0 {
                rustix::fs::seek(&made, rustix::fs::SeekFrom::Start(one.position as u64))
                    .map_err(|error| failed("lseek")(error.into()))?;
            }
            made.into()
        }
    };
    for (member, _) in one.members.iter().zip(there).filter(|(_, there)| !there) {
        let hand = hand(hands, member.pid)?;
        let given = hand.give(&made)?;
        let flags = if member.close_on_exec { libc::O_CLOEXEC } else { 0 };
        let args = [given as u64, member.fd as u64, flags as u64, 0, 0, 0];
        let done = hand.remote().call("dup3", libc::SYS_dup3, args);
        hand.close(given)?;
        done?;
    }
    for lock in &one.locks {
        descriptors::set_here(hand(hands, first.pid)?.remote(), first.fd, *lock)?;
    }
    Ok(())
}

/// Whether nothing but the file `wanted` is mapped in a part, by what is mounted at `plan`'s point.
fn is_mapped(part: &Part, plan: &Plan, wanted: (u64, u64)) -> Result<bool, TraceeError> {
    let mut at = part.start;
    for mapping in
        layout::read_mappings(part.pid)?.iter().filter(|m| m.start < part.end && m.end > part.start)
    {
        let path = format!("/proc/{}/map_files/{:x}-{:x}", part.pid, mapping.start, mapping.end);
        let Ok(found) = fs::metadata(&path) else { return Ok(false) };
        let offset = mapping.offset.wrapping_add(part.start.wrapping_sub(mapping.start));
        let attached = Path::new(&mapping.name).starts_with(&plan.point);
        if mapping.start > at || !attached || (found.dev(), found.ino()) != wanted || offset != part.offset {
            return Ok(false);
        }
        at = mapping.end;
    }
    Ok(at >= part.end)
}

fn mapping(part: &Part, plan: &Plan, side: &Side, hands: &mut Hands) -> Result<(), TraceeError> {
    let Part { pid, start, end, offset, protection, .. } = *part;
    let failed = |what| TraceeError::call(what, pid);
    if is_mapped(part, plan, side.inode(&part.target).map_err(failed("looking at a file"))?)? {
        return Ok(());
    }
    let access = if part.shared && part.may_write { libc::O_RDWR } else { libc::O_RDONLY };
    let file: File = side.describe(&part.target, access).map_err(failed("opening a mapped file"))?;
    let hand = hand(hands, pid)?;
    let given = hand.give(&file)? as u64;
    let bytes = end - start;
    let protection = protection as u64;
    let done = if part.shared {
        let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
        hand.remote().call("mmap", libc::SYS_mmap, [start, bytes, protection, flags, given, offset])
    } else {
        // Made elsewhere, with the pages that the program has written, and put to its place in one step.
        let flags = libc::MAP_PRIVATE as u64;
        let made =
            hand.remote().call("mmap", libc::SYS_mmap, [0, bytes, protection, flags, given, offset])?;
        copy_written(hand.remote().tid(), start, end, made)?;
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        hand.remote().call("mremap", libc::SYS_mremap, [made, bytes, bytes, flags, start, 0])
    };
    hand.close(given as RawFd)?;
    done?;
    for advice in &part.advice {
        hand.remote().call("madvise", libc::SYS_madvise, [start, bytes, *advice as u64, 0, 0, 0])?;
    }
    Ok(())
}

/// Copies the pages of a private mapping that are no longer the file's. `pid`: a task that this thread traces.
fn copy_written(pid: i32, start: u64, end: u64, to: u64) -> Result<(), TraceeError> {
    let failed = |what| TraceeError::call(what, pid);
    let mut written = Vec::new();
    // Present or swapped, and not the file's.
    let query = Query {
        inverted: category::FILE,
        all_of: category::FILE,
        any_of: category::PRESENT | category::SWAPPED,
        report: category::FILE,
    };
    let mut pagemap = Pagemap::open(pid).map_err(failed("opening the page map"))?;
    pagemap.scan(start, end, query, &mut written).map_err(failed("PAGEMAP_SCAN"))?;
    let memory = ForcedMemory::open(pid).map_err(failed("opening the memory"))?;
    for region in written {
        let mut at = region.start.max(start);
        while at < region.end.min(end) {
            let mut page = vec![0; CHUNK.min(region.end.min(end) - at) as usize];
            if mem::read_exact(pid, RemoteAddr(at), &mut page).is_err() {
                // The program itself may not read it.
                memory.read_exact(RemoteAddr(at), &mut page).map_err(failed("reading a mapping"))?;
            }
            memory.write(RemoteAddr(to + (at - start)), &page).map_err(failed("writing a mapping"))?;
            at += page.len() as u64;
        }
    }
    Ok(())
}
