//! What the planner promises for many instances at once: rules, budgets, exchanges, draining, and no walking back and forth.

use proptest::prelude::*;
use rswap_forecast::{DemandPoint, Evidence, Quantiles, Resource};
use rswap_types::{Capacity, Pool, PoolKind, PoolState};

use super::*;

fn host(name: &str, cores: f64, cost: f64) -> Pool {
    Pool {
        name: name.into(),
        kind: PoolKind::Host { address: "10.0.0.2:7791".parse().unwrap() },
        capacity: Capacity { cores, memory_bytes: 64 << 30 },
        used: Capacity::default(),
        cost_per_core_hour: cost,
        cost_per_gib_hour: 0.005,
        performance: 1.0,
        state: PoolState::Ready,
    }
}

fn on(name: &str, host: &str, need: f64) -> InstanceView {
    let evidence = Evidence::Enough { seen: 100, p95_coverage: 0.95 };
    let point = |horizon_ms| DemandPoint {
        resource: Resource::Cpu,
        horizon_ms,
        need: Quantiles { p50: need, p90: need, p95: need, p99: need },
        evidence,
    };
    InstanceView {
        instance: name.parse().unwrap(),
        host: Some(host.into()),
        cpu_pool: None,
        demand: Demand {
            instance: name.parse().unwrap(),
            at: UnixMillis(0),
            points: vec![point(5_000), point(30_000)],
        },
        cores: need,
        resident_bytes: 100 << 20,
        dirty_bytes_per_s: Some(1e6),
        movable: vec![MoveKind::Host],
        labels: BTreeMap::new(),
        volumes: Vec::new(),
        port: None,
    }
}

fn labelled(mut view: InstanceView, label: &str, value: &str) -> InstanceView {
    view.labels.insert(label.to_owned(), value.to_owned());
    view
}

fn eager() -> PlanConfig {
    PlanConfig {
        hysteresis: 0.0,
        cool_down_ms: 0,
        headroom: 0.0,
        headroom_staying: 0.0,
        ..PlanConfig::default()
    }
}

fn plan(config: PlanConfig, views: &[InstanceView], pools: &[Pool]) -> Plan {
    Planner::new(config).plan(UnixMillis(1_000_000), views, pools)
}

fn moves(plan: &Plan) -> Vec<(&str, &str)> {
    let target = |decision| match decision {
        &Decision { outcome: Outcome::Move { ref to, .. }, ref instance, .. } => {
            Some((instance.as_str(), to.as_str()))
        }
        _ => None,
    };
    plan.decisions.iter().filter_map(target).collect()
}

#[test]
fn a_brief_plan_keeps_the_present_pool_and_the_best_other_of_who_stays() {
    let pools = [host("a", 8.0, 0.01), host("b", 8.0, 0.02), host("c", 8.0, 0.03), host("d", 8.0, 0.4)];
    let views = [on("cheap", "a", 2.0), on("dear", "d", 2.0)];
    let full = plan(eager(), &views, &pools);
    let brief = Planner::new(eager()).brief().plan(UnixMillis(1_000_000), &views, &pools);
    assert_eq!(moves(&brief), [("dear", "a")]);
    // Who moves is told of in full.
    assert_eq!(brief.decisions[1], full.decisions[1]);
    let (short, long) = (&brief.decisions[0], &full.decisions[0]);
    assert_eq!((long.candidates.len(), long.left_out), (3, 0));
    assert_eq!((short.candidates.len(), short.left_out), (1, 2));
    assert_eq!(short.candidates[0], long.candidates[0]);
    assert!(short.current.is_some() && short.current == long.current && short.outcome == long.outcome);
    assert_eq!(in_words(short)[0], in_words(long)[0]);
}

#[test]
fn two_change_places_where_neither_fits_next_to_the_other() {
    // "big" will need 3 of 2 cores; only on b, which "small" holds half of, would it fit, once that is gone.
    let pools = [host("a", 2.0, 0.04), host("b", 3.5, 0.04)];
    let mut views = [on("big", "a", 3.0), on("small", "b", 1.5)];
    let plan = plan(eager(), &views, &pools);
    assert_eq!(moves(&plan), [("big", "b"), ("small", "a")]);
    let text = explain(&plan.decisions[1]);
    assert!(text.contains("it makes room for big, which comes here"), "{text}");
    let text = explain(&plan.decisions[0]);
    assert!(text.contains("it changes places with small"), "{text}");

    // Who is told to stay is not exchanged.
    views[1] = labelled(views[1].clone(), rules::STAY, "true");
    let plan = super::fleet_tests::plan(eager(), &views, &pools);
    assert_eq!(moves(&plan), []);
    assert_eq!(plan.decisions[0].outcome, Outcome::Stay { reason: StayReason::NoPoolFits });
}

