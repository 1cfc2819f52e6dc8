//! What the disks of storage pools do: for whom, and how fast. Pure: counters come in.
//!
//! ```text
//!   /proc/diskstats, all of it ---less what instances with volumes there did---> what others use: the least of some windows
//!   histograms of all instances, at the load of all ---> what requests take, by load (rswap_pools::experience)
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rswap_pools::{
    Measure, RELATIVE_SPEED, Source,
    calibrate::fingerprint,
    experience::{Experience, Requests, Unloaded},
};
use rswap_types::{LatencyCurve, LatencyPoint};

use super::{Flow, Inventory, Known, LocalKind, LocalPool, Pool, PoolKind};
use crate::{
    instance::InstanceName,
    profile::{BlockProfile, OTHER_DEVICE, Operation, Profile},
    units::UnixMillis,
};

/// What others use of a link or a disk is the least that it was in so many windows: a peak of theirs is no reason to move, and not
/// all is counted in the same moment.
pub const OTHERS_WINDOWS: usize = 16;

const DISKSTATS: &str = "/proc/diskstats";

/// What was done on a device since the kernel's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Reads and writes.
    pub operations: u64,
    /// Of both together.
    pub bytes: u64,
}

/// What was read and written on these devices in a window; `apart` are all devices that are told apart.
pub fn done_on(block: &[BlockProfile], numbers: &BTreeSet<String>, apart: &[String], window_ms: u64) -> Flow {
    let unknown = !numbers.iter().any(|number| apart.contains(number));
    let counts =
        |block: &&BlockProfile| numbers.contains(&block.device) || unknown && block.device == OTHER_DEVICE;
    let seconds = window_ms.max(1) as f64 / 1e3;
    block.iter().filter(|block| block.operation.moves_data()).filter(counts).fold(
        Flow::default(),
        |sum, block| {
            sum.plus(Flow {
                operations_per_s: block.latency_ns.count as f64 / seconds,
                bytes_per_s: block.bytes as f64 / seconds,
            })
        },
    )
}

/// The disks (those of `devices` that lie on no other) that a storage pool lies on in the end.
pub fn disks_of<'i>(
    inventory: &'i Inventory,
    pool: &LocalPool,
) -> impl Iterator<Item = &'i rswap_pools::Device> {
    let names: BTreeSet<String> = match &pool.kind {
        LocalKind::Storage { devices, .. } => devices.iter().cloned().collect(),
        _ => BTreeSet::new(),
    };
    inventory.devices.iter().filter(move |device| device.on.is_empty() && names.contains(&device.name))
}

/// One window, as the disks are to see it.
pub struct Window<'w> {
    /// Its end.
    pub now: UnixMillis,
    /// All that was done on each device, by `major:minor`.
    pub done: BTreeMap<String, Done>,
    /// What instances did.
    pub profiles: &'w [Profile],
    /// The storage pools that an instance's volumes lie on.
    pub volumes_on: &'w dyn Fn(&InstanceName) -> Vec<&'w str>,
    /// Devices that are told apart, by `major:minor`.
    pub apart: &'w [String],
    /// Volumes are being copied: what the disks do for that is nobody's need.
    pub copying: bool,
}

/// One storage pool.
#[derive(Debug, Default)]
struct Of {
    /// Of another device under the same name nothing is known.
    fingerprint: String,
    experience: Experience,
    /// In the last windows; newest last.
    others: VecDeque<Flow>,
    /// Of everybody, in the last window.
    load: Option<Flow>,
    /// When requests of instances were last counted.
    experienced_at: UnixMillis,
}

impl Of {
    fn others(&self) -> Flow {
        self.others.iter().copied().reduce(Flow::least).unwrap_or_default()
    }
}

/// Follows the disks of all storage pools.
#[derive(Debug, Default)]
pub struct Disks {
    before: Option<(UnixMillis, BTreeMap<String, Done>)>,
    of: BTreeMap<String, Of>,
}

impl Disks {
    /// Takes in a window.
    pub fn window(&mut self, inventory: &Inventory, window: Window<'_>) {
        let elapsed_ms = self.before.as_ref().map(|(before, _)| window.now.since(*before));
        let elapsed_ms = elapsed_ms.filter(|ms| *ms > 0);
        let storage = || inventory.pools.iter().filter(|pool| matches!(pool.kind, LocalKind::Storage { .. }));
        let numbers = |pool: &LocalPool| -> BTreeSet<String> {
            disks_of(inventory, pool).filter_map(|device| device.number.clone()).collect()
        };
        let by_pool: BTreeMap<&str, BTreeSet<String>> =
            storage().map(|pool| (pool.name.as_str(), numbers(pool))).collect();
        self.of.retain(|name, _| by_pool.contains_key(name.as_str()));
        for pool in storage() {
            let own = &by_pool[pool.name.as_str()];
            let of = self.of.entry(pool.name.clone()).or_default();
            let print = fingerprint(pool);
            if of.fingerprint != print {
                *of = Of { fingerprint: print, ..Of::default() };
            }
            let since = self.before.as_ref().zip(elapsed_ms);
            of.load = since.and_then(|((_, before), ms)| rate(before, &window.done, own, ms));
            let shares = |name: &str| by_pool.get(name).is_some_and(|disks| !disks.is_disjoint(own));
            let has_volume =
                |profile: &&Profile| (window.volumes_on)(&profile.instance).into_iter().any(shares);
            if let Some((load, ms)) = of.load.zip(elapsed_ms).filter(|_| !window.copying) {
                let of_volumes = window.profiles.iter().filter(has_volume);
                let used = of_volumes
                    .map(|profile| done_on(&profile.block, own, window.apart, ms))
                    .fold(Flow::default(), Flow::plus);
                if of.others.len() == OTHERS_WINDOWS {
                    of.others.pop_front();
                }
                of.others.push_back(load.less(used));
            }
            of.learn(pool, own, &window);
        }
        self.before = Some((window.now, window.done));
    }

