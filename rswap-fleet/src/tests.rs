//! Reports -> inventory -> plan -> orders, and lessons -> model.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rswap_forecast::{
    Demand, DemandPoint, Evidence, ForecastConfig, Forecaster, Kin, Lessons, Observation, Part, Quantiles,
    Resource, Usage,
};
use rswap_plan::{InstanceView, MoveKind, PlanConfig, rules};
use rswap_types::{Capacity, InstanceName, Pool, PoolKind, PoolState, THIS_HOST, UnixMillis};

use crate::{
    amounts::Sum,
    inventory::{AWAY_INTERVALS, Change, GONE_MS, MOST_LINKS},
    model::{MOST_CLASS_BYTES, REFRESH_MS, Revision, TEACHERS, Teaching},
    orders::{Book, OrderResult},
    plan::FleetPlanner,
    report::{Limits, ReportError, Used},
    *,
};

mod aged;

const INTERVAL_MS: u64 = 10_000;

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn name(name: &str) -> InstanceName {
    name.parse().unwrap()
}

fn whole(cores: f64, cost: f64) -> Pool {
    Pool {
        name: THIS_HOST.to_owned(),
        kind: PoolKind::ThisHost,
        capacity: Capacity { cores, memory_bytes: 64 << 30 },
        used: Capacity::default(),
        cost_per_core_hour: cost,
        cost_per_gib_hour: 0.005,
        performance: 1.0,
        state: PoolState::Ready,
    }
}

fn instance(local: &str, identity: &str, need: f64) -> InstanceReport {
    let point = |resource, horizon_ms, need| DemandPoint {
        resource,
        horizon_ms,
        need: Quantiles { p50: need, p90: need, p95: need, p99: need },
        evidence: Evidence::Enough { seen: 100, p95_coverage: 0.95 },
    };
    let points = vec![point(Resource::Cpu, 5_000, need), point(Resource::Cpu, 30_000, need)];
    InstanceReport {
        view: InstanceView {
            instance: name(local),
            host: None,
            cpu_pool: Some("fast".to_owned()),
            demand: Demand { instance: name(local), at: UnixMillis(0), points },
            cores: need,
            resident_bytes: 100 << 20,
            dirty_bytes_per_s: Some(1e6),
            movable: vec![MoveKind::Cpu, MoveKind::Host],
            labels: BTreeMap::new(),
            volumes: Vec::new(),
            port: None,
        },
        kin: Kin { class: "web".to_owned(), identity: identity.to_owned() },
        used: BTreeMap::new(),
    }
}

fn report(of: &str, number: u8, cost: f64, instances: Vec<InstanceReport>) -> Report {
    Report {
        version: report::VERSION,
        host: host(of),
        epoch: 1,
        sequence: 1,
        at: UnixMillis(0),
        acts: true,
        address: Some(([10, 0, 0, number], 7791).into()),
        running: None,
        pools: vec![whole(8.0, cost)],
        instances,
        gone: BTreeMap::new(),
        links: Vec::new(),
        outcomes: Vec::new(),
        dropped: 0,
    }
}

fn places(fleet: &Inventory) -> Vec<(String, String)> {
    fleet.instances().map(|(name, placed)| (name.to_string(), placed.host.to_string())).collect()
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(name, host)| ((*name).to_owned(), (*host).to_owned())).collect()
}

#[test]
fn an_instance_that_moves_is_the_same_whichever_host_reports_first() {
    let web = || vec![instance("web", "web httpd", 1.0)];
    for destination_first in [true, false] {
        let mut fleet = Inventory::default();
        fleet.take(&report("a", 1, 0.1, web()), UnixMillis(0));
        fleet.take(&report("b", 2, 0.1, vec![]), UnixMillis(0));
        let (arrived, left) = (report("b", 2, 0.1, web()), report("a", 1, 0.1, vec![]));
        let moved = Change { instance: name("web"), from: Some(host("a")), to: Some(host("b")) };
        if destination_first {
            assert_eq!(fleet.take(&arrived, UnixMillis(1_000)), [], "it is not clear yet");
            assert_eq!(places(&fleet), pairs(&[("web", "a")]));
            assert!(fleet.take(&left, UnixMillis(2_000)).contains(&moved));
        } else {
            fleet.take(&left, UnixMillis(1_000));
            assert_eq!(places(&fleet), []);
            assert_eq!(fleet.take(&arrived, UnixMillis(2_000)), [moved]);
        }
        assert_eq!(places(&fleet), pairs(&[("web", "b")]));
    }
}

