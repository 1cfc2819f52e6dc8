//! Surgery on a foreign process: stop it, read it, rebuild it. No network here.
//!
//! ```text
//! source                                   destination
//!   check    what can't be carried           link      a socket by which stubs are given descriptors
//!   tree     who is whose child              space     a stub with the right pid, and mappings as the source has them
//!   tracker  what was written                objects   shared memory
//!   settle   connections without descriptor
//!   stopped  every thread held still         rebuild   descriptors, credentials, threads, registers
//!   snapshot -> image::InstanceImage  ------------->
//!   tcp      connections held                reconnect connections made again, and resumed
//! ```
//!
//! All of it works by ptrace and by system calls run inside the tracee ([`remote`]); no code is put into a program (a stub has a
//! loop for lists of calls: [`batch`]). ptrace is bound to a thread, so the types here must stay on the thread that made them:
//! [`crew`] has those threads.

pub mod advice;
pub mod attributes;
mod batch;
pub mod capture;
pub mod cgroups;
pub mod check;
pub mod crew;
pub mod datagrams;
pub mod descriptors;
mod ended;
pub mod files;
pub mod hand;
pub mod image;
pub mod layout;
pub mod leftovers;
mod lifeline;
pub mod link;
mod memberships;
pub mod mounts;
pub mod names;
pub mod needs;
pub mod netlink;
pub mod objects;
pub mod posix_timers;
pub mod privileges;
pub mod rebuild;
pub mod reconnect;
pub mod rehome;
pub mod remote;
pub mod seccomp;
pub mod segment;
pub mod settle;
pub mod snapshot;
mod sockets;
mod sound;
pub mod space;
pub mod stopped;
pub mod sysv;
pub mod tables;
pub mod tcp;
pub mod terminals;
mod threads;
pub mod tracker;
pub mod tree;
pub mod turns;
pub mod unix;
pub mod waits;

use std::io;

/// Why surgery failed.
#[derive(Debug, thiserror::Error)]
pub enum TraceeError {
    /// A system call of ours failed.
    #[error("{what} of process {pid}")]
    Call {
        /// What was attempted.
        what: &'static str,
        /// On which process or thread.
        pid: i32,
        /// Why it failed.
        source: io::Error,
    },
    /// A system call that the tracee made for us failed.
    #[error("{call} inside process {pid}")]
    Remote {
        /// Which call.
        call: &'static str,
        /// In which process or thread.
        pid: i32,
        /// Why it failed.
        source: io::Error,
    },
    /// A file of `/proc` isn't as expected.
    #[error("{path}: {problem}")]
    Proc {
        /// Which file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The process ended meanwhile.
    #[error("process {0} is gone")]
    Gone(i32),
    /// Something that is not carried.
    #[error("{0}")]
    Unsupported(String),
    /// It was not done, because something failed that was done beside it.
    #[error("something failed that was done beside it")]
    Beside,
}

impl TraceeError {
    /// For `map_err`: a call of ours on `pid`.
    pub(crate) fn call(what: &'static str, pid: i32) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Call { what, pid, source }
    }

    /// For `map_err`: a problem with a file of `/proc`.
    pub(crate) fn proc(path: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Proc { path: path.into(), problem: error.to_string() }
    }
}

/// Reads a whole file of `/proc`.
pub(crate) fn read_proc(path: &str) -> Result<String, TraceeError> {
    std::fs::read_to_string(path).map_err(TraceeError::proc(path))
}
