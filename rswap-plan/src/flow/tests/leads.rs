//! Moves that the need forces begin early enough, and not much earlier.

use super::*;
use crate::Lead;

const WINDOW_MS: u64 = 250;

/// One whose present pool is too small from so many milliseconds on.
fn short_at(at_ms: u64) -> InstanceView {
    view("a", "slow", &[(at_ms - 1, 20.0), (at_ms, 900.0), (60_000, 900.0)])
}

/// `planner` has seen such moves take so long, of a volume of `mib`.
fn took(planner: &mut Planner, mib: u64, all_ms: &[u64]) {
    let mut idle = view("a", "slow", &IDLE);
    idle.volumes[0].size_bytes = mib * MIB;
    let a = idle.instance.clone();
    planner.plan(AT, &[idle], &pools());
    for &took_ms in all_ms {
        planner.part_started(&a, MoveKind::Storage, Some("data"), "fast");
        planner.lasted(&a, MoveKind::Storage, Some("data"), "fast", took_ms);
        planner.part_moved(&a, MoveKind::Storage, Some("data"), AT);
    }
}

fn lead(planner: &mut Planner, view: InstanceView) -> (Lead, u64, String) {
    let decision = planned(planner, view, &pools());
    let Outcome::Move { start_by, forced: true, .. } = decision.outcome else {
        panic!("{}", explain(&decision))
    };
    (decision.lead.unwrap(), start_by.since(AT), explain(&decision))
}

#[test]
fn what_is_needed_is_due_when_its_window_begins() {
    let moments = lead(&mut planner(), short_at(40_000)).0;
    let (windows, start_ms, _) = lead(&mut planner().with_windows(5_000), short_at(40_000));
    assert_eq!(windows.due_ms, moments.due_ms - 5_000);
    assert_eq!(start_ms, windows.due_ms - windows.takes_ms);
    // Nothing is due before now.
    let (next, start_ms, text) = lead(&mut planner().with_windows(5_000), short_at(4_000));
    assert_eq!((next.due_ms, start_ms), (0, 0));
    assert!(
        text.contains("begins 0.0 s before it is needed, as soon as that is foreseen: no such move was"),
        "{text}"
    );
}

#[test]
fn before_any_was_measured_twice_what_is_expected_is_reckoned_with() {
    let (lead, _, text) = lead(&mut planner(), short_at(40_000));
    // 512 MiB at 50 MB/s, and half a second.
    assert!((11_200..11_300).contains(&lead.expected_ms), "{lead:?}");
    assert!(lead.takes_ms.abs_diff(2 * lead.expected_ms) <= 1, "{lead:?}");
    assert!(
        text.contains("no such move was measured yet, 11.2 s are expected, and reckoned with 22.5 s"),
        "{text}"
    );
}

#[test]
fn such_moves_are_reckoned_with_as_long_as_they_took() {
    let mut planner = planner();
    took(&mut planner, 512, &[25_000]);
    let (one, _, text) = lead(&mut planner, short_at(59_000));
    assert_eq!((one.takes_ms, one.measured), (25_000, 1), "it took longer than twice what is expected");
    assert!(text.contains("begins 25.0 s before it is needed: such a move took 25.0 s\n"), "{text}");
    took(&mut planner, 512, &[300, 400, 500]);
    let (few, _, text) = lead(&mut planner, short_at(59_000));
    assert_eq!((few.takes_ms, few.measured), (25_000, 4));
    assert!(text.contains("such moves took up to 25.0 s (4 measured)\n"), "{text}");
    // Of ten, the longest is left out; of the last twenty, two are.
    took(&mut planner, 512, &[310, 320, 330, 340, 350, 360]);
    assert_eq!(lead(&mut planner, short_at(59_000)).0.takes_ms, 500);
    took(&mut planner, 512, &[30_000; 3]);
    took(&mut planner, 512, &[100; 17]);
    let (last, ..) = lead(&mut planner, short_at(59_000));
    assert_eq!((last.takes_ms, last.measured), (30_000, 20));
    took(&mut planner, 512, &[100]);
    assert_eq!(lead(&mut planner, short_at(59_000)).0.takes_ms, 100);
}

#[test]
fn few_fast_ones_do_not_make_bold() {
    let mut planner = planner();
    took(&mut planner, 512, &[300, 300, 300]);
    let (lead, _, text) = lead(&mut planner, short_at(40_000));
    assert!(lead.takes_ms.abs_diff(2 * lead.expected_ms) <= 1, "{text}");
    assert!(text.contains("such moves took up to 0.3 s (3 measured), 11.2 s are expected, and"), "{text}");
}

#[test]
fn what_was_measured_is_scaled_to_what_is_moved_and_holds_between_two_pools_only() {
    let mut planner = planner();
    // A quarter as much: of 11.2 s for 512 MiB half a second is for other things than copying.
    took(&mut planner, 128, &[5_000; 4]);
    let (lead, ..) = lead(&mut planner, short_at(59_000));
    assert!((17_000..18_000).contains(&lead.takes_ms), "{lead:?}");
    let mut all = pools();
    all.push(storage("other", Some(flow(200.0, 20e6)), 0.02, 0.1));
    let decision = planned(
        &mut planner,
        InstanceView {
            volumes: vec![VolumeView { pool: Some("other".into()), ..short_at(59_000).volumes[0].clone() }],
            ..short_at(59_000)
        },
        &all,
    );
    assert_eq!(decision.lead.map(|lead| lead.measured), Some(0), "{}", explain(&decision));
}

