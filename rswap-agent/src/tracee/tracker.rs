//! What a running process wrote: userfaultfd in asynchronous write-protect mode, read by PAGEMAP_SCAN.
//!
//! The userfaultfd is made inside the tracee, in one short stop, and taken out; from then on the process
//! runs and is scanned from outside. A mapping that is new since the last scan isn't protected yet: the
//! scan refuses it (`EPERM`), and it counts as new as a whole. So a write is never missed; at worst a
//! page is sent twice.
//!
//! That a page has *gone* is not always told: when a program gives back two aligned megabytes (`MADV_DONTNEED`), the kernel
//! frees their page table with all marks of protection in it, and a scan passes over the hole (`CONFIG_PT_RECLAIM`,
//! Linux 6.14). So the tracker keeps in mind what it has reported as populated, and the last look, at a process that stands
//! still, compares that with what is there.

use std::ops::Range;

use roaring::RoaringTreemap;

use super::{TraceeError, layout, layout::Mapping, read_proc, remote::Remote, stopped::StoppedProcess};
use crate::sys::{
    mem::PAGE_SIZE,
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
    /// The kernel's own mappings, which are not among those.
    pub kernel_mappings: Vec<Mapping>,
    /// Private pages whose contents may have changed.
    pub populated: Vec<Span>,
    /// Pages that have no private contents any more.
    pub dropped: Vec<Span>,
}

/// What tracks writes in the address space of process `pid`, which is stopped for a moment. Nothing is tracked yet.
pub fn open(pid: i32) -> Result<WriteTracker, TraceeError> {
    // The first look takes longest: not while the process stands still. It fails in execve(2), in which nothing stands still.
    let _ = Remote::prepare(pid);
    let stopped = StoppedProcess::stop(pid)?;
    let mut remote = Remote::of_program(&stopped)?;
    let fd = remote.call("userfaultfd", libc::SYS_userfaultfd, [uffd::OPEN_FLAGS, 0, 0, 0, 0, 0])?;
    let fd = remote.take_descriptor(fd as i32)?;
    WriteTracker::new(fd).map_err(TraceeError::call("UFFDIO_API on a userfaultfd", pid))
}

/// Tracks the writes of one process until it is dropped.
#[derive(Debug)]
pub struct Tracker {
    pid: i32,
    /// `None`: it stands still, and everything counts as written.
    writes: Option<WriteTracker>,
    pagemap: Pagemap,
    /// Whether any page can be in swap.
    host_swaps: bool,
    /// What is protected, ascending.
    tracked: Vec<Span>,
    /// The pages reported as populated and not as dropped since, by number.
    reported: RoaringTreemap,
}

impl Tracker {
    /// Starts tracking process `pid`, which is stopped for a moment.
    pub fn start(pid: i32) -> Result<Self, TraceeError> {
        Ok(Self { writes: Some(open(pid)?), ..Self::of_stopped(pid)? })
    }

    /// For a process that is stopped already and was never tracked: what it has is all to be sent.
    pub fn of_stopped(pid: i32) -> Result<Self, TraceeError> {
        let pagemap = Pagemap::open(pid).map_err(TraceeError::call("opening the page map", pid))?;
        Ok(Self {
            pid,
            writes: None,
            pagemap,
            host_swaps: false,
            tracked: Vec::new(),
            reported: RoaringTreemap::new(),
        })
    }

    /// What was written since the last call (at the first: everything that is there), protected again.
    pub fn take_written(&mut self) -> Result<WrittenSpans, TraceeError> {
        let mut written = self.nothing_written()?;
        let before = std::mem::take(&mut self.tracked);
        for span in &before {
            written.dropped.extend(unmapped(span, &written.mappings));
        }
        // What is mapped shared is a file that can't be written through the mapping.
        for mapping in written.mappings.iter().filter(|mapping| !mapping.shared) {
            for (span, known) in split(mapping, &before) {
                let kind = Kind::of(mapping);
                if known && self.take_known(&span, kind, &mut written.populated, &mut written.dropped)? {
                    self.tracked.push(span);
                    continue;
                }
                // Reserved address space (an allocator's arena) is left alone until it is used: protecting
                // it would make the kernel fill page tables for it.
                let reserved =
                    mapping.protection == libc::PROT_NONE && self.populated(&span, kind)?.is_empty();
                if !before.is_empty() {
                    written.dropped.push(span.clone());
                }
                if !reserved && self.protect(&span)? {
                    written.populated.extend(self.populated(&span, kind)?);
                    self.tracked.push(span);
                }
            }
        }
        self.remember(&written);
        Ok(written)
    }