#[test]
fn twins_have_names_of_their_own() {
    let web = |identity| vec![instance("web", identity, 1.0)];
    let mut fleet = Inventory::default();
    fleet.take(&report("a", 1, 0.1, web("web httpd")), UnixMillis(0));
    // Another program under the same name can't be the same one.
    fleet.take(&report("c", 3, 0.1, web("web nginx")), UnixMillis(1));
    fleet.take(&report("b", 2, 0.1, web("web httpd")), UnixMillis(2));
    assert_eq!(places(&fleet), pairs(&[("web", "a"), ("web.2", "c")]));
    fleet.take(&report("a", 1, 0.1, web("web httpd")), UnixMillis(3));
    assert_eq!(places(&fleet), pairs(&[("web", "a"), ("web.2", "c"), ("web.3", "b")]));
    // And keep them from report to report.
    for (of, number, identity) in [("b", 2, "web httpd"), ("a", 1, "web httpd"), ("c", 3, "web nginx")] {
        assert_eq!(fleet.take(&report(of, number, 0.1, web(identity)), UnixMillis(4)), []);
    }
    let longest = "x".repeat(63);
    fleet.take(&report("d", 4, 0.1, vec![instance(&longest, "1", 1.0)]), UnixMillis(5));
    fleet.take(&report("e", 5, 0.1, vec![instance(&longest, "2", 1.0)]), UnixMillis(5));
    assert_eq!(places(&fleet).len(), 5);
}

#[test]
fn what_is_gone_is_forgotten_and_known_again_after_a_new_start() {
    let mut fleet = Inventory::default();
    let web = || report("a", 1, 0.1, vec![instance("web", "web httpd", 1.0)]);
    fleet.take(&web(), UnixMillis(0));
    fleet.take(&report("a", 1, 0.1, vec![]), UnixMillis(1_000));
    assert_eq!(places(&fleet), []);
    assert_eq!(fleet.tick(UnixMillis(1_000 + GONE_MS)).len(), 1);
    let anew = fleet.take(&web(), UnixMillis(2_000 + GONE_MS));
    assert_eq!(anew, [Change { instance: name("web"), from: None, to: Some(host("a")) }]);

    let mut next = Inventory::with_owners([(name("web.7"), host("a"), name("web"))], UnixMillis(0));
    assert_eq!(places(&next), []);
    next.take(&web(), UnixMillis(1_000));
    assert_eq!(places(&next), pairs(&[("web.7", "a")]), "names outlive the controller");
    next.forget_host(&host("a"), UnixMillis(2_000));
    assert_eq!(places(&next), []);
}

#[test]
fn labels_are_kept_once_and_the_plan_follows_those_that_are_rules() {
    let labelled = |local: &str, labels: &[(&str, &str)]| {
        let mut one = instance(local, local, 1.0);
        let labels = labels.iter().map(|(label, value)| ((*label).to_owned(), (*value).to_owned()));
        one.view.labels = labels.collect();
        one
    };
    let stay = [("app", "web"), (rules::STAY, "true")];
    let instances = vec![labelled("x", &stay), labelled("y", &stay), labelled("z", &[])];
    let mut fleet = Inventory::default();
    fleet.take(&report("a", 1, 0.5, instances), UnixMillis(0));
    fleet.take(&report("b", 2, 0.01, vec![]), UnixMillis(0));
    let labels = |of: &str| fleet.labels(fleet.placed(&name(of)).unwrap());
    assert_eq!(labels("x").unwrap()["app"], "web");
    assert!(std::ptr::eq(labels("x").unwrap(), labels("y").unwrap()));
    assert_eq!((labels("z"), fleet.count()), (None, 3));
    let decided =
        FleetPlanner::new(PlanConfig::default(), INTERVAL_MS).plan(&fleet, &BTreeSet::new(), UnixMillis(1));
    let moves: Vec<_> = plan::moves(&decided).iter().map(|decision| decision.instance.as_str()).collect();
    assert_eq!(moves, ["z"]);
}

