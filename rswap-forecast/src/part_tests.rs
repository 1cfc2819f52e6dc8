//! Lessons of a fleet, exchanged in parts.

use super::*;

fn taught(class: &str, cores: f64, windows: u64) -> Forecaster {
    let mut forecaster =
        Forecaster::new(ForecastConfig { horizons_ms: vec![2_000, 10_000], min_seen: 20 }, 1_000);
    let name: InstanceName = "a".parse().unwrap();
    let kin = Kin { class: class.to_owned(), identity: format!("a of {class}") };
    forecaster.introduce(&name, kin, 1);
    for window in 1..=windows {
        let reference_cores = cores * if window % 20 < 10 { 0.5 } else { 1.0 };
        let usage = Usage { reference_cores, memory_bytes: 1e8, ..Usage::default() };
        forecaster.observe(&Observation { instance: &name, at: UnixMillis(window * 1_000), usage });
    }
    forecaster
}

/// The 99th percentile of a newcomer of the class after one idle window.
fn first_p99(forecaster: &Forecaster, class: &str) -> f64 {
    let mut forecaster = forecaster.clone();
    let name: InstanceName = "new".parse().unwrap();
    forecaster.introduce(&name, Kin { class: class.to_owned(), identity: "new".to_owned() }, 1);
    let at = UnixMillis(9_000_000);
    let usage = Usage { reference_cores: 0.01, memory_bytes: 1e6, ..Usage::default() };
    forecaster.observe(&Observation { instance: &name, at, usage });
    let points = forecaster.demand(&name, at).unwrap().points;
    points
        .iter()
        .filter(|point| point.resource == Resource::Cpu)
        .map(|point| point.need.p99)
        .fold(0.0, f64::max)
}

#[test]
fn a_newcomer_starts_from_what_its_class_taught_on_another_host() {
    let there = taught("web", 2.0, 400);
    let mut here = taught("batch", 0.05, 400);
    let before = first_p99(&here, "web");
    let lessons = there.lessons();
    assert_eq!(lessons.parts(), [Part::General, Part::Class("web".to_owned())].into());
    assert_eq!(lessons.part(&Part::Class("web".to_owned())).series(), 1.0);
    assert_eq!(lessons.part(&Part::Class("none".to_owned())).series(), 0.0);

    let mut fleet = here.no_lessons();
    for part in lessons.parts() {
        let part = lessons.part(&part);
        assert_eq!(part.identities(), 0, "identities stay on their host");
        fleet.merge(&part).unwrap();
    }
    let own = here.lessons();
    here.learn_from_fleet(fleet.clone()).unwrap();
    let after = first_p99(&here, "web");
    assert!(before < 0.5 && after > 1.5, "{before} before, {after} after");

    // It is not handed on as this host's, does not count twice when it comes again, and goes when it is replaced.
    assert_eq!(here.lessons(), own);
    here.learn_from_fleet(fleet).unwrap();
    assert_eq!(first_p99(&here, "web"), after);
    here.learn_from_fleet(here.no_lessons()).unwrap();
    assert_eq!(first_p99(&here, "web"), before);
}

#[test]
fn what_goes_here_is_known_next_to_what_the_fleet_taught() {
    let mut here = taught("web", 2.0, 400);
    let fleet = taught("batch", 1.0, 400).lessons();
    here.learn_from_fleet(fleet.part(&Part::Class("batch".to_owned()))).unwrap();
    here.forget(&"a".parse().unwrap());
    assert!(first_p99(&here, "web") > 1.5);
    assert!(first_p99(&here, "batch") > 0.7);
}

#[test]
fn lessons_for_other_leads_are_refused_and_nothing_changes() {
    let mut here = taught("web", 2.0, 400);
    let before = here.lessons();
    let other = Forecaster::new(ForecastConfig::default(), 500);
    assert!(matches!(here.learn_from_fleet(other.lessons()), Err(StateError::OtherLeads(..))));
    assert_eq!(here.lessons(), before);
}
