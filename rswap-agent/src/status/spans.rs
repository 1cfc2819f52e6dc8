//! Sums over more than a window: the last minute, the last hour, and since an instance is shown. They are added up in parts, so that a span is a sum of parts,
//! and kept as bytes.

use std::{collections::VecDeque, marker::PhantomData, mem};

use serde::Serialize;

use super::packed::with_bytes;
use crate::units::UnixMillis;

/// Windows of a part are added up when they take so many bytes. Of an instance that does little, all of them fit.
const MOST_BYTES: usize = 256;

/// The spans that are kept beside the last window.
#[derive(Clone, Copy, Debug)]
enum Span {
    /// 60 to 70 seconds.
    Minute,
    /// 60 to 65 minutes.
    Hour,
}

impl Span {
    /// How long a part of it is, and how many whole ones belong to it.
    const fn parts(self) -> (u64, usize) {
        match self {
            Self::Minute => (10_000, 6),
            Self::Hour => (300_000, 12),
        }
    }
}

/// What can be added up.
pub(super) trait Sum: Clone + Default {
    /// Nothing was added yet.
    fn is_nothing(&self) -> bool;
    /// Adds another one.
    fn add(&mut self, other: &Self);
    /// How it is packed (postcard).
    fn packed(&self) -> impl Serialize;
    /// The first one of some that are packed one behind the other, and the bytes behind it.
    fn unpack(bytes: &[u8]) -> postcard::Result<(Self, &[u8])>;
}

/// The sum of those that are packed one behind the other.
fn unpacked<S: Sum>(mut bytes: &[u8]) -> S {
    let mut all = S::default();
    while !bytes.is_empty() {
        let (one, others) = S::unpack(bytes).expect("as it was packed by this process");
        if all.is_nothing() {
            all = one;
        } else {
            all.add(&one);
        }
        bytes = others;
    }
    all
}

/// What was added, each kept once: a part of a minute is added to the hour's and to the total when it is full.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept<S> {
    minute: Parts<S>,
    hour: Parts<S>,
    /// Without what is in the part of a minute that is being filled.
    total: Packed<S>,
}

impl<S: Sum> Kept<S> {
    /// A window begins that ends `at`, and has nothing yet.
    pub(super) fn begin_window(&mut self, at: UnixMillis) {
        self.minute.now.begin_window();
        self.go_on_to(at);
    }

    /// Adds to that window.
    pub(super) fn add(&mut self, sum: &S) {
        self.minute.now.add(sum);
    }

    fn go_on_to(&mut self, at: UnixMillis) {
        if let Some((then, full)) = self.minute.go_on_to(at, Span::Minute) {
            self.hour.go_on_to(then, Span::Hour);
            self.hour.now.add(&full);
            // One in ten seconds at most: added up at once, it takes the least room.
            self.hour.now.sum_up();
            self.total.add(&full);
        }
        self.hour.go_on_to(at, Span::Hour);
    }

    /// The last window, minute and hour, and all.
    pub(super) fn spans(&self) -> [S; 4] {
        let now = self.minute.now.sum();
        let mut hour = self.hour.now.sum();
        hour.add(&now);
        [self.minute.now.last(), self.minute.with(&now), self.hour.with(&hour), self.total()]
    }

    /// All that was ever added.
    pub(super) fn total(&self) -> S {
        let mut sum = self.total.sum();
        sum.add(&self.minute.now.sum());
        sum
    }

    pub(super) fn had_some_in_the_hour(&self) -> bool {
        !self.hour.is_empty() || !self.minute.now.is_empty()
    }

    /// What it takes of memory beside itself, in bytes.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        let parts = |parts: &Parts<S>| {
            let whole = parts.whole.capacity() * size_of::<(u64, Packed<S>)>();
            let packed = parts.whole.iter().map(|(_, part)| part.bytes.len()).sum::<usize>();
            whole + packed + parts.now.bytes.capacity()
        };
        self.total.bytes.len() + parts(&self.minute) + parts(&self.hour)
    }
}

