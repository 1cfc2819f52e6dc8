//! The planner's promises.

use proptest::prelude::*;

use rswap_forecast::{DemandPoint, Evidence, Quantiles, Resource};
use rswap_types::{Capacity, CpuSet, Pool, PoolKind, PoolState, THIS_HOST};

use super::*;

fn pool(name: &str, kind: PoolKind, cores: f64, cost: f64, performance: f64) -> Pool {
    Pool {
        name: name.into(),
        kind,
        capacity: Capacity { cores, memory_bytes: 8 << 30 },
        used: Capacity::default(),
        cost_per_core_hour: cost,
        cost_per_gib_hour: 0.005,
        performance,
        state: PoolState::Ready,
    }
}

fn pools() -> Vec<Pool> {
    vec![
        pool(THIS_HOST, PoolKind::ThisHost, 2.0, 0.04, 1.0),
        pool(
            "slow",
            PoolKind::Cpu { cpus: CpuSet::from([0]), instance_cores: None, slowdown: Default::default() },
            1.0,
            0.01,
            0.5,
        ),
        pool(
            "fast",
            PoolKind::Cpu { cpus: CpuSet::from([1]), instance_cores: None, slowdown: Default::default() },
            1.0,
            0.04,
            1.0,
        ),
        pool("b", PoolKind::Host { address: "10.0.0.2:7791".parse().unwrap() }, 4.0, 0.06, 1.0),
    ]
}

fn view(name: &str, cpu_pool: &str, needs: &[(u64, f64)], evidence: Evidence) -> InstanceView {
    let points = needs.iter().map(|&(horizon_ms, need)| DemandPoint {
        resource: Resource::Cpu,
        horizon_ms,
        need: Quantiles { p50: need, p90: need, p95: need, p99: need },
        evidence,
    });
    InstanceView {
        instance: name.parse().unwrap(),
        host: None,
        cpu_pool: Some(cpu_pool.into()),
        demand: Demand { instance: name.parse().unwrap(), at: UnixMillis(0), points: points.collect() },
        cores: needs[0].1 / if cpu_pool == "slow" { 0.5 } else { 1.0 },
        resident_bytes: 100 << 20,
        dirty_bytes_per_s: Some(1e6),
        movable: vec![MoveKind::Cpu, MoveKind::Host],
        labels: BTreeMap::new(),
        volumes: Vec::new(),
        port: None,
    }
}

const ENOUGH: Evidence = Evidence::Enough { seen: 100, p95_coverage: 0.95 };

fn plan(views: &[InstanceView]) -> Plan {
    Planner::new(PlanConfig::default()).plan(UnixMillis(1_000_000), views, &pools())
}

#[test]
fn the_score_is_the_formula() {
    let plan = plan(&[view("a", "slow", &[(5_000, 0.2)], ENOUGH)]);
    let current = plan.decisions[0].current.as_ref().unwrap();
    // 0.2 reference cores are 0.4 slow cores at 0.01/h; performance is 0.2 x 0.5, the weight 0.02/h.
    assert!((current.score - (0.4 * 0.01 + 100.0 / 1024.0 * 0.005 - 0.1 * 0.02)).abs() < 1e-12);
}

#[test]
fn too_little_seen_means_stay() {
    let plan = plan(&[view("a", "slow", &[(5_000, 5.0)], Evidence::TooLittle { seen: 3, needed: 30 })]);
    let reason = StayReason::TooLittleSeen { seen: 3, needed: 30 };
    assert_eq!(plan.decisions[0].outcome, Outcome::Stay { reason });
    assert!(explain(&plan.decisions[0]).contains("too little seen: 3 of 30"));
}

#[test]
fn a_rise_is_met_before_it_comes() {
    let plan = plan(&[view("a", "slow", &[(5_000, 0.1), (15_000, 0.8)], ENOUGH)]);
    let Outcome::Move { to, start_by, forced } = &plan.decisions[0].outcome else {
        panic!("{}", explain(&plan.decisions[0]));
    };
    assert_eq!((to.as_str(), *forced), ("fast", true));
    // 0.475 reference cores are there; the line from 0.1 at 5 s to 0.8 at 15 s reaches them at 10.357 s.
    assert_eq!(plan.decisions[0].crossing_in_ms, Some(10_357));
    assert!(start_by.0 < 1_010_357 && start_by.0 > 1_009_357);
    assert_eq!(plan.decisions[1].outcome, Outcome::Stay { reason: StayReason::OtherMoveFirst });
}

