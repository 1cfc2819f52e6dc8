use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};

use super::{super::model::Then, *};
use crate::{
    forecast::{Demand, DemandPoint, Quantiles},
    profile::{
        CpuNeighbour, CpuProfile, DeviceNeighbours, DiskNeighbour, Faults, IoProfile, PageAges,
        TcpConnections,
    },
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

fn distributions_of(name: &str, distributions: Vec<Distribution>) -> DistributionsOf {
    DistributionsOf { name: name.parse().expect("a name"), distributions, counts: Default::default() }
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
        vec![distributions_of("alpha", of_alpha), distributions_of("beta", Vec::new())]
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
fn what_goes_over_the_network_is_listed_and_ordered_by() {
    let mut model = Model::default();
    let views = [("alpha", Some((1024, 2048))), ("beta", Some((4096, 4096))), ("gamma", None)];
    let views = views.map(|(name, bytes)| {
        let mut view = seen(name, 0.5, &[], 1);
        if let (Some(profile), Some((bytes_in, bytes_out))) = (&mut view.profile, bytes) {
            (profile.tcp_counted, profile.tcp.bytes_in, profile.tcp.bytes_out) = (true, bytes_in, bytes_out);
        }
        view
    });
    model.take(views.into(), Vec::new(), UnixMillis(1));
    press(&mut model, &[KeyCode::Char('t')]);
    let lines = shown(&mut model, 170, 6);
    assert!(lines[0].contains("by net") && lines[1].contains("I/O/S      NET/S      MEMORY"), "{lines:?}");
    let column = lines[1].find("NET/S").expect("a column");
    for (line, expected) in lines[2..5].iter().zip(["beta 8.0 KiB", "alpha 3.0 KiB", "gamma -"]) {
        let (name, net) = expected.split_once(' ').expect("two words");
        let from_there: String = line.chars().skip(column).collect();
        assert!(line.starts_with(name) && from_there.starts_with(&format!("{net} ")), "{lines:?}");
    }
}

#[test]
fn a_close_look_shows_how_long_connections_lasted_over_the_span_that_is_chosen() {
    let mut model = Model::default();
    let view = || {
        let mut view = seen("db", 0.5, &[], 1);
        let profile = view.profile.as_mut().expect("it was measured");
        let mut of = TcpConnections { open: 2, closed: 3, ..TcpConnections::default() };
        [1000, 1000, 3_000_000].iter().for_each(|us| of.life_us.record(*us));
        profile.tcp.connections = Some(of);
        view
    };
    model.take(vec![view()], Vec::new(), UnixMillis(1));
    press(&mut model, &[KeyCode::Down, KeyCode::Enter]);
    let text = shown(&mut model, 100, 40).join("\n");
    assert!(
        text.contains("TCP connections that ended: 3 times, p50 991.0 us, p90 3.0 s, p99 3.0 s"),
        "{text}"
    );
    assert!(text.contains("connections 2  opened 0  accepted 0  closed 3  failed 0"), "{text}");
    press(&mut model, &[KeyCode::Char('s')]);
    let lives = spans(Metric::TcpLifeUs, &[1000], 40, 90);
    model.take(vec![view()], vec![distributions_of("db", vec![lives])], UnixMillis(2));
    let text = shown(&mut model, 100, 40).join("\n");
    assert!(text.contains("TCP connections that ended: 40 times, p50 991.0 us"), "{text}");
    // Not counted: nothing is said of any.
    let mut view = seen("db", 0.5, &[], 3);
    view.profile.as_mut().expect("it was measured").tcp.connections = None;
    model.take(vec![view], Vec::new(), UnixMillis(3));
    assert!(!shown(&mut model, 100, 40).join("\n").contains("connections"));
}

#[test]
fn a_close_look_shows_ages_of_memory_pressures_and_what_is_forecast() {
    let mut model = Model::default();
    let mut view = seen("db", 0.5, &[], 1);
    let profile = view.profile.as_mut().expect("it was measured");
    (profile.cpu.pressure_some, profile.cpu.pressure_full) = (Some(0.25), Some(0.005));
    profile.io = IoProfile { pressure_some: Some(1.0), pressure_full: None };
    let used = |of: &[(u64, u64)]| {
        let within = |&(span_s, bytes): &(u64, u64)| UsedWithin {
            span_s,
            within_ms: span_s * 1000,
            bytes,
            at: UnixMillis(1),
        };
        let used = of.iter().map(within).collect();
        Some(PageAges { used, resident_bytes: 64 << 20, left_out_bytes: 0, at: UnixMillis(1) })
    };
    let memory = &mut profile.memory;
    (memory.resident_bytes, memory.dirty_bytes_per_s) = (96 << 20, Some(2048.0));
    (memory.faults, memory.refaults) = (Some(Faults { minor: 30, major: 2 }), Some(7));
    memory.ages = used(&[(1, 3 << 20), (4, 5 << 20), (256, 48 << 20)]);
    memory.written_ages = used(&[(2, 512 << 10)]);
    let point = |resource, horizon_ms, p50: f64, evidence| DemandPoint {
        resource,
        horizon_ms,
        need: Quantiles { p50, p90: 2.0 * p50, p95: 3.0 * p50, p99: 4.0 * p50 },
        evidence,
    };
    let enough = Evidence::Enough { seen: 90, p95_coverage: 0.95 };
    let points = vec![
        point(Resource::Cpu, 10_000, 0.25, enough),
        point(Resource::Memory, 1000, 1024.0, Evidence::TooLittle { seen: 3, needed: 30 }),
        point(Resource::IoLatency, 1000, 5e6, enough),
    ];
    view.demand = Some(Demand { instance: view.instance.name.clone(), at: UnixMillis(1), points });
    model.take(vec![view], Vec::new(), UnixMillis(1));
    let lines = shown(&mut model, 170, 5);
    assert!(lines[2].contains("0.75"), "its p95 ahead is listed: {lines:?}");
    press(&mut model, &[KeyCode::Down, KeyCode::Enter]);
    let text = shown(&mut model, 100, 30).join("\n");
    for line in [
        "pressure: cores 25.0 (all 0.5) %  memory - (all -) %  I/O 100.0 (all -) %",
        "resident 96.0 MiB  written 2.0 KiB/s",
        "faults: 30 minor  2 major  fetched again: 7",
        "used within 1 s 3.0 MiB  4 s 5.0 MiB  256 s 48.0 MiB",
        "written within 2 s 512.0 KiB",
        "Cpu in 10 s: 0.25 0.50 0.75 1.00",
        "Memory in 1 s: 1.0 KiB 2.0 KiB 3.0 KiB 4.0 KiB  (seen too little)",
        "IoLatency in 1 s: 5.0 ms 10.0 ms 15.0 ms 20.0 ms",
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
