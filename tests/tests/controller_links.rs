//! A controller and agents of other hosts, over the network: who is not of the fleet, under the name and in the role that is expected,
//! gets nothing and is told why, at both ends; whatever it does, no report is lost, and the next right one is taken.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rswap_agent::pool::{Pool, PoolState, THIS_HOST};
use rswap_controller::link::{self, LinkError, Secure};
use rswap_fleet::{
    Report,
    model::Revision,
    report::{Envelope, VERSION},
};
use rswap_tests::{
    Fleet, Host, HostOptions, binary,
    controller::{Controller, PORT},
    fleet::CLIENT,
    reason_to_skip,
    strangers::{certificate, garbage, hours, kept, record, replay, show, slow_handshakes},
    tls::Secured,
    wait_for,
};
use rswap_trust::{Credentials, Files, Role};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);
const REPORT_EVERY_MS: u64 = 300;
/// The number of a report that nothing came before: whoever takes it counts what it skips.
const SKIPS: u64 = 1_000;

/// Two hosts whose agents report to a controller elsewhere.
struct Scene {
    // Dropped in this order: all live in the fleet's network.
    a: Host,
    b: Host,
    controller: Controller,
    /// The controller's certificate.
    files: Files,
    fleet: Fleet,
}

impl Scene {
    fn set() -> anyhow::Result<Self> {
        Self::set_with("")
    }

    /// With these further sections of the controller's configuration.
    fn set_with(more: &str) -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let files = fleet.issue("controller", &["--role", "controller"])?;
        let keys = format!("mode = \"act\"\nreport_every_ms = {REPORT_EVERY_MS}\n");
        let tls = "allow = [\"a\", \"b\"]\nreaders = [\"watcher\"]\n";
        let controller = Controller::start_at(&fleet, &keys, &files, tls, more)?;
        let spool = |name: &str| fleet.scratch().join(format!("spool-{name}"));
        let options = |name: &str| HostOptions {
            mode: "act",
            more: Controller::far_member(&spool(name), REPORT_EVERY_MS),
            window_ms: 200,
            ..HostOptions::default()
        };
        let (for_a, for_b) = (options("a"), options("b"));
        let (a, b) = (fleet.host("a", &for_a)?, fleet.host("b", &for_b)?);
        let scene = Self { a, b, controller, files, fleet };
        scene.both_report(2)?;
        Ok(scene)
    }

    fn door() -> SocketAddr {
        SocketAddr::new(CLIENT.parse().expect("an address"), PORT)
    }

    /// Reports that were taken of a host; none was skipped.
    fn taken(&self, host: &str) -> anyhow::Result<u64> {
        let hosts: Vec<Value> = self.controller.get("/v1/hosts")?;
        let of = hosts.iter().find(|of| of["host"] == host);
        let reports = of.map(|of| of["reports"].clone()).unwrap_or_default();
        ensure!(reports.is_null() || reports["skipped"] == 0, "{host}: {reports}");
        Ok(reports["taken"].as_u64().unwrap_or_default())
    }

    fn reports(&self, host: &str, more: u64) -> anyhow::Result<()> {
        let before = self.taken(host)?;
        wait_for(&format!("{more} more reports of {host}"), LIMIT, || {
            Ok((self.taken(host)? >= before + more).then_some(()))
        })
    }

    fn both_report(&self, more: u64) -> anyhow::Result<()> {
        self.reports("a", more)?;
        self.reports("b", more)
    }

    /// What host a's agent and the controller say since their logs were so long.
    fn said(
        &self,
        (at_a, at_controller): (usize, usize),
        agent: &str,
        controller: &str,
    ) -> anyhow::Result<()> {
        for (log, before, words) in [
            (&(|| self.a.log()) as &dyn Fn() -> anyhow::Result<String>, at_a, agent),
            (&|| self.controller.log(), at_controller, controller),
        ] {
            wait_for(&format!("{words:?} in a log"), LIMIT, || {
                Ok(log()?.get(before..).is_some_and(|log| log.contains(words)).then_some(()))
            })?;
        }
        Ok(())
    }

    fn logs(&self) -> anyhow::Result<(usize, usize)> {
        Ok((self.a.log()?.len(), self.controller.log()?.len()))
    }

    /// A call at the controller's door, from `host`, with this certificate.
    fn call(&self, from: &Host, files: &Files, port: u16, path: &str, body: Option<Vec<u8>>) -> Called {
        let own = Arc::new(Credentials::open(files.clone())?);
        let host = if port == PORT { CLIENT } else { "127.0.0.1" };
        let to = Secure { host: host.to_owned(), port, name: "controller".parse()?, own };
        let path = path.to_owned();
        let call = from.netns().spawn("call", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(link::call::<Value>(&to, &path, body)).map_err(|error| {
                let error = anyhow::Error::from(error);
                format!("{error:#}")
            }))
        })?;
        call.join().map_err(|_| anyhow::anyhow!("the call panicked"))?
    }
}

