//! What has grown old: teachers that are silent, scenes that the fleet has left behind, names that nobody has any more.

use rswap_plan::{Outcome, Plan, StayReason};

use super::*;
use crate::model::SILENT_MS;

#[test]
fn a_teacher_that_is_silent_makes_room_for_one_that_knows_as_much_and_no_other_does() {
    let one = taught("web", 1.0);
    let mut two = one.clone();
    two.merge(&taught("web", 4.0)).unwrap();
    let full = |lessons: &Lessons| {
        let mut model = Model::new(1);
        for number in 0..TEACHERS {
            // All but one are heard a little later.
            let at = if number == 7 { 0 } else { 10 };
            model.teach(&host(&format!("h{number}")), &web(), lessons, UnixMillis(at)).unwrap();
        }
        model
    };
    let teaches = |model: &mut Model, of: &str, at: u64| {
        model.teach(&host(of), &web(), &one, UnixMillis(at)).unwrap();
        model.dropped()
    };
    let only = |of: &str| vec![(host(of), web())];
    let mut model = full(&one);
    assert_eq!(teaches(&mut model, "new", SILENT_MS - 1), only("new"));
    let mut heard = model.clone();
    assert_eq!(teaches(&mut model, "new", SILENT_MS), only("h7"));
    assert!(model.teaches(&host("new"), &web()) && !model.teaches(&host("h7"), &web()));
    assert_eq!(
        teaches(&mut model, "newer", SILENT_MS + 1),
        only("newer"),
        "no other has been silent so long"
    );
    // Who teaches the same again is not silent.
    assert_eq!(teaches(&mut heard, "h7", SILENT_MS - 1), []);
    assert_eq!(teaches(&mut heard, "new", SILENT_MS), only("new"));
    // For one that knows less, nobody makes room.
    assert_eq!(teaches(&mut full(&two), "new", 2 * SILENT_MS), only("new"));
}

#[test]
fn no_order_rests_on_what_has_changed_since_it_was_looked_at() {
    let x = || vec![instance("x", "x", 1.0)];
    let mut fleet = Inventory::default();
    fleet.take(&report("a", 1, 0.5, x()), UnixMillis(1_000));
    fleet.take(&report("b", 2, 0.01, vec![]), UnixMillis(1_000));
    fleet.take(&report("c", 3, 0.4, vec![]), UnixMillis(1_000));
    let orders = |meanwhile: &dyn Fn(&mut Inventory), drained: &BTreeSet<HostName>, now: u64| {
        let mut fleet = fleet.clone();
        let (mut planner, mut book) = (FleetPlanner::new(PlanConfig::default(), INTERVAL_MS), Book::new(1));
        let scene = planner.look(&fleet, &BTreeSet::new(), UnixMillis(1_000));
        meanwhile(&mut fleet);
        let decided = planner.decide(scene);
        // It is decided about what was looked at, whatever came after that.
        let moves = plan::moves(&decided);
        assert_eq!(moves.len(), 1, "{decided:?}");
        planner.order_moves(&moves, &fleet, drained, &mut book, UnixMillis(now));
        assert_eq!(planner.moving().count(), book.waiting().count());
        book.waiting().map(|order| (order.host.clone(), order.action.clone())).collect::<Vec<_>>()
    };
    let address = ([10, 0, 0, 2], 7791).into();
    let ordered = [(host("a"), Action::Migrate { instance: name("x"), to: host("b"), address })];
    let (nobody, b) = (BTreeSet::new(), BTreeSet::from([host("b")]));
    let nothing = |_: &mut Inventory| {};
    assert_eq!(orders(&nothing, &nobody, 2_001), ordered);

    let says = |fleet: &mut Inventory, of: &str, number: u8, there: Vec<InstanceReport>| {
        fleet.take(&report(of, number, 0.4, there), UnixMillis(2_000));
    };
    let went_to_c = |fleet: &mut Inventory| {
        says(fleet, "a", 1, vec![]);
        says(fleet, "c", 3, x());
    };
    assert_eq!(orders(&went_to_c, &nobody, 2_001), [], "c would be asked for what was decided about a");
    let went_to_b = |fleet: &mut Inventory| {
        says(fleet, "a", 1, vec![]);
        says(fleet, "b", 2, x());
    };
    assert_eq!(orders(&went_to_b, &nobody, 2_001), [], "it is there already");
    let ended = |fleet: &mut Inventory| says(fleet, "a", 1, vec![]);
    assert_eq!(orders(&ended, &nobody, 2_001), [], "there is no such instance any more");
    // Its host reports it as before: that is no change.
    let stayed = |fleet: &mut Inventory| says(fleet, "a", 1, x());
    assert_eq!(orders(&stayed, &nobody, 2_001), ordered);

    let last = 1_000 + AWAY_INTERVALS * INTERVAL_MS;
    assert_eq!(orders(&nothing, &nobody, last), ordered);
    assert_eq!(orders(&nothing, &nobody, last + 1), [], "b has become silent");
    let b_is_heard = |fleet: &mut Inventory| says(fleet, "b", 2, vec![]);
    assert_eq!(orders(&b_is_heard, &nobody, last + 1), [], "a has become silent, and would hear of it late");
    let both_are_heard = |fleet: &mut Inventory| {
        says(fleet, "a", 1, x());
        says(fleet, "b", 2, vec![]);
    };
    assert_eq!(orders(&both_are_heard, &nobody, last + 1), ordered);

    assert_eq!(orders(&nothing, &b, 2_001), [], "b is to be left");
}

