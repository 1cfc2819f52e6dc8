//! Terminals at the source.

use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
};

use super::{
    super::{TraceeError, capture::Status, read_proc},
    Stop, Terminal, queues,
};
use crate::sys::tty;

/// Major numbers of the slaves of pseudo-terminals: 256 of each.
const SLAVES: std::ops::RangeInclusive<u64> = 136..=143;

type Found<T> = Result<T, (String, &'static str)>;

const REMEDY: &str = "start the instance with --detach, and its terminal inside of it (tmux, script)";

/// The number of a slave's device.
fn slave_number(device: u64) -> Option<u32> {
    let (major, minor) = (u64::from(libc::major(device)), libc::minor(device));
    SLAVES.contains(&major).then(|| (major - SLAVES.start()) as u32 * 256 + minor)
}

/// The number of the terminal that controls process `pid`, if that is a pseudo-terminal.
pub fn controlling(pid: i32) -> Result<Option<u32>, TraceeError> {
    let text = read_proc(&format!("/proc/{pid}/stat"))?;
    // Field 7 (proc_pid_stat(5)); the first after the name is field 3.
    let after_name = text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let device: i64 =
        after_name.split_whitespace().nth(7 - 3).and_then(|word| word.parse().ok()).unwrap_or(0);
    // Minor in bits 0 to 7 and 20 to 31, major in 8 to 15.
    let device = device as u64;
    Ok(slave_number(libc::makedev(
        (device >> 8 & 0xff) as u32,
        (device & 0xff | device >> 12 & 0xfff00) as u32,
    )))
}

/// The devpts that process `pid` sees, unless it is the host's.
fn own_devpts(pid: i32) -> Option<u64> {
    let of = |path: &str| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    of(&format!("/proc/{pid}/root/dev/pts")).filter(|own| Some(*own) != of("/dev/pts"))
}

/// The number of a slave in the instance's own devpts; `metadata` is its file's.
pub(in super::super) fn describe_slave(pid: i32, metadata: &fs::Metadata, target: &str) -> Found<u32> {
    let number = slave_number(metadata.rdev()).filter(|_| metadata.nlink() > 0);
    match number.filter(|_| own_devpts(pid) == Some(metadata.dev())) {
        Some(number) => Ok(number),
        None => Err((format!("terminal {target}, of the host or hung up"), REMEDY)),
    }
}

/// A master behind our duplicate of it: its number and, with `contents`, all of the pair.
pub(in super::super) fn describe_master(
    ours: &OwnedFd,
    pid: i32,
    contents: bool,
) -> Result<Found<(u32, Option<Terminal>)>, TraceeError> {
    let failed = |error| TraceeError::call("looking at a pseudo-terminal", pid)(error);
    let number = tty::number(ours).map_err(failed)?;
    let path = format!("/proc/{pid}/root/dev/pts/{number}");
    // One of another devpts has, with this number, another slave here, or none.
    let slave = match fs::metadata(&path) {
        Ok(slave) if own_devpts(pid).is_some() => slave,
        _ => return Ok(Err(("the master of a pseudo-terminal of the host".into(), REMEDY))),
    };
    if !contents {
        return Ok(Ok((number, None)));
    }
    let refuse = |what: &str| Ok(Err((what.to_owned(), "try again")));
    let hung_up = tty::poll(ours, libc::POLLIN).map_err(failed)? & libc::POLLHUP != 0;
    let locked = tty::is_locked(ours).map_err(failed)?;
    let packets = tty::packets(ours).map_err(failed)?;
    if tty::poll(ours, libc::POLLPRI).map_err(failed)? & libc::POLLPRI != 0 {
        return refuse("a pseudo-terminal in packet mode with something to be told");
    }
    let settings = tty::settings(ours).map_err(failed)?;
    let group = tty::foreground(ours).and_then(|group| Status::read(group).ok()?.last_number("NSpgid:"));
    let mut terminal = Terminal {
        settings: settings.to_vec(),
        window: tty::window(ours).map_err(failed)?,
        locked,
        packets,
        exclusive: false,
        hung_up,
        foreground: group.unwrap_or(0),
        access: (slave.mode() & 0o7777, slave.uid(), slave.gid()),
        input: Vec::new(),
        output: Vec::new(),
        stop: None,
    };
    if locked || hung_up {
        // Nobody has the slave; what it printed last can still be read by the master.
        if tty::poll(ours, libc::POLLIN).map_err(failed)? & libc::POLLIN != 0 {
            return refuse("a pseudo-terminal that was hung up, with output to be read");
        }
        return Ok(Ok((number, Some(terminal))));
    }
    if packets {
        tty::set_packets(ours, false).map_err(failed)?;
    }
    let looked = look(ours, &settings, &mut terminal);
    if packets {
        tty::set_packets(ours, true).map_err(failed)?;
    }
    if !looked.map_err(failed)? {
        return refuse("a pseudo-terminal with very much typed ahead or printed");
    }
    Ok(Ok((number, Some(terminal))))
}

/// Takes out what is queued, and puts it back at once.
fn look(master: &OwnedFd, settings: &tty::Settings, terminal: &mut Terminal) -> std::io::Result<bool> {
    let slave = tty::open_slave(master)?;
    // Each end has a mark of its own, and only the slave can be opened again.
    terminal.exclusive = tty::is_exclusive(&slave)?;
    terminal.output = queues::take_output(master)?;
    // With nothing in the way, only a stop keeps it from being written to.
    let takes_output =
        |slave| Ok::<bool, std::io::Error>(tty::poll(slave, libc::POLLOUT)? & libc::POLLOUT != 0);
    if !takes_output(&slave)? {
        tty::stop_output(&slave, false)?;
        // What a key has stopped no call lets go on.
        terminal.stop = Some(if takes_output(&slave)? { Stop::Call } else { Stop::Key });
        queues::go_on(master, &slave, settings)?;
    }
    terminal.input = queues::take_input(&slave, settings)?;
    queues::put_output(&slave, settings, &terminal.output)?;
    queues::put_input(master, &slave, settings, &terminal.input)?;
    if let Some(stop) = terminal.stop {
        queues::stop(master, &slave, settings, stop)?;
    }
    Ok(terminal.input.len() <= queues::INPUT_LIMIT && terminal.output.len() < queues::OUTPUT_LIMIT)
}