#[test]
fn who_changes_places_names_no_more_pools_than_are_kept_and_counts_the_others() {
    // As above. "small" would fit on c, d and e too, which are dearer, and where "big" would not.
    let dearer = |name: &str| host(name, 2.5, 0.05);
    let pools = [host("a", 2.0, 0.04), host("b", 3.5, 0.04), dearer("c"), dearer("d"), dearer("e")];
    let views = [on("big", "a", 3.0), on("small", "b", 1.5)];
    for kept in [1, 2, 16] {
        let config = PlanConfig { candidates_kept: kept, ..eager() };
        let (full, brief) = (Planner::new(config.clone()), Planner::new(config).brief());
        for (mut planner, is_brief) in [(full, false), (brief, true)] {
            let plan = planner.plan(UnixMillis(1_000_000), &views, &pools);
            assert_eq!(moves(&plan), [("big", "b"), ("small", "a")], "{kept}, {is_brief}");
            for (decision, (_, to)) in plan.decisions.iter().zip(moves(&plan)) {
                let named: Vec<&str> =
                    decision.candidates.iter().map(|candidate| candidate.pool.as_str()).collect();
                assert!(named[0] == to && named.len() <= kept as usize, "{kept}, {is_brief}: {named:?}");
                // All but the present one were compared.
                assert_eq!(named.len() + decision.left_out, pools.len() - 1, "{kept}, {is_brief}: {named:?}");
                assert!(decision.gain_per_hour().is_some(), "{kept}, {is_brief}: {named:?}");
            }
            // Of who makes room, a brief plan has the best other pool from before it was known that it would.
            if is_brief && kept > 1 {
                let partner = &plan.decisions[1];
                assert_eq!((partner.candidates[1].pool.as_str(), partner.left_out), ("c", 2));
            }
        }
    }
}

#[test]
fn a_pool_that_is_drained_is_left_and_not_entered() {
    let mut pools = [host("a", 8.0, 0.01), host("b", 8.0, 0.04), host("c", 8.0, 0.05)];
    pools[0].state = PoolState::Draining;
    let plan = plan(eager(), &[on("x", "a", 1.0), on("y", "c", 1.0)], &pools);
    // y would gain most on a.
    assert_eq!(moves(&plan), [("x", "b")]);
    let text = explain(&plan.decisions[0]);
    assert!(text.contains("the present one won't do: it is being emptied"), "{text}");
}

#[test]
fn labels_pin_part_and_join() {
    let pools = [host("a", 8.0, 0.01), host("b", 8.0, 0.04), host("c", 8.0, 0.05)];
    // Pinned to c and on b: it must go, though a is cheaper.
    let pinned = labelled(on("p", "b", 1.0), rules::PIN, "c, elsewhere");
    assert_eq!(moves(&plan(eager(), &[pinned], &pools)), [("p", "c")]);
    // Two that are to be apart on one host: the first by name stays there.
    let apart = ["m", "n"].map(|name| labelled(on(name, "a", 1.0), rules::APART, "db"));
    assert_eq!(moves(&plan(eager(), &apart, &pools)), [("n", "b")]);
    // All follow the first one, also to a dearer host.
    let together = [("r", "b"), ("s", "c"), ("t", "a")]
        .map(|(name, host)| labelled(on(name, host, 1.0), rules::TOGETHER, "web"));
    let config = PlanConfig { hysteresis: 1.0, ..eager() };
    let plan = plan(config, &together, &pools);
    assert_eq!(moves(&plan), [("s", "b"), ("t", "b")]);
    let text = explain(&plan.decisions[1]);
    assert!(text.contains("r is elsewhere, and web is to be together"), "{text}");
}