    /// Tells plans what others use of storage, and what requests take there. A configured speed wins.
    pub fn lay_over(&self, now: UnixMillis, inventory: &Inventory, pools: &mut [Pool]) {
        let reference_us = self.reference_us(now, inventory);
        for pool in pools {
            let Some(found) = inventory.pool(&pool.name) else { continue };
            let PoolKind::Storage { foreign, latency, .. } = &mut pool.kind else { continue };
            let of = self.of.get(&pool.name);
            *foreign = of.map_or(Flow::default(), Of::others);
            let points = match of {
                _ if is_configured(found) => Vec::new(),
                Some(of) => of.experience.curve(now),
                None => Vec::new(),
            };
            *latency = LatencyCurve { reference_us, points };
        }
    }

    /// `inventory`, with what is known of its storage from experience.
    pub fn show(&self, now: UnixMillis, inventory: &Inventory) -> Inventory {
        let reference_us = self.reference_us(now, inventory);
        let mut shown = inventory.clone();
        for pool in &mut shown.pools {
            let Some(of) = self.of.get(&pool.name) else { continue };
            let mut tell = |what: &str, value: f64, source: Source| {
                let known = Known { value, source };
                pool.performance.push(Measure { what: what.to_owned(), known });
            };
            if let Some(load) = of.load {
                tell("load_operations_per_s", load.operations_per_s, Source::found(DISKSTATS));
                tell("others_operations_per_s", of.others().operations_per_s, Source::found(DISKSTATS));
                tell("others_bytes_per_s", of.others().bytes_per_s, Source::found(DISKSTATS));
            }
            let load = of.load.map_or(0.0, |load| load.operations_per_s);
            let curve = LatencyCurve { reference_us, points: of.experience.curve(now) };
            let Some(point) = curve.at(load).filter(LatencyPoint::is_experienced) else { continue };
            let source = || Source::Experienced { at: of.experienced_at, requests: point.requests as u64 };
            tell("latency_p50_us", point.p50_us, source());
            tell("latency_p99_us", point.p99_us, source());
            if let Some(speed) = curve.speed_at(load).filter(|_| !is_configured(pool)) {
                let known = Known { value: speed, source: source() };
                pool.performance.push(Measure { what: RELATIVE_SPEED.to_owned(), known });
            }
        }
        shown
    }

    /// What a request takes on the fastest storage without load: as calibrated, else the least that was experienced.
    fn reference_us(&self, now: UnixMillis, inventory: &Inventory) -> f64 {
        let calibrated = inventory.pools.iter().filter_map(LocalPool::latency_us).reduce(f64::min);
        let seen = || self.of.values().flat_map(|of| of.experience.curve(now)).map(|point| point.p50_us);
        calibrated.or_else(|| seen().reduce(f64::min)).unwrap_or(0.0)
    }
}

impl Of {
    fn learn(&mut self, pool: &LocalPool, numbers: &BTreeSet<String>, window: &Window<'_>) {
        // What is counted for all devices that are not told apart may be another one's.
        let here = |block: &&BlockProfile| block.operation.moves_data() && numbers.contains(&block.device);
        let blocks = window.profiles.iter().flat_map(|profile| &profile.block).filter(here);
        let requests: Vec<Requests<'_>> = blocks
            .map(|block| Requests {
                writes: block.operation == Operation::Write,
                bytes: block.bytes,
                latency_ns: &block.latency_ns.buckets,
            })
            .collect();
        // Without a load there is nothing to learn for.
        let load = self.load.map(|load| load.operations_per_s).filter(|_| !requests.is_empty());
        let requests: &[Requests<'_>] = if load.is_some() { &requests } else { &[] };
        if load.is_some() {
            self.experienced_at = window.now;
        }
        self.experience.window(window.now, Unloaded::of(pool), load.unwrap_or(0.0), requests);
    }
}

/// Whether a person has said how fast it is.
fn is_configured(pool: &LocalPool) -> bool {
    let said = pool.performance.iter().filter(|measure| measure.what == RELATIVE_SPEED);
    said.into_iter().any(|measure| matches!(measure.known.source, Source::Configured { .. }))
}

/// What was done on these devices between two readings; `None` where one of them is not counted.
fn rate(
    before: &BTreeMap<String, Done>,
    now: &BTreeMap<String, Done>,
    numbers: &BTreeSet<String>,
    elapsed_ms: u64,
) -> Option<Flow> {
    let per_s = 1e3 / elapsed_ms as f64;
    let mut all = Flow::default();
    for number in numbers {
        let (before, now) = (before.get(number)?, now.get(number)?);
        all = all.plus(Flow {
            operations_per_s: now.operations.checked_sub(before.operations)? as f64 * per_s,
            bytes_per_s: now.bytes.checked_sub(before.bytes)? as f64 * per_s,
        });
    }
    (!numbers.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests;
