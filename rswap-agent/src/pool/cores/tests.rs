use proptest::prelude::*;
use rswap_pools::{LocalKind, LocalPool, State};

use super::*;
use crate::{
    pool::{Capacity, PoolState, THIS_HOST},
    profile::{CpuProfile, MemoryProfile, OnCpu, TcpProfile, histogram::Histogram},
};

const MS: u64 = 1_000_000;

fn pool(name: &str, cpus: &[usize]) -> Pool {
    Pool {
        name: name.into(),
        kind: PoolKind::Cpu {
            cpus: cpus.iter().copied().collect(),
            instance_cores: None,
            slowdown: Default::default(),
        },
        capacity: Capacity { cores: cpus.len() as f64, memory_bytes: 0 },
        used: Capacity::default(),
        cost_per_core_hour: 0.0,
        cost_per_gib_hour: 0.0,
        performance: 1.0,
        state: PoolState::Ready,
    }
}

fn pools() -> Vec<Pool> {
    vec![Pool { kind: PoolKind::ThisHost, ..pool(THIS_HOST, &[0, 1]) }, pool("one", &[0]), pool("two", &[1])]
}

/// What a CPU did in a second: used by programs, of that niced, and stolen; in hundredths.
#[derive(Clone, Copy, Default)]
struct Did {
    used: u64,
    nice: u64,
    stolen: u64,
}

/// An instance that ran on these CPUs for a second's part, in milliseconds: (CPU, ran, waited for others, waited for no instance).
fn ran(name: &str, on: &[(usize, u64, u64, u64)]) -> Profile {
    let all: u64 = on.iter().map(|(_, ran, _, _)| ran).sum();
    let mut run_queue_ns = Histogram::default();
    run_queue_ns.record(3 * MS);
    let by_cpu = on.iter().map(|&(cpu, ran, others, foreign)| OnCpu {
        cpu,
        ran_ns: ran * MS,
        others_wait_ns: others * MS,
        foreign_wait_ns: foreign * MS,
    });
    Profile {
        instance: name.parse().unwrap(),
        at: UnixMillis(0),
        window_ms: 1000,
        cpu: CpuProfile {
            cores: all as f64 / 1e3,
            run_queue_ns,
            by_cpu: by_cpu.collect(),
            counted: true,
            ..CpuProfile::default()
        },
        block: Vec::new(),
        block_counted: true,
        disk_neighbours: Vec::new(),
        io: Default::default(),
        tcp: TcpProfile::default(),
        tcp_counted: true,
        memory: MemoryProfile::default(),
    }
}

/// Windows of a second.
#[derive(Default)]
struct Scene {
    cores: Cores,
    second: u64,
    times: BTreeMap<usize, CpuTime>,
    moving: bool,
}

impl Scene {
    fn window(&mut self, did: [Did; 2], profiles: &[Profile]) {
        for (cpu, did) in did.into_iter().enumerate() {
            let time = self.times.entry(cpu).or_default();
            time.used += did.used;
            time.nice += did.nice;
            time.stolen += did.stolen;
            time.all += 100;
        }
        self.second += 1;
        let window = CoresWindow {
            now: UnixMillis(self.second * 1000),
            times: self.times.clone(),
            profiles,
            sits_on: &|name| (name.as_str() != "anywhere").then_some("one"),
            moving: self.moving,
        };
        self.cores.window(&pools(), window);
    }

    fn windows(&mut self, count: usize, did: [Did; 2], profiles: &[Profile]) {
        (0..count).for_each(|_| self.window(did, profiles));
    }

    /// As plans see them: (this host, one, two).
    fn taken(&self) -> [f64; 3] {
        let mut pools = pools();
        self.cores.lay_over(UnixMillis(self.second * 1000), &mut pools);
        [0, 1, 2].map(|index| pools[index].used.cores)
    }

    fn times_on_one(&self) -> f64 {
        let mut pools = pools();
        self.cores.lay_over(UnixMillis(self.second * 1000), &mut pools);
        pools[1]
            .slowdown()
            .and_then(|curve| curve.at(self.cores.of["one"].load))
            .map_or(0.0, |point| point.times)
    }
}

const IDLE: Did = Did { used: 0, nice: 0, stolen: 0 };
const FULL: Did = Did { used: 100, nice: 0, stolen: 0 };

fn near(found: [f64; 3], expected: [f64; 3]) {
    let same = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6);
    assert!(same, "{found:?}, not {expected:?}");
}

#[test]
fn of_what_others_use_only_what_instances_waited_for_is_taken_from_them() {
    let mut scene = Scene::default();
    // 300 ms of its own, and it waits for as long: others use 0.7, and take half of the core.
    scene.windows(1 + OTHERS_WINDOWS, [FULL, IDLE], &[ran("a", &[(0, 300, 300, 300)])]);
    near(scene.taken(), [0.7, 0.5, 0.0]);
    assert!(scene.times_on_one() > 1.7, "{}", scene.times_on_one());

    // A job that gives way: others use as much, and it hardly waits.
    let mut scene = Scene::default();
    scene.windows(1 + OTHERS_WINDOWS, [FULL, IDLE], &[ran("a", &[(0, 400, 4, 4)])]);
    let [_, one, _] = scene.taken();
    assert!(one < 0.011, "{one}");
    assert!(scene.times_on_one() < 1.05, "{}", scene.times_on_one());
}

