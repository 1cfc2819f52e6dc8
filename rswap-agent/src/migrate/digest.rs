//! The digest of all memory: kept page by page while pages are sent, so that the freeze does not grow.
//!
//! Each page counts with the XXH3-128 of its contents, seeded by its place; the sum of them (modulo 2^128)
//! doesn't depend on the order, and a page that is sent again replaces its old part. This finds errors;
//! it is no defence against a peer that lies.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::{xxh3_128, xxh3_128_with_seed};

use super::traits::{PAGE_SIZE, PageRange};

/// The digest of the pages of one instance.
#[derive(Clone, Debug, Default)]
pub struct MemoryDigest {
    pages: BTreeMap<(u32, u64), u128>,
    sum: u128,
}

impl MemoryDigest {
    /// Takes in a page's present contents.
    pub fn set(&mut self, space: u32, addr: u64, contents: &[u8]) {
        // Spreads the number over all bits: spaces and addresses must not cancel each other out.
        let place = u64::from(space).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let part = xxh3_128_with_seed(contents, addr ^ place);
        let old = self.pages.insert((space, addr), part).unwrap_or(0);
        self.sum = self.sum.wrapping_sub(old).wrapping_add(part);
    }

    /// Forgets pages that are no longer populated.
    pub fn discard(&mut self, range: &PageRange) {
        let end = range.start.saturating_add(range.pages.saturating_mul(PAGE_SIZE as u64));
        let gone: Vec<(u32, u64)> =
            self.pages.range((range.space, range.start)..(range.space, end)).map(|(key, _)| *key).collect();
        for key in gone {
            self.sum = self.sum.wrapping_sub(self.pages.remove(&key).unwrap_or(0));
        }
    }

    /// The digest of all pages and of the task's `image`.
    pub fn with_image(&self, image: &[u8]) -> u128 {
        let mut whole = [0; 40];
        whole[..16].copy_from_slice(&self.sum.to_le_bytes());
        whole[16..32].copy_from_slice(&xxh3_128(image).to_le_bytes());
        whole[32..].copy_from_slice(&(self.pages.len() as u64).to_le_bytes());
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
                let addr = page * PAGE_SIZE as u64;
                if keep {
                    walked.set(0, addr, &[fill; PAGE_SIZE]);
                    last.insert(addr, fill);
                } else {
                    walked.discard(&PageRange { space: 0, start: addr, pages: 1 });
                    last.remove(&addr);
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
