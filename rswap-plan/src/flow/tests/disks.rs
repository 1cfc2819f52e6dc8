//! What others do on a disk, several pools on one, and what requests take at a load.

use rswap_types::LatencyPoint;

use super::*;

fn with(pool: Pool, change: impl FnOnce(&mut BTreeSet<String>, &mut Flow, &mut LatencyCurve)) -> Pool {
    let mut pool = pool;
    if let PoolKind::Storage { disks, foreign, latency, .. } = &mut pool.kind {
        change(disks, foreign, latency);
    }
    pool
}

#[test]
fn what_others_do_on_a_disk_is_not_there_for_volumes() {
    let half = [(5_000, 100.0), (60_000, 100.0)];
    let mut pools = pools();
    pools[0] = with(storage("slow", Some(flow(200.0, 20e6)), 0.02, 0.1), |_, foreign, _| {
        *foreign = flow(80.0, 1e6);
    });
    let decision = decided(view("a", "slow", &half), &pools);
    let here = decision.current.as_ref().unwrap().flow.unwrap();
    assert_eq!(here.available, flow(200.0 * 0.95 - 80.0, 20e6 * 0.95 - 1e6));
    assert!(!matches!(decision.outcome, Outcome::Move { forced: true, .. }), "{}", explain(&decision));
    pools[0] = with(pools[0].clone(), |_, foreign, _| *foreign = flow(91.0, 1e6));
    let decision = decided(view("a", "slow", &half), &pools);
    assert!(matches!(decision.outcome, Outcome::Move { forced: true, .. }), "{}", explain(&decision));
    // And who would come finds no more than is left.
    pools[1] = with(pools[1].clone(), |_, foreign, _| *foreign = flow(4_450.0, 0.0));
    let decision = decided(view("a", "slow", &half), &pools);
    assert_eq!(decision.outcome, Outcome::Stay { reason: StayReason::NoPoolFits });
}

/// What the kernel writes for a volume is nobody's: wherever the volume is, others seem to be.
#[test]
fn what_comes_along_unseen_does_not_make_it_walk_in_circles() {
    let need = [(5_000, 100.0), (60_000, 100.0)];
    let mut planner = planner();
    let a: InstanceName = "a".parse().unwrap();
    let (mut on, mut moves) = ("slow", 0);
    for second in 0..290 {
        let equal = |name: &str| {
            with(storage(name, Some(flow(200.0, 20e6)), 0.02, 0.1), |_, foreign, _| {
                *foreign = if name == on { flow(150.0, 1e6) } else { Flow::default() };
            })
        };
        let pools = [equal("slow"), equal("equal")];
        let now = UnixMillis(AT.0 + second * 1_000);
        let decision = one(&planner.plan(now, &[view("a", on, &need)], &pools)).clone();
        if let Outcome::Move { to, .. } = &decision.outcome {
            planner.part_started(&a, MoveKind::Storage, Some("data"), to);
            planner.part_moved(&a, MoveKind::Storage, Some("data"), now);
            on = if on == "slow" { "equal" } else { "slow" };
            moves += 1;
        } else if moves > 0 {
            assert!(
                explain(&decision).contains("it left that a short while ago, and others' use"),
                "{}",
                explain(&decision)
            );
        }
    }
    assert_eq!(moves, 1);
}

#[test]
fn pools_on_one_disk_share_what_it_gives() {
    let need = [(5_000, 100.0), (60_000, 100.0)];
    let on = |disk: &str| {
        let mut pools = pools();
        pools.push(with(storage("beside", Some(flow(200.0, 20e6)), 0.03, 0.1), |disks, _, _| {
            *disks = [disk.to_owned()].into();
        }));
        let views = [view("a", "slow", &need), view("b", "beside", &need)];
        planner().plan(AT, &views, &pools).decisions
    };
    // On disks of their own each has enough.
    assert!(
        on("other").iter().all(|decision| !matches!(decision.outcome, Outcome::Move { forced: true, .. }))
    );
    // On one, both have too little, and nothing is won by going next door.
    let together = on("slow");
    for decision in &together {
        let here = decision.current.as_ref().unwrap();
        assert!(matches!(here.dropped, Some(Dropped::Flow { .. })), "{}", explain(decision));
        let beside =
            decision.candidates.iter().find(|candidate| candidate.pool != "fast" && candidate.pool != "new");
        assert!(matches!(beside.unwrap().dropped, Some(Dropped::Flow { .. })), "{}", explain(decision));
    }
    assert_eq!(together.iter().filter(|decision| decision.moves()).count(), 1);
    // Alone there, a volume may go from one to the other: it does not stand in its own way.
    let mut pools = pools();
    pools[0].cost_per_gib_hour = 0.1;
    pools.push(with(storage("beside", Some(flow(200.0, 20e6)), 0.001, 0.1), |disks, _, _| {
        *disks = ["slow".to_owned()].into();
    }));
    let decision = decided(view("a", "slow", &need), &pools);
    assert!(
        matches!(&decision.outcome, Outcome::Move { to, .. } if to == "beside"),
        "{}",
        explain(&decision)
    );
}

/// (requests/s, microseconds)
fn experienced(points: &[(f64, f64)]) -> LatencyCurve {
    let point = |&(operations_per_s, p50_us): &(f64, f64)| LatencyPoint {
        operations_per_s,
        p50_us,
        p99_us: 3.0 * p50_us,
        requests: 500.0,
    };
    LatencyCurve { reference_us: 100.0, points: points.iter().map(point).collect() }
}

