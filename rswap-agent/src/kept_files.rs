//! Small files of the kernel's that are read again and again: they are kept open, as opening one takes the kernel longer than reading it.

use std::{
    borrow::Cow,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::sys::resource::{Resource, getrlimit};

/// What is asked for at once. The kernel gives these files from a page; those that are one record, whole (fs/seq_file.c).
const AT_ONCE: usize = 8192;
/// A file of many records gives about a page at a time: with less than this, there is no more.
const IS_ALL: usize = 2048;

/// Of each reader, no more files than this stay open: behind each, the kernel keeps about five kilobytes.
const MOST: u64 = 2048;

/// Whether what a file is of is not there any more. Any other error must not be taken for an instance that is not there, or uses nothing.
pub(crate) fn has_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV))
}

/// Reads files, and says which may stay open.
#[derive(Debug)]
pub(crate) struct Reader {
    buffer: Vec<u8>,
    /// How many more files may stay open.
    room: usize,
    most: usize,
}

impl Default for Reader {
    fn default() -> Self {
        // The others are for connections, and for what migrations hold.
        let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| (soft / 8).min(MOST) as usize);
        Self { buffer: Vec::new(), room: most, most }
    }
}

impl Reader {
    /// So many files are open now.
    pub(crate) fn are_open(&mut self, files: usize) {
        self.room = self.most.saturating_sub(files);
    }

    /// What a file says now. It is opened, if it is not open, or can't be read any more.
    ///
    /// # Errors
    /// Those of opening and reading it.
    pub(crate) fn read(&mut self, file: &mut Kept) -> io::Result<Cow<'_, str>> {
        // What it is of may have gone, and another one have come by this name.
        let length = file.open.as_ref().and_then(|open| self.whole(open).ok());
        let length = match length {
            Some(length) => length,
            None => {
                let was_open = file.open.take().is_some();
                let open = File::open(&file.path)?;
                let length = self.whole(&open)?;
                if was_open || self.room > 0 {
                    self.room -= usize::from(!was_open);
                    file.open = Some(open);
                }
                length
            }
        };
        // A program's name in its `stat` may be any bytes.
        Ok(String::from_utf8_lossy(&self.buffer[..length]))
    }

    /// The same, of a file that is open: of the very one that was opened. Nothing, if it is not, or what it is of has gone.
    pub(crate) fn read_open(&mut self, file: &mut Kept) -> Option<Cow<'_, str>> {
        let length = self.whole(file.open.as_ref()?);
        let Ok(length) = length else {
            file.close();
            return None;
        };
        Some(String::from_utf8_lossy(&self.buffer[..length]))
    }

    /// Reads a file from its beginning into the buffer, and answers how many bytes there are.
    fn whole(&mut self, file: &File) -> io::Result<usize> {
        let mut length = 0;
        loop {
            if self.buffer.len() < length + AT_ONCE {
                self.buffer.resize(length + AT_ONCE, 0);
            }
            let more = file.read_at(&mut self.buffer[length..], length as u64)?;
            length += more;
            if more < IS_ALL {
                return Ok(length);
            }
        }
    }
}

/// A file that may be open.
#[derive(Debug)]
pub(crate) struct Kept {
    path: PathBuf,
    open: Option<File>,
}

impl Kept {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, open: None }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    pub(crate) fn close(&mut self) {
        self.open = None;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_is_read_as_it_is_now_and_found_again_when_another_one_has_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut reader = Reader { room: 1, ..Reader::default() };
        let mut file = Kept::new(path.clone());
        assert!(reader.read(&mut file).is_err());
        for text in ["a 1\n".to_owned(), "b".repeat(3 * AT_ONCE + 5), String::new()] {
            fs::write(&path, &text).unwrap();
            assert_eq!(reader.read(&mut file).unwrap(), text);
        }
        assert!(file.is_open() && reader.room == 0);
        assert_eq!(reader.read_open(&mut file).unwrap(), "");
        let mut other = Kept::new(path);
        assert_eq!(reader.read(&mut other).unwrap(), "");
        assert!(!other.is_open() && reader.read_open(&mut other).is_none(), "there was room for one");
    }
}
