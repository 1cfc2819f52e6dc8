//! What goes wrong before the commit leaves the instance running where it was, with nothing lost.

use std::{net::Ipv4Addr, time::Duration};

use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{DataSet, REDIS, VerifyingClient},
    proxy::{Fault, Proxy},
    reason_to_skip, wait_for,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 24 << 20;
const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_destination_killed_before_the_commit_changes_nothing() -> anyhow::Result<()> {
    if reason_to_skip("a_destination_killed_before_the_commit_changes_nothing").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    let at = |tag, nth| Fault::HoldAt { tag, nth };
    let places = [
        ("the offer", at(Tag::Offer, 0)),
        ("the first round", at(Tag::RoundEnd, 0)),
        ("the second round", at(Tag::RoundEnd, 1)),
        ("the third round", at(Tag::RoundEnd, 2)),
        ("the last delta, frozen", Fault::HoldInLastDelta),
        ("the image, frozen", at(Tag::Image, 0)),
        ("the digests, frozen", at(Tag::Verified, 0)),
    ];
    for (place, fault) in places {
        println!("killed at {place}");
        let proxy = scene.proxy(fault)?;
        let migration = scene.a.migrate("redis", &proxy.address())?;
        proxy.wait_for_fault()?;
        scene.b.kill_agent()?;
        proxy.cut();
        let reason = migration.end()?.expect_err("it was moved to a dead host");
        println!("{reason}");
        scene.client.wait_for_acks(20, LIMIT)?;
        // What was ready to run stands still until the next agent removes it.
        scene.b.start_agent()?;
        scene.runs_at_the_source_alone()?;
        scene.second_try_and_back()?;
    }
    scene.nothing_is_lost()
}

#[test]
fn a_page_damaged_on_the_wire_is_noticed_and_rolled_back() -> anyhow::Result<()> {
    if reason_to_skip("a_page_damaged_on_the_wire_is_noticed_and_rolled_back").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let proxy = scene.proxy(Fault::DamagePage)?;
    let migration = scene.a.migrate("redis", &proxy.address())?;
    proxy.wait_for_fault()?;
    let reason = migration.end()?.expect_err("a damaged copy was let run");
    println!("{reason}");
    scene.runs_at_the_source_alone()?;
    scene.second_try_and_back()?;
    scene.nothing_is_lost()
}

/// Two hosts, a Redis with data on the first, and a client that writes.
struct Scene {
    a: Host,
    b: Host,
    data: DataSet,
    client: VerifyingClient,
    fleet: Fleet,
}

impl Scene {
    fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let a = fleet.host("a", &HostOptions::default())?;
        let b = fleet.host("b", &HostOptions::default())?;
        a.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
        let data = DataSet::load(&fleet.client, SERVER, DATA_BYTES)?;
        let client = VerifyingClient::start(&fleet.client, SERVER, Duration::from_millis(1))?;
        client.wait_for_acks(100, LIMIT)?;
        Ok(Self { a, b, data, client, fleet })
    }

    fn proxy(&self, fault: Fault) -> anyhow::Result<Proxy> {
        Proxy::start(self.a.netns(), self.b.migrate_address().parse()?, fault)
    }

    fn runs_at_the_source_alone(&self) -> anyhow::Result<()> {
        assert!(self.a.has_instance("redis")?, "the source does not list it any more");
        self.client.wait_for_acks(100, LIMIT)?;
        assert_eq!(self.data.wrong_keys(&self.fleet.client)?, 0);
        let left = || Ok((!self.b.has_processes()?).then_some(()));
        wait_for("what was built at the destination to go", LIMIT, left)
    }

    fn second_try_and_back(&self) -> anyhow::Result<()> {
        self.a.migrate("redis", &self.b.migrate_address())?.succeed()?;
        assert!(self.b.has_instance("redis")? && !self.a.has_instance("redis")?);
        self.client.wait_for_acks(100, LIMIT)?;
        self.b.migrate("redis", &self.a.migrate_address())?.succeed()?;
        self.client.wait_for_acks(100, LIMIT)
    }

    fn nothing_is_lost(self) -> anyhow::Result<()> {
        let seen = self.client.finish(&self.fleet.client)?;
        println!("{seen:?}");
        assert_eq!(seen.lost_writes, 0);
        assert_eq!(self.data.wrong_keys(&self.fleet.client)?, 0);
        Ok(())
    }
}
