//! Rolling maintenance by `rswap fleet`, as an operator over the network: host after host is emptied, worked on and used again, also when
//! the controller is started anew in between; what does not get on stops it. What was wanted and ordered is in the audit logs.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use rswap_tests::{Fleet, Host, HostOptions, controller::Controller, reason_to_skip, wait_for};
use rswap_trust::Files;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const REPORT_EVERY_MS: u64 = 400;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const IDLE: &[&str] = &["sh", "-c", "while :; do sleep 0.1; done"];

struct Scene {
    // Dropped in this order: all live in the fleet's network.
    hosts: [Host; 2],
    controller: Controller,
    /// What the kernels of the hosts are said to be.
    boots: [PathBuf; 2],
    /// Where the operator's certificate is.
    identity: PathBuf,
    fleet: Fleet,
}

impl Scene {
    fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let plan = "[plan]\nhorizon_ms = 2000\ncool_down_ms = 500\nhysteresis = 1.0\n";
        let keys = format!("mode = \"act\"\nreport_every_ms = {REPORT_EVERY_MS}\nplan_every_ms = 400\n");
        let files = fleet.issue("controller", &["--role", "controller"])?;
        let controller = Controller::start_at(&fleet, &keys, &files, "", plan)?;
        let Files { certificate, .. } = fleet.issue("somebody", &["--role", "operator"])?;
        let identity = certificate.parent().context("no directory")?.to_owned();
        let scratch = fleet.scratch().to_owned();
        let boots = ["a", "b"].map(|name| scratch.join(format!("boot-{name}")));
        let mut host = |name: &str, boot: &PathBuf| -> anyhow::Result<Host> {
            fs::write(boot, format!("{name}-1\n"))?;
            let member = Controller::far_member(&scratch.join(format!("spool-{name}")), REPORT_EVERY_MS);
            let options = HostOptions {
                mode: "act",
                window_ms: 200,
                max_unavailability_ms: 10_000,
                more: format!("[forecast]\nhorizons_ms = [400, 1200]\nmin_seen = 10\n\n{plan}\n{member}"),
                mounts: vec![(boot.clone(), BOOT_ID.into())],
                ..HostOptions::default()
            };
            fleet.host(name, &options)
        };
        let hosts = [host("a", &boots[0])?, host("b", &boots[1])?];
        let scene = Self { hosts, controller, boots, identity, fleet };
        scene.hosts[0].run("one", &[], IDLE)?;
        scene.hosts[1].run("two", &[], IDLE)?;
        wait_for("both hosts and both instances", LIMIT, || {
            Ok((scene.controller.host_of("one")?.as_deref() == Some("a")
                && scene.controller.host_of("two")?.as_deref() == Some("b"))
            .then_some(()))
        })?;
        Ok(scene)
    }

    /// `rswap fleet`, by the operator, at host a.
    fn fleet(&self, words: &[&str]) -> anyhow::Result<String> {
        Controller::answer_to(&self.hosts[0], &self.identity, words)
    }

    /// Waits until the hosts of the roll are at these stages; each look is at the roll as a whole.
    fn stages(&self, wanted: &[(&str, &str)]) -> anyhow::Result<Value> {
        wait_for(&format!("the roll to be at {wanted:?}"), LIMIT, || {
            let roll: Value = self.controller.get("/v1/roll")?;
            let is = |(host, stage): &(&str, &str)| {
                let hosts = roll["hosts"].as_array().map_or(&[] as &[Value], Vec::as_slice);
                hosts.iter().any(|one| one["host"] == *host && one["stage"] == *stage)
            };
            Ok(wanted.iter().all(is).then_some(roll))
        })
    }

    fn is_ready(&self, name: &str) -> anyhow::Result<bool> {
        let hosts: Vec<Value> = self.controller.get("/v1/hosts")?;
        let of = hosts.iter().find(|host| host["host"] == name).context("it is no member")?;
        Ok(of["whole"]["state"]["state"] == "ready" && of["drained"] == false)
    }
}

fn lines(path: &std::path::Path) -> anyhow::Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// Whether a call of this name began, and came to this.
fn has(log: &[Value], call: &str, outcome: &str, peer: &str) -> bool {
    let is = |line: &&Value, outcome: &str| {
        line["call"] == call
            && line["outcome"] == outcome
            && line["peer"].as_str().is_some_and(|by| by.contains(peer))
    };
    let begun = |end: &Value| log.iter().any(|line| is(&line, "begun") && line["id"] == end["id"]);
    log.iter().filter(|line| is(line, outcome)).any(|end| outcome == "refused" || begun(end))
}

