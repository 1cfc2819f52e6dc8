//! Volumes and ports in plans.

use std::collections::{BTreeMap, BTreeSet};

use rswap_forecast::{Demand, DemandPoint, Evidence, Quantiles, Resource};
use rswap_types::{Capacity, InstanceName, LatencyCurve, THIS_HOST};

use super::*;
use crate::{Dropped, Plan, explain};

const MIB: u64 = 1 << 20;
const ENOUGH: Evidence = Evidence::Enough { seen: 100, p95_coverage: 0.95 };
const AT: UnixMillis = UnixMillis(10_000_000);

fn flow(operations_per_s: f64, bytes_per_s: f64) -> Flow {
    Flow { operations_per_s, bytes_per_s }
}

fn pool(name: &str, kind: PoolKind, cost_per_gib_hour: f64, performance: f64) -> Pool {
    Pool {
        name: name.into(),
        kind,
        capacity: Capacity { cores: 0.0, memory_bytes: 0 },
        used: Capacity::default(),
        cost_per_core_hour: 0.0,
        cost_per_gib_hour,
        performance,
        state: PoolState::Ready,
    }
}

fn storage(name: &str, gives: Option<Flow>, cost: f64, performance: f64) -> Pool {
    let kind = PoolKind::Storage {
        size_bytes: 2048 * MIB,
        free_bytes: 1024 * MIB,
        gives,
        disks: [name.to_owned()].into(),
        foreign: Flow::default(),
        latency: LatencyCurve::default(),
    };
    pool(name, kind, cost, performance)
}

/// A slow and cheap one, a fast and dear one, and one that nobody has measured.
fn pools() -> Vec<Pool> {
    vec![
        storage("slow", Some(flow(200.0, 20e6)), 0.02, 0.1),
        storage("fast", Some(flow(5_000.0, 200e6)), 0.2, 1.0),
        storage("new", None, 0.0, 1.0),
    ]
}

fn points(resource: Resource, needs: &[(u64, f64)]) -> Vec<DemandPoint> {
    let point = |&(horizon_ms, need): &(u64, f64)| DemandPoint {
        resource,
        horizon_ms,
        need: Quantiles { p50: need, p90: need, p95: need, p99: need },
        evidence: ENOUGH,
    };
    needs.iter().map(point).collect()
}

/// A volume of 512 MiB that needs so many requests per second at these horizons, of 4 KiB each.
fn view(name: &str, on: &str, needs: &[(u64, f64)]) -> InstanceView {
    let instance: InstanceName = name.parse().unwrap();
    let bytes: Vec<(u64, f64)> = needs.iter().map(|(at, need)| (*at, need * 4096.0)).collect();
    let mut all = points(Resource::VolumeOperations, needs);
    all.extend(points(Resource::VolumeBytes, &bytes));
    InstanceView {
        instance: instance.clone(),
        host: None,
        cpu_pool: None,
        demand: Demand { instance, at: AT, points: all },
        cores: 0.1,
        resident_bytes: 0,
        dirty_bytes_per_s: None,
        movable: vec![MoveKind::Storage],
        labels: BTreeMap::new(),
        volumes: vec![VolumeView {
            name: "data".into(),
            pool: Some(on.into()),
            size_bytes: 512 * MIB,
            share: 1.0,
            now: flow(10.0, 4e4),
        }],
        port: None,
    }
}

fn one(plan: &Plan) -> &Decision {
    assert_eq!(plan.decisions.len(), 1, "{plan:?}");
    &plan.decisions[0]
}

fn planned(planner: &mut Planner, view: InstanceView, pools: &[Pool]) -> Decision {
    one(&planner.plan(AT, &[view], pools)).clone()
}

fn planner() -> Planner {
    Planner::new(PlanConfig::default())
}

fn decided(view: InstanceView, pools: &[Pool]) -> Decision {
    planned(&mut planner(), view, pools)
}

