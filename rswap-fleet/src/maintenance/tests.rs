use proptest::prelude::*;

use super::*;

const LIMIT_MS: u64 = 1_000;

fn hosts(count: usize) -> Vec<HostName> {
    (0..count).map(|number| format!("h{number}").parse().unwrap()).collect()
}

fn seen(of: &[(usize, bool, usize, u64)]) -> BTreeMap<HostName, Seen> {
    let seen = |&(host, present, instances, heard): &(usize, bool, usize, u64)| {
        (hosts(host + 1).remove(host), usual(present, instances, heard))
    };
    of.iter().map(seen).collect()
}

fn usual(present: bool, instances: usize, heard: u64) -> Seen {
    Seen { present, instances, heard: UnixMillis(heard), ready: true, draining: true, ..Seen::default() }
}

fn names(roll: &Roll) -> Vec<&'static str> {
    roll.stages().map(|(_, stage)| stage.name()).collect()
}

#[test]
fn host_after_host_is_emptied_worked_on_and_used_again() {
    let [a, b]: [HostName; 2] = hosts(2).try_into().unwrap();
    let mut roll = Roll::new([a.clone(), b.clone(), a.clone()], 1, LIMIT_MS);
    let both = |heard| seen(&[(0, true, 2, heard), (1, true, 3, heard)]);
    roll.round(&both(0), UnixMillis(0), UnixMillis(0));
    assert_eq!(names(&roll), ["being emptied", "waiting"]);
    assert_eq!(roll.drained(), [a.clone()].into());
    assert_eq!(
        roll.worked_on(&a, UnixMillis(1)),
        Err(RollError::Stage { host: a.clone(), stage: "being emptied" })
    );
    let empty = seen(&[(0, true, 0, 10), (1, true, 5, 10)]);
    roll.round(&empty, UnixMillis(0), UnixMillis(10));
    assert_eq!(names(&roll), ["empty", "waiting"]);
    // Somebody starts something there: it is emptied again.
    roll.round(&both(20), UnixMillis(0), UnixMillis(20));
    assert_eq!(names(&roll), ["being emptied", "waiting"]);
    roll.round(&seen(&[(0, true, 0, 30), (1, true, 5, 30)]), UnixMillis(0), UnixMillis(30));
    // It is kept, and read again by the next controller.
    let mut roll: Roll = serde_json::from_str(&serde_json::to_string(&roll).unwrap()).unwrap();
    roll.worked_on(&a, UnixMillis(40)).unwrap();
    assert_eq!(roll.drained(), [].into());
    // What it said before it was worked on does not count.
    roll.round(&seen(&[(0, true, 0, 39), (1, true, 5, 50)]), UnixMillis(0), UnixMillis(50));
    assert_eq!(names(&roll), ["to come back", "waiting"]);
    roll.round(&seen(&[(0, true, 0, 60), (1, true, 5, 60)]), UnixMillis(0), UnixMillis(60));
    assert_eq!(names(&roll), ["done", "being emptied"]);
    roll.round(&seen(&[(1, true, 0, 70)]), UnixMillis(0), UnixMillis(70));
    roll.worked_on(&b, UnixMillis(71)).unwrap();
    roll.round(&seen(&[(1, true, 0, 80)]), UnixMillis(0), UnixMillis(80));
    assert!(roll.is_over());
}

