//! PAGEMAP_SCAN (Linux 6.7): reads the state of page ranges and re-arms write protection in one call.
//! Source: Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/fs.h.

use std::{fs::File, io, os::fd::AsRawFd};

/// Page categories (`PAGE_IS_*`).
pub mod category {
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
            if arg.walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            at = arg.walk_end;
        }
        Ok(())
    }
}
