//! The demo of a fleet: three hosts and a controller, joined by mutual TLS. A newcomer starts from what its like have taught on another
//! host, the controller is lost and comes back, and a host is emptied while a client counts what its Redis promised.
//!
//! Every number shown is told by the agents and the controller, or measured by the client. It fails if a promise isn't kept.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Parser;
use comfy_table::{Table, presets};
use rswap_agent::{
    forecast::{DemandPoint, Evidence, Resource},
    status::{InstanceView, MigrationState, MigrationView},
    units::UnixMillis,
};
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{ClientReport, DataSet, Manner, REDIS, VerifyingClient},
    controller::Controller,
    stopping::Stop,
    wait_for,
};
use rswap_trust::Files;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 40 << 20;
const REPORT_EVERY_MS: u64 = 500;
/// A migration may keep the client waiting for less than this, in milliseconds.
const PROMISED_MS: f64 = 400.0;
/// How long a newcomer holds nothing, in seconds: what is forecast of it till then, others have taught.
const EMPTY_S: &str = "8";
const HELD_BYTES: u64 = 96 << 20;
const RESULT: &str = "target/rswap/demo-fleet.json";

/// Waits for so many seconds, then holds 96 MiB and is busy a tenth of the time.
const SERVES: &str = "import sys, time
time.sleep(float(sys.argv[1]))
held = b'x' * (96 << 20)
while True:
    until = time.monotonic() + 0.01
    while time.monotonic() < until: pass
    time.sleep(0.09)
";
const IDLE: &[&str] = &["sh", "-c", "while :; do sleep 0.1; done"];
const SHOP: &[&str] = &["--label", "app=shop"];

/// Nothing is worth a move that is not needed: what moves here, moves for the drain.
const PLAN: &str = "[plan]\nhorizon_ms = 2000\ncool_down_ms = 500\nhysteresis = 1.0\n";
const FORECAST: &str = "[forecast]\nhorizons_ms = [1000, 2000]\nmin_seen = 20\n";

/// Three hosts and a controller.
#[derive(Parser)]
struct Arguments {
    /// Go on until Ctrl-C, so that the dashboard can be looked at
    #[arg(long)]
    stay: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut scene = Scene::set(Stop::on_signals()?)?;
    say("who is there: `rswap fleet status`, by an operator with a certificate");
    print!("{}", scene.fleet(&["status"])?);
    let page = forward(scene.controller.address().0)?;
    say(&format!(
        "the controller's dashboard, for as long as this runs: http://{page}/ (whoever reaches this port may drain these hosts)"
    ));

    let prior = a_newcomer_starts_from_its_like(&scene)?;
    let loss = the_controller_is_lost_and_returns(&mut scene)?;
    let drain = a_host_is_emptied(&scene)?;
    say("who is where now: `rswap fleet status`");
    print!("{}", scene.fleet(&["status"])?);

    let result = json!({ "prior": prior, "loss": loss, "drain": drain });
    show(&result);
    fs::create_dir_all("target/rswap").context("cannot make target/rswap")?;
    fs::write(RESULT, serde_json::to_vec_pretty(&result)?)
        .with_context(|| format!("cannot write {RESULT}"))?;
    say(&format!("all of it is in {RESULT}"));
    promises_kept(&result)?;
    if arguments.stay {
        say(&format!("the dashboard is at http://{page}/; Ctrl-C ends the demo"));
        scene.stop.wait();
    }
    Ok(())
}

fn say(what: &str) {
    println!("==> {what}");
}

struct Scene {
    stop: Stop,
    // Dropped in this order: all live in the fleet's network.
    hosts: [Host; 3],
    controller: Controller,
    spools: [PathBuf; 3],
    /// Where the operator's certificate is.
    identity: PathBuf,
    fleet: Fleet,
}