#[test]
fn another_version_or_another_boot_says_that_it_was_worked_on() {
    let [a]: [HostName; 1] = hosts(1).try_into().unwrap();
    let is = |version: &str, boot: &str, instances, heard, ready| {
        let running = Some(Running { version: version.to_owned(), boot: boot.to_owned() });
        [(a.clone(), Seen { ready, running, ..usual(true, instances, heard) })].into()
    };
    for (version, boot) in [("1", "y"), ("2", "x")] {
        let mut roll = Roll::new([a.clone()], 1, LIMIT_MS);
        // A change before it is empty is none of the roll's.
        roll.round(&is("0", "x", 1, 0, true), UnixMillis(0), UnixMillis(0));
        roll.round(&is("1", "x", 1, 5, false), UnixMillis(0), UnixMillis(5));
        roll.round(&is("1", "x", 0, 10, false), UnixMillis(0), UnixMillis(10));
        roll.round(&is("1", "x", 0, 20, false), UnixMillis(0), UnixMillis(20));
        assert_eq!(names(&roll), ["empty"], "the same as before");
        roll.round(&[].into(), UnixMillis(0), UnixMillis(10 * LIMIT_MS));
        assert_eq!(names(&roll), ["empty"], "work takes its time");
        let now = 11 * LIMIT_MS;
        roll.round(&is(version, boot, 0, now, false), UnixMillis(0), UnixMillis(now));
        assert_eq!(names(&roll), ["to come back"]);
        assert_eq!(roll.coming_back().collect::<Vec<_>>(), [&a]);
        assert!(roll.holds(&a).is_some());
        let mut sick = roll.clone();
        roll.round(&is(version, boot, 0, now + 1, true), UnixMillis(0), UnixMillis(now + 1));
        assert!(roll.is_over() && roll.holds(&a).is_none());
        // One that reports, and is not ready, is not back.
        sick.round(&is(version, boot, 0, now + LIMIT_MS, false), UnixMillis(0), UnixMillis(now + LIMIT_MS));
        assert_eq!(names(&sick), ["stuck"]);
        assert_eq!(sick.drained(), [a.clone()].into());
    }
}

#[test]
fn what_is_stuck_stops_the_roll_until_somebody_decides() {
    let [a, b, c]: [HostName; 3] = hosts(3).try_into().unwrap();
    let mut roll = Roll::new(hosts(3), 2, LIMIT_MS);
    let all = seen(&[(0, true, 1, 0), (1, true, 0, 0), (2, true, 1, 0)]);
    roll.round(&all, UnixMillis(0), UnixMillis(0));
    assert!(roll.holds(&c).is_some(), "one that waits is the roll's, too");
    let all = seen(&[(0, true, 1, 1), (1, true, 0, 1), (2, true, 1, 1)]);
    roll.round(&all, UnixMillis(0), UnixMillis(LIMIT_MS));
    assert_eq!(names(&roll), ["stuck", "empty", "waiting"]);
    assert!(roll.drained().contains(&a), "it is not used meanwhile");
    roll.worked_on(&b, UnixMillis(LIMIT_MS)).unwrap();
    roll.round(
        &seen(&[(0, true, 1, 0), (1, true, 0, LIMIT_MS + 1)]),
        UnixMillis(0),
        UnixMillis(LIMIT_MS + 1),
    );
    assert_eq!(names(&roll), ["stuck", "done", "waiting"], "no further host begins");
    roll.retry(&a, UnixMillis(LIMIT_MS + 2)).unwrap();
    roll.round(&all, UnixMillis(0), UnixMillis(LIMIT_MS + 3));
    assert_eq!(names(&roll), ["being emptied", "done", "being emptied"]);
    roll.round(&seen(&[]), UnixMillis(0), UnixMillis(3 * LIMIT_MS));
    assert_eq!(names(&roll), ["stuck", "done", "stuck"]);
    roll.skip(&a).unwrap();
    roll.skip(&c).unwrap();
    assert!(roll.is_over() && roll.drained().is_empty());
    assert_eq!(roll.skip(&b), Err(RollError::Stage { host: b, stage: "done" }));
}

