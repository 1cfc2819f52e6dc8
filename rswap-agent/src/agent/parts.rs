//! What volumes and ports do, as the forecast takes it in and plans see it.
//!
//! A volume's I/O is what the instance has on the devices below the file system that the volume lies on. So what else it does on the
//! same disk counts as the volume's, and volumes on one disk are not told apart. Where the `io` controller is off, what the kernel
//! writes back by itself is nobody's: then reads, and writes that the program waits for (fsync, direct I/O), are all that is seen.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
};

use crate::{
    config::{Config, PoolKindConfig},
    instance::{InstanceName, network},
    plan::{PortView, VolumeView},
    pool::{Flow, Inventory, LocalKind, OTHERS_WINDOWS, Pool, PoolKind, done_on},
    profile::Profile,
};

/// Of a peak, so much is remembered from window to window.
const REMEMBERED: f64 = 0.995;
/// Sizes are looked up anew every so many windows.
const SIZES_EVERY_WINDOWS: u64 = 64;
/// Bytes of a block, in stat(2).
const STAT_BLOCK: u64 = 512;

/// A storage pool that volumes can be put on.
#[derive(Clone, Debug)]
struct Disk {
    pool: String,
    /// Where volumes are put.
    volumes: PathBuf,
    /// `st_dev` of that.
    device: Option<u64>,
    /// `major:minor` of what its I/O is counted on.
    numbers: BTreeSet<String>,
}

/// The disks of storage pools that the configuration gives volumes to.
fn disks(config: &Config, inventory: &Inventory) -> Vec<Disk> {
    let of = |wanted: &crate::config::PoolConfig| {
        let PoolKindConfig::Local {
            volumes: Some(volumes), member: rswap_pools::Member::Storage(at), ..
        } = &wanted.kind
        else {
            return None;
        };
        let LocalKind::Storage { devices, .. } = &inventory.pool(&wanted.name)?.kind else { return None };
        let numbers = inventory.devices.iter().filter(|device| devices.contains(&device.name));
        Some(Disk {
            pool: wanted.name.clone(),
            volumes: volumes.clone(),
            device: fs::metadata(at).ok().map(|found| found.dev()),
            numbers: numbers.filter_map(|device| device.number.clone()).collect(),
        })
    };
    config.pools.iter().filter_map(of).collect()
}

/// The disk that a volume's directory is on.
fn disk_of<'d>(disks: &'d [Disk], directory: &Path) -> Option<&'d Disk> {
    let put_there = disks.iter().find(|disk| directory.starts_with(&disk.volumes));
    put_there.or_else(|| {
        let device = fs::metadata(directory).ok()?.dev();
        disks.iter().find(|disk| disk.device == Some(device))
    })
}

/// What a part did in the last window, and at most of late.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    now: Flow,
    peak: f64,
}

impl Seen {
    fn window(&mut self, now: Flow) {
        self.now = now;
        self.peak = (self.peak * REMEMBERED).max(now.operations_per_s);
    }
}

/// An instance's parts.
#[derive(Debug, Default)]
struct Of {
    /// By volume: where it lies, and what it did. `None` = on no pool.
    volumes: BTreeMap<InstanceName, (Option<String>, PathBuf, Seen)>,
    all: Seen,
    port: Option<Port>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Port {
    received: u64,
    sent: u64,
    now: Option<f64>,
    peak: f64,
}

/// Follows the parts of all instances.
pub(super) struct Parts {
    of: BTreeMap<InstanceName, Of>,
    sizes: Sizes,
    /// Bytes per second of others than instances, by link, in the last windows.
    others: BTreeMap<String, VecDeque<f64>>,
    windows: u64,
}

/// What an instance's parts did in a window; `None` is what it has none of, or what was not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct PartsUsage {
    /// On all devices of its volumes.
    pub(super) volumes: Option<Flow>,
    /// Through its port, in the fuller direction.
    pub(super) port_bytes_per_s: Option<f64>,
}

impl Parts {
    pub(super) fn new() -> Self {
        Self { of: BTreeMap::new(), sizes: Sizes::start(), others: BTreeMap::new(), windows: 0 }
    }

