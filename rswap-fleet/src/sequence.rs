//! Which reports are new. A host's spool sends a report until it is acknowledged, so each may come more than once.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Spools of one host that are remembered: another one begins where the old one's directory was lost.
const EPOCHS: usize = 8;

/// What was received of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// The last sequence number of each epoch, the latest epoch last.
    epochs: VecDeque<(u64, u64)>,
    /// Reports that were taken.
    pub taken: u64,
    /// Sequence numbers that were skipped: what a full spool had dropped.
    pub skipped: u64,
    /// Reports that had been taken before.
    pub repeated: u64,
}

impl Received {
    /// Whether this report is new; if so, it counts as taken from here on.
    pub fn take(&mut self, epoch: u64, sequence: u64) -> bool {
        let last = match self.epochs.iter_mut().find(|(known, _)| *known == epoch) {
            Some((_, last)) => last,
            None => {
                if self.epochs.len() == EPOCHS {
                    self.epochs.pop_front();
                }
                self.epochs.push_back((epoch, 0));
                let Some((_, last)) = self.epochs.back_mut() else { return false };
                last
            }
        };
        if sequence <= *last {
            self.repeated += 1;
            return false;
        }
        self.skipped += sequence - *last - 1;
        *last = sequence;
        self.taken += 1;
        true
    }

    /// The last sequence number that was taken of an epoch.
    pub fn last(&self, epoch: u64) -> u64 {
        self.epochs.iter().find(|(known, _)| *known == epoch).map_or(0, |(_, last)| *last)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_gap_is_counted_and_a_new_spool_begins_anew() {
        let mut received = Received::default();
        assert!(received.take(7, 1) && received.take(7, 4) && !received.take(7, 3));
        assert_eq!((received.taken, received.skipped, received.repeated), (2, 2, 1));
        assert!(received.take(8, 1) && !received.take(7, 4));
        assert_eq!((received.last(7), received.last(8), received.last(9)), (4, 1, 0));
        (100..120).for_each(|epoch| assert!(received.take(epoch, 1)));
        assert_eq!(received.epochs.len(), EPOCHS);
    }

    proptest! {
        /// A spool that sends each report until it is acknowledged, over a network that repeats, delays and loses.
        #[test]
        fn each_report_is_taken_once_whatever_the_network_does(
            fates in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 1..200),
        ) {
            let (mut received, mut acknowledged, mut taken) = (Received::default(), 0u64, Vec::new());
            let mut on_the_way = Vec::new();
            for (fate, which) in fates {
                let next = acknowledged + 1;
                let mut arrive = |sequence: u64, received: &mut Received| {
                    if received.take(1, sequence) {
                        taken.push(sequence);
                    }
                };
                match fate {
                    // Lost on the way there, and perhaps not for good.
                    0 => on_the_way.push(next),
                    // It arrives; the answer is lost.
                    1 => arrive(next, &mut received),
                    2 => {
                        arrive(next, &mut received);
                        acknowledged = received.last(1);
                    }
                    _ if !on_the_way.is_empty() => {
                        let late = *which.get(&on_the_way);
                        arrive(late, &mut received);
                    }
                    _ => {}
                }
            }
            let expected: Vec<u64> = (1..=received.last(1)).collect();
            prop_assert_eq!(&taken, &expected);
            prop_assert!(acknowledged <= received.last(1));
            prop_assert_eq!(received.skipped, 0);
        }
    }
}
