//! Which pages are read by one call. Pure.

use super::{
    traits::{PAGE_SIZE, PageRange},
    wire,
};

/// The pages of `ranges`, as runs of one address space that fill a batch at most.
pub(super) fn runs_at_once(ranges: &[PageRange]) -> impl Iterator<Item = Vec<PageRange>> {
    let mut ranges = ranges.iter().copied();
    let mut next = ranges.next();
    std::iter::from_fn(move || {
        let space = next?.space;
        let (mut runs, mut room) = (Vec::new(), wire::BATCH_PAGES as u64);
        while let Some(range) = next.filter(|range| range.space == space && room > 0) {
            let pages = range.pages.min(room);
            room -= pages;
            runs.push(PageRange { pages, ..range });
            next = match range.pages - pages {
                0 => ranges.next(),
                left => Some(PageRange { start: range.start + pages * PAGE_SIZE as u64, pages: left, space }),
            };
        }
        Some(runs)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_same_pages_in_the_same_order(
            lengths in prop::collection::vec((0_u32..3, 1_u64..200), 0..30)
        ) {
            let ranges: Vec<PageRange> = lengths
                .iter()
                .zip(0..)
                .map(|(&(space, pages), at)| PageRange { space, start: at << 24, pages })
                .collect();
            let pages = |range: &PageRange| {
                let (space, start) = (range.space, range.start);
                (0..range.pages).map(move |page| (space, start + page * PAGE_SIZE as u64)).collect::<Vec<_>>()
            };
            let groups: Vec<_> = runs_at_once(&ranges).collect();
            for runs in &groups {
                prop_assert!(runs.iter().all(|run| run.space == runs[0].space));
                prop_assert!((1..=wire::BATCH_PAGES as u64).contains(&runs.iter().map(|run| run.pages).sum()));
            }
            let all: Vec<_> = groups.iter().flatten().flat_map(pages).collect();
            prop_assert_eq!(all, ranges.iter().flat_map(pages).collect::<Vec<_>>());
        }
    }
}