#[test]
fn a_drained_host_is_emptied_by_orders_and_what_fails_waits() {
    let mut fleet = Inventory::default();
    fleet.take(&report("a", 1, 0.01, vec![instance("x", "x", 1.0), instance("y", "y", 1.0)]), UnixMillis(0));
    fleet.take(&report("b", 2, 0.04, vec![]), UnixMillis(0));
    let config = PlanConfig { cool_down_ms: 30_000, ..PlanConfig::default() };
    let (mut planner, mut book) = (FleetPlanner::new(config, INTERVAL_MS), Book::new(1));
    let (nobody, drained) = (BTreeSet::new(), BTreeSet::from([host("a")]));
    let plan = planner.plan(&fleet, &nobody, UnixMillis(1));
    planner.order(&plan, &fleet, &nobody, &mut book, UnixMillis(1));
    assert_eq!(book.waiting().count(), 0, "the cheap host is left by nobody");
    let plan = planner.plan(&fleet, &drained, UnixMillis(2));
    planner.order(&plan, &fleet, &drained, &mut book, UnixMillis(2));
    let orders = book.of(&host("a"));
    let address = ([10, 0, 0, 2], 7791).into();
    let wanted = |local| Action::Migrate { instance: name(local), to: host("b"), address };
    assert_eq!(
        orders.iter().map(|order| order.action.clone()).collect::<Vec<_>>(),
        [wanted("x"), wanted("y")]
    );

    // The next round orders nothing twice.
    let plan = planner.plan(&fleet, &drained, UnixMillis(3));
    planner.order(&plan, &fleet, &drained, &mut book, UnixMillis(3));
    assert_eq!(book.of(&host("a")), orders);

    let failed =
        OrderOutcome { token: orders[0].token, result: OrderResult::Failed { error: "no".to_owned() } };
    let order = book.ended(&host("a"), &failed).unwrap();
    planner.ended(&order, Some(&failed), UnixMillis(4));
    let done = OrderOutcome { token: orders[1].token, result: OrderResult::Done };
    let order = book.ended(&host("a"), &done).unwrap();
    planner.ended(&order, Some(&done), UnixMillis(4));
    fleet.take(&report("a", 1, 0.01, vec![instance("x", "x", 1.0)]), UnixMillis(5));
    fleet.take(&report("b", 2, 0.04, vec![instance("y", "y", 1.0)]), UnixMillis(6));
    let plan = planner.plan(&fleet, &drained, UnixMillis(7));
    planner.order(&plan, &fleet, &drained, &mut book, UnixMillis(7));
    assert_eq!(book.waiting().count(), 0, "what failed waits");
    let at = UnixMillis(60_000);
    for (of, number, local) in [("a", 1, "x"), ("b", 2, "y")] {
        fleet.take(&report(of, number, 0.01, vec![instance(local, local, 1.0)]), at);
    }
    let plan = planner.plan(&fleet, &drained, at);
    planner.order(&plan, &fleet, &drained, &mut book, at);
    assert_eq!(book.of(&host("a")).len(), 1);
    assert_eq!(planner.moving().count(), 1);
}

