//! A controller with agents that are only their reports: each learns from the others, what is wanted of a host is ordered, and who may not
//! come is not let in.

#![allow(clippy::unwrap_used, reason = "a test that can't go on is to fail")]

mod common;

use std::time::{Duration, Instant};

use axum::serve::Listener;
use common::{LEADS, Running, envelope, host, instance, name, open, report, settings, whole};
use rswap_controller::{
    Address, AddressError, Peer, Settings, Who,
    link::{LinkError, call},
    reporter::{Orders, Outgoing, Reporter},
    serve,
};
use rswap_fleet::{
    Action, InstanceReport, Order, Report, Token,
    model::Teaching,
    orders::OrderResult,
    report::{Answer, Envelope, Limits, VERSION},
};
use rswap_forecast::{ForecastConfig, Forecaster, Kin, Lessons, Observation, Part, Usage};
use rswap_types::{PoolState, UnixMillis};
use serde_json::{Value, json};
use tokio::{net::UnixListener, sync::oneshot};

#[tokio::test]
async fn what_is_acknowledged_counts_once_and_outlives_the_controller() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    let first = envelope(vec![report("a", 1, vec![instance("x")])]);
    for _ in 0..3 {
        assert_eq!(running.report(&first).await.unwrap().stored, 1);
    }
    let fourth = Report { sequence: 4, ..report("a", 1, vec![instance("x"), instance("y")]) };
    assert_eq!(running.report(&envelope(vec![fourth])).await.unwrap().stored, 4);
    assert_eq!(running.report(&first).await.unwrap().stored, 1);
    let names = running.get("/v1/instances").await;
    assert_eq!(names.as_array().unwrap().len(), 2, "how it was does not come back: {names}");
    let hosts = running.get("/v1/hosts").await;
    assert_eq!(hosts[0]["reports"], json!({ "taken": 2, "skipped": 2, "repeated": 3 }), "{hosts}");
    let hours = "/v1/history?instance=x&tier=2";
    let life = running.get("/v1/status").await["life"].as_u64().unwrap();
    let before = running.get(hours).await;
    assert_eq!(before[0]["used"]["cpu"], json!({ "windows": 20, "mean": 0.5, "most": 0.5 }), "{before}");
    running.stop().await;

    let running = Running::start(directory.path()).await;
    assert!(running.get("/v1/status").await["life"].as_u64().unwrap() > life);
    assert_eq!(running.get(hours).await, before);
    assert_eq!(running.report(&first).await.unwrap().stored, 1);
    assert_eq!(running.get(hours).await, before, "it came again");
    let unknown = call::<Value>(&running.address, "/v1/history?instance=z", None).await.unwrap_err();
    assert!(matches!(unknown, LinkError::Refused { status: 404, .. }), "{unknown}");
    running.stop().await;
}

#[tokio::test]
async fn what_cannot_be_a_report_is_refused_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    let newer = Report { version: VERSION + 1, ..report("a", 1, vec![]) };
    let mixed = vec![report("a", 1, vec![]), Report { sequence: 2, ..report("b", 2, vec![]) }];
    let backwards = vec![Report { sequence: 2, ..report("a", 1, vec![]) }, report("a", 1, vec![])];
    // One of another version may be taken after an upgrade; the others never.
    for (bad, expected) in [(vec![newer], 409), (mixed, 422), (backwards, 422), (vec![], 422)] {
        let refused = running.report(&envelope(bad)).await.unwrap_err();
        assert!(matches!(refused, LinkError::Refused { status, .. } if status == expected), "{refused}");
    }
    let none = call::<Value>(&running.address, "/v1/report", Some(b"{".to_vec())).await.unwrap_err();
    assert!(matches!(none, LinkError::Refused { status: 422, .. }), "{none}");
    assert_eq!(running.get("/v1/hosts").await, json!([]));
    running.stop().await;
}

#[test]
fn only_this_hosts_processes_are_listened_to() {
    let good = "unix:/run/rswap/controller.sock";
    assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
    for open in ["127.0.0.1:7793", "[::1]:7793", "0.0.0.0:7793", "10.0.0.1:7793", "unix:relative"] {
        assert_eq!(open.parse::<Address>(), Err(AddressError(open.to_owned())));
    }
}

/// A transport that vouches for its peers.
struct Vouching(UnixListener);

#[derive(Clone)]
struct AgentOfB;

impl From<AgentOfB> for Peer {
    fn from(_: AgentOfB) -> Self {
        Self { from: "b's agent".to_owned(), who: Who::Agent(host("b")) }
    }
}

