//! Files of pages: where they have data, holes, and memory without a name.

use std::{
    ffi::c_void,
    fs::File,
    io,
    num::NonZeroUsize,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    ptr::NonNull,
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

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

/// The parts of some ranges of `file` that have data. The ranges ascend.
pub fn data_of(file: &File, ranges: impl Iterator<Item = Range<u64>>) -> io::Result<Vec<Range<u64>>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let start = match seek(file, at, libc::SEEK_DATA) {
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(found),
                start => start?,
            };
            if start >= range.end {
                break;
            }
            at = seek(file, start, libc::SEEK_HOLE)?.min(range.end);
            match found.last_mut() {
                Some(last) if last.end == start => last.end = at,
                _ => found.push(start..at),
            }
        }
    }
    Ok(found)
}

/// Has `len` bytes at `at` (0: all behind it) written back: none of the pages that were dirty when it is called is so by that when it returns.
pub fn write_back(file: &File, at: u64, len: u64) -> io::Result<()> {
    let all =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::sync_file_range(file.as_raw_fd(), at as i64, len as i64, all) }.into())
        .map(|_| ())
}

/// Whether all that is written to an ext4's file goes through the page cache's dirty pages: it is not in the journal first, not in the inode,
/// and not in memory that is the disk.
pub fn is_plain(file: &File) -> bool {
    /// `EXT4_INLINE_DATA_FL`.
    const INLINE: u32 = 0x1000_0000;
    /// `FS_DAX_FL`.
    const DAX: u32 = 0x0200_0000;
    /// `FS_JOURNAL_DATA_FL`.
    const JOURNAL: u32 = 0x4000;
    rustix::fs::ioctl_getflags(file).is_ok_and(|flags| flags.bits() & (INLINE | DAX | JOURNAL) == 0)
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

/// Has `to` share the blocks of `from` in this range, which is written back before (`FICLONERANGE`). Both change apart from each other
/// afterwards.
///
/// # Errors
/// Other than for what any write may fail: `EXDEV` if they are on two file systems, `EOPNOTSUPP` if theirs can't, `EINVAL` if it can't for
/// these two files, or the range is not one of whole blocks.
pub fn share(from: &File, range: Range<u64>, to: &File) -> io::Result<()> {
    let wanted = libc::file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: range.start,
        src_length: range.end - range.start,
        dest_offset: range.start,
    };
    // SAFETY: the kernel only reads what it is given the address of, which is there until the call returns.
    super::check(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const wanted) }.into())
        .map(|_| ())
}

/// Frees `len` bytes at `at`: they read as zeros afterwards.
pub fn punch_hole(file: &File, at: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a plain system call without pointers.
    super::check(unsafe { libc::fallocate64(file.as_raw_fd(), mode, at as i64, len as i64) }.into())
        .map(|_| ())
}

/// Memory as of memfd_create(2) that can be sealed; in huge pages of 2 MiB if `huge`.
pub fn sealable_memory(name: &std::ffi::CStr, huge: bool) -> io::Result<File> {
    use nix::sys::memfd::MFdFlags;
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if huge {
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    }
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

/// Memory of memfd_create(2) that is mapped here: huge pages can't be written with write(2).
#[derive(Debug)]
pub struct MappedFile {
    at: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the mapping is this value's own until it is dropped, and its addresses mean the same to every thread.
unsafe impl Send for MappedFile {}
// SAFETY: through a shared reference it is neither read nor written.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps the first `bytes` of `file`, all of which are there from then on.
    ///
    /// # Errors
    /// There is not enough memory of the file's kind (`ENOSPC`, `ENOMEM`).
    pub fn of(file: &File, bytes: u64) -> io::Result<Self> {
        let length = usize::try_from(bytes).ok().and_then(NonZeroUsize::new);
        let Some(length) = length else {
            return Ok(Self { at: NonNull::dangling(), bytes: 0 });
        };
        // A page that is not there when it is written to would be a signal.
        // SAFETY: a plain system call without pointers.
        super::check(unsafe { libc::fallocate64(file.as_raw_fd(), 0, 0, bytes as i64) }.into())?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing of ours is replaced.
        let at = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { at, bytes: length.get() })
    }

    /// Writes `data` at `at`. Nobody may shorten the file meanwhile.
    pub fn write(&mut self, at: u64, data: &[u8]) -> io::Result<()> {
        let start = self.inside(&(at..at.saturating_add(data.len() as u64)))?;
        // SAFETY: inside of the mapping, which no reference of ours points to.
        unsafe {
            self.at.cast::<u8>().add(start).copy_from_nonoverlapping(NonNull::from(data).cast(), data.len())
        };
        Ok(())
    }

    /// Writes zeros. Nobody may shorten the file meanwhile.
    pub fn clear(&mut self, range: Range<u64>) -> io::Result<()> {
        let start = self.inside(&range)?;
        // SAFETY: as in `write`.
        unsafe { self.at.cast::<u8>().add(start).write_bytes(0, (range.end - range.start) as usize) };
        Ok(())
    }

    fn inside(&self, range: &Range<u64>) -> io::Result<usize> {
        if range.start > range.end || range.end > self.bytes as u64 {
            return Err(io::Error::other(format!(
                "{range:?} is outside of the {} bytes of a file",
                self.bytes
            )));
        }
        Ok(range.start as usize)
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        // SAFETY: mapped by `of` with this length, and no reference to it is left.
        if let Err(error) = unsafe { munmap(self.at, self.bytes) } {
            tracing::debug!(%error, "a file stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_through_a_mapping_is_in_the_file_and_nothing_goes_past_its_end() {
        let file = sealable_memory(c"mapped", false).expect("make");
        file.set_len(8192).expect("resize");
        let mut mapped = MappedFile::of(&file, 8192).expect("map");
        mapped.write(4000, &[7; 200]).expect("write");
        mapped.clear(4100..4150).expect("clear");
        let mut found = [1; 8192];
        assert_eq!(read_at(&file, &mut found, 0).expect("read"), 8192);
        for (at, byte) in found.iter().enumerate() {
            let written = (4000..4200).contains(&at) && !(4100..4150).contains(&at);
            assert_eq!(*byte, if written { 7 } else { 0 }, "at {at}");
        }
        for range in [8000..8193, 8193..8194, u64::MAX - 1..u64::MAX] {
            assert!(mapped.clear(range).is_err());
        }
        assert!(mapped.write(8190, &[1; 3]).is_err());
        let empty = sealable_memory(c"empty", false).expect("make");
        assert!(MappedFile::of(&empty, 0).expect("map").write(0, &[1]).is_err());
    }
}
