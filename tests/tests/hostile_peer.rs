//! Peers that have the key of a host, and lie, mangle, dawdle and drip: they cost time, and neither memory nor the instance.
//! (Those that have none: `links.rs`.)

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Duration,
};

use anyhow::Context;
use fastrand::Rng;
use rswap_agent::migrate::wire::{self, Hello, Tag, read_frame, write_frame};
use rswap_tests::{
    Fleet, Host, HostOptions,
    client::{DataSet, REDIS, VerifyingClient},
    mangle::bytes,
    proxy::{Fault, Proxy},
    reason_to_skip,
    tls::Secured,
    wait_for,
};
use rswap_trust::Files;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 2 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// What hostile peers may cost an agent for a while, in KiB.
const MEMORY_KIB: u64 = 96 << 10;

#[test]
fn mangled_frames_never_harm_the_instance() -> anyhow::Result<()> {
    if reason_to_skip("mangled_frames_never_harm_the_instance").is_some() {
        return Ok(());
    }
    let scene = Scene::set(2)?;
    let mut proxies = Vec::new();
    for seed in 1..=8 {
        let proxy = Proxy::start(&scene.a, scene.b()?, Fault::Mangle(seed))?;
        let ended = scene.a.migrate("redis", &proxy.address())?.end()?;
        println!("seed {seed}: {ended:?}");
        proxies.push(proxy);
        let there = wait_for("one copy at one host", LIMIT, || {
            let lists = [scene.a.has_instance("redis")?, scene.b()?.has_instance("redis")?];
            let runs = [scene.a.has_processes()?, scene.b()?.has_processes()?];
            Ok((lists == runs && lists[0] != lists[1]).then_some(lists[1]))
        })?;
        scene.client.wait_for_acks(20, LIMIT)?;
        if there {
            scene.b()?.migrate("redis", &scene.a.migrate_address())?.succeed()?;
        }
    }
    scene.ends_well()
}

#[test]
fn a_destination_that_lies_gets_nothing() -> anyhow::Result<()> {
    if reason_to_skip("a_destination_that_lies_gets_nothing").is_some() {
        return Ok(());
    }
    let scene = Scene::set(2)?;
    for lie in [Lie::WrongDigest, Lie::VerifiedAtOnce, Lie::AnotherMigration, Lie::Nonsense, Lie::Drips] {
        let liar = scene.liar(lie)?;
        let reason = scene.a.migrate("redis", &liar.to_string())?.end()?.expect_err("it went to a liar");
        println!("{lie:?}: {reason}");
        scene.client.wait_for_acks(20, LIMIT)?;
        assert!(scene.a.has_instance("redis")?);
    }
    scene.ends_well()
}

