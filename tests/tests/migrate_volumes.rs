//! Directories move with their instance: a program that verifies all that it does in one, and moves that fail.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    Fleet, Host, HostOptions,
    moves::{held, moved},
    proxy::Fault,
    reason_to_skip, rounds, wait_for,
};

const LIMIT: Duration = Duration::from_secs(30);
/// Hosts that share nothing but the place of the test's logs.
const MORE: &str = "[files]\nshared = []\n";
const PATIENT_MS: u64 = 3000;

struct Scene {
    // Dropped in this order: the hosts live in the fleet's network.
    a: Host,
    b: Host,
    log: PathBuf,
    path: PathBuf,
    fleet: Fleet,
}

impl Scene {
    fn set() -> anyhow::Result<Self> {
        let mut fleet = Fleet::new()?;
        let scratch = fleet.scratch().to_owned();
        let shared = scratch.join("shared");
        fs::create_dir(&shared)?;
        let options = HostOptions {
            more: MORE.replace("[]", &format!("[{shared:?}]")),
            max_unavailability_ms: PATIENT_MS,
            ..HostOptions::default()
        };
        let a = fleet.host("a", &options)?;
        let b = fleet.host("b", &options)?;
        Ok(Self { a, b, log: shared.join("volume.log"), path: scratch.join("mounted"), fleet })
    }

    fn start(&self, bytes: u64) -> anyhow::Result<()> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/volume.py");
        let volume = format!("data:{}", self.path.display());
        let words =
            [program, self.log.clone(), self.path.clone()].map(|path| path.to_string_lossy().into_owned());
        let [program, log, path] = &words;
        let command = ["python3", program, log, path, "0.005", &bytes.to_string()];
        self.a.run("worker", &["--volume", &volume], &command)?;
        self.goes_on()
    }

    /// Waits for fifty further rounds.
    fn goes_on(&self) -> anyhow::Result<()> {
        rounds::wait_for_more(&self.log, 50, LIMIT)
    }

    fn volume(&self, host: &str) -> PathBuf {
        self.fleet.scratch().join(host).join("volumes/worker/data")
    }

    fn three_moves(&self) -> anyhow::Result<()> {
        let hosts = [("a", &self.a), ("b", &self.b)];
        for at in [0, 1, 0] {
            let ((from_name, from), (to_name, to)) = (hosts[at], hosts[1 - at]);
            let report = moved("worker", from, to)?;
            println!("frozen {:.0} ms: {:?}", report.unavailability_ms, report.freeze_steps_ms);
            assert!(!self.volume(from_name).exists(), "the volume is still at the source");
            assert!(self.volume(to_name).join("appended").exists(), "the volume is not in its place");
            self.goes_on()?;
        }
        Ok(())
    }

    /// Nothing is left of what arrived at b.
    fn nothing_at_b(&self) -> anyhow::Result<()> {
        let directory = self.fleet.scratch().join("b/volumes");
        wait_for("what was built at b to go", LIMIT, || {
            let left = fs::read_dir(&directory).into_iter().flatten().count();
            Ok((left == 0 && !self.b.has_processes()?).then_some(()))
        })
    }
}

#[test]
fn a_program_finds_its_volume_as_it_left_it() -> anyhow::Result<()> {
    if reason_to_skip("a_program_finds_its_volume_as_it_left_it").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.start(24 << 20)?;
    scene.three_moves()
}

#[test]
fn a_volume_whose_copy_is_lost_is_whole_and_moves_at_the_second_try() -> anyhow::Result<()> {
    if reason_to_skip("a_volume_whose_copy_is_lost_is_whole_and_moves_at_the_second_try").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    scene.start(24 << 20)?;
    for fault in [
        Fault::HoldAt { tag: Tag::Volume, nth: 20 },
        Fault::HoldAt { tag: Tag::RoundEnd, nth: 1 },
        Fault::HoldAt { tag: Tag::Verified, nth: 0 },
    ] {
        let (proxy, migration) = held("worker", &scene.a, &scene.b, fault)?;
        scene.b.kill_agent()?;
        proxy.cut();
        let reason = migration.end()?.expect_err("it was moved to a dead host");
        println!("{reason}");
        assert!(scene.a.has_instance("worker")?);
        scene.goes_on()?;
        // A new agent removes what the killed one left.
        scene.b.start_agent()?;
        scene.nothing_at_b()?;
    }
    scene.three_moves()
}

#[test]
fn no_room_is_said_in_the_offer_and_a_disk_that_fills_is_rolled_back() -> anyhow::Result<()> {
    if reason_to_skip("no_room_is_said_in_the_offer_and_a_disk_that_fills_is_rolled_back").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    // A small disk of its own for the volumes of a third host.
    let disk = scene.fleet.scratch().join("disk");
    fs::create_dir(&disk)?;
    let disk = Disk::mount(disk, "size=16m")?;
    let more = format!(
        "[files]\nshared = [{:?}]\nvolumes = {:?}\n",
        scene.log.parent().context("no parent")?,
        disk.0
    );
    let options = HostOptions { more, max_unavailability_ms: PATIENT_MS, ..HostOptions::default() };
    let small = scene.fleet.host("small", &options)?;
    scene.start(8 << 20)?;
    scene.a.call(&["check", "worker", &small.migrate_address()])?;
    // What fits at the offer, and no longer when it arrives.
    let filler = disk.0.join("filler");
    let mut migration = scene.a.migrate("worker", &small.migrate_address())?;
    migration.wait_until("the transfer", |progress| progress.phase == "transfer")?;
    // As much of it as there is room for.
    fs::write(&filler, vec![1; 16 << 20]).ok();
    let ended = migration.end()?;
    fs::remove_file(&filler)?;
    match ended {
        // It was there before the disk was full.
        Ok(_) => return Ok(()),
        Err(reason) => assert!(reason.contains("No space left") || reason.contains("no room"), "{reason}"),
    }
    assert!(scene.a.has_instance("worker")?);
    scene.goes_on()?;
    assert!(!small.has_processes()?);

    fs::write(&filler, vec![1; 10 << 20])?;
    let refused = scene.a.call(&["check", "worker", &small.migrate_address()]);
    assert!(refused.is_err(), "there is no room, and nobody said so");
    let reason = scene.a.migrate("worker", &small.migrate_address())?.end()?.expect_err("there is no room");
    assert!(reason.contains("no room"), "{reason}");
    fs::remove_file(&filler)?;
    scene.a.migrate("worker", &small.migrate_address())?.succeed()?;
    scene.goes_on()?;
    drop(small);
    Ok(())
}

/// A file system in memory, unmounted when it is dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, options: &str) -> anyhow::Result<Self> {
        let kind = Some("tmpfs");
        nix::mount::mount(kind, &at, kind, nix::mount::MsFlags::empty(), Some(options))?;
        Ok(Self(at))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The instance's mount namespace may hold it for a moment longer.
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
