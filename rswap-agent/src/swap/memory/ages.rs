//! How long pages have not been used, told by a few of them.
//!
//! No interface of the kernel tells a process's page ages by the page without options that most kernels lack, so a region of
//! 64 pages is judged by *probes*: some of its pages, chosen at random, are paged out. One that is used comes back by itself, which costs
//! the program a fault, and its region counts as used. A region whose probes have all stayed out for long enough is cold.
//!
//! ```text
//!            probe                 more probes             cold_after                 came back
//!   unknown ------> one page out ------------> PROBES out -----------> cold: all out -----------.
//!                        |                         |                                            |
//!                        '-------- came back ------'--> used: left alone for cold_after * 2^n <-'
//! ```
//!
//! A huge page is split by its first probe. So one region of it speaks for all eight: the others are asked once that one is cold, and a huge page whose probe
//! comes back is to be put together again.
//!
//! A page that came back once is judged for itself from then on: its region's probes have said otherwise. After the time of
//! grace one of these pages is a probe for all of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::{sys::mem::PAGE_SIZE, units::UnixMillis};

/// A region has as many pages as a word has bits.
pub const REGION_PAGES: u64 = 64;
/// A region's length, in bytes.
pub const REGION_BYTES: u64 = REGION_PAGES * PAGE_SIZE;
/// What a huge page takes, in bytes.
pub const HUGE_BYTES: u64 = 2 << 20;
/// Pages that must have stayed out before a region counts as cold. Where a tenth of the pages are in use, four probes see
/// it with a probability of one third, twelve of 0.7; each wrong page costs one fault.
const PROBES: u32 = 4;
/// Huge pages that are put together in one look: each takes about half a millisecond.
const MENDED_AT_ONCE: usize = 64;
/// Times of grace double so often at most.
const MOST_DOUBLINGS: u32 = 6;

/// Which pages of a region are where, a bit for each, the lowest for the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// In memory.
    pub present: u64,
    /// In swap.
    pub swapped: u64,
    /// It is a part of a huge page.
    pub huge: bool,
}

/// What is known of one region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Region {
    now: Residency,
    /// In swap at the end of the last look.
    out: u64,
    /// Came back since they were paged out, or could not be.
    returned: u64,
    /// Since when no probe has come back.
    untouched_since: UnixMillis,
    /// Until when it is left alone.
    grace_until: UnixMillis,
    doublings: u32,
    /// One of the pages that came back is out, for all of them.
    on_trial: bool,
}

impl Region {
    fn unknown(&self) -> u64 {
        self.now.present & !self.returned
    }

    /// As many pages as have to be out; fewer where there are fewer.
    fn probes_needed(&self) -> u32 {
        PROBES.min((self.unknown() | self.now.swapped).count_ones())
    }

    fn used(&mut self, now: UnixMillis, cold_after_ms: u64) {
        self.doublings = (self.doublings + 1).min(MOST_DOUBLINGS);
        self.on_trial = false;
        self.untouched_since = now;
        self.grace_until = UnixMillis(now.0 + (cold_after_ms << self.doublings));
    }
}

/// What a look has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Pages in memory.
    pub present: u64,
    /// Pages in swap.
    pub swapped: u64,
    /// Pages that came back since the last look.
    pub returned: u64,
}

/// Pages of one region: a bit for each, the lowest for the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// The region's first byte.
    pub start: u64,
    /// Which.
    pub pages: u64,
}

/// The ages of a process's memory.
#[derive(Clone, Debug)]
pub struct Ages {
    cold_after_ms: u64,
    regions: BTreeMap<u64, Region>,
    /// What was a huge page when it was seen, by first byte.
    huge: BTreeSet<u64>,
    /// Of those, what was split for nothing.
    to_mend: BTreeSet<u64>,
    random: u64,
}

impl Ages {
    /// Knows nothing yet. `seed` makes the choice of probes another one.
    pub fn new(cold_after_ms: u64, seed: u64) -> Self {
        Self {
            cold_after_ms,
            regions: BTreeMap::new(),
            huge: BTreeSet::new(),
            to_mend: BTreeSet::new(),
            random: seed | 1,
        }
    }

    /// Takes in which pages are where, by the first byte of their region. Regions that are not there any more are forgotten.
    pub fn see(&mut self, now: UnixMillis, residency: &BTreeMap<u64, Residency>) -> Seen {
        let mut seen = Seen::default();
        self.regions.retain(|start, _| residency.contains_key(start));
        self.huge.retain(|start| residency.range(*start..start + HUGE_BYTES).next().is_some());
        self.huge.extend(residency.iter().filter(|(_, here)| here.huge).map(|(start, _)| huge_page(*start)));
        let mut used = BTreeSet::new();
        for (start, here) in residency {
            let region = self.regions.entry(*start).or_insert_with(|| Region {
                // What is in swap already is as good a probe as any.
                out: here.swapped,
                untouched_since: now,
                ..Region::default()
            });
            let returned = region.out & here.present;
            region.now = *here;
            region.out = here.swapped;
            region.returned = (region.returned | returned) & here.present;
            if returned != 0 {
                region.used(now, self.cold_after_ms);
                used.insert(huge_page(*start));
            }
            seen.present += u64::from(here.present.count_ones());
            seen.swapped += u64::from(here.swapped.count_ones());
            seen.returned += u64::from(returned.count_ones());
        }
        // Of what has been cold as a whole, a page that is used is no reason to bring back all.
        let swapped = |start: u64| -> u32 {
            let regions = self.regions.range(start..start + HUGE_BYTES);
            regions.map(|(_, region)| region.now.swapped.count_ones()).sum()
        };
        let mend = used.intersection(&self.huge).filter(|start| swapped(**start) <= PROBES);
        let mend: Vec<u64> = mend.copied().collect();
        self.to_mend.extend(mend);
        seen
    }

