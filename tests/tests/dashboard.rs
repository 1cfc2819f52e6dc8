//! The page that an agent serves, in a real browser: every view shows what the agent answers, on a desktop and on a phone, in both colour
//! schemes, by the keyboard, and without a serious violation of accessibility. What is looked for is in `rswap-dashboard/check`.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, ensure};
use rswap_tests::{
    Fleet, Host, HostOptions,
    browser::{look, ready},
    controller::Controller,
    wait_for,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(40);
/// One core, kept busy.
const BUSY: &[&str] = &["sh", "-c", "while :; do :; done"];
/// Of the migration that is looked at: its memory takes some seconds then, and so do the rounds after the first, since what is written meanwhile is
/// more than half of what goes through.
const SLOW_UPLINK: &[&str] =
    &["qdisc", "add", "dev", "up0", "root", "tbf", "rate", "160mbit", "burst", "1mb", "latency", "50ms"];

/// "busy" needs a core: "slow" gives half of one, so a plan moves it. The other host is there, but too dear to be moved to.
const POOLS: &str = "[forecast]\nhorizons_ms = [1000, 3000]\nmin_seen = 8\n\n\
                     [plan]\nhorizon_ms = 3000\ncool_down_ms = 500\n\n\
                     [[pool]]\nname = \"slow\"\ncpus = \"1\"\ncapacity_cores = 0.5\ncost_per_core_hour = 0.01\n\n\
                     [[pool]]\nname = \"fast\"\ncpus = \"0-1\"\n\n\
                     [[pool]]\nname = \"b\"\nhost = \"10.88.0.2:7791\"\ncores = 4\nmemory_gib = 8\ncost_per_core_hour = 90.0\n";

fn program(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name).to_string_lossy().into_owned()
}

/// A move by a plan, one that fails, and forecasts that are believed: something to see in every view.
fn prepare(fleet: &Fleet, a: &Host) -> anyhow::Result<()> {
    let directory = fleet.scratch().to_string_lossy().into_owned();
    let log = fleet.scratch().join("hold.log");
    // The browser takes cores, too: a plan would look for others.
    let stays = ["--label", "rswap.pin=this-host"];
    let shop = [&["--label", "app=shop"][..], &stays].concat();
    a.run("shop", &shop, &["python3", &program("day.py"), &directory, "6"])?;
    a.run("busy", &[&["--pool", "slow"][..], &stays].concat(), BUSY)?;
    a.run("hold", &[], &["python3", &program("hold.py"), &log.to_string_lossy(), "192", "3000"])?;
    wait_for("the memory to be filled", LIMIT, || {
        Ok(fs::metadata(&log).is_ok_and(|log| log.len() > 0).then_some(()))
    })?;
    let failed = a.migrate("hold", "10.88.0.1:1")?.end()?;
    ensure!(failed.is_err(), "nobody listens there: {failed:?}");
    wait_for("a plan's move, and forecasts", LIMIT, || {
        let moves: Vec<Value> = a.get("/v1/moves")?;
        let by_plan = moves.iter().any(|seen| seen["asked_by"] == "plan" && seen["state"] == "done");
        let answer: Value = a.get("/v1/windows?instance=shop")?;
        let windows = answer["windows"].as_array().cloned().unwrap_or_default();
        let forecast = windows.iter().filter(|window| !window["forecast"]["memory"].is_null()).count();
        Ok((by_plan && forecast > 5).then_some(()))
    })
}

#[test]
fn every_view_shows_what_the_agent_knows() -> anyhow::Result<()> {
    let Some(chromium) = ready("every_view_shows_what_the_agent_knows") else { return Ok(()) };
    let mut fleet = Fleet::new()?;
    let options = HostOptions {
        mode: "act",
        window_ms: 500,
        max_unavailability_ms: 20,
        more: POOLS.to_owned(),
        ..HostOptions::default()
    };
    let mut a = fleet.host("a", &options)?;
    let mut b = fleet.host("b", &HostOptions::default())?;
    prepare(&fleet, &a)?;

    let mut migration = None;
    let node = a.command(Path::new("node"));
    look(node, "check.mjs", &["http://127.0.0.1:7790/", &chromium, "shop", "hold"], |said| {
        if said == "MIGRATE" {
            let slow = a.netns().command(Path::new("tc")).args(SLOW_UPLINK).status()?;
            ensure!(slow.success(), "the uplink could not be slowed down");
            migration = Some(a.migrate("hold", &b.migrate_address())?);
        }
        Ok(())
    })?;
    migration.context("no migration was looked at")?.succeed()?;
    (a.show_log, b.show_log) = (false, false);
    Ok(())
}

#[test]
fn a_fleet_is_shown_as_its_controller_knows_it() -> anyhow::Result<()> {
    let Some(chromium) = ready("a_fleet_is_shown_as_its_controller_knows_it") else { return Ok(()) };
    let mut fleet = Fleet::new()?;
    let keys = "mode = \"act\"\nreport_every_ms = 500\nplan_every_ms = 1000\n";
    let controller = Controller::start(&fleet.scratch().join("controller"), keys)?;
    let spools = ["a", "b"].map(|name| fleet.scratch().join(format!("spool-{name}")));
    let options = |spool: &Path| HostOptions {
        mode: "act",
        more: controller.member(spool, 500),
        ..HostOptions::default()
    };
    let mut a = fleet.host("a", &options(&spools[0]))?;
    let mut b = fleet.host("b", &options(&spools[1]))?;
    a.run("busy", &["--label", "app=busy"], BUSY)?;
    wait_for("both hosts, and the instance, at the controller", LIMIT, || {
        let (hosts, instances): (Vec<Value>, Vec<Value>) =
            (controller.get("/v1/hosts")?, controller.get("/v1/instances")?);
        let reported = hosts.iter().filter(|host| !host["whole"].is_null()).count();
        Ok((reported == 2 && instances.len() == 1).then_some(()))
    })?;
    let socket = controller.address().0.to_string_lossy().into_owned();
    look(Command::new("node"), "fleet.mjs", &[&socket, &chromium, "busy"], |said| {
        if said == "DRAIN" {
            controller.post::<Value>("/v1/drain", &json!({ "host": "b" }))?;
        }
        Ok(())
    })?;
    (a.show_log, b.show_log) = (false, false);
    Ok(())
}
