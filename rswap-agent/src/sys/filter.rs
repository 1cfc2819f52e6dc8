//! Socket filters: classic BPF programs that decide which packets a socket gets.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use super::socket;

/// Lengths that a program returns: the whole packet, or nothing of it.
const TAKE: u32 = u32::MAX;
const DROP: u32 = 0;

const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

fn step(code: u32, k: u32, if_true: u8, if_false: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: if_true, jf: if_false, k }
}

/// Drops segments that open a connection; the offset is that of the flags in a TCP header.
fn no_connections() -> [libc::sock_filter; 4] {
    const FLAGS_AT: u32 = 13;
    const SYN: u32 = 2;
    [
        step(LOAD_BYTE, FLAGS_AT, 0, 0),
        step(IF_ANY_BIT, SYN, 0, 1),
        step(RETURN, DROP, 0, 0),
        step(RETURN, TAKE, 0, 0),
    ]
}

/// A TCP socket drops segments that open a connection, and takes all others; the peer tries again a second later. What
/// a listening socket accepts inherits the filter.
pub fn take_no_connections(socket: &OwnedFd) -> io::Result<()> {
    attach(socket, &no_connections())
}

/// Whether a socket has the filter of [`take_no_connections`].
pub fn takes_no_connections(socket: &OwnedFd) -> bool {
    let ours = no_connections();
    if instructions(socket) != Ok(ours.len() as u32) {
        return false;
    }
    let mut theirs = ours.map(|_| step(0, 0, 0, 0));
    let mut len = theirs.len() as libc::socklen_t;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_GET_FILTER);
    // SAFETY: no safe wrapper; here the length is in instructions, and the kernel writes no more than these.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, theirs.as_mut_ptr().cast(), &mut len) };
    let same = |(a, b): (&libc::sock_filter, &libc::sock_filter)| {
        (a.code, a.jt, a.jf, a.k) == (b.code, b.jt, b.jf, b.k)
    };
    done == 0 && ours.iter().zip(&theirs).all(same)
}

/// A packet socket takes only frames to `mac`, and to `other`.
pub fn take_frames_to(socket: &OwnedFd, mac: [u8; 6], other: Option<[u8; 6]>) -> io::Result<()> {
    take_frames(socket, 0, std::iter::once(mac).chain(other))
}

/// A packet socket takes only frames from `mac`.
pub fn take_frames_from(socket: &OwnedFd, mac: [u8; 6]) -> io::Result<()> {
    take_frames(socket, 6, std::iter::once(mac))
}

/// Only frames with one of `macs` at that offset.
fn take_frames(socket: &OwnedFd, at: u32, macs: impl Iterator<Item = [u8; 6]>) -> io::Result<()> {
    let mut program = Vec::new();
    for [a, b, c, d, e, f] in macs {
        program.extend([
            step(LOAD_WORD, at, 0, 0),
            step(IF_EQUAL, u32::from_be_bytes([a, b, c, d]), 0, 3),
            step(LOAD_HALF, at + 4, 0, 0),
            step(IF_EQUAL, u32::from_be_bytes([0, 0, e, f]), 0, 1),
            step(RETURN, TAKE, 0, 0),
        ]);
    }
    program.push(step(RETURN, DROP, 0, 0));
    attach(socket, &program)
}

fn attach(socket: &OwnedFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    let len = size_of::<libc::sock_fprog>() as libc::socklen_t;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
    // SAFETY: no safe wrapper; the kernel copies the program, of the length that is passed, and checks it.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const program).cast(), len) };
    super::check(done.into()).map(|_| ())
}

/// Removes a socket's filter; that there is none is no error.
pub fn detach(socket: &OwnedFd) -> io::Result<()> {
    match socket::set_option(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ => Ok(()),
    }
}

/// Whether a socket has a filter that isn't one of ours.
pub fn is_attached(socket: &OwnedFd) -> bool {
    instructions(socket) != Ok(0) && !takes_no_connections(socket)
}

/// The length of a socket's filter; an eBPF filter can't be read, which is an error.
fn instructions(socket: &OwnedFd) -> Result<u32, ()> {
    let mut instructions = 0;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_GET_FILTER);
    // SAFETY: no safe wrapper; with a length of 0 the kernel writes nothing but the number of instructions.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, std::ptr::null_mut(), &mut instructions) };
    if done == 0 { Ok(instructions) } else { Err(()) }
}

/// A socket drops everything that comes in.
pub fn take_nothing(socket: &OwnedFd) -> io::Result<()> {
    attach(socket, &[step(RETURN, DROP, 0, 0)])
}