/// An answer, or what was said instead.
type Called = anyhow::Result<Result<Value, String>>;

/// What `host`'s agent might report, as the `sequence`th of a spool of its own.
fn report_of(host: &str, sequence: u64) -> anyhow::Result<Vec<u8>> {
    let report = Report {
        version: VERSION,
        host: host.parse()?,
        epoch: 77,
        sequence,
        at: rswap_agent::units::UnixMillis::now(),
        acts: true,
        address: None,
        running: None,
        pools: Vec::new(),
        instances: Vec::new(),
        gone: Default::default(),
        links: Vec::new(),
        outcomes: Vec::new(),
        dropped: 0,
    };
    let (lessons, knows, leads) = (Vec::new(), Revision::default(), (1_000, vec![2_000]));
    Ok(serde_json::to_vec(&Envelope { reports: vec![report], lessons, knows, leads })?)
}

#[test]
fn whoever_is_not_expected_is_refused_at_both_ends_and_told_why() -> anyhow::Result<()> {
    if reason_to_skip("whoever_is_not_expected_is_refused_at_both_ends_and_told_why").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let right_a = kept(scene.a.files(), &scene.fleet.scratch().join("right/a"))?;
    let right = kept(&scene.files, &scene.fleet.scratch().join("right/controller"))?;
    let now = || hours(-1, 1);
    let of = |name, role, valid, other| certificate(&scene.fleet, name, role, valid, other);
    let not_allowed = "its role or its name is not allowed there";
    // What host a shows, what its agent hears, and what the controller says.
    for (name, role, valid, other, hears, says) in [
        ("c", Role::Agent, now(), false, not_allowed, "spiffe://fleet/agent/c, and not one of a, b"),
        ("a", Role::Controller, now(), false, not_allowed, "its role is controller, and agent or operator"),
        (
            "a",
            Role::Agent,
            now(),
            true,
            "not issued by an authority that is trusted",
            "was not issued by an authority",
        ),
        ("a", Role::Agent, hours(-3, -1), false, "it has expired there", "has expired"),
        ("a", Role::Agent, hours(1, 3), false, "is not valid yet", "is not valid yet"),
        // Let in, but not as this host.
        (
            "b",
            Role::Agent,
            now(),
            false,
            "the report is of host a, and comes from the agent of b",
            "comes from the agent of b",
        ),
        ("a", Role::Operator, now(), false, "comes from the operator a", "comes from the operator a"),
    ] {
        let (files, before) = (of(name, role, valid, other)?, scene.logs()?);
        show(&files, scene.a.files())?;
        scene.said(before, hears, says)?;
        let stands = scene.taken("a")?;
        scene.reports("b", 3)?;
        ensure!(scene.taken("a")? == stands, "a report was taken from {name}, {role}");
        show(&right_a, scene.a.files())?;
        scene.both_report(1)?;
    }
    // What the controller shows.
    for (name, role, valid, other, says, hears) in [
        (
            "other",
            Role::Controller,
            now(),
            false,
            "spiffe://fleet/controller/other, and not controller",
            not_allowed,
        ),
        ("controller", Role::Agent, now(), false, "its role is agent, and controller is needed", not_allowed),
        (
            "controller",
            Role::Controller,
            now(),
            true,
            "was not issued by an authority",
            "not issued by an authority that is trusted",
        ),
        ("controller", Role::Controller, hours(-3, -1), false, "has expired", "it has expired there"),
    ] {
        let (files, before) = (of(name, role, valid, other)?, scene.logs()?);
        show(&files, &scene.files)?;
        scene.said(before, says, hears)?;
        show(&right, &scene.files)?;
        scene.both_report(1)?;
    }
    Ok(())
}

