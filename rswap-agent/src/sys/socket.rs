//! Socket options and names as raw bytes, so that any option can be read here and set there.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// An `int` option.
pub fn option(socket: &OwnedFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0_i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &mut len) };
    super::check(done.into())?;
    Ok(value)
}

/// Sets an `int` option.
pub fn set_option(socket: &OwnedFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of `value`.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    super::check(done.into()).map(|_| ())
}

/// An option of up to `limit` bytes, as the kernel's bytes.
pub fn option_bytes(socket: &OwnedFd, level: i32, name: i32, limit: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0_u8; limit];
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut len) };
    super::check(done.into())?;
    value.truncate(len as usize);
    Ok(value)
}

/// Sets an option in the kernel's bytes.
pub fn set_option_bytes(socket: &OwnedFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let len = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of `value`.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), len) };
    super::check(done.into()).map(|_| ())
}

/// The socket's own address, as the kernel's bytes.
pub fn local_name(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    name_by(socket, libc::getsockname)
}

/// The address that the socket is connected to, as the kernel's bytes.
pub fn peer_name(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    name_by(socket, libc::getpeername)
}

type AskName = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

fn name_by(socket: &OwnedFd, ask: AskName) -> io::Result<Vec<u8>> {
    let mut name = vec![0_u8; size_of::<libc::sockaddr_storage>()];
    let mut len = name.len() as libc::socklen_t;
    // SAFETY: `ask` is one of the two system calls above, which write at most `len` bytes to `name`.
    let done = unsafe { ask(socket.as_raw_fd(), name.as_mut_ptr().cast(), &mut len) };
    super::check(done.into())?;
    name.truncate(len as usize);
    Ok(name)
}

/// Binds the socket to an address in the kernel's bytes.
pub fn bind(socket: &OwnedFd, name: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `name.len()` bytes of `name`.
    let done = unsafe { libc::bind(socket.as_raw_fd(), name.as_ptr().cast(), name.len() as libc::socklen_t) };
    super::check(done.into()).map(|_| ())
}

/// Starts listening.
pub fn listen(socket: &OwnedFd, backlog: i32) -> io::Result<()> {
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::listen(socket.as_raw_fd(), backlog) }.into()).map(|_| ())
}

/// Whether there is something to be read.
pub fn is_readable(socket: &OwnedFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the kernel reads and writes the one struct that is passed.
    super::check(unsafe { libc::poll(&mut poll, 1, 0) }.into())?;
    Ok(poll.revents & libc::POLLIN != 0)
}

/// Connects to an address in the kernel's bytes.
pub fn connect(socket: &OwnedFd, name: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `name.len()` bytes of `name`.
    let done =
        unsafe { libc::connect(socket.as_raw_fd(), name.as_ptr().cast(), name.len() as libc::socklen_t) };
    super::check(done.into()).map(|_| ())
}

