//! What an instance is besides its memory: everything that [`super::capture`] takes and
//! [`super::rebuild`] puts back.
//!
//! Pids and tids here are those of the instance's own PID namespace: they stay the same.

use serde::{Deserialize, Serialize};

use super::{
    advice::Advice,
    attributes::{ProcessAttributes, ThreadAttributes},
    cgroups::Subtree,
    datagrams::DatagramImage,
    descriptors::{Fifo, Lock, Nameless, Place, SignalTarget, Watch, Watched},
    layout::Layout,
    names::HostNames,
    netlink::NetlinkImage,
    posix_timers::PosixTimer,
    seccomp::Seccomp,
    sysv::Queues,
    tables::{Directories, Table, Tables, ThreadTables},
    terminals::Terminal,
    tree::Node,
    unix::UnixImage,
    waits::TimedWait,
};
use crate::{instance::network::settings::Sysctls, sys::ptrace::RseqConfiguration};

/// A frozen instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct InstanceImage {
    /// Its living processes, parents before their children.
    pub processes: Vec<ProcessImage>,
    /// Its zombies.
    pub zombies: Vec<Node>,
    /// By which names it knows its host.
    pub names: HostNames,
    /// What it has changed in its network namespace.
    pub sysctls: Sysctls,
    /// The cgroups below its own.
    pub cgroups: Subtree,
    /// Its SysV semaphores and messages.
    pub queues: Queues,
}

impl TaskImage {
    /// Its tables of descriptors, each with the position of the thread that has it: the process's own, and those of threads.
    pub fn open_files(&self) -> impl Iterator<Item = (usize, &Vec<Descriptor>)> {
        let of_threads =
            self.threads.iter().enumerate().filter_map(|(at, thread)| match &thread.tables.descriptors {
                Table::Own(descriptors) => Some((at, descriptors)),
                _ => None,
            });
        std::iter::once((0, &self.descriptors)).chain(of_threads)
    }

    /// The same, to be completed.
    pub fn open_files_mut(&mut self) -> impl Iterator<Item = (usize, &mut Vec<Descriptor>)> {
        let threads = self.threads.iter_mut().enumerate();
        let of_threads = threads.filter_map(|(at, thread)| match &mut thread.tables.descriptors {
            Table::Own(descriptors) => Some((at, descriptors)),
            _ => None,
        });
        std::iter::once((0, &mut self.descriptors)).chain(of_threads)
    }
}

impl InstanceImage {
    /// Its pairs of pseudo-terminals, by number.
    pub fn terminals(&self) -> impl Iterator<Item = (u32, &Terminal)> {
        let tables = self.processes.iter().flat_map(|process| process.task.open_files());
        let all = tables.flat_map(|(_, descriptors)| descriptors);
        all.filter_map(|descriptor| match &descriptor.kind {
            DescriptorKind::Master { number, terminal: Some(terminal) } => Some((*number, &**terminal)),
            _ => None,
        })
    }
}

/// One living process of an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessImage {
    /// Its number as an address space.
    pub space: u32,
    /// Its place among the others.
    pub node: Node,
    /// The pseudo-terminal that controls it, by number.
    pub terminal: Option<u32>,
    /// Whose tables it has.
    pub tables: Tables,
    /// The process itself.
    pub task: TaskImage,
}

