//! What the kernel counts on disks, for those who make something of it.

use std::{collections::BTreeMap, sync::Arc};

use super::wiring::Wiring;
use crate::{
    pool::{Done, Inventory, Pool, Window},
    profile::Profile,
    units::UnixMillis,
};

/// Bytes of a sector, in /proc/diskstats.
const SECTOR: u64 = 512;

/// All that was done on each device since the kernel's start, by `major:minor`.
fn done() -> BTreeMap<String, Done> {
    let disks = procfs::diskstats().unwrap_or_default();
    let one = |disk: procfs::DiskStat| {
        let sectors = disk.sectors_read.saturating_add(disk.sectors_written);
        let done = Done {
            operations: disk.reads.saturating_add(disk.writes),
            bytes: sectors.saturating_mul(SECTOR),
        };
        (format!("{}:{}", disk.major, disk.minor), done)
    };
    disks.into_iter().map(one).collect()
}

impl Wiring {
    /// A window of the disks.
    pub(super) fn look_at_disks(
        &mut self,
        now: UnixMillis,
        profiles: &[Profile],
        apart: &[String],
        inventory: &Inventory,
    ) {
        let copying = self.is_moving();
        let parts = &self.parts;
        let volumes_on = |name: &_| parts.pools_of(name);
        let window = Window { now, done: done(), profiles, volumes_on: &volumes_on, apart, copying };
        self.disks.window(inventory, window);
    }

    /// Tells plans what it has seen.
    pub(super) fn tell_of_disks(&self, now: UnixMillis, inventory: &Inventory, pools: &mut [Pool]) {
        self.disks.lay_over(now, inventory, pools);
    }

    /// The look, as people are to see it.
    pub(super) fn shown(&self, now: UnixMillis, inventory: &Inventory) -> Arc<Inventory> {
        Arc::new(self.cores.show(now, self.disks.show(now, inventory)))
    }
}
