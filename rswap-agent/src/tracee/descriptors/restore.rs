//! Makes an instance's descriptors again.

use std::{
    collections::BTreeMap,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use super::{
    super::{
        TraceeError, datagrams, ended,
        image::{Descriptor, DescriptorKind, InstanceImage, SocketState},
        link::{Link, STUB_END},
        netlink,
        objects::BuiltObject,
        reconnect::{self, RawSockets, Reconnected},
        remote::Remote,
        sockets, tcp,
        terminals::Terminals,
        unix::{self, Binding, Maker, UnixImage, UnixState, Wanted},
    },
    around::IN_FLIGHT,
    deleted::Files,
    epolls, events,
    fifos::Fifos,
    files, inotify,
    locks::{self, Deferred},
    pidfds,
    pipes::Pipes,
    signals::{self, SignalTarget},
};
use crate::sys::process;

/// No kernel lets a process have more descriptors (`fs.nr_open`'s own limit, rounded up).
const NUMBER_LIMIT: RawFd = 1 << 30;

/// What descriptors are made in.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// The way to give a stub a descriptor.
    pub link: &'a Link,
    /// The stubs by their pid inside; the value is the pid that the agent sees.
    pub stubs: &'a BTreeMap<i32, i32>,
    /// Shared memory, by the inode at the source.
    pub objects: &'a BTreeMap<u64, BuiltObject>,
    /// The pseudo-terminals.
    pub terminals: &'a Terminals,
    /// The source has the same kernel, and so may have the same files.
    pub same_kernel: bool,
}

/// Makes an instance's descriptors in its stubs, process by process.
pub struct Restorer<'a> {
    around: Surroundings<'a>,
    pipes: Pipes,
    sockets: BTreeMap<u64, OwnedFd>,
    /// The other ends of those whose peer is closed and has passed descriptors.
    closing: BTreeMap<u64, OwnedFd>,
    /// What is left to be done at each of them.
    unix: Vec<(i32, UnixImage)>,
    /// Descriptors that wait in queues, by their number in the image.
    in_flight: BTreeMap<RawFd, OwnedFd>,
    /// Threads that have a table of their own, by their ids inside; the value is the one that the agent sees.
    threads: BTreeMap<i32, i32>,
    fifos: Fifos,
    nameless: Files,
    signals: Vec<(OwnedFd, SignalTarget)>,
    finals: Finals,
}

/// What is left to be done when the source is committed, before the first thread runs.
#[derive(Debug, Default)]
pub struct Finals {
    locks: Vec<Deferred>,
    bindings: Vec<Binding>,
}

impl Finals {
    /// Does it. What fails doesn't stop the rest: the instance runs here now, come what may.
    pub fn carry_out(self) {
        for lock in self.locks {
            if let Err(error) = lock.set() {
                tracing::error!(?lock, %error, "a lock was lost in the migration");
            }
        }
        for binding in self.bindings {
            if let Err(error) = binding.settle() {
                tracing::error!(%error, "a unix socket's file could not be put into its place");
            }
        }
    }
}

impl<'a> Restorer<'a> {
    /// Has made nothing yet.
    pub fn new(around: Surroundings<'a>) -> Self {
        Self {
            around,
            pipes: Pipes::default(),
            sockets: BTreeMap::new(),
            closing: BTreeMap::new(),
            unix: Vec::new(),
            in_flight: BTreeMap::new(),
            threads: BTreeMap::new(),
            fifos: Fifos::default(),
            nameless: Files::default(),
            signals: Vec::new(),
            finals: Finals::default(),
        }
    }