impl Listener for Vouching {
    type Io = tokio::net::UnixStream;
    type Addr = AgentOfB;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (stream, _) = self.0.accept().await.unwrap();
        (stream, AgentOfB)
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        Ok(AgentOfB)
    }
}

#[tokio::test]
async fn whom_the_transport_vouches_for_reports_for_itself_only_and_wants_nothing_of_the_fleet() {
    let directory = tempfile::tempdir().unwrap();
    let address = Address(directory.path().join("socket"));
    let listener = UnixListener::bind(&address.0).unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let served =
        tokio::spawn(serve(open(directory.path()), Vouching(listener), async { drop(stopped.await) }));
    let running = Running { address, stop: Some(stop), served };
    let foreign = running.report(&envelope(vec![report("a", 1, vec![])])).await.unwrap_err();
    assert!(
        foreign.to_string().contains("the report is of host a, and comes from the agent of b"),
        "{foreign}"
    );
    assert_eq!(running.report(&envelope(vec![report("b", 2, vec![])])).await.unwrap().stored, 1);
    let wish = serde_json::to_vec(&json!({ "host": "b" })).unwrap();
    let refused = call::<Value>(&running.address, "/v1/drain", Some(wish)).await.unwrap_err();
    assert!(matches!(refused, LinkError::Refused { status: 403, .. }), "{refused}");
    let looks = call::<Value>(&running.address, "/v1/instances", None).await.unwrap_err();
    assert!(matches!(looks, LinkError::Refused { status: 403, .. }), "{looks}");
    running.stop().await;
}

fn taught(cores: f64) -> Lessons {
    let config = ForecastConfig { horizons_ms: LEADS.1.to_vec(), min_seen: 20 };
    let mut forecaster = Forecaster::new(config, LEADS.0);
    forecaster.introduce(&name("a"), Kin { class: "web".to_owned(), identity: "a".to_owned() }, 1);
    for window in 1..=200 {
        let usage = Usage { reference_cores: cores, memory_bytes: 1e8, ..Usage::default() };
        forecaster.observe(&Observation { instance: &name("a"), at: UnixMillis(window * 1_000), usage });
    }
    forecaster.lessons()
}

#[tokio::test]
async fn a_class_is_learnt_from_other_hosts_also_after_a_new_start() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    let lessons = Teaching::default().due(&taught(2.0), UnixMillis(0), 10);
    let teach = Envelope { lessons: lessons.clone(), ..envelope(vec![report("a", 1, vec![])]) };
    assert_eq!(running.report(&teach).await.unwrap().lessons, [], "nobody learns from itself");
    let other = |sequence| envelope(vec![Report { sequence, ..report("b", 2, vec![]) }]);
    let answer = running.report(&other(1)).await.unwrap();
    let web = Part::Class("web".to_owned());
    assert!(answer.lessons.contains(&(web.clone(), taught(2.0).part(&web))));
    let knows = Envelope { knows: answer.knows, ..other(2) };
    assert_eq!(running.report(&knows).await.unwrap().lessons, [], "it knows that");
    running.stop().await;
    let running = Running::start(directory.path()).await;
    let again = Envelope { knows: answer.knows, ..other(3) };
    assert_eq!(running.report(&again).await.unwrap().lessons.len(), 2, "another life tells it anew");
    // Damaged ones are refused, and what they come with is taken.
    let mut damaged = serde_json::to_value(&teach).unwrap();
    let priors = damaged["lessons"][0][1]["priors"].as_object_mut().unwrap();
    priors.values_mut().for_each(|prior| prior["all"]["version"] = json!(99));
    damaged["reports"][0]["sequence"] = json!(2);
    let body = serde_json::to_vec(&damaged).unwrap();
    assert_eq!(call::<Answer>(&running.address, "/v1/report", Some(body)).await.unwrap().stored, 2);
    assert_eq!(running.get("/v1/status").await["counts"]["lessons_refused"], 1);
    running.stop().await;
}

