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
//! A page that came back once is judged for itself from then on: its region's probes have said otherwise. After the time of
//! grace one of these pages is a probe for all of them.

use std::collections::BTreeMap;

use crate::{sys::mem::PAGE_SIZE, units::UnixMillis};

/// A region has as many pages as a word has bits.
pub const REGION_PAGES: u64 = 64;
/// A region's length, in bytes.
pub const REGION_BYTES: u64 = REGION_PAGES * PAGE_SIZE;
/// Pages that must have stayed out before a region counts as cold. Where a tenth of the pages are in use, four probes see
/// it with a probability of one third, twelve of 0.7; each wrong page costs one fault.
const PROBES: u32 = 4;
/// Times of grace double so often at most.
const MOST_DOUBLINGS: u32 = 6;

/// Which pages of a region are where, a bit for each, the lowest for the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// In memory.
    pub present: u64,
    /// In swap.
    pub swapped: u64,
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
    random: u64,
}

impl Ages {
    /// Knows nothing yet. `seed` makes the choice of probes another one.
    pub fn new(cold_after_ms: u64, seed: u64) -> Self {
        Self { cold_after_ms, regions: BTreeMap::new(), random: seed | 1 }
    }

    /// Takes in which pages are where, by the first byte of their region. Regions that are not there any more are forgotten.
    pub fn see(&mut self, now: UnixMillis, residency: &BTreeMap<u64, Residency>) -> Seen {
        let mut seen = Seen::default();
        self.regions.retain(|start, _| residency.contains_key(start));
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
            }
            seen.present += u64::from(here.present.count_ones());
            seen.swapped += u64::from(here.swapped.count_ones());
            seen.returned += u64::from(returned.count_ones());
        }
        seen
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
        for (start, region) in &mut self.regions {
            if left == 0 {
                break;
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
        self.regions.values().all(|region| region.unknown() == 0 || region.doublings > 0)
    }

    fn is_cold(&self, region: &Region, now: UnixMillis) -> bool {
        region.unknown() != 0
            && now >= region.grace_until
            && region.now.swapped.count_ones() >= region.probes_needed()
            && now.since(region.untouched_since) >= self.cold_after_ms
    }
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
