//! Files of pages: where they have data, holes, and memory without a name.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
};

/// The parts of `file` that have data, in bytes, ascending (SEEK_DATA and SEEK_HOLE of lseek(2)).
pub fn data(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(file, at, libc::SEEK_DATA) {
            // No data behind `at`.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(found),
            start => start?,
        };
        at = seek(file, start, libc::SEEK_HOLE)?;
        found.push(start..at);
    }
}

fn seek(file: &File, at: u64, whence: i32) -> io::Result<u64> {
    // SAFETY: a plain system call without pointers.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), at as i64, whence) };
    super::check(found).map(|at| at as u64)
}

/// Reads until `buf` is full or the file ends; returns how much it read.
pub fn read_at(file: &File, buf: &mut [u8], at: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buf.len() {
        match file.read_at(&mut buf[got..], at + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// Frees `len` bytes at `at`: they read as zeros afterwards.
pub fn punch_hole(file: &File, at: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::fallocate64(file.as_raw_fd(), mode, at as i64, len as i64) }.into())
        .map(|_| ())
}

/// Memory as of memfd_create(2) that can be sealed.
pub fn sealable_memory(name: &std::ffi::CStr) -> io::Result<File> {
    use nix::sys::memfd::MFdFlags;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    Ok(File::from(nix::sys::memfd::memfd_create(name, flags)?))
}

/// `F_GET_SEALS`.
pub fn seals(memory: &impl AsFd) -> io::Result<i32> {
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::fcntl(memory.as_fd().as_raw_fd(), libc::F_GET_SEALS) }.into())
        .map(|seals| seals as i32)
}

/// Adds seals (`F_SEAL_*`).
pub fn add_seals(memory: &File, seals: i32) -> io::Result<()> {
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::fcntl(memory.as_raw_fd(), libc::F_ADD_SEALS, seals) }.into()).map(|_| ())
}
