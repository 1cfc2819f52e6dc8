//! Slots of the eBPF maps: who has which, and what is counted there.

use std::{collections::BTreeSet, fs, path::Path};

use rswap_common::layout::{
    BlockDirection, BlockRecord, MAX_DEVICES, OTHER_DEVICE, SlotRecord, block_index, device_number,
    slot_index,
};

use super::{
    BlockProfile, CpuProfile, Direction, OnCpu, TcpProfile,
    histogram::{Histogram, add_record},
    probes::Maps,
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
}

/// A slot's counters at one moment, over all CPUs. A new owner takes them as its start: slots are reused
/// without being cleared.
pub(super) struct Counters {
    slot: SlotRecord,
    /// By CPU.
    cpus: Vec<OnCpu>,
    /// By device, then direction.
    block: Vec<BlockRecord>,
}

const DIRECTIONS: [(BlockDirection, Direction); 2] =
    [(BlockDirection::Read, Direction::Read), (BlockDirection::Write, Direction::Write)];

impl Counters {
    /// Reads them from the maps.
    pub(super) fn read(maps: &Maps, slots: u32, slot: u32) -> Self {
        let mut total = SlotRecord::EMPTY;
        let mut cpus = Vec::with_capacity(maps.cpus as usize);
        for cpu in 0..maps.cpus {
            if let Some(record) = maps.slots.read(slot_index(cpu, slot, slots)) {
                cpus.push(OnCpu {
                    cpu: cpu as usize,
                    ran_ns: record.on_cpu_ns.sum,
                    others_wait_ns: record.others_wait_ns,
                    foreign_wait_ns: record.foreign_wait_ns,
                });
                add_record(&mut total.run_queue_ns, &record.run_queue_ns);
                add_record(&mut total.on_cpu_ns, &record.on_cpu_ns);
                add_record(&mut total.tcp_rtt_us, &record.tcp_rtt_us);
                total.tcp_bytes_in = total.tcp_bytes_in.wrapping_add(record.tcp_bytes_in);
                total.tcp_bytes_out = total.tcp_bytes_out.wrapping_add(record.tcp_bytes_out);
            }
        }
        let mut block = Vec::with_capacity(MAX_DEVICES as usize * 2);
        for device in 0..MAX_DEVICES {
            for (direction, _) in DIRECTIONS {
                let mut total = BlockRecord::EMPTY;
                for shard in 0..maps.shards {
                    if let Some(record) = maps.blocks.read(block_index(shard, slot, slots, device, direction))
                    {
                        add_record(&mut total.latency_ns, &record.latency_ns);
                        total.bytes = total.bytes.wrapping_add(record.bytes);
                    }
                }
                block.push(total);
            }
        }
        Self { slot: total, cpus, block }
    }

    /// What the scheduler probe counted since `earlier`.
    pub(super) fn add_cpu_since(&self, earlier: &Self, cpu: &mut CpuProfile) {
        cpu.run_queue_ns = Histogram::between(&earlier.slot.run_queue_ns, &self.slot.run_queue_ns);
        cpu.on_cpu_ns = Histogram::between(&earlier.slot.on_cpu_ns, &self.slot.on_cpu_ns);
        let since = |(now, earlier): (&OnCpu, &OnCpu)| OnCpu {
            cpu: now.cpu,
            ran_ns: now.ran_ns.wrapping_sub(earlier.ran_ns),
            others_wait_ns: now.others_wait_ns.wrapping_sub(earlier.others_wait_ns),
            foreign_wait_ns: now.foreign_wait_ns.wrapping_sub(earlier.foreign_wait_ns),
        };
        let by_cpu = self.cpus.iter().zip(&earlier.cpus).map(since);
        cpu.by_cpu = by_cpu.filter(|of| of.ran_ns > 0 || of.others_wait_ns > 0).collect();
    }

    /// What the TCP probes counted since `earlier`.
    pub(super) fn tcp_since(&self, earlier: &Self) -> TcpProfile {
        TcpProfile {
            bytes_in: self.slot.tcp_bytes_in.wrapping_sub(earlier.slot.tcp_bytes_in),
            bytes_out: self.slot.tcp_bytes_out.wrapping_sub(earlier.slot.tcp_bytes_out),
            rtt_us: Histogram::between(&earlier.slot.tcp_rtt_us, &self.slot.tcp_rtt_us),
        }
    }

    /// What the block probe counted since `earlier`, for devices and directions that had I/O.
    pub(super) fn block_since(&self, earlier: &Self, devices: &Devices) -> Vec<BlockProfile> {
        let places = (0..MAX_DEVICES).flat_map(|device| DIRECTIONS.map(|(_, direction)| (device, direction)));
        places
            .zip(self.block.iter().zip(&earlier.block))
            .map(|((device, direction), (now, earlier))| BlockProfile {
                device: devices.name(device),
                direction,
                bytes: now.bytes.wrapping_sub(earlier.bytes),
                latency_ns: Histogram::between(&earlier.latency_ns, &now.latency_ns),
            })
            .filter(|profile| profile.bytes > 0 || profile.latency_ns.count > 0)
            .collect()
    }
}

/// The block devices told apart, by their place in the programs' table. A place, once given, is kept: the
/// counters of a device that has gone may still be read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Devices {
    found: Vec<(u32, u32)>,
}

impl Devices {
    /// Adds the devices that /sys shows now; true if there was a new one and place for it.
    pub(super) fn rescan(&mut self) -> bool {
        let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let mut found: Vec<(bool, (u32, u32))> = entries
            .map(|entry| entry.path())
            // Only devices with a hardware queue complete requests (dm, md and zram pass on bios). One without
            // a size is not in use: eight idle loop devices must not take the places of real disks.
            .filter(|path| {
                path.join("mq/0").exists() && read(path, "size").is_some_and(|size| size.trim() != "0")
            })
            .filter_map(|path| Some((!path.join("device").exists(), parse_number(&read(&path, "dev")?)?)))
            .collect();
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

    fn name(&self, place: u32) -> String {
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
    use super::*;

    #[test]
    fn slots_run_out_and_come_back() {
        let mut free = FreeSlots::new(2);
        assert_eq!((free.take(), free.take(), free.take()), (Some(0), Some(1), None));
        free.give_back(0);
        assert_eq!(free.take(), Some(0));
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
