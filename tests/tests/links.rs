//! Links between agents: who is not an agent of the fleet, under the name that is expected, gets nothing and is told why, at both
//! ends; whatever it does, the next right one succeeds. (Those that have a host's key, and lie: `hostile_peer.rs`.)

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    sync::PoisonError,
    time::Duration,
};

use anyhow::{Context, ensure};
use rswap_agent::migrate::{
    journal::MigrationId,
    rules::Fate,
    wire::{Frame, Hello, Tag, read_frame, write_frame},
};
use rswap_tests::{
    Fleet, Host, HostOptions, binary,
    fleet::{files_in, pki},
    heartbeat, moves,
    proxy::{Fault, Proxy},
    reason_to_skip,
    strangers::{certificate, garbage, hours, kept, put, record, replay, show, slow_handshakes},
    tls::Secured,
    wait_for,
};
use rswap_trust::{Files, Role};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
const NAME: &str = "memcheck";

/// Two hosts, each of which knows the other by name, and a program that checks itself at the first.
struct Scene {
    // Dropped in this order: the hosts live in the fleet's network.
    a: Host,
    b: Host,
    log: PathBuf,
    fleet: Fleet,
}

impl Scene {
    fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let known = |name: &str, number: u8, allow: &str| -> anyhow::Result<HostOptions> {
            let own = if name == "a" { "b" } else { "a" };
            let Files { ca, certificate, key } = fleet.issue(own, &[])?;
            let more = format!(
                "[tls]\nca = {ca:?}\ncertificate = {certificate:?}\nkey = {key:?}\nallow = {allow}\n\n\
                 [[pool]]\nname = {name:?}\nhost = \"10.88.0.{number}:7791\"\ncores = 1\nmemory_gib = 1\n"
            );
            Ok(HostOptions { more, max_unavailability_ms: 10_000, ..HostOptions::default() })
        };
        let (for_a, for_b) = (known("b", 2, "[\"b\"]")?, known("a", 1, "[\"a\"]")?);
        let (a, b) = (fleet.host("a", &for_a)?, fleet.host("b", &for_b)?);
        let (memcheck, log) = (binary("memcheck")?, fleet.scratch().join("memcheck.log"));
        let command = [&*memcheck.to_string_lossy(), &log.to_string_lossy(), "1", "8", "2"];
        a.run(NAME, &[], &command)?;
        a.wait_for_instance(NAME)?;
        Ok(Self { a, b, log, fleet })
    }

    /// What `host` says since there were `before` bytes of its log.
    fn said(host: &Host, before: usize, words: &str) -> anyhow::Result<()> {
        wait_for(&format!("{words:?} in the log"), LIMIT, || {
            Ok(host.log()?.get(before..).is_some_and(|log| log.contains(words)).then_some(()))
        })
    }

    /// A try to move it to `to` that fails: the source says `here`, and the log of `at` says `there`.
    fn is_refused(&self, to: &str, here: &str, at: &Host, there: &str) -> anyhow::Result<()> {
        let before = at.log()?.len();
        let reason = self.a.migrate(NAME, to)?.end()?;
        let reason = reason.err().with_context(|| format!("it was moved, and {here:?} was due"))?;
        println!("{reason}");
        ensure!(reason.contains(here), "{here:?} was due, not {reason:?}");
        Self::said(at, before, there)?;
        self.nothing_was_touched()
    }

    fn nothing_was_touched(&self) -> anyhow::Result<()> {
        ensure!(self.a.has_instance(NAME)?, "it is not listed at its host");
        ensure!(!self.b.has_processes()?, "something of it is at the other host");
        ensure!(!self.b.has_instance(NAME)?, "it is listed at the other host");
        ensure!(self.b.open_journals()?.is_empty(), "{:?}", self.b.open_journals()?);
        heartbeat::wait_for_more(&self.log, 2, 1)
    }

    /// There and back, by the names of the pools.
    fn moves(&self) -> anyhow::Result<()> {
        for (from, name, to) in [(&self.a, "b", &self.b), (&self.b, "a", &self.a)] {
            from.migrate(NAME, name)?.succeed()?;
            to.wait_for_instance(NAME)?;
            ensure!(!from.has_processes()?, "two copies run");
            heartbeat::wait_for_more(&self.log, 2, 1)?;
        }
        Ok(())
    }
}

