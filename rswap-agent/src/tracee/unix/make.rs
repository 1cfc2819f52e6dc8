//! All unix sockets of an instance, made again before the first of its processes is rebuilt: while all stubs are root's,
//! each can stand in for the process that made a socket, so that `SO_PEERCRED` says what it said.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use nix::sys::socket::{Shutdown, UnixAddr, shutdown};

use super::{
    super::{
        TraceeError,
        link::{Link, STUB_END},
        remote::Remote,
    },
    Identity, SocketFile, UnixImage, UnixState, address,
    names::Binding,
    queue::fill,
};
use crate::sys::socket;

/// A socket that is to be made, and the pid inside of the process that has it.
pub(in super::super) struct Wanted<'a> {
    /// Whose it is.
    pub(in super::super) holder: i32,
    /// What it is.
    pub(in super::super) image: &'a UnixImage,
    /// That process's user and group.
    pub(in super::super) user: (u32, u32),
}

/// Makes the sockets.
pub(in super::super) struct Maker<'a, 'b> {
    /// The way to give a stub a descriptor.
    pub(in super::super) link: &'a Link,
    /// The stubs, by their pids inside.
    pub(in super::super) stubs: &'a mut BTreeMap<i32, &'b mut Remote>,
    /// The source has the same kernel, and so may have the same files.
    pub(in super::super) same_kernel: bool,
    /// What was made, by the source's inode.
    pub(in super::super) made: BTreeMap<u64, OwnedFd>,
    /// The other ends of orphans in whose queues descriptors are: to be closed when these are passed again.
    pub(in super::super) closing: BTreeMap<u64, OwnedFd>,
    /// Files that are to be put into their places, by the source's inode.
    pub(in super::super) bindings: BTreeMap<u64, Binding>,
}

fn damaged(what: &str) -> TraceeError {
    TraceeError::Unsupported(format!("the image's unix sockets are damaged: {what}"))
}

impl Maker<'_, '_> {
    /// Makes all of `wanted`, which has one entry for each socket.
    pub(in super::super) fn make(&mut self, wanted: &BTreeMap<u64, Wanted<'_>>) -> Result<(), TraceeError> {
        // Connections first: for each, somebody listens for a moment under the name that the listening one takes afterwards.
        for (inode, one) in wanted {
            match one.image.state {
                UnixState::Connected { peer } if !self.made.contains_key(inode) => match wanted.get(&peer) {
                    Some(other) if other.image.state == (UnixState::Connected { peer: *inode }) => {
                        self.connection(one, other)?;
                    }
                    // A datagram socket's peer need not be connected to it.
                    Some(_) if one.image.kind == libc::SOCK_DGRAM => {}
                    _ => return Err(damaged("a peer is missing")),
                },
                UnixState::Orphan if one.image.kind != libc::SOCK_DGRAM || one.image.name.is_empty() => {
                    self.orphan(one)?;
                }
                _ => {}
            }
        }
        for (inode, one) in wanted {
            if !self.made.contains_key(inode) && one.image.state != UnixState::Waiting {
                self.alone(one)?;
            }
        }
        self.waiting(wanted)?;
        let orphan = |one: &&Wanted<'_>| one.image.state == UnixState::Orphan;
        for one in wanted.values().filter(|one| !orphan(one) && !one.image.passes_descriptors()) {
            self.fill(wanted, one)?;
        }
        for (inode, one) in wanted.iter().filter(|(_, one)| one.image.kind == libc::SOCK_DGRAM) {
            self.connect_datagrams(*inode, one, wanted)?;
        }
        Ok(())
    }

    /// Puts what waits at `one` into its queue again.
    fn fill(&mut self, wanted: &BTreeMap<u64, Wanted<'_>>, one: &Wanted<'_>) -> Result<(), TraceeError> {
        let image = one.image;
        let outer: BTreeMap<i32, i32> = self.stubs.iter().map(|(inner, stub)| (*inner, stub.tid())).collect();
        let known = |inner: i32| outer.get(&inner).copied();
        let peer = match &image.state {
            UnixState::Connected { peer } => self.made.get(peer).map(OwnedFd::try_clone).transpose(),
            _ => Ok(None),
        };
        let peer = peer.map_err(TraceeError::call("duplicating a socket", one.holder))?;
        for message in &image.queued {
            let messages = std::slice::from_ref(message);
            let filled = match &peer {
                // A stream, or a pair: nobody else can have sent it.
                Some(peer) if image.kind != libc::SOCK_DGRAM || image.name.is_empty() => {
                    fill(peer, None, messages, &known, &|_| None)
                }
                _ => {
                    let to = self
                        .address_of(image)
                        .map_err(TraceeError::call("naming a unix socket", one.holder))?;
                    let (sender, _binding) = self.sender(wanted, one, &message.from)?;
                    fill(&sender, Some(&to.0), messages, &known, &|_| None)
                }
            };
            filled.map_err(TraceeError::call("filling a unix socket", one.holder))?;
        }
        Ok(())
    }