const RISES: [(u64, f64); 3] = [(5_000, 20.0), (15_000, 900.0), (60_000, 900.0)];
const IDLE: [(u64, f64); 2] = [(5_000, 20.0), (60_000, 20.0)];

#[test]
fn a_rise_is_met_before_it_comes() {
    let decision = decided(view("a", "slow", &RISES), &pools());
    let Outcome::Move { to, start_by, forced } = &decision.outcome else { panic!("{}", explain(&decision)) };
    assert_eq!((to.as_str(), *forced, decision.volume.as_deref()), ("fast", true, Some("data")));
    // 190 of 200 requests are given to who is there: that is crossed at 5 s + (190 - 20) / 880 of 10 s.
    assert_eq!(decision.crossing_in_ms, Some(6_931));
    // 512 MiB at 50 MB/s: it has to begin at once.
    let price = decision.candidates[0].move_price.unwrap();
    assert!(price.seconds > 11.0 && price.bytes >= 512 << 20, "{price:?}");
    assert_eq!(*start_by, AT);
    let text = explain(&decision);
    assert!(text.contains("(storage pool of its volume data) moves to fast in 0 ms"), "{text}");
    assert!(text.contains("needs 900 requests/s and 3.69 MB/s, has 190 and 19.00"), "{text}");
    assert!(text.contains("what it gives is not known: run `rswap calibrate` for it"), "{text}");

    // With a copy that was measured there is time.
    let mut planner = planner();
    planner.copy_measured("fast", 512.0 * MIB as f64);
    let decision = planned(&mut planner, view("a", "slow", &RISES), &pools());
    let Outcome::Move { start_by, .. } = decision.outcome else { panic!("{}", explain(&decision)) };
    assert_eq!(start_by.since(AT), 6_931 - 3_000, "twice 1.5 s, and what is written meanwhile");
}

#[test]
fn what_is_idle_goes_where_it_is_cheap_if_that_pays() {
    let decision = decided(view("a", "fast", &IDLE), &pools());
    let Outcome::Move { to, forced, .. } = &decision.outcome else { panic!("{}", explain(&decision)) };
    assert_eq!((to.as_str(), *forced), ("slow", false));
    let current = decision.current.as_ref().unwrap();
    // Half a GiB at 0.2; 20 requests per second at full speed.
    assert!((current.score - (0.5 * 0.2 - 0.02 * 0.0005)).abs() < 1e-9, "{current:?}");

    // A gain under the margin moves nobody.
    let mut cheap = pools();
    cheap[1].cost_per_gib_hour = 0.022;
    let decision = decided(view("a", "fast", &IDLE), &cheap);
    let stays = Outcome::Stay { reason: StayReason::UnderThreshold };
    assert!(!decision.moves() && decision.outcome != stays, "{}", explain(&decision));
}

#[test]
fn the_cheapest_that_fits_is_taken_and_why_others_are_not_is_kept() {
    let mut pools = pools();
    pools.push(storage("dear", Some(flow(9_000.0, 900e6)), 0.9, 1.0));
    pools.push(storage("small", Some(flow(9_000.0, 900e6)), 0.01, 1.0));
    pools.push(storage("leaving", Some(flow(9_000.0, 900e6)), 0.01, 1.0));
    pools.push(storage("thin", Some(flow(9_000.0, 1e6)), 0.01, 1.0));
    if let PoolKind::Storage { free_bytes, .. } = &mut pools[4].kind {
        *free_bytes = 600 * MIB;
    }
    pools[5].state = PoolState::Draining;
    let decision = decided(view("a", "slow", &RISES), &pools);
    assert!(matches!(&decision.outcome, Outcome::Move { to, .. } if to == "fast"), "{}", explain(&decision));
    let why = |name: &str| {
        decision.candidates.iter().find(|candidate| candidate.pool == name).unwrap().dropped.clone()
    };
    assert_eq!(why("dear"), None);
    assert_eq!(why("leaving"), Some(Dropped::Draining));
    assert_eq!(why("new"), Some(Dropped::Unmeasured));
    // A tenth of it is left free.
    let missing = Dropped::Space { needed_bytes: 512 * MIB, available_bytes: 600 * MIB - 214_748_364 };
    assert_eq!(why("small"), Some(missing));
    assert!(matches!(why("thin"), Some(Dropped::Flow { .. })));
}

