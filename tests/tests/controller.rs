//! A controller and real agents: an instance starts from what another host's taught, no report is lost while the controller is away, and a
//! host that is to be empty is emptied.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, ensure};
use rswap_agent::{
    forecast::{DemandPoint, Evidence, Resource},
    pool::{Pool, PoolState, THIS_HOST},
    status::InstanceView,
};
use rswap_tests::{
    Fleet, Host, HostOptions, api::Api, controller::Controller, moves, reason_to_skip, wait_for,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const REPORT_EVERY_MS: u64 = 500;
const IDLE: &[&str] = &["sh", "-c", "while :; do sleep 0.1; done"];

/// Waits for so many seconds, then holds 96 MiB and is busy half of the time.
const SERVES: &str = "import sys, time
time.sleep(float(sys.argv[1]))
held = b'x' * (96 << 20)
while True:
    until = time.monotonic() + 0.05
    while time.monotonic() < until: pass
    time.sleep(0.05)
";

fn points(host: &Host, name: &str, resource: Resource) -> anyhow::Result<Vec<DemandPoint>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    let demand =
        views.into_iter().find(|view| view.instance.name.as_str() == name).and_then(|view| view.demand);
    Ok(demand.into_iter().flat_map(|d| d.points).filter(|point| point.resource == resource).collect())
}

/// Reports that were given a number, and of them those that wait.
fn made(spool: &Path) -> anyhow::Result<(u64, u64)> {
    let head: Value = serde_json::from_slice(&fs::read(spool.join("head"))?)?;
    let mut waiting = 0;
    for entry in fs::read_dir(spool)? {
        waiting += u64::from(entry?.file_name().to_string_lossy().ends_with(".report"));
    }
    Ok((head["next"].as_u64().unwrap_or(1) - 1, waiting))
}

#[test]
fn a_newcomer_starts_from_what_another_host_taught_and_no_report_is_lost() -> anyhow::Result<()> {
    if reason_to_skip("a_newcomer_starts_from_what_another_host_taught_and_no_report_is_lost").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let keys = format!("report_every_ms = {REPORT_EVERY_MS}\nplan_every_ms = 1000\n");
    let mut controller = Controller::start(&fleet.scratch().join("controller"), &keys)?;
    let spools = ["a", "b"].map(|name| fleet.scratch().join(format!("spool-{name}")));
    let options = |spool: &Path| HostOptions {
        window_ms: 400,
        more: format!(
            "[forecast]\nhorizons_ms = [1000, 2000]\nmin_seen = 20\n\n{}",
            controller.member(spool, REPORT_EVERY_MS)
        ),
        ..HostOptions::default()
    };
    let (a, b) = (fleet.host("a", &options(&spools[0]))?, fleet.host("b", &options(&spools[1]))?);
    let shop: &[&str] = &["--label", "app=shop"];
    // What an instance uses first is to be its own, and not what stands for Python on the PATH.
    let python = moves::python()?;
    let python = python.to_str().context("a path that is no text")?;
    for busy in ["busy-1", "busy-2"] {
        a.run(busy, shop, &[python, "-c", SERVES, "0"])?;
    }
    b.run("other", &["--label", "app=other"], IDLE)?;
    // A series teaches others after 48 windows.
    wait_for("what host a's instances taught to be known at host b", LIMIT, || {
        let learnt = fs::read_to_string(spools[1].join("learnt")).unwrap_or_default();
        Ok(learnt.contains("app=shop").then_some(()))
    })?;
    // Else all that is known of strangers is what these two taught.
    wait_for("what host b's instance taught to be known at the controller", LIMIT, || {
        let known: Value = controller.get("/v1/model")?;
        Ok(known.to_string().contains("app=other").then_some(()))
    })?;
    let usual = points(&a, "busy-1", Resource::Memory)?.first().map_or(0.0, |point| point.need.p50);
    assert!(usual > f64::from(96 << 20), "{usual}");

    // The controller is gone: agents go on alone, with what they know.
    controller.kill()?;
    let before = made(&spools[1])?.0;
    b.run("new", shop, &[python, "-c", SERVES, "6"])?;
    b.run("stranger", &["--label", "app=none"], &[python, "-c", SERVES, "600"])?;
    let first = |name: &str| {
        wait_for(&format!("the first forecast of {name}"), LIMIT, || {
            Ok(Some(points(&b, name, Resource::Memory)?).filter(|points| !points.is_empty()))
        })
    };
    let (new, stranger) = (first("new")?, first("stranger")?);
    for point in &new {
        assert!(matches!(point.evidence, Evidence::TooLittle { .. }), "no plan rests on it: {point:?}");
        assert!(
            point.need.p99 > 0.7 * usual && point.need.p99 < 2.0 * usual,
            "{point:?}: its like use {usual}"
        );
    }
    assert!(stranger.iter().all(|point| point.need.p99 < usual / 2.0), "{stranger:?}");
    wait_for("some reports to wait", LIMIT, || Ok((made(&spools[1])?.0 >= before + 5).then_some(())))?;
    assert!(made(&spools[1])?.1 >= 4, "they are kept");

    controller.restart()?;
    for (host, spool) in ["a", "b"].into_iter().zip(&spools) {
        wait_for(&format!("every report of host {host}, once"), LIMIT, || {
            let before = made(spool)?;
            let hosts: Vec<Value> = controller.get("/v1/hosts")?;
            let of = hosts
                .iter()
                .find(|of| of["host"] == host)
                .map(|of| of["reports"].clone())
                .unwrap_or_default();
            assert_eq!(of["skipped"], 0, "{of}");
            // Nothing was made while we looked.
            let whole = made(spool)? == before && of["taken"] == json!(before.0 - before.1);
            Ok((whole && before.1 == 0 && before.0 > 8).then_some(()))
        })?;
    }
    // Each window counts once, in every tier.
    let windows = |tier: usize| -> anyhow::Result<u64> {
        let rows: Vec<Value> = controller.get(&format!("/v1/history?instance=busy-1&tier={tier}"))?;
        Ok(rows.iter().filter_map(|row| row["used"]["cpu"]["windows"].as_u64()).sum())
    };
    wait_for("the same count of windows in every tier", LIMIT, || {
        let (reports, minutes, hours, again) = (windows(0)?, windows(1)?, windows(2)?, windows(0)?);
        Ok((reports == again && reports == minutes && minutes == hours && reports > 48).then_some(()))
    })?;
    Ok(())
}