#[test]
fn whoever_has_the_wrong_certificate_is_refused_at_both_ends_and_told_why() -> anyhow::Result<()> {
    if reason_to_skip("whoever_has_the_wrong_certificate_is_refused_at_both_ends_and_told_why").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let right = scene.fleet.scratch().join("right");
    let (right_a, right_b) =
        (kept(scene.a.files(), &right.join("a"))?, kept(scene.b.files(), &right.join("b"))?);
    let now = || hours(-1, 1);
    // What is wrong, what the end that shows it hears, and what the other says. Before anybody looks at a name, the chain has to
    // be right.
    let wrong = [
        (
            "c",
            Role::Agent,
            now(),
            false,
            "its role or its name is not allowed there",
            "spiffe://fleet/agent/c, and not",
        ),
        (
            "x",
            Role::Operator,
            now(),
            false,
            "its role or its name is not allowed there",
            "its role is operator, and agent",
        ),
        ("x", Role::Controller, now(), false, "its role or its name", "its role is controller, and agent"),
        (
            "x",
            Role::Agent,
            now(),
            true,
            "not issued by an authority that is trusted there",
            "was not issued by an authority",
        ),
        ("x", Role::Agent, hours(-3, -1), false, "it has expired there", "has expired"),
        ("x", Role::Agent, hours(1, 3), false, "is not valid yet", "is not valid yet"),
    ];
    for (name, role, valid, other, shows, says) in wrong {
        let files = certificate(&scene.fleet, name, role, valid, other)?;
        // Whoever calls.
        show(&files, scene.a.files())?;
        scene.is_refused("b", shows, &scene.b, says)?;
        show(&right_a, scene.a.files())?;
        // Whoever is called.
        show(&files, scene.b.files())?;
        scene.is_refused("b", says, &scene.b, shows)?;
        let asked = scene.a.call(&["check", NAME, "b"]).err().context("it was asked all the same")?;
        ensure!(format!("{asked:#}").contains(says), "{asked:#}");
        show(&right_b, scene.b.files())?;
    }
    // The right name at another address than the one that it is known by is right; another host at this one is not.
    scene.moves()
}

#[test]
fn clear_text_goes_to_nobody_and_is_taken_from_nobody() -> anyhow::Result<()> {
    if reason_to_skip("clear_text_goes_to_nobody_and_is_taken_from_nobody").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    // Without a word about TLS, an agent doesn't start where others could reach it.
    let bare = HostOptions { more: "[tls]\n".into(), ..HostOptions::default() };
    let error = scene.fleet.host("bare", &bare).err().context("it takes migrations in the clear")?;
    let said = format!("{error:#}");
    ensure!(said.contains("tls.certificate") && said.contains("tls.insecure_clear_text"), "{said}");

    let open = HostOptions { more: "[tls]\ninsecure_clear_text = true\n".into(), ..HostOptions::default() };
    let open = scene.fleet.host("open", &open)?;
    // It says so wherever somebody looks.
    Scene::said(&open, 0, "neither encrypted nor authenticated")?;
    let status: Value = open.get("/v1/status")?;
    ensure!(status["links"]["security"] == "clear_text", "{status}");
    ensure!(open.call(&["doctor"])?.contains("neither encrypted nor authenticated"));
    let status: Value = scene.a.get("/v1/status")?;
    ensure!(status["links"]["security"] == "tls", "{status}");
    ensure!(status["links"]["identity"] == "spiffe://fleet/agent/a", "{status}");
    ensure!(scene.a.call(&["doctor"])?.contains("spiffe://fleet/agent/a"));

    // From TLS to clear text.
    scene.is_refused(
        &open.migrate_address(),
        "speaks no TLS",
        &open,
        "it speaks TLS, and this host does not",
    )?;
    ensure!(!open.has_processes()?, "something of it is at the host in the clear");
    // From clear text to TLS.
    open.run("other", &[], &["sleep", "1000"])?;
    open.wait_for_instance("other")?;
    let before = scene.b.log()?.len();
    let reason = open.migrate("other", &scene.b.migrate_address())?.end()?;
    let reason = reason.err().context("it was taken in the clear")?;
    ensure!(reason.contains("it speaks TLS, and this host does not"), "{reason}");
    Scene::said(&scene.b, before, "speaks no TLS")?;
    scene.nothing_was_touched()?;
    scene.moves()
}

