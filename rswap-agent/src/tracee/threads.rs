//! A process's threads, made again with their ids and tables.

use std::{collections::BTreeSet, os::fd::RawFd};

use super::{
    TraceeError,
    descriptors::Restorer,
    image::{TaskImage, ThreadImage},
    reconnect::Reconnected,
    remote::Remote,
    stopped::list_threads,
    tables::{self, Table},
};
use crate::sys::{
    process::Common,
    ptrace::{self, Stop},
    spawn::CloneArgs,
};

/// A table that a thread can have by itself, and what clone(2) shares it by.
const TABLES: [(Common, i32); 2] =
    [(Common::Descriptors, libc::CLONE_FILES), (Common::Directories, libc::CLONE_FS)];

/// Which thread's table that is, by its id inside.
fn owner(image: &TaskImage, thread: &ThreadImage, what: Common) -> i32 {
    fn of<T>(table: &Table<T>, thread: i32, leader: i32) -> i32 {
        match table {
            Table::Process => leader,
            Table::Of(other) => *other,
            Table::Own(_) => thread,
        }
    }
    let leader = image.threads.first().map_or(0, |leader| leader.tid);
    match what {
        Common::Descriptors => of(&thread.tables.descriptors, thread.tid, leader),
        _ => of(&thread.tables.directories, thread.tid, leader),
    }
}

/// Makes the threads besides the leader, each with its id and tables, those of their own being copies; returns all ids as the
/// agent sees them, in the image's order.
pub(super) fn make(leader: &mut Remote, image: &TaskImage) -> Result<Vec<i32>, TraceeError> {
    let pid = leader.tid();
    let owners: Vec<[i32; 2]> =
        image.threads.iter().map(|thread| TABLES.map(|(what, _)| owner(image, thread, what))).collect();
    let mut made: Vec<Option<i32>> = vec![None; image.threads.len()];
    let first =
        made.first_mut().ok_or_else(|| TraceeError::Unsupported("a process without threads".into()))?;
    *first = Some(pid);
    let mut known = BTreeSet::from([pid]);
    for _ in 1..image.threads.len() {
        // A table that somebody has already can only be had from who has it; any other is a copy.
        let has = |at: usize, table: usize, wanted: usize| {
            made[at].is_some() && owners[at][table] == owners[wanted][table]
        };
        let fits = |by: usize, wanted: usize| {
            let get = |table| has(by, table, wanted) || !(0..made.len()).any(|at| has(at, table, wanted));
            made[by].is_some() && (0..TABLES.len()).all(get)
        };
        let pairs = (0..made.len()).filter(|at| made[*at].is_none());
        let found = pairs.flat_map(|wanted| (0..made.len()).map(move |by| (by, wanted)));
        let Some((by, wanted)) = found.clone().find(|(by, wanted)| fits(*by, *wanted)) else {
            let text =
                format!("process {pid}: the tables of its threads can't be made again: {}", tables::REMEDY);
            return Err(TraceeError::Unsupported(text));
        };
        let apart = [0, 1].map(|table| !has(by, table, wanted));
        let maker = made[by].unwrap_or(pid);
        let tid = match by {
            0 => make_one(leader, image.threads[wanted].tid, &known)?,
            _ => make_one(&mut leader.for_thread(maker)?, image.threads[wanted].tid, &known)?,
        };
        known.insert(tid);
        made[wanted] = Some(tid);
        let flags = TABLES.iter().zip(apart).filter(|(_, apart)| *apart).map(|((_, flag), _)| *flag);
        let flags = flags.fold(0, |all, flag| all | flag);
        if flags != 0 {
            let mut remote = leader.for_thread(tid)?;
            remote.call("unshare", libc::SYS_unshare, [flags as u64, 0, 0, 0, 0, 0])?;
        }
    }
    Ok(made.into_iter().flatten().collect())
}

/// Makes the thread with id `inner` inside, as one that has all in common with the thread behind `maker`. `known`: those that
/// are there.
fn make_one(maker: &mut Remote, inner: i32, known: &BTreeSet<i32>) -> Result<i32, TraceeError> {
    const TID_OFFSET: u64 = 96;
    let tid_at = maker.put(TID_OFFSET, &inner.to_ne_bytes())?;
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let args = CloneArgs { flags: flags as u64, set_tid: tid_at, set_tid_size: 1, ..CloneArgs::default() };
    let bytes = args.to_bytes();
    let at = maker.put(0, &bytes)?;
    maker.call("clone3", libc::SYS_clone3, [at, bytes.len() as u64, 0, 0, 0, 0])?;
    // The kernel lists them by age.
    let fresh = list_threads(maker.tid())?.into_iter().rev().find(|tid| !known.contains(tid));
    let tid = fresh.ok_or(TraceeError::Gone(maker.tid()))?;
    // Threads of a seized process are traced from their first instruction, and stop before it.
    match ptrace::wait_stop(tid).map_err(TraceeError::call("waiting for a new thread", tid))? {
        Stop::Gone => Err(TraceeError::Gone(tid)),
        _ => Ok(tid),
    }
}

/// Whether a thread besides the leader has descriptors of its own.
pub(super) fn have_own_descriptors(image: &TaskImage) -> bool {
    image.threads.iter().skip(1).any(|thread| matches!(thread.tables.descriptors, Table::Own(_)))
}

/// Puts into the threads' own tables the descriptors that belong there. `tids`: all threads, in the image's order; `end`: the
/// process's end of the link. Returns their connections.
pub(super) fn restore_descriptors(
    leader: &mut Remote,
    image: &TaskImage,
    tids: &[i32],
    end: Option<RawFd>,
    descriptors: &mut Restorer<'_>,
) -> Result<Vec<Reconnected>, TraceeError> {
    let mut reconnected = Vec::new();
    for (&tid, thread) in tids.iter().zip(&image.threads).skip(1) {
        if let Table::Own(own) = &thread.tables.descriptors {
            let missing = || {
                let what = "has descriptors of its own, and its process those of another one";
                TraceeError::Unsupported(format!("thread {} {what}: not carried in this version", thread.tid))
            };
            let end = end.ok_or_else(missing)?;
            let mut remote = leader.for_thread(tid)?;
            reconnected.push(descriptors.restore_of_thread(&mut remote, thread.tid, end, own)?);
        }
    }
    Ok(reconnected)
}

/// Has threads enter the directories that only they are in, and compares what they have in common with what they had. No path
/// is opened any more that begins at the root.
pub(super) fn restore_directories(
    leader: &mut Remote,
    image: &TaskImage,
    tids: &[i32],
) -> Result<(), TraceeError> {
    for (&tid, thread) in tids.iter().zip(&image.threads).skip(1) {
        if let Table::Own(own) = &thread.tables.directories {
            own.enter(&mut leader.for_thread(tid)?)?;
        }
    }
    for (what, _) in TABLES {
        let here = tables::owners(tids, what)?;
        let wanted = image.threads.iter().map(|thread| owner(image, thread, what));
        let wanted = wanted.map(|owner| image.threads.iter().position(|thread| thread.tid == owner));
        let here = here.into_iter().map(|owner| tids.iter().position(|tid| *tid == owner));
        if here.ne(wanted) {
            let name = format!("{what:?}").to_lowercase();
            let text = format!(
                "process {}: its threads have other {name} in common than at the source",
                leader.tid()
            );
            return Err(TraceeError::Unsupported(text));
        }
    }
    Ok(())
}