    /// Where this agent finds a socket that was made here; the file has to stay open for it.
    fn address_of(&self, image: &UnixImage) -> std::io::Result<(UnixAddr, Option<File>)> {
        match self.bindings.get(&image.inode) {
            Some(binding) => {
                let file = open_path(binding.file())?;
                let name = format!("/proc/self/fd/{}", file.as_raw_fd());
                Ok((UnixAddr::new(name.as_str())?, Some(file)))
            }
            None => Ok((UnixAddr::new_abstract(image.name.get(1..).unwrap_or_default())?, None)),
        }
    }

    /// A socket that datagrams to `one` are sent from, under the name `from`.
    fn sender(
        &mut self,
        wanted: &BTreeMap<u64, Wanted<'_>>,
        one: &Wanted<'_>,
        from: &[u8],
    ) -> Result<(OwnedFd, Option<Binding>), TraceeError> {
        let by_name = wanted.iter().find(|(_, other)| {
            !from.is_empty() && other.image.name == from && other.image.kind == libc::SOCK_DGRAM
        });
        if let Some(made) = by_name.and_then(|(inode, _)| self.made.get(inode)) {
            return Ok((
                made.try_clone().map_err(TraceeError::call("duplicating a socket", one.holder))?,
                None,
            ));
        }
        let stub = self.stub(one.holder)?;
        let ours = self.socket(stub, one.image.kind)?;
        // One that has ended: its name leads nowhere any more.
        let binding = self.bind(&ours, from, None, stub)?;
        Ok((ours, binding))
    }

    /// Two sockets that are connected to each other.
    fn connection(&mut self, one: &Wanted<'_>, other: &Wanted<'_>) -> Result<(), TraceeError> {
        let named = |wanted: &Wanted<'_>| !wanted.image.name.is_empty();
        if one.image.kind != other.image.kind {
            return Err(damaged("peers of two types"));
        }
        if one.image.kind == libc::SOCK_DGRAM {
            if named(one) || named(other) {
                // Made one by one, and connected when all are there.
                return Ok(());
            }
        } else if named(one) || named(other) {
            // Who was accepted has the listening socket's name; a client may have one of its own, in its own file.
            let accepted_is_one = match (named(one), named(other)) {
                (true, false) => true,
                (false, true) => false,
                _ => one.image.file.is_none() || other.image.file.is_some(),
            };
            return if accepted_is_one { self.accepted(other, one) } else { self.accepted(one, other) };
        }
        let (ours, theirs) = self.pair(one.image.kind, one.image.peer_credentials, one.holder)?;
        self.made.insert(one.image.inode, ours);
        self.made.insert(other.image.inode, theirs);
        Ok(())
    }

    /// What was made by connecting and accepting.
    fn accepted(&mut self, client: &Wanted<'_>, server: &Wanted<'_>) -> Result<(), TraceeError> {
        let (listening, binding) =
            self.listening(server.image, client.image.peer_credentials, server.holder, 1)?;
        let connecting = server.image.peer_credentials;
        let stub = self.stub_for(connecting.pid, client.holder)?;
        let ours = self.socket(stub, client.image.kind)?;
        if let Some(binding) = self.bind(&ours, &client.image.name, client.image.file.as_ref(), stub)? {
            self.bindings.insert(client.image.inode, binding);
        }
        let file = binding.as_ref().map(|binding| binding.file().to_owned());
        self.connect_to(stub, &ours, &server.image.name, file.as_deref(), connecting)?;
        let accepted = socket::accept(&listening)
            .map_err(TraceeError::call("accepting a unix connection", server.holder))?;
        self.made.insert(client.image.inode, ours);
        self.made.insert(server.image.inode, accepted);
        Ok(())
    }

