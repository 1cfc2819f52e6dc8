//! Files by handle (open_by_handle_at(2)).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd},
};

/// Opens (`O_PATH`) the file with this handle in the file system that `mount` is on. Needs CAP_DAC_READ_SEARCH.
pub fn open(mount: &File, kind: i32, handle: &[u8]) -> io::Result<File> {
    // `struct file_handle`: the number of bytes, the kind, the bytes.
    let mut words = vec![handle.len() as u32, kind as u32];
    for chunk in handle.chunks(4) {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        words.push(u32::from_ne_bytes(word));
    }
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: no safe wrapper; the kernel reads the header and as many bytes as that says, all inside of `words`.
    let fd = super::check(unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), words.as_mut_ptr(), flags)
    })?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}