/// A fast disk that is slow while others ask much of it, and a slow one that has nothing to do. Both cost the same.
fn loaded_and_idle(others_per_s: f64) -> Vec<Pool> {
    let fast = with(storage("fast", Some(flow(20_000.0, 900e6)), 0.01, 1.0), |_, foreign, latency| {
        *foreign = flow(others_per_s, others_per_s * 4096.0);
        *latency = experienced(&[(100.0, 100.0), (1_000.0, 110.0), (10_000.0, 5_000.0)]);
    });
    let slow = with(storage("slow", Some(flow(2_000.0, 100e6)), 0.01, 0.25), |_, _, latency| {
        *latency = experienced(&[(100.0, 400.0), (1_000.0, 450.0)]);
    });
    vec![fast, slow]
}

fn minded() -> Planner {
    Planner::new(PlanConfig { io_weight: 1.0, threshold: -100.0, ..PlanConfig::default() })
}

const STEADY: [(u64, f64); 2] = [(5_000, 200.0), (60_000, 200.0)];

#[test]
fn an_idle_slow_disk_wins_over_a_loaded_fast_one_while_it_is_loaded() {
    let mut planner = minded();
    let a: InstanceName = "a".parse().unwrap();
    let at = |planner: &mut Planner, ms: u64, on: &str, others_per_s: f64| {
        let plan =
            planner.plan(UnixMillis(AT.0 + ms), &[view("a", on, &STEADY)], &loaded_and_idle(others_per_s));
        one(&plan).clone()
    };
    assert!(!at(&mut planner, 0, "fast", 0.0).moves());
    let decision = at(&mut planner, 1_000, "fast", 9_800.0);
    assert!(
        matches!(&decision.outcome, Outcome::Move { to, forced: false, .. } if to == "slow"),
        "{}",
        explain(&decision)
    );
    let here = decision.current.as_ref().unwrap();
    // 200 of a thousand requests, at a fiftieth of the speed.
    assert!((here.terms.performance - 0.2 * 0.02).abs() < 1e-6, "{here:?}");
    let there = decision.candidates.iter().find(|candidate| candidate.pool == "slow").unwrap();
    let speed = there.terms.performance / 0.2;
    assert!(speed > 0.22 && speed < 0.25, "{speed}");
    let text = explain(&decision);
    assert!(
        text.contains("its score is better: a request takes 5000 us here (experienced in 500 requests)"),
        "{text}"
    );
    assert!(text.contains("5000 us on fast at 10000 requests/s (experienced in 500 requests)"), "{text}");

    planner.part_started(&a, MoveKind::Storage, Some("data"), "slow");
    planner.part_moved(&a, MoveKind::Storage, Some("data"), UnixMillis(AT.0 + 2_000));
    // While the load is there it stays; when the load comes and goes, it does not run after it.
    assert!(!at(&mut planner, 3_000, "slow", 9_800.0).moves());
    for round in 0..100 {
        let decision =
            at(&mut planner, 4_000 + round * 1_000, "slow", if round % 2 == 0 { 0.0 } else { 9_800.0 });
        assert!(!decision.moves(), "{}", explain(&decision));
    }
    assert!(matches!(
        at(&mut planner, 200_000, "slow", 0.0).outcome,
        Outcome::Stay { reason: StayReason::JustLeft { .. } }
    ));
    let back = at(&mut planner, 400_000, "slow", 0.0);
    assert!(
        matches!(&back.outcome, Outcome::Move { to, forced: false, .. } if to == "fast"),
        "{}",
        explain(&back)
    );
}

#[test]
fn the_load_that_a_volume_would_bring_is_reckoned_with() {
    // Nobody else is there: what makes it slow is what the volume brings.
    let heavy = [(5_000, 1_500.0), (60_000, 1_500.0)];
    let mut pools = loaded_and_idle(0.0);
    pools[1] = with(pools[1].clone(), |_, _, latency| {
        *latency = experienced(&[(100.0, 50.0), (200.0, 50.0), (1_400.0, 4_000.0)]);
    });
    let decision = one(&minded().plan(AT, &[view("a", "fast", &heavy)], &pools)).clone();
    assert!(!decision.moves(), "{}", explain(&decision));
    let there = decision.candidates[0].flow.unwrap().latency.unwrap();
    assert_eq!((there.operations_per_s, there.p50_us), (1_500.0, 4_000.0));
    // With little to do it would be the faster one.
    let decision = one(&minded().plan(AT, &[view("a", "fast", &STEADY)], &pools)).clone();
    assert!(matches!(&decision.outcome, Outcome::Move { to, .. } if to == "slow"), "{}", explain(&decision));
    // The next volume finds the load of the first one there.
    let mut both = [view("a", "fast", &STEADY), view("b", "slow", &heavy)];
    both[1].labels.insert(rules::STAY.into(), "true".into());
    let plan = minded().plan(AT, &both, &pools);
    let first = plan.decisions.iter().find(|decision| decision.instance.as_str() == "a").unwrap();
    assert!(!first.moves(), "{}", explain(first));
}

#[test]
fn a_gain_of_speed_under_the_margin_moves_nobody() {
    let mut pools = loaded_and_idle(0.0);
    pools[1] = with(pools[1].clone(), |_, _, latency| *latency = experienced(&[(200.0, 99.0)]));
    let decision = one(&minded().plan(AT, &[view("a", "fast", &STEADY)], &pools)).clone();
    assert!(!decision.moves(), "{}", explain(&decision));
}
