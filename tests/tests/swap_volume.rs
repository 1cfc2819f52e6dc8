//! A volume moves between two file systems while its program runs, and the program finds all as it left it.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::ensure;
use rswap_tests::{
    loop_device::FileSystem,
    reason_to_skip,
    storage::{Disk, StorageScene},
    wait_for,
};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(20);

/// XFS and btrfs are made no smaller.
const OTHER_BYTES: u64 = 320 * MIB;

/// From one file system to the other, of every kind, and back.
#[test]
fn a_program_that_does_everything_in_its_volume_finds_it_as_it_left_it() -> anyhow::Result<()> {
    if reason_to_skip("a_program_that_does_everything_in_its_volume_finds_it_as_it_left_it").is_some() {
        return Ok(());
    }
    let disks = [
        Disk::of(256 * MIB),
        Disk::with(FileSystem::Xfs, OTHER_BYTES),
        Disk::with(FileSystem::Btrfs, OTHER_BYTES),
    ];
    let scene = StorageScene::set_on(disks, 3000)?;
    scene.python("volume", &["0.005", "8000000"])?;
    scene.is_on(None)?;
    for pool in ["one", "two", "three", "one"] {
        scene.moves(pool)?;
        scene.nothing_is_left()?;
    }
    Ok(())
}

#[test]
fn descriptors_locks_mappings_and_deleted_files_are_re_homed() -> anyhow::Result<()> {
    if reason_to_skip("descriptors_locks_mappings_and_deleted_files_are_re_homed").is_some() {
        return Ok(());
    }
    let disks = [Disk::of(256 * MIB), Disk::with(FileSystem::Btrfs, OTHER_BYTES)];
    let scene = StorageScene::set_on(disks, 3000)?;
    scene.python("rehomed", &["0.005"])?;
    scene.is_on(None)?;
    for pool in ["one", "two", "one"] {
        scene.moves(pool)?;
        scene.nothing_is_left()?;
    }
    Ok(())
}

/// Its blocks are shared, not copied; what changes afterwards changes in one of both.
#[test]
fn a_volume_that_stays_on_its_file_system_shares_its_blocks() -> anyhow::Result<()> {
    if reason_to_skip("a_volume_that_stays_on_its_file_system_shares_its_blocks").is_some() {
        return Ok(());
    }
    let disks = [Disk::with(FileSystem::Btrfs, OTHER_BYTES), Disk::with(FileSystem::Xfs, OTHER_BYTES)];
    let scene = StorageScene::set_on(disks, 3000)?;
    let bytes = 16_000_000;
    scene.python("volume", &["0.005", &bytes.to_string()])?;
    for pool in ["one", "two"] {
        let copied = scene.moves(pool)?;
        ensure!(copied.bytes_shared == 0 && copied.bytes_copied > bytes, "{copied:?}");
        for _ in 0..2 {
            let shared = scene.moves(pool)?;
            println!("{} bytes copied, {} shared", shared.bytes_copied, shared.bytes_shared);
            ensure!(shared.bytes_shared > bytes * 9 / 10, "{shared:?}");
            ensure!(shared.bytes_copied < copied.bytes_copied / 2, "{shared:?}");
        }
    }
    scene.nothing_is_left()
}

/// Also with writes that no time tells of, and that no page of the cache shows; on ext4, where the kernel tells what is written, and
/// where files are read whole instead.
#[test]
fn no_way_to_write_is_missed() -> anyhow::Result<()> {
    let test = "no_way_to_write_is_missed";
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let disks = [
        Disk::of(256 * MIB),
        Disk::of(256 * MIB),
        Disk::with(FileSystem::Xfs, OTHER_BYTES),
        Disk::with(FileSystem::Btrfs, OTHER_BYTES),
    ];
    let scene = StorageScene::set_on(disks, 3000)?;
    let seed = std::time::UNIX_EPOCH.elapsed()?.subsec_nanos().to_string();
    println!("seed {seed}");
    scene.python("ways_to_write", &["0.0005", &seed])?;
    for pool in ["one", "two", "one", "two", "three", "four", "one", "four"] {
        scene.moves(pool)?;
        std::thread::sleep(Duration::from_millis(200));
    }
    scene.nothing_is_left()
}

