//! Memory that several processes share: anonymous shared mappings, memfd, SysV segments.
//!
//! What is written there is found by comparing hashes, page by page, whichever mapping or system call wrote it: a write
//! tracker sees only the writes through the mappings that it was armed for.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::{TraceeError, layout::Mapping, tracker::Span};
use crate::sys::{file, mem::PAGE_SIZE};

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
        let path = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
        let file = File::open(&path).map_err(TraceeError::proc(path))?;
        let object = SharedObject { space, inode: mapping.inode, bytes: 0 };
        Ok(Self { object, file, hashes: BTreeMap::new() })
    }

    /// The pages whose contents changed since the last call (at the first: all with contents), and those that have
    /// none any more.
    pub fn take_changed(&mut self, pid: i32) -> Result<(Vec<Span>, Vec<Span>), TraceeError> {
        let failed = |error| TraceeError::call("reading shared memory", pid)(error);
        self.object.bytes = self.file.metadata().map_err(failed)?.len().next_multiple_of(PAGE_SIZE);
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
    pub fn read(&self, at: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let got = file::read_at(&self.file, buf, at)?;
        buf[got..].fill(0);
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
}

impl BuiltObject {
    /// Makes an empty one.
    pub fn make(object: &SharedObject) -> std::io::Result<Self> {
        let file = file::shared_memory("rswap")?;
        let built = Self { object: object.clone(), file };
        built.file.set_len(object.bytes)?;
        Ok(built)
    }

    /// Brings it to the length that the source's has now.
    pub fn resize(&mut self, object: &SharedObject) -> std::io::Result<()> {
        if self.object.bytes != object.bytes {
            self.file.set_len(object.bytes)?;
        }
        self.object = object.clone();
        Ok(())
    }

    /// Writes whole pages.
    pub fn write(&self, at: u64, data: &[u8]) -> std::io::Result<()> {
        self.inside(at, data.len() as u64)?;
        self.file.write_all_at(data, at)
    }

    /// Reads whole pages back.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.inside(at, buf.len() as u64)?;
        self.file.read_exact_at(buf, at)
    }

    /// Gives pages back: they read as zeros.
    pub fn discard(&self, start: u64, end: u64) -> std::io::Result<()> {
        let end = end.min(self.object.bytes);
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
