//! The digest of all memory: kept page by page while pages are sent, so that the freeze does not grow.
//!
//! Each page counts with the XXH3-128 of its contents, seeded by its place; the sum of them (modulo 2^128)
//! doesn't depend on the order, and a page that is sent again replaces its old part. This finds errors;
//! it is no defence against a peer that lies.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::{xxh3_128, xxh3_128_with_seed};

use super::traits::{PAGE_SIZE, PageRange};

/// Pages whose parts are kept together: an entry per page would cost more time than its hash.
const GROUP_PAGES: usize = 512;
const GROUP_BYTES: u64 = (GROUP_PAGES * PAGE_SIZE) as u64;

/// The digest of the pages of one instance.
#[derive(Clone, Debug, Default)]
pub struct MemoryDigest {
    /// By address space and address of the group.
    groups: BTreeMap<(u32, u64), Group>,
    sum: u128,
    pages: u64,
}

/// The parts of neighbouring pages; `None` for those that aren't populated.
#[derive(Clone, Debug)]
struct Group {
    parts: Box<[Option<u128>; GROUP_PAGES]>,
    populated: usize,
}

impl Group {
    fn new() -> Self {
        Self { parts: Box::new([None; GROUP_PAGES]), populated: 0 }
    }
}

/// Where a page is: its group's address, and its place in it.
fn place_of(addr: u64) -> (u64, usize) {
    (addr / GROUP_BYTES, (addr % GROUP_BYTES) as usize / PAGE_SIZE)
}

impl MemoryDigest {
    /// Takes in a page's present contents.
    pub fn set(&mut self, space: u32, addr: u64, contents: &[u8]) {
        // Spreads the number over all bits: spaces and addresses must not cancel each other out.
        let place = u64::from(space).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let part = xxh3_128_with_seed(contents, addr ^ place);
        let (group, at) = place_of(addr);
        let group = self.groups.entry((space, group)).or_insert_with(Group::new);
        let old = group.parts[at].replace(part);
        if old.is_none() {
            group.populated += 1;
            self.pages += 1;
        }
        self.sum = self.sum.wrapping_sub(old.unwrap_or(0)).wrapping_add(part);
    }

    /// Forgets pages that are no longer populated.
    pub fn discard(&mut self, range: &PageRange) {
        if range.pages == 0 {
            return;
        }
        let bytes = range.pages.saturating_mul(PAGE_SIZE as u64);
        let last = range.start.saturating_add(bytes - PAGE_SIZE as u64);
        let ((first_group, first), (last_group, last)) = (place_of(range.start), place_of(last));
        let mut empty = Vec::new();
        for (&(space, number), group) in
            self.groups.range_mut((range.space, first_group)..=(range.space, last_group))
        {
            let from = if number == first_group { first } else { 0 };
            let to = if number == last_group { last } else { GROUP_PAGES - 1 };
            for old in group.parts[from..=to].iter_mut().filter_map(Option::take) {
                self.sum = self.sum.wrapping_sub(old);
                self.pages -= 1;
                group.populated -= 1;
            }
            if group.populated == 0 {
                empty.push((space, number));
            }
        }
        for group in empty {
            self.groups.remove(&group);
        }
    }

    /// The digest of all pages and of the task's `image`.
    pub fn with_image(&self, image: &[u8]) -> u128 {
        let mut whole = [0; 40];
        whole[..16].copy_from_slice(&self.sum.to_le_bytes());
        whole[16..32].copy_from_slice(&xxh3_128(image).to_le_bytes());
        whole[32..].copy_from_slice(&self.pages.to_le_bytes());
        xxh3_128(&whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_the_final_contents_count(steps in prop::collection::vec((0_u64..8, any::<u8>(), any::<bool>()), 0..40)) {
            let (mut walked, mut last) = (MemoryDigest::default(), BTreeMap::new());
            for (page, fill, keep) in steps {
                // On both sides of the border between two groups.
                let addr = GROUP_BYTES + page * PAGE_SIZE as u64 - 4 * PAGE_SIZE as u64;
                if keep {
                    walked.set(0, addr, &[fill; PAGE_SIZE]);
                    last.insert(addr, fill);
                } else {
                    let pages = u64::from(fill % 8);
                    walked.discard(&PageRange { space: 0, start: addr, pages });
                    last.retain(|at, _| !(addr..addr + pages * PAGE_SIZE as u64).contains(at));
                }
            }
            let mut direct = MemoryDigest::default();
            for (addr, fill) in last.iter().rev() {
                direct.set(0, *addr, &[*fill; PAGE_SIZE]);
            }
            prop_assert_eq!(walked.with_image(b"image"), direct.with_image(b"image"));
            prop_assert_ne!(walked.with_image(b"image"), direct.with_image(b"other"));
        }
    }

    #[test]
    fn two_pages_that_change_places_change_the_digest() {
        let digest = |first: u8, second: u8| {
            let mut digest = MemoryDigest::default();
            digest.set(0, 0, &[first; PAGE_SIZE]);
            digest.set(0, PAGE_SIZE as u64, &[second; PAGE_SIZE]);
            digest.with_image(&[])
        };
        assert_ne!(digest(1, 2), digest(2, 1));
    }
}
