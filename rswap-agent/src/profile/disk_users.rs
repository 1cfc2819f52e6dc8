//! Who used the disks that an instance waited for.
//!
//! Nobody sees inside of a device for whom it works at a moment, and it may work for several. So what an instance waited is shared out by what the device did in the
//! window: whoever had a third of the time of all requests that the device had, had a third of the instance's requests' time. That is right for a device that serves one
//! request after the other, and too much for one that serves many at once.

use std::collections::{BTreeMap, HashMap};

use aya::maps::{HashMap as BpfHashMap, MapData};
use rswap_common::layout::MAX_DEVICES;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Profile,
    neighbours::{Who, by_rank},
    probes::Maps,
};

/// A cgroup that has used a device in none of so many windows is taken out of the programs' table.
const FORGET_AFTER: u32 = 60;

/// Who used a device while an instance waited for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceNeighbours {
    /// As in [`super::BlockProfile::device`].
    pub device: String,
    /// Time of all of the instance's own requests that ended in the window, in the queue and on the device, in nanoseconds.
    pub own_ns: u64,
    /// Others, who had most first.
    pub others: Vec<DiskNeighbour>,
}

/// Somebody who used a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskNeighbour {
    /// Who.
    #[serde(flatten)]
    pub who: Who,
    /// For how long the device had its requests, in nanoseconds over all of them: counted.
    pub device_ns: u64,
    /// How much of the instance's `own_ns` that was waited for: estimated by the share of `device_ns` in that of all.
    pub waited_ns: u64,
}

/// Use of a device by one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) device: String,
    pub(super) who: Who,
    pub(super) device_ns: u64,
}

/// A cgroup, a device's place, and how long the device worked for it, in nanoseconds.
type UseOf = (u64, u32, u64);

/// What the programs count of cgroups that are no instances.
pub(super) struct DiskUsers {
    map: BpfHashMap<MapData, [u64; 2], [u64; 2]>,
    seen: Seen,
    unknown_ns: [u64; MAX_DEVICES as usize],
}

impl DiskUsers {
    pub(super) fn new(map: BpfHashMap<MapData, [u64; 2], [u64; 2]>) -> Self {
        Self { map, seen: Seen::default(), unknown_ns: [0; MAX_DEVICES as usize] }
    }

    /// How many pairs of cgroup and device are known.
    pub(super) fn len(&self) -> usize {
        self.seen.0.len()
    }

    fn read(&mut self) -> Vec<UseOf> {
        let now: HashMap<_, _> = self.map.iter().flatten().map(|(user, [_, ns])| (user, ns)).collect();
        let (used, idle) = self.seen.since(&now);
        for user in idle {
            if let Err(error) = self.map.remove(&user) {
                tracing::debug!(%error, "a cgroup that uses no disk can't be forgotten");
            }
        }
        used
    }
}

/// By cgroup, device's place and time in nanoseconds, who used disks since this was called last; who nobody knows is cgroup 0.
pub(super) fn used(maps: &mut Maps) -> Vec<UseOf> {
    let mut used = maps.disk_users.read();
    let mut unknown = [0_u64; MAX_DEVICES as usize];
    for record in (0..maps.cpus).filter_map(|cpu| maps.unowned.read(cpu)) {
        for (sum, ns) in unknown.iter_mut().zip(record.unknown_ns) {
            *sum = sum.wrapping_add(ns);
        }
    }
    let before = std::mem::replace(&mut maps.disk_users.unknown_ns, unknown);
    for (device, (now, before)) in unknown.into_iter().zip(before).enumerate() {
        if now != before {
            used.push((0, device as u32, now.wrapping_sub(before)));
        }
    }
    used
}

/// Who had done how much when it was looked at last, and how many windows ago that was more.
#[derive(Debug, Default)]
struct Seen(HashMap<[u64; 2], (u64, u32)>);

impl Seen {
    /// What was done since, and who has done nothing for so long that it is forgotten.
    fn since(&mut self, now: &HashMap<[u64; 2], u64>) -> (Vec<UseOf>, Vec<[u64; 2]>) {
        let (mut used, mut idle) = (Vec::new(), Vec::new());
        self.0.retain(|user, _| now.contains_key(user));
        for (user, ns) in now {
            let (before, windows) = self.0.entry(*user).or_default();
            // One that was taken out of the table, and came back since, begins anew.
            let more = if ns >= before { ns - *before } else { *ns };
            *before = *ns;
            if more > 0 {
                *windows = 0;
                used.push((user[0], user[1] as u32, more));
            } else {
                *windows += 1;
                if *windows >= FORGET_AFTER {
                    idle.push(*user);
                }
            }
        }
        used.sort_unstable();
        (used, idle)
    }
}

