//! One unix socket, by reading only.

use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
};

use super::{
    super::{TraceeError, capture::Status},
    Identity, Message, SocketFile, UnixImage, UnixState,
    diag::{Known, Peers},
    queue,
};
use crate::sys::{filter, socket, tcp};

/// Numbers that the libc crate does not name (include/uapi/asm-generic/socket.h).
const SO_PASSPIDFD: i32 = 76;

/// Options that are carried where they aren't 0.
const OPTIONS: [i32; 4] = [libc::SO_PASSCRED, libc::SO_PASSSEC, SO_PASSPIDFD, libc::SO_RCVLOWAT];

/// What a socket is and why it can't be carried, with what to do.
pub(crate) type Refusal = (String, &'static str);

/// What is found of a socket: its image, and the descriptors of each of its messages.
pub(crate) type Described = Result<(UnixImage, Vec<Vec<OwnedFd>>), Refusal>;

/// Describes the socket behind our duplicate of it, which process `pid` has; with `contents`, also what waits in its queue.
pub(crate) fn describe(
    ours: &OwnedFd,
    inode: u64,
    pid: i32,
    peers: &Peers,
    contents: bool,
) -> Result<Described, TraceeError> {
    let failed = |error| TraceeError::call("looking at a unix socket", pid)(error);
    let option = |name| socket::option(ours, libc::SOL_SOCKET, name);
    let kind = option(libc::SO_TYPE).map_err(failed)?;
    let refuse = |what: &str, remedy| Ok(Err((what.to_owned(), remedy)));
    let known = match peers.of(inode)? {
        Some(known) => known,
        // It was made since all were listed.
        None if !contents => Known::default(),
        None => return refuse("a unix socket that the kernel does not list", "try again"),
    };
    if filter::is_attached(ours) {
        return refuse("a unix socket with a filter", "filters aren't carried in this version");
    }
    if kind == libc::SOCK_STREAM && tcp::has_urgent_data(ours) {
        return refuse("a unix socket with urgent data", "it isn't carried in this version: try again");
    }
    let name = socket::local_name(ours).map_err(failed)?.split_off(size_of::<libc::sa_family_t>());
    let state = match state(ours, inode, kind, &known, peers, contents)? {
        Ok(state) => state,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let file = match known.file {
        Some(file) => match find(&name, pid, file) {
            Ok(file) => file,
            Err(refusal) => return Ok(Err(refusal)),
        },
        None => None,
    };
    let shutdown = known.shutdown;
    let read_ended = shutdown & 1 != 0;
    let listens = matches!(state, UnixState::Listening { .. });
    let (queued, descriptors): (Vec<Message>, _) = match contents && !listens {
        false => (Vec::new(), Vec::new()),
        true => match queue::peek(ours, kind, read_ended).map_err(failed)? {
            Ok(queued) => queued.into_iter().unzip(),
            Err(refusal) => return Ok(Err(refusal)),
        },
    };
    let mut options = Vec::new();
    for name in OPTIONS {
        // What an older kernel does not know is not set.
        let usual = i32::from(name == libc::SO_RCVLOWAT);
        let value = option(name).unwrap_or(usual);
        options.extend((value != usual).then_some((libc::SOL_SOCKET, name, value)));
    }
    let timeout = |name| {
        let value = socket::option_bytes(ours, libc::SOL_SOCKET, name, size_of::<libc::timeval>());
        let value = value.map_err(failed)?;
        Ok::<_, TraceeError>(if value.iter().all(|byte| *byte == 0) { Vec::new() } else { value })
    };
    let image = UnixImage {
        kind,
        inode,
        name,
        file,
        state,
        peer_credentials: identity(socket::peer_credentials(ours).map_err(failed)?),
        queued,
        options,
        timeouts: [timeout(libc::SO_RCVTIMEO)?, timeout(libc::SO_SNDTIMEO)?],
        send_buffer: option(libc::SO_SNDBUF).map_err(failed)?,
        shutdown,
    };
    Ok(Ok((image, descriptors)))
}

fn state(
    ours: &OwnedFd,
    inode: u64,
    kind: i32,
    known: &Known,
    peers: &Peers,
    contents: bool,
) -> Result<Result<UnixState, Refusal>, TraceeError> {
    if known.listens {
        let (waiting, backlog) = (known.waiting.clone(), known.backlog);
        return Ok(Ok(UnixState::Listening { backlog, waiting }));
    }
    if peers.is_waiting(inode)? {
        // Without the listening socket, whose it is by then, what was sent can't be read.
        return Ok(match tcp::unsent(ours) {
            Ok(0) => Ok(UnixState::Waiting),
            _ => Err((
                "a unix connection that waits to be accepted, and has sent data".into(),
                "try again when the program has accepted it",
            )),
        });
    }
    Ok(Ok(match known.peer {
        None => UnixState::Alone,
        // The end of a peer that was closed is known.
        Some(0) if kind != libc::SOCK_DGRAM && known.shutdown == 0 && contents => {
            let what = "a unix connection that waits to be accepted outside of the instance";
            return Ok(Err((what.into(), "try again when it is accepted")));
        }
        Some(0) if kind != libc::SOCK_DGRAM && known.shutdown == 0 => UnixState::Waiting,
        Some(0) => UnixState::Orphan,
        Some(peer) => {
            // A peer outside can be connected to anew by its name, if nothing is lost by it.
            let name = socket::peer_name(ours).unwrap_or_default();
            let name = name.get(size_of::<libc::sa_family_t>()..).unwrap_or_default();
            match kind == libc::SOCK_DGRAM
                && name.first().is_some_and(|byte| *byte == b'/')
                && !peers.is_inside(peer)
            {
                true => UnixState::Outside { peer: name.to_vec() },
                false => UnixState::Connected { peer },
            }
        }
    }))
}

/// The file of a socket's name: `None` when it was deleted, or another one has its name now.
fn find(name: &[u8], pid: i32, (inode, device): (u32, u32)) -> Result<Option<SocketFile>, Refusal> {
    let name = String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
    let path = match name.starts_with('/') {
        true => name,
        false => {
            let directory = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            format!("{}/{name}", directory.display())
        }
    };
    let Ok(metadata) = fs::symlink_metadata(format!("/proc/{pid}/root{path}")) else { return Ok(None) };
    // The kernel's own form of a device's number: 20 bits of minor.
    let here = (libc::major(metadata.dev()) << 20) | libc::minor(metadata.dev());
    // It tells no more than 32 bits of an inode.
    if (metadata.ino() as u32, here) != (inode, device) {
        return Ok(None);
    }
    if Path::new(&path).components().any(|part| part == std::path::Component::ParentDir) {
        return Err((
            format!("a unix socket with the name {path}"),
            "names with .. aren't carried in this version",
        ));
    }
    let access = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
    Ok(Some(SocketFile { path, inode: (metadata.dev(), metadata.ino()), access }))
}

/// Who that is inside of the instance.
pub(super) fn identity((pid, uid, gid): (i32, u32, u32)) -> Identity {
    let inner =
        if pid > 0 { Status::read(pid).ok().and_then(|status| status.last_number("NSpid:")) } else { None };
    Identity { pid: inner.unwrap_or(0), uid, gid }
}
