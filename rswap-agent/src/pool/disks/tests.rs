use super::*;
use crate::{
    pool::{PoolState, State},
    profile::{CpuProfile, MemoryProfile, TcpProfile, histogram::Histogram},
};

fn block(device: &str, operation: Operation, requests: u32, bytes: u64) -> BlockProfile {
    let mut latency_ns = Histogram::default();
    (0..requests).for_each(|_| latency_ns.record(1_000));
    BlockProfile {
        device: device.to_owned(),
        operation,
        bytes,
        latency_ns,
        queue_ns: Histogram::default(),
        not_split: 0,
        in_flight: 0.0,
    }
}

#[test]
fn only_what_is_on_the_volumes_device_counts_and_both_ways_do() {
    let blocks = [
        block("7:0", Operation::Write, 10, 40_960),
        block("7:0", Operation::Read, 5, 20_480),
        block("254:0", Operation::Read, 100, 1 << 20),
        block(OTHER_DEVICE, Operation::Write, 3, 12_288),
    ];
    let apart = ["7:0".to_owned(), "254:0".to_owned()];
    let on = |device: &str| done_on(&blocks, &BTreeSet::from([device.to_owned()]), &apart, 500);
    assert_eq!(on("7:0"), Flow { operations_per_s: 30.0, bytes_per_s: 122_880.0 });
    // A device that is not told apart may be any of the others.
    assert_eq!(on("7:9"), Flow { operations_per_s: 6.0, bytes_per_s: 24_576.0 });
}

/// Two pools on partitions of one disk, and one on another.
fn inventory(speed: Option<Source>) -> Inventory {
    let device = |name: &str, number: &str, on: &[&str]| rswap_pools::Device {
        name: name.to_owned(),
        what: rswap_pools::DeviceKind::Disk,
        number: Some(number.to_owned()),
        bytes: Some(1 << 30),
        rotational: None,
        model: None,
        scheduler: None,
        read_only: None,
        on: on.iter().map(|name| (*name).to_owned()).collect(),
        file: None,
        mapper_name: None,
        missing: None,
    };
    let measure = |what: &str, value: f64, source: Source| Measure {
        what: what.to_owned(),
        known: Known { value, source },
    };
    let pool = |name: &str, devices: &[&str]| {
        let measured = || Source::Measured { at: UnixMillis(1) };
        let mut performance = vec![
            measure("read_latency_p50_us", 100.0, measured()),
            measure("write_latency_p50_us", 100.0, measured()),
        ];
        performance.extend(speed.clone().map(|source| measure(RELATIVE_SPEED, 0.7, source)));
        LocalPool {
            name: name.to_owned(),
            kind: LocalKind::Storage {
                mount_points: Vec::new(),
                fs_type: "ext4".to_owned(),
                mounted: format!("/dev/{}", devices[0]),
                devices: devices.iter().map(|name| (*name).to_owned()).collect(),
                remote: false,
            },
            capacity: None,
            used: None,
            free: None,
            cost_per_hour: None,
            busy: None,
            performance,
            state: State::Online,
        }
    };
    let mut inventory = Inventory::default();
    inventory.devices = vec![
        device("sda", "8:0", &[]),
        device("sda1", "8:1", &["sda"]),
        device("sda2", "8:2", &["sda"]),
        device("sdb", "8:16", &[]),
    ];
    inventory.pools =
        vec![pool("root", &["sda1", "sda"]), pool("data", &["sda2", "sda"]), pool("other", &["sdb"])];
    inventory
}

fn profile(name: &str, block: Vec<BlockProfile>) -> Profile {
    Profile {
        instance: name.parse().unwrap(),
        at: UnixMillis(0),
        window_ms: 1000,
        cpu: CpuProfile::default(),
        block,
        block_counted: true,
        disk_neighbours: Vec::new(),
        io: Default::default(),
        tcp: TcpProfile::default(),
        tcp_counted: true,
        memory: MemoryProfile::default(),
    }
}

fn planned(name: &str) -> Pool {
    Pool {
        name: name.into(),
        kind: PoolKind::Storage {
            size_bytes: 0,
            free_bytes: 0,
            gives: None,
            disks: BTreeSet::new(),
            foreign: Flow::default(),
            latency: LatencyCurve::default(),
        },
        capacity: Default::default(),
        used: Default::default(),
        cost_per_core_hour: 0.0,
        cost_per_gib_hour: 0.0,
        performance: 1.0,
        state: PoolState::Ready,
    }
}

struct Scene {
    disks: Disks,
    inventory: Inventory,
    now: u64,
    on_sda: Done,
}

impl Scene {
    fn new(speed: Option<Source>) -> Self {
        Self { disks: Disks::default(), inventory: inventory(speed), now: 0, on_sda: Done::default() }
    }

