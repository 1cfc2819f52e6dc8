//! What the programs count of a slot, over all CPUs. Most of it is buckets, and of most histograms nothing is counted in most windows: these are not read again.

use std::mem::offset_of;

use rswap_common::{
    histogram::BUCKETS,
    layout::{FaultRecord, HistogramRecord, OFF_CPU_KINDS, SlotRecord, TcpCounts, slot_index},
};

use super::{
    OnCpu,
    histogram::{Counts, add_counts},
    neighbours::Waits,
    probes::Maps,
};
use crate::sys::bpf_mmap::{BpfRecord, MappedArray};

/// Where a histogram is in a record of type `T`, in words: its sum, and its first bucket.
#[derive(Clone, Copy)]
pub(super) struct Part {
    sum: usize,
    buckets: usize,
}

impl Part {
    const fn at(sum: usize, buckets: usize) -> Self {
        assert!(sum.is_multiple_of(8) && buckets.is_multiple_of(8));
        Self { sum: sum / 8, buckets: buckets / 8 }
    }

    const fn of(record: usize) -> Self {
        Self::at(record + offset_of!(HistogramRecord, sum), record + offset_of!(HistogramRecord, buckets))
    }
}

const RUN_QUEUE: Part = Part::of(offset_of!(SlotRecord, run_queue_ns));
const ON_CPU: Part = Part::of(offset_of!(SlotRecord, on_cpu_ns));
const ROUND_TRIPS: Part = Part::of(offset_of!(SlotRecord, tcp_rtt_us));
const LIVES: Part = Part::of(offset_of!(SlotRecord, tcp_life_us));
const OFF_CPU: [Part; OFF_CPU_KINDS] = {
    const fn of(kind: usize) -> Part {
        let sum = offset_of!(SlotRecord, off_cpu_sums_ns) + kind * size_of::<u64>();
        Part::at(sum, offset_of!(SlotRecord, off_cpu_ns) + kind * size_of::<[u32; BUCKETS]>())
    }
    [of(0), of(1), of(2), of(3)]
};
/// Of a record of page faults.
pub(super) const FAULTS: Part = Part::of(offset_of!(FaultRecord, ns));

/// A histogram at one moment, over the records of all CPUs.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// Its sum, and its first two buckets, read first: every sample changes one of them, one of 0 the buckets.
    head: [u64; 2],
    /// They were the same at the reading before. A program adds to the sum first: only then is everything in the buckets.
    is_settled: bool,
    pub(super) counts: Counts,
}

impl Seen {
    /// Reads it of these records: what is `known`, if nothing was counted since.
    pub(super) fn read<T: BpfRecord>(
        array: &MappedArray<T>,
        records: impl Iterator<Item = u32> + Clone,
        part: Part,
        known: Option<&Self>,
    ) -> Self {
        let heads = records.clone().filter_map(|index| array.words(index, [part.sum, part.buckets]));
        let head =
            heads.fold([0; 2], |sum, head| [0, 1].map(|word| u64::wrapping_add(sum[word], head[word])));
        let known = known.filter(|known| known.head == head);
        if let Some(known) = known.filter(|known| known.is_settled) {
            return known.clone();
        }
        let mut total = HistogramRecord::EMPTY;
        for buckets in records.filter_map(|index| array.read_part::<[u32; BUCKETS]>(index, part.buckets)) {
            add_counts(&mut total, 0, &buckets);
        }
        total.sum = head[0];
        Self { head, is_settled: known.is_some(), counts: Counts::of(&total) }
    }

    #[cfg(test)]
    pub(super) fn of(counts: Counts) -> Self {
        Self { counts, ..Self::default() }
    }
}

