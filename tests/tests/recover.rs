//! Instances in doubt: they stay frozen until the other host answers, or a person decides.

use std::{net::Ipv4Addr, time::Duration};

use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{REDIS, VerifyingClient},
    proxy::{Fault, Proxy},
    reason_to_skip, wait_for,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const LIMIT: Duration = Duration::from_secs(40);

#[test]
fn a_person_lets_the_copy_here_go_on() -> anyhow::Result<()> {
    if reason_to_skip("a_person_lets_the_copy_here_go_on").is_some() {
        return Ok(());
    }
    let mut scene = Scene::in_doubt_at(Tag::Commit)?;
    // What is in doubt stays so, whatever becomes of the agent.
    scene.a.kill_agent()?;
    scene.stands_still()?;
    scene.a.start_agent()?;
    scene.stands_still()?;
    let refused = scene.a.migrate("redis", &scene.b.migrate_address())?.end()?;
    println!("{}", refused.expect_err("what is in doubt was moved"));
    let said = scene.a.call(&["recover", "redis", "--here"])?;
    println!("{said}");
    scene.client.wait_for_acks(50, LIMIT)?;
    scene.ends_at(false)
}

#[test]
fn a_person_removes_the_copy_here() -> anyhow::Result<()> {
    if reason_to_skip("a_person_removes_the_copy_here").is_some() {
        return Ok(());
    }
    let scene = Scene::in_doubt_at(Tag::Activated)?;
    scene.client.wait_for_acks(50, LIMIT)?;
    assert!(scene.a.call(&["recover", "redis"]).is_err(), "it has to be said which copy counts");
    println!("{}", scene.a.call(&["recover", "redis", "--there"])?);
    assert!(!scene.a.has_processes()?, "the copy here was to be removed");
    scene.ends_at(true)
}

#[test]
fn a_link_that_heals_ends_the_doubt() -> anyhow::Result<()> {
    if reason_to_skip("a_link_that_heals_ends_the_doubt").is_some() {
        return Ok(());
    }
    for (tag, there) in [(Tag::Commit, false), (Tag::Activated, true)] {
        let scene = Scene::in_doubt_at(tag)?;
        assert!(scene.a.call(&["recover", "other", "--here"]).is_err(), "there is no such doubt");
        scene.ends_at(there)?;
    }
    Ok(())
}

/// Two hosts, and a Redis whose migration from the first to the second is in doubt: no way leads from one to the other.
struct Scene {
    a: Host,
    b: Host,
    proxy: Proxy,
    client: VerifyingClient,
    fleet: Fleet,
}

impl Scene {
    /// In doubt since the first frame of this kind did not arrive.
    fn in_doubt_at(tag: Tag) -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let options = HostOptions { max_unavailability_ms: 3000, ..HostOptions::default() };
        let a = fleet.host("a", &options)?;
        let b = fleet.host("b", &options)?;
        a.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
        let client = VerifyingClient::start(&fleet.client, SERVER, Duration::from_millis(1))?;
        client.wait_for_acks(50, LIMIT)?;
        let proxy = Proxy::start(&a, &b, Fault::HoldAt { tag, nth: 0 })?;
        let migration = a.migrate("redis", &proxy.address())?;
        proxy.wait_for_fault()?;
        proxy.break_down();
        println!("{}", migration.end()?.expect_err("it ended well without an answer"));
        wait_for("the doubt to be shown", LIMIT, || Ok(a.call(&["ps"])?.contains("IN DOUBT").then_some(())))?;
        Ok(Self { a, b, proxy, client, fleet })
    }

    fn stands_still(&self) -> anyhow::Result<()> {
        let before = self.client.acked();
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(self.client.acked(), before, "it runs, though it is in doubt");
        Ok(())
    }

    /// With the link whole again, one copy runs, every journal is closed, and the next migration succeeds.
    fn ends_at(self, there: bool) -> anyhow::Result<()> {
        self.proxy.heal();
        let (at, other) = if there { (&self.b, &self.a) } else { (&self.a, &self.b) };
        wait_for("one copy to be left", LIMIT, || {
            let alone =
                at.has_instance("redis")? && !other.has_instance("redis")? && !other.has_processes()?;
            Ok(alone.then_some(()))
        })?;
        self.client.wait_for_acks(50, LIMIT)?;
        wait_for("every journal to be closed", LIMIT, || {
            Ok([self.a.open_journals()?, self.b.open_journals()?].concat().is_empty().then_some(()))
        })?;
        wait_for("the doubt to be shown no longer", LIMIT, || {
            Ok((!self.a.call(&["ps"])?.contains("IN DOUBT")).then_some(()))
        })?;
        at.migrate("redis", &other.migrate_address())?.succeed()?;
        self.client.wait_for_acks(20, LIMIT)?;
        let seen = self.client.finish(&self.fleet.client)?;
        println!("{seen:?}");
        assert_eq!(seen.lost_writes, 0);
        Ok(())
    }
}
