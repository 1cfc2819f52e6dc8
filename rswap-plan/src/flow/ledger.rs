//! Who counts on which storage pool or link in a round.

use std::collections::BTreeMap;

use rswap_types::{Flow, PoolKind};

use super::{Lane, Round, need};

/// What is left of a pool.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Room {
    pub(super) available: Flow,
    /// The same, if others than volumes used nothing.
    pub(super) without_others: Flow,
    pub(super) free_bytes: u64,
    /// Requests per second that everybody else is expected to make on its disks.
    pub(super) others_per_s: f64,
}

/// Where one counts, and whether it is only coming there.
#[derive(Clone, Copy, Debug)]
struct Entry {
    lane: usize,
    flow: Flow,
    expected_per_s: f64,
    coming_bytes: Option<u64>,
}

pub(super) struct Ledger<'r> {
    round: &'r Round<'r>,
    entries: BTreeMap<usize, Vec<Entry>>,
}

impl<'r> Ledger<'r> {
    pub(super) fn new(round: &'r Round<'r>) -> Self {
        Self { round, entries: BTreeMap::new() }
    }

    /// From now on it counts on pool number `index`, too: with its forecast, or with what it does now where that is more or all
    /// there is.
    pub(super) fn takes(&mut self, number: usize, index: usize, lane: &Lane<'_>, coming: bool) {
        let need = need::need(lane, self.round.config).ok();
        let flow = need.map_or(Flow::default(), |need| need.limit).most(lane.now);
        let expected_per_s = need.map_or(lane.now, |need| need.expected).operations_per_s;
        let coming_bytes = coming.then_some(lane.size_bytes);
        let entry = Entry { lane: number, flow, expected_per_s, coming_bytes };
        self.entries.entry(index).or_default().push(entry);
    }

    fn on(&self, index: usize) -> &[Entry] {
        self.entries.get(&index).map_or(&[], Vec::as_slice)
    }

    /// Moves on their way to it.
    pub(super) fn coming(&self, index: usize) -> u32 {
        self.on(index).iter().filter(|entry| entry.coming_bytes.is_some()).count() as u32
    }

    /// What who would come can have of pool number `index`.
    pub(super) fn available(&self, index: usize, number: usize) -> Room {
        self.left(index, number, self.round.config.headroom)
    }

    /// The same for who is there.
    pub(super) fn kept(&self, index: usize, number: usize) -> Room {
        self.left(index, number, self.round.config.headroom_staying)
    }

    fn left(&self, index: usize, number: usize, headroom: f64) -> Room {
        let pool = self.round.pools[index];
        let others = || self.on(index).iter().filter(|entry| entry.lane != number);
        // What is on another pool of the same disk takes of this one, too.
        let beside =
            self.entries.iter().filter(|&(&at, _)| at == index || self.round.pools[at].shares_a_disk(pool));
        let loads = beside.flat_map(|(_, entries)| entries).filter(|entry| entry.lane != number);
        let (used, others_per_s) = loads.fold((Flow::default(), 0.0), |(used, expected), entry| {
            (used.plus(entry.flow), expected + entry.expected_per_s)
        });
        let gives = pool.gives().unwrap_or_default().times(1.0 - headroom);
        match pool.kind {
            PoolKind::Storage { size_bytes, free_bytes, foreign, .. } => {
                let coming: u64 = others().filter_map(|entry| entry.coming_bytes).sum();
                let kept_free = (size_bytes as f64 * headroom) as u64;
                Room {
                    available: gives.less(used.plus(foreign)),
                    without_others: gives.less(used),
                    free_bytes: free_bytes.saturating_sub(coming).saturating_sub(kept_free),
                    others_per_s: others_per_s + foreign.operations_per_s,
                }
            }
            PoolKind::Link { instance_bytes_per_s, foreign, .. } => {
                let mut available = gives.less(used.plus(foreign));
                let most = instance_bytes_per_s.map_or(f64::INFINITY, |most| most * (1.0 - headroom));
                available.bytes_per_s = available.bytes_per_s.min(most);
                Room { available, without_others: available, ..Room::default() }
            }
            _ => Room::default(),
        }
    }
}