/// The counters of a slot at one moment, which only ever grow, and wrap.
#[derive(Debug, Default)]
pub(super) struct SlotCounts {
    pub(super) run_queue_ns: Seen,
    pub(super) on_cpu_ns: Seen,
    pub(super) tcp_rtt_us: Seen,
    pub(super) tcp_bytes_in: u64,
    pub(super) tcp_bytes_out: u64,
    pub(super) tcp: TcpCounts,
    pub(super) tcp_life_us: Seen,
    /// By CPU.
    pub(super) cpus: Vec<OnCpu>,
    /// By [`rswap_common::layout::OffCpu`].
    pub(super) off_cpu_ns: [Seen; OFF_CPU_KINDS],
    pub(super) migrations: u64,
    /// Whether this has changed says whether any of its page faults has begun.
    pub(super) faults_begun: u64,
    /// For whom it waited.
    pub(super) waits: Waits,
}

impl SlotCounts {
    /// Reads them from the maps. Histograms of which nothing was counted since are those of `known`.
    pub(super) fn read(maps: &Maps, slots: u32, slot: u32, known: Option<&Self>) -> Self {
        const OF_CPU: [usize; 3] = [
            ON_CPU.sum,
            offset_of!(SlotRecord, others_wait_ns) / 8,
            offset_of!(SlotRecord, foreign_wait_ns) / 8,
        ];
        const OF_ALL: [usize; 10] = [
            offset_of!(SlotRecord, tcp_bytes_in) / 8,
            offset_of!(SlotRecord, tcp_bytes_out) / 8,
            offset_of!(SlotRecord, tcp.opened) / 8,
            offset_of!(SlotRecord, tcp.accepted) / 8,
            offset_of!(SlotRecord, tcp.closed) / 8,
            offset_of!(SlotRecord, tcp.seen) / 8,
            offset_of!(SlotRecord, tcp.failed) / 8,
            offset_of!(SlotRecord, tcp.retransmits) / 8,
            offset_of!(SlotRecord, faults_begun) / 8,
            offset_of!(SlotRecord, migrations) / 8,
        ];
        let records = (0..maps.cpus).map(|cpu| slot_index(cpu, slot, slots));
        let seen = |part, known| Seen::read(&maps.slots, records.clone(), part, known);
        let mut cpus = Vec::with_capacity(maps.cpus as usize);
        let mut all = [0_u64; OF_ALL.len()];
        for (cpu, index) in records.clone().enumerate() {
            if let Some([ran_ns, others_wait_ns, foreign_wait_ns]) = maps.slots.words(index, OF_CPU) {
                cpus.push(OnCpu { cpu, ran_ns, others_wait_ns, foreign_wait_ns });
            }
            let words = maps.slots.words(index, OF_ALL).unwrap_or_default();
            all.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(word));
        }
        let [tcp_bytes_in, tcp_bytes_out, opened, accepted, closed, seen_to_end, failed, retransmits, ..] =
            all;
        let [.., faults_begun, migrations] = all;
        Self {
            run_queue_ns: seen(RUN_QUEUE, known.map(|known| &known.run_queue_ns)),
            on_cpu_ns: seen(ON_CPU, known.map(|known| &known.on_cpu_ns)),
            tcp_rtt_us: seen(ROUND_TRIPS, known.map(|known| &known.tcp_rtt_us)),
            tcp_bytes_in,
            tcp_bytes_out,
            tcp: TcpCounts { opened, accepted, closed, seen: seen_to_end, failed, retransmits },
            tcp_life_us: seen(LIVES, known.map(|known| &known.tcp_life_us)),
            cpus,
            off_cpu_ns: std::array::from_fn(|kind| {
                seen(OFF_CPU[kind], known.map(|known| &known.off_cpu_ns[kind]))
            }),
            migrations,
            faults_begun,
            waits: Waits::read(maps, slots, slot),
        }
    }

    /// Connections of which the beginning was seen, and the end was not; wraps.
    pub(super) fn came_and_stayed(&self) -> u64 {
        self.tcp.opened.wrapping_add(self.tcp.accepted).wrapping_sub(self.tcp.seen)
    }
}