#[test]
fn a_host_is_empty_by_what_it_says_since_its_turn_began_and_when_nobody_comes() {
    let [a]: [HostName; 1] = hosts(1).try_into().unwrap();
    let begun = || {
        let mut roll = Roll::new([a.clone()], 1, LIMIT_MS);
        roll.round(&seen(&[(0, true, 0, 90)]), UnixMillis(0), UnixMillis(100));
        roll
    };
    let empty = usual(true, 0, 101);
    let not_yet = [
        (Seen { heard: UnixMillis(100), ..empty.clone() }, "its agent does not say"),
        (Seen { draining: false, ..empty.clone() }, "its agent does not say"),
        (Seen { coming: 1, ..empty.clone() }, "1 instances are still on their way to it"),
        (Seen { instances: 2, ..empty.clone() }, "2 instances have not left it"),
        (Seen { present: false, ..empty.clone() }, "it does not report"),
    ];
    for (seen, why) in not_yet {
        let (mut roll, seen) = (begun(), [(a.clone(), seen)].into());
        roll.round(&seen, UnixMillis(0), UnixMillis(110));
        assert_eq!(names(&roll), ["being emptied"], "{seen:?}");
        roll.round(&seen, UnixMillis(0), UnixMillis(100 + LIMIT_MS));
        let stage = roll.holds(&a).unwrap();
        assert!(matches!(stage, Stage::Stuck { reason, .. } if reason.contains(why)), "{stage:?}");
    }
    let mut roll = begun();
    roll.round(&[(a.clone(), empty)].into(), UnixMillis(0), UnixMillis(110));
    assert_eq!(names(&roll), ["empty"]);
}

#[test]
fn what_nobody_could_hear_makes_no_host_late() {
    let [a]: [HostName; 1] = hosts(1).try_into().unwrap();
    let mut roll = Roll::new([a.clone()], 1, LIMIT_MS);
    roll.round(&seen(&[(0, true, 1, 0)]), UnixMillis(0), UnixMillis(0));
    // The controller was away for long, and begins anew.
    let from = 10 * LIMIT_MS;
    roll.round(&[].into(), UnixMillis(from), UnixMillis(from + LIMIT_MS - 1));
    assert_eq!(names(&roll), ["being emptied"]);
    let mut back = roll.clone();
    roll.round(&[].into(), UnixMillis(from), UnixMillis(from + LIMIT_MS));
    assert_eq!(names(&roll), ["stuck"]);
    // So it is with one that is to come back.
    back.round(&seen(&[(0, true, 0, from)]), UnixMillis(from), UnixMillis(from));
    back.worked_on(&a, UnixMillis(from)).unwrap();
    let from = 20 * LIMIT_MS;
    back.round(&[].into(), UnixMillis(from), UnixMillis(from + LIMIT_MS - 1));
    assert_eq!(names(&back), ["to come back"]);
    back.round(&[].into(), UnixMillis(from), UnixMillis(from + LIMIT_MS));
    assert_eq!(names(&back), ["stuck"]);
}

proptest! {
    /// Whatever is seen and decided: never more at once than allowed, and none is worked on that was not seen to be empty.
    #[test]
    fn no_more_than_allowed_at_once(
        at_once in 1usize..4,
        steps in prop::collection::vec((0usize..6, any::<bool>(), 0usize..3, 1u64..600, 0u8..4), 1..150),
    ) {
        let all = hosts(6);
        let mut roll = Roll::new(all.clone(), at_once, LIMIT_MS);
        let (mut now, mut last) = (0, BTreeMap::<HostName, Seen>::new());
        for (host, present, instances, wait, decision) in steps {
            now += wait;
            let host = &all[host];
            last.insert(host.clone(), usual(present, instances, now));
            let before = roll.clone();
            match decision {
                0 => drop(roll.retry(host, UnixMillis(now))),
                1 => drop(roll.skip(host)),
                2 if roll.worked_on(host, UnixMillis(now)).is_ok() => {
                    let was_empty = matches!(before.stages[host], Stage::Empty { .. });
                    prop_assert!(was_empty);
                }
                _ => {}
            }
            roll.round(&last, UnixMillis(0), UnixMillis(now));
            let busy = roll.stages.values().filter(|stage| is_busy(stage)).count();
            prop_assert!(busy <= at_once, "{:?}", roll.stages);
            for (host, stage) in &roll.stages {
                let became_empty = matches!(stage, Stage::Empty { .. }) && !matches!(before.stages[host], Stage::Empty { .. });
                let said = last.get(host).is_some_and(|seen| seen.present && seen.instances == 0 && before.drained().contains(host));
                prop_assert!(!became_empty || said);
            }
        }
    }
}