    /// Makes what has to be there before the first process is rebuilt. `stubs`: all of them, by their pids inside.
    pub fn prepare(
        &mut self,
        image: &InstanceImage,
        stubs: &mut BTreeMap<i32, &mut Remote>,
    ) -> Result<(), TraceeError> {
        let mut wanted = BTreeMap::new();
        for process in &image.processes {
            for descriptor in process.task.open_files().flat_map(|(_, descriptors)| descriptors) {
                if let DescriptorKind::Unix(image) = &descriptor.kind {
                    let main = process.task.threads.first();
                    let user =
                        main.map_or((0, 0), |main| (main.credentials.uids[1], main.credentials.gids[1]));
                    wanted.insert(image.inode, Wanted { holder: process.node.pid, image, user });
                }
            }
        }
        let Surroundings { link, same_kernel, .. } = self.around;
        let (made, closing, bindings) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut maker = Maker { link, stubs, same_kernel, made, closing, bindings };
        maker.make(&wanted)?;
        self.sockets = maker.made;
        self.closing = maker.closing;
        self.finals.bindings = maker.bindings.into_values().collect();
        self.unix = wanted.into_values().map(|wanted| (wanted.holder, wanted.image.clone())).collect();
        Ok(())
    }

    /// Passes again what waits in unix sockets together with descriptors, and sets what comes last.
    fn finish_unix(&mut self) -> Result<(), TraceeError> {
        for (holder, image) in self.unix.iter().filter(|(_, image)| image.passes_descriptors()) {
            let peer = match image.state {
                UnixState::Connected { peer } => self.sockets.get(&peer),
                UnixState::Orphan => self.closing.get(&image.inode),
                _ => None,
            };
            let Some(peer) = peer else {
                let text = "descriptors wait in a socket that is not connected to their sender: try again when they are read";
                return Err(TraceeError::Unsupported(text.into()));
            };
            let known = |inner: i32| self.around.stubs.get(&inner).copied();
            let descriptor = |number: i32| self.in_flight.get(&number).map(AsRawFd::as_raw_fd);
            unix::fill(peer, None, &image.queued, &known, &descriptor)
                .map_err(TraceeError::call("passing descriptors again", *holder))?;
        }
        self.closing.clear();
        unix::finish(&self.sockets, self.unix.iter().map(|(_, image)| image))
    }

    /// Completes what needs all processes and their threads.
    pub fn finish(mut self) -> Result<Finals, TraceeError> {
        self.finish_unix()?;
        for (ours, target) in std::mem::take(&mut self.signals) {
            signals::set(&ours, target, self.around.stubs)?;
        }
        Ok(std::mem::take(&mut self.finals))
    }

    /// Makes the descriptors of a thread that has a table of its own, and id `inner` inside. Its table is a copy of its
    /// process's, whose end of the link is `end`.
    pub fn restore_of_thread(
        &mut self,
        remote: &mut Remote,
        inner: i32,
        end: RawFd,
        descriptors: &[Descriptor],
    ) -> Result<Reconnected, TraceeError> {
        let (end, stub_end) = (end as u64, STUB_END as u64);
        remote.call("close_range", libc::SYS_close_range, [0, end - 1, 0, 0, 0, 0])?;
        remote.call("close_range", libc::SYS_close_range, [end + 1, u32::MAX.into(), 0, 0, 0, 0])?;
        remote.call("dup3", libc::SYS_dup3, [end, stub_end, libc::O_CLOEXEC as u64, 0, 0, 0])?;
        remote.call("close", libc::SYS_close, [end, 0, 0, 0, 0, 0])?;
        self.threads.insert(inner, remote.tid());
        let (reconnected, end) = self.restore(remote, descriptors)?;
        Self::close_link(remote, end)?;
        Ok(reconnected)
    }

