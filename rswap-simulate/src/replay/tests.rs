//! The replay's promises, and the tier scenario.

use proptest::prelude::*;
use rswap_forecast::Quantile;
use rswap_plan::PlanConfig;

use super::*;

const WINDOW_MS: u64 = 300_000;
const DAY: usize = 288;

/// Services with a common working day, of other sizes, that rise within three hours of each other, and some noise.
fn services(count: usize, days: usize, seed: u64) -> Vec<Workload> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count)
        .map(|number| {
            let (size, begins) = (0.5 + 1.5 * random.f64(), 84 + (36.0 * random.f64()) as usize);
            let demand = (0..days * DAY).map(|window| {
                let hour = window % DAY;
                let ramp = |from: usize| (hour as f64 - from as f64).clamp(0.0, 6.0) / 6.0;
                let busy = 0.12 + 0.88 * (ramp(begins) - ramp(begins + DAY / 3));
                size * busy * (0.9 + 0.2 * random.f64())
            });
            let demand = demand.collect();
            Workload { name: format!("service-{number:03}").parse().unwrap(), demand, memory_bytes: 1 << 30 }
        })
        .collect()
}

fn tier(name: &str, kind: Shape, cores: f64, cost: f64, performance: f64) -> SimPool {
    SimPool {
        name: name.to_owned(),
        kind,
        count: 1,
        cores,
        memory_gib: 1e4,
        cost_per_core_hour: cost,
        cost_per_gib_hour: 0.0,
        performance,
        idle_watts: 50.0,
        full_watts: 150.0,
    }
}

fn tiers(kind: Shape, workloads: Vec<Workload>) -> Scenario {
    let pools = [tier("fast", kind, 40.0, 0.04, 1.0), tier("slow", kind, 24.0, 0.01, 0.5)];
    let plan = PlanConfig { moves_per_host: 8, moves_per_link: 16, ..plan_for(kind, WINDOW_MS) };
    Scenario::new(WINDOW_MS, workloads, &pools, (plan, forecast_for(WINDOW_MS), MoveModel::default()))
        .unwrap()
}

fn compare(scenario: &Scenario) -> Report {
    let mut strict = Act::new(scenario, Quantile::P99);
    let mut usual = Act::new(scenario, Quantile::P95);
    let (mut never, mut reactive) = (Reactive::never(), Reactive::by_thresholds());
    let first = Placement::by_peak(scenario);
    let mut report = simulate(scenario, &first, &mut [&mut strict, &mut usual, &mut never, &mut reactive]);
    report.focus = usual.into_focus();
    report
}

fn row<'r>(report: &'r Report, policy: &str) -> &'r Row {
    report.rows.iter().find(|row| row.policy == policy).unwrap()
}

/// Fast and slow cores, then a fast and a slow tier that instances have to be copied to.
#[test]
fn tiers_cost_less_at_few_violations() {
    for kind in [Shape::Cores, Shape::Host] {
        let report = compare(&tiers(kind, services(24, 4, 5)));
        let (strict, usual) = (row(&report, "act p99"), row(&report, "act p95"));
        let (never, reactive) = (row(&report, "static"), row(&report, "reactive"));
        println!("{kind:?} {:#?}", report.rows);
        assert!(strict.violations <= 0.01, "{strict:?}");
        assert!(usual.violations <= 0.05, "{usual:?}");
        assert!(strict.money < never.money && usual.money < never.money, "{strict:?} {usual:?} {never:?}");
        // Where moves cost next to nothing; where they don't, calm days such as these are a rule of thumb's best.
        let margin = if kind == Shape::Cores { 1.0 } else { 1.02 };
        assert!(usual.money <= reactive.money * margin, "{usual:?} {reactive:?}");
        assert!(report.rows.iter().all(|row| row.regret >= -1e-9), "{:?}", report.rows);
    }
}

#[test]
fn a_scenario_has_one_outcome() {
    let scenario = tiers(Shape::Host, services(12, 2, 9));
    let text = |report: &Report| serde_json::to_string(report).unwrap();
    assert_eq!(text(&compare(&scenario)), text(&compare(&scenario)));
}

