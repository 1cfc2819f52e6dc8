//! Plans know what others take of cores, and how much longer work takes there.

use proptest::prelude::*;
use rswap_forecast::{DemandPoint, Evidence, Quantiles, Resource};
use rswap_types::{Capacity, Pool, PoolKind, PoolState, SlowdownCurve, SlowdownPoint, THIS_HOST};

use super::*;

/// A set of one core: what instances use and others take of it, and (load, times) that work was seen to take there.
fn core(name: &str, cpu: usize, used: f64, performance: f64, slowdown: &[(f64, f64)]) -> Pool {
    let points = slowdown.iter().map(|&(load, times)| SlowdownPoint { load, times, seconds: 3.0 });
    let slowdown = SlowdownCurve { points: points.collect() };
    Pool {
        name: name.into(),
        kind: PoolKind::Cpu { cpus: [cpu].into(), instance_cores: None, slowdown },
        capacity: Capacity { cores: 1.0, memory_bytes: 0 },
        used: Capacity { cores: used, memory_bytes: 0 },
        cost_per_core_hour: 0.04,
        cost_per_gib_hour: 0.0,
        performance,
        state: PoolState::Ready,
    }
}

fn host(used: f64) -> Pool {
    let capacity = Capacity { cores: 2.0, memory_bytes: 0 };
    Pool { kind: PoolKind::ThisHost, capacity, ..core(THIS_HOST, 0, used, 1.0, &[]) }
}

/// An instance that uses, and needs, so many cores.
fn view(name: &str, on: &str, need: f64) -> InstanceView {
    let instance: InstanceName = name.parse().unwrap();
    let point = |horizon_ms| DemandPoint {
        resource: Resource::Cpu,
        horizon_ms,
        need: Quantiles { p50: need, p90: need, p95: need, p99: need },
        evidence: Evidence::Enough { seen: 100, p95_coverage: 0.95 },
    };
    InstanceView {
        instance: instance.clone(),
        host: None,
        cpu_pool: Some(on.into()),
        demand: Demand { instance, at: UnixMillis(0), points: vec![point(1_000), point(5_000)] },
        cores: need,
        resident_bytes: 0,
        dirty_bytes_per_s: None,
        movable: vec![MoveKind::Cpu],
        labels: BTreeMap::new(),
        volumes: Vec::new(),
        port: None,
    }
}

fn config() -> PlanConfig {
    PlanConfig { cool_down_ms: 1_000, weight: 1.0, threshold: -1_000.0, ..PlanConfig::default() }
}

#[test]
fn what_others_take_is_not_there_and_is_what_it_moves_for() {
    let views = [view("a", "one", 0.4)];
    let alone = [host(0.4), core("one", 0, 0.4, 1.0, &[]), core("two", 1, 0.0, 1.0, &[])];
    let plan = Planner::new(config()).plan(UnixMillis(0), &views, &alone);
    assert!(!plan.decisions[0].moves(), "{}", explain(&plan.decisions[0]));

    let taken = [host(1.0), core("one", 0, 1.0, 1.0, &[]), core("two", 1, 0.0, 1.0, &[])];
    let plan = Planner::new(config()).plan(UnixMillis(0), &views, &taken);
    let decision = &plan.decisions[0];
    let text = explain(decision);
    assert!(matches!(&decision.outcome, Outcome::Move { to, forced: true, .. } if to == "two"), "{text}");
    let here = decision.current.as_ref().unwrap();
    assert!((here.terms.others_cores - 0.6).abs() < 1e-9, "{text}");
    assert!(
        text.contains("the present one can't meet the need: others than instances take 0.60 of its cores"),
        "{text}"
    );
    assert!(text.contains("others than instances take 0.60 cores of one\n"), "{text}");

    // Where others take as much, it is not better.
    let both = [host(1.6), core("one", 0, 1.0, 1.0, &[]), core("two", 1, 0.6, 1.0, &[])];
    let plan = Planner::new(config()).plan(UnixMillis(0), &views, &both);
    assert_eq!(plan.decisions[0].outcome, Outcome::Stay { reason: StayReason::NoPoolFits });
}

#[test]
fn a_need_of_its_own_is_not_said_to_be_others() {
    let views = [view("a", "one", 1.2)];
    let pools = [host(1.3), core("one", 0, 1.3, 1.0, &[]), core("two", 1, 0.0, 2.0, &[])];
    let plan = Planner::new(config()).plan(UnixMillis(0), &views, &pools);
    let text = explain(&plan.decisions[0]);
    assert!(plan.decisions[0].moves() && text.contains("the present one can't meet the need\n"), "{text}");
}

#[test]
fn idle_slow_cores_are_preferred_to_fast_ones_on_which_work_waits() {
    let views = [view("a", "fast", 0.3)];
    let on = |slowdown: &[(f64, f64)]| {
        let pools =
            [host(0.3), core("fast", 0, 0.3, 1.0, slowdown), core("slow", 1, 0.0, 0.7, &[(0.5, 1.0)])];
        Planner::new(config()).plan(UnixMillis(0), &views, &pools).decisions.remove(0)
    };
    let undisturbed = on(&[(0.3, 1.0)]);
    assert!(!undisturbed.moves(), "{}", explain(&undisturbed));
    let waiting = on(&[(0.3, 2.0)]);
    let text = explain(&waiting);
    assert!(matches!(&waiting.outcome, Outcome::Move { to, forced: false, .. } if to == "slow"), "{text}");
    assert!(
        text.contains("its score is better: work takes 2.00 times as long here for waiting (experienced in 3.0 s), 1.00 times there"),
        "{text}"
    );
    assert!(text.contains("for waiting, work takes 2.00 times as long on fast at a load of 30 %"), "{text}");
}