#[test]
fn an_order_is_taken_once_also_by_the_next_agent() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("orders");
    let now = UnixMillis(1_000_000);
    let order = |number, deadline| Order {
        token: Token { life: 1, number },
        host: host("a"),
        deadline: UnixMillis(deadline),
        action: Action::Drain { pool: "p".to_owned(), undo: false },
    };
    let mut orders = Orders::open(&path).unwrap();
    assert_eq!(orders.take(order(1, 1_000_001), &host("a"), false, now), None, "who observes does nothing");
    assert!(matches!(orders.outcomes()[0].result, OrderResult::Refused { .. }));
    assert!(orders.take(order(2, 1_000_001), &host("a"), true, now).is_some());
    let mut orders = Orders::open(&path).unwrap();
    assert_eq!(orders.take(order(2, 1_000_001), &host("a"), true, now), None);
    assert!(orders.outcomes().is_empty(), "what became of it is told by whom it was begun");
    assert_eq!(orders.take(order(3, 999_999), &host("a"), true, now), None);
    assert!(
        matches!(&orders.outcomes()[0].result, OrderResult::Refused { error } if error.contains("deadline"))
    );
    orders.going(name("x"), Token { life: 1, number: 4 });
    orders.moved(&name("y"), None);
    orders.moved(&name("x"), Some("no".to_owned()));
    let outcomes = orders.outcomes();
    assert!(
        matches!(&outcomes[..], [one] if one.token.number == 4 && matches!(one.result, OrderResult::Failed { .. }))
    );
    std::fs::write(&path, "damaged").unwrap();
    assert!(Orders::open(&path).is_err(), "nobody knows what was taken");
}

#[tokio::test]
async fn one_that_two_hosts_report_is_shown_until_it_is_clear_which_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    let of = |which: &str, number, sequence, instances| {
        envelope(vec![Report { sequence, ..report(which, number, instances) }])
    };
    running.report(&of("a", 1, 1, vec![instance("x")])).await.unwrap();
    running.report(&of("b", 2, 1, vec![instance("x")])).await.unwrap();
    let unclear = running.get("/v1/status").await["unclear"].clone();
    assert_eq!(unclear, json!([{ "host": "b", "local": "x", "instance": "x" }]));
    assert_eq!(running.get("/v1/instances").await.as_array().unwrap().len(), 1, "it is in no plan");
    // It has moved, as the other host says now.
    running.report(&of("a", 1, 2, vec![])).await.unwrap();
    assert_eq!(running.get("/v1/status").await["unclear"], json!([]));
    assert_eq!(running.get("/v1/instances").await[0]["host"], "b");
    running.stop().await;
}

#[tokio::test]
async fn a_page_of_another_site_changes_nothing_through_a_forwarded_socket() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    running.report(&envelope(vec![report("a", 1, vec![])])).await.unwrap();
    let forged = serde_json::to_string(&envelope(vec![report("forged", 2, vec![])])).unwrap();
    let asked = "host: localhost:7793";
    let json = "content-type: application/json";
    for (lines, status) in [
        (&[asked, "content-type: text/plain"] as &[_], "415"),
        (&[asked], "415"),
        (&[asked, json, "origin: http://evil.example"], "403"),
        (&["host: evil.example:7793", json, "origin: http://evil.example:7793"], "403"),
    ] {
        for (path, body) in [
            ("/v1/drain", "{\"host\": \"a\"}"),
            ("/v1/forget", "{\"host\": \"a\", \"lost\": true}"),
            ("/v1/roll", "{\"hosts\": [\"a\"]}"),
            ("/v1/roll/decide", "{\"host\": \"a\", \"decision\": \"skip\"}"),
            ("/v1/roll/end", ""),
            ("/v1/report", &forged),
        ] {
            let (head, said) = running.raw(path, lines, body).await;
            assert!(head.starts_with(&format!("http/1.1 {status}")), "{path} {lines:?}: {head}");
            assert!(head.contains("application/problem+json") && said["hint"].is_string(), "{head} {said}");
        }
    }
    let hosts = running.get("/v1/hosts").await;
    assert_eq!((hosts.as_array().unwrap().len(), &hosts[0]["drained"]), (1, &json!(false)), "{hosts}");
    assert_eq!(running.get("/v1/roll").await, Value::Null);
    let (head, _) =
        running.raw("/v1/drain", &[asked, json, "origin: http://localhost:7793"], "{\"host\": \"a\"}").await;
    assert!(head.starts_with("http/1.1 200"), "its own page could: {head}");
    running.stop().await;
}

