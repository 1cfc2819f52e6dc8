//! A directory of a running instance is replaced by a copy of it on another device, under everything that is open in it.
//!
//! ```text
//! survey   what refers to the directory: descriptors, mappings, working directories, locks -> Plan, or what is refused
//! side     one of the two copies: a mount of it, and its files, opened
//! apply    brings all that the plan names to one side, whichever side each is on at the moment
//! ```
//!
//! Both copies are the same while the instance stands still, so [`apply`](apply::apply) may be broken off at any place, and
//! be begun again by another process, towards either side. The instance may go on when it is through.

pub mod apply;
pub mod side;
pub mod survey;

use std::{os::fd::RawFd, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{descriptors::Lock, tree};

/// All that refers to a directory of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Where the instance sees it.
    pub point: PathBuf,
    /// The instance's init, as the agent sees it: it is in the instance's mount namespace.
    pub init: i32,
    /// How many mounts there are at that place, one over the other: the directory's is the last of them.
    #[serde(default = "one")]
    pub mounts: usize,
    /// How many there are where the other copy's is put for a while.
    #[serde(default = "one")]
    pub mounts_aside: usize,
    /// Open file descriptions.
    pub descriptions: Vec<Description>,
    /// Mappings of files.
    pub mappings: Vec<Part>,
    /// Working directories: of which process, and which.
    pub working: Vec<(i32, Target)>,
    /// Files without a name, by what [`Target::Nameless`] counts.
    pub nameless: Vec<Nameless>,
}

/// Of plans that were written down before mounts were counted.
fn one() -> usize {
    1
}

/// Which file or directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Target {
    /// By its name below the directory.
    Name(Vec<u8>),
    /// One that was deleted, and is still in use.
    Nameless(usize),
}

/// A file without a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nameless {
    /// Device and inode where it was found.
    pub inode: (u64, u64),
    /// Permissions, user and group.
    pub access: (u32, u32, u32),
}

/// An open file description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Of what.
    pub target: Target,
    /// `O_*`, as the kernel tells them.
    pub flags: i32,
    /// Its offset, in bytes.
    pub position: i64,
    /// Its own locks.
    pub locks: Vec<Lock>,
    /// Who has it, and under which number.
    pub members: Vec<Member>,
}

/// A descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The process, as the agent sees it.
    pub pid: i32,
    /// The number.
    pub fd: RawFd,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
    /// The process's own locks on the file.
    pub locks: Vec<Lock>,
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The process, as the agent sees it.
    pub pid: i32,
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// `PROT_*`.
    pub protection: i32,
    /// Changes are seen by others.
    pub shared: bool,
    /// mprotect(2) may make it writable: its file was opened for writing.
    pub may_write: bool,
    /// `MADV_*` that were given for it.
    pub advice: Vec<i32>,
    /// Of what.
    pub target: Target,
}

impl Plan {
    /// Process `pid` has ended.
    fn forget(&mut self, pid: i32) {
        for one in &mut self.descriptions {
            one.members.retain(|member| member.pid != pid);
        }
        self.descriptions.retain(|one| !one.members.is_empty());
        self.mappings.retain(|part| part.pid != pid);
        self.working.retain(|(of, _)| *of != pid);
    }

    fn has_ended_one(&self) -> bool {
        self.processes().into_iter().any(tree::has_ended)
    }

    /// Processes that have ended need nothing.
    fn forget_ended(&mut self) {
        for pid in self.processes().into_iter().filter(|pid| tree::has_ended(*pid)) {
            self.forget(pid);
        }
    }

    /// The processes that have to make calls.
    pub fn processes(&self) -> std::collections::BTreeSet<i32> {
        let members = self.descriptions.iter().flat_map(|one| one.members.iter().map(|member| member.pid));
        let mappings = self.mappings.iter().map(|part| part.pid);
        members.chain(mappings).chain(self.working.iter().map(|(pid, _)| *pid)).collect()
    }
}
