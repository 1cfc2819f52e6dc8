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
    super::{TraceeError, descriptors, hand::Hand, layout},
    Description, Member, Part, Plan, Target,
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

/// Brings all that `plan` names to `side`, which has all of it open, from `other`, if anything is to be known of that. The instance is held
/// by its cgroup. Processes may be killed all the same: what they had needs nothing.
pub fn apply(plan: &Plan, side: &Side, other: Option<&Side>, hands: &mut Hands) -> Result<(), TraceeError> {
    of_the_living(plan, |plan| once(plan, side, other, hands))
}

/// Does `work` with what living processes have of `plan`, anew as often as one of them is killed meanwhile.
fn of_the_living(
    plan: &Plan,
    mut work: impl FnMut(&Plan) -> Result<(), TraceeError>,
) -> Result<(), TraceeError> {
    let mut plan = plan.clone();
    loop {
        plan.forget_ended();
        match work(&plan) {
            Err(error) if plan.has_ended_one() => tracing::debug!(%error, "a process was killed"),
            done => return done,
        }
    }
}

fn once(plan: &Plan, side: &Side, other: Option<&Side>, hands: &mut Hands) -> Result<(), TraceeError> {
    side.mount(plan, other).map_err(TraceeError::call("mounting a volume in the namespace", plan.init))?;
    for one in &plan.descriptions {
        description(one, side, hands)?;
    }
    for part in &plan.mappings {
        mapping(part, plan, side, hands)?;
    }
    for (pid, target) in &plan.working {
        let directory = side.describe(target, libc::O_PATH | libc::O_DIRECTORY);
        let hand = hand(hands, *pid)?;
        let given = hand.give(&directory.map_err(TraceeError::call("opening a directory", *pid))?)?;
        let done = hand.remote().call("fchdir", libc::SYS_fchdir, [given as u64, 0, 0, 0, 0, 0]);
        hand.close(given)?;
        done?;
    }
    set_again(plan, hands)?;
    verify(plan, side)?;
    Side::forget_aside(plan).map_err(TraceeError::call("unmounting a volume in the namespace", plan.init))
}

/// Sets what descriptors and mappings lose when they are made anew, and must have: locks, and advice. What is set already stays as it is. Behind
/// all the rest: a process that closes any descriptor of a file, one that it was given for a mapping as well, loses all its own locks on it.
pub fn renew(plan: &Plan, hands: &mut Hands) -> Result<(), TraceeError> {
    of_the_living(plan, |plan| set_again(plan, hands))
}

fn set_again(plan: &Plan, hands: &mut Hands) -> Result<(), TraceeError> {
    for one in &plan.descriptions {
        let first = one.members.first().into_iter();
        let of_all = first.flat_map(|first| one.locks.iter().map(move |lock| (first, lock)));
        let members = one.members.iter();
        let of_each = members.flat_map(|member| member.locks.iter().map(move |lock| (member, lock)));
        for (member, lock) in of_all.chain(of_each) {
            descriptors::set_here(hand(hands, member.pid)?.remote(), member.fd, *lock)?;
        }
    }
    for part in &plan.mappings {
        let Part { pid, start, end, .. } = *part;
        for advice in &part.advice {
            let args = [start, end - start, *advice as u64, 0, 0, 0];
            hand(hands, pid)?.remote().call("madvise", libc::SYS_madvise, args)?;
        }
    }
    match unlocked(plan)? {
        Some(what) => Err(TraceeError::Unsupported(format!("a lock of {what} could not be set"))),
        None => Ok(()),
    }
}

/// The first descriptor without a lock that it must have.
fn unlocked(plan: &Plan) -> Result<Option<String>, TraceeError> {
    for one in &plan.descriptions {
        for Member { pid, fd, locks, .. } in &one.members {
            if one.locks.is_empty() && locks.is_empty() {
                continue;
            }
            let path = format!("/proc/{pid}/fdinfo/{fd}");
            let text = fs::read_to_string(&path).map_err(TraceeError::proc(path))?;
            let found = descriptors::of_fdinfo(&text)
                .map_err(|(what, reason)| TraceeError::Unsupported(format!("{what}: {reason}")))?;
            if one.locks.iter().chain(locks).any(|lock| !found.contains(lock)) {
                return Ok(Some(format!("descriptor {fd} of process {pid}")));
            }
        }
    }
    Ok(None)
}

/// Whether all that `plan` names is still on `side`, on which it was found, and no mount of the other copy is left. The other copy is not
/// looked at: it may be on a disk that has failed. The instance is held by its cgroup.
pub fn stays(plan: &Plan, side: &Side) -> Result<bool, TraceeError> {
    let mut plan = plan.clone();
    plan.forget_ended();
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
    let pid = part.pid;
    let failed = |what| TraceeError::call(what, pid);
    if is_mapped(part, plan, side.inode(&part.target).map_err(failed("looking at a file"))?)? {
        return Ok(());
    }
    let access = if part.shared && part.may_write { libc::O_RDWR } else { libc::O_RDONLY };
    // To map a file is to read it. Where its time of reading is noted, the process would wait for the disk, with its memory locked.
    let flags = access | libc::O_NOATIME;
    let file: File = side.describe(&part.target, flags).map_err(failed("opening a mapped file"))?;
    let hand = hand(hands, pid)?;
    let given = hand.give(&file)?;
    let done = map(part, hand, given);
    hand.close(given)?;
    done
}

/// Puts a part of the file that a process has as `given` to the part's place.
fn map(part: &Part, hand: &mut Hand, given: RawFd) -> Result<(), TraceeError> {
    let Part { start, end, offset, protection, .. } = *part;
    let (bytes, protection, given) = (end - start, protection as u64, given as u64);
    if part.shared {
        let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
        let args = [start, bytes, protection, flags, given, offset];
        return hand.remote().call("mmap", libc::SYS_mmap, args).map(drop);
    }
    // Made elsewhere, with the pages that the program has written, and put to its place in one step.
    let flags = libc::MAP_PRIVATE as u64;
    let made = hand.remote().call("mmap", libc::SYS_mmap, [0, bytes, protection, flags, given, offset])?;
    let put = copy_written(hand.remote().tid(), start, end, made).and_then(|()| {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        hand.remote().call("mremap", libc::SYS_mremap, [made, bytes, bytes, flags, start, 0])
    });
    if put.is_err() {
        hand.remote().call("munmap", libc::SYS_munmap, [made, bytes, 0, 0, 0, 0])?;
    }
    put.map(drop)
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
