//! What waits in the queue of a unix socket: looked at without taking it out, and put in again.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrLike, UnixAddr, UnixCredentials, recvmsg,
        sendmsg,
    },
};

use super::{Identity, Message, describe::identity};
use crate::sys::{process, socket};

/// Bytes that are carried per socket at most: more than the kernel's default send buffer holds.
const QUEUE_LIMIT: usize = 4 << 20;
/// Messages that are carried per socket at most.
const MESSAGES_LIMIT: usize = 4096;
/// A message is no longer than this.
const MESSAGE_LIMIT: usize = 1 << 20;
/// `SCM_MAX_FD` of the kernel.
const DESCRIPTORS_LIMIT: usize = 253;

/// Messages with the descriptors that are passed with each, as our duplicates; or why they can't be carried.
type Peeked = Result<Vec<(Message, Vec<OwnedFd>)>, (String, &'static str)>;

/// Copies what is queued, and leaves it there. `read_ended`: the end of what can be read is part of it.
pub(super) fn peek(ours: &OwnedFd, kind: i32, read_ended: bool) -> io::Result<Peeked> {
    let before = socket::option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
    let peeked = peek_from_the_start(ours, kind, read_ended);
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before)?;
    peeked
}

fn peek_from_the_start(ours: &OwnedFd, kind: i32, read_ended: bool) -> io::Result<Peeked> {
    let mut queued: Vec<(Message, Vec<OwnedFd>)> = Vec::new();
    let mut total = 0;
    let mut buffer = vec![0; MESSAGE_LIMIT];
    for _ in 0..MESSAGES_LIMIT {
        let Some(mut piece) = peek_piece(ours, &mut buffer)? else { return Ok(Ok(queued)) };
        // The other end is closed, and all was seen.
        if piece.bytes == 0 && (kind == libc::SOCK_STREAM || (kind == libc::SOCK_SEQPACKET && read_ended)) {
            return Ok(Ok(queued));
        }
        if kind == libc::SOCK_STREAM && piece.bytes == buffer.len() {
            break;
        }
        if kind == libc::SOCK_STREAM && !piece.descriptors.is_empty() {
            piece = without_what_is_before(ours, &mut buffer, total, piece)?;
        }
        total += piece.bytes;
        if total > QUEUE_LIMIT || piece.cut {
            break;
        }
        push(&mut queued, kind, &buffer[..piece.bytes], piece);
    }
    Ok(Err(("a unix socket with a very long queue".into(), "try again when the program has read from it")))
}

/// What one look at a queue gives, besides the bytes.
#[derive(Default)]
struct Piece {
    bytes: usize,
    /// The message was longer.
    cut: bool,
    from: Vec<u8>,
    sender: Option<Identity>,
    descriptors: Vec<OwnedFd>,
}

/// Looks at what is at the socket's `SO_PEEK_OFF`, which goes on behind it; `None` behind the last.
fn peek_piece(ours: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<Piece>> {
    let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS_LIMIT], UnixCredentials, [u8; 1024]);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut into = [IoSliceMut::new(buffer)];
    let got = match recvmsg::<UnixAddr>(ours.as_raw_fd(), &mut into, Some(&mut control), flags) {
        // A datagram socket has an error when its peer is closed, but nothing to read.
        Err(Errno::EAGAIN | Errno::ECONNRESET | Errno::ENOTCONN | Errno::EINVAL) => return Ok(None),
        got => got?,
    };
    let mut piece = Piece { bytes: got.bytes, ..Piece::default() };
    for message in got.cmsgs()? {
        match message {
            ControlMessageOwned::ScmRights(passed) => {
                piece.descriptors.extend(passed.into_iter().map(process::adopt_descriptor));
            }
            ControlMessageOwned::ScmCredentials(told) => {
                piece.sender = Some(identity((told.pid(), told.uid(), told.gid())));
            }
            // Made by the kernel from the others, for those who asked.
            _ => {}
        }
    }
    piece.from = got.address.map(|address| name_of(&address)).unwrap_or_default();
    piece.cut = got.flags.contains(MsgFlags::MSG_TRUNC);
    Ok(Some(piece))
}