/// Accepts a connection.
pub fn accept(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let (no_name, no_len) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: a system call that writes no name where both pointers are null; a non-negative result is a descriptor
    // that is ours.
    let fd = super::check(
        unsafe { libc::accept4(socket.as_raw_fd(), no_name, no_len, libc::SOCK_CLOEXEC) }.into(),
    )?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `SO_PEERCRED` of a unix socket: pid, user and group of the process at the other end, or that listens.
pub fn peer_credentials(socket: &OwnedFd) -> io::Result<(i32, u32, u32)> {
    let bytes = option_bytes(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, size_of::<libc::ucred>())?;
    let word = |at: usize| bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default();
    Ok((i32::from_ne_bytes(word(0)), u32::from_ne_bytes(word(4)), u32::from_ne_bytes(word(8))))
}

/// The supplementary groups of whoever is connected (SO_PEERGROUPS).
///
/// # Errors
/// As getsockopt(2).
pub fn peer_groups(socket: &OwnedFd) -> io::Result<Vec<u32>> {
    // More than anybody is in; who is in more has none here.
    let bytes = option_bytes(socket, libc::SOL_SOCKET, libc::SO_PEERGROUPS, 4096 * size_of::<u32>())?;
    Ok(bytes
        .chunks_exact(4)
        .map(|bytes| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect())
}

/// Of the next `bytes` bytes at the `SO_PEEK_OFF` of a unix stream, which end where something ends that was sent at once: how many
/// come before that last piece. `SO_PEEK_OFF` moves on behind them.
///
/// A look copies piece by piece, and counts no piece that does not fit what can be written: so it gets room for all bytes but
/// one, and what cannot be written behind that.
pub fn bytes_before_last_piece(socket: &OwnedFd, bytes: usize) -> io::Result<usize> {
    let page = super::mem::PAGE_SIZE as usize;
    let room = bytes.saturating_sub(1).next_multiple_of(page);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; nothing that is there already is touched.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), room + page, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is ours, and nothing refers to it; its last page becomes inaccessible. Of the `bytes` bytes that the
    // kernel is given, the last one is in that page, where it gets EFAULT and writes nothing.
    let got = unsafe {
        let behind = start.byte_add(room);
        match libc::mprotect(behind, page, libc::PROT_NONE) {
            0 => {
                let at = behind.byte_sub(bytes.saturating_sub(1));
                libc::recv(socket.as_raw_fd(), at, bytes, libc::MSG_PEEK | libc::MSG_DONTWAIT)
            }
            failed => failed as isize,
        }
    };
    let got = super::check(got as libc::c_long);
    // SAFETY: made above, and nothing refers to it any more.
    super::check(unsafe { libc::munmap(start, room + page) }.into())?;
    match got {
        // The first piece already.
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        got => Ok(got? as usize),
    }
}

/// What `TCP_INFO` says of a TCP socket, as far as rswap needs it.
#[derive(Clone, Copy, Debug)]
pub struct TcpInfo {
    /// `TCP_ESTABLISHED` is 1, `TCP_CLOSE` 7, `TCP_LISTEN` 10 (include/net/tcp_states.h).
    pub state: u8,
    /// For a listening socket: the backlog given to `listen(2)`.
    pub backlog: u32,
    /// For a listening socket: connections that wait to be accepted.
    pub waiting: u32,
    /// Timestamps, selective acknowledgements and window scales are in use: `TCPI_OPT_*`.
    pub options: u8,
    /// Window scales (the peer's, ours), as powers of two.
    pub window_scale: (u8, u8),
    /// Bytes of data in a full segment that it sends.
    pub segment_bytes: u32,
}

/// Reads `TCP_INFO`.
pub fn tcp_info(socket: &OwnedFd) -> io::Result<TcpInfo> {
    // SAFETY: the struct is plain numbers, for which all zeros is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &mut len,
        )
    };
    super::check(done.into())?;
    let scales = info.tcpi_snd_rcv_wscale;
    Ok(TcpInfo {
        state: info.tcpi_state,
        backlog: info.tcpi_sacked,
        waiting: info.tcpi_unacked,
        options: info.tcpi_options,
        window_scale: (scales & 15, scales >> 4),
        segment_bytes: info.tcpi_snd_mss,
    })
}

/// Copies up to `limit` bytes of what is queued in `pipe` without taking them out.
pub fn peek_pipe(pipe: &OwnedFd, limit: usize) -> io::Result<Vec<u8>> {
    let mut waiting = 0_i32;
    // SAFETY: FIONREAD writes one int.
    super::check(unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut waiting) }.into())?;
    let waiting = waiting as usize;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    if waiting > limit {
        return Err(io::Error::other(format!("{waiting} bytes are queued in a pipe, more than {limit}")));
    }
    let (reader, writer) = nix::unistd::pipe()?;
    // A pipe holds pages, not bytes: as many slots as the source has are enough for what it holds.
    // SAFETY: plain system calls without pointers.
    unsafe {
        let size = super::check(libc::fcntl(pipe.as_raw_fd(), libc::F_GETPIPE_SZ).into())?;
        super::check(libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, size as i32).into())?;
    }
    // SAFETY: a plain system call without pointers; it copies references, and leaves the source as it was.
    let copied = unsafe { libc::tee(pipe.as_raw_fd(), writer.as_raw_fd(), waiting, libc::SPLICE_F_NONBLOCK) };
    let copied = super::check(copied as libc::c_long)? as usize;
    if copied != waiting {
        return Err(io::Error::other(format!(
            "only {copied} of {waiting} queued bytes of a pipe were copied"
        )));
    }
    let mut queued = vec![0; waiting];
    io::Read::read_exact(&mut std::fs::File::from(reader), &mut queued)?;
    Ok(queued)
}

/// Bytes that were received and not read yet.
pub fn bytes_waiting(socket: &OwnedFd) -> io::Result<usize> {
    let mut waiting = 0_i32;
    // SAFETY: no safe wrapper; FIONREAD writes one int.
    super::check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &mut waiting) }.into())?;
    Ok(waiting.max(0) as usize)
}

/// A new socket.
pub fn create(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call; a non-negative result is a descriptor that is ours.
    let fd = super::check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) }.into())?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