#[test]
fn of_two_that_change_places_neither_is_ordered_alone() {
    let mut fleet = Inventory::default();
    fleet.take(&report("a", 1, 0.5, vec![instance("x", "x", 1.0)]), UnixMillis(1_000));
    fleet.take(&report("b", 2, 0.01, vec![]), UnixMillis(1_000));
    let mut planner = FleetPlanner::new(PlanConfig::default(), INTERVAL_MS);
    let scene = planner.look(&fleet, &BTreeSet::new(), UnixMillis(1_000));
    let decided = planner.decide(scene);
    let moves = plan::moves(&decided);
    let [one] = moves[..] else { panic!("{decided:?}") };
    let mut given = |decision: &rswap_plan::Decision| {
        let mut book = Book::new(1);
        planner.order_moves(&[decision], &fleet, &BTreeSet::new(), &mut book, UnixMillis(1_001));
        book.waiting().count()
    };
    let half = rswap_plan::Decision { exchange: Some(name("y")), ..one.clone() };
    assert_eq!((given(&half), given(one)), (0, 1));
}

/// What an hour of a core costs on a, b and c.
const B_IS_CHEAP: [f64; 3] = [0.5, 0.01, 0.4];
const B_IS_DEAR: [f64; 3] = [0.5, 0.9, 0.4];

/// All hosts report at a moment, and x runs `on` one of them, or on none; what is decided then.
fn round(
    fleet: &mut Inventory,
    planner: &mut FleetPlanner,
    costs: [f64; 3],
    on: Option<&str>,
    at: u64,
) -> Plan {
    for ((of, number), cost) in [("a", 1), ("b", 2), ("c", 3)].into_iter().zip(costs) {
        let there = if on == Some(of) { vec![instance("x", "x", 1.0)] } else { Vec::new() };
        fleet.take(&report(of, number, cost, there), UnixMillis(at));
    }
    planner.plan(fleet, &BTreeSet::new(), UnixMillis(at))
}

/// What became of the only instance there is.
fn outcome(plan: &Plan) -> &Outcome {
    let [decision] = plan.decisions.as_slice() else { panic!("{plan:?}") };
    &decision.outcome
}

fn goes_to(plan: &Plan, host: &str) -> bool {
    matches!(outcome(plan), Outcome::Move { to, .. } if to.as_str() == host)
}

#[test]
fn what_was_gone_for_longer_than_its_name_is_remembered_has_no_cool_down_any_more() {
    // Longer than all of this takes.
    let config = PlanConfig { cool_down_ms: 4 * GONE_MS, ..PlanConfig::default() };
    for (gone_ms, forgotten) in [(GONE_MS - 2_000, false), (GONE_MS + 2_000, true)] {
        let (mut fleet, mut book) = (Inventory::default(), Book::new(1));
        let mut planner = FleetPlanner::new(config.clone(), INTERVAL_MS);
        let decided = round(&mut fleet, &mut planner, B_IS_CHEAP, Some("a"), 1_000);
        assert!(goes_to(&decided, "b"), "{decided:?}");
        planner.order(&decided, &fleet, &BTreeSet::new(), &mut book, UnixMillis(1_000));
        assert_eq!(planner.moving().count(), 1);
        // It has arrived where it would be better to be elsewhere from now on.
        let decided = round(&mut fleet, &mut planner, B_IS_DEAR, Some("b"), 2_000);
        let cools = |decided: &Plan| {
            matches!(outcome(decided), Outcome::Stay { reason: StayReason::CoolDown { .. } })
        };
        assert!(cools(&decided), "{decided:?}");
        assert_eq!(planner.moving().count(), 0);

        for at in [3_000, 3_000 + gone_ms] {
            assert_eq!(round(&mut fleet, &mut planner, B_IS_DEAR, None, at).decisions, []);
        }
        assert_eq!(fleet.is_known(&name("x")), !forgotten);
        let decided = round(&mut fleet, &mut planner, B_IS_DEAR, Some("b"), 4_000 + gone_ms);
        if forgotten {
            assert!(goes_to(&decided, "c"), "{decided:?}");
        } else {
            assert!(cools(&decided), "{decided:?}");
        }
    }
}

#[test]
fn what_is_on_its_way_is_remembered_however_long_no_host_has_it() {
    let (mut fleet, mut book) = (Inventory::default(), Book::new(1));
    let mut planner = FleetPlanner::new(PlanConfig::default(), INTERVAL_MS);
    let decided = round(&mut fleet, &mut planner, B_IS_CHEAP, Some("a"), 1_000);
    assert!(goes_to(&decided, "b"), "{decided:?}");
    planner.order(&decided, &fleet, &BTreeSet::new(), &mut book, UnixMillis(1_000));
    for at in [2_000, 4_000 + GONE_MS] {
        assert_eq!(round(&mut fleet, &mut planner, B_IS_CHEAP, None, at).decisions, []);
    }
    assert!(!fleet.is_known(&name("x")));
    assert_eq!(planner.moving().count(), 1, "nobody has said what became of it");
    // Its host has it again: it is not sent a second time.
    let decided = round(&mut fleet, &mut planner, B_IS_CHEAP, Some("a"), 5_000 + GONE_MS);
    assert_eq!(outcome(&decided), &Outcome::Stay { reason: StayReason::InFlight });
}
