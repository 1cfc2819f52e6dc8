//! Open files: what they are, and how they are made again.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs,
    io::Write,
    os::{
        fd::{OwnedFd, RawFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
};

use super::{
    TraceeError,
    capture::Status,
    files,
    image::{Descriptor, DescriptorKind, SocketState, UnixImage},
    link::{Link, STUB_END},
    read_proc,
    reconnect::{self, RawSockets, Reconnected},
    remote::Remote,
    sockets, tcp,
    unix::{self, Peers},
};
use crate::sys::{filter, process, socket, timer};

/// More queued bytes than the largest pipe of an unprivileged user holds are not carried.
const PIPE_LIMIT: usize = 1 << 20;
/// No kernel lets a process have more descriptors (`fs.nr_open`'s own limit, rounded up).
const NUMBER_LIMIT: RawFd = 1 << 30;
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;

/// Character devices without state: (major, minor).
const HARMLESS_DEVICES: [(u64, u64); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

/// An open descriptor that can't be carried.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Which.
    pub fd: RawFd,
    /// What it is.
    pub what: String,
    /// What would make it possible.
    pub remedy: &'static str,
}

/// All open files of process `pid`, and those that can't be carried. Touches nothing; the answer is only
/// consistent when the process is stopped. With `contents`, what waits in pipes and sockets is read as well.
pub fn describe(
    pid: i32,
    peers: &Peers,
    contents: bool,
) -> Result<(Vec<Descriptor>, Vec<Refused>), TraceeError> {
    let pidfd = process::pidfd_open(pid).map_err(TraceeError::call("pidfd_open", pid))?;
    let mut found = Found::default();
    for fd in list(pid)? {
        match found.add(&Look { pidfd: &pidfd, pid, fd, peers, contents }) {
            // A program that runs may have closed it, or ended, since the list was made.
            Err(_) if fs::symlink_metadata(format!("/proc/{pid}/fd/{fd}")).is_err() => {}
            added => added?,
        }
    }
    Ok((found.descriptors, found.refused))
}

/// What was found so far among the descriptors of one process.
#[derive(Default)]
struct Found {
    descriptors: Vec<Descriptor>,
    /// What the link of each says. Descriptors of one description say the same, and asking the kernel about every pair
    /// of thousands would take longer than everything else.
    targets: Vec<String>,
    refused: Vec<Refused>,
}

impl Found {
    fn add(&mut self, look: &Look<'_>) -> Result<(), TraceeError> {
        let Look { pidfd, pid, fd, .. } = *look;
        let Some(info) = Info::read(pid, fd)? else { return Ok(()) };
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        let flags = info.flags & !libc::O_CLOEXEC;
        if let Some(same) = shared_with(pid, fd, &info.target, &self.targets, &mut self.descriptors)? {
            same.numbers.push((fd, close_on_exec));
            return Ok(());
        }
        let owner = match flags & libc::O_ASYNC {
            0 => 0,
            _ => owner(pidfd, pid, fd)?,
        };
        match info.kind(look)? {
            Ok(kind) => {
                let numbers = vec![(fd, close_on_exec)];
                self.descriptors.push(Descriptor { numbers, flags, owner, kind });
                self.targets.push(info.target);
            }
            Err((what, remedy)) => self.refused.push(Refused { fd, what, remedy }),
        }
        Ok(())
    }
}

/// Where and how to look at one descriptor.
struct Look<'a> {
    pidfd: &'a OwnedFd,
    pid: i32,
    fd: RawFd,
    peers: &'a Peers,
    contents: bool,
}

impl Look<'_> {
    /// Our duplicate of it.
    fn ours(&self) -> Result<OwnedFd, TraceeError> {
        process::pidfd_getfd(self.pidfd, self.fd).map_err(TraceeError::call("pidfd_getfd", self.pid))
    }
}

