//! A controller with agents that are only their reports: each learns from the others, what is wanted of a host is ordered, and who may not
//! come is not let in.

#![allow(clippy::unwrap_used, reason = "a test that can't go on is to fail")]

mod common;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use axum::serve::Listener;
use common::{LEADS, answers, envelope, host, instance, name, open, report, whole};
use rswap_controller::{
    Address, AddressError, Peer, Who,
    link::{LinkError, call},
    reporter::Orders,
    serve, serve_at,
};
use rswap_fleet::{
    Action, InstanceReport, Order, Report, Token,
    model::Teaching,
    orders::OrderResult,
    report::{Answer, Envelope, VERSION},
};
use rswap_forecast::{ForecastConfig, Forecaster, Kin, Lessons, Observation, Part, Usage};
use rswap_types::{PoolState, THIS_HOST, UnixMillis};
use serde_json::{Value, json};
use tokio::{net::UnixListener, sync::oneshot};

/// A controller in this process.
struct Running {
    address: Address,
    stop: Option<oneshot::Sender<()>>,
    served: tokio::task::JoinHandle<()>,
}

impl Running {
    async fn start(directory: &Path) -> Self {
        let address = Address(directory.join("controller.sock"));
        let (stop, stopped) = oneshot::channel::<()>();
        let (controller, at) = (open(directory), address.clone());
        let served = tokio::spawn(async move {
            serve_at(controller, &at, None, async { drop(stopped.await) }).await.unwrap();
        });
        let running = Self { address, stop: Some(stop), served };
        answers(&running.address).await;
        running
    }

    async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.served.await.unwrap();
    }

    async fn get(&self, path: &str) -> Value {
        call(&self.address, path, None).await.unwrap()
    }

    async fn report(&self, envelope: &Envelope) -> Result<Answer, LinkError> {
        call(&self.address, "/v1/report", Some(serde_json::to_vec(envelope).unwrap())).await
    }
}

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