#[test]
fn a_link_and_an_hour_have_budgets() {
    let pools = [host("a", 8.0, 0.5), host("b", 80.0, 0.01), host("c", 80.0, 0.02)];
    let views: Vec<_> = (0..6).map(|i| on(&format!("i{i}"), "a", 1.0)).collect();
    let config = PlanConfig { moves_per_link: 3, ..eager() };
    let plan = plan(config, &views, &pools);
    assert_eq!(moves(&plan).len(), 3);
    let dropped = plan.decisions[5].candidates[0].dropped.as_ref().unwrap();
    assert_eq!(dropped.to_string(), "3 move(s) use the link of a");

    let mut planner = Planner::new(PlanConfig { moves_per_hour: 2, ..eager() });
    let mut done = |now: u64, names: &[&str]| {
        let plan = planner.plan(UnixMillis(now), &views, &pools);
        let decided = moves(&plan).len();
        for name in names {
            let name = name.parse().unwrap();
            planner.started(&name, "b");
            planner.moved(&name, MoveKind::Host, UnixMillis(now));
        }
        decided
    };
    assert_eq!(done(0, &["i0", "i1"]), 2);
    assert_eq!(done(1_800_000, &[]), 0);
    assert_eq!(done(3_600_000, &[]), 2);
}

#[test]
fn a_migration_waits_for_a_quiet_time() {
    let pools = [host("a", 8.0, 0.5), host("b", 8.0, 0.01)];
    let mut planner = Planner::new(eager());
    let mut view = on("x", "a", 1.0);
    let mut start = |now: u64, dirty: f64| {
        view.dirty_bytes_per_s = Some(dirty);
        let plan = planner.plan(UnixMillis(now), &[view.clone()], &pools);
        let Outcome::Move { start_by, .. } = plan.decisions[0].outcome else { panic!("{plan:?}") };
        (start_by.0 - now, explain(&plan.decisions[0]))
    };
    // Nothing is known of its writing yet: it is not waited for.
    assert_eq!(start(0, 40e6).0, 0);
    for round in 1..20 {
        start(round * 1_000, if round % 3 == 0 { 1e6 } else { 40e6 });
    }
    let (wait_ms, text) = start(20_000, 40e6);
    assert_eq!(wait_ms, 40_000, "it has been wanted for 20 s of the 60 s of the horizon: {text}");
    assert!(text.contains("40.0 MB/s written now, 1.0 or less a quarter of the time"), "{text}");
    assert_eq!(start(21_000, 1e6).0, 0);
}

/// Medians of a resource that can be believed.
fn medians(resource: Resource, medians: &[(u64, f64)]) -> impl Iterator<Item = DemandPoint> {
    medians.iter().map(move |&(horizon_ms, p50)| DemandPoint {
        resource,
        horizon_ms,
        need: Quantiles { p50, p90: p50, p95: p50, p99: p50 },
        evidence: Evidence::Enough { seen: 100, p95_coverage: 0.95 },
    })
}

#[test]
fn a_migration_begins_when_little_is_expected_to_be_written() {
    let pools = [host("a", 8.0, 0.5), host("b", 8.0, 0.01)];
    let mut view = on("x", "a", 1.0);
    view.dirty_bytes_per_s = Some(40e6);
    view.demand.points.extend(medians(Resource::Written, &[(5_000, 40e6), (15_000, 1e6), (30_000, 1e6)]));
    let planned = plan(eager(), &[view.clone()], &pools);
    let decision = &planned.decisions[0];
    let Outcome::Move { start_by, forced: false, .. } = decision.outcome else { panic!("{decision:?}") };
    assert_eq!(start_by.since(planned.at), 15_000, "{}", explain(decision));
    let text = explain(decision);
    assert!(
        text.contains("begins in 15000 ms: 1.0 MB/s of writing are expected then, 40.0 in 0 ms, 34."),
        "{text}"
    );

    // Its need forces it away after some 20 s, and a migration takes two: by then, it is still loud.
    view.demand.points = medians(Resource::Cpu, &[(5_000, 1.0), (15_000, 1.0), (30_000, 20.0)]).collect();
    view.demand.points.extend(medians(Resource::Written, &[(5_000, 9e6), (15_000, 40e6), (30_000, 1e6)]));
    let pools = [host("a", 8.0, 0.01), host("b", 30.0, 0.5)];
    let planned = plan(eager(), &[view.clone()], &pools);
    let decision = &planned.decisions[0];
    let Outcome::Move { start_by, forced: true, .. } = decision.outcome else { panic!("{decision:?}") };
    let timing = decision.timing.as_ref().unwrap();
    assert_eq!(start_by.since(planned.at), 5_000, "{}", explain(decision));
    assert!((15_000..20_000).contains(&timing.latest_ms()), "{timing:?}");

    // Nothing is quieter than the latest start: it waits for that.
    view.demand.points.truncate(3);
    view.demand.points.extend(medians(Resource::Written, &[(5_000, 41e6), (15_000, 40e6), (30_000, 39e6)]));
    let planned = plan(eager(), &[view], &pools);
    let decision = &planned.decisions[0];
    assert_eq!(decision.timing.as_ref().map(|timing| timing.chosen_ms), Some(timing.latest_ms()));
}

