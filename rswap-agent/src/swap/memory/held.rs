//! The memory of an instance whose cold pages are in swap: looked at, paged out, and brought back, while it runs.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::{
    MemoryError,
    ages::{Ages, HUGE_BYTES, Pages, REGION_BYTES, REGION_PAGES, Residency},
    pages::{add, fault_time, has_ended, residency, swapped, touch},
    pressure::{self, Pressure, Reading},
};
use crate::{
    config::MemoryConfig,
    instance::Instance,
    sys::{mem::PAGE_SIZE, pagemap::Pagemap, process::pidfd_open, reclaim},
    tracee::tree,
    units::UnixMillis,
};

/// Pages that one call pages out or brings back. While it works, whoever of the program changes its mappings waits; 64 pages take well
/// under a millisecond on zram.
pub(super) const PAGES_AT_ONCE: usize = REGION_PAGES as usize;

/// What a look has found and done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Looked {
    /// In memory, of what could be paged out, in bytes.
    pub present_bytes: u64,
    /// In swap, in bytes.
    pub swapped_bytes: u64,
    /// Used since the last look, and therefore back, in bytes.
    pub returned_bytes: u64,
    /// Paged out by this look, in bytes.
    pub out_bytes: u64,
    /// How long the instance waited since the last look.
    pub pressure: Pressure,
    /// All of it is known: it is out, or has been used.
    pub settled: bool,
    /// How long the look took.
    pub took: Duration,
}

/// An instance's processes with what is known of their memory.
#[derive(Debug)]
pub struct Held {
    instance: Instance,
    config: MemoryConfig,
    processes: BTreeMap<i32, Process>,
    last: Option<Reading>,
    /// How long a fault takes.
    fault: Duration,
}

/// One process.
#[derive(Debug)]
struct Process {
    pidfd: OwnedFd,
    ages: Ages,
}

impl Held {
    /// Knows nothing of the instance's pages yet.
    pub fn new(instance: &Instance, config: &MemoryConfig) -> Self {
        // Without swap there is nothing that a fault could take long for.
        let fault = fault_time().unwrap_or_default();
        Self {
            instance: instance.clone(),
            config: config.clone(),
            processes: BTreeMap::new(),
            last: None,
            fault,
        }
    }

    /// Whose memory it is.
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// Share of the time that it may wait for its memory.
    pub fn pressure_limit(&self) -> f64 {
        self.config.pressure_limit
    }

    /// Looks where the pages are, and pages out what is cold, at most `room` bytes.
    ///
    /// # Errors
    /// The instance's processes can't be listed or looked at. One that ends meanwhile is no error.
    pub fn look(&mut self, now: UnixMillis, room: u64) -> Result<Looked, MemoryError> {
        let began = Instant::now();
        let pids = self.pids()?;
        let reading = Reading::take(&self.instance.cgroup, &pids);
        let mut looked = Looked { settled: true, ..Looked::default() };
        let mut allowed = 0;
        if let Some(last) = &self.last {
            let MemoryConfig { out_mib_per_s, pressure_limit, .. } = self.config;
            looked.pressure = reading.since(last, self.fault);
            // After a long pause not all of it at once.
            let elapsed = reading.elapsed_since(last).min(Duration::from_secs(10));
            let rate = out_mib_per_s * f64::from(1 << 20);
            allowed = pressure::allowed(rate, elapsed, looked.pressure.share, pressure_limit);
        }
        self.last = Some(reading);
        let mut pages_left = allowed.min(room) / PAGE_SIZE;
        self.follow(&pids);
        for (&pid, process) in &mut self.processes {
            let Some(out) = process.look(pid, now, pages_left, &mut looked)? else { continue };
            pages_left = pages_left.saturating_sub(out);
            looked.settled &= process.ages.is_settled();
        }
        looked.took = began.elapsed();
        Ok(looked)
    }

    /// How much of it is in swap, in bytes, and could be brought back.
    pub fn in_swap(&self) -> Result<u64, MemoryError> {
        let mut bytes = 0;
        for pid in self.pids()? {
            bytes += swapped(pid)?.iter().map(|range| range.end - range.start).sum::<u64>();
        }
        Ok(bytes)
    }

    /// Has pages come back, at most `most` bytes, and answers how many bytes were asked for.
    ///
    /// By reading a byte of each from outside: that maps them, as the program's own use would, and the program does not
    /// wait for it. (`MADV_WILLNEED` reads them into the swap cache only; the program would still fault on each.)
    pub fn bring_back(&mut self, most: u64) -> Result<u64, MemoryError> {
        let mut asked = 0;
        // Pages that come back so have not been used.
        self.processes.clear();
        for pid in self.pids()? {
            for range in swapped(pid)? {
                for start in (range.start..range.end).step_by(PAGES_AT_ONCE * PAGE_SIZE as usize) {
                    if asked >= most {
                        return Ok(asked);
                    }
                    let end = range.end.min(start + REGION_BYTES);
                    touch(pid, start..end).map_err(MemoryError::process("bring back pages", pid))?;
                    asked += end - start;
                }
            }
        }
        Ok(asked)
    }

    fn pids(&self) -> Result<Vec<i32>, MemoryError> {
        tree::listed(&self.instance).map_err(|source| MemoryError::Look { source: Box::new(source) })
    }

