//! Read-only views of eBPF array maps, mapped into our memory: no system call per value.

use std::{
    io,
    marker::PhantomData,
    mem::MaybeUninit,
    num::NonZeroUsize,
    ops::Range,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rswap_common::{
    histogram::BUCKETS,
    layout::{BlockRecord, ChildCounts, FaultRecord, SlotRecord, TallyRecord, UnownedRecord},
    neighbours::NeighbourRecord,
};

/// A record that eBPF programs fill.
///
/// # Safety
/// The type is `repr(C)`, made of integers only and without padding, so that any bits are a valid value; its
/// size is a multiple of 8 and its alignment at most 8.
pub unsafe trait BpfRecord: Copy {}

// SAFETY: `repr(C)`, u64 and u32 counters only; the sizes are asserted where the types are defined.
unsafe impl BpfRecord for SlotRecord {}
// SAFETY: as above.
unsafe impl BpfRecord for BlockRecord {}
// SAFETY: as above.
unsafe impl BpfRecord for UnownedRecord {}
// SAFETY: as above.
unsafe impl BpfRecord for FaultRecord {}
// SAFETY: as above: three u64.
unsafe impl BpfRecord for ChildCounts {}
// SAFETY: as above.
unsafe impl BpfRecord for NeighbourRecord {}
// SAFETY: as above: an even number of u32.
unsafe impl BpfRecord for [u32; BUCKETS] {}
// SAFETY: as above: four u64.
unsafe impl BpfRecord for TallyRecord {}

/// Entries of an array map of `T`, mapped read-only until they are dropped.
#[derive(Debug)]
pub struct MappedArray<T: BpfRecord> {
    /// Of a page.
    address: NonNull<AtomicU64>,
    length_bytes: NonZeroUsize,
    /// Words before the first entry.
    before: usize,
    entries: Range<u32>,
    record: PhantomData<T>,
}

// SAFETY: the mapping belongs to the value, and is only ever read, word by word and atomically.
unsafe impl<T: BpfRecord> Send for MappedArray<T> {}
// SAFETY: as above: shared reading is atomic.
unsafe impl<T: BpfRecord> Sync for MappedArray<T> {}

impl<T: BpfRecord> MappedArray<T> {
    /// Words of one record.
    const WORDS: usize = {
        assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() <= 8);
        size_of::<T>() / 8
    };

    /// Maps all `entries` of the array map behind `map`, which was made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// There are no entries, or the kernel refuses, as it does past the map's end.
    pub fn new(map: impl AsFd, entries: u32) -> io::Result<Self> {
        Self::part(map, 0..entries)
    }

    /// Maps only these of its entries: what is mapped counts as the agent's memory.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn part(map: impl AsFd, entries: Range<u32>) -> io::Result<Self> {
        let page = procfs::page_size();
        let byte = |entry: u32| u64::from(entry) * Self::WORDS as u64 * 8;
        let first_byte = byte(entries.start) / page * page;
        let length_bytes = NonZeroUsize::new(byte(entries.end).saturating_sub(first_byte) as usize)
            .filter(|_| !entries.is_empty())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an array map without entries"))?;
        let offset = i64::try_from(first_byte).map_err(io::Error::other)?;
        // SAFETY: needed because nothing else reads a map without a system call per value. A new mapping at
        // an address of the kernel's choice aliases nothing of ours; the kernel refuses a length past the map.
        let address =
            unsafe { mmap(None, length_bytes, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, map, offset) }?;
        let before = (byte(entries.start) - first_byte) as usize / 8;
        Ok(Self { address: address.cast(), length_bytes, before, entries, record: PhantomData })
    }

    /// The record at `index`, as it is now: each word is read at once, the record as a whole is not. `None` where it is not mapped.
    pub fn read(&self, index: u32) -> Option<T> {
        self.read_part(index, 0)
    }

    /// The same of what begins with one of the record's words.
    ///
    /// # Panics
    /// The record ends before it.
    pub fn read_part<P: BpfRecord>(&self, index: u32, first_word: usize) -> Option<P> {
        let words = MappedArray::<P>::WORDS;
        assert!(first_word + words <= Self::WORDS, "a part of the record");
        let first = self.place(index)? + first_word;
        let mut part = MaybeUninit::<P>::uninit();
        for word in 0..words {
            let value = self.word(first + word);
            // SAFETY: `word` is inside of the part; unaligned, so that no alignment of `P` is asked for.
            unsafe { part.as_mut_ptr().cast::<u64>().add(word).write_unaligned(value) };
        }
        // SAFETY: every word was written, and any bits are a valid `P` (the trait's contract).
        Some(unsafe { part.assume_init() })
    }

    /// These words of the record at `index`, by their place in it.
    ///
    /// # Panics
    /// The record ends before one of them.
    pub fn words<const N: usize>(&self, index: u32, places: [usize; N]) -> Option<[u64; N]> {
        let first = self.place(index)?;
        Some(places.map(|place| {
            assert!(place < Self::WORDS, "a word of the record");
            self.word(first + place)
        }))
    }

    /// The first word of a record.
    fn place(&self, index: u32) -> Option<usize> {
        let place = || self.before + (index - self.entries.start) as usize * Self::WORDS;
        self.entries.contains(&index).then(place)
    }

    fn word(&self, place: usize) -> u64 {
        // SAFETY: needed because the kernel writes this memory meanwhile: it may only be read atomically.
        // In range (of a record for which `place` answered), aligned (pages), and mapped as long as `self` is.
        unsafe { self.address.add(place).as_ref() }.load(Ordering::Relaxed)
    }
}

