//! Each amount that a decision rests on, by itself: quantile, share, crossing, price, wait.

use super::*;

fn quantiles(p50: f64, p90: f64, p95: f64, p99: f64) -> Quantiles {
    Quantiles { p50, p90, p95, p99 }
}

/// A view that needs these quantiles of requests, of 4 KiB each, all the time.
fn uncertain(on: &str, need: Quantiles) -> InstanceView {
    let point = |resource, need| DemandPoint { resource, horizon_ms: 30_000, need, evidence: ENOUGH };
    let bytes = quantiles(need.p50 * 4096.0, need.p90 * 4096.0, need.p95 * 4096.0, need.p99 * 4096.0);
    let mut view = view("a", on, &[]);
    view.demand.points = vec![point(Resource::VolumeOperations, need), point(Resource::VolumeBytes, bytes)];
    view
}

fn is_forced(decision: &Decision) -> bool {
    matches!(decision.outcome, Outcome::Move { forced: true, .. })
}

#[test]
fn the_limit_is_the_configured_quantile_of_both_requests_and_bytes() {
    // The slow one has 190 for who is there.
    let need = quantiles(50.0, 80.0, 150.0, 300.0);
    let decision = decided(uncertain("slow", need), &pools());
    assert_eq!(decision.flow.unwrap().limit, flow(150.0, 150.0 * 4096.0));
    assert!(!is_forced(&decision), "{}", explain(&decision));
    let config = PlanConfig { quantile: Quantile::P99, ..PlanConfig::default() };
    let decision = planned(&mut Planner::new(config), uncertain("slow", need), &pools());
    assert_eq!(decision.flow.unwrap().limit, flow(300.0, 300.0 * 4096.0));
    assert!(is_forced(&decision), "{}", explain(&decision));
    let decision = decided(uncertain("slow", quantiles(50.0, 80.0, 195.0, 300.0)), &pools());
    assert!(is_forced(&decision), "{}", explain(&decision));
}

#[test]
fn of_several_volumes_each_needs_its_share() {
    let mut both = view("a", "slow", &[(5_000, 400.0), (15_000, 400.0)]);
    both.volumes[0].share = 0.4;
    both.volumes.push(VolumeView {
        name: "logs".into(),
        pool: Some("fast".into()),
        share: 0.9,
        ..both.volumes[0].clone()
    });
    let plan = planner().plan(AT, &[both.clone()], &pools());
    let need = |plan: &Plan, volume: &str| {
        let found = plan.decisions.iter().find(|decision| decision.volume.as_deref() == Some(volume));
        found.unwrap().flow.unwrap()
    };
    assert_eq!(need(&plan, "data").limit, flow(160.0, 160.0 * 4096.0));
    assert_eq!(need(&plan, "data").expected, flow(160.0, 160.0 * 4096.0));
    assert_eq!(need(&plan, "logs").limit.operations_per_s, 360.0);
    assert!(plan.decisions.iter().all(|decision| !is_forced(decision)));
    both.volumes[0].share = 0.5;
    let plan = planner().plan(AT, &[both], &pools());
    assert!(plan.decisions.iter().any(is_forced), "200 of the 190 that it has");
}

#[test]
fn a_part_crosses_when_the_whole_is_larger_by_as_much() {
    let mut half = view("a", "slow", &[(5_000, 100.0), (15_000, 900.0)]);
    half.volumes[0].share = 0.5;
    // 190 of its own are 380 of all: along the line from 100 to 900.
    assert_eq!(decided(half, &pools()).crossing_in_ms, Some(8_500));
}

#[test]
fn what_crosses_first_counts_requests_or_bytes() {
    let mut view = view("a", "slow", &[]);
    let mut of = |operations: &[(u64, f64)], bytes: &[(u64, f64)]| {
        view.demand.points = points(Resource::VolumeOperations, operations);
        view.demand.points.extend(points(Resource::VolumeBytes, bytes));
        decided(view.clone(), &pools()).crossing_in_ms
    };
    let (operations, bytes) = ([(5_000, 100.0), (15_000, 280.0)], [(5_000, 1e6), (15_000, 37e6)]);
    assert_eq!(of(&operations, &[(5_000, 1e6)]), Some(10_000));
    assert_eq!(of(&[(5_000, 100.0)], &bytes), Some(10_000));
    assert_eq!(of(&operations, &[(5_000, 1e6), (15_000, 73e6)]), Some(7_500));
    assert_eq!(of(&[(5_000, 100.0), (15_000, 460.0)], &bytes), Some(7_500));
}

#[test]
fn a_move_costs_both_places_what_it_copies_and_the_stand_still() {
    let mut view = view("a", "slow", &RISES);
    view.volumes[0].now = flow(1_000.0, 5e6);
    let decision = decided(view.clone(), &pools());
    let price =
        decision.candidates.iter().find(|candidate| candidate.pool == "fast").unwrap().move_price.unwrap();
    // 512 MiB at 50 MB/s, while 5 MB/s are written: what is copied is copied again a tenth of it, and again.
    let size = (512 * MIB) as f64;
    let bytes = size / 0.9;
    let near =
        |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-6, "{found}, not {expected}");
    near(price.bytes as f64, bytes);
    near(price.seconds, bytes / 50e6 + 0.5);
    let still_s = 0.02 + size * 1e-5 / 50e6;
    near(price.unavailability_ms, still_s * 1e3);
    // Half a GiB at 0.2, 0.0001 a GiB copied, 10 an hour of standing still.
    let parts = [price.seconds / 3600.0 * 0.1, bytes / f64::from(1 << 30) * 0.0001, still_s / 3600.0 * 10.0];
    near(price.money, parts.iter().sum());
    assert!(parts.iter().all(|part| *part > price.money / 100.0), "each of them is seen: {parts:?}");
}