#[test]
fn a_drained_pool_is_left_whether_it_was_measured_or_not() {
    for on in ["slow", "new"] {
        let mut pools = pools();
        let drained = pools.iter_mut().find(|pool| pool.name == on).unwrap();
        drained.state = PoolState::Draining;
        let decision = decided(view("a", on, &IDLE), &pools);
        assert!(matches!(decision.outcome, Outcome::Move { forced: true, .. }), "{}", explain(&decision));
    }
}

#[test]
fn what_is_not_known_is_said() {
    let reason = |view| match decided(view, &pools()).outcome {
        Outcome::Stay { reason } => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(view("a", "new", &RISES)), StayReason::Unmeasured { pool: "new".into() });
    assert_eq!(reason(view("a", "elsewhere", &RISES)), StayReason::OnNoPool);
    let mut unseen = view("a", "slow", &RISES);
    unseen.demand.points.clear();
    assert_eq!(reason(unseen), StayReason::TooLittleSeen { seen: 0, needed: 1 });
    let mut told = view("a", "slow", &RISES);
    told.labels.insert(rules::STAY.into(), "true".into());
    assert_eq!(reason(told), StayReason::ToldToStay);
    // Who can't move volumes has no decision about them.
    let mut unable = view("a", "slow", &RISES);
    unable.movable.clear();
    assert!(planner().plan(AT, &[unable], &pools()).decisions.is_empty());
}

#[test]
fn a_pin_names_pools_of_its_kind_only() {
    let mut pinned = view("a", "slow", &RISES);
    pinned.labels.insert(rules::PIN.into(), "slow".into());
    let decision = decided(pinned.clone(), &pools());
    assert_eq!(decision.outcome, Outcome::Stay { reason: StayReason::NoPoolFits });
    pinned.labels.insert(rules::PIN.into(), "cores".into());
    assert!(decided(pinned, &pools()).moves());
}

#[test]
fn two_are_not_sent_where_only_one_fits_nor_at_once() {
    let half = [(5_000, 300.0), (60_000, 300.0)];
    let mut pools = pools();
    pools[1] = storage("fast", Some(flow(500.0, 200e6)), 0.2, 1.0);
    let views = [view("a", "slow", &half), view("b", "slow", &half)];
    let plan = planner().plan(AT, &views, &pools);
    let moving: Vec<&Decision> = plan.decisions.iter().filter(|decision| decision.moves()).collect();
    assert_eq!(moving.len(), 1, "{plan:?}");
    let stays = plan.decisions.iter().find(|decision| !decision.moves()).unwrap();
    let fast = stays.candidates.iter().find(|candidate| candidate.pool == "fast").unwrap();
    assert!(matches!(fast.dropped, Some(Dropped::Flow { .. })), "{fast:?}");

    // Where both fit, they still go one after the other.
    pools[1] = storage("fast", Some(flow(5_000.0, 200e6)), 0.2, 1.0);
    if let PoolKind::Storage { free_bytes, .. } = &mut pools[1].kind {
        *free_bytes *= 2;
    }
    let plan = planner().plan(AT, &views, &pools);
    let stays = plan.decisions.iter().find(|decision| !decision.moves()).unwrap();
    let fast = stays.candidates.iter().find(|candidate| candidate.pool == "fast").unwrap();
    assert_eq!(fast.dropped, Some(Dropped::Busy { moves: 1 }));
}

