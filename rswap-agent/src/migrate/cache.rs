//! Copies of pages as they were last sent, within a bound: the bases of the source's deltas.
//!
//! The destination needs no such copies: what it was sent is in the memory that it builds.

use std::collections::{HashMap, VecDeque};

use super::traits::PAGE_SIZE;

/// The pages sent last, at most as many as fit the bound.
#[derive(Debug)]
pub struct SentPages {
    room: usize,
    pages: HashMap<(u32, u64), Box<[u8]>>,
    order: VecDeque<(u32, u64)>,
}

impl SentPages {
    /// A cache of at most `bytes` bytes of pages.
    pub fn new(bytes: u64) -> Self {
        Self { room: bytes as usize / PAGE_SIZE, pages: HashMap::new(), order: VecDeque::new() }
    }

    /// The page as it was last sent, if it is known.
    pub fn get(&self, space: u32, addr: u64) -> Option<&[u8]> {
        self.pages.get(&(space, addr)).map(|page| &page[..])
    }

    /// Remembers what was sent. A full cache only takes pages that were `rewritten`, which are likely to
    /// be written again, in place of the oldest.
    pub fn put(&mut self, space: u32, addr: u64, page: &[u8], rewritten: bool) {
        if let Some(known) = self.pages.get_mut(&(space, addr)) {
            known.copy_from_slice(page);
            return;
        }
        if self.pages.len() >= self.room {
            if !rewritten || self.room == 0 {
                return;
            }
            while self.pages.len() >= self.room
                && let Some(oldest) = self.order.pop_front()
            {
                self.pages.remove(&oldest);
            }
        }
        self.pages.insert((space, addr), page.into());
        self.order.push_back((space, addr));
    }

    /// Forgets pages: the destination's copies of them are gone.
    pub fn discard(&mut self, space: u32, start: u64, end: u64) {
        // Whichever is less: many small stretches are given back at a time, and now and then a whole address space.
        if (end - start) / (PAGE_SIZE as u64) < self.pages.len() as u64 {
            for addr in (start..end).step_by(PAGE_SIZE) {
                self.pages.remove(&(space, addr));
            }
        } else {
            self.pages.retain(|(of, addr), _| *of != space || *addr < start || *addr >= end);
        }
        if self.order.len() > 2 * self.pages.len() + 64 {
            self.order.retain(|key| self.pages.contains_key(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_to_its_bound_and_prefers_rewritten_pages() {
        let mut cache = SentPages::new(2 * PAGE_SIZE as u64);
        for page in 0..3 {
            cache.put(0, page, &[page as u8; PAGE_SIZE], false);
        }
        assert!(cache.get(0, 2).is_none(), "no room for a page that was written once");
        cache.put(0, 3, &[3; PAGE_SIZE], true);
        assert!(cache.get(0, 0).is_none() && cache.get(0, 3).is_some());
        cache.discard(0, 3, 4);
        assert!(cache.get(0, 3).is_none());
    }
}