#[tokio::test]
async fn more_than_the_controller_takes_of_a_host_is_refused_and_said() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits { body_bytes: 64 << 10, instances: 2, links: 1, lessons: 1, ..Limits::default() };
    let running = Running::start_with(directory.path(), Settings { limits, ..settings() }).await;
    let refused = async |envelope: &Envelope, expected: u16, why: &str| {
        let error = running.report(envelope).await.unwrap_err();
        let LinkError::Refused { status, error, .. } = &error else { panic!("{error}") };
        assert!(
            *status == expected && error.contains(why) && error.contains("fleet.limits"),
            "{status}: {error}"
        );
    };
    let three = ["x", "y", "z"].map(instance).to_vec();
    refused(&envelope(vec![report("a", 1, three)]), 422, "3 instances, at most 2").await;
    let link = rswap_fleet::LinkMeasured { to: ([10, 0, 0, 2], 1).into(), bytes_per_s: 1.0 };
    let links = Report { links: vec![link.clone(), link], ..report("a", 1, vec![]) };
    refused(&envelope(vec![links]), 422, "2 links, at most 1").await;
    let lessons = Teaching::default().due(&taught(2.0), UnixMillis(0), 10);
    assert_eq!(lessons.len(), 2);
    let teach = Envelope { lessons, ..envelope(vec![report("a", 1, vec![])]) };
    refused(&teach, 422, "2 lessons, at most 1").await;
    let long = "{".to_owned() + &" ".repeat(70 << 10);
    let (head, said) =
        running.raw("/v1/report", &["host: rswap", "content-type: application/json"], &long).await;
    assert!(head.starts_with("http/1.1 413") && head.contains("application/problem+json"), "{head}");
    assert!(said["detail"].as_str().unwrap().contains("65536 bytes (fleet.limits.body_mib)"), "{said}");
    assert_eq!(running.get("/v1/hosts").await, json!([]));
    let most = envelope(vec![report("a", 1, ["x", "y"].map(instance).to_vec())]);
    assert_eq!(running.report(&most).await.unwrap().stored, 1);
    running.stop().await;
}

#[tokio::test]
async fn a_report_of_before_makes_no_host_empty_and_a_new_start_none_away() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    let mut sequence = 0;
    let mut a = |state: PoolState| {
        sequence += 1;
        envelope(vec![Report { sequence, pools: vec![whole(state)], ..report("a", 1, vec![]) }])
    };
    running.report(&a(PoolState::Ready)).await.unwrap();
    let body = serde_json::to_vec(&json!({ "hosts": ["a"] })).unwrap();
    call::<Value>(&running.address, "/v1/roll", Some(body)).await.unwrap();
    // Nothing runs there, as it says again and again; but something could be started there yet.
    for _ in 0..8 {
        running.report(&a(PoolState::Ready)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(running.get("/v1/roll").await["hosts"][0]["stage"], "draining");
    }
    running.stop().await;
    let running = Running::start(directory.path()).await;
    let hosts = running.get("/v1/hosts").await;
    assert_eq!((&hosts[0]["away"], &hosts[0]["heard"]), (&json!(false), &Value::Null), "{hosts}");
    running.report(&a(PoolState::Draining)).await.unwrap();
    let since = Instant::now();
    while running.get("/v1/roll").await["hosts"][0]["stage"] != "empty" {
        assert!(since.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    running.stop().await;
}

#[tokio::test]
async fn an_agent_goes_on_after_what_a_controller_does_not_take() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits { body_bytes: 64 << 10, instances: 2, links: 1, lessons: 1, ..Limits::default() };
    let running = Running::start_with(directory.path(), Settings { limits, ..settings() }).await;
    let (answered, mut answers) = tokio::sync::mpsc::unbounded_channel();
    let spool = directory.path().join("spool");
    let reporter = Reporter::start(Box::new(running.address.clone()), &spool, 1 << 20, answered).unwrap();
    let say = |instances: Vec<InstanceReport>, lessons: Vec<(Part, Lessons)>| {
        let (knows, leads) = (Default::default(), (LEADS.0, LEADS.1.to_vec()));
        reporter.report(Outgoing { report: report("a", 1, instances), lessons, knows, leads });
    };
    let mut next =
        async || tokio::time::timeout(Duration::from_secs(20), answers.recv()).await.unwrap().unwrap();
    // More was taught than it takes: the report goes alone.
    let lessons = Teaching::default().due(&taught(2.0), UnixMillis(0), 10);
    say(vec![instance("x")], lessons);
    let first = next().await;
    assert_eq!((first.answer.stored, first.told.len()), (1, 0));
    // Too many instances, and too long: each is set aside, and does not keep back what comes after it.
    say(["x", "y", "z"].map(instance).to_vec(), Vec::new());
    let mut long = instance("x");
    long.view.labels.insert("k".to_owned(), "v".repeat(70 << 10));
    say(vec![long], Vec::new());
    say(vec![instance("y")], Vec::new());
    while next().await.answer.stored < 4 {}
    let aside = || {
        let names =
            std::fs::read_dir(&spool).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".aside")).count()
    };
    assert_eq!(aside(), 2);
    let hosts = running.get("/v1/hosts").await;
    assert_eq!((&hosts[0]["instances"], &hosts[0]["reports"]["taken"]), (&json!(1), &json!(2)), "{hosts}");
    drop(reporter);
    running.stop().await;
}

