//! Tables that clone(2) lets processes and threads have in common: that of the descriptors (`CLONE_FILES`), and root, working
//! directory and umask (`CLONE_FS`).
//!
//! Processes have none in common as a rule, and the threads of a process both. A table is only ever shared with a task that
//! is made, and left by unshare(2) or execve(2). So the destination makes each task by one that has what it shall have, and
//! lets it leave what it shall not.

use std::{cmp::Ordering, fs};

use serde::{Deserialize, Serialize};

use super::{
    TraceeError,
    batch::Arg,
    capture::{Status, link},
    image::Descriptor,
    remote::Remote,
    stopped::list_threads,
    tree::Member,
};
use crate::sys::process::{Common, compare};

/// The tables that are looked at.
pub const ALL: [Common; 2] = [Common::Descriptors, Common::Directories];

/// Whose tables a process has: for each, the first process that has it, by its number as an address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tables {
    /// That of the descriptors.
    pub descriptors: u32,
    /// That of the directories.
    pub directories: u32,
}

impl Tables {
    /// One of them.
    pub fn of(&self, what: Common) -> u32 {
        if what == Common::Descriptors { self.descriptors } else { self.directories }
    }
}

/// Where a process is, and what its files' permissions begin with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directories {
    /// The root directory.
    pub root: String,
    /// The working directory.
    pub working: String,
    /// File mode creation mask.
    pub umask: u32,
}

/// A table of a thread.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Table<T> {
    /// Its process's.
    #[default]
    Process,
    /// That of another thread, which comes before it, by its id inside.
    Of(i32),
    /// One that its process's first thread has not.
    Own(T),
}

/// The tables of a thread.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ThreadTables {
    /// Its descriptors.
    pub descriptors: Table<Vec<Descriptor>>,
    /// Its directories.
    pub directories: Table<Directories>,
}

/// For each of `tasks` (pids or tids that the agent sees) the position of the first that has `what` in common with it. One
/// that has ended has nothing in common with anybody.
pub fn first_with(tasks: &[i32], what: Common) -> Result<Vec<usize>, TraceeError> {
    // One for each table, in the kernel's order.
    let mut known: Vec<usize> = Vec::new();
    let mut firsts = Vec::with_capacity(tasks.len());
    for (at, &task) in tasks.iter().enumerate() {
        let (mut low, mut high) = (0, known.len());
        let mut first = at;
        while low < high {
            let middle = usize::midpoint(low, high);
            let order = match compare(tasks[known[middle]], task, what) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ordering::Less,
                order => order.map_err(TraceeError::call("kcmp", task))?,
            };
            match order {
                Ordering::Equal => {
                    first = known[middle];
                    break;
                }
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        if first == at && has_tables(task) {
            known.insert(low, at);
        }
        firsts.push(first);
    }
    Ok(firsts)
}

/// One that ends gives up its tables before it is gone: all such have the same none.
fn has_tables(task: i32) -> bool {
    fs::read_link(format!("/proc/{task}/cwd")).is_ok()
}

/// The tables of processes `pids`, which are numbered as `spaces`.
pub fn of_processes(pids: &[i32], spaces: &[u32]) -> Result<Vec<Tables>, TraceeError> {
    let descriptors = first_with(pids, Common::Descriptors)?;
    let directories = first_with(pids, Common::Directories)?;
    let pairs = descriptors.into_iter().zip(directories);
    Ok(pairs
        .map(|(descriptors, directories)| Tables {
            descriptors: spaces[descriptors],
            directories: spaces[directories],
        })
        .collect())
}

/// For each of `threads`, the first one of a process before the others, the first that has `what` in common with it.
pub fn owners(threads: &[i32], what: Common) -> Result<Vec<i32>, TraceeError> {
    Ok(first_with(threads, what)?.into_iter().map(|first| threads[first]).collect())
}

/// Process `pid`, and those of its threads that are the first with a table that it has not.
pub fn holders(pid: i32, what: Common) -> Result<Vec<i32>, TraceeError> {
    let mut threads = vec![pid];
    // A process that has ended has none.
    threads.extend(list_threads(pid).unwrap_or_default().into_iter().filter(|tid| *tid != pid));
    let owners = owners(&threads, what)?;
    let distinct = threads.iter().zip(&owners).filter(|(thread, owner)| thread == owner).map(|(_, tid)| *tid);
    Ok(distinct.filter(|tid| *tid == pid || has_tables(*tid)).collect())
}

impl Directories {
    /// Those of a process or thread, whose status is given.
    pub(super) fn read(tid: i32, status: &Status) -> Result<Self, TraceeError> {
        Ok(Self {
            root: link(tid, "root")?,
            working: link(tid, "cwd")?,
            umask: status.radix("Umask:", 8).unwrap_or(0o022) as u32,
        })
    }

    /// Goes there: from then on paths mean what they mean to the program.
    pub fn enter(&self, remote: &mut Remote) -> Result<(), TraceeError> {
        let path = |path: &str| [path.as_bytes(), &[0]].concat();
        let mut batch = remote.batch();
        batch.call("chdir", libc::SYS_chdir, &[Arg::Data(&path(&self.working))])?;
        if self.root != "/" {
            batch.call("chroot", libc::SYS_chroot, &[Arg::Data(&path(&self.root))])?;
        }
        batch.call("umask", libc::SYS_umask, &[u64::from(self.umask).into()])?;
        batch.run().map(drop)
    }
}

/// What would make it possible to carry what [`obstacles`] names.
pub const REMEDY: &str = "clone(2) can share them with the maker of a process only, and with the maker of a thread within \
                          its process: restart what has them in common";

/// Why tables can't be made again as the living processes `members` have them: (pid, what).
pub fn obstacles(members: &[Member]) -> Result<Vec<(i32, String)>, TraceeError> {
    let mut found = Vec::new();
    for what in ALL {
        let name = format!("{what:?}").to_lowercase();
        let mut tasks: Vec<(i32, i32)> = members.iter().map(|member| (member.pid, member.pid)).collect();
        for member in members {
            let further = holders(member.pid, what)?.into_iter().skip(1);
            tasks.extend(further.map(|tid| (member.pid, tid)));
        }
        let tids: Vec<i32> = tasks.iter().map(|(_, tid)| *tid).collect();
        let firsts = first_with(&tids, what)?;
        for (at, first) in firsts.iter().copied().enumerate().filter(|(at, first)| at != first) {
            let ((pid, tid), (other, _)) = (tasks[at], tasks[first]);
            let Some(member) = members.get(at) else {
                found.push((pid, format!("{name} of thread {tid} in common with process {other}")));
                continue;
            };
            let node = member.node;
            let may_make = |other: &Member| other.node.pid == node.parent || other.node.parent == node.parent;
            if !(0..at).any(|other| firsts[other] == first && may_make(&members[other])) {
                let text = format!("{name} in common with process {other}, neither its parent nor a sibling");
                found.push((pid, text));
            }
        }
    }
    Ok(found)
}
