//! Discovery on directory trees that stand for machines.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use proptest::prelude::*;

use super::*;
use crate::{DeviceKind, Room};

const GIB: u64 = 1 << 30;

/// A directory tree that stands for a machine.
pub(crate) struct Machine(tempfile::TempDir);

impl Machine {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    pub(crate) fn write(&self, path: &str, text: &str) -> &Self {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn link(&self, from: &str, to: &str) -> &Self {
        let from = self.path(from);
        fs::create_dir_all(from.parent().unwrap()).unwrap();
        symlink(to, from).unwrap();
        self
    }

    pub(crate) fn discover(&self, settings: &Settings, at_ms: u64) -> Inventory {
        self.discover_with(settings, at_ms, &|_| Ok(half_full()))
    }

    pub(crate) fn discover_again(&self, settings: &Settings, at_ms: u64, before: &Inventory) -> Inventory {
        discover_again(&Root::at(self.0.path(), &|_| Ok(half_full())), settings, UnixMillis(at_ms), before)
    }

    pub(crate) fn discover_with(
        &self,
        settings: &Settings,
        at_ms: u64,
        room: &dyn Fn(&Path) -> io::Result<Room>,
    ) -> Inventory {
        discover(&Root::at(self.0.path(), room), settings, UnixMillis(at_ms))
    }
}

pub(crate) fn half_full() -> Room {
    Room {
        size_bytes: 100 * GIB,
        free_bytes: 50 * GIB,
        available_bytes: 45 * GIB,
        files: 1000,
        files_available: 900,
    }
}

pub(crate) fn wanted(name: &str, member: Member) -> Wanted {
    Wanted {
        name: name.to_owned(),
        key: "pool[0]".to_owned(),
        member,
        capacity: None,
        cost_per_hour: None,
        performance: None,
        operations_per_s: None,
        bytes_per_s: None,
        instance_rate: None,
        instance_cores: None,
        instance_weight: None,
    }
}

/// Two sockets with two cores of two threads, a far node without CPUs, an encrypted root on a partition, a CD's loop device,
/// zram and a bridge.
pub(crate) fn server() -> Machine {
    let machine = Machine::new();
    machine.write("/sys/devices/system/cpu/online", "0-3\n");
    for cpu in 0..4 {
        let dir = format!("/sys/devices/system/cpu/cpu{cpu}");
        let package = cpu / 2;
        machine.write(&format!("{dir}/cpu_capacity"), "1024\n");
        machine.write(&format!("{dir}/topology/core_id"), "0\n");
        machine.write(&format!("{dir}/topology/physical_package_id"), &format!("{package}\n"));
        machine.write(
            &format!("{dir}/topology/thread_siblings_list"),
            &format!("{}-{}\n", package * 2, package * 2 + 1),
        );
        machine.write(&format!("{dir}/cpufreq/cpuinfo_max_freq"), "3600000\n");
        machine.write(&format!("{dir}/cache/index3/level"), "3\n");
        machine.write(&format!("{dir}/cache/index3/type"), "Unified\n");
        machine.write(&format!("{dir}/cache/index3/size"), "32768K\n");
        machine.link(&format!("{dir}/node{package}"), &format!("../../node/node{package}"));
    }
    for (node, cpus) in [(0, "0-1"), (1, "2-3"), (2, "")] {
        let dir = format!("/sys/devices/system/node/node{node}");
        let meminfo = format!(
            "Node {node} MemTotal: 1048576 kB\nNode {node} MemFree: 524288 kB\nNode {node} FilePages: 1024 kB\n\
             Node {node} Shmem: 1000 kB\n"
        );
        machine.write(&format!("{dir}/meminfo"), &meminfo);
        machine.write(&format!("{dir}/cpulist"), &format!("{cpus}\n"));
        machine.write(&format!("{dir}/distance"), "10 21 30\n");
    }
    machine.write("/sys/devices/virtual/memory_tiering/memory_tier4/nodelist", "0-1\n");
    machine.write("/sys/devices/virtual/memory_tiering/memory_tier22/nodelist", "2\n");
    for (name, at, number, sectors) in [
        ("sda", "pci/block/sda", "8:0", "209715200"),
        ("sda1", "pci/block/sda/sda1", "8:1", "209713152"),
        ("dm-0", "virtual/block/dm-0", "252:0", "209713152"),
        ("loop0", "virtual/block/loop0", "7:0", "2048"),
        ("loop1", "virtual/block/loop1", "7:1", "0"),
    ] {
        machine.write(&format!("/sys/devices/{at}/dev"), &format!("{number}\n"));
        machine.write(&format!("/sys/devices/{at}/size"), &format!("{sectors}\n"));
        machine.link(&format!("/sys/class/block/{name}"), &format!("../../devices/{at}"));
    }
    machine.write("/sys/devices/pci/block/sda/sda1/partition", "1\n");
    machine.write("/sys/devices/pci/block/sda/queue/rotational", "0\n");
    machine.write("/sys/devices/pci/block/sda/queue/scheduler", "[none] mq-deadline\n");
    machine.write("/sys/devices/pci/block/sda/device/model", "FAST SSD        \n");
    machine.write("/sys/devices/virtual/block/dm-0/dm/name", "root\n");
    machine.write("/sys/devices/virtual/block/dm-0/slaves/sda1/dev", "8:1\n");
    machine.write("/sys/devices/virtual/block/loop0/loop/backing_file", "/images/cd.iso\n");
    machine.write(
        "/proc/self/mountinfo",
        "22 1 0:21 / /proc rw - proc proc rw\n\
         27 1 252:0 / / rw,relatime shared:1 - ext4 /dev/mapper/root rw\n\
         28 27 252:0 /srv/a /mnt/bound rw - ext4 /dev/mapper/root rw\n\
         29 27 7:0 / /mnt/a\\040cd ro - iso9660 /dev/loop0 ro\n\
         30 27 0:50 / /mnt/away rw - nfs4 server:/x rw,vers=4.2\n\
         31 27 0:51 / /tmp rw - tmpfs tmpfs rw\n\
         a line that is none\n",
    );
    machine.write(
        "/proc/swaps",
        "Filename Type Size Used Priority\n/dev/zram0 partition 1048576 1024 100\n/swap file 2048 2048 -2\n",
    );
    machine.write("/sys/block/zram0/mm_stat", " 1048576 262144 300000 0 300000 0 0 0 0\n");
    machine.write("/sys/block/zram0/comp_algorithm", "lzo [zstd] lz4\n");
    for (name, kind) in [("lo", 772), ("eth0", 1), ("br0", 1), ("vm1", 1)] {
        let dir = format!("/sys/class/net/{name}");
        machine.write(&format!("{dir}/type"), &format!("{kind}\n"));
        machine.write(&format!("{dir}/operstate"), "up\n");
        machine.write(&format!("{dir}/ifindex"), "4\n");
        machine.write(&format!("{dir}/iflink"), if name == "vm1" { "5\n" } else { "4\n" });
    }
    machine.write("/sys/class/net/eth0/speed", "25000\n");
    machine.write("/sys/class/net/eth0/device/vendor", "0x1\n");
    machine.write("/sys/class/net/br0/speed", "-1\n");
    machine.write("/sys/class/net/br0/uevent", "DEVTYPE=bridge\nINTERFACE=br0\n");
    machine.write("/sys/class/net/br0/brif/eth0/state", "3\n");
    machine.link("/sys/class/net/eth0/master", "../br0");
    machine.link("/sys/class/net/vm1/master", "../br0");
    machine.write("/sys/class/net/bonding_masters", "\n");
    machine
}

fn value(known: &Option<Known>) -> Option<f64> {
    known.as_ref().map(|known| known.value)
}

#[test]
fn a_server_is_found_as_it_is() {
    let found = server().discover(&Settings::default(), 1);
    let names: Vec<&str> = found.pools.iter().map(|pool| pool.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "cores",
            "memory-0",
            "memory-1",
            "memory-2",
            "swap:/dev/zram0",
            "swap:/swap",
            "fs:/mnt/away",
            "fs:/",
            "fs:/mnt/a cd",
            "link:br0",
            "link:eth0"
        ]
    );
    let LocalKind::Cores { cpus, cores, .. } = &found.pool("cores").unwrap().kind else { panic!() };
    assert_eq!((cpus.len(), cores.len(), &found.online), (4, 4, cpus));
    assert_eq!((cores[2].node, cores[2].package_id, cores[2].max_khz), (Some(1), Some(1), Some(3_600_000)));
    assert_eq!(cores[2].siblings, Some(CpuSet::from([2, 3])));
    assert_eq!(cores[2].caches[0].bytes, Some(32 << 20));