#[test]
fn a_disk_that_fills_leaves_the_volume_where_it_was() -> anyhow::Result<()> {
    if reason_to_skip("a_disk_that_fills_leaves_the_volume_where_it_was").is_some() {
        return Ok(());
    }
    let scene = StorageScene::set([256 * MIB, 48 * MIB])?;
    scene.python("volume", &["0.005", "16000000"])?;
    scene.moves("one")?;
    // Too little for all of it, and said before anything is copied.
    let filler: PathBuf = scene.disks[1].mount_point().join("filler");
    fs::write(&filler, vec![1; 30 << 20])?;
    let reason = scene.moved("two")?.expect_err("it has no room");
    ensure!(reason.contains("no room"), "{reason}");
    scene.goes_on()?;
    scene.is_on(Some("one"))?;
    // What has room when it is looked at, and none when it is copied.
    fs::remove_file(&filler)?;
    let disk = scene.disks[1].mount_point().to_owned();
    let swap = std::thread::scope(|scope_of_threads| -> anyhow::Result<_> {
        let moving = scope_of_threads.spawn(|| scene.moved("two"));
        wait_for("the copy to begin", LIMIT, || {
            let arriving = fs::read_dir(disk.join("rswap")).into_iter().flatten().flatten();
            Ok(arriving
                .map(|entry| entry.file_name())
                .any(|n| n.to_string_lossy().starts_with(".arr"))
                .then_some(()))
        })?;
        let file = fs::File::create(&filler)?;
        let mut bytes = 48 * MIB;
        // All that is left but what was copied meanwhile.
        while bytes > MIB / 2
            && nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, bytes as i64).is_err()
        {
            bytes -= MIB / 4;
        }
        moving.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    let reason = swap.expect_err("the disk is full");
    println!("{reason}");
    scene.goes_on()?;
    scene.is_on(Some("one"))?;
    ensure!(!reason.contains("no room"), "the disk was filled too early");
    fs::remove_file(&filler)?;
    scene.moves("two").map(drop)
}

/// The failure comes after the commit, when descriptors are on the new copy already.
#[test]
fn a_mapping_that_can_not_be_made_leads_back_to_the_old_copy() -> anyhow::Result<()> {
    if reason_to_skip("a_mapping_that_can_not_be_made_leads_back_to_the_old_copy").is_some() {
        return Ok(());
    }
    let scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.python("limited", &[])?;
    for _ in 0..2 {
        let reason = scene.moved("one")?.expect_err("there is no room for the mapping");
        ensure!(reason.contains("mmap") && !reason.contains("way back failed"), "{reason}");
        scene.goes_on()?;
        scene.is_on(None)?;
        scene.nothing_is_left()?;
    }
    fs::write(scene.log.with_extension("log.free"), "")?;
    scene.goes_on()?;
    for pool in ["one", "two"] {
        scene.moves(pool)?;
    }
    Ok(())
}

#[test]
fn what_can_not_be_re_homed_is_refused_by_its_name() -> anyhow::Result<()> {
    if reason_to_skip("what_can_not_be_re_homed_is_refused_by_its_name").is_some() {
        return Ok(());
    }
    let scene = StorageScene::set([64 * MIB, 64 * MIB])?;
    scene.python("refused_in_volume", &[])?;
    let reason = scene.moved("one")?.expect_err("a bound socket, a FIFO and an inotify");
    for what in ["the unix socket bound", "/fifo)", "inotify"] {
        ensure!(reason.contains(what), "{what} is missing: {reason}");
    }
    scene.goes_on()?;
    scene.is_on(None)?;
    let unknown = scene.moved("three")?.expect_err("there is no such pool");
    ensure!(unknown.contains("no storage pool"), "{unknown}");
    Ok(())
}
