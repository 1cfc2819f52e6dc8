//! Pseudo-terminals: their settings, and what is queued in them (ioctl_tty(2)).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// `struct termios2`: four words of flags, line discipline, 19 control characters, two speeds.
pub type Settings = [u8; 44];
/// Rows, columns, pixels.
pub type Window = [u16; 4];

const TCGETS2: libc::c_ulong = 0x802c_542a;
const TCSETS2: libc::c_ulong = 0x402c_542b;
const TIOCGPTN: libc::c_ulong = 0x8004_5430;
const TIOCSPTLCK: libc::c_ulong = 0x4004_5431;
const TIOCGPTPEER: libc::c_ulong = 0x5441;
const TIOCGPKT: libc::c_ulong = 0x8004_5438;
const TIOCPKT: libc::c_ulong = 0x5420;
const TIOCGPTLCK: libc::c_ulong = 0x8004_5439;
const TIOCGEXCL: libc::c_ulong = 0x8004_5440;
const TIOCEXCL: libc::c_ulong = 0x540c;

fn get_int(tty: &OwnedFd, request: libc::c_ulong) -> io::Result<i32> {
    let mut value = 0_i32;
    // SAFETY: each request that is passed here writes one int.
    super::check(unsafe { libc::ioctl(tty.as_raw_fd(), request, &mut value) }.into())?;
    Ok(value)
}

fn set_int(tty: &OwnedFd, request: libc::c_ulong, value: i32) -> io::Result<()> {
    // SAFETY: each request that is passed here reads one int.
    super::check(unsafe { libc::ioctl(tty.as_raw_fd(), request, &value) }.into()).map(|_| ())
}

/// The settings, of the other end for a master.
pub fn settings(tty: &OwnedFd) -> io::Result<Settings> {
    let mut settings = [0_u8; 44];
    // SAFETY: the kernel writes a `struct termios2`, which has the array's size.
    super::check(unsafe { libc::ioctl(tty.as_raw_fd(), TCGETS2, settings.as_mut_ptr()) }.into())?;
    Ok(settings)
}

/// Sets the settings at once; nothing that is queued goes.
pub fn set_settings(tty: &OwnedFd, settings: &Settings) -> io::Result<()> {
    // SAFETY: the kernel reads a `struct termios2`, which has the array's size.
    super::check(unsafe { libc::ioctl(tty.as_raw_fd(), TCSETS2, settings.as_ptr()) }.into()).map(|_| ())
}

/// The window's size.
pub fn window(tty: &OwnedFd) -> io::Result<Window> {
    let mut window = [0_u16; 4];
    // SAFETY: the kernel writes a `struct winsize`, four numbers.
    super::check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCGWINSZ, window.as_mut_ptr()) }.into())?;
    Ok(window)
}

/// Sets the window's size; where that is another one, the foreground group gets SIGWINCH.
pub fn set_window(tty: &OwnedFd, window: Window) -> io::Result<()> {
    // SAFETY: the kernel reads a `struct winsize`, four numbers.
    super::check(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSWINSZ, window.as_ptr()) }.into())
        .map(|_| ())
}

/// The number of a master's pair.
pub fn number(master: &OwnedFd) -> io::Result<u32> {
    get_int(master, TIOCGPTN).map(|number| number as u32)
}

/// Whether the other end can't be opened yet.
pub fn is_locked(master: &OwnedFd) -> io::Result<bool> {
    get_int(master, TIOCGPTLCK).map(|locked| locked != 0)
}

/// Lets the other end be opened, or not.
pub fn lock(master: &OwnedFd, locked: bool) -> io::Result<()> {
    set_int(master, TIOCSPTLCK, locked.into())
}

/// Whether a master is in packet mode.
pub fn packets(master: &OwnedFd) -> io::Result<bool> {
    get_int(master, TIOCGPKT).map(|on| on != 0)
}

/// Sets a master's packet mode.
pub fn set_packets(master: &OwnedFd, on: bool) -> io::Result<()> {
    set_int(master, TIOCPKT, on.into())
}

/// Whether nobody else may open it.
pub fn is_exclusive(tty: &OwnedFd) -> io::Result<bool> {
    get_int(tty, TIOCGEXCL).map(|on| on != 0)
}

/// Nobody else may open it from here on.
pub fn set_exclusive(tty: &OwnedFd) -> io::Result<()> {
    // SAFETY: a request without an argument.
    super::check(unsafe { libc::ioctl(tty.as_raw_fd(), TIOCEXCL) }.into()).map(|_| ())
}

/// Foreground group of the other end of a master, as this process sees it; `None` without a session.
pub fn foreground(master: &OwnedFd) -> Option<i32> {
    get_int(master, libc::TIOCGPGRP).ok().filter(|group| *group > 0)
}

/// Opens the other end of a master, for us alone: without waiting, and not as a controlling terminal.
pub fn open_slave(master: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: a request with a plain number; a non-negative result is a descriptor that is ours.
    let fd = super::check(unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags) }.into())?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Stops what is written to a terminal on its way (as Ctrl-S does), or lets it go on.
pub fn stop_output(slave: &OwnedFd, stop: bool) -> io::Result<()> {
    let action = if stop { libc::TCOOFF } else { libc::TCOON };
    // SAFETY: a plain call with a descriptor and a number.
    super::check(unsafe { libc::tcflow(slave.as_raw_fd(), action) }.into()).map(|_| ())
}

/// What poll(2) says of a terminal at the moment: of `events`, and of hang-ups. What waits in buffers is sorted into its
/// queues by it.
pub fn poll(tty: &OwnedFd, events: i16) -> io::Result<i16> {
    let mut poll = libc::pollfd { fd: tty.as_raw_fd(), events, revents: 0 };
    // SAFETY: the kernel reads and writes the one struct that is passed.
    super::check(unsafe { libc::poll(&mut poll, 1, 0) }.into())?;
    Ok(poll.revents)
}