#[test]
fn sources_that_lie_and_drip_cost_little() -> anyhow::Result<()> {
    if reason_to_skip("sources_that_lie_and_drip_cost_little").is_some() {
        return Ok(());
    }
    let scene = Scene::set(2)?;
    let destination: SocketAddr = scene.b()?.migrate_address().parse()?;
    let before = resident_kib(scene.b()?)?;
    let files = scene.a.files().clone();
    let hostile = scene.fleet.client.spawn("hostile sources", move || {
        for seed in 0..300 {
            // What the peer thinks of it is its own matter: it closes early.
            let _ = send_nonsense(destination, &files, seed);
        }
        // More than are served at a time, each saying that much will come.
        let mut slow = Vec::new();
        for _ in 0..40 {
            // Some are turned away before the handshake is over.
            let Ok(mut stream) = Secured::dial(destination, &files) else { continue };
            let _ = greet(&mut stream).and_then(|()| announce(&mut stream, Tag::Offer, 4 << 20));
            slow.push(stream);
        }
        for _ in 0..40 {
            for stream in &mut slow {
                let _ = stream.write_all(&[7; 64]);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(slow.len())
    })?;
    let mut most = before;
    while !hostile.is_finished() {
        most = most.max(resident_kib(scene.b()?)?);
        std::thread::sleep(Duration::from_millis(20));
    }
    let slow = hostile.join().map_err(|_| anyhow::anyhow!("the hostile sources panicked"))??;
    assert!(slow >= 20, "only {slow} were taken: that is no crowd");
    println!("resident: {before} KiB before, {most} KiB at most");
    assert!(most < before + MEMORY_KIB, "hostile sources cost {} KiB", most - before);
    assert!(!scene.b()?.has_processes()?, "a hostile source left processes");
    scene.ends_well()
}

/// Frames that are none, in an order that is none.
fn send_nonsense(destination: SocketAddr, files: &Files, seed: u64) -> anyhow::Result<()> {
    let mut random = Rng::with_seed(seed);
    let mut stream = Secured::dial(destination, files)?;
    stream.stream().set_read_timeout(Some(Duration::from_millis(200)))?;
    stream.stream().set_write_timeout(Some(Duration::from_secs(2)))?;
    if random.u32(..4) > 0 {
        greet(&mut stream)?;
    }
    for _ in 0..random.u32(..6) {
        let len = random.usize(..4096);
        let (tag, payload) = (random.u8(..20), bytes(&mut random, len));
        let announced = if random.u32(..3) == 0 { random.u32(..) } else { len as u32 };
        stream.write_all(&[&[tag][..], &announced.to_le_bytes(), &payload].concat())?;
    }
    let _ = stream.read(&mut [0; 64]);
    Ok(())
}

fn greet(stream: &mut Secured) -> anyhow::Result<()> {
    write_frame(stream, Tag::Hello, &hello())?;
    Ok(())
}

fn announce(stream: &mut Secured, tag: Tag, len: u32) -> anyhow::Result<()> {
    Ok(stream.write_all(&[&[tag as u8][..], &len.to_le_bytes()].concat())?)
}

/// A [`Hello`] as it is on the wire (postcard: the magic, then the versions, all as varints).
fn hello() -> Vec<u8> {
    fn varint(mut number: u32, bytes: &mut Vec<u8>) {
        while number >= 0x80 {
            bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        bytes.push(number as u8);
    }
    let Hello { magic, versions: (oldest, newest) } = Hello::ours();
    let mut bytes = Vec::new();
    for number in [magic, oldest.into(), newest.into()] {
        varint(number, &mut bytes);
    }
    bytes
}

/// What a destination says that isn't true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    WrongDigest,
    VerifiedAtOnce,
    AnotherMigration,
    Nonsense,
    /// It sends its digest, a byte at a time, and is never done.
    Drips,
}

fn lie_to(mut stream: Secured, lie: Lie) -> anyhow::Result<()> {
    stream.stream().set_read_timeout(Some(Duration::from_secs(20)))?;
    read_frame(&mut stream)?;
    greet(&mut stream)?;
    let offer = read_frame(&mut stream)?;
    let (id, _) = wire::parse_offer(&offer.payload)?;
    match lie {
        Lie::VerifiedAtOnce => {
            write_frame(&mut stream, Tag::Verified, &[0; 16])?;
            return Ok(());
        }
        Lie::AnotherMigration => {
            write_frame(&mut stream, Tag::Accept, &(!id.0).to_le_bytes())?;
            return Ok(());
        }
        Lie::Nonsense => {
            stream.write_all(&bytes(&mut Rng::with_seed(1), 1000))?;
            return Ok(());
        }
        Lie::WrongDigest | Lie::Drips => {
            write_frame(&mut stream, Tag::Accept, &id.0.to_le_bytes())?;
        }
    }
    loop {
        match read_frame(&mut stream)?.tag {
            Tag::RoundEnd => drop(write_frame(&mut stream, Tag::RoundAck, &[])?),
            Tag::Image if lie == Lie::WrongDigest => {
                write_frame(&mut stream, Tag::Verified, &[7; 16])?;
                return Ok(());
            }
            Tag::Image => {
                for byte in [&[Tag::Verified as u8, 16, 0, 0, 0][..], &[0; 15]].concat() {
                    stream.write_all(&[byte])?;
                    std::thread::sleep(Duration::from_millis(700));
                }
                return Ok(());
            }
            _ => {}
        }
    }
}

fn resident_kib(host: &Host) -> anyhow::Result<u64> {
    let pid = host.agent_pid().context("no agent runs")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.split_whitespace().next().unwrap_or_default().parse()?)
}

/// A Redis with data on the first of some hosts, and a client that writes.
struct Scene {
    a: Host,
    others: Vec<Host>,
    data: DataSet,
    client: VerifyingClient,
    fleet: Fleet,
}

impl Scene {
    fn set(hosts: usize) -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let options =
            HostOptions { freeze_limit_ms: 4000, max_unavailability_ms: 2000, ..HostOptions::default() };
        let a = fleet.host("a", &options)?;
        let others = (1..hosts).map(|n| fleet.host(&format!("b{n}"), &options)).collect::<Result<_, _>>()?;
        a.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
        let data = DataSet::load(&fleet.client, SERVER, DATA_BYTES)?;
        let client = VerifyingClient::start(&fleet.client, SERVER, Duration::from_millis(1))?;
        client.wait_for_acks(20, LIMIT)?;
        Ok(Self { a, others, data, client, fleet })
    }

    fn b(&self) -> anyhow::Result<&Host> {
        self.others.first().context("there is one host only")
    }

    /// A destination that lies to one source; where it is.
    fn liar(&self, lie: Lie) -> anyhow::Result<SocketAddr> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let files = self.b()?.files().clone();
        self.a.netns().spawn("liar", move || {
            let listener = TcpListener::bind(("127.0.0.1", 0))?;
            sender.send(listener.local_addr()?)?;
            let (stream, _) = listener.accept()?;
            // The source ends the conversation when it has heard enough.
            drop(Secured::accepted(stream, &files).and_then(|stream| lie_to(stream, lie)));
            Ok(())
        })?;
        Ok(receiver.recv_timeout(LIMIT)?)
    }

    /// The next try succeeds, and nothing was lost.
    fn ends_well(self) -> anyhow::Result<()> {
        let b = self.b()?;
        wait_for("the next migration to succeed", LIMIT, || {
            let ended = self.a.migrate("redis", &b.migrate_address())?.end()?;
            Ok(ended.inspect_err(|reason| println!("{reason}")).ok())
        })?;
        self.client.wait_for_acks(20, LIMIT)?;
        let seen = self.client.finish(&self.fleet.client)?;
        println!("{seen:?}");
        assert_eq!(seen.lost_writes, 0);
        assert_eq!(self.data.wrong_keys(&self.fleet.client)?, 0);
        Ok(())
    }
}