/// A sum as bytes; of nothing, none.
#[derive(Clone, Debug, Default)]
struct Packed<S> {
    bytes: Box<[u8]>,
    of: PhantomData<S>,
}

impl<S: Sum> Packed<S> {
    fn of(sum: &S) -> Self {
        if sum.is_nothing() {
            return Self::default();
        }
        Self { bytes: with_bytes(&sum.packed(), |bytes| bytes.into()), of: PhantomData }
    }

    fn sum(&self) -> S {
        unpacked(&self.bytes)
    }

    fn add(&mut self, other: &S) {
        let mut sum = self.sum();
        sum.add(other);
        *self = Self::of(&sum);
    }
}

/// What has come of a part that is being filled. To add to it takes no more than to pack what is added: it is added up when somebody looks.
#[derive(Clone, Debug, Default)]
struct Filling<S> {
    /// What is something, packed one behind the other.
    bytes: Vec<u8>,
    /// So many of the bytes are one that was added up; behind them is what came since.
    summed: usize,
    /// Where that of the last window begins; at the end, if it had nothing.
    last: usize,
    of: PhantomData<S>,
}

impl<S: Sum> Filling<S> {
    /// A window begins, and has nothing yet.
    fn begin_window(&mut self) {
        self.last = self.bytes.len();
    }

    fn add(&mut self, sum: &S) {
        if self.bytes.len() - self.summed >= MOST_BYTES {
            self.sum_up();
        }
        self.last = self.bytes.len();
        with_bytes(&sum.packed(), |bytes| self.bytes.extend_from_slice(bytes));
    }

    fn sum_up(&mut self) {
        let bytes = with_bytes(&self.sum().packed(), <[u8]>::to_vec);
        *self = Self { summed: bytes.len(), last: bytes.len(), bytes, of: PhantomData };
    }

    fn sum(&self) -> S {
        unpacked(&self.bytes)
    }

    /// The last window's.
    fn last(&self) -> S {
        unpacked(&self.bytes[self.last..])
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// The parts of a span.
#[derive(Clone, Debug, Default)]
struct Parts<S> {
    /// Number of the part that is being filled, from the epoch.
    filling: u64,
    now: Filling<S>,
    /// Whole parts that had something, oldest first, by their number.
    whole: VecDeque<(u64, Packed<S>)>,
}

impl<S: Sum> Parts<S> {
    /// Goes on to the part that is filled then; answers when the one that was filled until now began, and what is in it, if it is full.
    fn go_on_to(&mut self, at: UnixMillis, span: Span) -> Option<(UnixMillis, S)> {
        let (part_ms, kept) = span.parts();
        let number = at.0 / part_ms;
        let mut full = None;
        // The clock of the host may have been set back: then the part that is being filled is filled on.
        if number > self.filling {
            if !self.now.is_empty() {
                let now = mem::take(&mut self.now).sum();
                self.whole.push_back((self.filling, Packed::of(&now)));
                full = Some((UnixMillis(self.filling * part_ms), now));
            }
            self.filling = number;
        }
        while self.whole.front().is_some_and(|(oldest, _)| oldest + (kept as u64) < self.filling) {
            self.whole.pop_front();
        }
        full
    }

    /// What its whole parts have, and `now`.
    fn with(&self, now: &S) -> S {
        let mut sum = now.clone();
        self.whole.iter().for_each(|(_, part)| sum.add(&part.sum()));
        sum
    }

    fn is_empty(&self) -> bool {
        self.now.is_empty() && self.whole.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::profile::histogram::of;

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked_the_same(values in prop::collection::vec(any::<u64>(), 0..40), more in prop::collection::vec(any::<u64>(), 0..40)) {
            let mut packed = Packed::of(&of(&values));
            prop_assert_eq!(packed.sum(), of(&values));
            packed.add(&of(&more));
            let mut sum = of(&values);
            sum.merge(&of(&more));
            prop_assert_eq!(packed.sum(), sum);
        }
    }
}
