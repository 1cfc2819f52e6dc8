//! Slots of the eBPF maps: who has which, and what is counted there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use rswap_common::layout::{
    BlockOperation, BlockRecord, HistogramRecord, MAX_DEVICES, OTHER_DEVICE, OffCpu, UNOWNED_KINDS, Unowned,
    UnownedCount, device_number,
};

use super::{
    BlockProfile, CpuProfile, OffCpuProfile, OnCpu, Operation, TcpConnections, TcpProfile, UnownedBlock,
    block_records::Head,
    fault_latency::FaultCounts,
    histogram::{Counts, Histogram, add_counts},
    probes::Maps,
    slot_records::SlotCounts,
};

/// Which slots are free: the lowest is taken first.
#[derive(Debug)]
pub(super) struct FreeSlots(BTreeSet<u32>);

impl FreeSlots {
    pub(super) fn new(slots: u32) -> Self {
        Self((0..slots).collect())
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        self.0.pop_first()
    }

    pub(super) fn give_back(&mut self, slot: u32) {
        self.0.insert(slot);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// A slot's counters at one moment, over all CPUs. A new owner takes them as its start: slots are reused
/// without being cleared. Kept from window to window, hence only what has counted anything.
pub(super) struct Counters {
    slot: SlotCounts,
    /// How long page faults took.
    pub(super) faults: FaultCounts,
    /// By their place, ascending; those that have counted anything.
    blocks: Vec<Block>,
}

/// What is counted for one device and operation.
#[derive(Clone, Default)]
struct Block {
    /// Of the device and the operation, among all.
    place: usize,
    /// Read before the buckets.
    head: Head,
    /// It was the same at the reading before. A program counts in the head first: only then are the buckets as the head is.
    is_settled: bool,
    device_ns: Counts,
    queue_ns: Counts,
}

impl Block {
    fn of(place: usize, head: Head, records: impl Iterator<Item = BlockRecord>) -> Self {
        let (mut device_ns, mut queue_ns) = (HistogramRecord::EMPTY, HistogramRecord::EMPTY);
        for record in records {
            add_counts(&mut device_ns, record.device_sum_ns, &record.device_ns);
            add_counts(&mut queue_ns, record.queue_sum_ns, &record.queue_ns);
        }
        let (device_ns, queue_ns) = (Counts::of(&device_ns), Counts::of(&queue_ns));
        Self { place, head, is_settled: false, device_ns, queue_ns }
    }
}

const OPERATIONS: [(BlockOperation, Operation); 4] = [
    (BlockOperation::Read, Operation::Read),
    (BlockOperation::Write, Operation::Write),
    (BlockOperation::Flush, Operation::Flush),
    (BlockOperation::Discard, Operation::Discard),
];

/// Every device and operation, by place.
fn places() -> impl Iterator<Item = (usize, u32, (BlockOperation, Operation))> {
    let all = (0..MAX_DEVICES).flat_map(|device| OPERATIONS.map(|operation| (device, operation)));
    all.enumerate().map(|(place, (device, operation))| (place, device, operation))
}

impl Counters {
    /// Reads them from the maps. What has counted nothing since `earlier`, of the same slot, is not read again.
    pub(super) fn read(maps: &Maps, slots: u32, slot: u32, earlier: Option<&Self>) -> Self {
        let mut blocks = Vec::new();
        for (place, device, (operation, _)) in places().filter(|(_, device, _)| maps.blocks.has(*device)) {
            // Nearly all of it is buckets, and nearly all have counted nothing.
            let head = maps.blocks.head(slot, device, operation);
            let known = earlier.and_then(|earlier| earlier.block(place)).filter(|known| known.head == head);
            match known {
                Some(known) if known.is_settled => blocks.push(known.clone()),
                _ if head == Head::default() => {}
                _ => {
                    let records = maps.blocks.read(slot, device, operation);
                    blocks.push(Block { is_settled: known.is_some(), ..Block::of(place, head, records) });
                }
            }
        }
        blocks.shrink_to_fit();
        Self {
            slot: SlotCounts::read(maps, slots, slot, earlier.map(|earlier| &earlier.slot)),
            faults: FaultCounts::read(maps, slots, slot, earlier.map(|earlier| &earlier.faults)),
            blocks,
        }
    }

    /// Whether this has changed says whether any of its page faults has begun.
    pub(super) fn faults_begun(&self) -> u64 {
        self.slot.faults_begun
    }

    /// For whom it waited since `earlier`: by cgroup, in nanoseconds.
    pub(super) fn waits_since(&self, earlier: &Self) -> BTreeMap<u64, u64> {
        self.slot.waits.since(&earlier.slot.waits)
    }

    /// What the scheduler probe counted since `earlier`.
    pub(super) fn add_cpu_since(&self, earlier: &Self, cpu: &mut CpuProfile) {
        cpu.run_queue_ns =
            Histogram::between(&earlier.slot.run_queue_ns.counts, &self.slot.run_queue_ns.counts);
        cpu.on_cpu_ns = Histogram::between(&earlier.slot.on_cpu_ns.counts, &self.slot.on_cpu_ns.counts);
        let since = |(now, earlier): (&OnCpu, &OnCpu)| OnCpu {
            cpu: now.cpu,
            ran_ns: now.ran_ns.wrapping_sub(earlier.ran_ns),
            others_wait_ns: now.others_wait_ns.wrapping_sub(earlier.others_wait_ns),
            foreign_wait_ns: now.foreign_wait_ns.wrapping_sub(earlier.foreign_wait_ns),
        };
        let by_cpu = self.slot.cpus.iter().zip(&earlier.slot.cpus).map(since);
        cpu.by_cpu = by_cpu.filter(|of| of.ran_ns > 0 || of.others_wait_ns > 0).collect();
    }

    /// Why and how long tasks were off the CPU, of those times that ended since `earlier`.
    pub(super) fn off_cpu_since(&self, earlier: &Self) -> OffCpuProfile {
        let of = |why: OffCpu| {
            let kind = why as usize;
            Histogram::between(&earlier.slot.off_cpu_ns[kind].counts, &self.slot.off_cpu_ns[kind].counts)
        };
        OffCpuProfile {
            sleep_ns: of(OffCpu::Sleep),
            io_wait_ns: of(OffCpu::IoWait),
            blocked_ns: of(OffCpu::Blocked),
            stopped_ns: of(OffCpu::Stopped),
        }
    }

    /// Times that a task went from one CPU to another since `earlier`.
    pub(super) fn migrations_since(&self, earlier: &Self) -> u64 {
        self.slot.migrations.wrapping_sub(earlier.slot.migrations)
    }

    /// What the TCP probes counted since `earlier`.
    pub(super) fn tcp_since(&self, earlier: &Self) -> TcpProfile {
        TcpProfile {
            bytes_in: self.slot.tcp_bytes_in.wrapping_sub(earlier.slot.tcp_bytes_in),
            bytes_out: self.slot.tcp_bytes_out.wrapping_sub(earlier.slot.tcp_bytes_out),
            rtt_us: Histogram::between(&earlier.slot.tcp_rtt_us.counts, &self.slot.tcp_rtt_us.counts),
            ..TcpProfile::default()
        }
    }

    /// Times that something was sent again since `earlier`.
    pub(super) fn retransmits_since(&self, earlier: &Self) -> u64 {
        self.slot.tcp.retransmits.wrapping_sub(earlier.slot.tcp.retransmits)
    }

    /// Connections since `earlier`; there are those now that have come and not gone since `open_then` was [`Self::came_and_stayed`].
    pub(super) fn connections_since(&self, earlier: &Self, open_then: u64) -> TcpConnections {
        let since = |now: u64, earlier: u64| now.wrapping_sub(earlier);
        // Negative, if more have gone than there were: some may have come while it was profiled before.
        let open = self.came_and_stayed().wrapping_sub(open_then) as i64;
        TcpConnections {
            opened: since(self.slot.tcp.opened, earlier.slot.tcp.opened),
            accepted: since(self.slot.tcp.accepted, earlier.slot.tcp.accepted),
            closed: since(self.slot.tcp.closed, earlier.slot.tcp.closed),
            failed: since(self.slot.tcp.failed, earlier.slot.tcp.failed),
            open: open.try_into().unwrap_or(0),
            life_us: Histogram::between(&earlier.slot.tcp_life_us.counts, &self.slot.tcp_life_us.counts),
        }
    }

    /// As [`SlotCounts::came_and_stayed`].
    pub(super) fn came_and_stayed(&self) -> u64 {
        self.slot.came_and_stayed()
    }

    /// What the block probe counted since `earlier`, `window_ms` ago, for devices and operations that had I/O.
    pub(super) fn block_since(&self, earlier: &Self, devices: &Devices, window_ms: u64) -> Vec<BlockProfile> {
        let nothing = Block::default();
        places()
            .filter_map(|(place, device, (_, operation))| {
                let (now, earlier) = (self.block(place), earlier.block(place));
                if now.is_none() && earlier.is_none() {
                    return None;
                }
                let (now, earlier) = (now.unwrap_or(&nothing), earlier.unwrap_or(&nothing));
                let latency_ns = Histogram::between(&earlier.device_ns, &now.device_ns);
                let queue_ns = Histogram::between(&earlier.queue_ns, &now.queue_ns);
                let under_way_ns = latency_ns.sum.saturating_add(queue_ns.sum) as f64;
                Some(BlockProfile {
                    device: devices.name(device),
                    operation,
                    bytes: now.head.bytes.wrapping_sub(earlier.head.bytes),
                    in_flight: under_way_ns / (window_ms.max(1) as f64 * 1e6),
                    not_split: now.head.not_split.wrapping_sub(earlier.head.not_split),
                    latency_ns,
                    queue_ns,
                })
            })
            .filter(|profile| profile.bytes > 0 || profile.latency_ns.count > 0)
            .collect()
    }

    fn block(&self, place: usize) -> Option<&Block> {
        self.blocks.iter().find(|block| block.place == place)
    }
}

/// Requests that were nobody's who is tracked, on all CPUs, for devices that had some.
pub(super) fn unowned(maps: &Maps, devices: &Devices) -> Vec<UnownedBlock> {
    let mut total = [[UnownedCount::default(); UNOWNED_KINDS]; MAX_DEVICES as usize];
    for record in (0..maps.cpus).filter_map(|cpu| maps.unowned.read(cpu)) {
        for (total, count) in total.iter_mut().flatten().zip(record.by_device.iter().flatten()) {
            total.requests = total.requests.wrapping_add(count.requests);
            total.bytes = total.bytes.wrapping_add(count.bytes);
        }
    }
    let of = |(place, counts): (usize, &[UnownedCount; UNOWNED_KINDS])| {
        let of = |kind: Unowned| counts[kind as usize].into();
        UnownedBlock {
            device: devices.name(place as u32),
            reads: of(Unowned::Read),
            writes: of(Unowned::Write),
            write_back: of(Unowned::WriteBack),
        }
    };
    let had_some =
        |(_, counts): &(usize, &[UnownedCount; UNOWNED_KINDS])| counts.iter().any(|of| of.requests > 0);
    total.iter().enumerate().filter(had_some).map(of).collect()
}

/// The block devices told apart, by their place in the programs' table. A place, once given, is kept: the
/// counters of a device that has gone may still be read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Devices {
    found: Vec<(u32, u32)>,
    not_covered: Vec<String>,
}

impl Devices {
    /// Adds the devices that /sys shows now; true if there was a new one and place for it.
    pub(super) fn rescan(&mut self) -> bool {
        self.rescan_in(Path::new("/sys/block"))
    }

