//! What the store promises: exact sums on every tier, retention, compare-and-set, and that a killed process loses nothing that it has
//! acknowledged.

#![allow(clippy::unwrap_used, reason = "a test that can't go on is to fail")]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use proptest::prelude::*;
use rswap_fleet::{
    HostName, Roll, Running,
    amounts::{Sum, Tier},
    maintenance::Seen,
};
use rswap_forecast::{ForecastConfig, Forecaster, Kin, Lessons, Observation, Part, Resource, Usage};
use rswap_store::{
    Entry, History, Knowledge, Maintenance, Member, Membership, Owner, OwnerChange, Ownership, Query, Store,
    StoreError, TIERS,
};
use rswap_types::{InstanceName, UnixMillis};

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn instance(name: &str) -> InstanceName {
    name.parse().unwrap()
}

fn entry(sequence: u64, at: u64, cores: f64) -> Entry {
    let mut sum = Sum::default();
    sum.add(Resource::Cpu, cores);
    let used = BTreeMap::from([(instance("web"), BTreeMap::from([(Resource::Cpu, sum)]))]);
    Entry { host: host("a"), epoch: 1, sequence, at: UnixMillis(at), used }
}

fn all(store: &Store, tier: usize) -> Vec<(UnixMillis, Sum)> {
    let query = Query {
        host: host("a"),
        instance: instance("web"),
        from: UnixMillis(0),
        to: UnixMillis(u64::MAX),
        tier,
    };
    store.read(&query).unwrap().into_iter().map(|(at, used)| (at, used[&Resource::Cpu])).collect()
}

fn total(store: &Store, tier: usize) -> Sum {
    all(store, tier).into_iter().fold(Sum::default(), |mut total, (_, sum)| {
        total.merge(&sum);
        total
    })
}

fn open(directory: &Path, tiers: &[Tier]) -> Store {
    Store::open(&directory.join("store"), tiers).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// In whatever batches, late and repeated: every tier has exactly what was sent, once.
    #[test]
    fn every_tier_has_exact_counts_and_sums(
        sent in prop::collection::vec((0u64..50_000_000, 0.0f64..64.0), 1..60), batch in 1usize..9, repeat in 0usize..60,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path(), &TIERS);
        let now = UnixMillis(3_600_000);
        let entries: Vec<Entry> = sent.iter().zip(1..).map(|(&(at, cores), sequence)| entry(sequence, at, cores)).collect();
        for batch in entries.chunks(batch) {
            prop_assert!(store.append(batch, now).unwrap().into_iter().all(|new| new));
        }
        let again = &entries[repeat.min(entries.len() - 1)..];
        prop_assert!(store.append(again, now).unwrap().into_iter().all(|new| !new));
        let mut expected = Sum::default();
        sent.iter().for_each(|(_, cores)| expected.add(Resource::Cpu, *cores));
        for tier in 0..TIERS.len() {
            prop_assert_eq!(total(&store, tier), expected);
        }
        let minutes = all(&store, 1);
        prop_assert!(minutes.iter().all(|(at, _)| at.0.is_multiple_of(60_000)));
        // Each row of an hour is the sum of its minutes.
        for (at, sum) in all(&store, 2) {
            let within = minutes.iter().filter(|(minute, _)| minute.0 / 3_600_000 == at.0 / 3_600_000);
            let of_minutes = within.fold(Sum::default(), |mut sum, (_, minute)| { sum.merge(minute); sum });
            prop_assert_eq!(of_minutes, sum);
        }
        let received = store.received(&host("a")).unwrap();
        prop_assert_eq!((received.taken, received.repeated), (sent.len() as u64, again.len() as u64));
    }
}

#[test]
fn each_tier_forgets_in_its_own_time() {
    let directory = tempfile::tempdir().unwrap();
    let tiers = [Tier { row_ms: 0, kept_ms: 100_000 }, Tier { row_ms: 60_000, kept_ms: 1_000_000 }];
    let store = open(directory.path(), &tiers);
    for (sequence, at) in (1..).zip((0..1_200_000).step_by(10_000)) {
        store.append(&[entry(sequence, at, 1.0)], UnixMillis(at)).unwrap();
    }
    assert_eq!((all(&store, 0).len(), all(&store, 1).len()), (120, 20));
    assert!(store.trim(UnixMillis(1_200_000)).unwrap() > 0);
    let first = |tier| all(&store, tier)[0].0;
    assert_eq!((all(&store, 0).len(), first(0)), (10, UnixMillis(1_100_000)));
    assert_eq!((all(&store, 1).len(), first(1)), (16, UnixMillis(240_000)));
    assert_eq!(store.trim(UnixMillis(1_200_000)).unwrap(), 0);
    // What comes later than it would be kept is acknowledged, and in no tier that has forgotten its time.
    assert_eq!(store.append(&[entry(1_000, 500_000, 1.0)], UnixMillis(1_200_000)).unwrap(), [true]);
    assert_eq!((all(&store, 0).len(), total(&store, 1).count), (10, 97));
    assert!(matches!(
        store.read(&Query {
            host: host("a"),
            instance: instance("web"),
            from: UnixMillis(0),
            to: UnixMillis(1),
            tier: 2
        }),
        Err(StoreError::Tier(2, 2))
    ));
}

