//! The records of block I/O, mapped as far as this host has devices: those of one that is not there are megabytes of nothing.

use std::os::fd::{AsFd, OwnedFd};

use aya::{Ebpf, maps::Map};
use rswap_common::layout::{
    BlockOperation, BlockRecord, MAX_DEVICES, OTHER_DEVICE, block_index, block_range, map_names,
};

use super::slots::Devices;
use crate::sys::bpf_mmap::MappedArray;

/// They are kept per shard, slot, device and operation.
pub(super) struct BlockRecords {
    map: OwnedFd,
    slots: u32,
    shards: u32,
    /// By device's place, the part of flushes and discards, and each shard's.
    mapped: [Vec<MappedArray<BlockRecord>>; MAX_DEVICES as usize],
}

/// What grows with every request: sums over the shards, which wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) bytes: u64,
    pub(super) not_split: u64,
    pub(super) device_sum_ns: u64,
    pub(super) queue_sum_ns: u64,
}

impl BlockRecords {
    /// Those of devices that have no place of their own are mapped at once.
    pub(super) fn new(ebpf: &Ebpf, slots: u32, shards: u32) -> Result<Self, String> {
        let Some(Map::Array(map)) = ebpf.map(map_names::BLOCKS) else {
            return Err(format!("the eBPF object has no array map {}: build it again", map_names::BLOCKS));
        };
        let map = map.fd().as_fd().try_clone_to_owned();
        let map = map.map_err(|error| format!("keep the map {} open: {error}", map_names::BLOCKS))?;
        let mut this = Self { map, slots, shards, mapped: Default::default() };
        this.map_device(OTHER_DEVICE)?;
        Ok(this)
    }

    /// Maps the records of all devices that are told apart.
    pub(super) fn follow(&mut self, devices: &Devices) -> Result<(), String> {
        (0..devices.told_apart()).try_for_each(|device| self.map_device(device))
    }

    fn map_device(&mut self, device: u32) -> Result<(), String> {
        let Some(mapped) = self.mapped.get_mut(device as usize).filter(|mapped| mapped.is_empty()) else {
            return Ok(());
        };
        let parts = (0..=self.shards).map(|part| {
            MappedArray::part(&self.map, block_range(part, device, self.slots))
                .map_err(|error| format!("map the records of block device {device} into memory: {error}"))
        });
        *mapped = parts.collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Whether anything of a device can be read.
    pub(super) fn has(&self, device: u32) -> bool {
        self.mapped.get(device as usize).is_some_and(|mapped| !mapped.is_empty())
    }

    fn shards_of(&self, operation: BlockOperation) -> u32 {
        match operation {
            BlockOperation::Read | BlockOperation::Write => self.shards,
            BlockOperation::Flush | BlockOperation::Discard => 1,
        }
    }

    /// A slot's records of a device and operation, one by one.
    pub(super) fn read(
        &self,
        slot: u32,
        device: u32,
        operation: BlockOperation,
    ) -> impl Iterator<Item = BlockRecord> {
        self.places(slot, device, operation).filter_map(|(of, place)| of.iter().find_map(|of| of.read(place)))
    }

    /// Their heads, added up.
    pub(super) fn head(&self, slot: u32, device: u32, operation: BlockOperation) -> Head {
        let all = self.places(slot, device, operation);
        let heads = all.filter_map(|(of, place)| of.iter().find_map(|of| of.words(place, [0, 1, 2, 3])));
        heads.fold(Head::default(), |sum, [bytes, not_split, device_sum_ns, queue_sum_ns]| Head {
            bytes: sum.bytes.wrapping_add(bytes),
            not_split: sum.not_split.wrapping_add(not_split),
            device_sum_ns: sum.device_sum_ns.wrapping_add(device_sum_ns),
            queue_sum_ns: sum.queue_sum_ns.wrapping_add(queue_sum_ns),
        })
    }

    fn places(
        &self,
        slot: u32,
        device: u32,
        operation: BlockOperation,
    ) -> impl Iterator<Item = (&[MappedArray<BlockRecord>], u32)> {
        let mapped = self.mapped.get(device as usize).map(Vec::as_slice).unwrap_or_default();
        (0..self.shards_of(operation))
            .map(move |shard| (mapped, block_index(shard, slot, self.slots, device, operation)))
    }
}