    /// Makes the descriptors of one process in the stub behind `remote`, which has none open but its end of the link.
    /// Its connections are to be resumed when the network is there. Returns also under which number the link is open now,
    /// to be closed by [`Self::close_link`].
    pub fn restore(
        &mut self,
        remote: &mut Remote,
        descriptors: &[Descriptor],
    ) -> Result<(Reconnected, RawFd), TraceeError> {
        validate(descriptors)?;
        let (epolls, others): (Vec<_>, Vec<_>) = descriptors
            .iter()
            .partition(|descriptor| matches!(descriptor.kind, DescriptorKind::Epoll { .. }));
        // Where the link waits must not be wanted by anybody.
        let numbers = descriptors.iter().flat_map(|d| &d.numbers).map(|(fd, _)| *fd);
        let end = numbers.filter(|fd| *fd < IN_FLIGHT).map(|fd| fd + 1).max().unwrap_or(0).max(4);
        let mut batch = remote.batch();
        let args = [STUB_END.into(), end.into(), libc::O_CLOEXEC.into()];
        batch.call("dup3", libc::SYS_dup3, &args)?;
        batch.call("close", libc::SYS_close, &[STUB_END.into()])?;
        batch.run()?;
        // A connection may have its port from a listening socket, which could not take it any more afterwards.
        let (connected, others): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|descriptor| tcp::connection(descriptor).is_some());
        for descriptor in &others {
            let made = self.make(remote, descriptor, end)?;
            self.place(remote, made, descriptor)?;
        }
        let reconnected = self.reconnect(remote, &connected, end)?;
        // An epoll may watch any other, so they all must be there first.
        for descriptor in &epolls {
            let made = remote.call("epoll_create1", libc::SYS_epoll_create1, [0; 6])?;
            self.place(remote, made as RawFd, descriptor)?;
        }
        for descriptor in &epolls {
            let DescriptorKind::Epoll { watched } = &descriptor.kind else { continue };
            epolls::watch(remote, descriptor.numbers[0].0, watched, end + 1)?;
        }
        for descriptor in descriptors {
            let DescriptorKind::Inotify { watches } = &descriptor.kind else { continue };
            inotify::watch(remote, descriptor.numbers[0].0, watches)?;
        }
        // Last of all: closing any descriptor of a file gives up the process's locks on it.
        for descriptor in descriptors {
            let number = descriptor.numbers[0].0;
            for &lock in &descriptor.locks {
                let deferred = locks::set(remote, number, lock, self.around.same_kernel)?;
                self.finals.locks.extend(deferred);
            }
        }
        Ok((reconnected, end))
    }

    /// Closes a stub's end of the link: it gets no further descriptor.
    pub fn close_link(remote: &mut Remote, end: RawFd) -> Result<(), TraceeError> {
        remote.call("close", libc::SYS_close, [end as u64, 0, 0, 0, 0, 0]).map(drop)
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
            self.place(remote, made, descriptor)?;
        }
        Ok(reconnected)
    }

    fn place(
        &mut self,
        remote: &mut Remote,
        made: RawFd,
        descriptor: &Descriptor,
    ) -> Result<(), TraceeError> {
        let number = place(remote, made, descriptor)?;
        for (hidden, _) in descriptor.numbers.iter().filter(|(number, _)| *number >= IN_FLIGHT) {
            self.in_flight.insert(*hidden, remote.share_descriptor(number)?);
        }
        if let Some(target) = descriptor.signals {
            // Those whom it signals may not be there yet.
            self.signals.push((remote.share_descriptor(number)?, target));
        }
        if number == made && descriptor.numbers.iter().all(|(number, _)| *number >= IN_FLIGHT) {
            // Nobody has it, until it is read from a queue.
            remote.call("close", libc::SYS_close, [made as u64, 0, 0, 0, 0, 0])?;
        }
        Ok(())
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
                files::open(remote, path, descriptor.flags, *position, (*size, *digest))?
            }
            DescriptorKind::Directory { path, position, place } => {
                files::open_directory(remote, path, descriptor.flags, *position, *place)?
            }
            DescriptorKind::Nameless(image) => {
                let (link, objects) = (self.around.link, self.around.objects);
                self.nameless.open(remote, image, descriptor.flags, (link, end), objects)?
            }
            DescriptorKind::Fifo(fifo) => self.fifos.open(remote, fifo, descriptor.flags)?,
            DescriptorKind::Shared { pid: holder, number } => {
                let damaged = || TraceeError::Unsupported(format!("the image has no process {holder}"));
                if let Some(ours) = self.in_flight.get(number) {
                    return self.around.link.give(remote, end, ours);
                }
                let holder = self.threads.get(holder).or_else(|| self.around.stubs.get(holder));
                let stub = *holder.ok_or_else(damaged)?;
                let pidfd = process::pidfd_open(stub).map_err(TraceeError::call("pidfd_open", stub))?;
                let ours = process::pidfd_getfd(&pidfd, *number)
                    .map_err(TraceeError::call("taking a shared descriptor", stub))?;
                self.around.link.give(remote, end, &ours)?
            }
            DescriptorKind::Pipe { inode, queued, capacity } => {
                let made = self.pipes.end((*inode, *capacity), queued, descriptor.flags, pid)?;
                self.around.link.give(remote, end, made)?
            }
            DescriptorKind::Event { count, semaphore } => events::make_event(remote, *count, *semaphore)?,
            DescriptorKind::Timer { clock, spec, flags, ticks } => {
                events::make_timer(remote, *clock, (spec, *flags), *ticks)?
            }
            DescriptorKind::Master { number, .. } => {
                let missing = || TraceeError::Unsupported(format!("there is no pseudo-terminal {number}"));
                let master = self.around.terminals.master(*number).ok_or_else(missing)?;
                self.around.link.give(remote, end, master)?
            }
            DescriptorKind::Slave { number } => {
                files::open_path(remote, &format!("/dev/pts/{number}"), descriptor.flags)?
            }
            DescriptorKind::Inotify { .. } => inotify::make(remote)?,
            DescriptorKind::Process { pid: process } => pidfds::make(remote, *process)?,
            DescriptorKind::Signal { mask } => events::make_signal(remote, *mask)?,
            DescriptorKind::Socket(image) => {
                let args = [image.domain as u64, image.kind as u64, 0, 0, 0, 0];
                let made = remote.call("socket", libc::SYS_socket, args)? as RawFd;
                let ours = remote.share_descriptor(made)?;
                sockets::restore(&ours, image).map_err(TraceeError::call("restoring a socket", pid))?;
                if let SocketState::Ended { data } = &image.state {
                    ended::restore(remote, ours, image, data)?;
                }
                made
            }
            DescriptorKind::Datagram(image) => datagrams::make(remote, image)?,
            DescriptorKind::Netlink(image) => netlink::make(remote, image)?,
            DescriptorKind::Unix(image) => {
                let missing = || TraceeError::Unsupported("the image's unix sockets are damaged".into());
                let made = self.sockets.get(&image.inode).ok_or_else(missing)?;
                self.around.link.give(remote, end, made)?
            }
            DescriptorKind::Epoll { .. } => {
                remote.call("epoll_create1", libc::SYS_epoll_create1, [0; 6])? as RawFd
            }
        };
        Ok(made)
    }
}