    /// Forgets processes that are gone, and makes those known that are new.
    fn follow(&mut self, pids: &[i32]) {
        self.processes.retain(|pid, _| pids.contains(pid));
        for &pid in pids {
            if !self.processes.contains_key(&pid)
                // It has ended since it was listed.
                && let Ok(pidfd) = pidfd_open(pid)
            {
                let ages = Ages::new(
                    self.config.cold_after_s * 1000,
                    (pid as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
                );
                self.processes.insert(pid, Process { pidfd, ages });
            }
        }
    }
}

impl Process {
    /// Returns how many pages went out; nothing, if the process has ended.
    fn look(
        &mut self,
        pid: i32,
        now: UnixMillis,
        most: u64,
        looked: &mut Looked,
    ) -> Result<Option<u64>, MemoryError> {
        let failed = MemoryError::process("look at its pages", pid);
        let residency = match residency(pid) {
            Ok(residency) => residency,
            Err(error) if has_ended(pid, &error) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let seen = self.ages.see(now, &residency);
        for start in self.ages.take_to_mend() {
            // It stays split where there is no huge page to be had.
            if let Err(error) = reclaim::collapse(&self.pidfd, &(start..start + HUGE_BYTES)) {
                tracing::debug!(pid, start, %error, "a huge page stays split");
            }
        }
        let mut out = 0;
        let chosen = self.ages.choose(now, most);
        for some in in_calls(&chosen) {
            match self.page_out(pid, now, some) {
                Ok(pages) => out += pages,
                Err(error) if has_ended(pid, &error) => return Ok(None),
                Err(error) => return Err(MemoryError::process("page out", pid)(error)),
            }
        }
        looked.present_bytes += (seen.present - out.min(seen.present)) * PAGE_SIZE;
        looked.swapped_bytes += (seen.swapped + out) * PAGE_SIZE;
        looked.returned_bytes += seen.returned * PAGE_SIZE;
        looked.out_bytes += out * PAGE_SIZE;
        Ok(Some(out))
    }

    /// Pages of some regions go out by one call. Answers how many have gone.
    fn page_out(&mut self, pid: i32, now: UnixMillis, chosen: &[Pages]) -> io::Result<u64> {
        let ranges: Vec<Range<u64>> = chosen.iter().flat_map(|pages| runs(*pages)).collect();
        let mut rest = &ranges[..];
        while !rest.is_empty() {
            match reclaim::page_out(&self.pidfd, rest) {
                // It stops before the first range that it can't take.
                Ok(bytes) => {
                    let mut left = bytes;
                    while let Some(first) = rest.first().filter(|range| range.end - range.start <= left) {
                        left -= first.end - first.start;
                        rest = &rest[1..];
                    }
                    rest = rest.get(usize::from(left > 0)..).unwrap_or_default();
                }
                // Locked, of a device, or not mapped any more.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM)) => {
                    rest = &rest[1..]
                }
                Err(error) => return Err(error),
            }
        }
        let mut pagemap = Pagemap::open(pid)?;
        let mut gone = 0;
        for pages in chosen {
            let mut here = BTreeMap::new();
            add(&mut pagemap, pages.start..pages.start + REGION_BYTES, &mut here)?;
            let here: Residency = here.remove(&pages.start).unwrap_or_default();
            gone += u64::from((pages.pages & here.swapped).count_ones());
            self.ages.went(now, *pages, here);
        }
        Ok(gone)
    }
}

/// Groups what is chosen so that no call has more than [`PAGES_AT_ONCE`] pages.
fn in_calls(chosen: &[Pages]) -> impl Iterator<Item = &[Pages]> {
    let mut rest = chosen;
    std::iter::from_fn(move || {
        let mut pages = 0;
        let fits = |one: &&Pages| {
            pages += one.pages.count_ones() as usize;
            pages <= PAGES_AT_ONCE
        };
        let number = rest.iter().take_while(fits).count();
        let (now, later) = rest.split_at(number);
        rest = later;
        (!now.is_empty()).then_some(now)
    })
}

/// The addresses of a region's pages, neighbours together.
fn runs(pages: Pages) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for bit in (0..REGION_PAGES).filter(|bit| pages.pages >> bit & 1 == 1) {
        let at = pages.start + bit * PAGE_SIZE;
        match runs.last_mut() {
            Some(last) if last.end == at => last.end += PAGE_SIZE,
            _ => runs.push(at..at + PAGE_SIZE),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_has_more_pages_than_it_may() {
        let region = |n: u64, pages| Pages { start: n * REGION_BYTES, pages };
        let chosen =
            [region(0, 1), region(1, u64::MAX), region(2, 0b11), region(3, u64::MAX >> 2), region(4, 1)];
        let calls: Vec<usize> = in_calls(&chosen).map(<[Pages]>::len).collect();
        assert_eq!(calls, [1, 1, 2, 1]);
        assert_eq!(in_calls(&[]).count(), 0);
    }

    #[test]
    fn neighbours_are_one_range() {
        let pages = Pages { start: REGION_BYTES, pages: 0b1011 | 1 << 63 };
        let at = |bit: u64| REGION_BYTES + bit * PAGE_SIZE;
        assert_eq!(runs(pages), [at(0)..at(2), at(3)..at(4), at(63)..at(64)]);
    }
}