#[test]
fn nothing_is_planned_with_hosts_that_are_away_or_take_nobody() {
    let mut fleet = Inventory::default();
    fleet.take(&report("a", 1, 0.5, vec![instance("x", "x", 1.0)]), UnixMillis(100_000));
    fleet.take(&report("cheap", 2, 0.0, vec![instance("y", "y", 1.0)]), UnixMillis(0));
    let unreachable = Report { address: None, ..report("closed", 3, 0.0, vec![instance("z", "z", 1.0)]) };
    fleet.take(&unreachable, UnixMillis(100_000));
    let watching = Report { acts: false, ..report("b", 4, 0.01, vec![]) };
    fleet.take(&watching, UnixMillis(100_000));
    let (mut planner, mut book) = (FleetPlanner::new(PlanConfig::default(), INTERVAL_MS), Book::new(1));
    let plan = planner.plan(&fleet, &BTreeSet::new(), UnixMillis(100_000));
    planner.order(&plan, &fleet, &BTreeSet::new(), &mut book, UnixMillis(100_000));
    let targets: Vec<_> = book.waiting().map(|order| (order.host.as_str(), &order.action)).collect();
    assert!(
        targets.iter().all(|(_, action)| matches!(action, Action::Migrate { to, .. } if to.as_str() == "b")),
        "{targets:?}"
    );
    assert!(targets.iter().any(|(from, _)| *from == "a"), "{targets:?}");
    assert!(plan.decisions.iter().all(|decision| decision.instance != name("y")), "it is not known how y is");
    // A host that only watches carries nothing out, so nothing is asked of it.
    fleet.take(
        &Report { acts: false, ..report("a", 1, 0.5, vec![instance("x", "x", 1.0)]) },
        UnixMillis(100_001),
    );
    let (mut planner, mut book) = (FleetPlanner::new(PlanConfig::default(), INTERVAL_MS), Book::new(1));
    let plan = planner.plan(&fleet, &BTreeSet::new(), UnixMillis(100_001));
    planner.order(&plan, &fleet, &BTreeSet::new(), &mut book, UnixMillis(100_001));
    assert!(
        book.of(&host("a")).is_empty() && plan.decisions.iter().any(|d| d.instance == name("x") && d.moves())
    );
}

#[test]
fn a_report_that_cannot_be_is_refused() {
    let good = report("a", 1, 0.1, vec![instance("x", "x", 1.0)]);
    assert_eq!(good.check(&Limits::default()), Ok(()));
    let text = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), good);
    let but = |change: &dyn Fn(&mut Report)| {
        let mut report = good.clone();
        change(&mut report);
        report.check(&Limits::default())
    };
    assert_eq!(but(&|report| report.version = 9), Err(ReportError::Version(9)));
    assert_eq!(but(&|report| report.sequence = 0), Err(ReportError::Number("sequence")));
    assert_eq!(but(&|report| report.pools[0].performance = 0.0), Err(ReportError::Number("pool")));
    assert_eq!(but(&|report| report.instances[0].view.cores = -1.0), Err(ReportError::Number("instance")));
    assert_eq!(
        but(&|report| report.instances.push(report.instances[0].clone())),
        Err(ReportError::Twice("instances"))
    );
    let many = |report: &mut Report| report.pools = vec![whole(1.0, 0.1); report::MOST_POOLS + 1];
    assert!(matches!(but(&many), Err(ReportError::Many(..))));
    // What a controller was told that it takes.
    let link = LinkMeasured { to: ([10, 0, 0, 2], 1).into(), bytes_per_s: 1.0 };
    let outcome = OrderOutcome { token: Token { life: 1, number: 1 }, result: OrderResult::Done };
    let two = Report {
        instances: vec![instance("x", "x", 1.0), instance("y", "y", 1.0)],
        links: vec![link.clone(), link],
        gone: [(name("p"), BTreeMap::new()), (name("q"), BTreeMap::new())].into(),
        outcomes: vec![outcome.clone(), outcome],
        ..good
    };
    let limits = Limits { instances: 2, links: 2, ..Limits::default() };
    assert_eq!(two.check(&limits), Ok(()));
    assert_eq!(two.check(&Limits { links: 1, ..limits }), Err(ReportError::Many(2, "links", 1)));
    let less = Limits { instances: 1, ..limits };
    assert_eq!(two.check(&less), Err(ReportError::Many(2, "instances", 1)));
    let gone = Report { instances: Vec::new(), ..two };
    assert_eq!(gone.check(&less), Err(ReportError::Many(2, "instances that are gone", 1)));
    let outcomes = Report { gone: BTreeMap::new(), ..gone };
    assert_eq!(outcomes.check(&less), Err(ReportError::Many(2, "outcomes", 1)));
}