/// One frozen process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskImage {
    /// Its mappings at the freeze.
    pub layout: Layout,
    /// The kernel's own mappings (vDSO and its data), which are moved to the same addresses.
    pub kernel_mappings: Vec<super::layout::Mapping>,
    /// Where code, data, heap, arguments and environment begin and end.
    pub memory_map: MemoryMap,
    /// What it has asked of its memory.
    pub advice: Advice,
    /// The auxiliary vector, as the kernel gave it.
    pub auxv: Vec<u8>,
    /// The program's file.
    pub exe: String,
    /// Where it is.
    pub directories: Directories,
    /// What it has set besides.
    pub attributes: ProcessAttributes,
    /// Soft and hard limit of each resource, by its number.
    pub limits: Vec<(u64, u64)>,
    /// `oom_score_adj`.
    pub oom_score_adj: i32,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: u64,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// `PR_GET_PDEATHSIG`: the signal for when its parent ends, 0 for none.
    pub parent_death_signal: i32,
    /// Kernel `struct sigaction` of each signal that isn't as at the beginning: (signal, bytes).
    pub signal_actions: Vec<(i32, [u8; 32])>,
    /// Signals queued to the process: whole `siginfo_t`s.
    pub pending_signals: Vec<Vec<u8>>,
    /// `struct itimerval` of ITIMER_REAL, ITIMER_VIRTUAL and ITIMER_PROF.
    pub interval_timers: Vec<[u8; 32]>,
    /// Timers by timer_create(2).
    pub posix_timers: Vec<PosixTimer>,
    /// When the timers were looked at, by the instance's CLOCK_MONOTONIC in nanoseconds.
    pub taken_ns: i64,
    /// The program is stopped, as by SIGSTOP.
    pub stopped: Option<StopImage>,
    /// Open files; none if it has the table of a process that comes before it.
    pub descriptors: Vec<Descriptor>,
    /// Its threads, the leader first.
    pub threads: Vec<ThreadImage>,
}

/// A program that is stopped until SIGCONT comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopImage {
    /// By which signal.
    pub signal: i32,
    /// Its parent has not asked for it yet (wait(2) with WUNTRACED).
    pub unread: bool,
}

/// `struct prctl_mm_map` without its pointers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end,
    /// env_start, env_end: addresses.
    pub bounds: [u64; 11],
}

/// Users, groups and capabilities.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved and file-system user.
    pub uids: [u32; 4],
    /// Real, effective, saved and file-system group.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding and ambient capabilities.
    pub capabilities: [u64; 5],
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// `PR_GET_SECUREBITS`.
    pub secure_bits: u32,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ThreadImage {
    /// Its id in the instance's PID namespace.
    pub tid: i32,
    /// Its name.
    pub comm: String,
    /// General registers (`struct user_regs_struct`), ready to go on from.
    pub registers: Vec<u8>,
    /// The xsave area.
    pub extended_state: Vec<u8>,
    /// Blocked signals.
    pub signal_mask: u64,
    /// The wait that it goes on with.
    pub wait: Option<TimedWait>,
    /// Signals queued to it alone, the one first that it was about to receive.
    pub pending_signals: Vec<Vec<u8>>,
    /// `stack_t` of its alternate signal stack.
    pub alternate_stack: [u8; 24],
    /// Where the kernel writes 0 when it ends (`set_tid_address`).
    pub clear_child_tid: u64,
    /// Head and length of its robust futex list.
    pub robust_list: (u64, u64),
    /// Its restartable-sequence area.
    pub rseq: RseqConfiguration,
    /// `struct sched_attr`.
    pub scheduling: Vec<u8>,
    /// Users, groups and capabilities.
    pub credentials: Credentials,
    /// What it is forbidden.
    pub seccomp: Seccomp,
    /// The tables that it has.
    pub tables: ThreadTables,
    /// What it has set besides.
    pub attributes: ThreadAttributes,
}

/// One open file description and the descriptors that share it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Descriptor {
    /// The numbers, each with its close-on-exec flag; the first is the one that it's made under.
    pub numbers: Vec<(i32, bool)>,
    /// `F_GETFL`.
    pub flags: i32,
    /// Whom it sends signals.
    pub signals: Option<SignalTarget>,
    /// The locks on its file: the description's, or the process's.
    pub locks: Vec<Lock>,
    /// What it is.
    pub kind: DescriptorKind,
}