#[test]
fn it_is_asked_at_the_load_that_the_cores_would_have() {
    // Work waits on the fast ones only when there is much of it: for one that needs little they are the fast ones.
    let curve = [(0.25, 1.0), (0.9, 3.0)];
    let decide = |need: f64| {
        let pools =
            [host(need), core("slow", 0, need, 0.7, &[(1.0, 1.0)]), core("fast", 1, 0.0, 1.0, &curve)];
        Planner::new(config()).plan(UnixMillis(0), &[view("a", "slow", need)], &pools).decisions.remove(0)
    };
    assert!(matches!(&decide(0.15).outcome, Outcome::Move { to, .. } if to == "fast"));
    let busy = decide(0.6);
    assert!(!busy.moves(), "{}", explain(&busy));

    // Others that are there, and those that use it, are a part of that load.
    let beside = |used: f64, views: &[InstanceView]| {
        let pools = [host(0.2), core("slow", 0, 0.2, 0.7, &[(1.0, 1.0)]), core("fast", 1, used, 1.0, &curve)];
        let plan = Planner::new(config()).plan(UnixMillis(0), views, &pools);
        plan.decisions[0].candidates[0].terms.slowdown.unwrap().load
    };
    let alone = [view("a", "slow", 0.15)];
    assert!((beside(0.0, &alone) - 0.15).abs() < 1e-9);
    assert!((beside(0.4, &alone) - 0.55).abs() < 1e-9);
    let two = [view("a", "slow", 0.15), view("b", "fast", 0.4)];
    // Of another one, what it is expected to use, which is less than its limit.
    let load = beside(0.4, &two);
    assert!(load > 0.4 && load < 0.55 + 1e-9, "{load}");
}

#[test]
fn others_do_not_lead_it_around_in_a_circle() {
    let mut planner = Planner::new(config());
    let taken =
        |one: f64, two: f64| [host(one + two), core("one", 0, one, 1.0, &[]), core("two", 1, two, 1.0, &[])];
    let name: InstanceName = "a".parse().unwrap();
    let plan = planner.plan(UnixMillis(0), &[view("a", "one", 0.4)], &taken(1.2, 0.0));
    assert!(plan.decisions[0].moves());
    planner.started(&name, "two");
    planner.moved(&name, MoveKind::Cpu, UnixMillis(100));
    // They follow it.
    let there = [view("a", "two", 0.4)];
    let plan = planner.plan(UnixMillis(200), &there, &taken(0.0, 1.2));
    let text = explain(&plan.decisions[0]);
    assert_eq!(plan.decisions[0].outcome, Outcome::Stay { reason: StayReason::NoPoolFits }, "{text}");
    assert!(
        matches!(plan.decisions[0].candidates[0].dropped, Some(Dropped::LeftForOthers { left_ms: 10_000 })),
        "{text}"
    );
    // A need of its own may lead it back, and so may they, later.
    let busy = [view("a", "two", 0.98)];
    let mut wide = taken(0.0, 0.98);
    wide[1].capacity.cores = 2.0;
    assert!(planner.clone().plan(UnixMillis(300), &busy, &wide).decisions[0].moves());
    let plan = planner.plan(UnixMillis(10_300), &there, &taken(0.0, 1.2));
    assert!(matches!(&plan.decisions[0].outcome, Outcome::Move { to, .. } if to == "one"));
}

proptest! {
    /// However much others take, wherever: nobody is sent to where the need does not fit, and more of it never makes a pool better.
    #[test]
    fn nobody_is_sent_to_what_others_take(
        need in 0.01..1.2f64, taken in prop::collection::vec(0.0..1.5f64, 3), times in prop::collection::vec(1.0..9.0f64, 3),
    ) {
        let names = ["one", "two", "three"];
        let mut pools = vec![host(need + taken.iter().sum::<f64>())];
        for (cpu, name) in names.iter().enumerate() {
            let own = if cpu == 0 { need } else { 0.0 };
            pools.push(core(name, cpu, taken[cpu] + own, 1.0, &[(0.5, times[cpu])]));
        }
        let plan = Planner::new(config()).plan(UnixMillis(0), &[view("a", "one", need)], &pools);
        let decision = &plan.decisions[0];
        if let Outcome::Move { to, .. } = &decision.outcome {
            let at = names.iter().position(|name| name == to).unwrap();
            prop_assert!(need + taken[at] <= 0.9 + 1e-9, "{}", explain(decision));
        }
        prop_assert!(!explain(decision).is_empty());
        let score = |decision: &Decision| decision.current.as_ref().unwrap().score;
        pools[1].used.cores += 0.3;
        let worse = Planner::new(config()).plan(UnixMillis(0), &[view("a", "one", need)], &pools);
        prop_assert!(score(&worse.decisions[0]) >= score(decision) - 1e-9);
    }
}