#[tokio::test]
async fn a_drained_host_is_told_and_emptied_and_may_be_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    let (mut at_a, mut at_b) = (0, 0);
    let mut a = |state: PoolState, instances: Vec<InstanceReport>| {
        at_a += 1;
        envelope(vec![Report { sequence: at_a, pools: vec![whole(state)], ..report("a", 1, instances) }])
    };
    let mut b = |instances: Vec<InstanceReport>| {
        at_b += 1;
        envelope(vec![Report { sequence: at_b, ..report("b", 2, instances) }])
    };
    let drain = async |undo: bool| {
        let wish = serde_json::to_vec(&json!({ "host": "a", "undo": undo })).unwrap();
        call::<Value>(&running.address, "/v1/drain", Some(wish)).await
    };
    assert!(
        matches!(drain(false).await.unwrap_err(), LinkError::Refused { status: 404, .. }),
        "nobody knows it"
    );
    running.report(&b(vec![])).await.unwrap();
    let answer = running.report(&a(PoolState::Ready, vec![instance("x")])).await.unwrap();
    assert!(answer.orders.is_empty() && answer.places);
    assert_eq!(drain(false).await.unwrap()["draining"], true);
    let mut wanted = Vec::new();
    let since = Instant::now();
    while wanted.len() < 2 && since.elapsed() < Duration::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        running.report(&b(vec![])).await.unwrap();
        wanted = running.report(&a(PoolState::Ready, vec![instance("x")])).await.unwrap().orders;
    }
    let actions: Vec<Action> = wanted.iter().map(|order| order.action.clone()).collect();
    let address = ([10, 0, 0, 2], 7791).into();
    let tell = |undo| Action::Drain { pool: THIS_HOST.to_owned(), undo };
    assert_eq!(actions, [tell(false), Action::Migrate { instance: name("x"), to: host("b"), address }]);
    assert_eq!(running.get("/v1/orders").await["waiting"].as_array().unwrap().len(), 2);
    // The host has done as it was told, and the instance is elsewhere.
    let outcome = |order: &Order| rswap_fleet::OrderOutcome { token: order.token, result: OrderResult::Done };
    let mut done = a(PoolState::Draining, vec![]);
    done.reports[0].outcomes = wanted.iter().map(outcome).collect();
    assert_eq!(running.report(&done).await.unwrap().orders, []);
    running.report(&b(vec![instance("x")])).await.unwrap();
    let instances = running.get("/v1/instances").await;
    assert_eq!((&instances[0]["host"], instances.as_array().unwrap().len()), (&json!("b"), 1));
    let rows = running.get("/v1/history?instance=x&tier=2").await;
    assert_eq!(rows.as_array().unwrap().len(), 2, "of both hosts: {rows}");
    drain(true).await.unwrap();
    let orders = running.report(&a(PoolState::Draining, vec![])).await.unwrap().orders;
    assert_eq!(orders.iter().map(|order| order.action.clone()).collect::<Vec<_>>(), [tell(true)]);
    let mut done = a(PoolState::Ready, vec![]);
    done.reports[0].outcomes = orders.iter().map(outcome).collect();
    assert_eq!(running.report(&done).await.unwrap().orders, []);
    // Whom a person at the host drains later is left alone.
    assert_eq!(running.report(&a(PoolState::Draining, vec![])).await.unwrap().orders, []);
    drain(false).await.unwrap();
    running.stop().await;
    let running = Running::start(directory.path()).await;
    let hosts = running.get("/v1/hosts").await;
    let drained =
        hosts.as_array().unwrap().iter().map(|host| (host["host"].clone(), host["drained"].clone()));
    assert_eq!(drained.collect::<Vec<_>>(), [(json!("a"), json!(true)), (json!("b"), json!(false))]);
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
async fn a_roll_goes_on_with_the_next_controller_and_tells_hosts_what_it_wants() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    let mut sequence = 0;
    let mut a = |state: PoolState, boot: &str, instances: Vec<InstanceReport>| {
        sequence += 1;
        let is = Some(rswap_fleet::Running { version: "1".to_owned(), boot: boot.to_owned() });
        let report = Report { sequence, running: is, pools: vec![whole(state)], ..report("a", 1, instances) };
        envelope(vec![report])
    };
    let drains = |answer: Answer| {
        let undo = |order: Order| match order.action {
            Action::Drain { undo, .. } => Some(undo),
            Action::Migrate { .. } => None,
        };
        answer.orders.into_iter().filter_map(undo).collect::<Vec<_>>()
    };
    let post = async |running: &Running, path: &str, body: Value| {
        call::<Value>(&running.address, path, Some(serde_json::to_vec(&body).unwrap())).await
    };
    let stage = async |running: &Running, wanted: &str| {
        let since = Instant::now();
        while running.get("/v1/roll").await["hosts"][0]["stage"] != wanted {
            assert!(since.elapsed() < Duration::from_secs(20), "{}", running.get("/v1/roll").await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    running.report(&a(PoolState::Ready, "x", vec![instance("i")])).await.unwrap();
    let unknown = post(&running, "/v1/roll", json!({ "hosts": ["z"] })).await.unwrap_err();
    assert!(matches!(unknown, LinkError::Refused { status: 409, .. }), "{unknown}");
    post(&running, "/v1/roll", json!({ "hosts": ["a"] })).await.unwrap();
    assert_eq!(
        drains(running.report(&a(PoolState::Ready, "x", vec![instance("i")])).await.unwrap()),
        [false]
    );
    running.stop().await;
    let running = Running::start(directory.path()).await;
    assert_eq!(
        drains(running.report(&a(PoolState::Ready, "x", vec![instance("i")])).await.unwrap()),
        [false]
    );
    running.report(&a(PoolState::Draining, "x", vec![])).await.unwrap();
    stage(&running, "empty").await;
    running.stop().await;
    let running = Running::start(directory.path()).await;
    running.report(&a(PoolState::Draining, "x", vec![])).await.unwrap();
    running.report(&a(PoolState::Draining, "y", vec![])).await.unwrap();
    stage(&running, "back").await;
    assert_eq!(drains(running.report(&a(PoolState::Draining, "y", vec![])).await.unwrap()), [true]);
    stage(&running, "back").await;
    running.report(&a(PoolState::Ready, "y", vec![])).await.unwrap();
    stage(&running, "done").await;
    assert_eq!(running.get("/v1/hosts").await[0]["drained"], false);
    running.stop().await;
}