    fn rescan_in(&mut self, directory: &Path) -> bool {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        // One without a size is not in use: eight idle loop devices must not take the places of real disks.
        let in_use = |path: &PathBuf| read(path, "size").is_some_and(|size| size.trim() != "0");
        // Only devices with a hardware queue complete requests. Others (dm, md, zram) pass bios on, or serve them at once.
        let (requests, others): (Vec<_>, Vec<_>) =
            entries.map(|entry| entry.path()).filter(in_use).partition(|path| path.join("mq/0").exists());
        let mut found: Vec<(bool, (u32, u32))> = requests
            .into_iter()
            .filter_map(|path| Some((!path.join("device").exists(), parse_number(&read(&path, "dev")?)?)))
            .collect();
        self.not_covered =
            others.iter().filter_map(|path| Some(path.file_name()?.to_str()?.replace('!', "/"))).collect();
        self.not_covered.sort_unstable();
        // Disks that hardware (or the hypervisor) stands behind come first.
        found.sort_unstable();
        let numbers: Vec<(u32, u32)> = found.into_iter().map(|(_, number)| number).collect();
        self.add(&numbers)
    }

    fn add(&mut self, numbers: &[(u32, u32)]) -> bool {
        let before = self.found.len();
        for number in numbers {
            if self.found.len() < OTHER_DEVICE as usize && !self.found.contains(number) {
                self.found.push(*number);
            }
        }
        self.found.len() > before
    }

