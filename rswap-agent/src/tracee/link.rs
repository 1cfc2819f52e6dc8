//! A way to hand descriptors to a stub: a unix socket whose other end it has had since its birth.
//!
//! The kernel lets one process take another's descriptor (pidfd_getfd), but not give it one. Children of the
//! stub inherit the socket, so one pair serves a whole tree, one call after the other.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair,
};

use super::{TraceeError, remote::Remote};

/// The stub's number of its end.
pub const STUB_END: RawFd = 3;

/// The agent's end.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl Link {
    /// Makes the pair: (the agent's end, the end that the stub is born with).
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(ours), theirs))
    }

    /// The agent's end of a pair (of datagrams) that was made elsewhere.
    pub(super) fn of(ours: OwnedFd) -> Self {
        Self(ours)
    }

    /// Gives `descriptor` to the stub behind `remote`, which has its end at `end`; returns its number there.
    pub fn give(
        &self,
        remote: &mut Remote,
        end: RawFd,
        descriptor: &impl AsRawFd,
    ) -> Result<RawFd, TraceeError> {
        let failed =
            |error: nix::Error| TraceeError::call("sending a descriptor", remote.tid())(error.into());
        let descriptors = [descriptor.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&descriptors)];
        let data = [IoSlice::new(&[0])];
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &data, &control, MsgFlags::empty(), None).map_err(failed)?;
        receive(remote, end)
    }
}

/// recvmsg(2) inside the stub. In the scratch page: `struct msghdr` (56 bytes), `struct iovec` (16), the byte, and from
/// 128 on the control buffer (`CMSG_SPACE` of one descriptor: 24 bytes, the descriptor at 16).
fn receive(remote: &mut Remote, end: RawFd) -> Result<RawFd, TraceeError> {
    const IOVEC: u64 = 56;
    const BYTE: u64 = 80;
    const CONTROL: u64 = 128;
    const CONTROL_BYTES: u64 = 24;
    let at = remote.put(0, &[0; 160])?;
    let iovec = [at + BYTE, 1].map(u64::to_ne_bytes).concat();
    remote.put(IOVEC, &iovec)?;
    // name, its length, iovec, how many, control, its length, flags.
    let header = [0, 0, at + IOVEC, 1, at + CONTROL, CONTROL_BYTES, 0].map(u64::to_ne_bytes).concat();
    remote.put(0, &header)?;
    let flags = (libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) as u64;
    remote.call("recvmsg", libc::SYS_recvmsg, [end as u64, at, flags, 0, 0, 0])?;
    let control: [u8; 24] = remote.get(CONTROL)?;
    let number =
        |at: usize| i32::from_ne_bytes([control[at], control[at + 1], control[at + 2], control[at + 3]]);
    if (number(8), number(12)) != (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
        return Err(TraceeError::Unsupported(format!("process {} was given no descriptor", remote.tid())));
    }
    Ok(number(16))
}
