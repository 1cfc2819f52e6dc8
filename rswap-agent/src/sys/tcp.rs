//! TCP sockets in repair mode (`tcp(7)` doesn't tell of it; the kernel's net/ipv4/tcp.c does): their queues
//! and sequence numbers can be read and set, connecting and closing send nothing.

use std::{
    io,
    net::TcpStream,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::socket;

/// How a socket enters and leaves repair mode (include/uapi/linux/tcp.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Enter.
    On,
    /// Leave; a socket of an established connection sends a window probe, which the peer answers at once.
    Off,
    /// Leave and send nothing.
    OffSilently,
}

/// Enters or leaves repair mode. The kernel replaces `SO_REUSEADDR` in both directions: the caller sets it again.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` over the socket's network namespace, and for listening sockets.
pub fn repair(socket: &OwnedFd, mode: Repair) -> io::Result<()> {
    let value = match mode {
        Repair::On => 1,
        Repair::Off => 0,
        Repair::OffSilently => -1,
    };
    socket::set_option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, value)
}

/// Whether a socket is in repair mode.
pub fn is_in_repair(socket: &OwnedFd) -> bool {
    socket::option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR).is_ok_and(|value| value != 0)
}

/// Which of a socket's queues repair mode works on (include/uapi/linux/tcp.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Received and not read yet.
    Receive = 1,
    /// Written and not acknowledged yet.
    Send = 2,
}

/// Chooses the queue that reads, writes and sequence numbers are about.
pub fn select_queue(socket: &OwnedFd, queue: Queue) -> io::Result<()> {
    socket::set_option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, queue as i32)
}

/// The sequence number after the last byte of a queue.
pub fn sequence(socket: &OwnedFd, queue: Queue) -> io::Result<u32> {
    select_queue(socket, queue)?;
    Ok(socket::option(socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ)? as u32)
}

/// Sets the sequence number of the first byte that will be in a queue; only before connecting.
pub fn set_sequence(socket: &OwnedFd, queue: Queue, sequence: u32) -> io::Result<()> {
    select_queue(socket, queue)?;
    socket::set_option(socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, sequence as i32)
}

/// `struct tcp_repair_window`: both sides' windows, in bytes and sequence numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Sequence number of the segment that told the peer's window last.
    pub update_at: u32,
    /// The peer's window.
    pub send: u32,
    /// The largest window that the peer has had.
    pub send_max: u32,
    /// The window that the peer was told.
    pub receive: u32,
    /// What was received when it was told.
    pub receive_at: u32,
}

const _: () = assert!(size_of::<Window>() == 20);

/// Reads `TCP_REPAIR_WINDOW`; in repair mode only.
pub fn window(socket: &OwnedFd) -> io::Result<Window> {
    let mut window = Window::default();
    let mut len = size_of::<Window>() as libc::socklen_t;
    let (level, name) = (libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW);
    // SAFETY: no safe wrapper knows this option; the kernel writes at most `len` bytes to `window`, plain numbers.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut window).cast(), &mut len) };
    super::check(done.into())?;
    Ok(window)
}

/// Sets `TCP_REPAIR_WINDOW`; in repair mode only.
///
/// # Errors
/// `EINVAL` when it contradicts the sequence numbers.
pub fn set_window(socket: &OwnedFd, window: &Window) -> io::Result<()> {
    let len = size_of::<Window>() as libc::socklen_t;
    let (level, name) = (libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW);
    // SAFETY: no safe wrapper knows this option; the kernel reads `len` bytes of `window`.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (window as *const Window).cast(), len) };
    super::check(done.into()).map(|_| ())
}

/// What was agreed when a connection was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// Largest segment that the peer takes, in bytes.
    pub mss: u32,
    /// Window scales (the peer's, ours), as powers of two.
    pub window_scale: Option<(u8, u8)>,
    /// Selective acknowledgements.
    pub selective: bool,
    /// Timestamps.
    pub timestamps: bool,
}

/// Sets what was agreed, right after connecting in repair mode.
pub fn set_agreed(socket: &OwnedFd, agreed: &Agreed) -> io::Result<()> {
    // Numbers of TCP's own options (RFC 9293, 7323, 2018).
    const MSS: u32 = 2;
    const SCALE: u32 = 3;
    const SELECTIVE: u32 = 4;
    const TIMESTAMPS: u32 = 8;
    let mut options = vec![[MSS, agreed.mss]];
    if let Some((theirs, ours)) = agreed.window_scale {
        options.push([SCALE, u32::from(theirs) | u32::from(ours) << 16]);
    }
    if agreed.selective {
        options.push([SELECTIVE, 0]);
    }
    if agreed.timestamps {
        options.push([TIMESTAMPS, 0]);
    }
    let len = size_of_val(options.as_slice()) as libc::socklen_t;
    let (level, name) = (libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS);
    // SAFETY: no safe wrapper knows this option; the kernel reads `len` bytes, pairs of u32 (`struct
    // tcp_repair_opt`).
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, options.as_ptr().cast(), len) };
    super::check(done.into()).map(|_| ())
}