    /// As the programs compare them.
    pub(super) fn table(&self) -> [u32; MAX_DEVICES as usize] {
        let mut table = [0; MAX_DEVICES as usize];
        for (place, &(major, minor)) in table.iter_mut().zip(&self.found) {
            *place = device_number(major, minor);
        }
        table
    }

    /// Those that are told apart, as `major:minor`.
    pub(super) fn names(&self) -> Vec<String> {
        (0..self.found.len() as u32).map(|place| self.name(place)).collect()
    }

    /// Names of the block devices in use of which nothing is counted, as they complete no requests.
    pub(super) fn not_covered(&self) -> Vec<String> {
        self.not_covered.clone()
    }

    /// How many are told apart: these have the first places.
    pub(super) fn told_apart(&self) -> u32 {
        self.found.len() as u32
    }

    /// What a place's device is called.
    pub(super) fn name(&self, place: u32) -> String {
        match self.found.get(place as usize) {
            Some((major, minor)) => format!("{major}:{minor}"),
            None => super::OTHER_DEVICE.to_owned(),
        }
    }
}

fn read(device: &Path, file: &str) -> Option<String> {
    fs::read_to_string(device.join(file)).ok()
}

fn parse_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use rswap_common::layout::TcpCounts;

    use super::*;

    #[test]
    fn slots_run_out_and_come_back() {
        let mut free = FreeSlots::new(2);
        assert_eq!((free.take(), free.take(), free.take()), (Some(0), Some(1), None));
        free.give_back(0);
        assert_eq!(free.take(), Some(0));
    }