#[test]
fn one_call_trims_all_hosts_of_a_large_fleet_and_they_stay_trimmed() {
    let directory = tempfile::tempdir().unwrap();
    let tiers = [Tier { row_ms: 0, kept_ms: 100_000 }, Tier { row_ms: 60_000, kept_ms: 1_000_000 }];
    // More than two times as many as are trimmed in one transaction, and not all of the last ones.
    let hosts: Vec<HostName> = (0..70).map(|number| host(&format!("h{number}"))).collect();
    let append = |store: &Store, sequence: u64, at: u64| {
        let of = |host: &HostName| Entry { host: host.clone(), ..entry(sequence, at, 1.0) };
        let entries: Vec<Entry> = hosts.iter().map(of).collect();
        assert_eq!(store.append(&entries, UnixMillis(at)).unwrap(), vec![true; hosts.len()]);
    };
    // When the rows of each host begin.
    let rows = |store: &Store, tier: usize| -> Vec<Vec<u64>> {
        let of = |host: &HostName| -> Vec<u64> {
            let (from, to) = (UnixMillis(0), UnixMillis(u64::MAX));
            let query = Query { host: host.clone(), instance: instance("web"), from, to, tier };
            store.read(&query).unwrap().into_iter().map(|(at, _)| at.0).collect()
        };
        hosts.iter().map(of).collect()
    };
    let store = open(directory.path(), &tiers);
    assert_eq!(store.trim(UnixMillis(1_000_000)).unwrap(), 0, "nothing is there yet");
    append(&store, 1, 1_000_000);
    append(&store, 2, 1_150_000);
    assert_eq!(rows(&store, 0), vec![vec![1_000_000, 1_150_000]; hosts.len()]);
    assert_eq!(store.trim(UnixMillis(1_200_000)).unwrap(), hosts.len() as u64);
    assert_eq!(rows(&store, 0), vec![vec![1_150_000]; hosts.len()]);
    // On the disk with the next append.
    append(&store, 3, 1_200_000);
    drop(store);
    let store = open(directory.path(), &tiers);
    assert_eq!(rows(&store, 0), vec![vec![1_150_000, 1_200_000]; hosts.len()]);
    let minutes = vec![960_000, 1_140_000, 1_200_000];
    assert_eq!(rows(&store, 1), vec![minutes; hosts.len()], "they are kept for longer");
    assert_eq!(store.trim(UnixMillis(1_200_000)).unwrap(), 0);
}

#[test]
fn members_owners_and_lives_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), &TIERS);
    let now = UnixMillis::now().0;
    let (first, second) = (store.new_life().unwrap(), store.new_life().unwrap());
    assert!(first >= now, "later than any life in a file that was lost: {first}");
    assert!(second > first);
    let member = Member { joined: UnixMillis(7), drained: true, undo: false };
    store.put_members(&[(host("a"), member), (host("b"), Member::default())]).unwrap();
    store.remove_member(&host("b")).unwrap();
    let on =
        |at: &str| Owner { host: host(at), local: instance("web"), since: UnixMillis(1), before: Vec::new() };
    let set = |store: &Store, expected: Option<&Owner>, new: Option<&Owner>| {
        let (expected, new) = (expected.cloned(), new.cloned());
        let change = OwnerChange { instance: instance("web"), expected, new };
        store.compare_and_set(&[change]).unwrap() == [true]
    };
    assert!(set(&store, None, Some(&on("a"))));
    assert!(!set(&store, None, Some(&on("b"))), "it is a's");
    assert!(!set(&store, Some(&on("c")), Some(&on("b"))));
    assert!(set(&store, Some(&on("a")), Some(&on("b"))));
    assert!(Store::open(&directory.path().join("store"), &TIERS).is_err(), "no second one may write");
    drop(store);

    let store = open(directory.path(), &TIERS);
    assert!(store.new_life().unwrap() > second);
    assert_eq!(store.members().unwrap(), BTreeMap::from([(host("a"), member)]));
    assert_eq!(store.owner(&instance("web")).unwrap(), Some(on("b")));
    assert_eq!(store.owners().unwrap().len(), 1);
    assert!(set(&store, Some(&on("b")), None));
    assert_eq!(store.owner(&instance("web")).unwrap(), None);
}

