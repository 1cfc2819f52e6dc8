//! Databases whose directories move between a fast disk and a slow one while clients write: nothing acknowledged is lost, and no
//! connection breaks.

use std::{fs, net::Ipv4Addr, time::Duration};

use anyhow::ensure;
use rswap_tests::{
    client::VerifyingClient,
    converse::converse,
    moves::{LIMIT, START_LIMIT, finish},
    postgres, reason_to_skip,
    served_disk::Speed,
    storage::{Disk, StorageScene},
    wait_for,
};

const MIB: u64 = 1 << 20;
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
/// There and back, five times each.
const SWAPS: usize = 10;
/// What each request takes on the disk of pool `two`: contents, journal and flushes.
const SLOW: Duration = Duration::from_millis(4);

/// A file on the disk of this machine, and a disk that is slow.
fn disks(bytes: u64) -> [Disk; 2] {
    [Disk::of(bytes), Disk::slow(bytes, Speed::of(SLOW))]
}

/// Moves the volume [`SWAPS`] times; `goes_on` must succeed after each.
fn there_and_back(
    scene: &StorageScene,
    mut goes_on: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for pool in ["one", "two"].into_iter().cycle().take(SWAPS) {
        let report = scene.moved(pool)?.map_err(anyhow::Error::msg)?;
        println!(
            "unavailable {:.1} ms, {} re-homed: {:?}",
            report.unavailability_ms, report.rehomed, report.freeze_steps_ms
        );
        goes_on()?;
        scene.is_on(Some(pool))?;
        scene.nothing_is_left()?;
    }
    let requests = scene.disks[1].requests()?;
    println!("{requests} requests on the slow disk");
    ensure!(requests > 100, "the slow disk was hardly used");
    Ok(())
}

#[test]
fn sqlite_in_wal_mode_loses_nothing() -> anyhow::Result<()> {
    if reason_to_skip("sqlite_in_wal_mode_loses_nothing").is_some() {
        return Ok(());
    }
    let scene = StorageScene::set_on(disks(256 * MIB), 3000)?;
    scene.python("sqlite_wal", &["0.002"])?;
    there_and_back(&scene, || scene.goes_on())
}

#[test]
fn the_sum_holds_through_ten_swaps() -> anyhow::Result<()> {
    if reason_to_skip("the_sum_holds_through_ten_swaps").is_some() {
        return Ok(());
    }
    let scene = StorageScene::set_on(disks(512 * MIB), 3000)?;
    let command = postgres::command(&scene.path, "off")?;
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    scene.run_with(&["--net", &format!("{SERVER}/24")], &words)?;
    postgres::make_tables(&scene.fleet.client, SERVER)?;
    let client = converse(&scene.fleet.client, (SERVER, postgres::PORT).into(), 4, postgres::transfer)?;
    client.wait_for(50, LIMIT)?;
    let moved = there_and_back(&scene, || client.wait_for(50, LIMIT));
    let talked = finish("postgres", client);
    moved.and(talked)
}

#[test]
fn redis_loses_no_acknowledged_write_with_an_append_only_file() -> anyhow::Result<()> {
    if reason_to_skip("redis_loses_no_acknowledged_write_with_an_append_only_file").is_some() {
        return Ok(());
    }
    let scene = StorageScene::set_on(disks(256 * MIB), 3000)?;
    let (path, net) = (scene.path.to_string_lossy().into_owned(), format!("{SERVER}/24"));
    let server = ["redis-server", "--dir", &path, "--appendonly", "yes", "--appendfsync", "everysec"];
    let options = ["--save", "", "--protected-mode", "no"];
    scene.run_with(&["--net", &net], &[&server[..], &options[..]].concat())?;
    let knock = || {
        let address = (SERVER, 6379).into();
        let limit = Duration::from_secs(1);
        wait_for("Redis", START_LIMIT, || {
            Ok(std::net::TcpStream::connect_timeout(&address, limit).ok().map(drop))
        })
    };
    let knocking = scene.fleet.client.spawn("knock", knock)?;
    knocking.join().map_err(|_| anyhow::anyhow!("the one who knocked panicked"))??;
    let client = VerifyingClient::start(&scene.fleet.client, SERVER, Duration::from_millis(1))?;
    client.wait_for_acks(200, LIMIT)?;
    there_and_back(&scene, || client.wait_for_acks(200, LIMIT))?;
    let seen = client.finish(&scene.fleet.client)?;
    println!("{seen:?}");
    ensure!(seen.lost_writes == 0, "{} writes are lost", seen.lost_writes);
    let files = fs::read_dir(fs::canonicalize(scene.place())?.join("appendonlydir"))?.flatten();
    let bytes: u64 = files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum();
    ensure!(bytes > 10_000, "the append-only file has only {bytes} bytes");
    Ok(())
}