#[test]
fn its_own_threads_and_other_instances_take_nothing_as_others() {
    // Eight threads that wait for each other, and a job that gives way and fills what they leave.
    let mut scene = Scene::default();
    scene.windows(1 + OTHERS_WINDOWS, [FULL, IDLE], &[ran("a", &[(0, 600, 0, 0)])]);
    near(scene.taken(), [0.0, 0.0, 0.0]);
    // Two instances that wait for each other: nothing is others', but work takes longer.
    let mut scene = Scene::default();
    let both = [ran("a", &[(0, 500, 500, 0)]), ran("b", &[(0, 500, 500, 0)])];
    scene.windows(1 + OTHERS_WINDOWS, [FULL, IDLE], &both);
    near(scene.taken(), [0.0, 0.0, 0.0]);
    assert!(scene.times_on_one() > 1.7, "{}", scene.times_on_one());
}

#[test]
fn others_take_no_more_than_they_use() {
    let mut scene = Scene::default();
    let used = Did { used: 5, ..IDLE };
    scene.windows(1 + OTHERS_WINDOWS, [used, IDLE], &[ran("a", &[(0, 20, 20, 20)])]);
    near(scene.taken(), [0.03, 0.03, 0.0]);
}

#[test]
fn what_is_stolen_is_gone_whoever_waits() {
    let mut scene = Scene::default();
    let stolen = Did { used: 60, nice: 0, stolen: 20 };
    scene.windows(1 + OTHERS_WINDOWS, [stolen, IDLE], &[ran("a", &[(0, 400, 0, 0)])]);
    near(scene.taken(), [0.2, 0.2, 0.0]);
}

#[test]
fn a_spike_moves_nothing_and_neither_does_what_has_not_lasted() {
    let mut scene = Scene::default();
    let (alone, hindered) = ([ran("a", &[(0, 300, 0, 0)])], [ran("a", &[(0, 300, 300, 300)])]);
    scene.windows(OTHERS_WINDOWS + 1, [Did { used: 30, ..IDLE }, IDLE], &alone);
    scene.windows(OTHERS_WINDOWS - 1, [FULL, IDLE], &hindered);
    near(scene.taken(), [0.0, 0.0, 0.0]);
    scene.window([FULL, IDLE], &hindered);
    near(scene.taken(), [0.7, 0.5, 0.0]);
    scene.window([Did { used: 30, ..IDLE }, IDLE], &alone);
    near(scene.taken(), [0.0, 0.0, 0.0]);

    // Nor is anything known at the start.
    let mut scene = Scene::default();
    scene.windows(OTHERS_WINDOWS, [FULL, IDLE], &hindered);
    near(scene.taken(), [0.0, 0.0, 0.0]);
}

#[test]
fn where_nobody_waits_what_is_not_niced_is_taken() {
    let mut scene = Scene::default();
    scene.windows(1 + OTHERS_WINDOWS, [IDLE, Did { used: 90, nice: 30, stolen: 0 }], &[]);
    near(scene.taken(), [0.6, 0.0, 0.6]);
}

#[test]
fn who_rests_is_remembered_as_long_as_others_use_no_more() {
    let mut scene = Scene::default();
    scene.windows(2, [FULL, IDLE], &[ran("a", &[(0, 400, 0, 0)])]);
    let used = Did { used: 60, ..IDLE };
    scene.windows(OTHERS_WINDOWS, [used, IDLE], &[]);
    near(scene.taken(), [0.0, 0.0, 0.0]);
    // More than then: nobody has waited for that yet.
    scene.windows(OTHERS_WINDOWS, [FULL, IDLE], &[]);
    near(scene.taken(), [1.0, 1.0, 0.0]);
    let mut later = Scene::default();
    later.windows(2, [FULL, IDLE], &[ran("a", &[(0, 400, 0, 0)])]);
    later.second += REMEMBERED_MS / 1000;
    later.windows(OTHERS_WINDOWS, [used, IDLE], &[]);
    near(later.taken(), [0.6, 0.6, 0.0]);
}

#[test]
fn who_hardly_wants_a_core_tells_nothing_of_who_takes_it() {
    // 10 ms in a second, for which it waits now and then longer than it runs.
    let tiny = |second: usize| [ran("a", &[(0, 10, 35 * (second as u64 % 2), 35 * (second as u64 % 2))])];
    let used = Did { used: 61, nice: 20, stolen: 0 };
    let mut scene = Scene::default();
    for second in 0..4 * OTHERS_WINDOWS {
        scene.window([used, IDLE], &tiny(second));
        if second > OTHERS_WINDOWS {
            // As if it were not there.
            near(scene.taken(), [0.4, 0.4, 0.0]);
        }
    }
    // What one that wanted more has found holds on.
    scene.window([Did { used: 99, ..used }, IDLE], &[ran("a", &[(0, 400, 100, 100)])]);
    for second in 0..4 * OTHERS_WINDOWS {
        scene.window([used, IDLE], &tiny(second));
        if second > OTHERS_WINDOWS {
            near(scene.taken(), [0.4, 0.2, 0.0]);
        }
    }
}