#[test]
fn who_leaves_counts_until_it_has_left() {
    // "b" could leave for the slow one in this round; "a" must not count on it.
    let mut pools = pools();
    pools[1] = storage("fast", Some(flow(1_000.0, 200e6)), 0.2, 1.0);
    let heavy = [(5_000, 150.0), (60_000, 150.0)];
    let views = [view("a", "slow", &RISES), view("b", "fast", &heavy)];
    let plan = planner().plan(AT, &views, &pools);
    let a = plan.decisions.iter().find(|decision| decision.instance.as_str() == "a").unwrap();
    assert!(!a.moves(), "{}", explain(a));
    let fast = a.candidates.iter().find(|candidate| candidate.pool == "fast").unwrap();
    assert_eq!(fast.flow.unwrap().available.operations_per_s, 1_000.0 * 0.9 - 150.0);
}

#[test]
fn a_failure_holds_back_the_part_that_failed_and_a_move_holds_back_all() {
    let mut planner = planner();
    let (a, volume): (InstanceName, _) = ("a".parse().unwrap(), Some("data"));
    let mut both = view("a", "slow", &RISES);
    both.volumes.push(VolumeView { name: "logs".into(), ..both.volumes[0].clone() });
    planner.part_started(&a, MoveKind::Storage, volume, "fast");
    let plan = planner.plan(AT, &[both.clone()], &pools());
    assert!(
        plan.decisions.iter().all(|d| d.outcome == Outcome::Stay { reason: StayReason::InFlight }),
        "{plan:?}"
    );
    planner.part_failed(&a, MoveKind::Storage, volume, "no space", AT);
    let plan = planner.plan(AT, &[both.clone()], &pools());
    let of = |plan: &Plan, volume: &str| {
        plan.decisions.iter().find(|decision| decision.volume.as_deref() == Some(volume)).unwrap().clone()
    };
    let waits = StayReason::BackOff { failures: 1, left_ms: 30_000, error: Some("no space".into()) };
    assert_eq!(of(&plan, "data").outcome, Outcome::Stay { reason: waits });
    assert!(of(&plan, "logs").moves(), "{}", explain(&of(&plan, "logs")));

    // A new planner goes on by what the last one knew, and what has moved has not failed.
    let text = serde_json::to_string(&planner.remembered()).unwrap();
    let mut next =
        Planner::with_memory(PlanConfig::default(), serde_json::from_str(&text).unwrap(), |_| true);
    assert!(!of(&next.plan(AT, &[both.clone()], &pools()), "data").moves());
    next.part_moved(&a, MoveKind::Storage, volume, AT);
    assert!(of(&next.plan(AT, &[both], &pools()), "data").moves());
}

#[test]
fn what_only_saves_cools_down_and_does_not_walk_in_circles() {
    let mut planner = planner();
    let a: InstanceName = "a".parse().unwrap();
    planner.plan(AT, &[view("a", "slow", &IDLE)], &pools());
    planner.part_started(&a, MoveKind::Storage, Some("data"), "fast");
    planner.part_moved(&a, MoveKind::Storage, Some("data"), AT);
    let at = |planner: &mut Planner, ms: u64| {
        one(&planner.plan(UnixMillis(AT.0 + ms), &[view("a", "fast", &IDLE)], &pools())).outcome.clone()
    };
    let left = StayReason::JustLeft { pool: "slow".into(), left_ms: 300_000 };
    assert_eq!(at(&mut planner, 1), Outcome::Stay { reason: left });
    assert!(matches!(at(&mut planner, 300_002), Outcome::Move { forced: false, .. }));
}

