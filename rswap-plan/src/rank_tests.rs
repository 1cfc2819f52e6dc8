//! Ranked quickly, a fleet is planned exactly as if every pool had been explained to every instance.

use std::collections::BTreeSet;

use proptest::prelude::*;
use rswap_forecast::{DemandPoint, Evidence, Quantiles, Resource};
use rswap_types::{Capacity, Pool, PoolKind, PoolState, SlowdownCurve, SlowdownPoint};

use super::{rank, *};

/// One of the host's core sets, or another host. Prices and speeds are few, so that totals are often equal.
fn pool(number: usize, is_cpu: bool, (cores, gib, kind, state): (f64, u64, usize, u8)) -> Pool {
    let (cost, performance) = [(0.01, 0.5), (0.04, 1.0), (0.04, 1.0), (0.06, 1.3)][kind];
    let first = number * 4;
    Pool {
        name: format!("pool-{:02}", (number * 7) % 41),
        kind: if is_cpu {
            let point = |load, times| SlowdownPoint { load, times, seconds: 1.0 };
            let points = vec![point(0.2, 1.0 + kind as f64), point(0.9, 1.0 + 2.0 * gib as f64)];
            PoolKind::Cpu {
                cpus: (first..first + 4).collect::<BTreeSet<_>>(),
                instance_cores: None,
                slowdown: SlowdownCurve { points },
            }
        } else {
            PoolKind::Host { address: "10.0.0.2:7791".parse().unwrap() }
        },
        capacity: Capacity { cores, memory_bytes: gib << 30 },
        used: Capacity { cores: cores * 0.1 * kind as f64, memory_bytes: 0 },
        cost_per_core_hour: cost,
        cost_per_gib_hour: if kind == 1 { 0.0 } else { 0.004 },
        performance,
        state: match state {
            0 => PoolState::Draining,
            1 => PoolState::Unavailable { reason: "off".into() },
            _ => PoolState::Ready,
        },
    }
}

fn pools() -> impl Strategy<Value = Vec<Pool>> {
    let one = (0.5..8.0f64, 1..8u64, 0..4usize, 0..12u8);
    let some = |most: usize| prop::collection::vec(one.clone(), 1..most);
    (some(5), some(36)).prop_map(|(sets, hosts)| {
        let cpu = sets.into_iter().map(|of| (true, of));
        let all = cpu.chain(hosts.into_iter().map(|of| (false, of)));
        let mut pools: Vec<Pool> =
            all.enumerate().map(|(number, (is_cpu, of))| pool(number, is_cpu, of)).collect();
        let this_host =
            Pool { name: rswap_types::THIS_HOST.into(), kind: PoolKind::ThisHost, ..pools[0].clone() };
        pools.push(this_host);
        pools
    })
}

type Described = (usize, f64, f64, Option<f64>, u64, u8, bool);

fn view(number: usize, described: &Described, pools: &[Pool]) -> InstanceView {
    let &(at, need, tail, dirty, gib, label, believed) = described;
    let evidence = match believed {
        true => Evidence::Enough { seen: 100, p95_coverage: 0.95 },
        false => Evidence::TooLittle { seen: 1, needed: 9 },
    };
    let point = |resource, horizon_ms, need: f64| DemandPoint {
        resource,
        horizon_ms,
        need: Quantiles {
            p50: need,
            p90: need * (1.0 + tail / 4.0),
            p95: need * (1.0 + tail / 2.0),
            p99: need * (1.0 + tail),
        },
        evidence,
    };
    let instance: InstanceName = format!("i{number}").parse().unwrap();
    let pool = &pools[at % pools.len()];
    let fleet = matches!(pool.kind, PoolKind::Host { .. });
    let labels = match label {
        0 => vec![(rules::APART, "x")],
        1 => vec![(rules::TOGETHER, "y")],
        2 => vec![(rules::PIN, "pool-07,pool-14")],
        3 => vec![(rules::STAY, "true")],
        _ => vec![],
    };
    InstanceView {
        host: fleet.then(|| pool.name.clone()),
        cpu_pool: pool.cpus().map(|_| pool.name.clone()),
        demand: Demand {
            instance: instance.clone(),
            at: UnixMillis(0),
            points: vec![
                point(Resource::Cpu, 5_000, need / 2.0),
                point(Resource::Cpu, 30_000, need),
                point(Resource::Memory, 30_000, (gib << 29) as f64),
            ],
        },
        instance,
        cores: need / 3.0,
        resident_bytes: gib << 29,
        dirty_bytes_per_s: dirty,
        movable: if fleet { vec![MoveKind::Host] } else { vec![MoveKind::Cpu, MoveKind::Host] },
        labels: labels.into_iter().map(|(label, value)| (label.to_owned(), value.to_owned())).collect(),
        volumes: Vec::new(),
        port: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn ranked_quickly_a_plan_is_the_same(
        mut pools in pools(),
        described in prop::collection::vec(
            (0..99usize, 0.0..4.0f64, 0.0..2.0f64, prop::option::of(0.0..150e6f64), 0..6u64, 0..12u8, prop::bool::weighted(0.9)),
            1..20,
        ),
        links in prop::collection::vec(1e7..1e9f64, 0..6),
        budgets in (1..4u32, 1..5u32, 1..8u32),
        correlation in prop_oneof![Just(1.0), Just(0.2)],
    ) {
        let (moves_per_host, moves_per_link, moves_per_hour) = budgets;
        let config = PlanConfig {
            moves_per_host, moves_per_link, moves_per_hour, correlation, cool_down_ms: 1_000, hysteresis: 0.0, ..PlanConfig::default()
        };
        let mut planner = Planner::new(config);
        for (number, link) in links.iter().enumerate() {
            planner.link_measured(&format!("pool-{:02}", number * 7), *link);
        }
        let views: Vec<_> = described.iter().enumerate().map(|(i, it)| view(i, it, &pools)).collect();
        for view in &views {
            let at = view.host.as_deref().or(view.cpu_pool.as_deref());
            for pool in pools.iter_mut().filter(|pool| Some(pool.name.as_str()) == at) {
                pool.used.cores += view.cores;
                pool.used.memory_bytes += view.resident_bytes;
            }
        }
        for round in 0..3 {
            let now = UnixMillis(1_000_000 + round * 5_000);
            let plan = planner.clone().plan_by(rank::plainly, now, &views, &pools);
            prop_assert_eq!(&planner.plan(now, &views, &pools), &plan);
            // Some begin, and some of these end.
            for (number, decision) in plan.decisions.iter().enumerate() {
                if let Outcome::Move { to, .. } = &decision.outcome {
                    planner.started(&decision.instance, to);
                    match number % 3 {
                        0 => planner.moved(&decision.instance, decision.kind, now),
                        1 => planner.failed(&decision.instance, decision.kind, now),
                        _ => {}
                    }
                }
            }
        }
    }
}
