//! Where the pages of a process are, and how they come back.

use std::{
    collections::BTreeMap,
    hint::black_box,
    io,
    ops::Range,
    path::Path,
    time::{Duration, Instant},
};

use super::{
    MemoryError,
    ages::{REGION_BYTES, Residency},
    held::PAGES_AT_ONCE,
};
use crate::{
    sys::{
        mem::{self, PAGE_SIZE, RemoteAddr},
        pagemap::{Pagemap, Query, Region, category},
        process::pidfd_open,
        reclaim,
    },
    tracee::{
        layout::{self, Mapping},
        tree,
    },
};

/// Whether what is in this mapping may go to swap and come back: private memory without a file that can be read.
fn is_taken(mapping: &Mapping) -> bool {
    let readable = mapping.protection & libc::PROT_READ != 0;
    let plain = mapping.name.is_empty() || mapping.name == "[heap]" || mapping.name.starts_with("[anon:");
    mapping.inode == 0 && !mapping.shared && readable && plain
}

/// Where the pages of a process are, by region.
pub(super) fn residency(pid: i32) -> io::Result<BTreeMap<u64, Residency>> {
    let mut pagemap = Pagemap::open(pid)?;
    let mut found = BTreeMap::new();
    for mapping in mappings(pid)?.iter().filter(|mapping| is_taken(mapping)) {
        add(&mut pagemap, mapping.start..mapping.end, &mut found)?;
    }
    Ok(found)
}

fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    layout::read_mappings(pid).map_err(io::Error::other)
}

/// Adds the pages of `span` that are in memory or in swap.
pub(super) fn add(
    pagemap: &mut Pagemap,
    span: Range<u64>,
    to: &mut BTreeMap<u64, Residency>,
) -> io::Result<()> {
    let mut found = Vec::new();
    scan(pagemap, span, &mut found)?;
    for region in found {
        for page in (region.start..region.end).step_by(PAGE_SIZE as usize) {
            let start = page / REGION_BYTES * REGION_BYTES;
            let bit = 1 << ((page - start) / PAGE_SIZE);
            let here = to.entry(start).or_default();
            match region.categories & category::PRESENT != 0 {
                true => {
                    here.present |= bit;
                    here.huge |= region.categories & category::HUGE != 0;
                }
                false => here.swapped |= bit,
            }
        }
    }
    Ok(())
}

/// Regions of pages that are the process's own, in memory or in swap, and whose writes nobody tracks.
fn scan(pagemap: &mut Pagemap, span: Range<u64>, found: &mut Vec<Region>) -> io::Result<()> {
    let where_ = category::PRESENT | category::SWAPPED;
    let not = category::FILE | category::PFNZERO | category::TRACKED;
    let query = |not| Query { inverted: not, all_of: not, any_of: where_, report: where_ | category::HUGE };
    match pagemap.scan(span.start, span.end, query(not | category::GUARD), found) {
        // Before Linux 6.15 there was no such category, and before 6.13 no such page.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            pagemap.scan(span.start, span.end, query(not), found)
        }
        scanned => scanned,
    }
}

/// What of a process is in swap and can be brought back.
pub(super) fn swapped(pid: i32) -> Result<Vec<Range<u64>>, MemoryError> {
    let look = || -> io::Result<Vec<Range<u64>>> {
        let mut pagemap = Pagemap::open(pid)?;
        let mut found = Vec::new();
        for mapping in mappings(pid)?.iter().filter(|mapping| is_taken(mapping)) {
            let mut regions = Vec::new();
            scan(&mut pagemap, mapping.start..mapping.end, &mut regions)?;
            let swapped = regions.iter().filter(|region| region.categories & category::PRESENT == 0);
            found.extend(swapped.map(|region| region.start..region.end));
        }
        Ok(found)
    };
    match look() {
        Err(error) if has_ended(pid, &error) => Ok(Vec::new()),
        looked => looked.map_err(MemoryError::process("look at its pages", pid)),
    }
}

/// Reads a byte of each page.
pub(super) fn touch(pid: i32, pages: Range<u64>) -> io::Result<()> {
    let mut bytes = [0; PAGES_AT_ONCE];
    let addresses = pages.step_by(PAGE_SIZE as usize).map(RemoteAddr);
    let mut pieces: Vec<_> = addresses.zip(bytes.chunks_mut(1)).collect();
    let mut rest = &mut pieces[..];
    while !rest.is_empty() {
        let read = match mem::read_pieces(pid, rest) {
            Err(error) if has_ended(pid, &error) => return Ok(()),
            read => read?,
        };
        // The one behind the last that could be read is not mapped any more.
        rest = rest.get_mut(read + 1..).unwrap_or_default();
    }
    Ok(())
}

/// Whether something failed because the process is no more.
pub(super) fn has_ended(pid: i32, error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(libc::ESRCH)
        || tree::has_ended(pid)
        || !Path::new(&format!("/proc/{pid}")).exists()
}

/// How long this host takes to fetch a page from swap, measured on some of this process's own; nothing, where none went out.
pub(super) fn fault_time() -> Option<Duration> {
    const PAGE: usize = PAGE_SIZE as usize;
    // As hard to compress as half of most heaps is.
    let mut memory = vec![0_u8; (PAGES_AT_ONCE + 1) * PAGE];
    let mut word = 1_u64;
    for half in memory.chunks_mut(PAGE / 2).step_by(2) {
        for part in half.chunks_exact_mut(8) {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            part.copy_from_slice(&word.to_le_bytes());
        }
    }
    let own = std::process::id() as i32;
    let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
    let span = start..start + REGION_BYTES;
    reclaim::page_out(&pidfd_open(own).ok()?, std::slice::from_ref(&span)).ok()?;
    let mut out = Vec::new();
    Pagemap::open(own).ok()?.in_swap(span.clone(), &mut out).ok()?;
    let pages = out.iter().map(|range| (range.end - range.start) / PAGE_SIZE).sum::<u64>() as u32;
    let skip = (start - memory.as_ptr() as u64) as usize;
    let began = Instant::now();
    for page in (skip..skip + PAGES_AT_ONCE * PAGE).step_by(PAGE) {
        black_box(memory[page]);
    }
    began.elapsed().checked_div(pages)
}