    /// A socket whose peer is closed.
    fn orphan(&mut self, one: &Wanted<'_>) -> Result<(), TraceeError> {
        let image = one.image;
        let ours = if image.name.is_empty() {
            let (ours, theirs) = self.pair(image.kind, image.peer_credentials, one.holder)?;
            self.made.insert(image.inode, ours);
            return self.fill_orphan(one, theirs);
        } else {
            let (listening, binding) = self.listening(image, Identity::default(), one.holder, 1)?;
            let stub = self.stub_for(image.peer_credentials.pid, one.holder)?;
            let theirs = self.socket(stub, image.kind)?;
            let file = binding.as_ref().map(|binding| binding.file().to_owned());
            self.connect_to(stub, &theirs, &image.name, file.as_deref(), image.peer_credentials)?;
            let ours = socket::accept(&listening)
                .map_err(TraceeError::call("accepting a unix connection", one.holder))?;
            self.made.insert(image.inode, ours);
            theirs
        };
        self.fill_orphan(one, ours)
    }

    fn fill_orphan(&mut self, one: &Wanted<'_>, peer: OwnedFd) -> Result<(), TraceeError> {
        if one.image.passes_descriptors() {
            self.closing.insert(one.image.inode, peer);
            return Ok(());
        }
        let outer: BTreeMap<i32, i32> = self.stubs.iter().map(|(inner, stub)| (*inner, stub.tid())).collect();
        let ours = self.made.get(&one.image.inode).ok_or_else(|| damaged("a socket is missing"))?;
        set_options(ours, one.image, one.holder)?;
        fill(&peer, None, &one.image.queued, &|inner| outer.get(&inner).copied(), &|_| None)
            .map_err(TraceeError::call("filling a unix socket", one.holder))
        // The peer is closed here.
    }

    /// One that has no peer, or gets it afterwards.
    fn alone(&mut self, one: &Wanted<'_>) -> Result<(), TraceeError> {
        let image = one.image;
        let (ours, binding) = match &image.state {
            UnixState::Listening { backlog, .. } => {
                self.listening(image, image.peer_credentials, one.holder, *backlog)?
            }
            _ => {
                let stub = self.stub(one.holder)?;
                let ours = self.socket(stub, image.kind)?;
                let binding = self.bind(&ours, &image.name, image.file.as_ref(), stub)?;
                (ours, binding)
            }
        };
        set_options(&ours, image, one.holder)?;
        self.bindings.extend(binding.map(|binding| (image.inode, binding)));
        self.made.insert(image.inode, ours);
        Ok(())
    }

    /// Those who wait to be accepted connect again, in their order.
    fn waiting(&mut self, wanted: &BTreeMap<u64, Wanted<'_>>) -> Result<(), TraceeError> {
        for (listener, one) in wanted {
            let UnixState::Listening { waiting, .. } = &one.image.state else { continue };
            for inode in waiting {
                let client = wanted.get(inode).ok_or_else(|| damaged("one that waits is missing"))?;
                let stub = self.stub(client.holder)?;
                let ours = self.socket(stub, client.image.kind)?;
                // A full queue must be an error, and no wait.
                nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
                    .map_err(|error| TraceeError::call("F_SETFL", client.holder)(error.into()))?;
                let binding = self.bind(&ours, &client.image.name, client.image.file.as_ref(), stub)?;
                self.bindings.extend(binding.map(|binding| (*inode, binding)));
                let (uid, gid) = client.user;
                let by = Identity { pid: client.holder, uid, gid };
                self.connect(stub, &ours, *listener, &one.image.name, by)?;
                self.made.insert(*inode, ours);
            }
        }
        Ok(())
    }

    fn connect_datagrams(
        &mut self,
        inode: u64,
        one: &Wanted<'_>,
        wanted: &BTreeMap<u64, Wanted<'_>>,
    ) -> Result<(), TraceeError> {
        let stub = self.stub(one.holder)?;
        match &one.image.state {
            UnixState::Connected { peer } => {
                let other = wanted.get(peer).ok_or_else(|| damaged("a peer is missing"))?;
                if one.image.name.is_empty() && other.image.name.is_empty() {
                    return Ok(()); // a pair
                }
                let ours = self.duplicate(inode)?;
                self.connect(stub, &ours, *peer, &other.image.name, Identity::default())
            }
            UnixState::Outside { peer } => {
                let ours = self.duplicate(inode)?;
                self.connect_to(stub, &ours, peer, None, Identity::default()).map_err(|error| {
                    let name = String::from_utf8_lossy(peer).trim_end_matches('\0').to_owned();
                    TraceeError::Unsupported(format!(
                        "nobody takes datagrams at {name} at the destination ({error})"
                    ))
                })
            }
            UnixState::Orphan if !one.image.name.is_empty() => {
                let gone = self.socket(stub, libc::SOCK_DGRAM)?;
                // Without a name of its choice the kernel gives it an abstract one.
                socket::bind(&gone, &address(&[]))
                    .map_err(TraceeError::call("binding a unix socket", one.holder))?;
                let name = socket::local_name(&gone).map_err(TraceeError::call("getsockname", one.holder))?;
                let ours = self.duplicate(inode)?;
                self.connect_to(stub, &ours, name.get(2..).unwrap_or_default(), None, Identity::default())
            }
            _ => Ok(()),
        }
    }

