//! The freeze's guard: an agent that dies or stands still in the freeze takes nothing along.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{REDIS, VerifyingClient},
    persistent::{self, Running},
    proxy::{Fault, Proxy},
    reason_to_skip,
    steps::{Follower, Place},
    wait_for,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const LIMIT: Duration = Duration::from_secs(40);

#[test]
fn connections_outlive_an_agent_that_is_killed_in_the_freeze() -> anyhow::Result<()> {
    if reason_to_skip("connections_outlive_an_agent_that_is_killed_in_the_freeze").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set(15_000)?;
    let pipeline = persistent::pipeline(&scene.fleet.client, SERVER)?;
    let subscriber = persistent::subscribe(&scene.fleet.client, SERVER)?;
    for fault in [Fault::HoldInLastDelta, at(Tag::Image), at(Tag::Verified)] {
        let proxy = scene.proxy(fault)?;
        let migration = scene.a.migrate("redis", &proxy.address())?;
        proxy.wait_for_fault()?;
        scene.a.kill_agent()?;
        let killed = Instant::now();
        for client in [&pipeline, &subscriber] {
            client.wait_for(50, LIMIT)?;
        }
        println!("{fault:?}: killed, and its clients went on within {:?}", killed.elapsed());
        proxy.cut();
        drop(migration);
        scene.a.start_agent()?;
    }
    scene.there_and_back(&[&pipeline, &subscriber])?;
    scene.finish([pipeline, subscriber])
}

#[test]
fn an_agent_that_is_stopped_in_the_freeze_loses_it() -> anyhow::Result<()> {
    if reason_to_skip("an_agent_that_is_stopped_in_the_freeze_loses_it").is_some() {
        return Ok(());
    }
    let scene = Scene::set(1_000)?;
    let pipeline = persistent::pipeline(&scene.fleet.client, SERVER)?;
    let agent = scene.a.agent_pid();
    let proxy = scene.proxy(Fault::PauseAt { tag: Tag::Verified, nth: 0 })?;
    let migration = scene.a.migrate("redis", &proxy.address())?;
    proxy.wait_for_fault()?;
    scene.a.signal_agent(Signal::SIGSTOP)?;
    pipeline.wait_for(50, LIMIT)?;
    // All that the agent needs to commit is there when it wakes up.
    proxy.go_on();
    scene.a.signal_agent(Signal::SIGCONT)?;
    let reason = migration.end()?.expect_err("it committed what its guard had let go");
    println!("{reason}");
    assert!(reason.contains("guard"), "{reason}");
    pipeline.wait_for(50, LIMIT)?;
    assert_eq!(scene.a.agent_pid(), agent, "the agent was ended though it held nothing");
    wait_for("the copy at the destination to go", LIMIT, || Ok((!scene.b.has_processes()?).then_some(())))?;
    scene.there_and_back(&[&pipeline])?;
    scene.finish([pipeline])
}

#[test]
fn an_agent_that_is_stopped_while_it_holds_the_threads_is_ended() -> anyhow::Result<()> {
    if reason_to_skip("an_agent_that_is_stopped_while_it_holds_the_threads_is_ended").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set(1_000)?;
    let pipeline = persistent::pipeline(&scene.fleet.client, SERVER)?;
    // In a call when tracking begins, and in one in the freeze.
    for place in [Place::Entry(0), Place::Entry(6)] {
        let agent = scene.a.agent_pid().context("no agent")?;
        let follower = Follower::start(agent, place, Signal::SIGSTOP)?;
        let migration = scene.a.migrate("redis", &scene.b.migrate_address())?;
        // Nobody wakes it up.
        migration.end()?.expect_err("it was moved by an agent that stood still");
        ensure!(follower.has_struck()?, "the agent did not come to {place:?}");
        pipeline.wait_for(50, LIMIT)?;
        let log = scene.a.log()?;
        ensure!(
            log.contains(&format!("ending the agent {agent}, which holds it")),
            "its guard did not end it"
        );
        scene.a.kill_agent()?;
        scene.a.start_agent()?;
        pipeline.wait_for(50, LIMIT)?;
    }
    scene.there_and_back(&[&pipeline])?;
    scene.finish([pipeline])
}

fn at(tag: Tag) -> Fault {
    Fault::HoldAt { tag, nth: 0 }
}

/// Two hosts, a Redis on the first, and a client that writes.
struct Scene {
    a: Host,
    b: Host,
    client: VerifyingClient,
    fleet: Fleet,
}

impl Scene {
    fn set(freeze_limit_ms: u64) -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let options = HostOptions { freeze_limit_ms, max_unavailability_ms: 500, ..HostOptions::default() };
        let a = fleet.host("a", &options)?;
        let b = fleet.host("b", &options)?;
        a.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
        let client = VerifyingClient::start(&fleet.client, SERVER, Duration::from_millis(1))?;
        client.wait_for_acks(50, LIMIT)?;
        Ok(Self { a, b, client, fleet })
    }

    fn proxy(&self, fault: Fault) -> anyhow::Result<Proxy> {
        Proxy::start(&self.a, &self.b, fault)
    }

    /// The next try succeeds, and the one after it. Under load it may take some.
    fn there_and_back(&self, clients: &[&Running]) -> anyhow::Result<()> {
        for (from, to) in [(&self.a, &self.b), (&self.b, &self.a)] {
            wait_for("a migration that fits its budget", LIMIT, || {
                let ended = from.migrate("redis", &to.migrate_address())?.end()?;
                Ok(ended.inspect_err(|reason| println!("{reason}")).ok())
            })?;
            for client in clients {
                client.wait_for(50, LIMIT)?;
            }
        }
        Ok(())
    }

    fn finish<const N: usize>(self, clients: [Running; N]) -> anyhow::Result<()> {
        for client in clients {
            println!("nothing came for {:?} at most", client.finish()?);
        }
        let seen = self.client.finish(&self.fleet.client)?;
        println!("{seen:?}");
        assert_eq!(seen.lost_writes, 0);
        Ok(())
    }
}