#[test]
fn host_after_host_is_emptied_worked_on_and_used_again() -> anyhow::Result<()> {
    if reason_to_skip("host_after_host_is_emptied_worked_on_and_used_again").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    // Nobody else may.
    let Files { certificate, .. } = scene.hosts[0].files().clone();
    let agent = certificate.parent().context("no directory")?;
    let told = Controller::answer_to(&scene.hosts[0], agent, &["status"]);
    let error = told.err().context("an agent may")?;
    ensure!(format!("{error:#}").contains("it is not for an operator"), "{error:#}");

    // One that can't be left, since there is no other.
    scene.fleet(&["drain", "b"])?;
    let error = scene.fleet(&["roll", "a", "b"]).err().context("b is drained already")?;
    ensure!(format!("{error:#}").contains("host b is drained already"), "{error:#}");
    wait_for("two to be on host a", LIMIT, || {
        Ok((scene.controller.host_of("two")?.as_deref() == Some("a")).then_some(()))
    })?;
    scene.fleet(&["roll", "a", "--limit", "3"])?;
    let stuck = scene.stages(&[("a", "stuck")])?;
    ensure!(
        stuck["hosts"][0]["reason"].as_str().is_some_and(|why| why.contains("2 instances have not left it")),
        "{stuck}"
    );
    for (words, why) in [
        (&["roll", "b"] as &[&str], "a roll is under way"),
        (&["drain", "a", "--undo"], "host a is in the roll"),
        (&["roll", "a", "--worked-on"], "host a is stuck"),
    ] {
        let error = scene.fleet(words).err().with_context(|| format!("{words:?} was followed"))?;
        ensure!(format!("{error:#}").contains(why), "{error:#}");
    }
    scene.fleet(&["roll", "--end"])?;
    scene.fleet(&["drain", "b", "--undo"])?;
    for host in ["a", "b"] {
        wait_for(&format!("host {host} to be used again"), LIMIT, || {
            Ok(scene.is_ready(host)?.then_some(()))
        })?;
    }

    // Now both. The controller ends, and goes on where it was.
    scene.fleet(&["roll", "a", "b", "--limit", "60"])?;
    scene.controller.kill()?;
    scene.controller.restart()?;
    scene.stages(&[("a", "empty"), ("b", "waiting")])?;
    for name in ["one", "two"] {
        // Host b says so in its next report.
        wait_for(&format!("{name} to be on host b"), LIMIT, || {
            Ok((scene.controller.host_of(name)?.as_deref() == Some("b")).then_some(()))
        })?;
        ensure!(scene.hosts[1].has_instance(name)? && !scene.hosts[0].has_instance(name)?);
    }
    // An agent that is only started anew has not been worked on; one whose host has, says so by that.
    scene.hosts[0].kill_agent()?;
    scene.hosts[0].start_agent()?;
    let heard = |scene: &Scene| -> anyhow::Result<u64> {
        let hosts: Vec<Value> = scene.controller.get("/v1/hosts")?;
        Ok(hosts[0]["reports"]["taken"].as_u64().unwrap_or_default())
    };
    let before = heard(&scene)?;
    wait_for("further reports", LIMIT, || Ok((heard(&scene)? > before + 4).then_some(())))?;
    scene.stages(&[("a", "empty"), ("b", "waiting")])?;
    scene.hosts[0].kill_agent()?;
    fs::write(&scene.boots[0], "a-2\n")?;
    scene.hosts[0].start_agent()?;
    scene.stages(&[("a", "done"), ("b", "empty")])?;
    ensure!(scene.is_ready("a")? && !scene.is_ready("b")?);
    let shown = scene.fleet(&["status"])?;
    for words in ["one", "two", "draining", "this-host", "migrate"] {
        ensure!(shown.contains(words), "{words:?} is not in\n{shown}");
    }
    let all: Value = serde_json::from_str(&scene.fleet(&["status", "--json"])?)?;
    ensure!(all["instances"].as_array().is_some_and(|all| all.iter().all(|one| one["host"] == "a")), "{all}");
    // This time somebody says it.
    scene.fleet(&["roll", "b", "--worked-on"])?;
    let over = scene.stages(&[("a", "done"), ("b", "done")])?;
    ensure!(over["over"] == true && scene.is_ready("b")?, "{over}");

    // Who wanted what, and what was ordered.
    let scratch = scene.fleet.scratch();
    let wishes = lines(&scratch.join("controller/fleet.audit.jsonl"))?;
    for (call, outcome) in
        [("/v1/roll", "done"), ("/v1/roll", "failed"), ("/v1/roll/decide", "done"), ("/v1/drain", "done")]
    {
        ensure!(
            has(&wishes, call, outcome, "spiffe://fleet/operator/somebody"),
            "{call} {outcome}: {wishes:?}"
        );
    }
    for host in ["a", "b"] {
        let orders = lines(&scratch.join(host).join("audit.jsonl"))?;
        for call in ["order drain", "order migrate"] {
            ensure!(
                has(&orders, call, "done", "the controller controller at 10.88.0.100:7792"),
                "{call}: {orders:?}"
            );
        }
    }
    let metrics = scene.controller.text("/metrics")?;
    for line in [
        "rswap_controller_orders_total{action=\"drain\",result=\"done\"}",
        "rswap_controller_host_instances{host=\"a\"} 2",
        "rswap_controller_host_ready{host=\"b\"} 1",
        "rswap_controller_roll_hosts{stage=\"done\"} 2",
        "# EOF",
    ] {
        ensure!(metrics.contains(line), "{line:?} is not in\n{metrics}");
    }
    // What can't be written down is not done.
    let log = scratch.join("controller/fleet.audit.jsonl");
    fs::remove_file(&log)?;
    fs::create_dir(&log)?;
    let error = scene.fleet(&["drain", "a"]).err().context("it was done unseen")?;
    ensure!(format!("{error:#}").contains("the audit log can't be written"), "{error:#}");
    ensure!(scene.is_ready("a")?, "it was done");
    Ok(())
}