#[test]
fn a_host_has_time_to_be_heard_since_the_beginning_and_so_many_links() {
    let mut fleet = Inventory::with_owners([], UnixMillis(100_000));
    let away = |fleet: &Inventory, at| fleet.is_away(&host("a"), INTERVAL_MS, UnixMillis(at));
    let last = 100_000 + AWAY_INTERVALS * INTERVAL_MS;
    assert!(!away(&fleet, last) && away(&fleet, last + 1), "it was not heard of yet");
    fleet.take(&report("a", 1, 0.1, vec![]), UnixMillis(last));
    let last = last + AWAY_INTERVALS * INTERVAL_MS;
    assert!(!away(&fleet, last) && away(&fleet, last + 1));

    let link = |port| LinkMeasured { to: ([10, 0, 0, 2], port).into(), bytes_per_s: 1.0 };
    let said = |from: u16, count: usize| {
        let links = (from..).take(count).map(link).collect();
        Report { links, ..report("a", 1, 0.1, vec![]) }
    };
    let kept = |fleet: &Inventory| fleet.hosts()[&host("a")].links.len();
    fleet.take(&said(1, MOST_LINKS), UnixMillis(last));
    fleet.take(&said(1, 10), UnixMillis(last));
    assert_eq!(kept(&fleet), MOST_LINKS);
    fleet.take(&said(5_000, 10), UnixMillis(last));
    assert_eq!(kept(&fleet), 10, "only what it says now");
}

#[test]
fn nothing_is_ordered_of_a_host_of_which_something_else_is_wanted_since_the_plan_began() {
    let mut fleet = Inventory::default();
    fleet.take(&report("a", 1, 0.01, vec![instance("x", "x", 1.0)]), UnixMillis(0));
    fleet.take(&report("b", 2, 0.04, vec![]), UnixMillis(0));
    let (nobody, a, b) = (BTreeSet::new(), BTreeSet::from([host("a")]), BTreeSet::from([host("b")]));
    let orders = |begun: &BTreeSet<HostName>, now: &BTreeSet<HostName>| {
        let (mut planner, mut book) = (FleetPlanner::new(PlanConfig::default(), INTERVAL_MS), Book::new(1));
        let plan = planner.plan(&fleet, begun, UnixMillis(1));
        planner.order(&plan, &fleet, now, &mut book, UnixMillis(1));
        (book.waiting().count(), planner.coming(&fleet))
    };
    assert_eq!(orders(&a, &a), (1, [(host("b"), 1)].into()));
    let both = a.union(&b).cloned().collect();
    assert_eq!(orders(&a, &both), (0, BTreeMap::new()), "it is to be left itself");
    assert_eq!(orders(&a, &nobody), (0, BTreeMap::new()), "it need not be left any more");
}

#[test]
fn an_instance_comes_until_its_host_has_reported_after_its_end() {
    let mut fleet = Inventory::default();
    fleet.take(&report("a", 1, 0.01, vec![instance("x", "x", 1.0)]), UnixMillis(0));
    fleet.take(&report("b", 2, 0.04, vec![]), UnixMillis(0));
    let (mut planner, mut book) = (FleetPlanner::new(PlanConfig::default(), INTERVAL_MS), Book::new(1));
    let drained = BTreeSet::from([host("a")]);
    let plan = planner.plan(&fleet, &drained, UnixMillis(1));
    planner.order(&plan, &fleet, &drained, &mut book, UnixMillis(1));
    let order = book.of(&host("a")).remove(0);
    let mut failing = planner.clone();
    let done = OrderOutcome { token: order.token, result: OrderResult::Done };
    planner.ended(&order, Some(&done), UnixMillis(5));
    let one: BTreeMap<_, _> = [(host("b"), 1)].into();
    fleet.take(&report("b", 2, 0.04, vec![]), UnixMillis(5));
    assert_eq!(planner.coming(&fleet), one, "b may have said that before");
    fleet.take(&report("b", 2, 0.04, vec![]), UnixMillis(6));
    assert_eq!(planner.coming(&fleet), BTreeMap::new());
    assert_eq!(failing.coming(&fleet), one);
    failing.ended(&order, None, UnixMillis(7));
    assert_eq!(failing.coming(&fleet), BTreeMap::new());
}