#[test]
fn where_writes_are_not_tracked_little_cpu_use_is_a_quiet_time() {
    let pools = [host("a", 8.0, 0.5), host("b", 8.0, 0.01)];
    let mut view = on("x", "a", 1.0);
    (view.dirty_bytes_per_s, view.cores) = (None, 4.0);
    view.demand.points = medians(Resource::Cpu, &[(5_000, 4.0), (15_000, 0.5), (30_000, 0.5)]).collect();
    let planned = plan(eager(), &[view.clone()], &pools);
    let decision = &planned.decisions[0];
    let Outcome::Move { start_by, .. } = decision.outcome else { panic!("{decision:?}") };
    assert_eq!(start_by.since(planned.at), 15_000, "{}", explain(decision));
    assert!(explain(decision).contains("0.50 cores of CPU use are expected then"), "{}", explain(decision));
    // As much is forecast to be written at all times: that tells of none. Where it does, it is heard first.
    for (written, start_ms) in [([2e6, 2e6], 15_000), ([40e6, 1e6], 30_000)] {
        let mut known = view.clone();
        let written = [(5_000, written[0]), (30_000, written[1])];
        known.demand.points.extend(medians(Resource::Written, &written));
        let planned = plan(eager(), &[known], &pools);
        let decision = &planned.decisions[0];
        let Outcome::Move { start_by, .. } = decision.outcome else { panic!("{decision:?}") };
        assert_eq!(start_by.since(planned.at), start_ms, "{}", explain(decision));
    }
    // It is quiet now, or it always does the same: it is not waited for.
    for (now, later) in [(0.5, 4.0), (1.0, 1.0)] {
        view.cores = now;
        view.demand.points = medians(Resource::Cpu, &[(5_000, later), (30_000, later)]).collect();
        let planned = plan(eager(), &[view.clone()], &pools);
        let Outcome::Move { start_by, .. } = planned.decisions[0].outcome else { panic!("{planned:?}") };
        assert_eq!(start_by, planned.at, "{now} and {later}");
    }
}

#[test]
fn what_might_not_be_served_costs() {
    let mut view = on("x", "a", 1.0);
    for point in &mut view.demand.points {
        point.need = Quantiles { p50: 1.0, p90: 2.0, p95: 3.0, p99: 5.0 };
    }
    let pools = [host("a", 3.0, 0.04), host("b", 8.0, 0.04)];
    let plan = plan(eager(), &[view], &pools);
    let (here, there) = (plan.decisions[0].current.as_ref().unwrap(), &plan.decisions[0].candidates[0]);
    // Above 3 cores: 1 on average in 4 % of the time, 2 in 1 %; on b nothing.
    assert!((here.terms.violation_per_hour - 0.06 * 0.4).abs() < 1e-12, "{here:?}");
    assert_eq!(there.terms.violation_per_hour, 0.0);
    assert_eq!(moves(&plan), [("x", "b")]);
}

#[test]
fn spreads_add_up_as_far_as_needs_rise_together() {
    let bursty = |name: &str, host| {
        let mut view = on(name, host, 0.5);
        for point in &mut view.demand.points {
            point.need = Quantiles { p50: 0.5, p90: 1.0, p95: 1.5, p99: 1.5 };
        }
        view
    };
    // Of six with a mean of 0.63 and a limit of 1.5, all on a: 9 cores by limits, 5.9 as of independent ones.
    let pools = [host("a", 6.0, 0.04), host("b", 1.0, 0.04)];
    let views: Vec<_> = (0..6).map(|i| bursty(&format!("i{i}"), "a")).collect();
    let here = |correlation| {
        let plan = plan(PlanConfig { correlation, ..eager() }, &views, &pools);
        plan.decisions[0].current.as_ref().unwrap().dropped.clone()
    };
    assert!(matches!(here(1.0), Some(Dropped::Cores { .. })));
    assert_eq!(here(0.0), None);
}