    let far = found.pool("memory-2").unwrap();
    let LocalKind::Memory { tier, cpus, distances, .. } = &far.kind else { panic!() };
    assert_eq!((*tier, cpus.len(), distances.as_slice()), (Some(22), 0, &[10, 21, 30][..]));
    assert_eq!(value(&far.free), Some(((524_288 + 24) << 10) as f64));
    assert_eq!(
        far.capacity.as_ref().unwrap().source,
        Source::found("/sys/devices/system/node/node2/meminfo")
    );

    let root = found.pool("fs:/").unwrap();
    let LocalKind::Storage { mount_points, fs_type, devices, .. } = &root.kind else { panic!() };
    assert_eq!(mount_points, &[PathBuf::from("/"), PathBuf::from("/mnt/bound")]);
    assert_eq!((fs_type.as_str(), devices.join(" ")), ("ext4", "dm-0 sda1 sda".to_owned()));
    assert_eq!((value(&root.used), value(&root.free)), (Some(50.0 * GIB as f64), Some(45.0 * GIB as f64)));
    let part = found.devices.iter().find(|device| device.name == "sda1").unwrap();
    assert_eq!(
        (part.what, part.rotational, part.scheduler.as_deref()),
        (DeviceKind::Partition, Some(false), Some("none"))
    );
    let disk = found.devices.iter().find(|device| device.name == "sda").unwrap();
    assert_eq!((disk.model.as_deref(), disk.bytes), (Some("FAST SSD"), Some(100 * GIB)));
    assert!(found.devices.iter().all(|device| device.name != "loop1"), "it has no file");
    assert!(matches!(found.pool("fs:/mnt/a cd").unwrap().state, State::Degraded { .. }), "read-only");
    assert_eq!(value(&found.pool("fs:/mnt/away").unwrap().capacity), None, "not asked for");