#[test]
fn what_was_used_is_told_once() {
    let mut used = Used::default();
    let usage = Usage { reference_cores: 0.5, memory_bytes: 7.0, ..Usage::default() };
    (0..3).for_each(|_| used.window(&name("a"), &usage));
    used.window(&name("b"), &usage);
    let a = used.take(&name("a"));
    assert_eq!(a[&Resource::Cpu], Sum { count: 3, sum: 1_500_000, most: 500_000 });
    assert_eq!(a.len(), 2, "what is not known is not 0");
    assert!(used.take(&name("a")).is_empty());
    assert_eq!(used.take_rest().len(), 1);
    assert!(used.take_rest().is_empty());
}

fn taught(class: &str, cores: f64) -> Lessons {
    let config = ForecastConfig { horizons_ms: vec![2_000, 10_000], min_seen: 20 };
    let mut forecaster = Forecaster::new(config, 1_000);
    let instance = name("a");
    forecaster.introduce(&instance, Kin { class: class.to_owned(), identity: "a".to_owned() }, 1);
    for window in 1..=200 {
        let reference_cores = if window % 20 < 10 { cores / 2.0 } else { cores };
        let usage = Usage { reference_cores, memory_bytes: 1e8, ..Usage::default() };
        forecaster.observe(&Observation { instance: &instance, at: UnixMillis(window * 1_000), usage });
    }
    forecaster.lessons()
}

fn web() -> Part {
    Part::Class("web".to_owned())
}

const LEADS: (u64, &[u64]) = (1_000, &[2_000, 10_000]);

#[test]
fn each_host_learns_what_the_others_taught_and_not_what_it_taught_itself() {
    let mut model = Model::new(5);
    let (one, two) = (taught("web", 1.0), taught("web", 4.0));
    let now = UnixMillis(0);
    model.teach(&host("a"), &web(), &one, now).unwrap();
    let (none, knows) = model.for_host(&host("a"), LEADS, Revision::default(), 100);
    assert_eq!((none.len(), knows.life), (0, 5));
    let (parts, _) = model.for_host(&host("b"), LEADS, Revision::default(), 100);
    assert_eq!(parts, [(web(), Arc::new(one.part(&web())))]);

    model.teach(&host("b"), &web(), &two, now).unwrap();
    let (parts, _) = model.for_host(&host("a"), LEADS, knows, 100);
    assert_eq!(parts, [(web(), Arc::new(two.part(&web())))], "without its own");
    let (parts, knows) = model.for_host(&host("c"), LEADS, Revision::default(), 100);
    assert_eq!(parts[0].1.series(), 2.0);
    // What is sent again changes nothing, and is not told again.
    model.teach(&host("b"), &web(), &two, now).unwrap();
    assert_eq!(model.for_host(&host("c"), LEADS, knows, 100), (vec![], knows));
    // After a while it is: what is known of a class changes without growing.
    model.teach(&host("b"), &web(), &two, UnixMillis(REFRESH_MS)).unwrap();
    assert_eq!(model.for_host(&host("c"), LEADS, knows, 100).0[0].1.series(), 2.0);
    // Another life of the controller counts anew.
    let other = Revision { life: 4, number: 99 };
    assert_eq!(model.for_host(&host("c"), LEADS, other, 100).0.len(), 1);
    // For other windows it is of no use.
    assert!(model.for_host(&host("c"), (500, LEADS.1), Revision::default(), 100).0.is_empty());
}