#[test]
fn an_agent_says_nothing_of_another_host_and_wants_nothing_of_the_fleet() -> anyhow::Result<()> {
    if reason_to_skip("an_agent_says_nothing_of_another_host_and_wants_nothing_of_the_fleet").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let refused = |files: &Files, path: &str, body: Option<Vec<u8>>, why: &str| -> anyhow::Result<()> {
        let before = scene.controller.log()?.len();
        let said = scene.call(&scene.a, files, PORT, path, body)?.err().context("it was answered")?;
        ensure!(said.contains(why), "{why:?} was due, not {said:?}");
        ensure!(
            scene.controller.log()?[before..].contains("was refused"),
            "the controller said nothing of it"
        );
        Ok(())
    };
    let drain = |host: &str, undo| serde_json::to_vec(&json!({ "host": host, "undo": undo })).map(Some);
    let own = scene.a.files().clone();
    // Another host's report, a wish, a look.
    let foreign = || -> anyhow::Result<u64> {
        let status: Value = scene.controller.get("/v1/status")?;
        status["counts"]["reports_foreign"].as_u64().context("no count of foreign reports")
    };
    let before = foreign()?;
    refused(
        &own,
        "/v1/report",
        Some(report_of("b", SKIPS)?),
        "the report is of host b, and comes from the agent of a",
    )?;
    refused(&own, "/v1/drain", drain("b", false)?, "may not say what is wanted of the fleet")?;
    refused(&own, "/v1/instances", None, "may not look at the fleet")?;
    let hosts: Vec<Value> = scene.controller.get("/v1/hosts")?;
    ensure!(hosts.iter().all(|host| host["drained"] == false), "{hosts:?}");
    // Whoever watches may look only; an operator may say what is wanted, and is no host.
    let watcher = scene.fleet.issue("watcher", &["--role", "operator"])?;
    let operator = scene.fleet.issue("somebody", &["--role", "operator"])?;
    refused(&watcher, "/v1/drain", drain("b", false)?, "may not say what is wanted of the fleet")?;
    refused(&operator, "/v1/report", Some(report_of("b", SKIPS)?), "comes from the operator somebody")?;
    ensure!(foreign()? == before + 2, "a foreign report was not counted as one");
    // Had one been taken, it would count as skipped what came before it; the right ones go on.
    scene.reports("b", 2)?;
    for files in [&watcher, &operator] {
        let hosts = scene.call(&scene.a, files, PORT, "/v1/hosts", None)?;
        ensure!(hosts.as_ref().is_ok_and(|hosts| hosts[0]["host"] == "a"), "{hosts:?}");
    }
    let state = |wanted: PoolState| {
        wait_for("the state of host b", LIMIT, || {
            let pools: Vec<Pool> = scene.b.get("/v1/pools")?;
            Ok(pools.iter().any(|pool| pool.name == THIS_HOST && pool.state == wanted).then_some(()))
        })
    };
    let done = scene.call(&scene.a, &operator, PORT, "/v1/drain", drain("b", false)?)?;
    ensure!(done.is_ok(), "{done:?}");
    state(PoolState::Draining)?;
    let done = scene.call(&scene.a, &operator, PORT, "/v1/drain", drain("b", true)?)?;
    ensure!(done.is_ok(), "{done:?}");
    state(PoolState::Ready)?;
    scene.both_report(2)
}