#[test]
fn when_no_core_set_is_enough_a_host_is_taken() {
    let plan = plan(&[view("a", "fast", &[(5_000, 0.5), (30_000, 1.5)], ENOUGH)]);
    assert_eq!(plan.decisions[0].outcome, Outcome::Stay { reason: StayReason::NoPoolFits });
    assert!(matches!(&plan.decisions[1].outcome, Outcome::Move { to, forced: true, .. } if to == "b"));
    let text = explain(&plan.decisions[0]);
    assert!(text.contains("dropped: needs 3.00 cores, has 0.90"), "{text}");
}

#[test]
fn what_cannot_converge_is_not_migrated() {
    let mut busy = view("a", "fast", &[(5_000, 1.5)], ENOUGH);
    busy.dirty_bytes_per_s = Some(1e9);
    let plan = plan(&[busy]);
    assert!(matches!(plan.decisions[1].candidates[0].dropped, Some(Dropped::WillNotConverge { .. })));
}

#[test]
fn a_measured_link_replaces_the_configured_one() {
    let busy = [view("a", "fast", &[(5_000, 1.5)], ENOUGH)];
    let mut planner = Planner::new(PlanConfig::default());
    let seconds = |planner: &mut Planner| {
        let plan = planner.plan(UnixMillis(0), &busy, &pools());
        plan.decisions[1].candidates[0].move_price.unwrap().seconds
    };
    let guessed = seconds(&mut planner);
    planner.link_measured("b", 1e9);
    let measured = seconds(&mut planner);
    // 100 MiB take about a second by the configured 100 MB/s.
    assert!(guessed - measured > 0.8, "{guessed} s, then {measured} s");
    planner.link_measured("b", f64::NAN);
    assert_eq!(seconds(&mut planner), measured);
}

#[test]
fn a_move_to_a_host_that_is_no_pool_takes_no_cores_here() {
    let views = [view("a", "slow", &[(5_000, 0.4)], ENOUGH), view("z", "slow", &[(5_000, 0.8)], ENOUGH)];
    let mut planner = Planner::new(PlanConfig::default());
    planner.started(&views[0].instance, "10.9.9.9:7791");
    let plan = planner.plan(UnixMillis(0), &views, &pools());
    let last = plan.decisions.iter().find(|d| d.instance == views[1].instance).unwrap();
    assert!(matches!(&last.outcome, Outcome::Move { to, .. } if to == "fast"), "{}", explain(last));
}

#[test]
fn cheaper_is_taken_only_after_the_cool_down_and_with_a_margin() {
    let idle = [view("a", "fast", &[(5_000, 0.4)], ENOUGH)];
    let config = PlanConfig { hysteresis: 0.001, ..PlanConfig::default() };
    let mut planner = Planner::new(config.clone());
    let name = idle[0].instance.clone();
    planner.moved(&name, MoveKind::Cpu, UnixMillis(1_000_000));
    let at = |planner: &mut Planner, ms| {
        planner.plan(UnixMillis(ms), &idle, &pools()).decisions[0].outcome.clone()
    };
    assert!(matches!(
        at(&mut planner, 1_010_000),
        Outcome::Stay { reason: StayReason::CoolDown { left_ms: 20_000 } }
    ));
    assert!(matches!(at(&mut planner, 1_030_000), Outcome::Move { to, forced: false, .. } if to == "slow"));
    planner.failed(&name, MoveKind::Cpu, UnixMillis(1_030_000));
    assert!(matches!(
        at(&mut planner, 1_031_000),
        Outcome::Stay { reason: StayReason::BackOff { failures: 1, .. } }
    ));
    planner.started(&name, "slow");
    assert_eq!(at(&mut planner, 2_000_000), Outcome::Stay { reason: StayReason::InFlight });
    let mut reluctant = Planner::new(PlanConfig { hysteresis: 1.0, ..config });
    assert!(matches!(
        at(&mut reluctant, 0),
        Outcome::Stay { reason: StayReason::NothingBetter { best_gain: Some(_), .. } }
    ));
}