    let zram = found.pool("swap:/dev/zram0").unwrap();
    let LocalKind::Swap { what, compression, memory_bytes, .. } = &zram.kind else { panic!() };
    assert_eq!((what.as_str(), compression.as_deref(), *memory_bytes), ("zram", Some("zstd"), Some(300_000)));
    assert!(matches!(found.pool("swap:/swap").unwrap().state, State::Full { .. }));

    let (eth, bridge) = (found.pool("link:eth0").unwrap(), found.pool("link:br0").unwrap());
    assert_eq!((value(&eth.capacity), value(&bridge.capacity)), (Some(25e9), None));
    let LocalKind::Link { what, members, .. } = &bridge.kind else { panic!() };
    assert_eq!((what.as_str(), members.join(" ")), ("bridge", "eth0".to_owned()));
}

#[test]
fn a_machine_that_says_nothing_is_unknown() {
    let found = Machine::new().discover(&Settings::default(), 1);
    assert_eq!(found.pools.len(), 1, "cores, by what this process may use: {found:?}");
    assert!(found.devices.is_empty());
    // A kernel without nodes.
    let machine = Machine::new();
    machine.write("/proc/meminfo", "MemTotal: 8 kB\nMemAvailable: 4 kB\n");
    let memory = machine.discover(&Settings::default(), 1).pool("memory").unwrap().clone();
    assert_eq!((value(&memory.capacity), value(&memory.used)), (Some(8192.0), Some(4096.0)));
}

#[test]
fn the_configuration_wins() {
    let mut data = wanted("data", Member::Storage("/mnt/bound".into()));
    data.capacity = Some(60.0 * GIB as f64);
    data.cost_per_hour = Some(0.25);
    let mut up = wanted("up", Member::Link("br0".into()));
    up.capacity = Some(1e10);
    let mut small = wanted("small", Member::Nodes(CpuSet::from([0, 9])));
    small.cost_per_hour = Some(0.5);
    let pools = vec![
        data,
        up,
        small,
        wanted("cores-a", Member::Cpus(CpuSet::from([0, 7]))),
        wanted("lost", Member::Storage("/lost".into())),
        wanted("eth9", Member::Link("eth9".into())),
        wanted("swap", Member::Swap("/dev/sdz".into())),
    ];
    let found = server().discover(&Settings { pools, ..Settings::default() }, 1);
    let data = found.pool("data").unwrap();
    assert_eq!(
        (value(&data.capacity), value(&data.free)),
        (Some(60.0 * GIB as f64), Some(10.0 * GIB as f64))
    );
    assert_eq!(data.cost_per_hour.as_ref().unwrap().source, Source::configured("pool[0].cost_per_gib_hour"));
    assert_eq!(data.capacity.as_ref().unwrap().source, Source::configured("pool[0].capacity_gib"));
    assert!(found.pool("fs:/").is_none(), "it is called data");
    assert_eq!(value(&found.pool("up").unwrap().capacity), Some(1e10));
    let words: Vec<_> = ["small", "cores-a", "lost", "eth9", "swap"]
        .map(|name| found.pool(name).unwrap().state.word())
        .into();
    assert_eq!(words, ["degraded", "degraded", "gone", "gone", "gone"]);
    assert!(
        found.pool("cores").is_none() && found.pool("memory-0").is_none() && found.pool("memory-1").is_some()
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the kernel's files say, an answer comes, and it can be written and read.
    #[test]
    fn no_text_makes_it_panic(texts in proptest::collection::vec("[\\x00-\\xff]{0,80}", 14)) {
        let machine = server();
        let files = [
            "/sys/devices/system/cpu/online", "/sys/devices/system/cpu/cpu0/cpu_capacity",
            "/sys/devices/system/cpu/cpu1/cache/index3/size", "/sys/devices/system/node/node0/meminfo",
            "/sys/devices/system/node/node0/distance", "/sys/devices/virtual/memory_tiering/memory_tier4/nodelist",
            "/proc/self/mountinfo", "/proc/swaps", "/proc/diskstats", "/proc/stat", "/sys/class/net/eth0/speed",
            "/sys/class/net/eth0/operstate", "/sys/block/zram0/mm_stat", "/sys/devices/pci/block/sda/size",
        ];
        for (file, text) in files.iter().zip(&texts) {
            machine.write(file, text);
        }
        let found = machine.discover(&Settings::default(), 1);
        let found = crate::follow(&server().discover(&Settings::default(), 0), found, &Settings::default());
        let text = serde_json::to_string(&found).unwrap();
        let _: Inventory = serde_json::from_str(&text).unwrap();
    }
}
