//! Migrations over a long way take several connections, over a short one a single one; whatever becomes of them, one copy runs.

use std::{path::PathBuf, thread, time::Duration};

use anyhow::ensure;
use nix::sys::signal::Signal;
use rswap_tests::{Fleet, Host, HostOptions, binary, heartbeat, long_way::LongWay, reason_to_skip, wait_for};

const NAME: &str = "memcheck";
/// Enough that a part of it is still under way when something happens.
const MIB_PER_THREAD: &str = "128";
/// As far as two continents are from each other.
const ROUND_TRIP: Duration = Duration::from_millis(60);
/// Longer than a peer may be silent, and the roll-back after it.
const LIMIT: Duration = Duration::from_secs(60);

/// Two hosts, and a program that checks itself at the first.
struct Scene {
    // Dropped in this order: the hosts live in the fleet's network.
    a: Host,
    b: Host,
    log: PathBuf,
    _fleet: Fleet,
}

impl Scene {
    fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let options =
            HostOptions { max_unavailability_ms: 5_000, freeze_limit_ms: 15_000, ..HostOptions::default() };
        let (a, b) = (fleet.host("a", &options)?, fleet.host("b", &options)?);
        let (memcheck, log) = (binary("memcheck")?, fleet.scratch().join("memcheck.log"));
        let command = [&*memcheck.to_string_lossy(), &log.to_string_lossy(), "1", MIB_PER_THREAD, "2"];
        a.run(NAME, &[], &command)?;
        a.wait_for_instance(NAME)?;
        heartbeat::wait_for_more(&log, 50, 100)?;
        Ok(Self { a, b, log, _fleet: fleet })
    }

    /// It runs at `here` and nowhere else, and no journal is open.
    fn runs_only(&self, here: &Host, elsewhere: &Host) -> anyhow::Result<()> {
        here.wait_for_instance(NAME)?;
        wait_for("the other copy to be gone", LIMIT, || {
            let open = [self.a.open_journals()?, self.b.open_journals()?].concat();
            Ok((!elsewhere.has_processes()? && open.is_empty()).then_some(()))
        })?;
        heartbeat::wait_for_more(&self.log, 20, 20)
    }

    /// There over several connections, and back over one.
    fn there_and_back(&self) -> anyhow::Result<()> {
        let way = LongWay::lay(&self.a, &self.b, ROUND_TRIP)?;
        let there = self.a.migrate(NAME, &self.b.migrate_address())?.succeed()?;
        println!("a long way: {} streams, {} ms", there.streams, there.duration_ms);
        ensure!(there.streams > 1, "{} connections over {} ms", there.streams, ROUND_TRIP.as_millis());
        self.runs_only(&self.b, &self.a)?;
        drop(way);
        let back = self.b.migrate(NAME, &self.a.migrate_address())?.succeed()?;
        println!("a short way: {} streams, {} ms", back.streams, back.duration_ms);
        ensure!(back.streams == 1, "{} connections over a short way", back.streams);
        self.runs_only(&self.a, &self.b)
    }

    /// A migration over several connections, of which a part has been sent.
    fn under_way(&self) -> anyhow::Result<(LongWay, rswap_tests::migration::Migration)> {
        let way = LongWay::lay(&self.a, &self.b, ROUND_TRIP)?;
        let lanes = self.a.log()?.matches("sent over several connections").count();
        let mut migration = self.a.migrate(NAME, &self.b.migrate_address())?;
        migration.wait_until("a part of the memory", |progress| progress.pages_sent > 8_000)?;
        ensure!(self.a.log()?.matches("sent over several connections").count() > lanes, "there are no lanes");
        Ok((way, migration))
    }
}

#[test]
fn a_long_way_takes_several_connections_and_a_short_one_one() -> anyhow::Result<()> {
    if reason_to_skip("a_long_way_takes_several_connections_and_a_short_one_one").is_some() {
        return Ok(());
    }
    Scene::set()?.there_and_back()
}

#[test]
fn a_way_that_is_cut_in_silence_leaves_it_where_it_was() -> anyhow::Result<()> {
    if reason_to_skip("a_way_that_is_cut_in_silence_leaves_it_where_it_was").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let (way, migration) = scene.under_way()?;
    way.cut();
    let reason = migration.end()?.expect_err("it arrived over nothing");
    println!("{reason}");
    heartbeat::wait_for_more(&scene.log, 20, 20)?;
    // The destination finds out by itself, as nobody can tell it.
    wait_for("what has arrived to be gone", LIMIT, || Ok((!scene.b.has_processes()?).then_some(())))?;
    // How it ended can be told when there is a way again.
    drop(way);
    scene.runs_only(&scene.a, &scene.b)?;
    scene.there_and_back()
}

#[test]
fn whichever_agent_is_killed_while_lanes_are_busy_one_copy_runs() -> anyhow::Result<()> {
    if reason_to_skip("whichever_agent_is_killed_while_lanes_are_busy_one_copy_runs").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    for source in [false, true] {
        let (way, migration) = scene.under_way()?;
        let host = if source { &mut scene.a } else { &mut scene.b };
        host.signal_agent(Signal::SIGKILL)?;
        let reason = migration.end()?.expect_err("it arrived all the same");
        println!("{reason}");
        host.kill_agent()?;
        thread::sleep(Duration::from_millis(200));
        host.start_agent()?;
        scene.runs_only(&scene.a, &scene.b)?;
        drop(way);
    }
    scene.there_and_back()
}