impl<T: BpfRecord> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: this very mapping was made in `new`, and no reference into it outlives a call of `read`.
        if let Err(error) = unsafe { munmap(self.address.cast(), self.length_bytes.get()) } {
            tracing::warn!(%error, "could not unmap an eBPF map");
        }
    }
}

/// An array map of words, mapped until it is dropped; programs write it meanwhile.
#[derive(Debug)]
pub struct MappedWords {
    address: NonNull<AtomicU64>,
    words: NonZeroUsize,
}

// SAFETY: the mapping belongs to the value, and is only ever used word by word and atomically.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps all words of the array map behind `map`, which was made with `BPF_F_MMAPABLE`.
    pub fn new(map: impl AsFd, words: u32) -> io::Result<Self> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "an array map without entries");
        let words = NonZeroUsize::new(words as usize).ok_or_else(invalid)?;
        let length_bytes =
            words.checked_mul(NonZeroUsize::new(8).ok_or_else(invalid)?).ok_or_else(invalid)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: as in `MappedArray::new`.
        let address = unsafe { mmap(None, length_bytes, protection, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { address: address.cast(), words })
    }

    /// How many words are so.
    pub fn count(&self, is_it: impl Fn(u64) -> bool) -> u64 {
        self.all().iter().filter(|word| is_it(word.load(Ordering::Relaxed))).count() as u64
    }

    /// Makes words 0 that are so; answers how many there were.
    pub fn clear(&self, is_it: impl Fn(u64) -> bool) -> u64 {
        let cleared = self.all().iter().filter(|word| {
            let seen = word.load(Ordering::Relaxed);
            // A program may have written it meanwhile: then it is looked at the next time.
            is_it(seen) && word.compare_exchange(seen, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        });
        cleared.count() as u64
    }

    fn all(&self) -> &[AtomicU64] {
        // SAFETY: so many words were mapped, until the value is dropped, and everybody uses them atomically.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.words.get()) }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: what was mapped by `new`, and nobody has a reference to it any more.
        if let Err(error) = unsafe { munmap(self.address.cast(), self.words.get() * 8) } {
            tracing::warn!(%error, "could not unmap an eBPF map");
        }
    }
}