    fn duplicate(&self, inode: u64) -> Result<OwnedFd, TraceeError> {
        let made = self.made.get(&inode).ok_or_else(|| damaged("a socket is missing"))?;
        made.try_clone().map_err(TraceeError::call("duplicating a socket", 0))
    }

    /// A listening socket; the process that listens is `by`.
    fn listening(
        &mut self,
        image: &UnixImage,
        by: Identity,
        holder: i32,
        backlog: u32,
    ) -> Result<(OwnedFd, Option<Binding>), TraceeError> {
        let stub = self.stub_for(by.pid, holder)?;
        let number = self.socket_in(stub, image.kind)?;
        let remote = self.remote(stub)?;
        let ours = remote.share_descriptor(number)?;
        let listens = matches!(image.state, UnixState::Listening { .. });
        // The file of one that was accepted is the listening socket's.
        let file = image.file.as_ref().filter(|_| listens);
        let binding = self.bind(&ours, &image.name, file, stub)?;
        let remote = self.remote(stub)?;
        let args = [number as u64, backlog.into(), 0, 0, 0, 0];
        acting_as(remote, by, |remote| remote.call("listen", libc::SYS_listen, args))?;
        remote.call("close", libc::SYS_close, [number as u64, 0, 0, 0, 0, 0])?;
        Ok((ours, binding))
    }

    /// Two sockets as of socketpair(2), made by `by`.
    fn pair(&mut self, kind: i32, by: Identity, holder: i32) -> Result<(OwnedFd, OwnedFd), TraceeError> {
        let stub = self.stub_for(by.pid, holder)?;
        let remote = self.remote(stub)?;
        let at = remote.put(0, &[0; 8])?;
        let args = [libc::AF_UNIX as u64, kind as u64, 0, at, 0, 0];
        acting_as(remote, by, |remote| remote.call("socketpair", libc::SYS_socketpair, args))?;
        let numbers: [u8; 8] = remote.get(0)?;
        let number = |at: usize| numbers[at..].first_chunk().map_or(0, |four| i32::from_ne_bytes(*four));
        Ok((remote.take_descriptor(number(0))?, remote.take_descriptor(number(4))?))
    }

    fn socket_in(&mut self, stub: i32, kind: i32) -> Result<RawFd, TraceeError> {
        let args = [libc::AF_UNIX as u64, kind as u64, 0, 0, 0, 0];
        Ok(self.remote(stub)?.call("socket", libc::SYS_socket, args)? as RawFd)
    }

    fn socket(&mut self, stub: i32, kind: i32) -> Result<OwnedFd, TraceeError> {
        let number = self.socket_in(stub, kind)?;
        self.remote(stub)?.take_descriptor(number)
    }

    fn bind(
        &mut self,
        ours: &OwnedFd,
        name: &[u8],
        file: Option<&SocketFile>,
        stub: i32,
    ) -> Result<Option<Binding>, TraceeError> {
        let same_kernel = self.same_kernel;
        let pid = self.remote(stub)?.tid();
        Binding::bind(ours, name, file, &format!("/proc/{pid}/root"), same_kernel).map_err(|error| {
            let name = String::from_utf8_lossy(name).trim_matches('\0').to_owned();
            TraceeError::Unsupported(format!(
                "the unix socket {name} can't be bound at the destination: {error}"
            ))
        })
    }

    /// Connects to a socket that was made here.
    fn connect(
        &mut self,
        stub: i32,
        ours: &OwnedFd,
        inode: u64,
        name: &[u8],
        by: Identity,
    ) -> Result<(), TraceeError> {
        let file = self.bindings.get(&inode).map(|binding| binding.file().to_owned());
        self.connect_to(stub, ours, name, file.as_deref(), by)
    }