#[test]
fn an_order_that_cannot_be_written_down_is_not_carried_out() -> anyhow::Result<()> {
    if reason_to_skip("an_order_that_cannot_be_written_down_is_not_carried_out").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let keys = format!("mode = \"act\"\nreport_every_ms = {REPORT_EVERY_MS}\nplan_every_ms = 400\n");
    let controller = Controller::start(&fleet.scratch().join("controller"), &keys)?;
    let more = controller.member(&fleet.scratch().join("spool"), REPORT_EVERY_MS);
    let host =
        fleet.host("a", &HostOptions { mode: "act", window_ms: 200, more, ..HostOptions::default() })?;
    wait_for("the host", LIMIT, || {
        Ok(Some(controller.get::<Vec<Value>>("/v1/hosts")?).filter(|all| !all.is_empty()))
    })?;
    let log = fleet.scratch().join("a/audit.jsonl");
    fs::remove_file(&log)?;
    fs::create_dir(&log)?;
    controller.post::<Value>("/v1/drain", &json!({ "host": "a" }))?;
    wait_for("the order to be refused", LIMIT, || {
        let orders: Value = controller.get("/v1/orders")?;
        let ended = orders["ended"].as_array().cloned().unwrap_or_default();
        let refused = |one: &Value| {
            let outcome = &one["outcome"];
            outcome["result"] == "refused"
                && outcome["error"].as_str().is_some_and(|error| error.contains("audit log"))
        };
        Ok(ended.iter().any(refused).then_some(()))
    })?;
    let state = |host: &Host| -> anyhow::Result<Value> {
        let pools: Vec<Value> = host.get("/v1/pools")?;
        Ok(pools
            .iter()
            .find(|pool| pool["name"] == "this-host")
            .map(|pool| pool["state"]["state"].clone())
            .unwrap_or_default())
    };
    ensure!(state(&host)? == "ready", "it was carried out: {}", state(&host)?);
    // As soon as it can be written down, it is done.
    fs::remove_dir(&log)?;
    wait_for("the host to be emptied", LIMIT, || Ok((state(&host)? == "draining").then_some(())))?;
    ensure!(has(&lines(&log)?, "order drain", "done", "the controller at unix:"), "{:?}", lines(&log)?);
    Ok(())
}