#[test]
fn a_free_core_is_promised_once() {
    let plan =
        plan(&[view("a", "slow", &[(5_000, 0.8)], ENOUGH), view("b", "slow", &[(5_000, 0.8)], ENOUGH)]);
    let to_fast =
        plan.decisions.iter().filter(|d| matches!(&d.outcome, Outcome::Move { to, .. } if to == "fast"));
    assert_eq!(to_fast.count(), 1);
}

/// Three core sets that are alike, and one instance.
fn alike() -> Vec<Pool> {
    let core = |name: &str, cpu| {
        pool(
            name,
            PoolKind::Cpu { cpus: CpuSet::from([cpu]), instance_cores: None, slowdown: Default::default() },
            2.0,
            0.04,
            1.0,
        )
    };
    vec![pool(THIS_HOST, PoolKind::ThisHost, 6.0, 0.04, 1.0), core("x", 0), core("y", 1), core("z", 2)]
}

#[test]
fn what_would_change_the_decision_is_said() {
    let plan = plan(&[view("a", "slow", &[(5_000, 0.1), (15_000, 0.8)], ENOUGH)]);
    let text = explain(&plan.decisions[0]);
    assert!(text.contains("if it needed 0.95 cores or less here instead of 1.60"), "{text}");
}

#[test]
fn who_gains_most_chooses_first() {
    let config = PlanConfig { hysteresis: 0.0, cool_down_ms: 0, ..PlanConfig::default() };
    let mut pools = pools();
    pools[1].cost_per_core_hour = 0.001;
    // Both would be cheaper off on "slow", and there is room for one of them: the bigger one gains more.
    let views = [view("a", "fast", &[(5_000, 0.1)], ENOUGH), view("b", "fast", &[(5_000, 0.4)], ENOUGH)];
    let plan = Planner::new(config).plan(UnixMillis(0), &views, &pools);
    let moves: Vec<_> = plan
        .decisions
        .iter()
        .filter(|d| matches!(&d.outcome, Outcome::Move { to, .. } if to == "slow"))
        .map(|d| d.instance.as_str())
        .collect();
    assert_eq!(moves, ["b"]);
}

#[test]
fn one_host_takes_so_many_moves_at_once() {
    let config = PlanConfig { moves_per_host: 2, ..PlanConfig::default() };
    let mut pools = pools();
    pools[3].capacity.cores = 100.0;
    let views: Vec<_> = (0..5)
        .map(|i| {
            let mut view = view(&format!("i{i}"), "fast", &[(5_000, 1.5)], ENOUGH);
            view.movable = vec![MoveKind::Host];
            view
        })
        .collect();
    let plan = Planner::new(config).plan(UnixMillis(0), &views, &pools);
    let moves = plan.decisions.iter().filter(|d| matches!(d.outcome, Outcome::Move { .. })).count();
    assert_eq!(moves, 2);
    assert!(matches!(plan.decisions[4].candidates[0].dropped, Some(Dropped::Busy { moves: 2 })));
}

#[test]
fn a_fleet_is_planned_from_any_host() {
    let host = |name: &str, cost| {
        let address = "10.0.0.2:7791".parse().unwrap();
        let mut pool = pool(name, PoolKind::Host { address }, 4.0, cost, 1.0);
        pool.used.cores = if name == "dear" { 1.0 } else { 0.0 };
        pool
    };
    let mut one = view("a", "-", &[(5_000, 1.0)], ENOUGH);
    (one.host, one.cpu_pool, one.movable) = (Some("dear".into()), None, vec![MoveKind::Host]);
    let pools = [host("dear", 0.5), host("cheap", 0.01), host("middle", 0.2)];
    let plan = Planner::new(PlanConfig::default()).plan(UnixMillis(0), &[one], &pools);
    assert!(matches!(&plan.decisions[0].outcome, Outcome::Move { to, forced: false, .. } if to == "cheap"));
    let here = plan.decisions[0].current.as_ref().unwrap();
    // Its own use is not taken for that of others.
    assert!((here.terms.available_cores - 3.8).abs() < 1e-9, "{here:?}");
}

