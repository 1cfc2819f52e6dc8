//! When memory was last written: private pages are protected once (userfaultfd's asynchronous mode, which lets every write through and notes it), and those
//! that were written are counted (`PAGEMAP_SCAN`) a second, two, four .. after that.
//!
//! The first write to each protected page costs the program about a microsecond, and a huge page is split by it. So of large instances only a sample
//! is protected: blocks as large as a huge page, always the same ones, so that the others stay as they are.

use std::{
    collections::BTreeSet,
    fs, io, iter,
    ops::Range,
    panic,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{Count, Cycle};
use crate::{
    instance::cgroup::stands_still,
    profile::cgroup,
    sys::{
        clock::thread_cpu_time,
        mem::PAGE_SIZE,
        pagemap::{Pagemap, Query, Region, category},
        uffd::WriteTracker,
    },
    tracee::{
        TraceeError,
        layout::{self, Mapping},
        tracker::{self, Kind},
    },
    units::UnixMillis,
};

/// What is in the sample or not as a whole: a huge page.
const BLOCK_BYTES: u64 = 2 << 20;
/// An odd number whose bits are mixed.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// Which blocks are looked at: one of `2^bits`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sample {
    bits: u32,
}

impl Sample {
    /// So that of `bytes` about `wanted` or less are looked at.
    fn of(bytes: u64, wanted: u64) -> Self {
        Self { bits: bytes.div_ceil(wanted.max(BLOCK_BYTES)).next_power_of_two().trailing_zeros() }
    }

    fn has(self, block: u64) -> bool {
        self.bits == 0 || block.wrapping_mul(MIX) >> (u64::BITS - self.bits) == 0
    }

    /// How many bytes of a span are in it.
    fn bytes_of(self, span: &Range<u64>) -> u64 {
        if self.bits == 0 {
            return span.end - span.start;
        }
        self.parts(span).map(|part| part.end - part.start).sum()
    }

    /// The parts of a span that are in it.
    fn parts(self, span: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let Range { start, end } = *span;
        let blocks = (start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).filter(move |block| self.has(*block));
        blocks.map(move |block| (block * BLOCK_BYTES).max(start)..((block + 1) * BLOCK_BYTES).min(end))
    }

    /// What was counted in it stands for as much.
    fn whole(self, bytes: u64) -> u64 {
        bytes << self.bits
    }
}

/// A process of which writes are noted, until it is dropped.
pub(in crate::profile) struct Armed {
    _writes: WriteTracker,
    pagemap: Pagemap,
    sample: Sample,
    /// Mappings of which writes can be noted.
    tracked: Vec<(Range<u64>, Kind)>,
}

/// Pages with contents of their own, neither a file's nor zero, that are in `places`.
fn own_pages(kind: Kind, places: u64, report: u64) -> Query {
    let not = match kind {
        Kind::Anonymous => category::PFNZERO,
        Kind::Mixed => category::FILE | category::PFNZERO,
    };
    Query { inverted: not, all_of: not, any_of: places, report }
}

impl Armed {
    /// Protects a process's memory, as far as it is in the sample. What other threads take of a core for it is added to `elsewhere`.
    fn arm(pid: i32, sample: Sample, elsewhere: &mut Duration) -> Result<Self, TraceeError> {
        let failed = |call| TraceeError::call(call, pid);
        let mut pagemap = Pagemap::open(pid).map_err(failed("opening the page map"))?;
        let writes = open(pid, elsewhere)?;
        let mut tracked = Vec::new();
        for mapping in layout::read_mappings(pid)?.iter().filter(|mapping| is_looked_at(mapping)) {
            let kind = Kind::of(mapping);
            let mut there = Vec::new();
            pagemap
                .scan(mapping.start, mapping.end, own_pages(kind, category::PRESENT, 0), &mut there)
                .map_err(failed("PAGEMAP_SCAN"))?;
            // Gone since the mappings were read, or the program has a userfaultfd of its own there.
            if there.is_empty() || writes.register(mapping.start, mapping.end).is_err() {
                continue;
            }
            let parts: Vec<Range<u64>> = if sample.bits == 0 {
                iter::once(mapping.start..mapping.end).collect()
            } else {
                there.iter().flat_map(|region| sample.parts(&(region.start..region.end))).collect()
            };
            // What is in swap is protected as well: it is not written by coming back.
            let query = own_pages(kind, category::PRESENT | category::SWAPPED, 0);
            let protected = parts.iter().try_for_each(|part| {
                there.clear();
                pagemap.protect(part.start, part.end, query, &mut there)
            });
            match protected {
                Ok(()) => tracked.push((mapping.start..mapping.end, kind)),
                // Unmapped meanwhile, or mapped anew.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
                Err(error) => return Err(failed("PAGEMAP_SCAN")(error)),
            }
        }
        Ok(Self { _writes: writes, pagemap, sample, tracked })
    }

    /// What was written since, and all that is looked at.
    fn count(&mut self) -> io::Result<Count> {
        let (mut written, mut there) = (0, 0);
        let mut regions = Vec::new();
        for (span, kind) in &self.tracked {
            regions.clear();
            let query = own_pages(*kind, category::PRESENT, category::WRITTEN | category::TRACKED);
            self.pagemap.scan(span.start, span.end, query, &mut regions)?;
            for Region { start, end, categories } in &regions {
                // What was mapped anew at the same place is not noted.
                if categories & category::TRACKED == 0 {
                    continue;
                }
                let bytes = self.sample.bytes_of(&(*start..*end));
                there += bytes;
                if categories & category::WRITTEN != 0 {
                    written += bytes;
                }
            }
        }
        let (used_bytes, resident_bytes) = (self.sample.whole(written), self.sample.whole(there));
        Ok(Count { used_bytes, resident_bytes, left_out_bytes: 0 })
    }
}

