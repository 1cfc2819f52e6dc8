//! Another process's memory: an address there has a type of its own and can't be dereferenced here.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
};

use serde::{Deserialize, Serialize};

/// The size of a page, in bytes, on the architectures that rswap supports.
pub const PAGE_SIZE: u64 = 4096;

/// An address in another process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RemoteAddr(pub u64);

impl fmt::Display for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Reads `buf.len()` bytes at `addr` of process `pid` and returns how many were readable: fewer when a
/// part of the range isn't mapped or may not be read.
pub fn read(pid: i32, addr: RemoteAddr, buf: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote = libc::iovec { iov_base: addr.0 as *mut libc::c_void, iov_len: buf.len() };
    // SAFETY: there is no safe wrapper that takes a foreign address as a number. `local` describes
    // `buf`, which outlives the call; the kernel checks `remote` against the other process.
    let got = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    match super::check(got as libc::c_long) {
        Ok(got) => Ok(got as usize),
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        Err(error) => Err(error),
    }
}

/// Reads exactly `buf.len()` bytes.
pub fn read_exact(pid: i32, addr: RemoteAddr, buf: &mut [u8]) -> io::Result<()> {
    let got = read(pid, addr, buf)?;
    if got == buf.len() {
        return Ok(());
    }
    let text = format!("only {got} of {} bytes at {addr} of process {pid} are readable", buf.len());
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, text))
}

/// Writes all of `data` at `addr` of process `pid`, into writable memory.
pub fn write(pid: i32, addr: RemoteAddr, data: &[u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let remote = libc::iovec { iov_base: addr.0 as *mut libc::c_void, iov_len: data.len() };
    // SAFETY: no safe wrapper takes a foreign address as a number. The kernel only reads `local`, which
    // describes `data`; it checks `remote` against the other process.
    let put = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    let put = super::check(put as libc::c_long)? as usize;
    if put == data.len() {
        return Ok(());
    }
    let text = format!("only {put} of {} bytes at {addr} of process {pid} are writable", data.len());
    Err(io::Error::new(io::ErrorKind::WriteZero, text))
}

/// What a call takes of each side at most (`UIO_MAXIOV`, include/uapi/linux/uio.h).
const PIECES: usize = 1024;

/// Reads several pieces of process `pid` by one call, and returns how many bytes were readable, counted from the first piece on:
/// what follows a page that isn't is not read.
pub fn read_pieces(pid: i32, pieces: &mut [(RemoteAddr, &mut [u8])]) -> io::Result<usize> {
    let count = pieces.len().min(PIECES);
    let (mut local, mut remote) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for (addr, buf) in pieces.iter_mut().take(count) {
        local.push(libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() });
        remote.push(libc::iovec { iov_base: addr.0 as *mut libc::c_void, iov_len: buf.len() });
    }
    let count = count as libc::c_ulong;
    // SAFETY: there is no safe wrapper that takes foreign addresses as numbers. `local` describes the pieces' buffers, which are
    // borrowed for writing and outlive the call; the kernel checks `remote` against the other process.
    let got = unsafe { libc::process_vm_readv(pid, local.as_ptr(), count, remote.as_ptr(), count, 0) };
    match super::check(got as libc::c_long) {
        Ok(got) => Ok(got as usize),
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        Err(error) => Err(error),
    }
}

/// Writes several pieces of process `pid` by one call, all of them into writable memory.
pub fn write_pieces(pid: i32, pieces: &[(RemoteAddr, &[u8])]) -> io::Result<()> {
    for pieces in pieces.chunks(PIECES) {
        let vector = |at: *const u8, len| libc::iovec { iov_base: at.cast_mut().cast(), iov_len: len };
        let local: Vec<_> = pieces.iter().map(|(_, data)| vector(data.as_ptr(), data.len())).collect();
        let remote: Vec<_> = pieces.iter().map(|(at, data)| vector(at.0 as *const u8, data.len())).collect();
        let bytes: usize = pieces.iter().map(|(_, data)| data.len()).sum();
        let count = pieces.len() as libc::c_ulong;
        // SAFETY: no safe wrapper takes foreign addresses as numbers. The kernel only reads `local`, which describes the pieces'
        // data; it checks `remote` against the other process.
        let put = unsafe { libc::process_vm_writev(pid, local.as_ptr(), count, remote.as_ptr(), count, 0) };
        let put = super::check(put as libc::c_long)? as usize;
        if put != bytes {
            let text = format!("only {put} of {bytes} bytes of process {pid} are writable");
            return Err(io::Error::new(io::ErrorKind::WriteZero, text));
        }
    }
    Ok(())
}

/// A tracee's memory through `/proc/PID/mem`: writes reach private mappings whatever their protection,
/// which is how the contents of read-only mappings are restored.
#[derive(Debug)]
pub struct ForcedMemory(File);

impl ForcedMemory {
    /// Opens the memory of `pid`, which the caller traces.
    pub fn open(pid: i32) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).map(Self)
    }

    /// Writes all of `data` at `addr`.
    pub fn write(&self, addr: RemoteAddr, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, addr.0)
    }

    /// Reads exactly `buf.len()` bytes at `addr`, whatever the protection.
    pub fn read_exact(&self, addr: RemoteAddr, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, addr.0)
    }
}