#[test]
fn a_port_goes_to_the_cheapest_link_that_carries_it() {
    let link = |name: &str, gbit: f64, cost_per_gbit_hour: f64| {
        let gives = Some(flow(0.0, gbit * 1e9 / 8.0));
        let foreign = Flow::default();
        pool(
            name,
            PoolKind::Link { gives, instance_bytes_per_s: None, foreign, cost_per_gbit_hour },
            0.0,
            1.0,
        )
    };
    let mut limited = link("limited", 10.0, 0.01);
    if let PoolKind::Link { instance_bytes_per_s, .. } = &mut limited.kind {
        *instance_bytes_per_s = Some(5e6);
    }
    let links = vec![link("thin", 0.1, 0.02), link("wide", 1.0, 0.2), link("wider", 10.0, 0.9), limited];
    let mut view = view("a", "slow", &[]);
    view.demand.points = points(Resource::Port, &[(5_000, 1e6), (15_000, 50e6)]);
    view.movable = vec![MoveKind::Link];
    view.port = Some(PortView { pool: Some("thin".into()), now: flow(0.0, 1e6) });
    let decision = decided(view.clone(), &links);
    assert!(
        matches!(&decision.outcome, Outcome::Move { to, forced: true, .. } if to == "wide"),
        "{decision:?}"
    );
    let limited = decision.candidates.iter().find(|candidate| candidate.pool == "limited").unwrap();
    assert_eq!(limited.flow.unwrap().available.bytes_per_s, 5e6 * 0.9);
    assert!(explain(&decision).contains("204.00 Mbit/s expected in the fuller direction, 400.00 at P95"));
    view.port = Some(PortView { pool: Some("wide".into()), now: flow(0.0, 1e6) });
    view.demand.points = points(Resource::Port, &[(5_000, 9e6), (15_000, 9e6)]);
    let decision = decided(view, &links);
    assert!(
        matches!(&decision.outcome, Outcome::Move { to, forced: false, .. } if to == "thin"),
        "{decision:?}"
    );
}

/// An instance whose cores and volume both get too small, the cores first.
fn short_of_both() -> (InstanceView, Vec<Pool>) {
    let core = |name: &str, cpu, cores, cost| Pool {
        cost_per_core_hour: cost,
        capacity: Capacity { cores, memory_bytes: 0 },
        ..pool(
            name,
            PoolKind::Cpu { cpus: [cpu].into(), instance_cores: None, slowdown: Default::default() },
            0.0,
            1.0,
        )
    };
    let mut all = pools();
    all.insert(
        0,
        Pool {
            capacity: Capacity { cores: 2.0, memory_bytes: 8 << 30 },
            ..pool(THIS_HOST, PoolKind::ThisHost, 0.0, 1.0)
        },
    );
    all.push(core("few", 0, 0.5, 0.01));
    all.push(core("many", 1, 2.0, 0.04));
    let mut both = view("a", "slow", &RISES);
    both.cpu_pool = Some("few".into());
    both.movable = vec![MoveKind::Cpu, MoveKind::Storage, MoveKind::Host];
    both.demand.points.extend(points(Resource::Cpu, &[(5_000, 0.9), (60_000, 0.9)]));
    (both, all)
}

#[test]
fn several_moves_of_one_instance_are_made_one_after_the_other() {
    let (both, all) = short_of_both();
    let plan = planner().plan(AT, std::slice::from_ref(&both), &all);
    let of =
        |plan: &Plan, kind| plan.decisions.iter().find(|decision| decision.kind == kind).unwrap().clone();
    let (cpu, storage) = (of(&plan, MoveKind::Cpu), of(&plan, MoveKind::Storage));
    // Both are short; the cores come first, at once, since the copy takes long.
    assert!(matches!(cpu.outcome, Outcome::Move { start_by: AT, .. }), "{}", explain(&cpu));
    assert_eq!(storage.outcome, Outcome::Stay { reason: StayReason::OtherMoveFirst });
    let steps: Vec<(MoveKind, &str)> = cpu.steps.iter().map(|step| (step.kind, step.to.as_str())).collect();
    assert_eq!(steps, [(MoveKind::Cpu, "many"), (MoveKind::Storage, "fast")]);
    assert!(
        explain(&storage).contains("one after the other: 1. cores to many (needed in "),
        "{}",
        explain(&storage)
    );

    // With the cores there, the volume is next; with it on its way, nothing else is.
    let mut next = both.clone();
    next.cpu_pool = Some("many".into());
    let mut planner = planner();
    let plan = planner.plan(AT, &[next.clone()], &all);
    assert!(of(&plan, MoveKind::Storage).moves());
    planner.part_started(&next.instance, MoveKind::Storage, Some("data"), "fast");
    let plan = planner.plan(AT, &[both], &all);
    assert!(plan.decisions.iter().all(|decision| !decision.moves()), "{plan:?}");
}

