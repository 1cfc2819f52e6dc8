//! Files without a name that are mapped: memory that several processes share (anonymous shared mappings, memfd, SysV
//! segments), and files that were deleted.
//!
//! What is written there is found by comparing hashes, page by page, whichever mapping or system call wrote it: a write
//! tracker sees only the writes through the mappings that it was armed for.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
};

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::{
    TraceeError,
    layout::{Mapping, segment_inode},
    sysv::{self, Segment},
    tracker::Span,
};
use crate::sys::{
    file::{self, MappedFile},
    mem::PAGE_SIZE,
};

/// A shared object is numbered as an address space of its own, from here on; addresses are offsets in it.
pub const FIRST_SPACE: u32 = 1 << 31;

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// One piece of shared memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedObject {
    /// Its number as an address space.
    pub space: u32,
    /// Its inode at the source, which the mappings name.
    pub inode: u64,
    /// Its length, in bytes.
    pub bytes: u64,
    /// As what it was made (memfd_create(2)).
    pub name: String,
    /// `F_GET_SEALS`.
    pub seals: i32,
    /// It is SysV shared memory.
    pub segment: Option<Segment>,
    /// It is in huge pages of 2 MiB that were set aside for it.
    pub huge: bool,
}

/// The size of the pages of `file`, in bytes, if it is memory in huge pages that were set aside (hugetlbfs).
pub fn huge_page_bytes(file: &File) -> std::io::Result<Option<u64>> {
    let kind = fstatfs(file)?;
    Ok((kind.filesystem_type() == HUGETLBFS_MAGIC).then_some(kind.block_size() as u64))
}

/// Whose memory in huge pages a shared mapping of process `pid` is, by its inode, and how long that is, in bytes.
pub fn shared_huge_pages(pid: i32, mapping: &Mapping) -> Option<(u64, u64)> {
    if !mapping.is_shared_memory() {
        return None;
    }
    let file = File::open(map_file(pid, mapping)).ok()?;
    huge_page_bytes(&file).ok()??;
    Some((mapping.inode, file.metadata().ok()?.len()))
}

fn map_file(pid: i32, mapping: &Mapping) -> String {
    format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end)
}

/// A shared object at the source, with what is known of its pages.
#[derive(Debug)]
pub struct SourceObject {
    /// What the destination is told.
    pub object: SharedObject,
    file: File,
    hashes: BTreeMap<u64, u128>,
}

impl SourceObject {
    /// Opens the object that `mapping` of process `pid` maps.
    pub fn open(pid: i32, mapping: &Mapping, space: u32) -> Result<Self, TraceeError> {
        let path = map_file(pid, mapping);
        let file = File::open(&path).map_err(TraceeError::proc(&path))?;
        let huge = huge_page_bytes(&file).map_err(TraceeError::proc(&path))?.is_some();
        if file.metadata().map_err(TraceeError::proc(path))?.nlink() != 0 {
            // What is written by its other name would not be seen here.
            let text = format!("{} is mapped by a name that was removed, and has another one", mapping.name);
            return Err(TraceeError::Unsupported(text));
        }
        let name = mapping.name.strip_prefix("/memfd:").and_then(|name| name.strip_suffix(" (deleted)"));
        let name = name.unwrap_or("rswap").to_owned();
        let inode = mapping.inode;
        let object = SharedObject { space, inode, bytes: 0, name, seals: 0, segment: None, huge };
        Ok(Self { object, file, hashes: BTreeMap::new() })
    }

    /// Opens SysV shared memory in the IPC namespace of process `pid`.
    pub fn open_segment(pid: i32, segment: Segment, space: u32) -> Result<Self, TraceeError> {
        let file =
            sysv::open(pid, segment.id).map_err(TraceeError::call("opening SysV shared memory", pid))?;
        let object = SharedObject {
            space,
            inode: segment_inode(segment.id),
            bytes: 0,
            name: String::new(),
            seals: 0,
            segment: Some(segment),
            huge: false,
        };
        Ok(Self { object, file, hashes: BTreeMap::new() })
    }

    /// The pages whose contents changed since the last call (at the first: all with contents), and those that have
    /// none any more.
    pub fn take_changed(&mut self, pid: i32) -> Result<(Vec<Span>, Vec<Span>), TraceeError> {
        let failed = |error| TraceeError::call("reading shared memory", pid)(error);
        self.object.bytes = self.file.metadata().map_err(failed)?.len().next_multiple_of(PAGE_SIZE);
        // Only memory can be sealed.
        self.object.seals = file::seals(&self.file).unwrap_or(0);
        let mut known = std::mem::take(&mut self.hashes);
        let (mut changed, mut dropped) = (Vec::new(), Vec::new());
        let mut memory = vec![0; CHUNK];
        for span in file::data(&self.file).map_err(failed)? {
            let end = span.end.next_multiple_of(PAGE_SIZE);
            let mut at = span.start - span.start % PAGE_SIZE;
            while at < end {
                let wanted = CHUNK.min((end - at) as usize);
                let memory = &mut memory[..wanted];
                let got = file::read_at(&self.file, memory, at).map_err(failed)?;
                memory[got..].fill(0);
                for page in memory.chunks_exact(PAGE_SIZE as usize) {
                    let hash = xxh3_128(page);
                    if known.remove(&at) != Some(hash) {
                        push(&mut changed, at);
                    }
                    self.hashes.insert(at, hash);
                    at += PAGE_SIZE;
                }
            }
        }
        for at in known.into_keys() {
            push(&mut dropped, at);
        }
        Ok((changed, dropped))
    }