/// Demand of a round for one instance: quiet, random, or against the planner: high exactly where it is.
fn demand(pattern: u8, round: usize, random: f64, at: usize) -> f64 {
    match pattern % 4 {
        0 => random * 3.0,
        1 => {
            if round.is_multiple_of(2) {
                0.2
            } else {
                2.6
            }
        }
        2 => {
            if at == 0 {
                2.5
            } else {
                0.3
            }
        }
        _ => 1.0 + random * 0.2,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is demanded, on hosts whose prices change: an instance that could stay does not return to where it was, and
    /// what moves by force could not stay.
    #[test]
    fn who_could_stay_never_walks_back_and_forth(
        patterns in prop::collection::vec(any::<u8>(), 2..7),
        random in prop::collection::vec(0.0..1.0f64, 40 * 7),
        prices in prop::collection::vec(0.01..0.1f64, 40 * 3),
        exact in any::<bool>(),
    ) {
        let config = PlanConfig { hysteresis: 0.0, cool_down_ms: 10_000, headroom: 0.0, headroom_staying: 0.0, moves_per_hour: 10_000, ..PlanConfig::default() };
        let back_ms = config.cool_down_ms * 10;
        let mut planner = Planner::new(config);
        let names = ["a", "b", "c"];
        let mut at: Vec<usize> = (0..patterns.len()).map(|i| i % 3).collect();
        let mut left: Vec<Vec<(usize, u64)>> = vec![Vec::new(); patterns.len()];
        for round in 0..40 {
            let now = round as u64 * 5_000;
            let mut pools: Vec<Pool> =
                names.iter().enumerate().map(|(i, name)| host(name, 4.0, prices[round * 3 + i])).collect();
            let views: Vec<InstanceView> = patterns.iter().enumerate().map(|(i, &pattern)| {
                let need = demand(pattern, round, random[round * 7 + i], at[i]);
                let mut view = on(&format!("i{i}"), names[at[i]], need);
                if !exact {
                    view.cores = need / 2.0;
                }
                pools[at[i]].used.cores += view.cores;
                view
            }).collect();
            let plan = planner.plan(UnixMillis(now), &views, &pools);
            for (i, decision) in plan.decisions.iter().enumerate() {
                let Outcome::Move { to, forced, .. } = &decision.outcome else { continue };
                let to = names.iter().position(|name| name == to).unwrap();
                if *forced {
                    prop_assert!(decision.current.as_ref().unwrap().dropped.is_some(), "{}", explain(decision));
                } else {
                    let before = left[i].iter().rev().find(|(pool, _)| *pool == to);
                    prop_assert!(before.is_none_or(|(_, at)| now - at >= back_ms), "{}", explain(decision));
                }
                left[i].push((at[i], now + 5_000));
                at[i] = to;
                planner.started(&decision.instance, names[to]);
                planner.moved(&decision.instance, MoveKind::Host, UnixMillis(now));
            }
        }
    }

    /// Exchanges, too, leave every host with what it can give.
    #[test]
    fn nobody_is_sent_where_there_is_no_room(
        needs in prop::collection::vec((0.1..3.5f64, 0usize..3), 2..9),
        cores in prop::collection::vec(1.0..6.0f64, 3),
    ) {
        let names = ["a", "b", "c"];
        let mut pools: Vec<Pool> = names.iter().zip(&cores).map(|(name, &cores)| host(name, cores, 0.04)).collect();
        let views: Vec<InstanceView> = needs.iter().enumerate().map(|(i, &(need, at))| {
            pools[at].used.cores += need;
            on(&format!("i{i}"), names[at], need)
        }).collect();
        let plan = plan(eager(), &views, &pools);
        let mut at: Vec<usize> = needs.iter().map(|&(_, at)| at).collect();
        for (i, decision) in plan.decisions.iter().enumerate() {
            if let Outcome::Move { to, .. } = &decision.outcome {
                at[i] = names.iter().position(|name| name == to).unwrap();
            }
        }
        for (number, name) in names.iter().enumerate() {
            let load: f64 = needs.iter().zip(&at).filter(|(_, at)| **at == number).map(|((need, _), _)| need).sum();
            let entered = moves(&plan).iter().any(|(_, to)| to == name);
            prop_assert!(!entered || load <= cores[number] + 1e-9, "{name}: {load} of {}", cores[number]);
        }
        let text = serde_json::to_string(&plan).unwrap();
        let read: Plan = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(moves(&read), moves(&plan));
    }
}