#[test]
fn what_is_no_store_is_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    std::fs::write(&path, "something else that somebody needs").unwrap();
    assert!(matches!(Store::open(&path, &TIERS), Err(StoreError::Open { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"something else that somebody needs");
}

#[test]
fn a_roll_is_kept_as_it_is_until_it_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let mut roll = Roll::new([host("a"), host("b")], 1, 1_000);
    let store = open(directory.path(), &TIERS);
    assert_eq!(store.roll().unwrap(), None);
    store.put_roll(Some(&roll)).unwrap();
    drop(store);
    let running = Some(Running { version: "1".to_owned(), boot: "x".to_owned() });
    let seen = Seen { present: true, draining: true, heard: UnixMillis(2), running, ..Seen::default() };
    roll.round(&[(host("a"), seen.clone())].into(), UnixMillis(0), UnixMillis(1));
    roll.round(&[(host("a"), seen)].into(), UnixMillis(0), UnixMillis(2));
    let store = open(directory.path(), &TIERS);
    assert_ne!(store.roll().unwrap().as_ref(), Some(&roll));
    store.put_roll(Some(&roll)).unwrap();
    assert_eq!(store.roll().unwrap(), Some(roll));
    store.put_roll(None).unwrap();
    assert_eq!(store.roll().unwrap(), None);
}

fn lessons(class: &str) -> Lessons {
    let config = ForecastConfig { horizons_ms: vec![2_000], min_seen: 20 };
    let mut forecaster = Forecaster::new(config, 1_000);
    let kin = Kin { class: class.to_owned(), identity: "a".to_owned() };
    forecaster.introduce(&instance("a"), kin, 1);
    for window in 1..=100 {
        let usage = Usage { reference_cores: 1.0, memory_bytes: 1e8, ..Usage::default() };
        let at = UnixMillis(window * 1_000);
        forecaster.observe(&Observation { instance: &instance("a"), at, usage });
    }
    forecaster.lessons()
}

#[test]
fn what_was_taught_is_kept_until_it_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path(), &TIERS);
    let part = |class: &str| Part::Class(class.to_owned());
    let of = |class: &str| (part(class), lessons(class).part(&part(class)));
    store.drop_lessons(&[(host("a"), part("web"))]).unwrap();
    store.put_lessons(&[(host("a"), vec![of("web"), of("db")]), (host("b"), vec![of("web")])]).unwrap();
    let kept = |store: &Store| {
        let all = store.lessons().unwrap().into_iter();
        all.map(|(host, part, _)| (host, part)).collect::<Vec<_>>()
    };
    assert_eq!(kept(&store).len(), 3);
    store.drop_lessons(&[(host("a"), part("web")), (host("c"), part("web"))]).unwrap();
    // On the disk with the next append.
    store.append(&[entry(1, 1_000, 1.0)], UnixMillis(1_000)).unwrap();
    drop(store);
    let store = open(directory.path(), &TIERS);
    assert_eq!(kept(&store), [(host("a"), part("db")), (host("b"), part("web"))]);
}

const CHILD: &str = "RSWAP_STORE_TEST";

/// Not a test by itself: what the next one kills. It appends for ever and says what was acknowledged.
#[test]
fn child_that_appends() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let store = open(Path::new(&directory), &TIERS);
    let mut sequence = store.received(&host("a")).unwrap().last(1);
    loop {
        let batch: Vec<Entry> =
            (1..=3).map(|more| entry(sequence + more, (sequence + more) * 10_000, 1.0)).collect();
        store.append(&batch, UnixMillis(0)).unwrap();
        sequence += 3;
        println!("acknowledged {sequence}");
    }
}

#[test]
fn a_process_killed_while_it_writes_loses_nothing_that_it_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let mut before = 0;
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_appends", "--nocapture"])
            .env(CHILD, directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let reader = thread::spawn(move || {
            let lines = BufReader::new(out).lines().map_while(Result::ok);
            // The harness says its own word before the first one.
            let said = lines.filter_map(|line| line.split_once("acknowledged ")?.1.parse::<u64>().ok());
            said.max()
        });
        thread::sleep(Duration::from_millis(150 + fastrand::u64(0..250)));
        child.kill().unwrap();
        child.wait().unwrap();
        let acknowledged = reader.join().unwrap().unwrap_or(before);
        let store = open(directory.path(), &TIERS);
        let received = store.received(&host("a")).unwrap();
        let last = received.last(1);
        assert!(last >= acknowledged, "round {round}: {acknowledged} acknowledged, {last} kept");
        assert!(last <= acknowledged + 3, "at most the batch that was not acknowledged is there too");
        assert!(last.is_multiple_of(3), "a batch is there as a whole or not at all");
        // All three tiers, and what was received, say the same.
        for tier in 0..TIERS.len() {
            assert_eq!(total(&store, tier).count, last, "round {round}, tier {tier}");
        }
        assert_eq!((received.skipped, received.repeated), (0, 0));
        before = last;
    }
    assert!(before > 100, "too little was written for this to be a test: {before}");
}
