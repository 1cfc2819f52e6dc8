//! Terminals at the destination.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt},
    },
};

use super::{
    super::{TraceeError, remote::Remote},
    Terminal, controlling, queues,
};
use crate::sys::tty;

/// More pairs than a devpts has room for (`kernel.pty.max`).
const NUMBER_LIMIT: u32 = 4096;

/// The pairs of an instance that is being built. The slaves stay open until all of it is there: a terminal whose last slave is
/// closed controls nobody any more.
#[derive(Debug, Default)]
pub struct Terminals(BTreeMap<u32, Pair>);

#[derive(Debug)]
struct Pair {
    master: OwnedFd,
    slave: Option<OwnedFd>,
}

impl Terminals {
    /// Makes pair `number` the controlling terminal of the session that the stub behind `remote` leads.
    pub fn control(&mut self, remote: &mut Remote, number: u32) -> Result<(), TraceeError> {
        let pid = remote.tid();
        if controlling(pid)? == Some(number) {
            return Ok(());
        }
        let failed = |error: io::Error| TraceeError::call("making a pseudo-terminal", pid)(error);
        let pair = self.pair(pid, number).map_err(failed)?;
        if pair.slave.is_none() {
            pair.slave = Some(tty::open_slave(&pair.master).map_err(failed)?);
        }
        let at = remote.put(0, format!("/dev/pts/{number}\0").as_bytes())?;
        let args = [libc::AT_FDCWD as u64, at, libc::O_RDWR as u64, 0, 0, 0];
        let opened = remote.call("opening its terminal", libc::SYS_openat, args)?;
        remote.call("close", libc::SYS_close, [opened, 0, 0, 0, 0, 0])?;
        match controlling(pid)? == Some(number) {
            true => Ok(()),
            false => {
                Err(TraceeError::Unsupported(format!("terminal {number} can't be given to process {pid}")))
            }
        }
    }

    /// The pair with this number in the devpts that stub `pid` sees.
    fn pair(&mut self, pid: i32, number: u32) -> io::Result<&mut Pair> {
        if number > NUMBER_LIMIT {
            return Err(io::Error::other(format!("terminal {number} is beyond any limit")));
        }
        match self.0.entry(number) {
            Entry::Occupied(made) => Ok(made.into_mut()),
            Entry::Vacant(missing) => Ok(missing.insert(Pair { master: make(pid, number)?, slave: None })),
        }
    }

    /// Sets what the pair was and fills its queues; before the foreground groups are set, who would get a signal.
    pub fn restore(&mut self, pid: i32, number: u32, image: &Terminal) -> Result<(), TraceeError> {
        let pair = self.pair(pid, number).map_err(TraceeError::call("making a pseudo-terminal", pid))?;
        pair.restore(image).map_err(TraceeError::call("restoring a pseudo-terminal", pid))?;
        let path = format!("/proc/{pid}/root/dev/pts/{number}");
        let (mode, uid, gid) = image.access;
        std::os::unix::fs::chown(&path, Some(uid), Some(gid))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .map_err(TraceeError::proc(path))
    }

    /// A duplicate of the master of a pair.
    pub(in super::super) fn master(&self, number: u32) -> Option<&OwnedFd> {
        self.0.get(&number).map(|pair| &pair.master)
    }
}

impl Pair {
    fn restore(&mut self, image: &Terminal) -> io::Result<()> {
        let settings = image
            .settings
            .as_slice()
            .try_into()
            .map_err(|_| io::Error::other("the settings of a terminal in the image are damaged"))?;
        tty::set_window(&self.master, image.window)?;
        tty::set_settings(&self.master, &settings)?;
        if image.locked {
            return tty::lock(&self.master, true);
        }
        if image.hung_up {
            drop(tty::open_slave(&self.master)?);
            return Ok(());
        }
        if self.slave.is_none() {
            self.slave = Some(tty::open_slave(&self.master)?);
        }
        let Some(slave) = &self.slave else { return Ok(()) };
        queues::put_output(slave, &settings, &image.output)?;
        queues::put_input(&self.master, slave, &settings, &image.input)?;
        if let Some(stop) = image.stop {
            queues::stop(&self.master, slave, &settings, stop)?;
        }
        if image.packets {
            tty::set_packets(&self.master, true)?;
        }
        if image.exclusive {
            tty::set_exclusive(slave)?;
        }
        Ok(())
    }
}

/// Makes pair `number`. The kernel gives the lowest number that is free: those before it are taken for a moment.
fn make(pid: i32, number: u32) -> io::Result<OwnedFd> {
    let mut others = Vec::new();
    let master = loop {
        let master = open_master(pid)?;
        match tty::number(&master)? {
            here if here == number => break master,
            here if here > number => {
                return Err(io::Error::other(format!("pseudo-terminal {number} is taken")));
            }
            _ => others.push(master),
        }
    };
    tty::lock(&master, false)?;
    Ok(master)
}

fn open_master(pid: i32) -> io::Result<OwnedFd> {
    let name = format!("/proc/{pid}/root/dev/ptmx");
    let is_device = fs::symlink_metadata(&name).is_ok_and(|metadata| metadata.file_type().is_char_device());
    // As a symbolic link it may lead into another devpts.
    let name = if is_device { name } else { format!("/proc/{pid}/root/dev/pts/ptmx") };
    let flags = libc::O_NOCTTY | libc::O_CLOEXEC;
    File::options().read(true).write(true).custom_flags(flags).open(name).map(OwnedFd::from)
}

/// Makes `group` the foreground group of the terminal of the session that the stub behind `remote` leads.
pub fn set_foreground(remote: &mut Remote, number: u32, group: i32) -> Result<(), TraceeError> {
    let at = remote.put(0, format!("/dev/pts/{number}\0").as_bytes())?;
    let args = [libc::AT_FDCWD as u64, at, (libc::O_RDWR | libc::O_NOCTTY) as u64, 0, 0, 0];
    let opened = remote.call("opening its terminal", libc::SYS_openat, args)?;
    let at = remote.put(0, &group.to_ne_bytes())?;
    let args = [opened, libc::TIOCSPGRP, at, 0, 0, 0];
    // Its signals are blocked: otherwise SIGTTOU would stop it.
    remote.call("TIOCSPGRP", libc::SYS_ioctl, args)?;
    remote.call("close", libc::SYS_close, [opened, 0, 0, 0, 0, 0]).map(|_| ())
}