#[test]
fn a_host_that_the_controller_drains_is_emptied() -> anyhow::Result<()> {
    if reason_to_skip("a_host_that_the_controller_drains_is_emptied").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let plan = "[plan]\nhorizon_ms = 2000\ncool_down_ms = 500\nhysteresis = 1.0\n";
    let keys = format!("mode = \"act\"\nreport_every_ms = {REPORT_EVERY_MS}\nplan_every_ms = 500\n\n{plan}");
    let controller = Controller::start(&fleet.scratch().join("controller"), &keys)?;
    let forecast = "[forecast]\nhorizons_ms = [400, 1200]\nmin_seen = 10\n\n";
    let options = |spool: &Path| HostOptions {
        mode: "act",
        window_ms: 200,
        max_unavailability_ms: 10_000,
        more: format!("{forecast}{plan}\n{}", controller.member(spool, REPORT_EVERY_MS)),
        ..HostOptions::default()
    };
    let spools = ["a", "b"].map(|name| fleet.scratch().join(format!("spool-{name}")));
    let (a, b) = (fleet.host("a", &options(&spools[0]))?, fleet.host("b", &options(&spools[1]))?);
    for name in ["one", "two"] {
        a.run(name, &[], IDLE)?;
    }
    let where_is = |name: &str| -> anyhow::Result<Option<String>> {
        let all: Vec<Value> = controller.get("/v1/instances")?;
        let found = all.iter().find(|one| one["instance"] == name);
        Ok(found.and_then(|one| one["host"].as_str()).map(str::to_owned))
    };
    for name in ["one", "two"] {
        wait_for("the controller to know it", LIMIT, || Ok(where_is(name)?.filter(|host| host == "a")))?;
    }
    wait_for("both hosts", LIMIT, || {
        let hosts: Vec<Value> = controller.get("/v1/hosts")?;
        Ok((hosts.len() == 2).then_some(()))
    })?;
    controller.post::<Value>("/v1/drain", &json!({ "host": "a" }))?;
    for name in ["one", "two"] {
        wait_for(&format!("{name} to be on host b"), LIMIT, || {
            Ok(where_is(name)?.filter(|host| host == "b"))
        })?;
        assert!(b.has_instance(name)? && !a.has_instance(name)?);
    }
    let state = |wanted: PoolState| {
        wait_for("the host's own state", LIMIT, || {
            let pools: Vec<Pool> = a.get("/v1/pools")?;
            Ok(pools.iter().any(|pool| pool.name == THIS_HOST && pool.state == wanted).then_some(()))
        })
    };
    state(PoolState::Draining)?;
    let ended = wait_for("the outcomes of all orders", LIMIT, || {
        let orders: Value = controller.get("/v1/orders")?;
        let ended = orders["ended"].as_array().cloned().unwrap_or_default();
        Ok((orders["waiting"] == json!([]) && ended.len() >= 3).then_some(ended))
    })?;
    assert!(ended.iter().all(|one| one["outcome"]["result"] == "done"), "{ended:?}");
    controller.post::<Value>("/v1/drain", &json!({ "host": "a", "undo": true }))?;
    state(PoolState::Ready)
}

