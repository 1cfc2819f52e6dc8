//! Which parts of the files of a file system are written, from the kernel: for a copy that is made meanwhile.
//!
//! The kernel tells of every folio of the page cache that becomes dirty. A folio that is dirty already is not told of again, so whoever
//! wants to know of later writes has it written back first. File systems that are not known to change contents in no other way than
//! those that are told of are not watched.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, MapData, RingBuf},
    programs::{RawTracePoint, tp_btf::BtfTracePointLink},
};
use rswap_common::{
    globals as g,
    layout::{WrittenCounts, WrittenRecord, map_names},
};

use super::{
    btf::KernelTypes,
    probes::{NO_OBJECT, OBJECT, Probe, attach, chain},
};
use crate::volume::{
    blocks::BLOCK,
    source::{Touched, WriteLog},
};

/// Room for what is told between two looks, in bytes.
const RING_BYTES: u32 = 8 << 20;
/// What is told is in pages of this size.
const PAGE_BYTES: u64 = 4096;
/// How long the last of what was told may take to be seen.
const SETTLE_LIMIT: Duration = Duration::from_millis(20);

const INODE_FIELDS: [(&str, &str, &str); 3] = [
    (g::INODE_SB, "inode", "i_sb"),
    (g::INODE_INO, "inode", "i_ino"),
    (g::SUPER_BLOCK_DEV, "super_block", "s_dev"),
];

pub(super) const TYPED: [Probe; 2] = [
    Probe {
        tracepoint: "writeback_dirty_folio",
        arguments: &["struct folio *", "struct address_space *"],
        fields: &[
            INODE_FIELDS[0],
            INODE_FIELDS[1],
            INODE_FIELDS[2],
            (g::FOLIO_FLAGS, "folio", "flags"),
            (g::FOLIO_FLAGS_1, "folio", "_flags_1"),
            (g::FOLIO_INDEX, "folio", "index"),
            (g::MAPPING_HOST, "address_space", "host"),
        ],
    },
    Probe {
        tracepoint: "iomap_dio_rw_begin",
        arguments: &["struct kiocb *", "struct iov_iter *"],
        fields: &[
            (g::KIOCB_FILE, "kiocb", "ki_filp"),
            (g::FILE_INODE, "file", "f_inode"),
            (g::ITER_DATA_SOURCE, "iov_iter", "data_source"),
        ],
    },
];

/// All of these there must be: a kernel that lacks one may have another way in its place.
pub(super) const OF_EXT4: [&str; 6] = [
    "ext4_truncate_enter",
    "ext4_fallocate_enter",
    "ext4_punch_hole",
    "ext4_zero_range",
    "ext4_collapse_range",
    "ext4_insert_range",
];

