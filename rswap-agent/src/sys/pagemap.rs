//! PAGEMAP_SCAN (Linux 6.7): reads the state of page ranges and re-arms write protection in one call.
//! Source: Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/fs.h.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use super::mem::PAGE_SIZE;

/// Page categories (`PAGE_IS_*`).
pub mod category {
    /// In a mapping whose writes are tracked.
    pub const TRACKED: u64 = 1 << 0;
    /// Written since it was write-protected through userfaultfd.
    pub const WRITTEN: u64 = 1 << 1;
    /// Backed by a file, not a private copy.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// In swap.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared zero page.
    pub const PFNZERO: u64 = 1 << 5;
    /// Of a huge page that is mapped as one.
    pub const HUGE: u64 = 1 << 6;
    /// A page that nobody may touch (Linux 6.15).
    pub const GUARD: u64 = 1 << 8;
}

const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Categories asked for that all its pages have.
    pub categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<Region>() == 24);

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30) | ((size_of::<ScanArg>() as libc::c_ulong) << 16) | (0x66 << 8) | 16;
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);

/// Which pages a scan reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// Categories whose sense is turned round before matching.
    pub inverted: u64,
    /// All of these must be there.
    pub all_of: u64,
    /// At least one of these must be there (0: no such condition).
    pub any_of: u64,
    /// These are told of each region.
    pub report: u64,
}

/// Entries of the page map that are read in one call.
const ENTRIES_AT_ONCE: usize = 8192;

/// Whether an entry of `/proc/PID/pagemap` says that the page is in swap. The kernel keeps other things in the same place,
/// under numbers that no swap device has: the highest one is its markers' (`SWP_PTE_MARKER` in include/linux/swap.h).
fn is_in_swap(entry: u64) -> bool {
    const SWAPPED: u64 = 1 << 62;
    const TYPE: u64 = 0x1f;
    entry & SWAPPED != 0 && entry & TYPE != TYPE
}

/// The page map of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    buffer: Vec<Region>,
}

impl Pagemap {
    /// Opens the page map of `pid`.
    pub fn open(pid: i32) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { file, buffer: vec![Region::default(); 4096] })
    }

    /// Appends the regions of `start..end` that match `query` to `found`.
    pub fn scan(&mut self, start: u64, end: u64, query: Query, found: &mut Vec<Region>) -> io::Result<()> {
        self.walk(start, end, query, 0, found)
    }

    /// Appends what was written in `start..end` since it was last protected, and protects it again.
    ///
    /// # Errors
    /// `EPERM` when a mapping in the range isn't tracked: unlike a plain scan, this never passes
    /// over one in silence.
    pub fn take_written(&mut self, start: u64, end: u64, found: &mut Vec<Region>) -> io::Result<()> {
        // Asking for nothing but WRITTEN also reports pages that went away (MADV_DONTNEED): their
        // protection marker is gone with them.
        let query = Query { all_of: category::WRITTEN, report: category::WRITTEN, ..Query::default() };
        self.walk(start, end, query, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, found)
    }

    /// Protects the pages of `start..end` that match `query`, in a mapping whose writes are tracked, and appends them to `found`. What is not there
    /// is left as it is: no page table is filled for it.
    ///
    /// # Errors
    /// `EPERM` as [`Self::take_written`].
    pub fn protect(&mut self, start: u64, end: u64, query: Query, found: &mut Vec<Region>) -> io::Result<()> {
        self.walk(start, end, query, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, found)
    }

    /// Which pages of `span` are swapped out in earnest, as runs: a page that was protected before it was there carries
    /// a marker, which a scan can't tell from a page in swap.
    pub fn in_swap(&self, span: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        let mut entries = vec![0; ENTRIES_AT_ONCE * size_of::<u64>()];
        let mut at = span.start;
        while at < span.end {
            let pages = ((span.end - at) / PAGE_SIZE).min(ENTRIES_AT_ONCE as u64) as usize;
            let entries = &mut entries[..pages * size_of::<u64>()];
            self.file.read_exact_at(entries, at / PAGE_SIZE * size_of::<u64>() as u64)?;
            for entry in entries.chunks_exact(size_of::<u64>()) {
                let next = at + PAGE_SIZE;
                if is_in_swap(u64::from_le_bytes(entry.try_into().unwrap_or_default())) {
                    match found.last_mut() {
                        Some(last) if last.end == at => last.end = next,
                        _ => found.push(at..next),
                    }
                }
                at = next;
            }
        }
        Ok(())
    }

    /// Appends the regions in ascending order, none twice.
    fn walk(
        &mut self,
        start: u64,
        end: u64,
        query: Query,
        flags: u64,
        found: &mut Vec<Region>,
    ) -> io::Result<()> {
        let mut at = start;
        while at < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags,
                start: at,
                end,
                vec: self.buffer.as_mut_ptr() as u64,
                vec_len: self.buffer.len() as u64,
                category_inverted: query.inverted,
                category_mask: query.all_of,
                category_anyof_mask: query.any_of,
                return_mask: query.report,
                ..ScanArg::default()
            };
            // SAFETY: the ioctl has no safe wrapper. `arg` is the kernel's struct (its size is asserted
            // above) and `vec`/`vec_len` describe `self.buffer`, which outlives the call.
            let got = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
            let got = super::check(got.into())? as usize;
            found.extend_from_slice(&self.buffer[..got]);
            // Only a full buffer stops the walk early. `walk_end` says no more than that: the kernel collects 512 regions
            // at a time, and after more than those it is where the last but one collection ended, though the walk went
            // on to the end (seen on 6.18). Who goes on from there takes regions twice, and out of order.
            let Some(last) = self.buffer[..got].last().filter(|_| got == self.buffer.len()) else {
                return Ok(());
            };
            at = arg.walk_end.max(last.end);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_SIZE as usize;

    /// More regions than the kernel collects at a time, and more than the buffer holds.
    #[test]
    fn a_scan_tells_each_region_once_and_in_order() {
        let pages = 3 * 4096;
        // Above glibc's largest threshold: mapped for this alone, and zero until it is written.
        let mut memory = vec![0_u8; (pages + 1) * PAGE];
        let base = (memory.as_ptr() as usize).next_multiple_of(PAGE);
        let skip = base - memory.as_ptr() as usize;
        for page in (0..pages).step_by(3) {
            memory[skip + page * PAGE] = 1;
        }
        let end = base + pages * PAGE;
        let mut pagemap = Pagemap::open(std::process::id() as i32).expect("this process has a page map");
        for wanted in [300, 600, 3000, 4096, pages] {
            let end = end.min(base + 3 * wanted * PAGE);
            let mut found = Vec::new();
            let query = Query { any_of: category::PRESENT, ..Query::default() };
            pagemap.scan(base as u64, end as u64, query, &mut found).expect("a scan of this process");
            assert!(found.is_sorted_by(|a, b| a.end <= b.start), "out of order");
            let written = (base..end).step_by(3 * PAGE);
            assert!(
                written.clone().all(|page| found.iter().any(|r| (r.start..r.end).contains(&(page as u64))))
            );
            // Where huge pages are always used, neighbours are there as well.
            assert!(found.len() <= written.len());
        }
    }

    #[test]
    fn markers_are_not_in_swap() {
        assert!(is_in_swap(1 << 62 | 5 << 5));
        assert!(!is_in_swap(1 << 62 | 0x1f));
        assert!(!is_in_swap(1 << 63 | 5));
    }
}
