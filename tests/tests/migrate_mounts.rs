//! What an instance has mounted inside of it goes along: file systems in memory with all that is in them, and directories of the
//! host; the rest is refused by its mount point.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    Host, HostOptions,
    moves::{held, program},
    proxy::Fault,
    reason_to_skip, rounds,
    scene::{LIMIT, Scene, further},
    wait_for,
};

fn goes_on(log: &Path) -> anyhow::Result<()> {
    further(log, "checked", 5)?;
    further(log, "beat", 3)
}

/// The mounts below `directory` that a process of instance `mounts` at `host` has.
fn mounts_below(host: &Host, directory: &Path) -> anyhow::Result<Vec<String>> {
    let pid = host.pids("mounts")?.into_iter().next().context("it has no process")?;
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let below = text.lines().filter(|line| line.contains(&*directory.to_string_lossy()));
    Ok(below.map(str::to_owned).collect())
}

struct Mounted {
    scene: Scene,
    directory: PathBuf,
}

impl Mounted {
    fn start() -> anyhow::Result<Self> {
        let scene = Scene::set()?;
        let directory = scene.fleet.scratch().join("mounts");
        fs::create_dir(&directory)?;
        scene.python("mounts", &[], &[&directory.to_string_lossy()])?;
        goes_on(&scene.log)?;
        Ok(Self { scene, directory })
    }
}

#[test]
fn a_container_of_mounts_goes_there_and_back() -> anyhow::Result<()> {
    if reason_to_skip("a_container_of_mounts_goes_there_and_back").is_some() {
        return Ok(());
    }
    let mounted = Mounted::start()?;
    mounted.scene.three_moves("mounts", goes_on)?;
    // They are the instance's alone.
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!text.contains(&*mounted.directory.to_string_lossy()), "{text}");
    Ok(())
}

#[test]
fn a_file_system_in_memory_is_found_as_it_was_left() -> anyhow::Result<()> {
    if reason_to_skip("a_file_system_in_memory_is_found_as_it_was_left").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let directory = scene.fleet.scratch().join("memory");
    fs::create_dir(&directory)?;
    let script = format!(
        "mount -t tmpfs -o size=64m none {at} && exec python3 {program} {log} {at} 0.005 {bytes}",
        at = directory.display(),
        program = program("volume.py").display(),
        log = scene.log.display(),
        bytes = 16 << 20,
    );
    scene.run("worker", &[], &["sh", "-c", &script])?;
    let limit = Duration::from_secs(30);
    let goes_on = |log: &Path| rounds::wait_for_more(log, 50, limit);
    goes_on(&scene.log)?;
    scene.three_moves("worker", goes_on)
}

#[test]
fn a_move_that_fails_leaves_mounts_as_they_were_and_none_at_the_destination() -> anyhow::Result<()> {
    if reason_to_skip("a_move_that_fails_leaves_mounts_as_they_were_and_none_at_the_destination").is_some() {
        return Ok(());
    }
    let mut mounted = Mounted::start()?;
    let before = mounts_below(&mounted.scene.a, &mounted.directory)?;
    for fault in [
        Fault::HoldAt { tag: Tag::Volume, nth: 3 },
        Fault::HoldAt { tag: Tag::RoundEnd, nth: 1 },
        Fault::HoldAt { tag: Tag::Verified, nth: 0 },
    ] {
        let scene = &mut mounted.scene;
        let (proxy, migration) = held("mounts", &scene.a, &scene.b, fault)?;
        proxy.cut();
        let reason = migration.end()?.expect_err("it was moved over a link that was cut");
        println!("{reason}");
        wait_for("the destination to be empty", LIMIT, || Ok((!scene.b.has_processes()?).then_some(())))?;
        goes_on(&scene.log)?;
        ensure!(mounts_below(&scene.a, &mounted.directory)? == before, "other mounts at the source");
        let agent = scene.b.agent_pid().context("there is no agent")?;
        let text = fs::read_to_string(format!("/proc/{agent}/mountinfo"))?;
        ensure!(!text.contains(&*mounted.directory.to_string_lossy()), "{text}");
    }
    mounted.scene.three_moves("mounts", goes_on)
}