/// The programs that tell, as long as they are attached.
pub struct Watched {
    _ebpf: Ebpf,
    _links: Vec<BtfTracePointLink>,
    ring: RingBuf<MapData>,
    counts: Array<MapData, [u64; 2]>,
    /// Records that were taken from the ring.
    seen: u64,
    found: BTreeMap<u64, Touched>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Watched {
    /// Watches the file system that `directory` is on, or says why it can't.
    pub fn start(directory: &Path) -> Result<Self, String> {
        let device = device_of(directory)?;
        let object = OBJECT.ok_or(NO_OBJECT)?;
        let types = KernelTypes::of_this_kernel().map_err(|error| error.to_string())?;
        let mut offsets = Vec::new();
        for probe in &TYPED {
            offsets.extend(probe.resolve(&types)?);
        }
        let large = types.enumerator("pageflags", "PG_head").ok_or("this kernel has no PG_head")?;
        drop(types);
        let btf =
            Btf::from_sys_fs().map_err(|error| format!("read the kernel's type information: {error}"))?;
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf));
        loader.map_max_entries(map_names::WRITTEN, RING_BYTES);
        loader.override_global(g::WRITTEN_DEVICE, &device, true);
        loader.override_global(g::FOLIO_LARGE_BIT, &large, true);
        for (name, offset) in &offsets {
            loader.override_global(name, offset, true);
        }
        let mut ebpf =
            loader.load(object).map_err(|error| format!("load the eBPF object: {}", chain(&error)))?;
        let mut map = |name: &str| {
            ebpf.take_map(name).ok_or_else(|| format!("the eBPF object has no map {name}: build it again"))
        };
        let (ring, counts) = (map(map_names::WRITTEN)?, map(map_names::WRITTEN_COUNTS)?);
        let unmapped = |error: &dyn std::fmt::Display| format!("use an eBPF map: {error}");
        let ring = RingBuf::try_from(ring).map_err(|error| unmapped(&error))?;
        let counts = Array::try_from(counts).map_err(|error| unmapped(&error))?;
        let links = TYPED.iter().map(|probe| attach(&mut ebpf, probe.tracepoint, &btf));
        let links = links.collect::<Result<Vec<_>, _>>()?;
        for name in OF_EXT4 {
            let mut attached = || -> Result<(), Box<dyn std::error::Error>> {
                let program = ebpf.program_mut(name).ok_or("the eBPF object has no such program")?;
                let program: &mut RawTracePoint = program.try_into()?;
                program.load()?;
                program.attach(name)?;
                Ok(())
            };
            attached().map_err(|error| format!("attach to {name}: {}", chain(&*error)))?;
        }
        Ok(Self { _ebpf: ebpf, _links: links, ring, counts, seen: 0, found: BTreeMap::new() })
    }

    fn counts(&self) -> Option<WrittenCounts> {
        let [due, lost] = self.counts.get(&0, 0).ok()?;
        Some(WrittenCounts { due, lost })
    }
}

impl WriteLog for Watched {
    fn look(&mut self) {
        while let Some(item) = self.ring.next() {
            self.seen += 1;
            let number = |at: usize| {
                item.get(at * 8..at * 8 + 8)
                    .and_then(|bytes| bytes.try_into().ok())
                    .map_or(0, u64::from_ne_bytes)
            };
            let WrittenRecord { inode, first_page, pages } =
                WrittenRecord { inode: number(0), first_page: number(1), pages: number(2) };
            let touched = self.found.entry(inode).or_default();
            if pages == 0 {
                touched.whole = true;
            } else {
                let start = first_page.saturating_mul(PAGE_BYTES);
                let end = start.saturating_add(pages.saturating_mul(PAGE_BYTES));
                touched.blocks.extend(start / BLOCK..end.div_ceil(BLOCK));
            }
        }
    }

    fn take(&mut self, all: bool) -> Option<BTreeMap<u64, Touched>> {
        let due = self.counts()?;
        self.look();
        let began = Instant::now();
        // A record is in its place before it can be read; nothing behind it can, either.
        while all && self.seen < due.due && began.elapsed() < SETTLE_LIMIT {
            if due.lost > 0 {
                break;
            }
            std::thread::yield_now();
            self.look();
        }
        let lost = self.counts()?.lost > 0 || (all && self.seen < due.due);
        let found = std::mem::take(&mut self.found);
        (!lost).then_some(found)
    }
}

/// The device of an ext4 that changes files only in ways that are told of, as the kernel numbers it.
fn device_of(directory: &Path) -> Result<u32, String> {
    let device = fs::metadata(directory).map_err(|error| error.to_string())?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let name = link.ok().and_then(|link| link.file_name().map(|name| name.to_string_lossy().into_owned()));
    let options = name.and_then(|name| fs::read_to_string(format!("/proc/fs/ext4/{name}/options")).ok());
    let options = options.ok_or("only writes to ext4 are followed")?;
    match options.lines().find(|line| matches!(*line, "data=journal" | "dax=always")) {
        Some(strange) => Err(format!("writes to an ext4 with {strange} are not followed")),
        None => Ok(major << 20 | minor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_memory_is_not_followed() {
        let reason = Watched::start(Path::new("/proc")).expect_err("it has no device");
        assert!(reason.contains("only writes to ext4"), "{reason}");
    }
}