#[test]
fn strangers_cost_time_and_keep_nobody_out() -> anyhow::Result<()> {
    if reason_to_skip("strangers_cost_time_and_keep_nobody_out").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let destination: SocketAddr = scene.b.migrate_address().parse()?;

    // A whole migration, recorded on the way, and said again.
    let (address, kept) = record(scene.a.netns(), destination)?;
    scene.a.migrate(NAME, &address)?.succeed()?;
    scene.b.migrate(NAME, "a")?.succeed()?;
    let recorded = kept.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ensure!(recorded.len() > 1 << 20, "little was recorded: {} bytes", recorded.len());
    let before = scene.b.log()?.len();
    replay(&scene.fleet.client, destination, recorded)?;
    Scene::said(&scene.b, before, "can't be decrypted")?;
    scene.nothing_was_touched()?;

    // Garbage, and what is almost the beginning of a handshake.
    let before = scene.b.log()?.len();
    garbage(&scene.fleet.client, destination)?;
    Scene::said(&scene.b, before, "a caller was turned away")?;
    scene.nothing_was_touched()?;

    // Slow ones, more than are listened to: the right one comes through while they are at it.
    let before = scene.b.log()?.len();
    let slow = slow_handshakes(&scene.fleet.client, destination)?;
    Scene::said(&scene.b, before, "too many have not shown who they are")?;
    scene.moves()?;
    Scene::said(&scene.b, before, "the TLS handshake was not done within 5 s")?;
    slow.join().map_err(|_| anyhow::anyhow!("the slow ones panicked"))??;
    scene.nothing_was_touched()?;
    scene.moves()
}

#[test]
fn certificates_are_rotated_while_an_instance_moves_there_and_back() -> anyhow::Result<()> {
    if reason_to_skip("certificates_are_rotated_while_an_instance_moves_there_and_back").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let authority = scene.fleet.authority();
    let at = authority.to_string_lossy().into_owned();
    let agents = [scene.a.agent_pid(), scene.b.agent_pid()];
    let of_the_old = certificate(&scene.fleet, "a", Role::Agent, hours(-1, 1), false)?;
    let bring = |host: &Host| put(&authority.join("ca.pem"), &host.files().ca);
    scene.moves()?;
    pki(&["rotate", &at])?;
    ensure!(pki(&["rotate", &at]).is_err(), "a second rotation began in the first");
    // In each state in which a person may leave it.
    for host in [&scene.a, &scene.b] {
        bring(host)?;
        scene.moves()?;
    }
    for name in ["a", "b"] {
        scene.fleet.issue(name, &[])?;
        scene.moves()?;
    }
    pki(&["rotate", &at, "--finish"])?;
    for host in [&scene.a, &scene.b] {
        bring(host)?;
        scene.moves()?;
    }
    // What the old key has signed is worth nothing.
    let right = scene.fleet.scratch().join("right");
    fs::create_dir(&right)?;
    let new = files_in(&right);
    put(&scene.a.files().key, &new.key)?;
    put(&scene.a.files().certificate, &new.certificate)?;
    show(&of_the_old, scene.a.files())?;
    scene.is_refused(
        "b",
        "not issued by an authority that is trusted there",
        &scene.b,
        "was not issued by",
    )?;
    show(&new, scene.a.files())?;
    moves::moved(NAME, &scene.a, &scene.b)?;
    heartbeat::wait_for_progress(&scene.log)?;
    ensure!([scene.a.agent_pid(), scene.b.agent_pid()] == agents, "an agent was started anew");
    Ok(())
}