    /// A window begins: those that are not `present` are forgotten, and sizes are looked up now and then.
    pub(super) fn begin_window(&mut self, present: impl Fn(&InstanceName) -> bool) {
        self.of.retain(|name, _| present(name));
        let volumes = || self.of.values().flat_map(|of| of.volumes.values()).map(|(_, at, _)| at);
        let again = self.windows.is_multiple_of(SIZES_EVERY_WINDOWS);
        if again || volumes().any(|directory| self.sizes.of(directory).is_none()) {
            self.sizes.look(volumes().cloned().collect());
        }
        self.windows += 1;
    }

    /// Takes in a window of an instance, whose volumes are in these directories.
    pub(super) fn window(
        &mut self,
        profile: &Profile,
        directories: &BTreeMap<InstanceName, PathBuf>,
        has_port: bool,
        apart: &[String],
        config: &Config,
        inventory: &Inventory,
    ) -> PartsUsage {
        let of = self.of.entry(profile.instance.clone()).or_default();
        let mut usage = PartsUsage::default();
        let disks = if directories.is_empty() { Vec::new() } else { disks(config, inventory) };
        of.volumes.retain(|name, _| directories.contains_key(name));
        let mut numbers = BTreeSet::new();
        for (name, directory) in directories {
            let disk = disk_of(&disks, directory);
            let (pool, at, seen) = of.volumes.entry(name.clone()).or_default();
            (*pool, *at) = (disk.map(|disk| disk.pool.clone()), directory.clone());
            let own = disk.map(|disk| done_on(&profile.block, &disk.numbers, apart, profile.window_ms));
            seen.window(own.unwrap_or_default());
            numbers.extend(disk.iter().flat_map(|disk| disk.numbers.iter().cloned()));
        }
        if !numbers.is_empty() && profile.block_counted {
            let all = done_on(&profile.block, &numbers, apart, profile.window_ms);
            of.all.window(all);
            usage.volumes = Some(all);
        }
        if has_port {
            usage.port_bytes_per_s =
                of.port.get_or_insert_default().window(&profile.instance, profile.window_ms);
        } else {
            of.port = None;
        }
        usage
    }

    /// The volumes whose size is known, as plans see them.
    pub(super) fn volumes(&self, instance: &InstanceName) -> Vec<VolumeView> {
        let Some(of) = self.of.get(instance) else { return Vec::new() };
        let views = of.volumes.iter().filter_map(|(name, (pool, directory, seen))| {
            let share = if of.all.peak > 0.0 { (seen.peak / of.all.peak).min(1.0) } else { 1.0 };
            Some(VolumeView {
                name: name.to_string(),
                pool: pool.clone(),
                size_bytes: self.sizes.of(directory)?,
                share: if of.volumes.len() > 1 { share } else { 1.0 },
                now: seen.now,
            })
        });
        views.collect()
    }

    /// The storage pools that its volumes lie on.
    pub(super) fn pools_of(&self, instance: &InstanceName) -> Vec<&str> {
        let volumes = self.of.get(instance).into_iter().flat_map(|of| of.volumes.values());
        volumes.filter_map(|(pool, ..)| pool.as_deref()).collect()
    }

    /// Of what is used of links, leaves what others than instances use; `on` are those who are on a link.
    pub(super) fn leave_others(&mut self, pools: &mut [Pool], on: &[(InstanceName, String)]) {
        for pool in pools {
            let PoolKind::Link { foreign, .. } = &mut pool.kind else { continue };
            let here = on.iter().filter(|(_, link)| *link == pool.name);
            let ports = here.filter_map(|(name, _)| self.of.get(name)?.port);
            let own: f64 = ports.map(|port| port.peak).sum();
            let windows = self.others.entry(pool.name.clone()).or_default();
            if windows.len() == OTHERS_WINDOWS {
                windows.pop_front();
            }
            windows.push_back((foreign.bytes_per_s - own).max(0.0));
            foreign.bytes_per_s = windows.iter().copied().fold(f64::INFINITY, f64::min);
        }
    }

    /// The port, as plans see it, on the link of this name.
    pub(super) fn port(&self, instance: &InstanceName, pool: Option<String>) -> Option<PortView> {
        let bytes_per_s = self.of.get(instance)?.port?.now?;
        let now = Flow { operations_per_s: 0.0, bytes_per_s };
        Some(PortView { pool, now })
    }
}

