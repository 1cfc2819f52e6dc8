use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};

use super::{super::model::Then, *};
use crate::{
    profile::{CpuNeighbour, CpuProfile, DeviceNeighbours, DiskNeighbour},
    status::{Distribution, DistributionsOf, Metric},
    units::UnixMillis,
};

/// An instance as the agent tells of it, in window `at`.
fn seen(name: &str, cores: f64, waits_ns: &[u64], at: u64) -> InstanceView {
    let mut run_queue_ns = Histogram::default();
    waits_ns.iter().for_each(|ns| run_queue_ns.record(*ns));
    let text = serde_json::json!({
        "name": name, "labels": {"tier": format!("of-{name}")}, "cgroup": "/x", "cgroup_id": 1, "origin": "run",
        "init_pid": 1, "command": ["work", name], "network": null, "pool": "fast", "since": 0,
        "profile": null, "demand": null,
    });
    let mut view: InstanceView = serde_json::from_value(text).expect("a view");
    view.profile = Some(Profile {
        instance: view.instance.name.clone(),
        at: UnixMillis(at),
        window_ms: 1000,
        cpu: CpuProfile { cores, run_queue_ns, ..CpuProfile::default() },
        block: Vec::new(),
        block_counted: false,
        disk_neighbours: Vec::new(),
        io: Default::default(),
        tcp: Default::default(),
        tcp_counted: false,
        memory: Default::default(),
    });
    view
}

fn shown(model: &mut Model, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal.draw(|frame| draw(frame, model)).expect("drawn");
    let buffer = terminal.backend().buffer().clone();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    (0..height).map(line).collect()
}

fn press(model: &mut Model, keys: &[KeyCode]) -> Then {
    keys.iter().map(|key| model.press(KeyEvent::new(*key, KeyModifiers::NONE))).last().expect("a key")
}

fn of_three() -> Model {
    let mut model = Model::default();
    for at in 1..=3 {
        let views = vec![
            seen("beta", 0.5 * at as f64, &[1000, 2_000_000], at),
            seen("alpha", 0.25, &[5000], at),
            seen("gamma", 1.0, &[40_000_000], at),
        ];
        model.take(views, Vec::new(), UnixMillis(at));
    }
    model
}

fn names(model: &Model) -> Vec<String> {
    model.listed().into_iter().map(|view| view.instance.name.to_string()).collect()
}

#[test]
fn instances_are_listed_in_the_order_that_is_chosen() {
    let mut model = of_three();
    assert_eq!(names(&model), ["alpha", "beta", "gamma"]);
    press(&mut model, &[KeyCode::Char('c')]);
    assert_eq!(names(&model), ["beta", "gamma", "alpha"]);
    press(&mut model, &[KeyCode::Char('w')]);
    assert_eq!(names(&model), ["gamma", "beta", "alpha"]);
    let lines = shown(&mut model, 160, 8);
    assert!(lines[0].contains("3 instances by wait"), "{lines:?}");
    assert!(lines[2].starts_with("gamma") && lines[2].contains("39.8 ms"), "{lines:?}");
    // It grew: three windows, the last one the highest.
    assert!(
        lines[3].starts_with("beta") && lines[3].contains("1.50") && lines[3].contains("▃▆█"),
        "{lines:?}"
    );
}

#[test]
fn a_choice_stays_with_its_instance() {
    let mut model = of_three();
    press(&mut model, &[KeyCode::Down, KeyCode::Down]);
    assert_eq!(model.chosen_at(), Some(1), "beta");
    press(&mut model, &[KeyCode::Char('c')]);
    assert_eq!(model.chosen_at(), Some(0), "beta is first now");
    model.take(vec![seen("alpha", 1.0, &[], 9)], Vec::new(), UnixMillis(9));
    assert_eq!(model.chosen_at(), None, "it has gone");
    press(&mut model, &[KeyCode::PageDown, KeyCode::Enter]);
    assert_eq!(model.opened().map(|view| view.instance.name.to_string()).as_deref(), Some("alpha"));
}

#[test]
fn a_filter_takes_names_pools_and_labels() {
    let mut model = of_three();
    let typed = |model: &mut Model, text: &str| {
        let keys: Vec<KeyCode> = text.chars().map(KeyCode::Char).collect();
        press(model, &[KeyCode::Char('/')]);
        press(model, &keys);
    };
    typed(&mut model, "ALp");
    assert_eq!(names(&model), ["alpha"]);
    // What orders the list elsewhere is a letter here.
    assert!(shown(&mut model, 100, 6)[0].contains("filter: ALp_"));
    press(&mut model, &[KeyCode::Esc]);
    assert_eq!(names(&model).len(), 3);
    typed(&mut model, "tier=of-g");
    press(&mut model, &[KeyCode::Enter]);
    assert_eq!(names(&model), ["gamma"]);
    assert_eq!(press(&mut model, &[KeyCode::Char('q')]), Then::End);
}

/// What the agent has of a metric: these values in the last window, and each so many times in the minute and the hour.
fn spans(metric: Metric, values: &[u64], minute: u64, hour: u64) -> Distribution {
    let times = |times: u64| {
        let mut of = Histogram::default();
        (0..times).for_each(|_| values.iter().for_each(|value| of.record(*value)));
        of
    };
    Distribution {
        metric,
        window: Histogram::default(),
        minute: times(minute),
        hour: times(hour),
        total: times(hour),
    }
}