    /// The mappings as they are now.
    fn nothing_written(&mut self) -> Result<WrittenSpans, TraceeError> {
        // Under its headline, a line for each device. A page that went there before a device was taken away is back.
        self.host_swaps = read_proc("/proc/swaps")?.lines().count() > 1;
        let all = layout::read_mappings(self.pid)?;
        let (kernel_mappings, mappings) = all.into_iter().partition(Mapping::is_kernels_own);
        Ok(WrittenSpans { mappings, kernel_mappings, ..WrittenSpans::default() })
    }

    /// As [`Self::take_written`], of a process that stands still, and for the last time: afterwards what was reported, at all
    /// looks together, is what is there. Nothing is protected again, so that one scan does: a call for each of hundreds of
    /// mappings takes longer than passing over what lies between them.
    pub fn take_last_written(&mut self) -> Result<WrittenSpans, TraceeError> {
        let mut written = self.nothing_written()?;
        let (mut there, mut fresh) = (RoaringTreemap::new(), RoaringTreemap::new());
        let mut renewed = RoaringTreemap::new();
        let mut regions = Vec::new();
        for (span, kind) in stretches(&written.mappings) {
            regions.extend(self.regions(&span, kind, category::WRITTEN | category::TRACKED)?);
        }
        let mut private = written.mappings.iter().filter(|mapping| !mapping.shared).peekable();
        for region in regions {
            // In a mapping that came since the last look, everything is new.
            let is_new = region.categories & category::TRACKED == 0;
            let is_fresh = is_new || region.categories & category::WRITTEN != 0;
            while private.next_if(|mapping| mapping.end <= region.start).is_some() {}
            while let Some(mapping) = private.peek().filter(|mapping| mapping.start < region.end) {
                let inside = region.start.max(mapping.start)..region.end.min(mapping.end);
                insert(&mut there, &inside);
                if is_fresh {
                    insert(&mut fresh, &inside);
                }
                if is_new {
                    insert(&mut renewed, &inside);
                }
                if mapping.end > region.end {
                    break;
                }
                private.next();
            }
        }
        let missing = &(&there - &self.reported) - &fresh;
        if let Some(first) = missing.min() {
            // Harmless is only a page that a thread was about to write when it was stopped: its fault is over, the write isn't.
            tracing::warn!(
                pid = self.pid,
                pages = missing.len(),
                first,
                "found pages that no look had reported"
            );
        }
        // What stood at the place of a new mapping is gone, and the destination has forgotten it with the old one.
        written.dropped = spans(&(&self.reported - &(&there - &renewed)));
        written.populated = spans(&(fresh | missing));
        self.reported = there;
        Ok(written)
    }

    fn remember(&mut self, written: &WrittenSpans) {
        for span in &written.dropped {
            self.reported.remove_range(numbers(span));
        }
        written.populated.iter().for_each(|span| insert(&mut self.reported, span));
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
        kind: Kind,
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
        let there = self.populated(&(first.start..last.end), kind)?;
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
    pub fn populated(&mut self, span: &Span, kind: Kind) -> Result<Vec<Span>, TraceeError> {
        Ok(self.regions(span, kind, 0)?.into_iter().map(|region| region.start..region.end).collect())
    }

    /// The same, each run with those of the categories `report` that it has.
    fn regions(&mut self, span: &Span, kind: Kind, report: u64) -> Result<Vec<Region>, TraceeError> {
        let not = match kind {
            Kind::Anonymous => category::PFNZERO,
            Kind::Mixed => category::FILE | category::PFNZERO,
        };
        // Markers look swapped, and there may be millions of them: they are only sorted out where it matters.
        let any_of = if self.host_swaps { category::PRESENT | category::SWAPPED } else { category::PRESENT };
        let query = Query { inverted: not, all_of: not, any_of, report: report | category::SWAPPED };
        let mut regions = Vec::new();
        let failed = |error| TraceeError::call("PAGEMAP_SCAN", self.pid)(error);
        self.pagemap.scan(span.start, span.end, query, &mut regions).map_err(failed)?;
        let mut found = Vec::with_capacity(regions.len());
        for region in regions {
            if region.categories & category::SWAPPED == 0 {
                found.push(region);
                continue;
            }
            let mut in_swap = Vec::new();
            self.pagemap.in_swap(region.start..region.end, &mut in_swap).map_err(failed)?;
            found.extend(in_swap.into_iter().map(|Range { start, end }| Region { start, end, ..region }));
        }
        Ok(found)
    }
}

/// What pages a span can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// None of a file: nobody need ask, page by page, whether it is one. The kernel answers that from its description of the
    /// page (`struct page`), elsewhere in memory for each, which takes several times as long as all else that a scan does.
    Anonymous,
    /// Of files as well.
    Mixed,
}