    /// What is to be made one huge page again, by first byte. Whether it can be done or not, the pages that come back by that have
    /// not been used.
    pub fn take_to_mend(&mut self) -> Vec<u64> {
        let to_mend: Vec<u64> = self.to_mend.iter().take(MENDED_AT_ONCE).copied().collect();
        for start in &to_mend {
            self.to_mend.remove(start);
            self.regions.range_mut(start..&(start + HUGE_BYTES)).for_each(|(_, region)| region.out = 0);
        }
        to_mend
    }

    /// What is to be paged out now, at most `most` pages: regions that are cold, those first that have been for longest, and
    /// probes of those that are not known yet.
    pub fn choose(&mut self, now: UnixMillis, most: u64) -> Vec<Pages> {
        let mut left = most;
        let mut chosen = Vec::new();
        let mut cold: Vec<(UnixMillis, u64)> = self
            .regions
            .iter()
            .filter(|(_, region)| self.is_cold(region, now))
            .map(|(start, region)| (region.untouched_since, *start))
            .collect();
        cold.sort_unstable();
        for (_, start) in cold {
            let pages = first(self.regions[&start].unknown(), left);
            left -= u64::from(pages.count_ones());
            if pages != 0 {
                chosen.push(Pages { start, pages });
            }
        }
        let silent = self.silent(now);
        for (start, region) in &mut self.regions {
            if left == 0 {
                break;
            }
            if silent.contains(start) {
                continue;
            }
            let out = region.now.swapped.count_ones();
            if now < region.grace_until {
                continue;
            }
            let pages = if out < region.probes_needed() {
                // The first one alone: where it comes back, it need not have company.
                let wanted = if out == 0 { 1 } else { region.probes_needed() - out };
                some_of(region.unknown(), wanted.min(left as u32), &mut self.random)
            } else if region.unknown() == 0 && region.now.present != 0 {
                // All that is left here came back before. One of them speaks for all: if it stays out, they are forgiven.
                if region.on_trial {
                    (region.returned, region.doublings, region.on_trial) = (0, 0, false);
                    continue;
                }
                region.on_trial = true;
                region.grace_until = UnixMillis(now.0 + self.cold_after_ms);
                some_of(region.now.present, 1, &mut self.random)
            } else {
                0
            };
            left -= u64::from(pages.count_ones());
            if pages != 0 {
                chosen.push(Pages { start: *start, pages });
            }
        }
        chosen
    }

    /// Takes in what has become of what was [chosen](Self::choose).
    pub fn went(&mut self, now: UnixMillis, chosen: Pages, here: Residency) {
        let Some(region) = self.regions.get_mut(&chosen.start) else { return };
        if region.out.count_ones() < PROBES && region.out != here.swapped {
            region.untouched_since = now;
        }
        (region.now, region.out) = (here, here.swapped);
        // Pinned, mapped by others as well, or there was no room: asking again at once would be no better.
        let stayed = chosen.pages & here.present;
        region.returned = (region.returned | stayed) & here.present;
        if stayed != 0 {
            region.used(now, self.cold_after_ms);
        }
    }

    /// Whether nothing has to be waited for: every region is out, or has been used.
    pub fn is_settled(&self) -> bool {
        let known = |region: &Region| region.unknown() == 0 || region.doublings > 0;
        self.regions.iter().all(|(start, region)| {
            let speaker = self.speaker(*start).and_then(|speaker| self.regions.get(&speaker));
            known(region) || speaker.is_some_and(|speaker| speaker.doublings > 0)
        })
    }

    /// The region that speaks for the huge page that `start` is in, if it is in one: another one for each, but always the same.
    fn speaker(&self, start: u64) -> Option<u64> {
        let page = huge_page(start);
        let number = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        self.huge.contains(&page).then(|| page + number % (HUGE_BYTES / REGION_BYTES) * REGION_BYTES)
    }

    /// Regions that are not asked: another one of their huge page is, and is not cold yet.
    fn silent(&self, now: UnixMillis) -> BTreeSet<u64> {
        let is_silent = |start: &&u64| {
            let speaker = self.speaker(**start).filter(|speaker| speaker != *start);
            let speaker = speaker.and_then(|speaker| self.regions.get(&speaker));
            // What is out as a whole was cold.
            speaker.is_some_and(|speaker| speaker.unknown() != 0 && !self.is_cold(speaker, now))
        };
        self.regions.keys().filter(is_silent).copied().collect()
    }

    fn is_cold(&self, region: &Region, now: UnixMillis) -> bool {
        region.unknown() != 0
            && now >= region.grace_until
            && region.now.swapped.count_ones() >= region.probes_needed()
            && now.since(region.untouched_since) >= self.cold_after_ms
    }
}

/// The first byte of the huge page that an address would be in.
fn huge_page(address: u64) -> u64 {
    address / HUGE_BYTES * HUGE_BYTES
}

/// The lowest `most` of some pages.
fn first(pages: u64, most: u64) -> u64 {
    let mut left = pages;
    for _ in 0..most.min(u64::from(pages.count_ones())) {
        left &= left - 1;
    }
    pages & !left
}

/// `wanted` of some pages, at random (xorshift64).
fn some_of(pages: u64, wanted: u32, random: &mut u64) -> u64 {
    let (mut left, mut chosen) = (pages, 0);
    for _ in 0..wanted.min(pages.count_ones()) {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        let nth = (*random >> 32) % u64::from(left.count_ones());
        let one = left & !first(left, nth);
        let one = one & one.wrapping_neg();
        left &= !one;
        chosen |= one;
    }
    chosen
}

#[cfg(test)]
mod tests;