/// Adds to each profile who used the disks that it waited for: other instances, and `used` by all else.
pub(super) fn add_neighbours(profiles: &mut [Profile], used: Vec<Used>) {
    let mut by_device: BTreeMap<String, BTreeMap<Who, u64>> = BTreeMap::new();
    let instances = profiles.iter().flat_map(|profile| {
        profile.block.iter().map(|block| Used {
            device: block.device.clone(),
            who: Who::Instance(profile.instance.clone()),
            device_ns: block.latency_ns.sum,
        })
    });
    for Used { device, who, device_ns } in instances.collect::<Vec<_>>().into_iter().chain(used) {
        *by_device.entry(device).or_default().entry(who).or_default() += device_ns;
    }
    for profile in profiles {
        let own = Who::Instance(profile.instance.clone());
        for (device, users) in &by_device {
            let of_device = profile.block.iter().filter(|block| block.device == *device);
            let own_ns: u64 = of_device.map(|block| block.latency_ns.sum + block.queue_ns.sum).sum();
            if own_ns == 0 {
                continue;
            }
            let all_ns: u64 = users.values().sum();
            let others = users.iter().filter(|(who, ns)| **who != own && **ns > 0);
            let others = others.map(|(who, &device_ns)| DiskNeighbour {
                who: who.clone(),
                device_ns,
                waited_ns: (own_ns as f64 * (device_ns as f64 / all_ns as f64)) as u64,
            });
            let others = by_rank(
                others.collect(),
                |of| of.device_ns,
                |rest| DiskNeighbour {
                    who: Who::Others,
                    device_ns: rest.iter().map(|of| of.device_ns).sum(),
                    waited_ns: rest.iter().map(|of| of.waited_ns).sum(),
                },
            );
            if !others.is_empty() {
                profile.disk_neighbours.push(DeviceNeighbours { device: device.clone(), own_ns, others });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        profile::{BlockProfile, CpuProfile, Operation, histogram::Histogram},
        units::UnixMillis,
    };

    fn profile(name: &str, device: &str, queue_ns: u64, device_ns: u64) -> Profile {
        let of = |ns| {
            let mut histogram = Histogram::default();
            histogram.record(ns);
            histogram
        };
        let block = BlockProfile {
            device: device.to_owned(),
            operation: Operation::Read,
            bytes: 4096,
            latency_ns: of(device_ns),
            queue_ns: of(queue_ns),
            not_split: 0,
            in_flight: 1.0,
        };
        Profile {
            instance: name.parse().unwrap(),
            at: UnixMillis(1),
            window_ms: 1000,
            cpu: CpuProfile::default(),
            block: vec![block],
            block_counted: true,
            disk_neighbours: Vec::new(),
            io: Default::default(),
            tcp: Default::default(),
            tcp_counted: false,
            memory: Default::default(),
        }
    }

    #[test]
    fn what_an_instance_waited_for_a_disk_is_shared_out_by_what_the_disk_did() {
        let mut profiles =
            [profile("a", "8:0", 50, 100), profile("b", "8:0", 0, 300), profile("c", "8:16", 7, 7)];
        let used = |device: &str, who, device_ns| Used { device: device.to_owned(), who, device_ns };
        let fio = Who::Cgroup("/fio".into());
        add_neighbours(
            &mut profiles,
            vec![used("8:0", fio.clone(), 500), used("8:0", Who::Unknown, 100), used("8:32", fio.clone(), 9)],
        );
        let shown = |profile: &Profile| {
            let other = |of: &DiskNeighbour| (of.who.clone(), of.device_ns, of.waited_ns);
            let device = |of: &DeviceNeighbours| (of.own_ns, of.others.iter().map(other).collect::<Vec<_>>());
            profile.disk_neighbours.iter().map(device).collect::<Vec<_>>()
        };
        let b = Who::Instance("b".parse().unwrap());
        // Of 1000 in all, on whose account 150 were waited.
        let expected = vec![(fio.clone(), 500, 75), (b, 300, 45), (Who::Unknown, 100, 15)];
        assert_eq!(shown(&profiles[0]), [(150, expected)]);
        assert_eq!(shown(&profiles[1])[0].1[0], (fio, 500, 150));
        assert_eq!(shown(&profiles[2]), [], "alone on its disk");
    }

    #[test]
    fn who_uses_no_disk_for_long_is_forgotten() {
        let mut seen = Seen::default();
        let now = HashMap::from([([7, 0], 100), ([8, 1], 5)]);
        assert_eq!(seen.since(&now), (vec![(7, 0, 100), (8, 1, 5)], vec![]));
        let mut forgotten = Vec::new();
        for window in 0..u64::from(FORGET_AFTER) {
            let (used, idle) = seen.since(&HashMap::from([([7, 0], 101 + window), ([8, 1], 5)]));
            assert_eq!(used, [(7, 0, 1)]);
            forgotten = idle;
        }
        assert_eq!(forgotten, [[8, 1]]);
        assert_eq!(seen.since(&HashMap::from([([7, 0], 200)])).0.len(), 1);
        // Taken out, and back with less than it had, before anybody looked.
        assert_eq!(seen.since(&HashMap::from([([7, 0], 30)])).0, [(7, 0, 30)]);
        assert_eq!(seen.0.len(), 1);
    }
}
