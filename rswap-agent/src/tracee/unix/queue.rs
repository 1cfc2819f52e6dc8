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
    let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS_LIMIT], UnixCredentials, [u8; 1024]);
    for _ in 0..MESSAGES_LIMIT {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let mut into = [IoSliceMut::new(&mut buffer)];
        let got = match recvmsg::<UnixAddr>(ours.as_raw_fd(), &mut into, Some(&mut control), flags) {
            // A datagram socket has an error when its peer is closed, but nothing to read.
            Err(Errno::EAGAIN | Errno::ECONNRESET | Errno::ENOTCONN | Errno::EINVAL) => {
                return Ok(Ok(queued));
            }
            got => got?,
        };
        let mut descriptors = Vec::new();
        let mut sender = None;
        for message in got.cmsgs()? {
            match message {
                ControlMessageOwned::ScmRights(passed) => {
                    descriptors.extend(passed.into_iter().map(process::adopt_descriptor));
                }
                ControlMessageOwned::ScmCredentials(told) => {
                    sender = Some(identity((told.pid(), told.uid(), told.gid())));
                }
                // Made by the kernel from the others, for those who asked.
                _ => {}
            }
        }
        let bytes = got.bytes;
        // The other end is closed, and all was seen.
        if bytes == 0 && (kind == libc::SOCK_STREAM || (kind == libc::SOCK_SEQPACKET && read_ended)) {
            return Ok(Ok(queued));
        }
        let from = got.address.map(|address| name_of(&address)).unwrap_or_default();
        total += bytes;
        if total > QUEUE_LIMIT || got.flags.contains(MsgFlags::MSG_TRUNC) {
            break;
        }
        if kind == libc::SOCK_STREAM && !descriptors.is_empty() {
            // Looked at, a stream gives what is before them in the same piece (`unix_stream_read_generic` in
            // net/unix/af_unix.c goes on to them), and which byte they come with can't be told.
            let what = "a unix stream with descriptors in its queue".to_owned();
            return Ok(Err((what, "try again when the program has read them")));
        }
        push(&mut queued, kind, &buffer[..bytes], &from, sender, descriptors);
    }
    Ok(Err(("a unix socket with a very long queue".into(), "try again when the program has read from it")))
}

/// Adds what was found to the last message, if it is of the same stream and sender.
fn push(
    queued: &mut Vec<(Message, Vec<OwnedFd>)>,
    kind: i32,
    data: &[u8],
    from: &[u8],
    sender: Option<Identity>,
    descriptors: Vec<OwnedFd>,
) {
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
            let (data, from) = (data.to_vec(), from.to_vec());
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
