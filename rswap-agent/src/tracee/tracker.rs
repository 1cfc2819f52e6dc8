//! What a running process wrote: userfaultfd in asynchronous write-protect mode, read by PAGEMAP_SCAN.
//!
//! The userfaultfd is made inside the tracee, in one short stop, and taken out; from then on the process
//! runs and is scanned from outside. A mapping that is new since the last scan isn't protected yet: the
//! scan refuses it (`EPERM`), and it counts as new as a whole. So a write is never missed; at worst a
//! page is sent twice.

use std::ops::Range;

use super::{TraceeError, layout, layout::Mapping, remote::Remote, stopped::StoppedProcess};
use crate::sys::{
    pagemap::{Pagemap, Query, Region, category},
    uffd::{self, WriteTracker},
};

/// Bytes of an address space, page-aligned.
pub type Span = Range<u64>;

/// What happened since the last look.
#[derive(Clone, Debug, Default)]
pub struct WrittenSpans {
    /// The mappings at that moment; the spans lie in them.
    pub mappings: Vec<Mapping>,
    /// Private pages whose contents may have changed.
    pub populated: Vec<Span>,
    /// Pages that have no private contents any more.
    pub dropped: Vec<Span>,
}

/// Tracks the writes of one process until it is dropped.
#[derive(Debug)]
pub struct Tracker {
    pid: i32,
    /// `None`: it stands still, and everything counts as written.
    writes: Option<WriteTracker>,
    pagemap: Pagemap,
    /// What is protected, ascending.
    tracked: Vec<Span>,
}

impl Tracker {
    /// Starts tracking process `pid`, which is stopped for a moment.
    pub fn start(pid: i32) -> Result<Self, TraceeError> {
        let stopped = StoppedProcess::stop(pid)?;
        let mut remote = Remote::new(stopped.pid())?;
        let fd = remote.call("userfaultfd", libc::SYS_userfaultfd, [uffd::OPEN_FLAGS, 0, 0, 0, 0, 0])?;
        let fd = remote.take_descriptor(fd as i32)?;
        let writes = WriteTracker::new(fd).map_err(TraceeError::call("UFFDIO_API on a userfaultfd", pid))?;
        let pagemap = Pagemap::open(pid).map_err(TraceeError::call("opening the page map", pid))?;
        Ok(Self { pid, writes: Some(writes), pagemap, tracked: Vec::new() })
    }

    /// For a process that is stopped already and was never tracked: what it has is all to be sent.
    pub fn of_stopped(pid: i32) -> Result<Self, TraceeError> {
        let pagemap = Pagemap::open(pid).map_err(TraceeError::call("opening the page map", pid))?;
        Ok(Self { pid, writes: None, pagemap, tracked: Vec::new() })
    }

    /// What was written since the last call (at the first: everything that is there), protected again.
    pub fn take_written(&mut self) -> Result<WrittenSpans, TraceeError> {
        let mut written =
            WrittenSpans { mappings: layout::read_mappings(self.pid)?, ..WrittenSpans::default() };
        written.mappings.retain(|mapping| !mapping.is_kernels_own());
        let before = std::mem::take(&mut self.tracked);
        for span in &before {
            written.dropped.extend(unmapped(span, &written.mappings));
        }
        // What is mapped shared is a file that can't be written through the mapping.
        for mapping in written.mappings.iter().filter(|mapping| !mapping.shared) {
            for (span, known) in split(mapping, &before) {
                if known && self.take_known(&span, &mut written.populated, &mut written.dropped)? {
                    self.tracked.push(span);
                    continue;
                }
                // Reserved address space (an allocator's arena) is left alone until it is used: protecting
                // it would make the kernel fill page tables for it.
                let reserved = mapping.protection == libc::PROT_NONE && self.populated(&span)?.is_empty();
                if !before.is_empty() {
                    written.dropped.push(span.clone());
                }
                if !reserved && self.protect(&span)? {
                    written.populated.extend(self.populated(&span)?);
                    self.tracked.push(span);
                }
            }
        }
        Ok(written)
    }

    /// Protects a new span; `false` when it is gone already.
    fn protect(&self, span: &Span) -> Result<bool, TraceeError> {
        let Some(writes) = &self.writes else { return Ok(true) };
        match writes.track(span.start, span.end) {
            Ok(()) => Ok(true),
            // Unmapped since the mappings were read: the next look will tell.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(false),
            Err(error) => Err(TraceeError::call("tracking the writes", self.pid)(error)),
        }
    }

    /// Takes what was written in a span that was protected; `false` when it isn't (or not all of it).
    fn take_known(
        &mut self,
        span: &Span,
        populated: &mut Vec<Span>,
        dropped: &mut Vec<Span>,
    ) -> Result<bool, TraceeError> {
        let mut regions = Vec::new();
        match self.pagemap.take_written(span.start, span.end, &mut regions) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(false),
            Err(error) => return Err(TraceeError::call("PAGEMAP_SCAN", self.pid)(error)),
        }
        let (Some(first), Some(last)) = (regions.first(), regions.last()) else { return Ok(true) };
        let there = self.populated(&(first.start..last.end))?;
        let mut rest = there.iter().peekable();
        for Region { start, end, .. } in regions {
            let mut at = start;
            while rest.next_if(|span| span.end <= start).is_some() {}
            while let Some(span) = rest.peek().filter(|span| span.start < end) {
                let from = span.start.max(at);
                let to = span.end.min(end);
                if at < from {
                    dropped.push(at..from);
                }
                populated.push(from..to);
                at = to;
                if span.end > end {
                    break;
                }
                rest.next();
            }
            if at < end {
                dropped.push(at..end);
            }
        }
        Ok(true)
    }

    /// The pages of a span with contents of their own: neither the file's nor zero.
    fn populated(&mut self, span: &Span) -> Result<Vec<Span>, TraceeError> {
        let not = category::FILE | category::PFNZERO;
        let any_of = category::PRESENT | category::SWAPPED;
        let mut regions = Vec::new();
        self.pagemap
            .scan(span.start, span.end, Query { inverted: not, all_of: not, any_of, report: 0 }, &mut regions)
            .map_err(TraceeError::call("PAGEMAP_SCAN", self.pid))?;
        Ok(regions.into_iter().map(|region| region.start..region.end).collect())
    }
}

/// The parts of a span that no mapping covers any more.
fn unmapped(span: &Span, mappings: &[Mapping]) -> Vec<Span> {
    let mut gaps = Vec::new();
    let mut at = span.start;
    for mapping in mappings.iter().filter(|mapping| mapping.end > span.start && mapping.start < span.end) {
        if at < mapping.start {
            gaps.push(at..mapping.start);
        }
        at = mapping.end;
    }
    if at < span.end {
        gaps.push(at..span.end);
    }
    gaps
}

/// The parts of a mapping that `tracked` covers (`true`) and those that it doesn't.
fn split(mapping: &Mapping, tracked: &[Span]) -> Vec<(Span, bool)> {
    let mut parts = Vec::new();
    let mut at = mapping.start;
    for span in tracked.iter().filter(|span| span.start < mapping.end && span.end > mapping.start) {
        let (from, to) = (span.start.max(mapping.start), span.end.min(mapping.end));
        if at < from {
            parts.push((at..from, false));
        }
        parts.push((from..to, true));
        at = to;
    }
    if at < mapping.end {
        parts.push((at..mapping.end, false));
    }
    parts
}
