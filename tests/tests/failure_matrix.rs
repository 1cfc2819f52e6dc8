//! Whatever is killed, wherever: one copy runs in the end, no acknowledged write is lost, and the next try succeeds.

use std::{net::Ipv4Addr, time::Duration};

use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{DataSet, REDIS, VerifyingClient},
    proxy::{Fault, Proxy},
    reason_to_skip, wait_for,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(40);

/// Where the migration is held: what was not passed on, and what must have become of the instance when the source's
/// agent is killed just there, before anybody starts it again.
const PLACES: [(&str, Fault, Meanwhile); 12] = [
    ("the greeting", at(Tag::Hello, 0), Meanwhile::Runs),
    ("the offer", at(Tag::Offer, 0), Meanwhile::Runs),
    ("its acceptance", at(Tag::Accept, 0), Meanwhile::Runs),
    ("the first layout", at(Tag::Layout, 0), Meanwhile::Runs),
    ("the first round", at(Tag::RoundEnd, 0), Meanwhile::Runs),
    ("the second round", at(Tag::RoundEnd, 1), Meanwhile::Runs),
    ("the last delta, frozen", Fault::HoldInLastDelta, Meanwhile::Runs),
    ("the image, frozen", at(Tag::Image, 0), Meanwhile::Runs),
    ("the digest, frozen", at(Tag::Verified, 0), Meanwhile::Runs),
    ("the commit", at(Tag::Commit, 0), Meanwhile::StaysFrozen),
    ("the activation", at(Tag::Activated, 0), Meanwhile::Runs),
    ("the end", at(Tag::Settled, 0), Meanwhile::Runs),
];

const fn at(tag: Tag, nth: usize) -> Fault {
    Fault::HoldAt { tag, nth }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    Runs,
    StaysFrozen,
}

#[test]
fn the_source_is_killed() -> anyhow::Result<()> {
    each_place("the_source_is_killed", |scene, proxy, meanwhile| {
        scene.a.kill_agent()?;
        proxy.cut();
        match meanwhile {
            Meanwhile::Runs => scene.client.wait_for_acks(50, LIMIT)?,
            Meanwhile::StaysFrozen => {
                let before = scene.client.acked();
                std::thread::sleep(Duration::from_millis(500));
                assert_eq!(scene.client.acked(), before, "a copy runs that was committed elsewhere");
            }
        }
        scene.a.start_agent()
    })
}

#[test]
fn the_destination_is_killed() -> anyhow::Result<()> {
    each_place("the_destination_is_killed", |scene, proxy, _| {
        scene.b.kill_agent()?;
        proxy.cut();
        scene.b.start_agent()
    })
}

#[test]
fn the_network_is_cut() -> anyhow::Result<()> {
    each_place("the_network_is_cut", |_, proxy, _| {
        proxy.break_down();
        std::thread::sleep(Duration::from_millis(200));
        proxy.heal();
        Ok(())
    })
}

/// For each place: holds a migration there, lets `happen` happen, and looks what is left.
fn each_place(
    test: &str,
    mut happen: impl FnMut(&mut Scene, &Proxy, Meanwhile) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    // Whoever has still to be told of an end is told through its proxy.
    let mut proxies = Vec::new();
    for (place, fault, meanwhile) in PLACES {
        let began = std::time::Instant::now();
        let proxy = Proxy::start(scene.a.netns(), scene.b.migrate_address().parse()?, fault)?;
        let migration = scene.a.migrate("redis", &proxy.address())?;
        proxy.wait_for_fault()?;
        happen(&mut scene, &proxy, meanwhile)?;
        proxies.push(proxy);
        drop(migration.end()?);
        let there = scene.runs_at_one_host()?;
        println!(
            "at {place}: it runs at {} ({:?})",
            if there { "the destination" } else { "the source" },
            began.elapsed()
        );
        // The next try.
        if !there {
            scene.a.migrate("redis", &scene.b.migrate_address())?.succeed()?;
        }
        scene.b.migrate("redis", &scene.a.migrate_address())?.succeed()?;
        scene.client.wait_for_acks(20, LIMIT)?;
    }
    wait_for("every journal to be closed", LIMIT, || {
        let open = [scene.a.open_journals()?, scene.b.open_journals()?].concat();
        Ok(open.is_empty().then_some(()))
    })?;
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
        let options = HostOptions { max_unavailability_ms: 3000, ..HostOptions::default() };
        let a = fleet.host("a", &options)?;
        let b = fleet.host("b", &options)?;
        a.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
        let data = DataSet::load(&fleet.client, SERVER, DATA_BYTES)?;
        let client = VerifyingClient::start(&fleet.client, SERVER, Duration::from_millis(1))?;
        client.wait_for_acks(50, LIMIT)?;
        Ok(Self { a, b, data, client, fleet })
    }

    /// Waits until exactly one host has it, with nothing left of it at the other; whether that is the destination.
    fn runs_at_one_host(&self) -> anyhow::Result<bool> {
        self.client.wait_for_acks(50, LIMIT)?;
        let there = wait_for("one copy at one host", LIMIT, || {
            let lists = [self.a.has_instance("redis")?, self.b.has_instance("redis")?];
            let runs = [self.a.has_processes()?, self.b.has_processes()?];
            Ok((lists == runs && lists[0] != lists[1]).then_some(lists[1]))
        })?;
        self.client.wait_for_acks(20, LIMIT)?;
        Ok(there)
    }

    fn nothing_is_lost(self) -> anyhow::Result<()> {
        let seen = self.client.finish(&self.fleet.client)?;
        println!("{seen:?}");
        assert_eq!(seen.lost_writes, 0);
        assert_eq!(self.data.wrong_keys(&self.fleet.client)?, 0);
        Ok(())
    }
}
