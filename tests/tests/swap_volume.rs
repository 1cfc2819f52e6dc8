//! A volume moves between two file systems while its program runs, and the program finds all as it left it.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::ensure;
use rswap_tests::{
    HostOptions,
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

/// As SQLite holds them on the index of its log: a descriptor that is closed when its file is mapped must not take the locks with it.
#[test]
fn locks_on_files_that_are_mapped_are_kept() -> anyhow::Result<()> {
    if reason_to_skip("locks_on_files_that_are_mapped_are_kept").is_some() {
        return Ok(());
    }
    let scene = StorageScene::set([128 * MIB, 128 * MIB])?;
    scene.python("locked", &[])?;
    fs::write(scene.log.with_extension("log.free"), "")?;
    scene.goes_on()?;
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

/// Whether its blocks can be shared or not. What is written to the copy is written to the file system that is watched, too.
#[test]
fn a_volume_moves_between_two_pools_of_one_file_system() -> anyhow::Result<()> {
    if reason_to_skip("a_volume_moves_between_two_pools_of_one_file_system").is_some() {
        return Ok(());
    }
    let beside = "\n[[pool]]\nname = \"beside\"\nstorage = \"@\"\nvolumes = \"@/beside\"";
    for disk in [Disk::of(256 * MIB), Disk::with(FileSystem::Btrfs, OTHER_BYTES)] {
        let options = HostOptions { max_unavailability_ms: 3000, ..HostOptions::default() };
        let scene = StorageScene::set_with([disk], [beside], options)?;
        let bytes = 16_000_000;
        scene.python("volume", &["0.005", &bytes.to_string()])?;
        let pools = [("one", "rswap"), ("beside", "beside")]
            .map(|(pool, directory)| (pool, scene.disks[0].mount_point().join(directory)));
        for (at, (pool, directory)) in pools.iter().cycle().take(4).enumerate() {
            let report = scene.moved(pool)?.map_err(anyhow::Error::msg)?;
            scene.goes_on()?;
            let real = fs::canonicalize(scene.place())?;
            ensure!(real.starts_with(directory), "it is in {}", real.display());
            let shares = disk.file_system == FileSystem::Btrfs && at > 0;
            ensure!((report.bytes_shared > bytes * 9 / 10) == shares, "{report:?}");
            // Of the volume on btrfs what was written lately is left to the freeze.
            let of_both = if disk.file_system == FileSystem::Btrfs { bytes } else { bytes * 19 / 10 };
            ensure!(report.bytes_compared > of_both, "{report:?}");
            let (_, other) = &pools[(at + 1) % 2];
            wait_for("the other copy to go", LIMIT, || Ok((!other.join("worker").exists()).then_some(())))?;
            scene.nothing_is_left()?;
        }
    }
    Ok(())
}

/// What changes meanwhile has room; nobody is told that the disk is full, however little is left.
#[test]
fn a_copy_that_shares_its_blocks_fits_where_there_is_no_room_for_two() -> anyhow::Result<()> {
    let test = "a_copy_that_shares_its_blocks_fits_where_there_is_no_room_for_two";
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let scene = StorageScene::set_on([Disk::with(FileSystem::Xfs, OTHER_BYTES)], 3000)?;
    let bytes = 80_000_000;
    scene.python("volume", &["0.005", &bytes.to_string()])?;
    scene.moves("one")?;
    let pool = scene.disks[0].mount_point();
    let free_bytes = || -> anyhow::Result<u64> {
        let free = nix::sys::statvfs::statvfs(pool)?;
        Ok(free.blocks_free() * free.fragment_size())
    };
    let leave = |bytes: u64| -> anyhow::Result<()> {
        let file = fs::File::create(pool.join("filler"))?;
        let free = free_bytes()?;
        ensure!(free > bytes, "it is full already: {free} bytes are left");
        let flags = nix::fcntl::FallocateFlags::empty();
        Ok(nix::fcntl::fallocate(&file, flags, 0, (free - bytes) as i64)?)
    };
    leave(48 << 20)?;
    let report = scene.moves("one")?;
    ensure!(report.bytes_shared > bytes * 9 / 10, "{report:?}");
    // Room that goes while it is copied.
    let swap = std::thread::scope(|scope_of_threads| -> anyhow::Result<_> {
        let moving = scope_of_threads.spawn(|| scene.moved("one"));
        scene.wait_for_copy("one")?;
        leave(7 << 20)?;
        moving.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    let reason = swap.expect_err("too little is left");
    ensure!(reason.contains("bytes are left while blocks are shared"), "{reason}");
    scene.goes_on()?;
    scene.is_on(Some("one"))?;
    // Room that is not there.
    let reason = scene.moved("one")?.expect_err("too little is left");
    ensure!(reason.contains("no room"), "{reason}");
    scene.goes_on()?;
    fs::remove_file(pool.join("filler"))?;
    // XFS frees what was removed when it has time.
    wait_for("room", LIMIT, || Ok((free_bytes()? > 64 << 20).then_some(())))?;
    scene.moves("one")?;
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
    let swap = std::thread::scope(|scope_of_threads| -> anyhow::Result<_> {
        let moving = scope_of_threads.spawn(|| scene.moved("two"));
        scene.wait_for_copy("two")?;
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