    fn counters(blocks: &[(usize, u64, &[usize])]) -> Counters {
        let block = |&(place, bytes, requests): &(usize, u64, &[usize])| {
            let mut device_ns = HistogramRecord::EMPTY;
            requests.iter().for_each(|bucket| device_ns.buckets[*bucket] += 1);
            let head = Head { bytes, ..Head::default() };
            Block { place, head, device_ns: Counts::of(&device_ns), ..Block::default() }
        };
        Counters {
            slot: SlotCounts::default(),
            faults: FaultCounts::default(),
            blocks: blocks.iter().map(block).collect(),
        }
    }

    #[test]
    fn connections_are_open_that_came_and_have_not_gone() {
        let of = |opened, accepted, closed, seen| {
            let tcp = TcpCounts { opened, accepted, closed, seen, ..TcpCounts::default() };
            Counters { slot: SlotCounts { tcp, ..SlotCounts::default() }, ..counters(&[]) }
        };
        // Of another owner of the slot before, two are left for ever.
        let (begin, later) = (of(5, 0, 3, 3), of(6, 4, 9, 4));
        let found = later.connections_since(&begin, begin.came_and_stayed());
        assert_eq!((found.opened, found.accepted, found.closed, found.open), (1, 4, 6, 4));
        let none = of(5, 0, 5, 5).connections_since(&begin, begin.came_and_stayed());
        assert_eq!(none.open, 0, "more have gone than have come");
    }

    #[test]
    fn a_device_that_had_no_io_before_is_told_apart_from_those_that_had() {
        let mut devices = Devices::default();
        devices.add(&[(254, 0), (8, 0)]);
        let earlier = counters(&[(0, 100, &[5][..]), (28, 4_000, &[9][..])]);
        // Of one, all counters have wrapped to 0: it has gone from the list.
        let later = counters(&[(0, 100, &[5][..]), (5, 512, &[7, 7][..])]);
        let shown = later.block_since(&earlier, &devices, 1_000);
        let shown: Vec<_> = shown
            .iter()
            .map(|of| (of.device.as_str(), of.operation, of.bytes, of.latency_ns.buckets.clone()))
            .collect();
        let wrapped = (9, u64::from(u32::MAX));
        let expected = [
            ("8:0", Operation::Write, 512, vec![(7, 2)]),
            ("other", Operation::Read, 4_000_u64.wrapping_neg(), vec![wrapped]),
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_device_that_passes_its_bios_on_is_named_as_not_covered() {
        let directory = tempfile::tempdir().unwrap();
        let device = |name: &str, number: &str, size: &str, has_queue: bool| {
            let path = directory.path().join(name);
            fs::create_dir_all(if has_queue { path.join("mq/0") } else { path.clone() }).unwrap();
            fs::write(path.join("dev"), number).unwrap();
            fs::write(path.join("size"), size).unwrap();
        };
        device("vda", "254:0\n", "100\n", true);
        device("loop0", "7:0\n", "0\n", true);
        device("dm-0", "253:0\n", "50\n", false);
        device("zram0", "252:0\n", "0\n", false);
        device("cciss!c0d0", "104:0\n", "9\n", false);
        let mut devices = Devices::default();
        assert!(devices.rescan_in(directory.path()));
        assert_eq!(
            (devices.names(), devices.not_covered()),
            (vec!["254:0".into()], vec!["cciss/c0d0".into(), "dm-0".into()])
        );
    }

    #[test]
    fn devices_keep_their_places_and_the_last_place_is_shared() {
        let mut devices = Devices::default();
        assert!(devices.add(&[(254, 0)]));
        assert!(devices.add(&[(8, 0), (254, 0)]));
        assert!(!devices.add(&[(8, 0)]));
        assert_eq!(devices.table()[..3], [254 << 20, 8 << 20, 0]);
        assert_eq!((devices.name(0), devices.name(OTHER_DEVICE)), ("254:0".into(), "other".into()));
        let many: Vec<_> = (0..20).map(|minor| (9, minor)).collect();
        devices.add(&many);
        assert_eq!(devices.table()[OTHER_DEVICE as usize], 0);
    }
}