proptest! {
    /// Prices change as they please: nothing but need leads an instance back to where it was, also not around a circle.
    #[test]
    fn no_circle_is_walked(
        prices in prop::collection::vec((0.001..0.2f64, 0.001..0.2f64, 0.001..0.2f64), 60),
        needs in prop::collection::vec(0.0..1.7f64, 60),
    ) {
        let config = PlanConfig { hysteresis: 0.0, cool_down_ms: 10_000, ..PlanConfig::default() };
        let mut planner = Planner::new(config);
        let mut pools = alike();
        let mut on = "x".to_owned();
        let mut left: Vec<(String, u64)> = vec![];
        for (round, (prices, need)) in prices.iter().zip(&needs).enumerate() {
            let now = round as u64 * 4_000;
            for (pool, price) in pools[1..].iter_mut().zip([prices.0, prices.1, prices.2]) {
                pool.cost_per_core_hour = price;
            }
            let mut one = view("a", &on, &[(5_000, *need), (30_000, *need)], ENOUGH);
            one.movable = vec![MoveKind::Cpu];
            let plan = planner.plan(UnixMillis(now), &[one.clone()], &pools);
            if let Outcome::Move { to, forced, .. } = &plan.decisions[0].outcome {
                prop_assert!(!forced);
                let before = left.iter().rev().find(|(pool, _)| pool == to);
                prop_assert!(before.is_none_or(|(_, at)| now - at >= 100_000), "{left:?}, then {to} at {now}");
                left.push((std::mem::replace(&mut on, to.clone()), now + 4_000));
                planner.moved(&one.instance, MoveKind::Cpu, UnixMillis(now));
            }
        }
    }

    #[test]
    fn constant_demand_does_not_oscillate(
        need in 0.0..2.0f64, hysteresis in 0.0..0.01f64, slow in 0.1..1.0f64, cost in 0.001..0.1f64, weight in 0.0..0.1f64,
    ) {
        let config = PlanConfig { hysteresis, weight, ..PlanConfig::default() };
        let mut planner = Planner::new(config);
        let mut pools = pools();
        pools[1].performance = slow;
        pools[1].cost_per_core_hour = cost;
        let mut on = "slow".to_owned();
        let mut moves = 0;
        for round in 0..20u64 {
            let now = UnixMillis(round * 60_000);
            let mut one = view("a", &on, &[(5_000, need), (30_000, need)], ENOUGH);
            one.movable = vec![MoveKind::Cpu];
            one.cores = need / if on == "slow" { slow } else { 1.0 };
            let plan = planner.plan(now, &[one.clone()], &pools);
            if let Outcome::Move { to, .. } = &plan.decisions[0].outcome {
                on = to.clone();
                moves += 1;
                planner.moved(&one.instance, MoveKind::Cpu, now);
            }
        }
        prop_assert!(moves <= 1, "{moves} moves");
    }

    #[test]
    fn no_pool_is_filled_over_its_capacity(
        needs in prop::collection::vec((0.0..1.5f64, any::<bool>(), any::<bool>()), 1..8),
        hysteresis in 0.0..0.01f64, weight in 0.0..0.2f64,
    ) {
        let views: Vec<_> = needs.iter().enumerate().map(|(i, &(need, slow, believed))| {
            let evidence = if believed { ENOUGH } else { Evidence::TooLittle { seen: 0, needed: 9 } };
            view(&format!("i{i}"), if slow { "slow" } else { "fast" }, &[(5_000, need)], evidence)
        }).collect();
        let config = PlanConfig { hysteresis, weight, ..PlanConfig::default() };
        let pools = pools();
        let plan = Planner::new(config).plan(UnixMillis(0), &views, &pools);
        for pool in &pools {
            let arriving: f64 = plan.decisions.iter()
                .filter(|d| matches!(&d.outcome, Outcome::Move { to, .. } if *to == pool.name))
                .filter_map(|d| d.need).map(|need| need.limit_cores / pool.performance).sum();
            let leaving = |name: &InstanceName| plan.decisions.iter()
                .any(|d| d.instance == *name && matches!(d.outcome, Outcome::Move { .. }));
            let sitting: f64 = views.iter()
                .filter(|v| v.cpu_pool.as_deref() == Some(&pool.name) && !leaving(&v.instance))
                .map(|v| v.demand.points[0].need.p95 / pool.performance).sum();
            prop_assert!(arriving == 0.0 || arriving + sitting <= pool.capacity.cores, "{}", pool.name);
        }
        let text = serde_json::to_string(&plan).unwrap();
        prop_assert_eq!(serde_json::from_str::<Plan>(&text).unwrap().decisions.len(), plan.decisions.len());
        for decision in &plan.decisions {
            prop_assert!(!explain(decision).is_empty());
        }
    }
}