#[test]
fn a_model_is_told_in_portions_and_keeps_those_who_know_most() {
    let mut model = Model::new(1);
    let lessons = taught("web", 1.0);
    for number in 0..2 * TEACHERS {
        model.teach(&host(&format!("h{number}")), &web(), &lessons, UnixMillis(0)).unwrap();
    }
    // Of those that know equally much, the first ones stay.
    let dropped = model.dropped();
    let is_dropped = |number: usize| dropped.contains(&(host(&format!("h{number}")), web()));
    assert!((0..TEACHERS).all(|number| !is_dropped(number)));
    assert!((TEACHERS..2 * TEACHERS).all(is_dropped));
    for class in ["p", "q", "r"] {
        model.teach(&host("z"), &Part::Class(class.to_owned()), &taught(class, 1.0), UnixMillis(0)).unwrap();
    }
    model.teach(&host("z"), &Part::General, &lessons, UnixMillis(0)).unwrap();
    let known: BTreeMap<_, _> =
        model.known().map(|(part, hosts, series)| (part.clone(), (hosts, series))).collect();
    assert_eq!(known[&web()], (TEACHERS, TEACHERS as f64));
    let (mut knows, mut all) = (Revision::default(), Vec::new());
    for _ in 0..5 {
        let (parts, up_to) = model.for_host(&host("new"), LEADS, knows, 2);
        assert!(parts.len() <= 2);
        all.extend(parts.into_iter().map(|(part, _)| part));
        knows = up_to;
    }
    assert_eq!(all.len(), 5);
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 5);
}

#[test]
fn nobody_pushes_out_what_others_taught() {
    let most = 20;
    let mut model = Model::new(1).with_most(most);
    let at = UnixMillis(0);
    let class = |name: String| Part::Class(name);
    let mut teach = |of: &str, name: String, cores| {
        let lessons = taught(&name, cores);
        model.teach(&host(of), &class(name), &lessons, at).unwrap();
    };
    teach("good", "alone".to_owned(), 1.0);
    for of in ["good", "other"] {
        teach(of, "shared".to_owned(), 1.0);
    }
    for number in 0..most + 3 {
        teach("talker", format!("c{number:05}"), 1.0);
    }
    let known: BTreeSet<_> = model.known().map(|(part, _, _)| part.clone()).collect();
    assert_eq!(known.len(), most);
    assert!(known.contains(&class("alone".to_owned())) && known.contains(&class("shared".to_owned())));
    let dropped = model.dropped();
    assert_eq!(dropped.len(), 5, "{dropped:?}");
    assert!(dropped.iter().all(|(of, part)| *of == host("talker") && !known.contains(part)));
    assert_eq!(model.dropped(), []);
    // A name that is none, and horizons that nobody has.
    let long = "c".repeat(MOST_CLASS_BYTES + 1);
    assert!(model.teach(&host("a"), &class(long.clone()), &taught(&long, 1.0), at).is_err());
}

#[test]
fn only_what_is_new_is_handed_in() {
    let (mut teaching, lessons) = (Teaching::default(), taught("web", 1.0));
    let due = teaching.due(&lessons, UnixMillis(0), 10);
    assert_eq!(due.len(), 2);
    assert_eq!(teaching.due(&lessons, UnixMillis(0), 1).len(), 1);
    teaching.told(&due, UnixMillis(0));
    assert!(teaching.due(&lessons, UnixMillis(1), 10).is_empty());
    let mut more = lessons.clone();
    more.merge(&taught("batch", 1.0)).unwrap();
    let due = teaching.due(&more, UnixMillis(1), 10);
    assert_eq!(due[0].0, Part::Class("batch".to_owned()), "what is new comes first");
    assert_eq!(due.len(), 2, "and all together have grown");
    assert_eq!(teaching.due(&lessons, UnixMillis(REFRESH_MS), 10).len(), 2);
    teaching.forget();
    assert_eq!(teaching.due(&lessons, UnixMillis(1), 10).len(), 2);
}