    /// Reads whole pages at `at`; what lies past the end reads as zeros.
    ///
    /// What is read here is what the destination gets, so it is what the next look has to compare with: a page may have
    /// changed since the look, and may be as it was then when the next one comes.
    pub fn read(&mut self, at: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let got = file::read_at(&self.file, buf, at)?;
        buf[got..].fill(0);
        for (page, at) in buf.chunks_exact(PAGE_SIZE as usize).zip((at..).step_by(PAGE_SIZE as usize)) {
            self.hashes.insert(at, xxh3_128(page));
        }
        Ok(())
    }
}

fn push(spans: &mut Vec<Span>, at: u64) {
    match spans.last_mut() {
        Some(last) if last.end == at => last.end += PAGE_SIZE,
        _ => spans.push(at..at + PAGE_SIZE),
    }
}

/// A shared object that is being built.
#[derive(Debug)]
pub struct BuiltObject {
    /// As the source describes it.
    pub object: SharedObject,
    /// Its memory.
    pub file: File,
    /// Huge pages can't be written to but through a mapping.
    mapped: Option<MappedFile>,
}

impl BuiltObject {
    /// Makes an empty one, for the instance that process `pid` belongs to.
    pub fn make(pid: i32, object: &SharedObject) -> std::io::Result<Self> {
        if let Some(segment) = &object.segment {
            return Ok(Self { object: object.clone(), file: sysv::make(pid, segment)?, mapped: None });
        }
        let file = file::sealable_memory(&CString::new(object.name.as_str())?, object.huge)?;
        let mut built = Self { object: object.clone(), file, mapped: None };
        built.set_len(object.bytes)?;
        Ok(built)
    }

    fn set_len(&mut self, bytes: u64) -> std::io::Result<()> {
        self.mapped = None;
        self.file.set_len(bytes)?;
        if self.object.huge {
            self.mapped = Some(MappedFile::of(&self.file, bytes)?);
        }
        Ok(())
    }

    /// Brings it to the length that the source's has now.
    pub fn resize(&mut self, object: &SharedObject) -> std::io::Result<()> {
        if self.object.bytes != object.bytes && object.segment.is_none() {
            self.set_len(object.bytes)?;
        }
        self.object = object.clone();
        Ok(())
    }

    /// It is not wanted any more; `pid` as before.
    pub fn remove(&self, pid: i32) -> std::io::Result<()> {
        self.object.segment.map_or(Ok(()), |segment| sysv::remove(pid, segment.id))
    }

    /// Seals it as the source's is, from where on it may be that nobody can write to it, or gives it its owner.
    pub fn finish(&self, pid: i32) -> std::io::Result<()> {
        if let Some(segment) = &self.object.segment {
            return sysv::finish(pid, segment);
        }
        if self.object.seals == 0 { Ok(()) } else { file::add_seals(&self.file, self.object.seals) }
    }

    /// Writes whole pages.
    pub fn write(&mut self, at: u64, data: &[u8]) -> std::io::Result<()> {
        self.inside(at, data.len() as u64)?;
        match &mut self.mapped {
            Some(mapped) => mapped.write(at, data),
            None => self.file.write_all_at(data, at),
        }
    }

    /// Reads whole pages back.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.inside(at, buf.len() as u64)?;
        self.file.read_exact_at(buf, at)
    }

    /// Gives pages back: they read as zeros.
    pub fn discard(&mut self, start: u64, end: u64) -> std::io::Result<()> {
        let end = end.min(self.object.bytes);
        if let Some(mapped) = &mut self.mapped {
            // Given back, they might not be there when they are written to again.
            return mapped.clear(start..end.max(start));
        }
        if start < end { file::punch_hole(&self.file, start, end - start) } else { Ok(()) }
    }

    /// The peer names the place: nothing may grow by it.
    fn inside(&self, at: u64, len: u64) -> std::io::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.object.bytes => Ok(()),
            _ => Err(std::io::Error::other(format!("{len} bytes at {at:#x} are outside of a shared object"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_as_it_was_at_the_look_but_not_when_it_was_read_is_sent_again() {
        let file = tempfile::tempfile().expect("make");
        file.set_len(2 * PAGE_SIZE).expect("resize");
        file.write_all_at(b"first", 0).expect("write");
        let (space, inode, bytes, name, seals, segment) = (FIRST_SPACE, 1, 0, String::new(), 0, None);
        let object = SharedObject { space, inode, bytes, name, seals, segment, huge: false };
        let mut source = SourceObject { object, file, hashes: BTreeMap::new() };
        let page = |spans: Vec<Span>| spans.first().cloned();
        assert_eq!(page(source.take_changed(0).expect("look").0), Some(0..PAGE_SIZE));
        source.file.write_all_at(b"other", 0).expect("write");
        let mut sent = vec![0; PAGE_SIZE as usize];
        source.read(0, &mut sent).expect("read");
        assert_eq!(&sent[..5], b"other");
        source.file.write_all_at(b"first", 0).expect("write");
        assert_eq!(page(source.take_changed(0).expect("look").0), Some(0..PAGE_SIZE));
        source.read(0, &mut sent).expect("read");
        assert_eq!(page(source.take_changed(0).expect("look").0), None);
    }
}