/// What is in a socket's queues, in bytes. The end of the stream (FIN) counts as one of those to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// Received and not read yet; without the end of the stream.
    pub received: u32,
    /// Written and not acknowledged.
    pub unacknowledged: u32,
    /// Of these, not even sent.
    pub unsent: u32,
}

/// Reads how much is queued.
pub fn queued(socket: &OwnedFd) -> io::Result<Queued> {
    /// Of include/uapi/linux/sockios.h.
    const SIOCOUTQNSD: libc::Ioctl = 0x894b;
    let ask = |request: libc::Ioctl| {
        let mut bytes = 0_i32;
        // SAFETY: no safe wrapper; each of the three requests writes one int.
        super::check(unsafe { libc::ioctl(socket.as_raw_fd(), request, &mut bytes) }.into())?;
        Ok::<u32, io::Error>(bytes as u32)
    };
    Ok(Queued {
        received: ask(libc::FIONREAD)?,
        unacknowledged: ask(libc::TIOCOUTQ)?,
        unsent: ask(SIOCOUTQNSD)?,
    })
}

/// Bytes that were written and not taken by the peer yet (`SIOCOUTQ`), also of a unix socket.
pub fn unsent(socket: &OwnedFd) -> io::Result<u32> {
    let mut bytes = 0_i32;
    // SAFETY: no safe wrapper; the request writes one int.
    super::check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) }.into())?;
    Ok(bytes as u32)
}

/// The shortest round trip that a connection has seen (`tcpi_min_rtt`).
pub fn least_round_trip(stream: &TcpStream) -> io::Result<Duration> {
    /// Offset of `tcpi_min_rtt` in `struct tcp_info` (include/uapi/linux/tcp.h; since Linux 4.6).
    const AT: usize = 148;
    let socket = OwnedFd::from(stream.try_clone()?);
    let info = socket::option_bytes(&socket, libc::IPPROTO_TCP, libc::TCP_INFO, AT + 4)?;
    let us = info.get(AT..).and_then(|rest| rest.first_chunk()).map(|bytes| u32::from_ne_bytes(*bytes));
    let us = us.ok_or_else(|| io::Error::other("TCP_INFO is too short"))?;
    Ok(Duration::from_micros(us.into()))
}

/// What a connection's send buffer grows to in this network namespace, in bytes (`tcp_wmem` of tcp(7)).
pub fn largest_send_buffer_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").ok()?;
    text.split_whitespace().nth(2)?.parse().ok()
}

/// How many bytes the peer has acknowledged since the socket was made, the end of the stream included.
pub fn acknowledged(socket: &OwnedFd) -> io::Result<u64> {
    /// Offset of `tcpi_bytes_acked` in `struct tcp_info` (include/uapi/linux/tcp.h; since Linux 4.1).
    const AT: usize = 120;
    let info = socket::option_bytes(socket, libc::IPPROTO_TCP, libc::TCP_INFO, AT + 8)?;
    let bytes = info.get(AT..).and_then(|rest| rest.first_chunk());
    bytes.map(|bytes| u64::from_ne_bytes(*bytes)).ok_or_else(|| io::Error::other("TCP_INFO is too short"))
}

/// Copies up to `limit` bytes from the front of the selected queue and leaves them there; in repair mode only. An
/// empty queue is no error.
pub fn peek_all(socket: &OwnedFd, limit: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0_u8; limit];
    if limit == 0 {
        return Ok(data);
    }
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most `data.len()` bytes to `data`.
    let got = unsafe { libc::recv(socket.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), flags) };
    let got = match super::check(got as libc::c_long) {
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => 0,
        got => got?,
    };
    data.truncate(got as usize);
    Ok(data)
}

/// Whether a byte of urgent data waits to be read.
pub fn has_urgent_data(socket: &OwnedFd) -> bool {
    let mut byte = 0_u8;
    let flags = libc::MSG_PEEK | libc::MSG_OOB | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most one byte to `byte`.
    let got = unsafe { libc::recv(socket.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
    got > 0
}

/// Writes to the selected queue in repair mode, or sends; returns how much was taken. Never waits.
pub fn write(socket: &OwnedFd, data: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads `data.len()` bytes of `data`.
    let sent = unsafe { libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) };
    super::check(sent as libc::c_long).map(|sent| sent as usize)
}

/// Whether nothing more can be read once the queue is empty: the peer ended its stream, or the program did.
pub fn reading_ended(socket: &OwnedFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: the kernel reads and writes the one struct that is passed.
    super::check(unsafe { libc::poll(&mut poll, 1, 0) }.into())?;
    Ok(poll.revents & libc::POLLRDHUP != 0)
}