/// Who gets SIGIO for a descriptor, as a pid in its own PID namespace.
fn owner(pidfd: &OwnedFd, pid: i32, fd: RawFd) -> Result<i32, TraceeError> {
    let ours = process::pidfd_getfd(pidfd, fd).map_err(TraceeError::call("pidfd_getfd", pid))?;
    let owner = process::signal_owner(&ours).map_err(TraceeError::call("F_GETOWN", pid))?;
    if owner == 0 {
        return Ok(0);
    }
    // One that has ended gets no signals.
    let Ok(status) = Status::read(owner.abs()) else { return Ok(0) };
    Ok(status.last_number("NSpid:").unwrap_or(0) * owner.signum())
}

/// Marks descriptors that are the same description as one of an earlier process. `processes`: the pid that the agent
/// sees, the pid inside, and the descriptors.
pub fn share(processes: &mut [(i32, i32, Vec<Descriptor>)]) -> Result<(), TraceeError> {
    /// Agent's pid, pid inside, number.
    type Holder = (i32, i32, RawFd);
    let mut known: BTreeMap<(String, i32), Vec<Holder>> = BTreeMap::new();
    for (pid, inner, descriptors) in processes {
        for descriptor in descriptors {
            let number = descriptor.numbers[0].0;
            // Only what looks alike can be the same, and comparing costs a system call.
            let path = format!("/proc/{pid}/fd/{number}");
            let target =
                fs::read_link(&path).map_err(TraceeError::proc(path))?.to_string_lossy().into_owned();
            let alike = known.entry((target, descriptor.flags)).or_default();
            let mut same = None;
            for &(other, other_inner, other_number) in alike.iter().filter(|(other, ..)| other != pid) {
                let compared = process::same_description_of(*pid, number, other, other_number);
                if compared.map_err(TraceeError::call("kcmp", *pid))? {
                    same = Some((other_inner, other_number));
                    break;
                }
            }
            match same {
                Some((pid, number)) => descriptor.kind = DescriptorKind::Shared { pid, number },
                None => alike.push((*pid, *inner, number)),
            }
        }
    }
    Ok(())
}

