//! Whether what was written to a copy is on its disk: all of it is read from there, past the page cache.

use rustix::{
    fd::AsFd,
    fs::{Advice, Mode, OFlags},
    io::Errno,
};

use super::{
    super::{
        VolumeError,
        blocks::{self, BLOCK, Blocks},
    },
    BuiltVolume, File,
};
use crate::sys::file;

/// Blocks that are read in one go.
const AT_ONCE: u64 = 16;
/// Where direct I/O may read to in memory, on every disk: a multiple of this.
const ALIGNMENT: usize = 4096;

/// Reads a file past the page cache, or, where its file system can't, what is dropped from the cache before.
struct Direct {
    file: File,
    is_direct: bool,
    buffer: Vec<u8>,
    start: usize,
}

impl BuiltVolume {
    /// Reads all of it from the disk, and compares it with what was written. A pass must have ended. `on_read` is called in between.
    /// Returns how many bytes were read.
    ///
    /// # Errors
    /// [`VolumeError::NotOnDisk`].
    pub fn compare(&self, on_read: &mut dyn FnMut() -> Result<(), VolumeError>) -> Result<u64, VolumeError> {
        let failed = || VolumeError::io::<std::io::Error>("reading from the disk", b"a file");
        let mut read = 0;
        let mut buffer = vec![0; AT_ONCE as usize * BLOCK as usize + ALIGNMENT];
        for (inode, built) in &self.files {
            if built.size == 0 {
                continue;
            }
            let mut direct = Direct::open(self, *inode, buffer)?;
            let data = file::data(&direct.file).map_err(failed())?;
            // What reads as a hole has to be one.
            if let Some(number) = missing(&built.blocks, &blocks::with_data(&data, built.size)) {
                return Err(VolumeError::NotOnDisk { offset: number * BLOCK });
            }
            let mut numbers = blocks::with_data(&data, built.size).into_iter().peekable();
            while let Some(first) = numbers.next() {
                let mut end = first + 1;
                while end - first < AT_ONCE && numbers.next_if_eq(&end).is_some() {
                    end += 1;
                }
                let contents = direct.read(first, end, built.size).map_err(failed())?;
                read += contents.len() as u64;
                for (number, block) in (first..).zip(contents.chunks(BLOCK as usize)) {
                    let is_same = match built.blocks.get(&number) {
                        Some(hash) => *hash == blocks::hash(block),
                        None => blocks::is_zero(block),
                    };
                    if !is_same {
                        return Err(VolumeError::NotOnDisk { offset: number * BLOCK });
                    }
                }
                on_read()?;
            }
            buffer = direct.buffer;
        }
        Ok(read)
    }
}

/// The first block with contents in which a file has no data.
fn missing(blocks: &Blocks, with_data: &[u64]) -> Option<u64> {
    blocks.keys().copied().find(|number| with_data.binary_search(number).is_err())
}

impl Direct {
    fn open(of: &BuiltVolume, inode: u64, buffer: Vec<u8>) -> Result<Self, VolumeError> {
        let failed = || VolumeError::io("opening", b"a file");
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |more| rustix::fs::openat(&of.inodes, inode.to_string(), flags | more, Mode::empty());
        let (file, is_direct) = match open(OFlags::DIRECT) {
            Err(Errno::INVAL) => (open(OFlags::empty()).map_err(failed())?, false),
            file => (file.map_err(failed())?, true),
        };
        if !is_direct {
            rustix::fs::fadvise(file.as_fd(), 0, None, Advice::DontNeed).map_err(failed())?;
        }
        let start = buffer.as_ptr().align_offset(ALIGNMENT);
        Ok(Self { file: File::from(file), is_direct, buffer, start })
    }

    /// Blocks `first` to `end` of a file of `size` bytes.
    fn read(&mut self, first: u64, end: u64, size: u64) -> std::io::Result<&[u8]> {
        let (at, length) = (first * BLOCK, (end - first) * BLOCK);
        let expected = length.min(size.saturating_sub(at)) as usize;
        // All of it: the last read of a file is short by itself.
        let into = &mut self.buffer[self.start..][..length as usize];
        let got = match file::read_at(&self.file, into, at) {
            // This file system opens so and does not read so; or the disk has larger sectors.
            Err(error) if self.is_direct && error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                let flags = rustix::fs::fcntl_getfl(&self.file)?;
                rustix::fs::fcntl_setfl(&self.file, flags - OFlags::DIRECT)?;
                rustix::fs::fadvise(self.file.as_fd(), 0, None, Advice::DontNeed)?;
                self.is_direct = false;
                file::read_at(&self.file, into, at)?
            }
            got => got?,
        };
        if got < expected {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(&into[..expected])
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::{super::super::record::Record, *};

    #[test]
    fn what_is_on_the_disk_must_be_what_was_written() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut built = BuiltVolume::make(&directory.path().join("arriving")).expect("make");
        let size = 40 * BLOCK + 100;
        let block = vec![7; BLOCK as usize];
        built.take(Record::File { inode: 5, size }).expect("a file");
        built.take(Record::File { inode: 6, size: 0 }).expect("an empty file");
        for number in (0..20).chain([30]) {
            let (offset, length) = (number * BLOCK, BLOCK as u32);
            built.take(Record::Data { inode: 5, offset, length, contents: &block }).expect("contents");
        }
        built
            .take(Record::Data { inode: 5, offset: 40 * BLOCK, length: 100, contents: &block[..100] })
            .expect("the end");
        built.take(Record::End { last: false }).expect("a pass");
        assert_eq!(built.compare(&mut || Ok(())).expect("as it was written"), 21 * BLOCK + 100);
        let path = directory.path().join("arriving/inodes/5");
        let file = File::options().write(true).open(path).expect("open");
        let differs = |at: u64| match built.compare(&mut || Ok(())) {
            Err(VolumeError::NotOnDisk { offset }) => assert_eq!(offset, at),
            other => panic!("{other:?}"),
        };
        // In contents, at the end, in a hole, and a hole where there were contents.
        for (at, was) in [(17 * BLOCK + 9, 7), (40 * BLOCK + 99, 7), (25 * BLOCK, 0)] {
            file.write_all_at(b"X", at).expect("write");
            differs(at / BLOCK * BLOCK);
            file.write_all_at(&[was], at).expect("write");
        }
        built.compare(&mut || Ok(())).expect("as it was");
        file::punch_hole(&file, 3 * BLOCK, BLOCK).expect("a hole");
        differs(3 * BLOCK);
    }
}