/// What an open file description is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum DescriptorKind {
    /// A regular file, a directory, or one of the harmless character devices.
    File {
        /// Its path in the instance.
        path: String,
        /// The offset, in bytes.
        position: i64,
        /// The length of a regular file, in bytes: the destination's must be the same. A log has none.
        size: Option<u64>,
        /// The digest of a regular file that is read and does not go along: the destination's must be the same.
        digest: Option<u128>,
    },
    /// A directory that is being read.
    Directory {
        /// Its path in the instance.
        path: String,
        /// The offset, a number of the file system's.
        position: i64,
        /// Which directory it is: the offset means nothing in another one.
        place: Place,
    },
    /// A file without a name.
    Nameless(Nameless),
    /// One end of a FIFO, or both.
    Fifo(Fifo),
    /// The same description as this descriptor of a process that comes before this one.
    Shared {
        /// Its pid in the instance's namespace.
        pid: i32,
        /// The descriptor's number there.
        number: i32,
    },
    /// One end of a pipe whose other end is in the instance, too.
    Pipe {
        /// Which pipe.
        inode: u64,
        /// What is queued in it (only at one of its read ends).
        queued: Vec<u8>,
        /// `F_GETPIPE_SZ`, in bytes.
        capacity: i32,
    },
    /// eventfd(2).
    Event {
        /// Its count.
        count: u64,
        /// `EFD_SEMAPHORE`.
        semaphore: bool,
    },
    /// timerfd(2).
    Timer {
        /// Its clock.
        clock: i32,
        /// Interval and time left: each seconds, then nanoseconds. The time at which it expires, if `flags` say so.
        spec: [i64; 4],
        /// `TFD_TIMER_ABSTIME` and `TFD_TIMER_CANCEL_ON_SET`, for clocks that can be set.
        flags: i32,
        /// Expirations that were not read yet.
        ticks: u64,
    },
    /// signalfd(2).
    Signal {
        /// Signals that it takes, bit n-1 for signal n.
        mask: u64,
    },
    /// The master of a pair of pseudo-terminals.
    Master {
        /// The pair's number.
        number: u32,
        /// The pair; only at its first master.
        terminal: Option<Box<Terminal>>,
    },
    /// The slave of a pair of pseudo-terminals.
    Slave {
        /// The pair's number.
        number: u32,
    },
    /// epoll(7).
    Epoll {
        /// What it watches.
        watched: Vec<Watched>,
    },
    /// inotify(7).
    Inotify {
        /// What it watches.
        watches: Vec<Watch>,
    },
    /// pidfd_open(2).
    Process {
        /// The process's pid in the instance's namespace; `None` when its parent has collected it.
        pid: Option<i32>,
    },
    /// A TCP socket.
    Socket(SocketImage),
    /// A UDP, raw or ping socket.
    Datagram(Box<DatagramImage>),
    /// An idle netlink socket.
    Netlink(NetlinkImage),
    /// A unix socket.
    Unix(Box<UnixImage>),
}

/// A socket of the internet families.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SocketImage {
    /// `AF_INET` or `AF_INET6`.
    pub domain: i32,
    /// `SOCK_STREAM` or `SOCK_DGRAM`.
    pub kind: i32,
    /// Options as (level, name, value).
    pub options: Vec<(i32, i32, i32)>,
    /// Options that are no `int`, as (level, name, the kernel's bytes).
    pub other_options: Vec<(i32, i32, Vec<u8>)>,
    /// Its buffers.
    pub buffers: Buffers,
    /// The address that it is bound to, the kernel's bytes; empty when it isn't.
    pub local: Vec<u8>,
    /// What it does.
    pub state: SocketState,
}

/// A socket's buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffers {
    /// `SO_SNDBUF`, in bytes, as the kernel tells it: twice of what was asked for.
    pub send: i32,
    /// `SO_RCVBUF`, likewise.
    pub receive: i32,
    /// `SO_BUF_LOCK`: which of them the program has chosen (1: send, 2: receive); the kernel grows the others.
    pub locked: i32,
}

/// What a socket does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketState {
    /// Neither listening nor connected.
    Idle,
    /// Listening.
    Listening {
        /// The queue's length.
        backlog: i32,
    },
    /// Connected; the connection goes along.
    Connected(Box<super::tcp::Connection>),
    /// It had a connection, which has ended in both directions.
    Ended {
        /// What is still to be read of it.
        #[serde(with = "super::tcp::bytes")]
        data: Vec<u8>,
    },
    /// It had a connection by an address of the host, which stays there: it becomes a socket that has lost it, and
    /// the peer is told so by the first segment that it sends.
    Disconnected,
}