#[test]
fn times_are_shown_over_the_span_that_is_chosen() {
    let mut model = of_three();
    assert_eq!(model.distributions_wanted(), None, "they come with the instances");
    assert!(shown(&mut model, 160, 6)[0].contains("times of the last window"));
    assert_eq!(press(&mut model, &[KeyCode::Char('s')]), Then::Ask);
    assert_eq!(model.distributions_wanted().as_deref(), Some("/v1/distributions"));
    let on_disk = Metric::BlockDeviceNs { device: "8:0".to_owned(), operation: Operation::Read };
    let told = || {
        let of_alpha = vec![
            spans(Metric::RunQueueNs, &[70_000_000], 30, 900),
            spans(on_disk.clone(), &[8_000_000], 0, 12),
        ];
        vec![
            DistributionsOf { name: "alpha".parse().expect("a name"), distributions: of_alpha },
            DistributionsOf { name: "beta".parse().expect("a name"), distributions: Vec::new() },
        ]
    };
    let views = || (0..3).map(|at| seen(["alpha", "beta", "gamma"][at], 1.0, &[5000], 4)).collect();
    model.take(views(), told(), UnixMillis(4));
    let lines = shown(&mut model, 160, 6);
    assert!(lines[0].contains("times of the last minute"), "{lines:?}");
    assert!(lines[5].contains("s: last hour"), "{lines:?}");
    assert!(lines[2].starts_with("alpha") && lines[2].matches("71.3 ms").count() == 2, "{lines:?}");
    // Nothing within the hour, or not told of yet: no time of another span.
    assert!(lines[3].starts_with("beta") && !lines[3].contains("us"), "{lines:?}");
    assert!(lines[4].starts_with("gamma") && !lines[4].contains("us"), "{lines:?}");
    // It is ordered by what is shown.
    press(&mut model, &[KeyCode::Char('w')]);
    assert_eq!(names(&model)[0], "alpha");

    press(&mut model, &[KeyCode::Down, KeyCode::Enter]);
    assert_eq!(model.distributions_wanted().as_deref(), Some("/v1/distributions?instance=alpha"));
    let text = shown(&mut model, 100, 30).join("\n");
    assert!(text.contains("waiting for a core: 30 times") && !text.contains("reads of"), "{text}");
    assert_eq!(press(&mut model, &[KeyCode::Char('s')]), Then::Ask);
    let text = shown(&mut model, 100, 30).join("\n");
    assert!(text.contains("times of the last hour") && text.contains("s: last window"), "{text}");
    assert!(
        text.contains("waiting for a core: 900 times") && text.contains("reads of 8:0: 12 times"),
        "{text}"
    );
    press(&mut model, &[KeyCode::Char('s')]);
    let text = shown(&mut model, 100, 30).join("\n");
    assert!(text.contains("waiting for a core: 1 times") && !text.contains("reads of"), "{text}");
    assert_eq!(model.distributions_wanted(), None);
}

#[test]
fn a_close_look_names_who_took_a_core_and_a_disk() {
    let mut model = Model::default();
    let mut view = seen("db", 0.5, &[], 1);
    let profile = view.profile.as_mut().expect("it was measured");
    let hog = Who::Cgroup("/hog".to_owned());
    profile.cpu.neighbours = vec![CpuNeighbour { who: hog, waited_ns: 250_000_000 }];
    let writer = DiskNeighbour { who: Who::KernelThreads, device_ns: 3_000_000_000, waited_ns: 750 };
    profile.disk_neighbours =
        vec![DeviceNeighbours { device: "8:0".to_owned(), own_ns: 1000, others: vec![writer] }];
    profile.tcp.retransmits = Some(7);
    model.take(vec![view], Vec::new(), UnixMillis(1));
    press(&mut model, &[KeyCode::Down, KeyCode::Enter]);
    let text = shown(&mut model, 100, 30).join("\n");
    for line in [
        " 25.0 %  cgroup /hog",
        "8:0 was used by",
        "3.00 under way  about 75 % of its time  kernel threads",
        "sent again 7  dropped at sockets that listen -",
    ] {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
}

#[test]
fn a_close_look_shows_each_distribution_and_ends() {
    let mut model = of_three();
    press(&mut model, &[KeyCode::Down, KeyCode::Down, KeyCode::Enter]);
    let lines = shown(&mut model, 100, 20);
    let text = lines.join("\n");
    assert!(text.contains("beta  work beta") && text.contains("waiting for a core: 2 times"), "{text}");
    // Two samples: a bar each, and nothing for what lies between them.
    assert_eq!(text.matches(&bar::FULL.repeat(BAR as usize)).count(), 2, "{text}");
    assert!(text.contains("512 ns") && text.contains("...") && text.contains("1.0 ms"), "{text}");
    press(&mut model, &[KeyCode::Down]);
    assert!(!shown(&mut model, 100, 20).join("\n").contains("beta  work beta"), "scrolled");
    assert_eq!(press(&mut model, &[KeyCode::Esc]), Then::GoOn);
    assert!(model.opened().is_none());
}

#[test]
fn an_agent_that_does_not_answer_is_said() {
    let mut model = of_three();
    model.lose("refused".into());
    let lines = shown(&mut model, 100, 6);
    assert!(lines[0].contains("does not answer") && lines[0].contains("refused"), "{lines:?}");
    assert!(lines[2].starts_with("alpha"), "what was known stays: {lines:?}");
    // A small window is no reason to end.
    for (width, height) in [(1, 1), (3, 2), (20, 3)] {
        shown(&mut model, width, height);
    }
}