#[test]
fn strangers_and_clear_text_get_nothing_and_keep_nobody_out() -> anyhow::Result<()> {
    if reason_to_skip("strangers_and_clear_text_get_nothing_and_keep_nobody_out").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    let door = Scene::door();
    let controller_says = |scene: &Scene, before: usize, words: &str| {
        wait_for(&format!("{words:?} in the controller's log"), LIMIT, || {
            Ok(scene.controller.log()?.get(before..).is_some_and(|log| log.contains(words)).then_some(()))
        })
    };
    // A right report, recorded on its way, and said again.
    let (address, said) = record(scene.a.netns(), door)?;
    let port = address.rsplit(':').next().context("no port")?.parse()?;
    let taken = scene.call(&scene.a, scene.a.files(), port, "/v1/report", Some(report_of("a", 1)?))?;
    ensure!(taken.as_ref().is_ok_and(|answer| answer["stored"] == 1), "{taken:?}");
    let recorded = said.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ensure!(recorded.len() > 1000, "little was recorded: {} bytes", recorded.len());
    let before = scene.controller.log()?.len();
    replay(scene.b.netns(), door, recorded)?;
    controller_says(&scene, before, "can't be decrypted")?;

    // In the clear.
    let before = scene.controller.log()?.len();
    let clear = scene.a.netns().spawn("clear text", move || {
        let mut stream = TcpStream::connect(door)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(b"GET /v1/instances HTTP/1.1\r\nhost: rswap\r\n\r\n")?;
        let mut answer = Vec::new();
        // It may be reset.
        let _ = stream.read_to_end(&mut answer);
        Ok(answer)
    })?;
    let answer = clear.join().map_err(|_| anyhow::anyhow!("the call panicked"))??;
    ensure!(!String::from_utf8_lossy(&answer).contains("HTTP"), "it was answered in the clear");
    controller_says(&scene, before, "speaks no TLS")?;
    // Nobody speaks to a controller without a certificate, nor is one without.
    let more = Controller::far_member(&scene.fleet.scratch().join("spool-c"), REPORT_EVERY_MS);
    for tls in ["[tls]\n\n", "[tls]\ninsecure_clear_text = true\n\n"] {
        let options = HostOptions { more: format!("{tls}{more}"), ..HostOptions::default() };
        let error = scene.fleet.host("c", &options).err().context("it reports in the clear")?;
        let said = format!("{error:#}");
        ensure!(
            said.contains("is not spoken to without a certificate") || said.contains("tls.certificate"),
            "{said}"
        );
    }
    // An agent reports as the host that its certificate names, or does not start.
    let Files { ca, certificate, key } = scene.a.files();
    let tls = format!("[tls]\nca = {ca:?}\ncertificate = {certificate:?}\nkey = {key:?}\n\n");
    let options = HostOptions { more: format!("{tls}{more}"), ..HostOptions::default() };
    let error = scene.fleet.host("d", &options).err().context("it reports as another host")?;
    ensure!(format!("{error:#}").contains("and this host is d (agent.host)"), "{error:#}");
    // A number is no name: whose certificate is due has to be said.
    let more =
        format!("[controller]\naddress = \"{door}\"\nspool = {:?}\n", scene.fleet.scratch().join("spool-e"));
    let error = scene.fleet.host("e", &HostOptions { more, ..HostOptions::default() });
    let error = error.err().context("it believes any controller")?;
    ensure!(format!("{error:#}").contains("set controller.certificate_name"), "{error:#}");
    let bare = scene.fleet.scratch().join("bare.toml");
    let file = scene.fleet.scratch().join("bare-fleet");
    for (section, why) in [
        (String::new(), "[fleet.tls]"),
        (
            format!("[fleet.tls]\nca = {ca:?}\ncertificate = {certificate:?}\nkey = {key:?}\n"),
            "it is not for a controller",
        ),
    ] {
        fs::write(&bare, format!("[fleet]\nlisten = \"127.0.0.1:0\"\nfile = {file:?}\n{section}"))?;
        let ended = Command::new(binary("rswap")?).arg("--config").arg(&bare).arg("controller").output()?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(!ended.status.success() && said.contains(why), "{}: {said}", ended.status);
    }

    // Whoever is where the controller should be, without TLS.
    scene.controller.kill()?;
    let before = scene.a.log()?.len();
    let pretender = scene.fleet.client.spawn("pretender", move || {
        let listener = TcpListener::bind(door)?;
        let mut heard = Vec::new();
        for _ in 0..4 {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let _ = stream.read_to_end(&mut heard);
        }
        Ok(heard)
    })?;
    wait_for("what host a says of it", LIMIT, || {
        Ok(scene.a.log()?[before..].contains("speaks no TLS").then_some(()))
    })?;
    let heard = pretender.join().map_err(|_| anyhow::anyhow!("the pretender panicked"))??;
    ensure!(!String::from_utf8_lossy(&heard).contains("/v1/report"), "a report went out in the clear");
    scene.controller.restart()?;
    scene.both_report(2)?;

    // Garbage, then slow ones, more than are listened to: reports come through while they are at it.
    let before = scene.controller.log()?.len();
    garbage(&scene.fleet.client, door)?;
    controller_says(&scene, before, "a caller was turned away")?;
    let before = scene.controller.log()?.len();
    let slow = slow_handshakes(&scene.fleet.client, door)?;
    controller_says(&scene, before, "too many have not shown who they are")?;
    scene.both_report(5)?;
    controller_says(&scene, before, "the TLS handshake was not done within 5 s")?;
    slow.join().map_err(|_| anyhow::anyhow!("the slow ones panicked"))?.map(drop)
}