    /// A second: the disk does so many requests of 4 KiB in all, of which instance `a` writes so many, of `us` each.
    fn second(&mut self, all: u64, of_a: u32, us: u64, a_is_on: &str, copying: bool) {
        self.now += 1000;
        self.on_sda.operations += all;
        self.on_sda.bytes += all * 4096;
        let mut latency_ns = Histogram::default();
        (0..of_a).for_each(|_| latency_ns.record(us * 1000));
        let own = BlockProfile {
            device: "8:0".to_owned(),
            operation: Operation::Write,
            bytes: u64::from(of_a) * 4096,
            latency_ns,
            queue_ns: Histogram::default(),
            not_split: 0,
            in_flight: 0.0,
        };
        let profiles = [profile("a", vec![own])];
        let done = [("8:0", self.on_sda), ("8:16", Done::default())];
        let window = Window {
            now: UnixMillis(self.now),
            done: done.map(|(number, done)| (number.to_owned(), done)).into(),
            profiles: &profiles,
            volumes_on: &|_| vec![a_is_on],
            apart: &["8:0".to_owned(), "8:16".to_owned()],
            copying,
        };
        self.disks.window(&self.inventory, window);
    }

    fn seen(&self, name: &str) -> (Flow, LatencyCurve) {
        let mut pools = [planned(name)];
        self.disks.lay_over(UnixMillis(self.now), &self.inventory, &mut pools);
        let PoolKind::Storage { foreign, latency, .. } = pools[0].kind.clone() else { unreachable!() };
        (foreign, latency)
    }
}

#[test]
fn others_use_what_instances_with_volumes_there_do_not_and_the_least_of_it_counts() {
    let mut scene = Scene::new(None);
    scene.second(1000, 0, 0, "data", false);
    assert_eq!(scene.seen("data").0, Flow::default(), "one reading says nothing");
    scene.second(50, 20, 100, "data", false);
    let thirty = Flow { operations_per_s: 30.0, bytes_per_s: 30.0 * 4096.0 };
    // Both pools are on that disk, on the third one nothing is done.
    assert_eq!(["data", "root", "other"].map(|name| scene.seen(name).0), [thirty, thirty, Flow::default()]);
    // A peak is none of it, a lasting load is, and what copies do is not.
    scene.second(5000, 20, 100, "data", false);
    assert_eq!(scene.seen("data").0, thirty);
    (0..OTHERS_WINDOWS).for_each(|_| scene.second(520, 20, 100, "data", false));
    assert_eq!(scene.seen("data").0.operations_per_s, 500.0);
    (0..OTHERS_WINDOWS).for_each(|_| scene.second(9000, 20, 100, "data", true));
    assert_eq!(scene.seen("data").0.operations_per_s, 500.0);
    // What it does elsewhere than in its volume is as others' there.
    (0..OTHERS_WINDOWS).for_each(|_| scene.second(20, 20, 100, "other", false));
    assert_eq!(scene.seen("data").0.operations_per_s, 20.0);
    // More than everybody did is not possible: what was counted in another moment is nobody's.
    scene.second(10, 20, 100, "data", false);
    assert_eq!(scene.seen("data").0.operations_per_s, 0.0);
}

#[test]
fn what_requests_take_is_learnt_at_the_load_of_everybody_and_shown() {
    let mut scene = Scene::new(None);
    for _ in 0..60 {
        scene.second(40, 20, 100, "data", false);
        scene.second(4000, 20, 20_000, "data", false);
    }
    for name in ["data", "root"] {
        let curve = scene.seen(name).1;
        assert!((curve.at(45.0).unwrap().p50_us / 100.0 - 1.0).abs() < 0.1, "{curve:?}");
        assert!(curve.speed_at(4000.0).unwrap() < 0.02, "{curve:?}");
    }
    assert!(!scene.seen("other").1.at(45.0).unwrap().is_experienced(), "nobody was there");
    let shown = scene.disks.show(UnixMillis(scene.now), &scene.inventory);
    let of = |what: &str| {
        let measures = &shown.pool("data").unwrap().performance;
        measures.iter().find(|measure| measure.what == what).unwrap().known.clone()
    };
    assert!(of("latency_p50_us").value > 5_000.0);
    assert!(
        matches!(of("latency_p50_us").source, Source::Experienced { at, requests } if at.0 == scene.now && requests > 100)
    );
    assert!(of(RELATIVE_SPEED).value < 0.02);
    assert_eq!((of("load_operations_per_s").value, of("others_operations_per_s").value), (4000.0, 20.0));
    let text = serde_json::to_string(&of("latency_p99_us")).unwrap();
    assert!(text.contains("\"from\":\"experienced\"") && text.contains("\"requests\":"), "{text}");
}

#[test]
fn a_configured_speed_wins_and_another_device_begins_anew() {
    let mut scene = Scene::new(Some(Source::configured("pool[0].performance")));
    (0..20).for_each(|_| scene.second(40, 20, 9_000, "data", false));
    assert!(scene.seen("data").1.is_empty());
    let shown = scene.disks.show(UnixMillis(scene.now), &scene.inventory);
    assert_eq!(shown.pool("data").unwrap().relative_speed(), Some(0.7));
    let mut scene = Scene::new(None);
    (0..20).for_each(|_| scene.second(40, 20, 9_000, "data", false));
    assert!(scene.seen("data").1.at(40.0).unwrap().p50_us > 1_000.0);
    if let LocalKind::Storage { mounted, .. } = &mut scene.inventory.pools[1].kind {
        *mounted = "/dev/sdz".to_owned();
    }
    scene.second(40, 0, 0, "root", false);
    assert!(!scene.seen("data").1.at(40.0).unwrap().is_experienced());
}