#[test]
fn each_failure_in_a_row_doubles_the_wait_up_to_a_limit() {
    let mut planner = planner();
    let a: InstanceName = "a".parse().unwrap();
    let mut waits = Vec::new();
    for _ in 0..9 {
        planner.part_failed(&a, MoveKind::Storage, Some("data"), "no", AT);
        match planned(&mut planner, view("a", "slow", &RISES), &pools()).outcome {
            Outcome::Stay { reason: StayReason::BackOff { left_ms, .. } } => waits.push(left_ms / 1000),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(waits, [30, 60, 120, 240, 480, 960, 1920, 1920, 1920]);
}

#[test]
fn room_that_was_given_away_is_not_given_twice() {
    let half = [(5_000, 300.0), (60_000, 300.0)];
    let views = [view("a", "slow", &half), view("b", "slow", &half)];
    let config = PlanConfig { volume_moves_per_pool: 2, ..PlanConfig::default() };
    let plan = Planner::new(config).plan(AT, &views, &pools());
    let stays = plan.decisions.iter().find(|decision| !decision.moves()).unwrap();
    let fast = stays.candidates.iter().find(|candidate| candidate.pool == "fast").unwrap();
    // Of 1024 MiB, less a tenth of the disk, one of the two has its 512.
    assert!(matches!(fast.dropped, Some(Dropped::Space { .. })), "{}", explain(stays));

    // Requests that a move under way will bring are gone, too.
    let mut pools = pools();
    pools[1] = storage("fast", Some(flow(600.0, 200e6)), 0.2, 1.0);
    let mut planner = Planner::new(PlanConfig { volume_moves_per_pool: 2, ..PlanConfig::default() });
    planner.part_started(&"a".parse().unwrap(), MoveKind::Storage, Some("data"), "fast");
    let plan = planner.plan(AT, &views, &pools);
    let b = plan.decisions.iter().find(|decision| decision.instance.as_str() == "b").unwrap();
    let fast = b.candidates.iter().find(|candidate| candidate.pool == "fast").unwrap();
    assert_eq!(fast.flow.unwrap().available.operations_per_s, 600.0 * 0.9 - 300.0);
    assert!(!b.moves(), "{}", explain(b));
}

#[test]
fn what_is_done_now_counts_where_it_is_more_than_was_forecast() {
    let mut b = view("b", "fast", &IDLE);
    b.volumes[0].now = flow(4_000.0, 1e6);
    let plan = planner().plan(AT, &[view("a", "slow", &RISES), b], &pools());
    let a = plan.decisions.iter().find(|decision| decision.instance.as_str() == "a").unwrap();
    let fast = a.candidates.iter().find(|candidate| candidate.pool == "fast").unwrap();
    assert_eq!(fast.flow.unwrap().available.operations_per_s, 4_500.0 - 4_000.0);
}

#[test]
fn who_is_short_first_chooses_first() {
    let mut pools = pools();
    pools[1] = storage("fast", Some(flow(500.0, 200e6)), 0.2, 1.0);
    // Each on a disk of its own: next to each other both would be short at once.
    pools.push(storage("slow too", Some(flow(200.0, 20e6)), 0.02, 0.1));
    for (a, b, first) in [(40_000, 5_000, "b"), (5_000, 40_000, "a")] {
        let rises = |at| [(at, 300.0), (60_000, 300.0)];
        let views = [view("a", "slow", &rises(a)), view("b", "slow too", &rises(b))];
        let plan = planner().plan(AT, &views, &pools);
        let moving: Vec<&str> =
            plan.decisions.iter().filter(|d| d.moves()).map(|d| d.instance.as_str()).collect();
        assert_eq!(moving, [first]);
    }
}

#[test]
fn steps_are_taken_to_last_twice_as_long_as_they_should() {
    let (both, all) = short_of_both();
    let plan = planner().plan(AT, &[both], &all);
    let cpu = plan.decisions.iter().find(|decision| decision.kind == MoveKind::Cpu).unwrap();
    let storage = plan.decisions.iter().find(|decision| decision.kind == MoveKind::Storage).unwrap();
    let price =
        storage.candidates.iter().find(|candidate| candidate.pool == "fast").unwrap().move_price.unwrap();
    assert_eq!(cpu.steps[1].takes_ms, (price.seconds * 2_000.0) as u64);
}

/// Also where the volume could be moved long before.
#[test]
fn with_a_migration_decided_nothing_else_of_the_instance_moves() {
    let (mut both, mut all) = short_of_both();
    all.retain(|pool| pool.name != "many");
    let mut host = storage("b", None, 0.0, 1.0);
    host.kind = PoolKind::Host { address: "10.0.0.2:7791".parse().unwrap() };
    host.capacity = Capacity { cores: 4.0, memory_bytes: 8 << 30 };
    all.push(host);
    all[0].capacity.cores = 0.5;
    // It takes most of a minute.
    both.resident_bytes = 4 << 30;
    both.demand.points.extend(points(Resource::Memory, &[(5_000, 4e9), (60_000, 4e9)]));
    let plan = planner().plan(AT, &[both], &all);
    let of = |kind| plan.decisions.iter().find(|decision| decision.kind == kind).unwrap();
    assert!(of(MoveKind::Host).moves(), "{}", explain(of(MoveKind::Host)));
    assert_eq!(of(MoveKind::Storage).outcome, Outcome::Stay { reason: StayReason::OtherMoveFirst });
}