/// The page has its data, its plots and nothing from elsewhere.
#[test]
fn a_report_is_one_page() {
    let report = compare(&tiers(Shape::Cores, services(6, 2, 3)));
    assert!(!report.focus.is_empty() && report.focus.iter().all(|focus| !focus.moves.is_empty()));
    let page = report.page("six <services>").unwrap();
    assert!(page.contains("<title>rswap simulate: six &lt;services&gt;</title>"));
    let data = page.split("id=\"report\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: serde_json::Value = serde_json::from_str(data).unwrap();
    assert_eq!(data["rows"].as_array().unwrap().len(), 5);
    // Where an instance sat is shown by name.
    let sat = data["focus"][0]["pool"].as_array().unwrap();
    let names = sat.iter().map(|pool| data["pools"][pool.as_u64().unwrap() as usize].as_str().unwrap());
    let names: std::collections::BTreeSet<_> = names.collect();
    assert_eq!(names.into_iter().collect::<Vec<_>>(), ["fast", "slow"]);
    for outside in ["<link", " src=", "@import", "fetch(", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn failed_moves_leave_instances_where_they_are_and_are_not_tried_at_once() {
    let mut scenario = tiers(Shape::Host, services(6, 2, 3));
    scenario.moves.failures = 0.999_999;
    let report = compare(&scenario);
    let (act, never) = (row(&report, "act p95"), row(&report, "static"));
    assert_eq!(act.failed, act.moves);
    assert!(act.moves > 0 && act.moves < 6 * 40, "{act:?}");
    assert!((act.money_used - never.money_used).abs() < never.money_used * 0.05, "{act:?} {never:?}");
}

#[test]
fn what_does_not_go_together_is_refused() {
    let make = |pools: &[SimPool], workloads| {
        Scenario::new(
            WINDOW_MS,
            workloads,
            pools,
            (plan_for(Shape::Host, WINDOW_MS), forecast_for(WINDOW_MS), MoveModel::default()),
        )
        .map(drop)
    };
    let (cores, host) = (tier("a", Shape::Cores, 1.0, 1.0, 1.0), tier("b", Shape::Host, 1.0, 1.0, 1.0));
    assert_eq!(make(&[], services(1, 1, 1)), Err(ScenarioError::NoPool));
    assert_eq!(make(&[cores.clone(), host], services(1, 1, 1)), Err(ScenarioError::Mixed));
    assert_eq!(
        make(&[cores.clone(), cores.clone()], services(1, 1, 1)),
        Err(ScenarioError::Name("a".into()))
    );
    assert_eq!(make(&[cores], vec![]), Err(ScenarioError::NoDemand));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// Whatever is demanded: nobody gets more than that, pools give no more than they have, and the oracle is a bound.
    #[test]
    fn books_balance(
        demand in prop::collection::vec(prop::collection::vec(prop_oneof![9 => 0.0..6.0f64, 1 => Just(f64::NAN)], 60), 1..6),
        fast in 1.0..8.0f64, slow in 1.0..8.0f64, failures in 0.0..0.5f64,
    ) {
        let workloads: Vec<Workload> = demand.into_iter().enumerate().map(|(number, demand)| Workload {
            name: format!("w{number}").parse().unwrap(), demand, memory_bytes: 1 << 28,
        }).collect();
        let pools = [tier("fast", Shape::Host, fast, 0.04, 1.0), tier("slow", Shape::Host, slow, 0.01, 0.5)];
        let moves = MoveModel { failures, ..MoveModel::default() };
        let Ok(scenario) = Scenario::new(WINDOW_MS, workloads, &pools, (plan_for(Shape::Host, WINDOW_MS), forecast_for(WINDOW_MS), moves)) else {
            return Ok(());
        };
        let report = compare(&scenario);
        for (row, timeline) in report.rows.iter().zip(&report.timelines) {
            prop_assert_eq!(timeline.demand.len(), report.windows);
            for (demand, served) in timeline.demand.iter().zip(&timeline.served) {
                prop_assert!(*served <= demand * 1.000_01 + 1e-6);
                prop_assert!(f64::from(*served) <= fast + slow * 0.5 + 1e-3);
            }
            prop_assert!(row.failed <= row.moves && row.violations <= 1.0);
            prop_assert!(row.regret >= -1e-6, "{:?}", report.rows);
        }
    }
}