#[test]
fn one_on_no_pool_counts_on_the_cores_that_it_ran_on() {
    let mut scene = Scene::default();
    let anywhere = [ran("anywhere", &[(1, 800, 0, 0)])];
    scene.windows(1 + OTHERS_WINDOWS, [IDLE, Did { used: 80, ..IDLE }], &anywhere);
    near(scene.taken(), [0.0, 0.0, 0.0]);
    // Where that was not counted it is taken to have run everywhere alike, and nobody knows what it waited for.
    let mut scene = Scene::default();
    let mut unseen = ran("anywhere", &[(1, 800, 0, 0)]);
    unseen.cpu.by_cpu.clear();
    unseen.cpu.counted = false;
    scene.windows(1 + OTHERS_WINDOWS, [IDLE, FULL], &[unseen]);
    near(scene.taken(), [0.0, 0.0, 0.0]);
}

#[test]
fn while_something_moves_nothing_is_counted() {
    let mut scene = Scene { moving: true, ..Scene::default() };
    scene.windows(1 + OTHERS_WINDOWS, [FULL, IDLE], &[ran("a", &[(0, 300, 300, 300)])]);
    near(scene.taken(), [0.0, 0.0, 0.0]);
    assert!(scene.times_on_one() == 0.0);
}

#[test]
fn a_limit_below_the_cores_leaves_the_rest_to_others() {
    let mut scene = Scene::default();
    scene.windows(1 + OTHERS_WINDOWS, [FULL, IDLE], &[ran("a", &[(0, 300, 300, 300)])]);
    let taken = |capacity: f64| {
        let mut pools = pools();
        pools[1].capacity.cores = capacity;
        scene.cores.lay_over(UnixMillis(scene.second * 1000), &mut pools);
        pools[1].used.cores
    };
    assert!((taken(1.0) - 0.5).abs() < 1e-6 && (taken(0.8) - 0.3).abs() < 1e-6 && taken(0.4) == 0.0);
}

#[test]
fn it_is_shown_with_where_it_comes_from() {
    let mut scene = Scene::default();
    scene.windows(1 + OTHERS_WINDOWS, [FULL, IDLE], &[ran("a", &[(0, 300, 300, 300)])]);
    let mut inventory = Inventory::default();
    let speed = Measure {
        what: rswap_pools::RELATIVE_SPEED.to_owned(),
        known: Known { value: 0.8, source: Source::configured("pool[0].performance") },
    };
    inventory.pools = vec![LocalPool {
        name: "one".to_owned(),
        kind: LocalKind::Cores {
            cpus: CpuSet::from([0]),
            cores: Vec::new(),
            instance_cores: None,
            instance_weight: None,
        },
        capacity: None,
        used: None,
        free: None,
        cost_per_hour: None,
        busy: None,
        performance: vec![speed],
        state: State::Online,
    }];
    let shown = scene.cores.show(UnixMillis(scene.second * 1000), inventory);
    let of = |what: &str| {
        let mut found = shown.pools[0].performance.iter().filter(|measure| measure.what == what);
        found.next().unwrap_or_else(|| panic!("{what} is missing in {:?}", shown.pools[0])).known.clone()
    };
    assert!((of("others_use_cores").value - 0.7).abs() < 1e-6);
    assert_eq!(of("others_use_cores").source, Source::found("/proc/stat"));
    assert!((of("others_take_cores").value - 0.5).abs() < 1e-6);
    assert!((of("run_queue_p50_us").value / 3000.0 - 1.0).abs() < 0.08);
    let at = UnixMillis(scene.second * 1000);
    let slowdown = of("slowdown");
    assert!(
        matches!(slowdown.source, Source::Experienced { at: when, requests } if when == at && requests > 8),
        "{slowdown:?}"
    );
    assert!((of("loaded_speed").value * slowdown.value - 0.8).abs() < 1e-9);
}

proptest! {
    /// Whatever is counted, also when it does not fit together: others take no more than there is, and never less than nothing.
    #[test]
    fn what_is_taken_is_within_the_cores(
        seconds in prop::collection::vec((0..120u64, 0..60u64, 0..40u64, 0..1500u64, 0..3000u64, 0..3000u64), 18..40),
    ) {
        let mut scene = Scene::default();
        for &(used, nice, stolen, run, others, foreign) in &seconds {
            scene.window([Did { used, nice, stolen }, IDLE], &[ran("a", &[(0, run, others, foreign)])]);
        }
        for (taken, most) in scene.taken().into_iter().zip([2.0, 1.0, 1.0]) {
            prop_assert!((0.0..=most + 1e-9).contains(&taken), "{taken} of {most}");
        }
        prop_assert!(scene.times_on_one() == 0.0 || scene.times_on_one() >= 1.0);
    }
}
