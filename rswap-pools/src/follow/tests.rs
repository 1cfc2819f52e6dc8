//! What pools become from one look to the next.

use std::{fs, io};

use super::*;
use crate::{
    LocalKind, Member, Room,
    discover::tests::{Machine, half_full, server, wanted},
};

fn states(found: &Inventory, names: &[&str]) -> Vec<&'static str> {
    names.iter().map(|name| found.pool(name).map_or("forgotten", |pool| pool.state.word())).collect()
}

/// Rates are of the time between two looks.
#[test]
fn what_is_used_is_reckoned_between_two_looks() {
    let machine = server();
    let count = |cpu: u64, disk: u64, sent: u64| {
        machine.write(
            "/proc/stat",
            &format!("cpu0 {cpu} 0 0 100\ncpu1 0 0 0 100\ncpu2 0 0 0 100\ncpu3 0 0 0 100\n"),
        );
        machine.write("/proc/diskstats", &format!("252 0 dm-0 1 0 8 1 1 0 8 1 0 {disk} 2\n"));
        machine.write("/sys/class/net/eth0/statistics/rx_bytes", "7\n");
        machine.write("/sys/class/net/eth0/statistics/tx_bytes", &format!("{sent}\n"));
    };
    count(0, 100, 0);
    let before = machine.discover(&Settings::default(), 1000);
    count(100, 600, 250_000_000);
    // All ticks of CPU 0 were in use; the others' counters did not move, as of CPUs that are asleep.
    let now = follow(&before, machine.discover(&Settings::default(), 2000), &Settings::default());
    let value = |known: &Option<Known>| known.as_ref().map(|known| known.value);
    assert_eq!(value(&now.pool("cores").unwrap().used), Some(1.0));
    assert_eq!(value(&now.pool("fs:/").unwrap().busy), Some(0.5));
    let link = now.pool("link:eth0").unwrap();
    assert_eq!((value(&link.used), value(&link.free)), (Some(2e9), Some(23e9)));
    assert_eq!(now.pool("link:br0").unwrap().used, None, "it counts nothing");
}

#[test]
fn a_class_that_loses_cores_is_degraded_and_comes_back() {
    let machine = server();
    let settings = Settings::default();
    let look = |online: &str, before: &Inventory, at| {
        machine.write("/sys/devices/system/cpu/online", online);
        follow(before, machine.discover(&settings, at), &settings)
    };
    let whole = look("0-3\n", &Inventory::default(), 1);
    let less = look("0-1,3\n", &whole, 2);
    let cores = less.pool("cores").unwrap();
    assert_eq!(cores.state, State::Degraded { reason: "CPU 2 is not online".into() });
    assert_eq!((cores.kind.cpus().unwrap().len(), cores.capacity.as_ref().unwrap().value), (4, 3.0));
    let still = look("0-1,3\n", &less, 3);
    assert_eq!(states(&still, &["cores"]), ["degraded"]);
    assert_eq!(look("0-3\n", &still, 4).pools, whole.pools);
}

#[test]
fn what_a_package_is_made_of_is_read_again_when_cpus_come_and_go() {
    let machine = server();
    let settings = Settings::default();
    let look = |before: &Inventory| machine.discover_again(&settings, 2, before);
    let of = |found: &Inventory| match &found.pool("cores").unwrap().kind {
        LocalKind::Cores { cores, .. } => (cores[0].core_id, cores[0].limit_khz),
        other => panic!("{other:?}"),
    };
    let first = look(&Inventory::default());
    assert_eq!(look(&first).pools, machine.discover(&settings, 2).pools);
    machine.write("/sys/devices/system/cpu/cpu0/topology/core_id", "77\n");
    machine.write("/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq", "1234000\n");
    assert_eq!(of(&look(&first)), (of(&first).0, Some(1_234_000)));
    machine.write("/sys/devices/system/cpu/online", "0-2\n");
    let less = look(&first);
    assert_eq!(of(&less).0, Some(77));
    assert_eq!(of(&look(&less)).0, Some(77));
}

#[test]
fn what_vanishes_is_gone_and_comes_back_or_is_forgotten() {
    let machine = server();
    let settings =
        Settings { pools: vec![wanted("data", Member::Link("br0".into()))], ..Settings::default() };
    let first = machine.discover(&settings, 1);
    let mounts = fs::read_to_string(machine.path("/proc/self/mountinfo")).unwrap();
    machine.write("/proc/self/mountinfo", "");
    machine.write("/proc/swaps", "");
    fs::remove_dir_all(machine.path("/sys/class/net/br0")).unwrap();
    fs::remove_dir_all(machine.path("/sys/devices/system/node/node2")).unwrap();
    let names = ["fs:/", "swap:/swap", "data", "memory-2", "cores"];
    let second = follow(&first, machine.discover(&settings, 10), &settings);
    assert_eq!(states(&second, &names), ["gone", "gone", "gone", "gone", "online"]);
    let third = follow(&second, machine.discover(&settings, 10 + GONE_KEPT_MS), &settings);
    let State::Gone { since, .. } = &third.pool("fs:/").unwrap().state else { panic!() };
    assert_eq!(*since, UnixMillis(10), "since the first look that missed it");
    let State::Gone { since, .. } = &third.pool("data").unwrap().state else { panic!() };
    assert_eq!(*since, UnixMillis(10));
    let fourth = follow(&third, machine.discover(&settings, 11 + GONE_KEPT_MS), &settings);
    assert_eq!(states(&fourth, &names), ["forgotten", "forgotten", "gone", "forgotten", "online"]);
    machine.write("/proc/self/mountinfo", &mounts);
    let back = follow(&third, machine.discover(&settings, 20), &settings);
    assert_eq!(states(&back, &["fs:/"]), ["online"]);
}

#[test]
fn a_full_file_system_is_usable_again_only_with_room_to_spare() {
    let machine = server();
    let settings = Settings { full_below_share: 0.1, ..Settings::default() };
    let look = |percent: u64, before: &Inventory| {
        let room = |_: &std::path::Path| -> io::Result<Room> {
            Ok(Room { available_bytes: half_full().size_bytes / 100 * percent, ..half_full() })
        };
        follow(before, machine.discover_with(&settings, 1, &room), &settings)
    };
    let start = look(11, &Inventory::default());
    assert_eq!(states(&start, &["fs:/"]), ["online"]);
    let full = look(9, &start);
    assert_eq!(states(&full, &["fs:/"]), ["full"]);
    let wavering = look(11, &full);
    assert_eq!(states(&wavering, &["fs:/"]), ["full"]);
    assert_eq!(states(&look(13, &wavering), &["fs:/"]), ["online"]);
}

#[test]
fn a_file_system_that_does_not_answer_is_unknown() {
    let refused = |_: &std::path::Path| Err(io::Error::other("stale"));
    let found = server().discover_with(&Settings::default(), 1, &refused);
    assert_eq!(found.pool("fs:/").unwrap().capacity, None);
    let _ = follow(&Inventory::default(), found, &Settings::default());
    let empty = Machine::new().discover(&Settings::default(), 1);
    let _ = follow(&empty, server().discover(&Settings::default(), 2), &Settings::default());
}