#[tokio::test]
async fn a_host_that_reports_too_often_has_to_wait_and_no_other_has() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits { reports_per_s: 1, reports_at_once: 5, ..Limits::default() };
    let running = Running::start_with(directory.path(), Settings { limits, ..settings() }).await;
    let numbered = |of: &str, sequence: u64| envelope(vec![Report { sequence, ..report(of, 1, vec![]) }]);
    let since = Instant::now();
    let mut refused = 0;
    for sequence in 1..=100 {
        match running.report(&numbered("flood", sequence)).await {
            Ok(_) => {}
            Err(LinkError::Refused { status: 429, retry_after_s: Some(1), error, .. }) => {
                assert!(error.contains("flood") && error.contains("fleet.limits.reports_per_s"), "{error}");
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
        // Whoever comes as it should is taken meanwhile.
        if sequence % 50 == 0 {
            running.report(&numbered("other", sequence)).await.unwrap();
        }
    }
    let taken = 100 - refused;
    assert!((5..=6 + since.elapsed().as_secs()).contains(&taken), "{taken} were taken");
    let body = serde_json::to_string(&numbered("flood", 101)).unwrap();
    let lines = ["host: rswap", "content-type: application/json"];
    let (head, said) = running.raw("/v1/report", &lines, &body).await;
    assert!(head.starts_with("http/1.1 429") && head.contains("application/problem+json"), "{head}");
    assert!(head.contains("\r\nretry-after: 1\r\n") && said["status"] == 429, "{head} {said}");
    let status = running.get("/v1/status").await;
    assert_eq!(status["counts"]["reports_hasty"], refused + 1, "{status}");
    // Many at once are taken, and paid for by those that come after them.
    let many = (1..=10).map(|sequence| Report { sequence, ..report("many", 1, vec![]) }).collect();
    assert_eq!(running.report(&envelope(many)).await.unwrap().stored, 10);
    let error = running.report(&numbered("many", 11)).await.unwrap_err();
    assert!(matches!(error, LinkError::Refused { retry_after_s: Some(6), .. }), "{error:?}");
    running.stop().await;
}

#[tokio::test]
async fn an_agent_waits_as_it_is_told_and_hands_in_all_that_it_has_kept() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits { reports_per_s: 40, reports_at_once: 8, ..Limits::default() };
    let (answered, mut answers) = tokio::sync::mpsc::unbounded_channel();
    let spool = directory.path().join("spool");
    let address = Address(directory.path().join("controller.sock"));
    let reporter = Reporter::start(Box::new(address), &spool, 1 << 20, answered).unwrap();
    let mut made = 0;
    let mut say = || {
        let (knows, leads) = (Default::default(), (LEADS.0, LEADS.1.to_vec()));
        reporter.report(Outgoing { report: report("a", 1, vec![]), lessons: Vec::new(), knows, leads });
        made += 1;
        made
    };
    // Nobody is there yet, and more come than will be taken at once.
    while say() < 150 {}
    let running = Running::start_with(directory.path(), Settings { limits, ..settings() }).await;
    let since = Instant::now();
    let mut calls = 0;
    loop {
        let made = say();
        let last = tokio::time::timeout(Duration::from_millis(100), answers.recv()).await;
        let Ok(Some(last)) = last else { continue };
        calls += 1;
        if last.answer.stored == made {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "{made} were made, {} taken", last.answer.stored);
    }
    let status = running.get("/v1/status").await;
    let hasty = status["counts"]["reports_hasty"].as_u64().unwrap();
    // It is told how long to wait, and does not ask meanwhile.
    assert!((1..=1 + since.elapsed().as_secs()).contains(&hasty), "{hasty} in {:?}", since.elapsed());
    let hosts = running.get("/v1/hosts").await;
    assert_eq!(
        hosts[0]["reports"],
        json!({ "taken": made, "skipped": 0, "repeated": 0 }),
        "{hosts} after {calls}"
    );
    drop(reporter);
    running.stop().await;
}