/// The descriptor numbers of `pid`, ascending.
fn list(pid: i32) -> Result<Vec<RawFd>, TraceeError> {
    let path = format!("/proc/{pid}/fd");
    let mut numbers = Vec::new();
    for entry in fs::read_dir(&path).map_err(TraceeError::proc(path.as_str()))? {
        let entry = entry.map_err(TraceeError::proc(path.as_str()))?;
        numbers.extend(entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn shared_with<'a>(
    pid: i32,
    fd: RawFd,
    target: &str,
    targets: &[String],
    known: &'a mut [Descriptor],
) -> Result<Option<&'a mut Descriptor>, TraceeError> {
    let alike = known.iter_mut().zip(targets).filter(|(_, its)| *its == target);
    for (descriptor, _) in alike {
        let first = descriptor.numbers[0].0;
        if process::same_description(pid, first, fd).map_err(TraceeError::call("kcmp", pid))? {
            return Ok(Some(descriptor));
        }
    }
    Ok(None)
}

/// What is connected to something outside of the instance: (pid, descriptor). `processes`: pids that the agent sees, with
/// their descriptors.
pub fn connected_outside(processes: &[(i32, &[Descriptor])]) -> Vec<(i32, Refused)> {
    let mut pipes: BTreeMap<u64, (bool, bool)> = BTreeMap::new();
    let mut sockets = BTreeSet::new();
    let pipe = |descriptor: &Descriptor| match descriptor.kind {
        DescriptorKind::Pipe { inode, .. } => Some((inode, descriptor.flags & libc::O_ACCMODE)),
        _ => None,
    };
    let all =
        || processes.iter().flat_map(|(pid, list)| list.iter().map(move |descriptor| (*pid, descriptor)));
    for (_, descriptor) in all() {
        if let Some((inode, access)) = pipe(descriptor) {
            let (read, written) = pipes.entry(inode).or_default();
            *read |= access != libc::O_WRONLY;
            *written |= access != libc::O_RDONLY;
        }
        if let DescriptorKind::UnixPair(image) = &descriptor.kind {
            sockets.insert(image.inode);
        }
    }
    let refused = all().filter_map(|(pid, descriptor)| {
        let what = match &descriptor.kind {
            DescriptorKind::Pipe { inode, .. } if pipes[inode] != (true, true) => "a pipe",
            DescriptorKind::UnixPair(image) if image.peer != 0 && !sockets.contains(&image.peer) => {
                "a unix socket"
            }
            _ => return None,
        };
        let refused = Refused {
            fd: descriptor.numbers[0].0,
            what: format!("{what} whose other end is outside the instance"),
            remedy: "start the instance with --detach, or with its input and output redirected to files",
        };
        Some((pid, refused))
    });
    refused.collect()
}

/// What `/proc/PID/fd` and `/proc/PID/fdinfo` tell of one descriptor.
struct Info {
    target: String,
    flags: i32,
    position: i64,
    text: String,
}

type Kind = Result<DescriptorKind, (String, &'static str)>;

impl Info {
    /// `None` when the descriptor was closed meanwhile.
    fn read(pid: i32, fd: RawFd) -> Result<Option<Self>, TraceeError> {
        let link = format!("/proc/{pid}/fd/{fd}");
        let Ok(target) = fs::read_link(&link) else { return Ok(None) };
        let path = format!("/proc/{pid}/fdinfo/{fd}");
        let text = read_proc(&path)?;
        let bad = || TraceeError::Proc { path: path.clone(), problem: "no flags or position in it".into() };
        let flags = field(&text, "flags:").and_then(|v| i32::from_str_radix(v, 8).ok()).ok_or_else(bad)?;
        let position = field(&text, "pos:").and_then(|v| v.parse().ok()).ok_or_else(bad)?;
        Ok(Some(Self { target: target.to_string_lossy().into_owned(), flags, position, text }))
    }

    fn kind(&self, look: &Look<'_>) -> Result<Kind, TraceeError> {
        let Look { pid, fd, .. } = *look;
        let ours = || look.ours();
        let number = |name, radix| field(&self.text, name).and_then(|v| u64::from_str_radix(v, radix).ok());
        Ok(match self.target.as_str() {
            target if target.starts_with('/') => self.file(pid, fd),
            target if target.starts_with("pipe:") => {
                let pipe = ours()?;
                let inode = nix::sys::stat::fstat(&pipe)
                    .map_err(|error| TraceeError::call("fstat of a pipe", pid)(error.into()))?
                    .st_ino;
                let capacity = nix::fcntl::fcntl(&pipe, nix::fcntl::FcntlArg::F_GETPIPE_SZ)
                    .map_err(|error| TraceeError::call("F_GETPIPE_SZ", pid)(error.into()))?;
                let reads = self.flags & libc::O_ACCMODE == libc::O_RDONLY;
                let queued = if reads && look.contents {
                    socket::peek_pipe(&pipe, PIPE_LIMIT)
                        .map_err(TraceeError::call("reading a pipe's contents", pid))?
                } else {
                    Vec::new()
                };
                Ok(DescriptorKind::Pipe { inode, queued, capacity })
            }
            target if target.starts_with("socket:") => describe_socket(&ours()?, look)?,
            "anon_inode:[eventfd]" => match number("eventfd-count:", 16) {
                Some(count) => Ok(DescriptorKind::Event {
                    count,
                    semaphore: number("eventfd-semaphore:", 10) == Some(1),
                }),
                None => Err((self.target.clone(), "the kernel doesn't tell its count")),
            },
            "anon_inode:[eventpoll]" => Ok(DescriptorKind::Epoll { watched: self.watched() }),
            "anon_inode:[signalfd]" => match number("sigmask:", 16) {
                Some(mask) => Ok(DescriptorKind::Signal { mask }),
                None => Err((self.target.clone(), "the kernel doesn't tell its signals")),
            },
            "anon_inode:[timerfd]" => {
                let spec = timer::remaining(&ours()?).map_err(TraceeError::call("timerfd_gettime", pid))?;
                // Asking may have counted expirations: what the kernel tells of them is read afterwards.
                let told = Self::read(pid, fd)?.and_then(|now| {
                    Some((
                        field(&now.text, "clockid:")?.parse().ok()?,
                        field(&now.text, "ticks:")?.parse().ok()?,
                    ))
                });
                match told {
                    Some((clock, ticks)) => Ok(DescriptorKind::Timer { clock, spec, ticks }),
                    None => Err((self.target.clone(), "the kernel doesn't tell its clock")),
                }
            }
            target => Err((target.to_owned(), "not carried in this version")),
        })
    }

    fn file(&self, pid: i32, fd: RawFd) -> Kind {
        let metadata = fs::metadata(format!("/proc/{pid}/fd/{fd}"))
            .map_err(|error| (format!("{}: {error}", self.target), "make the file readable"))?;
        let file_type = metadata.file_type();
        let device = (libc::major(metadata.rdev()).into(), libc::minor(metadata.rdev()).into());
        if file_type.is_char_device() && !HARMLESS_DEVICES.contains(&device) {
            let remedy = "close the device or terminal, or start the instance with --detach";
            return Err((format!("device {}", self.target), remedy));
        }
        if file_type.is_fifo() || file_type.is_socket() || file_type.is_block_device() {
            return Err((self.target.clone(), "not carried in this version"));
        }
        if metadata.nlink() == 0 {
            return Err((
                format!("deleted file {}", self.target),
                "deleted files aren't carried in this version",
            ));
        }
        if self.text.lines().any(|line| line.starts_with("lock:")) {
            return Err((format!("{} with a lock", self.target), "locks aren't carried in this version"));
        }
        let size = file_type.is_file().then_some(metadata.len());
        Ok(DescriptorKind::File { path: self.target.clone(), position: self.position, size, digest: None })
    }

    /// `tfd: 5 events: 19 data: 5 pos:0 ino:61 sdev:8`, numbers but the first in hexadecimal.
    fn watched(&self) -> Vec<(i32, u32, u64)> {
        let parse = |line: &str| {
            let mut words = line.strip_prefix("tfd:")?.split_whitespace();
            let fd = words.next()?.parse().ok()?;
            let events = u32::from_str_radix(words.nth(1)?, 16).ok()?;
            let data = u64::from_str_radix(words.nth(1)?, 16).ok()?;
            Some((fd, events, data))
        };
        self.text.lines().filter_map(parse).collect()
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

fn describe_socket(ours: &OwnedFd, look: &Look<'_>) -> Result<Kind, TraceeError> {
    let pid = look.pid;
    let get = |name| {
        socket::option(ours, libc::SOL_SOCKET, name).map_err(TraceeError::call("getsockopt of a socket", pid))
    };
    let (domain, kind) = (get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?);
    if domain == libc::AF_UNIX {
        let inode = nix::sys::stat::fstat(ours)
            .map_err(|error| TraceeError::call("fstat of a socket", pid)(error.into()))?
            .st_ino;
        let described = unix::describe(ours, inode, look.peers, look.contents)?;
        return Ok(described.map(DescriptorKind::UnixPair));
    }
    if (domain != libc::AF_INET && domain != libc::AF_INET6) || kind != libc::SOCK_STREAM {
        let what = format!("a socket of family {domain} and type {kind}");
        return Ok(Err((what, "only TCP sockets are carried in this version")));
    }
    let info = socket::tcp_info(ours).map_err(TraceeError::call("TCP_INFO", pid))?;
    let state = match info.state {
        TCP_LISTEN => SocketState::Listening { backlog: info.backlog as i32 },
        TCP_CLOSE => match socket::bytes_waiting(ours) {
            Ok(0) => SocketState::Idle,
            _ => {
                let remedy =
                    "data of an ended connection isn't carried in this version: try again when it is read";
                return Ok(Err(("a TCP connection that has ended, with data to be read".into(), remedy)));
            }
        },
        state => match tcp::describe(ours, state, pid)? {
            Ok(state) => state,
            Err(refused) => return Ok(Err(refused)),
        },
    };
    let mut local = Vec::new();
    if matches!(state, SocketState::Listening { .. }) {
        if filter::is_attached(ours) {
            return Ok(Err((
                "a listening socket with a filter".into(),
                "filters aren't carried in this version",
            )));
        }
        local = socket::local_name(ours).map_err(TraceeError::call("getsockname", pid))?;
    }
    Ok(Ok(DescriptorKind::Socket(sockets::describe(ours, domain, kind, local, state))))
}

/// Makes an instance's descriptors in its stubs, process by process.
pub struct Restorer<'a> {
    link: &'a Link,
    /// The stubs by their pid inside; the value is the pid that the agent sees.
    stubs: &'a BTreeMap<i32, i32>,
    /// Read and write end of the pipes made so far, by the source's inode.
    pipes: BTreeMap<u64, [OwnedFd; 2]>,
    /// Unix sockets made so far, by the source's inode.
    sockets: BTreeMap<u64, OwnedFd>,
}

impl<'a> Restorer<'a> {
    /// For the stubs behind `link`.
    pub fn new(link: &'a Link, stubs: &'a BTreeMap<i32, i32>) -> Self {
        Self { link, stubs, pipes: BTreeMap::new(), sockets: BTreeMap::new() }
    }

    /// Makes the descriptors of one process in the stub behind `remote`, which has none open but its end of the link.
    /// Its connections are to be resumed when the network is there.
    pub fn restore(
        &mut self,
        remote: &mut Remote,
        descriptors: &[Descriptor],
    ) -> Result<Reconnected, TraceeError> {
        validate(descriptors)?;
        let (epolls, others): (Vec<_>, Vec<_>) = descriptors
            .iter()
            .partition(|descriptor| matches!(descriptor.kind, DescriptorKind::Epoll { .. }));
        // Where the link waits must not be wanted by anybody.
        let end = descriptors.iter().flat_map(|d| &d.numbers).map(|(fd, _)| fd + 1).max().unwrap_or(0).max(4);
        let cloexec = libc::O_CLOEXEC as u64;
        remote.call("dup3", libc::SYS_dup3, [STUB_END as u64, end as u64, cloexec, 0, 0, 0])?;
        remote.call("close", libc::SYS_close, [STUB_END as u64, 0, 0, 0, 0, 0])?;
        // A connection may have its port from a listening socket, which could not take it any more afterwards.
        let (connected, others): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|descriptor| tcp::connection(descriptor).is_some());
        for descriptor in &others {
            let made = self.make(remote, descriptor, end)?;
            place(remote, made, descriptor)?;
        }
        let reconnected = self.reconnect(remote, &connected, end)?;
        // An epoll may watch any other, so they all must be there first.
        for descriptor in &epolls {
            let made = remote.call("epoll_create1", libc::SYS_epoll_create1, [0; 6])?;
            place(remote, made as RawFd, descriptor)?;
        }
        for descriptor in &epolls {
            let DescriptorKind::Epoll { watched } = &descriptor.kind else { continue };
            let epoll = descriptor.numbers[0].0 as u64;
            for &(fd, events, data) in watched {
                let mut event = [0; 12];
                event[..4].copy_from_slice(&events.to_ne_bytes());
                event[4..].copy_from_slice(&data.to_ne_bytes());
                let at = remote.put(0, &event)?;
                let add = libc::EPOLL_CTL_ADD as u64;
                remote.call("epoll_ctl", libc::SYS_epoll_ctl, [epoll, add, fd as u64, at, 0, 0])?;
            }
        }
        remote.call("close", libc::SYS_close, [end as u64, 0, 0, 0, 0, 0])?;
        Ok(reconnected)
    }

    fn reconnect(
        &mut self,
        remote: &mut Remote,
        connected: &[&Descriptor],
        end: RawFd,
    ) -> Result<Reconnected, TraceeError> {
        let connections = connected.iter().filter_map(|descriptor| tcp::connection(descriptor));
        let mut reconnected = Reconnected {
            raw: RawSockets::for_connections(connections.map(|(_, connection)| connection), |family| {
                let args = [family as u64, libc::SOCK_RAW as u64, libc::IPPROTO_RAW as u64, 0, 0, 0];
                let made = remote.call("socket", libc::SYS_socket, args)?;
                remote.take_descriptor(made as RawFd)
            })?,
            waiting: Vec::new(),
        };
        if !connected.is_empty() {
            sockets::require_own_network(remote.tid())?;
        }
        for descriptor in connected {
            let made = self.make(remote, descriptor, end)?;
            let DescriptorKind::Socket(image) = &descriptor.kind else { continue };
            let SocketState::Connected(connection) = &image.state else { continue };
            let ours = remote.share_descriptor(made)?;
            let waiting = reconnect::restore(ours, connection, image.buffers, &reconnected.raw)
                .map_err(TraceeError::call("restoring a TCP connection", remote.tid()))?;
            reconnected.waiting.push(waiting);
            place(remote, made, descriptor)?;
        }
        Ok(reconnected)
    }

    /// Makes one description and returns its number in the stub, whose end of the link is `end`.
    fn make(
        &mut self,
        remote: &mut Remote,
        descriptor: &Descriptor,
        end: RawFd,
    ) -> Result<RawFd, TraceeError> {
        let pid = remote.tid();
        let made = match &descriptor.kind {
            DescriptorKind::File { path, position, size, digest } => {
                open(remote, path, descriptor.flags, *position, (*size, *digest))? as u64
            }
            DescriptorKind::Shared { pid: holder, number } => {
                let damaged = || TraceeError::Unsupported(format!("the image has no process {holder}"));
                let stub = *self.stubs.get(holder).ok_or_else(damaged)?;
                let pidfd = process::pidfd_open(stub).map_err(TraceeError::call("pidfd_open", stub))?;
                let ours = process::pidfd_getfd(&pidfd, *number)
                    .map_err(TraceeError::call("taking a shared descriptor", stub))?;
                self.link.give(remote, end, &ours)? as u64
            }
            DescriptorKind::Pipe { inode, queued, capacity } => {
                let reads = descriptor.flags & libc::O_ACCMODE == libc::O_RDONLY;
                let ends = match self.pipes.entry(*inode) {
                    Entry::Occupied(made) => made.into_mut(),
                    Entry::Vacant(missing) => {
                        let made = make_pipe(*capacity).map_err(TraceeError::call("making a pipe", pid))?;
                        missing.insert(made)
                    }
                };
                if !queued.is_empty() {
                    nix::unistd::write(&ends[1], queued)
                        .ok()
                        .filter(|written| *written == queued.len())
                        .ok_or_else(|| TraceeError::Unsupported("a pipe could not be filled again".into()))?;
                }
                self.link.give(remote, end, &ends[usize::from(!reads)])? as u64
            }
            DescriptorKind::Event { count, semaphore } => {
                let flags = if *semaphore { libc::EFD_SEMAPHORE } else { 0 } as u64;
                // The initial count of eventfd2 has 32 bits; the rest is added by a write.
                let made = remote.call("eventfd2", libc::SYS_eventfd2, [0, flags, 0, 0, 0, 0])?;
                if *count > 0 {
                    fs::File::from(remote.share_descriptor(made as RawFd)?)
                        .write_all(&count.to_ne_bytes())
                        .map_err(TraceeError::call("setting an eventfd", pid))?;
                }
                made
            }
            DescriptorKind::Timer { clock, spec, ticks } => {
                let made = remote.call(
                    "timerfd_create",
                    libc::SYS_timerfd_create,
                    [*clock as u64, 0, 0, 0, 0, 0],
                )?;
                let at = remote.put(0, &spec.map(i64::to_ne_bytes).concat())?;
                remote.call("timerfd_settime", libc::SYS_timerfd_settime, [made, 0, at, 0, 0, 0])?;
                if *ticks > 0 {
                    let what = "setting a timer's expirations (CONFIG_CHECKPOINT_RESTORE)";
                    timer::set_ticks(&remote.share_descriptor(made as RawFd)?, *ticks)
                        .map_err(TraceeError::call(what, pid))?;
                }
                made
            }
            DescriptorKind::Signal { mask } => {
                let at = remote.put(0, &mask.to_ne_bytes())?;
                remote.call("signalfd4", libc::SYS_signalfd4, [!0, at, 8, 0, 0, 0])?
            }
            DescriptorKind::Socket(image) => {
                let args = [image.domain as u64, image.kind as u64, 0, 0, 0, 0];
                let made = remote.call("socket", libc::SYS_socket, args)?;
                sockets::restore(&remote.share_descriptor(made as RawFd)?, image)
                    .map_err(TraceeError::call("restoring a socket", pid))?;
                made
            }
            DescriptorKind::UnixPair(image) => self.make_unix(remote, image, end)? as u64,
            DescriptorKind::Epoll { .. } => remote.call("epoll_create1", libc::SYS_epoll_create1, [0; 6])?,
        };
        Ok(made as RawFd)
    }

    /// The pair is made in the stub of the process that has the first of its ends, so that the kernel knows it as the
    /// program's.
    fn make_unix(
        &mut self,
        remote: &mut Remote,
        image: &UnixImage,
        end: RawFd,
    ) -> Result<RawFd, TraceeError> {
        let pid = remote.tid();
        let mut made = None;
        if !self.sockets.contains_key(&image.inode) {
            let at = remote.put(0, &[0; 8])?;
            let args = [libc::AF_UNIX as u64, image.kind as u64, 0, at, 0, 0];
            remote.call("socketpair", libc::SYS_socketpair, args)?;
            let numbers: [u8; 8] = remote.get(0)?;
            let number = |at: usize| {
                i32::from_ne_bytes([numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]])
            };
            self.sockets.insert(image.inode, remote.share_descriptor(number(0))?);
            self.sockets.insert(image.peer, remote.take_descriptor(number(4))?);
            made = Some(number(0));
        }
        if let Some(peer) = self.sockets.get(&image.peer) {
            unix::fill(peer, &image.queued).map_err(TraceeError::call("filling a unix socket", pid))?;
        }
        if image.peer == 0 {
            // Closed at the source: the program reads what is queued, and then the end.
            self.sockets.remove(&0);
        }
        let ours = self.sockets.get(&image.inode);
        let ours =
            ours.ok_or_else(|| TraceeError::Unsupported("the image's unix sockets are damaged".into()))?;
        for &(level, name, value) in &image.options {
            socket::set_option(ours, level, name, value)
                .map_err(TraceeError::call("setting a unix socket's options", pid))?;
        }
        match made {
            Some(number) => Ok(number),
            None => self.link.give(remote, end, ours),
        }
    }
}

/// Refuses what no source sends: the image comes from another host.
fn validate(descriptors: &[Descriptor]) -> Result<(), TraceeError> {
    let mut bytes = 0_usize;
    for descriptor in descriptors {
        let numbers = &descriptor.numbers;
        if numbers.is_empty() || numbers.iter().any(|(fd, _)| !(0..NUMBER_LIMIT).contains(fd)) {
            let text = format!("a descriptor with the numbers {numbers:?} in the image");
            return Err(TraceeError::Unsupported(text));
        }
        if let DescriptorKind::Socket(image) = &descriptor.kind {
            sockets::validate(image).map_err(|problem| {
                TraceeError::Unsupported(format!(
                    "the socket of descriptor {} in the image: {problem}",
                    numbers[0].0
                ))
            })?;
        }
        if let Some((_, connection)) = tcp::connection(descriptor) {
            bytes = bytes.saturating_add(connection.send_queue.len() + connection.receive_queue.len());
            tcp::require_room(bytes)?;
        }
    }
    Ok(())
}

/// Moves a new descriptor to its numbers and sets what the description has besides.
fn place(remote: &mut Remote, made: RawFd, descriptor: &Descriptor) -> Result<(), TraceeError> {
    let cloexec = |flag: bool| if flag { libc::O_CLOEXEC as u64 } else { 0 };
    let mut stays = false;
    for &(number, close_on_exec) in &descriptor.numbers {
        if number == made {
            stays = true;
            let flag = if close_on_exec { libc::FD_CLOEXEC as u64 } else { 0 };
            remote.call("fcntl", libc::SYS_fcntl, [made as u64, libc::F_SETFD as u64, flag, 0, 0, 0])?;
        } else {
            let args = [made as u64, number as u64, cloexec(close_on_exec), 0, 0, 0];
            remote.call("dup3", libc::SYS_dup3, args)?;
        }
    }
    if !stays {
        remote.call("close", libc::SYS_close, [made as u64, 0, 0, 0, 0, 0])?;
    }
    let number = descriptor.numbers[0].0 as u64;
    match descriptor.kind {
        // Opened with its flags, or made and set already.
        DescriptorKind::File { .. } | DescriptorKind::Shared { .. } => {}
        _ => {
            if descriptor.owner != 0 {
                let args = [number, libc::F_SETOWN as u64, descriptor.owner as u64, 0, 0, 0];
                remote.call("fcntl", libc::SYS_fcntl, args)?;
            }
            let args = [number, libc::F_SETFL as u64, descriptor.flags as u64, 0, 0, 0];
            remote.call("fcntl", libc::SYS_fcntl, args)?;
        }
    }
    Ok(())
}

/// Makes a pipe of `capacity` bytes: its read end and its write end.
fn make_pipe(capacity: i32) -> std::io::Result<[OwnedFd; 2]> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(capacity))?;
    Ok([reader, writer])
}