#[test]
fn what_every_route_of_a_controller_answers_is_as_the_document_says() -> anyhow::Result<()> {
    if reason_to_skip("what_every_route_of_a_controller_answers_is_as_the_document_says").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let keys = format!("mode = \"act\"\nreport_every_ms = {REPORT_EVERY_MS}\nplan_every_ms = 500\n");
    let controller = Controller::start(&fleet.scratch().join("controller"), &keys)?;
    let options = HostOptions {
        mode: "act",
        window_ms: 200,
        more: format!(
            "[forecast]\nhorizons_ms = [1000, 2000]\nmin_seen = 20\n\n{}",
            controller.member(&fleet.scratch().join("spool-a"), REPORT_EVERY_MS)
        ),
        ..HostOptions::default()
    };
    let a = fleet.host("a", &options)?;
    a.run("busy", &["--label", "app=shop"], &["python3", "-c", SERVES, "0"])?;
    let (api, socket) = (Api::controller(), controller.address().0);
    wait_for("something of each kind to be known", LIMIT, || {
        let known =
            |path: &str| -> anyhow::Result<bool> { Ok(!controller.get::<Vec<Value>>(path)?.is_empty()) };
        let plan: Value = controller.get("/v1/plan")?;
        let planned = plan["decisions"].as_array().is_some_and(|all| !all.is_empty());
        let known = known("/v1/hosts")? && known("/v1/instances")? && known("/v1/model")? && planned;
        Ok(known.then_some(()))
    })?;
    let json = "content-type: application/json\r\n";
    let long = "x".repeat(5 << 10);
    for (method, path, headers, body, status) in [
        ("post", "/v1/drain", json, r#"{"host":"a"}"#, 200),
        ("post", "/v1/drain", json, r#"{"host":"gone"}"#, 404),
        ("post", "/v1/drain", json, "no JSON", 400),
        ("post", "/v1/drain", "", r#"{"host":"a"}"#, 415),
        ("post", "/v1/drain", json, long.as_str(), 413),
        ("post", "/v1/roll", json, r#"{"hosts":["a"]}"#, 409),
        ("post", "/v1/roll/end", json, "", 409),
        ("post", "/v1/report", json, "{}", 422),
        ("get", "/v1/roll", "", "", 200),
        ("get", "/v1/history?instance=gone", "", "", 404),
        ("get", "/v1/history", "", "", 400),
        ("get", "/v1/status", "host: evil.example\r\n", "", 403),
    ] {
        let answer = api.call(&socket, method, path, headers, body)?;
        ensure!(answer.status == status, "{method} {path} {headers:?} {body}: {answer:?}");
    }
    // It is told to its agent, and has an outcome.
    wait_for("the order to be followed", LIMIT, || {
        let orders: Value = controller.get("/v1/orders")?;
        Ok(orders["ended"].as_array().is_some_and(|ended| !ended.is_empty()).then_some(()))
    })?;
    let undo = api.call(&socket, "post", "/v1/drain", json, r#"{"host":"a","undo":true}"#)?;
    ensure!(undo.status == 200, "{undo:?}");
    let begun = wait_for("a roll to begin", LIMIT, || {
        let answer = api.call(&socket, "post", "/v1/roll", json, r#"{"hosts":["a"]}"#)?;
        Ok((answer.status == 200).then_some(answer))
    })?;
    ensure!(begun.json()?["hosts"][0]["host"] == "a", "{begun:?}");
    let decided = r#"{"host":"a","decision":"retry"}"#;
    let decided = api.call(&socket, "post", "/v1/roll/decide", json, decided)?;
    ensure!([200, 409].contains(&decided.status), "{decided:?}");

    let mut asked = 0;
    for path in api.paths("get") {
        let query = if path == "/v1/history" { "?instance=busy" } else { "" };
        let answer = api.call(&socket, "get", &format!("{path}{query}"), "", "")?;
        // The page is not in every build.
        ensure!(answer.status == 200 || !path.starts_with("/v1"), "{path}: {answer:?}");
        asked += 1;
    }
    ensure!(asked >= 10, "{asked} routes");
    let shown = api.call(&socket, "get", "/v1/openapi.json", "", "")?.json()?;
    ensure!(shown == *api.document(), "another document is served");
    let end = api.call(&socket, "post", "/v1/roll/end", json, "")?;
    ensure!(end.status == 200 && end.json()?.is_null(), "{end:?}");
    Ok(())
}