/// What the agent at `to` says to a question, or a word, about a migration of the host that has these files.
fn ask(host: &Host, to: SocketAddr, tag: Tag, id: MigrationId) -> anyhow::Result<Frame> {
    let files = host.files().clone();
    let asking = host.netns().spawn("question", move || {
        let stream = TcpStream::connect(to)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut link = Secured::dialled(stream, &files)?;
        write_frame(&mut link, Tag::Hello, &postcard::to_stdvec(&Hello::ours())?)?;
        link.flush()?;
        ensure!(read_frame(&mut link)?.tag == Tag::Hello, "no greeting");
        write_frame(&mut link, tag, &id.0.to_le_bytes())?;
        link.flush()?;
        Ok(read_frame(&mut link)?)
    })?;
    asking.join().map_err(|_| anyhow::anyhow!("the question panicked"))?
}

#[test]
fn of_a_migration_nobody_is_told_but_who_takes_part_in_it() -> anyhow::Result<()> {
    if reason_to_skip("of_a_migration_nobody_is_told_but_who_takes_part_in_it").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let options = HostOptions { max_unavailability_ms: 10_000, ..HostOptions::default() };
    let [a, b, c] = ["a", "b", "c"].map(|name| fleet.host(name, &options));
    let (a, b, c) = (a?, b?, c?);
    let to: SocketAddr = b.migrate_address().parse()?;
    let (memcheck, log) = (binary("memcheck")?, fleet.scratch().join("memcheck.log"));
    a.run(NAME, &[], &[&*memcheck.to_string_lossy(), &log.to_string_lossy(), "1", "8", "2"])?;
    a.wait_for_instance(NAME)?;

    // It runs at host b, and host a does not know it: only b can say so, and only as long as nobody has it forgotten.
    let proxy = Proxy::start(&a, &b, Fault::HoldAt { tag: Tag::Activated, nth: 0 })?;
    let migration = a.migrate(NAME, &proxy.address())?;
    proxy.wait_for_fault()?;
    proxy.break_down();
    println!("{}", migration.end()?.err().context("it ended well without an answer")?);
    let journals = a.open_journals()?;
    let [journal] = &journals[..] else { anyhow::bail!("{journals:?}") };
    let id: MigrationId = journal.split('.').next().unwrap_or_default().parse().ok().context("no id")?;
    let kept = b.open_journals()?;

    // Host c is of the fleet, and may send to b. Of this migration it is told nothing, and its word is not taken for it.
    for tag in [Tag::Inquire, Tag::Settled] {
        let before = b.log()?.len();
        let Frame { tag: answer, payload } = ask(&c, to, tag, id)?;
        let said = String::from_utf8_lossy(&payload).into_owned();
        ensure!(answer == Tag::Abort && said.contains("c is told nothing of it"), "{answer:?}: {said}");
        Scene::said(&b, before, "c is told nothing of it")?;
        ensure!(b.open_journals()? == kept, "host c has changed it: {:?}", b.open_journals()?);
    }
    // Of one that is not there it is told just that.
    let unknown = ask(&c, to, Tag::Inquire, MigrationId(7))?;
    ensure!((unknown.tag, &*unknown.payload) == (Tag::Fate, &[Fate::Unknown as u8][..]), "{unknown:?}");
    // Host a is told, ends its copy, and lets b forget it.
    proxy.heal();
    wait_for("one copy to be left, and nothing in doubt", LIMIT, || {
        let alone = !a.has_instance(NAME)? && !a.has_processes()? && b.has_instance(NAME)?;
        let closed = [a.open_journals()?, b.open_journals()?].concat().is_empty();
        Ok((alone && closed).then_some(()))
    })?;
    heartbeat::wait_for_more(&log, 2, 1)
}