fn open(
    remote: &mut Remote,
    path: &str,
    flags: i32,
    position: i64,
    (size, digest): (Option<u64>, Option<u128>),
) -> Result<RawFd, TraceeError> {
    let mut name = path.as_bytes().to_vec();
    name.push(0);
    let at = remote.put(0, &name)?;
    let mut flags = flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC) | libc::O_NOCTTY;
    if size.is_none() && flags & libc::O_APPEND != 0 {
        // A log, which begins anew where there is none.
        flags |= libc::O_CREAT;
    }
    let args = [libc::AT_FDCWD as u64, at, flags as u64, 0o640, 0, 0];
    let made = remote.call("openat", libc::SYS_openat, args)?;
    if let Some(size) = size {
        let ours = remote.share_descriptor(made as RawFd)?;
        let ours = fs::File::from(ours);
        let here = ours.metadata().map_err(TraceeError::call("fstat", remote.tid()))?.len();
        if here != size {
            let text = format!("{path} has {here} bytes at the destination and {size} at the source");
            return Err(TraceeError::Unsupported(text));
        }
        if let Some(digest) = digest
            && files::digest_of(&ours).map_err(TraceeError::proc(path))? != digest
        {
            let text = format!("{path} is another file at the destination than at the source");
            return Err(TraceeError::Unsupported(text));
        }
        if flags & libc::O_PATH == 0 {
            let args = [made, position as u64, libc::SEEK_SET as u64, 0, 0, 0];
            remote.call("lseek", libc::SYS_lseek, args)?;
        }
    }
    Ok(made as RawFd)
}