/// [`tracker::open`] in a thread that ends with it: then the kernel lets go what is traced still, such as a thread that waits for a disk and did not
/// stop in time. It would stay traced as long as this thread is there, and nobody else could stop it.
fn open(pid: i32, elsewhere: &mut Duration) -> Result<WriteTracker, TraceeError> {
    let (opened, took) = thread::scope(|scope| -> Result<_, TraceeError> {
        let run = move || (tracker::open(pid), thread_cpu_time());
        let of_its_own = thread::Builder::new().spawn_scoped(scope, run);
        let of_its_own = of_its_own.map_err(TraceeError::call("starting a thread for a look", pid))?;
        Ok(of_its_own.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked)))
    })?;
    *elsewhere += took;
    opened
}

/// Where a process is in the hierarchy at `mount`.
fn cgroup_of(pid: i32, mount: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(mount.join(path))
}

/// Whether one goes on that stood still, and is there.
fn goes_on(cgroup: &Path) -> bool {
    cgroup.exists() && !stands_still(cgroup)
}

/// Memory of the program's own that it may write.
fn is_looked_at(mapping: &Mapping) -> bool {
    !mapping.shared
        && mapping.protection & libc::PROT_WRITE != 0
        && !mapping.is_kernels_own()
        && !mapping.is_huge()
}

/// One look at an instance: counts what was written, and protects its memory again where it is time to. Answers what other threads took of a core for it.
pub(super) fn look(
    cgroup: &Path,
    cycle: &mut Cycle,
    armed: &mut Vec<Armed>,
    began: Instant,
    sample_bytes: u64,
) -> Duration {
    let mut elsewhere = Duration::ZERO;
    let ends_early = cycle.ends_early(began.elapsed(), |still| {
        !stands_still(cgroup) && still.iter().any(|below| goes_on(below))
    });
    if !ends_early && began.elapsed() < cycle.count_due() {
        return elsewhere;
    }
    // Of a cgroup that has gone there is nothing to count; who tracks it will say so.
    let pids = cgroup::pids(cgroup).unwrap_or_default();
    let sizes: Vec<(i32, Size)> = pids.into_iter().filter_map(|pid| Some((pid, size(pid)?))).collect();
    let mut count = Count::default();
    for of in armed.iter_mut() {
        // One that has ended has no memory.
        let Ok(found) = of.count() else { continue };
        count.used_bytes += found.used_bytes;
        count.resident_bytes += found.resident_bytes;
    }
    let resident_bytes: u64 = sizes.iter().map(|(_, size)| size.resident_bytes).sum();
    count.left_out_bytes = resident_bytes.saturating_sub(count.resident_bytes);
    count.resident_bytes = count.resident_bytes.max(resident_bytes);
    let ends = cycle.count(began.elapsed(), UnixMillis::now(), count);
    if ends || ends_early {
        armed.clear();
        let own_bytes = sizes.iter().map(|(_, size)| size.own_bytes).sum();
        let sample = Sample::of(own_bytes, sample_bytes);
        let mount = cgroup::unified_mount().ok();
        let mut still = BTreeSet::new();
        for (pid, _) in sizes {
            let own = mount.as_deref().and_then(|mount| cgroup_of(pid, mount));
            let own = own.unwrap_or_else(|| cgroup.to_owned());
            let is_still = || stands_still(cgroup) || stands_still(&own);
            // It would make the call that it is to make when it goes on, and that may be never.
            if is_still() {
                tracing::debug!(pid, "what it writes is not measured: it stands still");
                still.insert(own);
                continue;
            }
            match Armed::arm(pid, sample, &mut elsewhere) {
                Ok(of) => armed.push(of),
                Err(error) => {
                    tracing::debug!(pid, %error, "what it writes is not measured");
                    // It may have been frozen just then.
                    if is_still() {
                        still.insert(own);
                    }
                }
            }
        }
        cycle.was_cleared_but(began.elapsed(), still);
    }
    elsewhere
}

/// What a process has in memory.
struct Size {
    resident_bytes: u64,
    /// Of that, what is of no file.
    own_bytes: u64,
}

fn size(pid: i32) -> Option<Size> {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let mut fields = text.split_ascii_whitespace().skip(1).map(|field| field.parse::<u64>().ok());
    let (resident, of_files) = (fields.next()??, fields.next()??);
    Some(Size {
        resident_bytes: resident * PAGE_SIZE,
        own_bytes: resident.saturating_sub(of_files) * PAGE_SIZE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_of_whole_blocks_and_stands_for_all() {
        const MIB: u64 = 1 << 20;
        assert_eq!(Sample::of(200 * MIB, 256 * MIB), Sample { bits: 0 });
        assert_eq!(Sample::of(257 * MIB, 256 * MIB), Sample { bits: 1 });
        let sample = Sample::of(4096 * MIB, 256 * MIB);
        assert_eq!(sample, Sample { bits: 4 });
        let span = 0x7f12_3450_0000..0x7f12_3450_0000 + 4096 * MIB;
        let parts: Vec<Range<u64>> = sample.parts(&span).collect();
        assert!(parts[1..parts.len() - 1].iter().all(|part| part.end - part.start == BLOCK_BYTES));
        let all = sample.whole(sample.bytes_of(&span));
        assert!(all.abs_diff(4096 * MIB) < 1024 * MIB, "{all}");
        // Whatever it is cut into.
        let cut: u64 = (span.start..span.end)
            .step_by(12_288)
            .map(|at| sample.bytes_of(&(at..(at + 12_288).min(span.end))))
            .sum();
        assert_eq!(sample.whole(cut), all);
        assert_eq!(Sample::default().bytes_of(&(4096..12_288)), 8192);
    }
}