impl Kind {
    /// That of a private mapping.
    pub fn of(mapping: &Mapping) -> Self {
        if mapping.inode == 0 { Self::Anonymous } else { Self::Mixed }
    }
}

/// An anonymous mapping of as many bytes is scanned by a call of its own: the call costs less than it saves.
const WORTH_A_CALL: u64 = 4 << 20;

/// What has to be scanned so that no private mapping is missed, ascending, in few calls: there may be hundreds of mappings.
fn stretches(mappings: &[Mapping]) -> Vec<(Span, Kind)> {
    let mut found: Vec<(Span, Kind)> = Vec::new();
    for mapping in mappings.iter().filter(|mapping| !mapping.shared) {
        if Kind::of(mapping) == Kind::Anonymous && mapping.end - mapping.start >= WORTH_A_CALL {
            found.push((mapping.start..mapping.end, Kind::Anonymous));
            continue;
        }
        match found.last_mut() {
            Some((span, Kind::Mixed)) => span.end = mapping.end,
            _ => found.push((mapping.start..mapping.end, Kind::Mixed)),
        }
    }
    found
}

/// The numbers of a span's pages.
fn numbers(span: &Span) -> Range<u64> {
    span.start / PAGE_SIZE..span.end / PAGE_SIZE
}

fn insert(pages: &mut RoaringTreemap, span: &Span) {
    pages.insert_range(numbers(span));
}

/// Pages as spans, ascending.
fn spans(pages: &RoaringTreemap) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for page in pages {
        let at = page * PAGE_SIZE;
        match spans.last_mut() {
            Some(last) if last.end == at => last.end += PAGE_SIZE,
            _ => spans.push(at..at + PAGE_SIZE),
        }
    }
    spans
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ascending, with gaps: length in pages, gap after it in pages, shared, and whether it is a file's.
    fn mappings(of: &[(u64, u64, bool, bool)]) -> Vec<Mapping> {
        let mut at = 0x1000_0000;
        let mut made = Vec::new();
        for &(pages, gap, shared, file) in of {
            let end = at + pages * PAGE_SIZE;
            let (protection, inode, name) = (libc::PROT_READ, u64::from(file), String::new());
            made.push(Mapping { start: at, end, protection, shared, offset: 0, inode, name });
            at = end + gap * PAGE_SIZE;
        }
        made
    }

    proptest! {
        #[test]
        fn no_private_mapping_is_missed_and_files_are_told_apart(
            of in prop::collection::vec((1_u64..4096, 0_u64..3, any::<bool>(), any::<bool>()), 0..20)
        ) {
            let mappings = mappings(&of);
            let stretches = stretches(&mappings);
            prop_assert!(stretches.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start));
            for mapping in mappings.iter().filter(|mapping| !mapping.shared) {
                let covers = |span: &Span| span.start <= mapping.start && mapping.end <= span.end;
                let by: Vec<Kind> =
                    stretches.iter().filter(|(span, _)| covers(span)).map(|(_, kind)| *kind).collect();
                prop_assert_eq!(by.len(), 1);
                prop_assert!(mapping.inode == 0 || by[0] == Kind::Mixed);
            }
        }
    }

    #[test]
    fn only_large_anonymous_mappings_are_scanned_apart() {
        let large = WORTH_A_CALL / PAGE_SIZE;
        let found = stretches(&mappings(&[
            (1, 0, false, true),
            (2, 5, false, false),
            (large, 0, false, false),
            (large, 0, false, true),
            (3, 0, true, false),
            (1, 0, false, false),
        ]));
        let kinds: Vec<Kind> = found.iter().map(|(_, kind)| *kind).collect();
        assert_eq!(kinds, [Kind::Mixed, Kind::Anonymous, Kind::Mixed]);
    }
}