#[test]
fn what_only_saves_waits_while_what_must_move_can_not() {
    let (mut both, all) = short_of_both();
    both.volumes[0].pool = Some("fast".into());
    both.demand.points.retain(|point| point.resource == Resource::Cpu);
    both.demand.points.extend(view("a", "fast", &IDLE).demand.points);
    let mut planner = planner();
    let of =
        |plan: &Plan, kind| plan.decisions.iter().find(|decision| decision.kind == kind).unwrap().clone();
    planner.started(&both.instance, "many");
    planner.failed(&both.instance, MoveKind::Cpu, AT);
    let plan = planner.plan(AT, &[both.clone()], &all);
    assert!(matches!(of(&plan, MoveKind::Cpu).outcome, Outcome::Stay { reason: StayReason::BackOff { .. } }));
    assert_eq!(of(&plan, MoveKind::Storage).outcome, Outcome::Stay { reason: StayReason::OtherMoveFirst });
}

/// A disk fails, and then its pool is gone: what waits after the failure goes on waiting, so nothing is moved that only saves.
#[test]
fn a_failure_is_not_over_when_the_pool_is_gone() {
    let (mut both, mut all) = short_of_both();
    both.cpu_pool = Some("many".into());
    both.demand.points.retain(|point| point.resource != Resource::Cpu);
    both.demand.points.extend(points(Resource::Cpu, &[(1_000, 0.1), (10_000, 0.1)]));
    let mut planner = planner();
    let of =
        |plan: &Plan, kind| plan.decisions.iter().find(|decision| decision.kind == kind).unwrap().clone();
    planner.part_started(&both.instance, MoveKind::Storage, Some("data"), "fast");
    planner.part_failed(&both.instance, MoveKind::Storage, Some("data"), "Input/output error", AT);
    for pool in all.iter_mut().filter(|pool| pool.kind.is_for_flows() && pool.name != "slow") {
        pool.state = PoolState::Unavailable { reason: "no file system is mounted there".into() };
    }
    for pool in all.iter_mut().filter(|pool| pool.name == "many") {
        pool.cost_per_core_hour = 4.0;
    }
    let plan = planner.plan(AT, std::slice::from_ref(&both), &all);
    let (cpu, storage) = (of(&plan, MoveKind::Cpu), of(&plan, MoveKind::Storage));
    assert!(explain(&storage).contains("Input/output error"), "{}", explain(&storage));
    assert_eq!(cpu.outcome, Outcome::Stay { reason: StayReason::OtherMoveFirst }, "{}", explain(&cpu));
    // Later it is only short, like one that never had another pool.
    let plan = planner.plan(UnixMillis(AT.0 + 60_000), &[both], &all);
    assert_eq!(of(&plan, MoveKind::Storage).outcome, Outcome::Stay { reason: StayReason::NoPoolFits });
    assert!(of(&plan, MoveKind::Cpu).moves(), "{}", explain(&of(&plan, MoveKind::Cpu)));
}

#[test]
fn a_migration_takes_the_volumes_along() {
    let (both, mut all) = short_of_both();
    // No cores here are enough.
    all.retain(|pool| pool.name != "many");
    let mut host = storage("b", None, 0.0, 1.0);
    host.kind = PoolKind::Host { address: "10.0.0.2:7791".parse().unwrap() };
    host.capacity = Capacity { cores: 4.0, memory_bytes: 8 << 30 };
    all.push(host);
    all[0].capacity.cores = 0.5;
    let plan = planner().plan(AT, &[both], &all);
    let of = |kind| plan.decisions.iter().find(|decision| decision.kind == kind).unwrap();
    assert!(of(MoveKind::Host).moves(), "{}", explain(of(MoveKind::Host)));
    assert_eq!(of(MoveKind::Storage).outcome, Outcome::Stay { reason: StayReason::OtherMoveFirst });
}

mod amounts;
mod disks;
mod leads;