#[test]
fn a_directory_that_is_missing_there_is_said_in_the_offer() -> anyhow::Result<()> {
    if reason_to_skip("a_directory_that_is_missing_there_is_said_in_the_offer").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    let (held, empty) = (scene.fleet.scratch().join("held"), scene.fleet.scratch().join("empty"));
    fs::create_dir_all(held.join("point"))?;
    fs::create_dir(&empty)?;
    let options = HostOptions { mounts: vec![(empty, held.clone())], ..HostOptions::default() };
    let other = scene.fleet.host("c", &options)?;
    let point = held.join("point");
    let script =
        format!("mount -t tmpfs none {} && echo mounted; while :; do sleep 0.05; done", point.display());
    scene.run("mounts", &[], &["sh", "-c", &script])?;
    said(&scene, "mounted")?;
    let refused = scene.a.call(&["check", "mounts", &other.migrate_address()]);
    ensure!(refused.is_err(), "the mount point is missing, and nobody said so");
    let reason =
        scene.a.migrate("mounts", &other.migrate_address())?.end()?.expect_err("its mount point is missing");
    ensure!(reason.contains(&*point.to_string_lossy()) && reason.contains("isn't on this host"), "{reason}");
    ensure!(!other.has_processes()?, "something was made");
    Ok(())
}

fn said(scene: &Scene, word: &str) -> anyhow::Result<()> {
    let path = scene.fleet.scratch().join("a/mounts.log");
    wait_for(word, LIMIT, || {
        let log = fs::read_to_string(&path).unwrap_or_default();
        Ok(log.lines().any(|line| line == word).then_some(()))
    })
}

#[test]
fn other_mounts_are_refused_by_their_points() -> anyhow::Result<()> {
    if reason_to_skip("other_mounts_are_refused_by_their_points").is_some() {
        return Ok(());
    }
    // What is done, how it is undone, and what is said of which mount.
    let cases = [
        (
            "mount -t tmpfs none $D/lower && mkdir $D/lower/u $D/lower/w && \
             mount -t overlay -o lowerdir=/usr,upperdir=$D/lower/u,workdir=$D/lower/w none $D/over",
            "umount $D/over",
            "over (overlay)",
            "file system isn't carried",
        ),
        ("mount -t ramfs none $D/over", "umount $D/over", "over (ramfs)", "file system isn't carried"),
        (
            "mount -t tmpfs none $D/over && mount --make-shared $D/over",
            "umount $D/over",
            "over (tmpfs)",
            "make it private",
        ),
        (
            "mount -t tmpfs none $D/over && mount -t tmpfs none $D/over",
            "umount $D/over",
            "over (tmpfs)",
            "another mount lies over it",
        ),
        (
            "echo 1 > $D/over/file && exec 7<$D/over/file && mount -t tmpfs none $D/over",
            "exec 7<&-",
            "over/file",
            "something was mounted over it",
        ),
        (
            "mount -t devpts -o newinstance none $D/over && exec 7<>$D/over/ptmx",
            "exec 7<&-",
            "over (devpts)",
            "pseudo-terminals",
        ),
    ];
    for (done, undone, item, reason) in cases {
        let scene = Scene::set()?;
        let directory = scene.fleet.scratch().join("mounts");
        for name in ["lower", "over"] {
            fs::create_dir_all(directory.join(name))?;
        }
        let script = format!(
            "D={}; {done} && echo mounted; while ! [ -e $D/../enough ]; do sleep 0.05; done; \
             {undone}; echo unmounted; while :; do sleep 0.05; done",
            directory.display()
        );
        scene.run("mounts", &[], &["bash", "-c", &script])?;
        said(&scene, "mounted")?;
        let Err(refused) = scene.a.migrate("mounts", &scene.b.migrate_address())?.end()? else {
            anyhow::bail!("it was moved with {item}");
        };
        ensure!(refused.contains(item) && refused.contains(reason), "{refused}");
        ensure!(
            !scene.b.has_processes()? && scene.a.has_instance("mounts")?,
            "{item}: something was touched"
        );
        fs::write(scene.fleet.scratch().join("enough"), "")?;
        said(&scene, "unmounted")?;
        scene.moved("mounts", &scene.a, &scene.b)?;
        scene.moved("mounts", &scene.b, &scene.a)?;
    }
    Ok(())
}