#[test]
fn whoever_has_a_key_and_keeps_connections_open_keeps_nobody_else_out() -> anyhow::Result<()> {
    if reason_to_skip("whoever_has_a_key_and_keeps_connections_open_keeps_nobody_else_out").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let (before, files) = (scene.controller.log()?.len(), scene.a.files().clone());
    let held = scene.a.netns().spawn("held connections", move || {
        let mut all = Vec::new();
        for _ in 0..20 {
            let mut one = Secured::dial(Scene::door(), &files)?;
            // The beginning of a request; who was turned away can't say even that.
            let _ = one.write_all(b"POST /v1/report HTTP/1.1\r\nhost: ");
            all.push(one);
        }
        // Until the controller has ended them all.
        for one in &mut all {
            let _ = one.read_to_end(&mut Vec::new());
        }
        Ok(())
    })?;
    wait_for("the controller to turn some away", LIMIT, || {
        Ok(scene.controller.log()?[before..].contains("it has too many connections").then_some(()))
    })?;
    scene.reports("b", 5)?;
    held.join().map_err(|_| anyhow::anyhow!("the held connections panicked"))??;
    scene.both_report(2)
}

#[test]
fn whoever_has_a_key_and_floods_is_told_to_wait_and_no_report_is_lost() -> anyhow::Result<()> {
    if reason_to_skip("whoever_has_a_key_and_floods_is_told_to_wait_and_no_report_is_lost").is_some() {
        return Ok(());
    }
    const PER_S: u64 = 5;
    const AT_ONCE: u64 = 10;
    let scene =
        Scene::set_with(&format!("[fleet.limits]\nreports_per_s = {PER_S}\nreports_at_once = {AT_ONCE}\n"))?;
    let before = scene.a.log()?.len();
    let own = Arc::new(Credentials::open(scene.a.files().clone())?);
    let to = Secure { host: CLIENT.to_owned(), port: PORT, name: "controller".parse()?, own };
    let flood = scene.a.netns().spawn("flood", move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let since = Instant::now();
        let (mut looked_at, mut told_to_wait) = (0, 0);
        while since.elapsed() < Duration::from_secs(8) {
            // What can't be read: if it is looked at, that is said.
            match runtime.block_on(link::call::<Value>(&to, "/v1/report", Some(b"{".to_vec()))) {
                Err(LinkError::Refused { status: 422, .. }) => looked_at += 1,
                Err(LinkError::Refused { status: 429, retry_after_s: Some(_), .. }) => told_to_wait += 1,
                other => anyhow::bail!("{other:?}"),
            }
        }
        Ok((looked_at, told_to_wait, since.elapsed()))
    })?;
    // Others do not notice.
    let since = Instant::now();
    scene.reports("b", 10)?;
    ensure!(!flood.is_finished(), "it was over before, after {:?}", since.elapsed());
    let (looked_at, told_to_wait, took) =
        flood.join().map_err(|_| anyhow::anyhow!("the flood panicked"))??;
    println!("of a flood for {took:?}, {looked_at} were looked at, {told_to_wait} were told to wait");
    ensure!(looked_at <= AT_ONCE + PER_S * (took.as_secs() + 1), "{looked_at} in {took:?}");
    ensure!(told_to_wait > 100, "{told_to_wait} are no flood");
    // The host whose key it was has waited meanwhile, and lost nothing: what it kept is handed in.
    ensure!(scene.a.log()?[before..].contains("reports wait"), "its own agent was never told to wait");
    scene.both_report(3)?;
    let spool = scene.fleet.scratch().join("spool-a");
    wait_for("all that was kept to be handed in", LIMIT, || {
        let waiting = fs::read_dir(&spool)?.filter_map(Result::ok);
        let waiting =
            waiting.filter(|entry| entry.path().extension().is_some_and(|kind| kind == "report")).count();
        Ok((waiting <= 1).then_some(()))
    })?;
    scene.both_report(1)
}