impl Port {
    /// The host's end of the pair counts what the instance sends as received.
    fn window(&mut self, instance: &InstanceName, window_ms: u64) -> Option<f64> {
        let (received, sent) = network::counters(instance)?;
        let before = std::mem::replace(self, Self { received, sent, now: None, peak: self.peak });
        // Before the first window, and where a port was made anew, there is nothing to compare with.
        let known = before.received > 0 && received >= before.received && sent >= before.sent;
        let bytes = (received.saturating_sub(before.received)).max(sent.saturating_sub(before.sent));
        self.now = known.then(|| bytes as f64 * 1e3 / window_ms.max(1) as f64);
        self.peak = (self.peak * REMEMBERED).max(self.now.unwrap_or(0.0));
        self.now
    }
}

/// Sizes of directories, looked up on a thread of its own: there may be many files in one.
struct Sizes {
    known: Arc<Mutex<BTreeMap<PathBuf, u64>>>,
    ask: mpsc::SyncSender<Vec<PathBuf>>,
}

impl Sizes {
    fn start() -> Self {
        let known = Arc::new(Mutex::new(BTreeMap::new()));
        let (ask, asked) = mpsc::sync_channel::<Vec<PathBuf>>(1);
        let shared = known.clone();
        std::thread::spawn(move || {
            while let Ok(directories) = asked.recv() {
                let found = directories.into_iter().map(|directory| {
                    let bytes = bytes_below(&directory);
                    (directory, bytes)
                });
                let found = found.collect();
                *shared.lock().unwrap_or_else(PoisonError::into_inner) = found;
            }
        });
        Self { known, ask }
    }

    /// Looks them up; if it is still at it, another time.
    fn look(&self, directories: Vec<PathBuf>) {
        drop(self.ask.try_send(directories));
    }

    fn of(&self, directory: &Path) -> Option<u64> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(directory).copied()
    }
}

/// What the files below a directory take. What vanishes meanwhile takes nothing.
fn bytes_below(directory: &Path) -> u64 {
    let mut bytes = 0;
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else { continue };
            bytes += found.blocks() * STAT_BLOCK;
            if found.is_dir() {
                left.push(entry.path());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_directory_is_added_up() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("deep")).unwrap();
        fs::write(directory.path().join("deep/file"), vec![7u8; 100_000]).unwrap();
        let bytes = bytes_below(directory.path());
        assert!((100_000..200_000).contains(&bytes), "{bytes}");
        assert_eq!(bytes_below(Path::new("/nonexistent")), 0);
    }

    #[test]
    fn of_a_link_others_use_what_instances_do_not() {
        let mut parts = Parts::new();
        let a: InstanceName = "a".parse().unwrap();
        let port = Port { received: 1, sent: 1, now: Some(1e6), peak: 3e6 };
        parts.of.insert(a.clone(), Of { port: Some(port), ..Of::default() });
        let link = |used: f64| Pool {
            name: "eth1".into(),
            kind: PoolKind::Link {
                gives: None,
                instance_bytes_per_s: None,
                foreign: Flow { operations_per_s: 0.0, bytes_per_s: used },
                cost_per_gbit_hour: 0.0,
            },
            capacity: Default::default(),
            used: Default::default(),
            cost_per_core_hour: 0.0,
            cost_per_gib_hour: 0.0,
            performance: 1.0,
            state: crate::pool::PoolState::Ready,
        };
        let mut others = |used: f64, on: &str| {
            let mut pools = [link(used)];
            parts.leave_others(&mut pools, &[(a.clone(), on.to_owned())]);
            let PoolKind::Link { foreign, .. } = pools[0].kind else { unreachable!() };
            foreign.bytes_per_s
        };
        assert_eq!(others(5e6, "eth1"), 2e6);
        // What is left of a look that is older than the window is nobody's.
        assert_eq!(others(2e6, "eth1"), 0.0);
        for _ in 0..OTHERS_WINDOWS {
            others(7e6, "eth2");
        }
        assert_eq!(others(7e6, "eth2"), 7e6);
    }

    #[test]
    fn a_peak_is_remembered_for_a_while() {
        let mut seen = Seen::default();
        let flow = |operations_per_s| Flow { operations_per_s, bytes_per_s: 0.0 };
        seen.window(flow(100.0));
        seen.window(flow(10.0));
        assert!(seen.peak > 99.0 && seen.now == flow(10.0), "{seen:?}");
        (0..2_000).for_each(|_| seen.window(flow(10.0)));
        assert!((seen.peak - 10.0).abs() < 1e-9, "{seen:?}");
    }
}
