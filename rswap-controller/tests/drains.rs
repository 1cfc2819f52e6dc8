//! What people want of hosts: to leave them, one after the other, and to forget them.

#![allow(clippy::unwrap_used, reason = "a test that can't go on is to fail")]

mod common;

use std::time::{Duration, Instant};

use common::{Running, envelope, host, instance, name, report, settings, whole};
use rswap_controller::{
    Settings,
    link::{LinkError, call},
};
use rswap_fleet::{
    Action, InstanceReport, Order, Report,
    orders::OrderResult,
    report::{Answer, Envelope},
};
use rswap_types::{PoolState, THIS_HOST};
use serde_json::{Value, json};

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

#[tokio::test]
async fn a_drain_that_waits_does_not_outlive_its_undo() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    let mut sequence = 0;
    let mut a = |state: PoolState| {
        sequence += 1;
        envelope(vec![Report { sequence, pools: vec![whole(state)], ..report("a", 1, vec![]) }])
    };
    let drain = async |undo: bool| {
        let wish = serde_json::to_vec(&json!({ "host": "a", "undo": undo })).unwrap();
        call::<Value>(&running.address, "/v1/drain", Some(wish)).await.unwrap();
    };
    let tells = |answer: &Answer| {
        let undo = |order: &Order| matches!(order.action, Action::Drain { undo: true, .. });
        answer.orders.iter().map(undo).collect::<Vec<_>>()
    };
    let done = |answer: &Answer, mut envelope: Envelope| {
        let outcome =
            |order: &Order| rswap_fleet::OrderOutcome { token: order.token, result: OrderResult::Done };
        envelope.reports[0].outcomes = answer.orders.iter().map(outcome).collect();
        envelope
    };
    running.report(&a(PoolState::Ready)).await.unwrap();
    drain(false).await;
    let stale = running.report(&a(PoolState::Ready)).await.unwrap();
    assert_eq!(tells(&stale), [false]);
    // The answer with the order is on its way, or lost, when it is undone.
    drain(true).await;
    let waiting = running.get("/v1/orders").await["waiting"].clone();
    assert_eq!(
        (waiting.as_array().unwrap().len(), &waiting[0]["action"]["undo"]),
        (1, &json!(true)),
        "{waiting}"
    );
    let undo = running.report(&a(PoolState::Ready)).await.unwrap();
    assert_eq!(tells(&undo), [true]);
    assert!(undo.orders[0].token > stale.orders[0].token, "an agent that has both follows this one");
    // It was carried out after all, and is undone.
    let still = running.report(&done(&stale, a(PoolState::Draining))).await.unwrap();
    assert_eq!(tells(&still), [true]);
    let over = running.report(&done(&undo, a(PoolState::Ready))).await.unwrap();
    assert!(over.orders.is_empty());
    assert!(running.report(&a(PoolState::Ready)).await.unwrap().orders.is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_host_that_waits_in_a_roll_is_the_rolls() {
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path()).await;
    for (number, of) in [(1, "a"), (2, "b")] {
        running.report(&envelope(vec![report(of, number, vec![instance(of)])])).await.unwrap();
    }
    let post = async |path: &str, body: Value| {
        call::<Value>(&running.address, path, Some(serde_json::to_vec(&body).unwrap())).await
    };
    post("/v1/roll", json!({ "hosts": ["a", "b"] })).await.unwrap();
    for undo in [false, true] {
        let error = post("/v1/drain", json!({ "host": "b", "undo": undo })).await.unwrap_err().to_string();
        assert!(error.contains("409") && error.contains("and waiting: leave it out"), "{error}");
    }
    assert_eq!(running.get("/v1/hosts").await[1]["drained"], false);
    post("/v1/roll/decide", json!({ "host": "b", "decision": "skip" })).await.unwrap();
    post("/v1/drain", json!({ "host": "b" })).await.unwrap();
    assert_eq!(running.get("/v1/hosts").await[1]["drained"], true);
    running.stop().await;
}

#[tokio::test]
async fn a_host_that_has_left_is_forgotten_and_may_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings { interval_ms: 1000, ..settings() };
    let running = Running::start_with(directory.path(), settings.clone()).await;
    let forget = async |running: &Running, host: &str, lost: bool| {
        let wish = serde_json::to_vec(&json!({ "host": host, "lost": lost })).unwrap();
        call::<Value>(&running.address, "/v1/forget", Some(wish)).await
    };
    let refused = async |running: &Running, host: &str| match forget(running, host, false).await.unwrap_err()
    {
        LinkError::Refused { status, error, .. } => (status, error),
        other => panic!("{other}"),
    };
    let b = |sequence| envelope(vec![Report { sequence, ..report("b", 2, vec![]) }]);
    running.report(&envelope(vec![report("a", 1, vec![instance("x")])])).await.unwrap();
    running.report(&b(1)).await.unwrap();

    assert_eq!(refused(&running, "z").await.0, 404);
    let (status, why) = refused(&running, "a").await;
    assert!(status == 409 && why.contains("host a reports"), "{why}");
    let away = async |running: &Running| {
        let since = Instant::now();
        while !running.get("/v1/hosts").await.as_array().unwrap().iter().all(|host| host["away"] == true) {
            assert!(since.elapsed() < Duration::from_secs(20), "they are not away");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    away(&running).await;
    // It may only be cut off.
    let (status, why) = refused(&running, "a").await;
    assert!(status == 409 && why.contains("had x when it last reported"), "{why}");
    // Also one that the next controller has not heard of.
    running.stop().await;
    let running = Running::start_with(directory.path(), settings.clone()).await;
    away(&running).await;
    let (status, why) = refused(&running, "a").await;
    assert!(status == 409 && why.contains("had x when it last reported"), "{why}");
    assert_eq!(forget(&running, "b", false).await.unwrap()["instances"], json!([]));
    assert_eq!(forget(&running, "a", true).await.unwrap()["instances"], json!(["x"]));
    assert_eq!(refused(&running, "a").await.0, 404);
    assert_eq!((running.get("/v1/hosts").await, running.get("/v1/instances").await), (json!([]), json!([])));

    running.stop().await;
    let running = Running::start_with(directory.path(), settings).await;
    assert_eq!(running.get("/v1/hosts").await, json!([]));
    // Its reports of before are known, and later ones make it a member.
    running.report(&b(2)).await.unwrap();
    let hosts = running.get("/v1/hosts").await;
    assert_eq!(
        (hosts.as_array().unwrap().len(), &hosts[0]["host"], &hosts[0]["away"]),
        (1, &json!("b"), &json!(false))
    );
    running.stop().await;
}