impl Scene {
    fn set(stop: Stop) -> anyhow::Result<Self> {
        say(
            "an authority; certificates for three hosts, a controller and an operator; each host is a network namespace with an agent",
        );
        let mut fleet = Fleet::new()?;
        let keys = format!("mode = \"act\"\nreport_every_ms = {REPORT_EVERY_MS}\nplan_every_ms = 500\n");
        let files = fleet.issue("controller", &["--role", "controller"])?;
        let controller = Controller::start_at(&fleet, &keys, &files, "", PLAN)?;
        let Files { certificate, .. } = fleet.issue("operator", &["--role", "operator"])?;
        let identity = certificate.parent().context("a certificate without a directory")?.to_owned();
        let spools = ["a", "b", "c"].map(|name| fleet.scratch().join(format!("spool-{name}")));
        let mut host = |name: &str, spool: &Path| -> anyhow::Result<Host> {
            let member = Controller::far_member(spool, REPORT_EVERY_MS);
            let more = format!("{FORECAST}\n{PLAN}\n{member}");
            let mut host = fleet
                .host(name, &HostOptions { mode: "act", window_ms: 400, more, ..HostOptions::default() })?;
            host.show_log = false;
            Ok(host)
        };
        let hosts = [host("a", &spools[0])?, host("b", &spools[1])?, host("c", &spools[2])?];
        let scene = Self { stop, hosts, controller, spools, identity, fleet };
        scene.wait("three hosts at the controller", || {
            let hosts: Vec<Value> = scene.controller.get("/v1/hosts")?;
            Ok((hosts.iter().filter(|host| !host["whole"].is_null()).count() == 3).then_some(()))
        })?;
        Ok(scene)
    }

    /// `rswap fleet`, by the operator, at host a.
    fn fleet(&self, words: &[&str]) -> anyhow::Result<String> {
        Controller::answer_to(&self.hosts[0], &self.identity, words)
    }

    /// Waits, as long as the user does.
    fn wait<T>(&self, what: &str, mut look: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
        wait_for(what, LIMIT, || {
            self.stop.check()?;
            look()
        })
    }
}

/// What is forecast of an instance's memory, shortest horizon first.
fn forecast(host: &Host, name: &str) -> anyhow::Result<Option<DemandPoint>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    let demand =
        views.into_iter().find(|view| view.instance.name.as_str() == name).and_then(|view| view.demand);
    Ok(demand.and_then(|demand| demand.points.into_iter().find(|point| point.resource == Resource::Memory)))
}