    /// Connects in stub `stub` to a name, or to a file that will have the name.
    fn connect_to(
        &mut self,
        stub: i32,
        ours: &OwnedFd,
        name: &[u8],
        file: Option<&std::path::Path>,
        by: Identity,
    ) -> Result<(), TraceeError> {
        let link = self.link;
        let remote = self.remote(stub)?;
        let number = link.give(remote, STUB_END, ours)?;
        let mut target = None;
        let name = match file {
            // A longer path than an address holds: the stub gets the file itself.
            Some(file) => {
                let file =
                    open_path(file).map_err(TraceeError::call("opening a socket's file", remote.tid()))?;
                let number = link.give(remote, STUB_END, &file)?;
                target = Some(number);
                format!("/proc/self/fd/{number}\0").into_bytes()
            }
            None => name.to_vec(),
        };
        let address = address(&name);
        let at = remote.put(0, &address)?;
        let args = [number as u64, at, address.len() as u64, 0, 0, 0];
        let connected = acting_as(remote, by, |remote| remote.call("connect", libc::SYS_connect, args));
        for number in target.into_iter().chain([number]) {
            remote.call("close", libc::SYS_close, [number as u64, 0, 0, 0, 0, 0])?;
        }
        connected.map(|_| ())
    }

    /// The stub of process `pid`, or of another one when that has none.
    fn stub_for(&self, pid: i32, otherwise: i32) -> Result<i32, TraceeError> {
        if self.stubs.contains_key(&pid) { Ok(pid) } else { self.stub(otherwise) }
    }

    fn stub(&self, pid: i32) -> Result<i32, TraceeError> {
        self.stubs.contains_key(&pid).then_some(pid).ok_or_else(|| damaged("a process is missing"))
    }

    fn remote(&mut self, stub: i32) -> Result<&mut Remote, TraceeError> {
        self.stubs.get_mut(&stub).map(|remote| &mut **remote).ok_or_else(|| damaged("a process is missing"))
    }
}

/// Options, ends of streams and buffers, when everything is in the queues.
pub(in super::super) fn finish<'a>(
    made: &BTreeMap<u64, OwnedFd>,
    images: impl Iterator<Item = &'a UnixImage>,
) -> Result<(), TraceeError> {
    for image in images {
        let ours = made.get(&image.inode).ok_or_else(|| damaged("a socket is missing"))?;
        set_options(ours, image, 0)?;
        for (bit, how) in [(1, Shutdown::Read), (2, Shutdown::Write)] {
            if image.shutdown & bit != 0 {
                // The end may be there already, by the peer's.
                let _ = shutdown(ours.as_raw_fd(), how);
            }
        }
    }
    Ok(())
}

fn open_path(path: &std::path::Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)
}

fn set_options(ours: &OwnedFd, image: &UnixImage, pid: i32) -> Result<(), TraceeError> {
    let set = |level, name, value| {
        socket::set_option(ours, level, name, value)
            .map_err(TraceeError::call("setting a unix socket's options", pid))
    };
    for &(level, name, value) in &image.options {
        set(level, name, value)?;
    }
    let names = [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO];
    for (name, value) in names.into_iter().zip(&image.timeouts).filter(|(_, value)| !value.is_empty()) {
        socket::set_option_bytes(ours, libc::SOL_SOCKET, name, value)
            .map_err(TraceeError::call("setting a unix socket's timeouts", pid))?;
    }
    // The kernel doubles what it is given.
    set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, image.send_buffer / 2)
}

/// Makes a call as another user and group: those are what the kernel notes of who listens and connects.
fn acting_as<T>(
    remote: &mut Remote,
    by: Identity,
    work: impl FnOnce(&mut Remote) -> Result<T, TraceeError>,
) -> Result<T, TraceeError> {
    const UNCHANGED: u64 = u32::MAX as u64;
    let set = |remote: &mut Remote, uid: u32, gid: u32| {
        let group = [UNCHANGED, gid.into(), UNCHANGED, 0, 0, 0];
        let user = [UNCHANGED, uid.into(), UNCHANGED, 0, 0, 0];
        // With the user's capabilities the group could not be changed any more; on the way back it is the other way round.
        if uid != 0 || gid != 0 {
            remote.call("setresgid", libc::SYS_setresgid, group)?;
            remote.call("setresuid", libc::SYS_setresuid, user)?;
        } else {
            remote.call("setresuid", libc::SYS_setresuid, user)?;
            remote.call("setresgid", libc::SYS_setresgid, group)?;
        }
        Ok::<(), TraceeError>(())
    };
    if by.uid == 0 && by.gid == 0 {
        return work(remote);
    }
    set(remote, by.uid, by.gid)?;
    let done = work(remote);
    set(remote, 0, 0)?;
    done
}