#[test]
fn what_was_measured_outlives_the_planner_and_a_move_that_failed_was_not() {
    let mut before = planner();
    took(&mut before, 512, &[4_000; 4]);
    let a: InstanceName = "a".parse().unwrap();
    before.part_started(&a, MoveKind::Storage, Some("data"), "fast");
    before.part_failed(&a, MoveKind::Storage, Some("data"), "no", AT);
    before.lasted(&a, MoveKind::Storage, Some("data"), "fast", 50_000);
    let text = serde_json::to_string(&before.remembered()).unwrap();
    let mut next =
        Planner::with_memory(PlanConfig::default(), serde_json::from_str(&text).unwrap(), |_| false);
    let (lead, ..) = lead(&mut next, short_at(40_000));
    assert_eq!((lead.takes_ms, lead.measured), (4_000, 4));
}

#[test]
fn moves_between_cores_are_measured_as_well() {
    let (both, all) = short_of_both();
    let mut planner = planner();
    planner.plan(AT, std::slice::from_ref(&both), &all);
    for _ in 0..4 {
        planner.part_started(&both.instance, MoveKind::Cpu, None, "many");
        planner.lasted(&both.instance, MoveKind::Cpu, None, "many", 1_700);
        planner.part_moved(&both.instance, MoveKind::Cpu, None, AT);
    }
    let plan = planner.plan(AT, &[both], &all);
    let cpu = plan.decisions.iter().find(|decision| decision.kind == MoveKind::Cpu).unwrap();
    assert_eq!(cpu.lead.map(|lead| (lead.takes_ms, lead.measured)), Some((1_700, 4)));
    assert_eq!(cpu.steps[0].takes_ms, 1_700);
}

/// A load that steps up at `step_ms`, as the forecasts of these horizons have it at `now_ms`: the mean of each window.
fn stepping(step_ms: u64, now_ms: u64, horizons_ms: &[u64]) -> InstanceView {
    let mean = |horizon_ms: u64| {
        let end = now_ms + horizon_ms;
        let high = end.saturating_sub(step_ms).min(WINDOW_MS) as f64 / WINDOW_MS as f64;
        (horizon_ms, 20.0 + 880.0 * high)
    };
    view("a", "slow", &horizons_ms.iter().map(|&horizon_ms| mean(horizon_ms)).collect::<Vec<_>>())
}

proptest::proptest! {
    /// Whatever the horizons are, a step that the forecast knows is met in time, if it can be seen that early; and it isn't met earlier than
    /// by the distance of two horizons, and some windows.
    #[test]
    fn a_step_is_met_in_time_and_not_long_before(
        gaps in proptest::collection::vec(1u64..12, 1..6), takes_ms in 1u64..6_000, step_ms in 20_000u64..24_000,
    ) {
        let horizons_ms: Vec<u64> =
            gaps.iter().scan(0, |at, gap| { *at += gap * WINDOW_MS; Some(*at) }).collect();
        let far_ms = *horizons_ms.last().unwrap();
        let mut planner = Planner::new(PlanConfig { horizon_ms: far_ms, ..PlanConfig::default() }).with_windows(WINDOW_MS);
        took(&mut planner, 512, &[takes_ms; 4]);
        let begun = (0..120).map(|round| round * WINDOW_MS).find(|now_ms| {
            let now = UnixMillis(AT.0 + now_ms);
            let plan = planner.plan(now, &[stepping(step_ms, *now_ms, &horizons_ms)], &pools());
            // As an agent begins what would be late at its next look.
            matches!(&one(&plan).outcome, Outcome::Move { start_by, forced: true, .. } if start_by.since(now) <= WINDOW_MS)
        });
        let before_ms = step_ms.saturating_sub(begun.expect("it begins"));
        // A window whose mean is not too much yet may have a fifth of what comes after the step.
        let needed_ms = takes_ms.min(far_ms.saturating_sub(2 * WINDOW_MS));
        proptest::prop_assert!(before_ms + WINDOW_MS / 5 >= needed_ms, "{} ms before", before_ms);
        let gap_ms = gaps.iter().max().unwrap() * WINDOW_MS;
        proptest::prop_assert!(before_ms <= takes_ms + gap_ms + 3 * WINDOW_MS, "{} ms before", before_ms);
    }
}

#[test]
fn a_step_that_is_not_foreseen_any_more_is_no_longer_waited_for() {
    let mut planner = Planner::new(PlanConfig::default()).with_windows(WINDOW_MS);
    took(&mut planner, 512, &[10; 4]);
    let mut crossing = |now_ms: u64, needs: &[(u64, f64)]| {
        let plan = planner.plan(UnixMillis(AT.0 + now_ms), &[view("a", "slow", needs)], &pools());
        one(&plan).crossing_in_ms
    };
    // 190 are there. On the line, it is reached after nine tenths of the way.
    let far = |at_1, at_2, at_30| vec![(1_000, at_1), (2_000, at_2), (30_000, at_30)];
    assert_eq!(crossing(0, &far(20.0, 20.0, 209.0)), Some(27_185));
    // It looks as far away as before, and was to come by then.
    assert_eq!(crossing(9_000, &far(20.0, 20.0, 209.0)), Some(21_000));
    // Of late it is expected later: at 30 s from the beginning there is nothing.
    assert_eq!(crossing(28_500, &far(20.0, 20.0, 209.0)), Some(27_185));
    assert_eq!(crossing(28_750, &far(20.0, 20.0, 20.0)), None);
    assert_eq!(crossing(29_000, &far(20.0, 20.0, 209.0)), Some(27_185));
}
