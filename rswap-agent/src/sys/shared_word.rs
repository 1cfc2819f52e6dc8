//! One word of memory that two processes share, changed by compare-and-swap only.

use std::{
    fs::File,
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const LEN: NonZeroUsize = NonZeroUsize::new(super::mem::PAGE_SIZE as usize).expect("pages have a size");

/// A word that outlives each of the processes that map it.
#[derive(Debug)]
pub struct SharedWord {
    file: File,
    at: NonNull<AtomicU32>,
}

// SAFETY: the word is only reached through atomic operations, which any thread may make, and the mapping is
// this value's own until it is dropped.
unsafe impl Send for SharedWord {}

impl SharedWord {
    /// A new one, 0; `name` is only for people.
    pub fn create(name: &str) -> io::Result<Self> {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create(name, flags)?);
        file.set_len(LEN.get() as u64)?;
        Self::map(file)
    }

    /// The one behind a descriptor that another process handed down.
    pub fn map(file: File) -> io::Result<Self> {
        if file.metadata()?.len() < LEN.get() as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too short for a shared word"));
        }
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing of ours is replaced.
        let at = unsafe { mmap(None, LEN, protection, MapFlags::MAP_SHARED, &file, 0) }?;
        Ok(Self { file, at: at.cast() })
    }

    /// Its descriptor.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: mapped at least a page long, page-aligned, until drop; every access on either side is atomic.
        unsafe { self.at.as_ref() }
    }

    /// What it is now.
    pub fn get(&self) -> u32 {
        self.word().load(Ordering::SeqCst)
    }

    /// Changes it from `from` to `to`.
    ///
    /// # Errors
    /// What it was instead of `from`; then it stays.
    pub fn change(&self, from: u32, to: u32) -> Result<(), u32> {
        self.word().compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).map(drop)
    }
}

impl Drop for SharedWord {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and no reference to it is left.
        if let Err(error) = unsafe { munmap(self.at.cast(), LEN.get()) } {
            tracing::debug!(%error, "a shared word stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_who_change_it_one_wins() {
        let ours = SharedWord::create("test").expect("a word");
        let theirs =
            SharedWord::map(File::from(ours.descriptor().try_clone_to_owned().expect("a duplicate")))
                .expect("the same word");
        assert_eq!(ours.change(0, 1), Ok(()));
        assert_eq!(theirs.get(), 1);
        assert_eq!(theirs.change(1, 2), Ok(()));
        assert_eq!(ours.change(1, 3), Err(2));
    }
}