impl Drop for Restorer<'_> {
    fn drop(&mut self) {
        if let Some(&stub) = self.around.stubs.values().next() {
            self.nameless.forget_names(stub);
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
/// Returns one of its numbers: one that waits in a queue stays where it is.
fn place(remote: &mut Remote, made: RawFd, descriptor: &Descriptor) -> Result<RawFd, TraceeError> {
    let numbers = || descriptor.numbers.iter().filter(|(number, _)| *number < IN_FLIGHT);
    let first = numbers().next().map(|(number, _)| *number);
    let mut stays = first.is_none();
    let mut batch = remote.batch();
    for &(number, close_on_exec) in numbers() {
        if number == made {
            stays = true;
            let flag = if close_on_exec { libc::FD_CLOEXEC } else { 0 };
            batch.call("fcntl", libc::SYS_fcntl, &[made.into(), libc::F_SETFD.into(), flag.into()])?;
        } else {
            let flag = if close_on_exec { libc::O_CLOEXEC } else { 0 };
            batch.call("dup3", libc::SYS_dup3, &[made.into(), number.into(), flag.into()])?;
        }
    }
    if !stays {
        batch.call("close", libc::SYS_close, &[made.into()])?;
    }
    let number = first.unwrap_or(made);
    match descriptor.kind {
        // Opened with its flags, or made and set already.
        DescriptorKind::File { .. } | DescriptorKind::Directory { .. } | DescriptorKind::Shared { .. } => {}
        _ => {
            let args = [number.into(), libc::F_SETFL.into(), descriptor.flags.into()];
            batch.call("fcntl", libc::SYS_fcntl, &args)?;
        }
    }
    batch.run()?;
    Ok(number)
}