/// Two of a class teach on host a; one that starts on host c is forecast by them before it has done anything.
fn a_newcomer_starts_from_its_like(scene: &Scene) -> anyhow::Result<Value> {
    let [a, b, c] = &scene.hosts;
    say("host a runs two instances of app=shop, which hold 96 MiB each; host b runs two of app=other");
    for name in ["shop-1", "shop-2"] {
        a.run(name, SHOP, &["python3", "-c", SERVES, "0"])?;
    }
    for name in ["other-1", "other-2"] {
        b.run(name, &["--label", "app=other"], IDLE)?;
    }
    scene.wait("host c to have heard what app=shop needs", || {
        let learnt = fs::read_to_string(scene.spools[2].join("learnt")).unwrap_or_default();
        Ok(learnt.contains("app=shop").then_some(()))
    })?;
    scene.wait("the controller to know what app=other needs", || {
        Ok(scene.controller.get::<Value>("/v1/model")?.to_string().contains("app=other").then_some(()))
    })?;
    say(&format!(
        "host c starts another one of app=shop, and a stranger; neither holds anything for {EMPTY_S} s"
    ));
    c.run("shop-3", SHOP, &["python3", "-c", SERVES, EMPTY_S])?;
    c.run("stranger", &["--label", "app=none"], &["python3", "-c", SERVES, EMPTY_S])?;
    let first = |name: &str| scene.wait(&format!("the first forecast of {name}"), || forecast(c, name));
    let (like, stranger) = (first("shop-3")?, first("stranger")?);
    let seen = |point: &DemandPoint| match point.evidence {
        Evidence::TooLittle { seen, .. } | Evidence::Enough { seen, .. } => seen,
    };
    for (name, point) in [("shop-3", &like), ("stranger", &stranger)] {
        println!(
            "    {name}: p99 of its memory within {} ms: {:.0} MiB, after {} outcomes of its own",
            point.horizon_ms,
            mib(point.need.p99),
            seen(point),
        );
    }
    Ok(json!({
        "held_mib": mib(HELD_BYTES as f64),
        "forecast_of_its_like_mib": mib(like.need.p99),
        "forecast_of_a_stranger_mib": mib(stranger.need.p99),
    }))
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

/// Agents go on without a controller, and hand in what it missed.
fn the_controller_is_lost_and_returns(scene: &mut Scene) -> anyhow::Result<Value> {
    say("the controller is killed; agents go on, and keep their reports");
    scene.controller.kill()?;
    let spools = scene.spools.clone();
    let waiting = || -> anyhow::Result<Vec<u64>> { spools.iter().map(|spool| Ok(made(spool)?.1)).collect() };
    let kept = scene.wait("ten reports of each host to wait", || {
        let waiting = waiting()?;
        Ok(waiting.iter().all(|count| *count >= 10).then_some(waiting))
    })?;
    scene.hosts[1].run("meanwhile", &[], IDLE)?;
    say(&format!(
        "{kept:?} reports wait at hosts a, b and c; an instance was started meanwhile; the controller returns"
    ));
    scene.controller.restart()?;
    let (mut taken, mut skipped) = (0, 0);
    for (name, spool) in ["a", "b", "c"].into_iter().zip(&spools) {
        let counts = scene.wait(&format!("every report of host {name}"), || {
            let before = made(spool)?;
            let hosts: Vec<Value> = scene.controller.get("/v1/hosts")?;
            let of = hosts
                .iter()
                .find(|of| of["host"] == name)
                .map(|of| of["reports"].clone())
                .unwrap_or_default();
            // Nothing was made while we looked.
            let whole = made(spool)? == before && of["taken"] == json!(before.0 - before.1);
            Ok((whole && before.1 == 0).then_some(of))
        })?;
        taken += counts["taken"].as_u64().unwrap_or(0);
        skipped += counts["skipped"].as_u64().unwrap_or(u64::MAX);
    }
    scene.wait("the controller to know the new instance", || {
        Ok(scene.controller.host_of("meanwhile")?.filter(|host| host == "b"))
    })?;
    say(&format!("{taken} reports taken since the beginning, {skipped} lost"));
    Ok(json!({ "reports_waited": kept, "reports_taken": taken, "reports_lost": skipped }))
}

/// Host a is drained: all that runs there goes to the others.
fn a_host_is_emptied(scene: &Scene) -> anyhow::Result<Value> {
    let [a, ..] = &scene.hosts;
    let client_side = &scene.fleet.client;
    say("a Redis on host a, and a client that remembers every acknowledged write");
    a.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
    let data = DataSet::load(client_side, SERVER, DATA_BYTES)?;
    scene.wait("the controller to know it", || {
        Ok(scene.controller.host_of("redis")?.filter(|host| host == "a"))
    })?;
    let client = VerifyingClient::start_in(Manner::Patient, client_side, SERVER, Duration::from_millis(2))?;
    client.wait_for_acks(200, LIMIT)?;
    say("`rswap fleet drain a`");
    let began = UnixMillis::now();
    print!("{}", scene.fleet(&["drain", "a"])?);
    let mut left = vec!["redis", "shop-1", "shop-2"];
    let mut went = Vec::new();
    scene.wait("all instances to leave host a", || {
        for name in left.clone() {
            let Some(to) = scene.controller.host_of(name)?.filter(|host| host != "a") else { continue };
            let took_s = UnixMillis::now().since(began) as f64 / 1e3;
            println!("    {name} runs on host {to}, {took_s:.1} s after the drain began");
            went.push(json!({ "instance": name, "host": to, "after_s": took_s }));
            left.retain(|one| *one != name);
        }
        Ok(left.is_empty().then_some(()))
    })?;
    scene.wait("host a to be empty", || {
        let left: Vec<InstanceView> = a.get("/v1/instances")?;
        Ok(left.is_empty().then_some(()))
    })?;
    let ended = UnixMillis::now();
    client.wait_for_acks(200, LIMIT)?;
    say("the client reads back every write that was acknowledged");
    let seen: ClientReport = client.finish(client_side)?;
    let lost = seen.lost_writes + data.wrong_keys(client_side)?;
    let migrations: Vec<MigrationView> = a.get("/v1/migrations")?;
    let freezes = migrations.iter().filter_map(|migration| match &migration.state {
        MigrationState::Done { report, .. } => Some(report.unavailability_ms),
        _ => None,
    });
    let longest_ms = freezes.fold(0.0, f64::max);
    Ok(json!({
        "went": went,
        "emptied_after_s": ended.since(began) as f64 / 1e3,
        "acked_writes": seen.acked_writes,
        "lost_writes": lost,
        "reconnects": seen.reconnects,
        "client_waited_ms": seen.largest_gap_between_ms(began, ended),
        "longest_freeze_ms": longest_ms,
    }))
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

fn show(result: &Value) {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let number = |of: &str, key: &str| result[of][key].as_f64().unwrap_or(f64::NAN);
    for (what, value) in [
        (
            "forecast for a newcomer by its like",
            format!("{:.0} MiB", number("prior", "forecast_of_its_like_mib")),
        ),
        ("for a stranger", format!("{:.0} MiB", number("prior", "forecast_of_a_stranger_mib"))),
        (
            "reports taken, lost",
            format!("{}, {}", number("loss", "reports_taken"), number("loss", "reports_lost")),
        ),
        ("host a was empty after", format!("{:.1} s", number("drain", "emptied_after_s"))),
        (
            "acknowledged writes, lost",
            format!("{}, {}", number("drain", "acked_writes"), number("drain", "lost_writes")),
        ),
        ("the client waited at most", format!("{:.1} ms", number("drain", "client_waited_ms"))),
        ("an instance stood still at most", format!("{:.1} ms", number("drain", "longest_freeze_ms"))),
        ("the client's new connections", number("drain", "reconnects").to_string()),
    ] {
        table.add_row([what, value.as_str()]);
    }
    println!("{table}");
}

fn promises_kept(result: &Value) -> anyhow::Result<()> {
    let number = |of: &str, key: &str| result[of][key].as_f64().unwrap_or(f64::NAN);
    let held = number("prior", "held_mib");
    let like = number("prior", "forecast_of_its_like_mib");
    ensure!(
        like > 0.7 * held && like < 2.0 * held,
        "its like hold {held} MiB, and {like} are forecast of a newcomer"
    );
    let stranger = number("prior", "forecast_of_a_stranger_mib");
    ensure!(stranger < 0.7 * held, "{stranger} MiB are forecast of a stranger");
    ensure!(result["loss"]["reports_lost"] == 0, "reports were lost");
    ensure!(result["drain"]["lost_writes"] == 0, "acknowledged writes were lost");
    ensure!(result["drain"]["reconnects"] == 0, "the client's connection was broken");
    let waited_ms = number("drain", "client_waited_ms");
    ensure!(waited_ms < PROMISED_MS, "the client waited {waited_ms} ms");
    Ok(())
}

/// A port of this machine's loopback that leads to a socket, for browsers, which don't open sockets. Its threads end with the process.
fn forward(socket: PathBuf) -> anyhow::Result<std::net::SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("cannot listen for the dashboard")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let socket = socket.clone();
            // A controller that is away right now: the browser sees a closed connection.
            thread::spawn(move || {
                UnixStream::connect(socket).and_then(|onward| pass_both_ways(stream, onward))
            });
        }
    });
    Ok(address)
}

fn pass_both_ways(near: TcpStream, far: UnixStream) -> io::Result<()> {
    let (from_near, to_far) = (near.try_clone()?, far.try_clone()?);
    let there = thread::spawn(move || {
        let end = pass(from_near, &to_far);
        to_far.shutdown(Shutdown::Write).and(end)
    });
    pass(far, &near)?;
    near.shutdown(Shutdown::Both)?;
    there.join().unwrap_or(Ok(()))
}

fn pass(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    io::copy(&mut from, &mut to).map(drop)
}
