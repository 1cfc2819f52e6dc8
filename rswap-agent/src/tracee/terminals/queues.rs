//! What waits in a pair of pseudo-terminals. It can't be looked at, only taken out: whoever does puts it back.

use std::{io, os::fd::OwnedFd};

use super::Stop;
use crate::sys::tty::{self, Settings};

/// More is not in the line discipline's queue, which is 4096 bytes, but before it, where it was not edited yet.
pub(super) const INPUT_LIMIT: usize = 4000;
pub(super) const OUTPUT_LIMIT: usize = 64 << 10;

/// Ctrl-Q and Ctrl-S.
const START_KEY: u8 = 0x11;
const STOP_KEY: u8 = 0x13;

const OUTPUT_FLAGS: usize = 4;
const LOCAL_FLAGS: usize = 12;
const CHARACTERS: usize = 17;

/// One of the four words of flags at the beginning.
fn word(settings: &Settings, at: usize) -> u32 {
    settings[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word))
}

fn set_word(settings: &mut Settings, at: usize, value: u32) {
    settings[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

/// Whether input is edited by lines.
fn by_lines(settings: &Settings) -> bool {
    word(settings, LOCAL_FLAGS) & libc::ICANON != 0
}

/// Settings under which every byte that is written to the master comes in as it is. What they say of the flow stays: a
/// change would be told to a master in packet mode.
fn verbatim(settings: &Settings) -> Settings {
    let mut changed = *settings;
    let input =
        libc::ICRNL | libc::INLCR | libc::IGNCR | libc::ISTRIP | libc::IUCLC | libc::PARMRK | libc::INPCK;
    set_word(&mut changed, 0, word(settings, 0) & !(input | libc::IXANY));
    set_word(&mut changed, OUTPUT_FLAGS, word(settings, OUTPUT_FLAGS) & !libc::OPOST);
    let local = word(settings, LOCAL_FLAGS) & (libc::ICANON | libc::EXTPROC);
    set_word(&mut changed, LOCAL_FLAGS, local);
    for name in 0..19 {
        if ![libc::VSTART, libc::VSTOP].contains(&name) {
            changed[CHARACTERS + name] = 0;
        }
    }
    changed
}

/// Takes out what was typed and not read.
pub(super) fn take_input(slave: &OwnedFd, settings: &Settings) -> io::Result<Vec<u8>> {
    // Sorts in what was typed last, under the settings that it was typed under.
    tty::poll(slave, libc::POLLIN)?;
    let mut raw = verbatim(settings);
    let local = word(&raw, LOCAL_FLAGS);
    set_word(&mut raw, LOCAL_FLAGS, local & !libc::ICANON);
    tty::set_settings(slave, &raw)?;
    let taken = read_all(slave, INPUT_LIMIT * 2);
    tty::set_settings(slave, settings)?;
    taken
}

/// Puts in what [`take_input`] took: written to the master, and unedited.
pub(super) fn put_input(
    master: &OwnedFd,
    slave: &OwnedFd,
    settings: &Settings,
    input: &[u8],
) -> io::Result<()> {
    if input.is_empty() {
        return Ok(());
    }
    let mut literal = verbatim(settings);
    if by_lines(settings) {
        // The end of input is kept as a zero byte; it is typed again as one that does not occur otherwise.
        let end = (1..=u8::MAX).find(|byte| *byte != b'\n' && !input.contains(byte)).unwrap_or(4);
        literal[CHARACTERS + libc::VEOF] = end;
        tty::set_settings(slave, &literal)?;
        let typed: Vec<u8> = input.iter().map(|byte| if *byte == 0 { end } else { *byte }).collect();
        write_all(master, &typed)?;
    } else {
        tty::set_settings(slave, &literal)?;
        write_all(master, input)?;
    }
    // Sorts it in before the settings change.
    tty::poll(slave, libc::POLLIN)?;
    tty::set_settings(slave, settings)
}

/// Takes out what was printed and not taken by the master.
pub(super) fn take_output(master: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut taken = Vec::new();
    let mut buffer = [0; 4096];
    while taken.len() < OUTPUT_LIMIT && tty::poll(master, libc::POLLIN)? & libc::POLLIN != 0 {
        let got = nix::unistd::read(master, &mut buffer)?;
        taken.extend_from_slice(&buffer[..got]);
        if got == 0 {
            break;
        }
    }
    Ok(taken)
}

/// Puts in what [`take_output`] took: printed to the slave, as it is.
pub(super) fn put_output(slave: &OwnedFd, settings: &Settings, output: &[u8]) -> io::Result<()> {
    if output.is_empty() {
        return Ok(());
    }
    tty::set_settings(slave, &verbatim(settings))?;
    let written = write_all(slave, output);
    tty::set_settings(slave, settings)?;
    written
}

/// Stops the output.
pub(super) fn stop(master: &OwnedFd, slave: &OwnedFd, settings: &Settings, how: Stop) -> io::Result<()> {
    match how {
        Stop::Call => tty::stop_output(slave, true),
        Stop::Key => press(master, slave, settings, STOP_KEY),
    }
}

/// Lets output go on that was stopped by a key.
pub(super) fn go_on(master: &OwnedFd, slave: &OwnedFd, settings: &Settings) -> io::Result<()> {
    press(master, slave, settings, START_KEY)
}

/// Presses a key that stops or starts the output.
fn press(master: &OwnedFd, slave: &OwnedFd, settings: &Settings, key: u8) -> io::Result<()> {
    let mut flow = verbatim(settings);
    let input = word(&flow, 0);
    set_word(&mut flow, 0, input | libc::IXON);
    flow[CHARACTERS + libc::VSTART] = START_KEY;
    flow[CHARACTERS + libc::VSTOP] = STOP_KEY;
    tty::set_settings(slave, &flow)?;
    write_all(master, &[key])?;
    tty::poll(slave, libc::POLLIN)?;
    tty::set_settings(slave, settings)
}

fn read_all(tty: &OwnedFd, limit: usize) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while all.len() < limit {
        match nix::unistd::read(tty, &mut buffer) {
            Ok(0) | Err(nix::Error::EAGAIN) => break,
            Ok(got) => all.extend_from_slice(&buffer[..got]),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(all)
}

fn write_all(tty: &OwnedFd, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match nix::unistd::write(tty, data)? {
            0 => return Err(io::Error::other("the terminal takes no more")),
            written => data = &data[written..],
        }
    }
    Ok(())
}