/// Descriptors come with the first byte that was sent together with them. Looked at, a stream gives what is before that in one
/// piece with them, and ends behind the last byte that was sent together with them (`unix_stream_read_generic` in
/// net/unix/af_unix.c). Where that began shows a look that has not room for all of it.
///
/// Looks again at `piece`, which begins `at` bytes in: the part before the descriptors if there is one, else all of it.
fn without_what_is_before(ours: &OwnedFd, buffer: &mut [u8], at: usize, piece: Piece) -> io::Result<Piece> {
    let from_there = || socket::set_option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, at as i32);
    let changed = || io::Error::other("the queue of a unix stream changed while it was looked at");
    from_there()?;
    let before = socket::bytes_before_last_piece(ours, piece.bytes)?;
    from_there()?;
    if before == 0 {
        return peek_piece(ours, &mut buffer[..piece.bytes])?.ok_or_else(changed);
    }
    // A look goes on to the next piece when there is no room left, and takes its descriptors without any of its bytes.
    let before = peek_piece(ours, &mut buffer[..before])?.ok_or_else(changed)?;
    Ok(Piece { descriptors: Vec::new(), ..before })
}

/// Adds what was found to the last message, if it is of the same stream and sender.
fn push(queued: &mut Vec<(Message, Vec<OwnedFd>)>, kind: i32, data: &[u8], piece: Piece) {
    let Piece { from, sender, descriptors, .. } = piece;
    match queued.last_mut() {
        Some((last, passed))
            if kind == libc::SOCK_STREAM
                && descriptors.is_empty()
                && passed.is_empty()
                && last.sender == sender =>
        {
            last.data.extend_from_slice(data);
        }
        _ => {
            let data = data.to_vec();
            queued.push((Message { data, from, sender, descriptors: Vec::new() }, descriptors));
        }
    }
}

/// The bytes of a name, as `getsockname` has them after the family.
fn name_of(address: &UnixAddr) -> Vec<u8> {
    // Of a stream's peer the kernel tells nothing, not even the family.
    if address.len() as usize <= size_of::<libc::sa_family_t>() {
        return Vec::new();
    }
    if let Some(path) = address.path() {
        let mut name = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec();
        name.push(0);
        return name;
    }
    match address.as_abstract() {
        Some(name) => [&[0], name].concat(),
        None => Vec::new(),
    }
}

/// Sends `messages` again from `socket`, to the one that it is connected to or to another. `known`: the pid that the agent sees of a pid inside. `descriptors`: what stands for each number.
pub(in super::super) fn fill(
    socket: &OwnedFd,
    to: Option<&UnixAddr>,
    messages: &[Message],
    known: &dyn Fn(i32) -> Option<i32>,
    descriptors: &dyn Fn(i32) -> Option<RawFd>,
) -> io::Result<()> {
    for message in messages {
        let passed: Option<Vec<RawFd>> =
            message.descriptors.iter().map(|number| descriptors(*number)).collect();
        let passed = passed.ok_or_else(|| io::Error::other("a descriptor of a message is missing"))?;
        let credentials = message.sender.map(|sender| told(sender, known));
        let mut control = Vec::new();
        if !passed.is_empty() {
            control.push(ControlMessage::ScmRights(&passed));
        }
        if let Some(credentials) = &credentials {
            control.push(ControlMessage::ScmCredentials(credentials));
        }
        let mut rest = message.data.as_slice();
        loop {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let sent = sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(rest)], &control, flags, to)?;
            rest = &rest[sent.min(rest.len())..];
            if rest.is_empty() {
                break;
            }
            // They belong to the first byte.
            control.retain(|message| !matches!(message, ControlMessage::ScmRights(_)));
        }
    }
    Ok(())
}

/// A sender that has ended, or was outside, reads as pid 0: like this agent, whom the instance can't see.
fn told(sender: Identity, known: &dyn Fn(i32) -> Option<i32>) -> UnixCredentials {
    let pid = known(sender.pid).unwrap_or_else(|| std::process::id() as i32);
    libc::ucred { pid, uid: sender.uid, gid: sender.gid }.into()
}
