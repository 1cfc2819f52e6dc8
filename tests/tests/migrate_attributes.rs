//! What processes have set for themselves migrates: rights, restrictions, priorities, directories, and what they have
//! asked of their memory.

use std::{fs, path::Path, process::Command};

use anyhow::Context;
use rswap_tests::{
    reason_to_skip,
    scene::{LIMIT, Scene, further},
    wait_for,
};

#[test]
fn rights_and_restrictions_are_the_same_everywhere() -> anyhow::Result<()> {
    if reason_to_skip("rights_and_restrictions_are_the_same_everywhere").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let directory = scene.fleet.scratch().join("root");
    fs::create_dir(&directory)?;
    scene.python("attributes", &[], &[&directory.to_string_lossy()])?;
    let goes_on = |log: &std::path::Path| {
        let names = ["credentials", "habits", "root", "filter", "strict"];
        names.iter().try_for_each(|name| further(log, name, 3))
    };
    goes_on(&scene.log)?;
    scene.three_moves("attributes", goes_on)
}

#[test]
fn what_is_asked_of_memory_holds_everywhere() -> anyhow::Result<()> {
    if reason_to_skip("what_is_asked_of_memory_holds_everywhere").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    // Two copies for the time of a move.
    let huge = HugePages::reserve(12)?;
    let file = scene.fleet.scratch().join("deleted");
    let (pages, counted) = if huge.enough { ("2", 2) } else { ("0", 0) };
    scene.python("memory", &[], &[&file.to_string_lossy(), pages])?;
    let goes_on = |log: &std::path::Path| {
        [("checked", 3), ("locked", 2), ("counted", counted)]
            .iter()
            .try_for_each(|(word, times)| further(log, word, *times))
    };
    goes_on(&scene.log)?;
    scene.three_moves("memory", goes_on)
}

#[test]
fn a_32_bit_program_is_refused_and_runs_on() -> anyhow::Result<()> {
    if reason_to_skip("a_32_bit_program_is_refused_and_runs_on").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/thirty_two.s");
    let program = scene.fleet.scratch().join("thirty_two");
    let mut compiler = Command::new("cc");
    compiler.args(["-m32", "-nostdlib", "-static", "-no-pie", "-o"]).arg(&program).arg(source);
    anyhow::ensure!(compiler.status()?.success(), "the program does not assemble");
    if Command::new("timeout").arg("0.1").arg(&program).status()?.code() != Some(124) {
        rswap_tests::skip("a_32_bit_program_is_refused_and_runs_on", "the kernel runs no 32-bit programs");
        return Ok(());
    }
    scene.run("small", &[], &[&program.to_string_lossy()])?;
    let Err(reason) = scene.a.migrate("small", &scene.b.migrate_address())?.end()? else {
        anyhow::bail!("a 32-bit program was moved");
    };
    anyhow::ensure!(reason.contains("a 32-bit program"), "{reason}");
    anyhow::ensure!(scene.a.has_instance("small")? && scene.a.has_processes()?, "it does not run on");
    Ok(())
}

#[test]
fn huge_pages_that_are_not_there_are_refused() -> anyhow::Result<()> {
    if reason_to_skip("huge_pages_that_are_not_there_are_refused").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    // All that one copy needs.
    let huge = HugePages::reserve(8)?;
    if !huge.enough {
        rswap_tests::skip("huge_pages_that_are_not_there_are_refused", "no huge pages can be set aside");
        return Ok(());
    }
    let file = scene.fleet.scratch().join("deleted");
    scene.python("memory", &[], &[&file.to_string_lossy(), "3"])?;
    further(&scene.log, "checked", 1)?;
    let Err(reason) = scene.a.migrate("memory", &scene.b.migrate_address())?.end()? else {
        anyhow::bail!("it was moved where there are no huge pages");
    };
    anyhow::ensure!(reason.contains("huge pages are needed"), "{reason}");
    further(&scene.log, "checked", 2)
}

#[test]
fn mounts_of_an_instance_are_refused_by_their_points() -> anyhow::Result<()> {
    if reason_to_skip("mounts_of_an_instance_are_refused_by_their_points").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let path = |name: &str| scene.fleet.scratch().join(name);
    for name in ["tmpfs", "bind"] {
        fs::create_dir(path(name))?;
    }
    let script = format!(
        "mount -t tmpfs none {tmpfs} && mount --bind {tmpfs} {bind} && echo mounted; \
         while ! [ -e {enough} ]; do sleep 0.05; done; umount {bind} {tmpfs} && echo unmounted; \
         while :; do sleep 0.05; done",
        tmpfs = path("tmpfs").display(),
        bind = path("bind").display(),
        enough = path("enough").display(),
    );
    scene.run("mounts", &[], &["sh", "-c", &script])?;
    let said = |word: &str| {
        wait_for(word, LIMIT, || {
            let log = fs::read_to_string(path("a/mounts.log")).unwrap_or_default();
            Ok(log.lines().any(|line| line == word).then_some(()))
        })
    };
    said("mounted")?;
    let Err(reason) = scene.a.migrate("mounts", &scene.b.migrate_address())?.end()? else {
        anyhow::bail!("it was moved away from its mounts");
    };
    for name in ["tmpfs", "bind"] {
        let item = format!("a mount of its own at {} (tmpfs)", path(name).display());
        anyhow::ensure!(reason.contains(&item), "{reason}");
    }
    fs::write(path("enough"), "")?;
    said("unmounted")?;
    scene.moved("mounts", &scene.a, &scene.b)?;
    scene.moved("mounts", &scene.b, &scene.a)
}

/// A SysV segment of one huge page.
const HUGE_SEGMENT: &str = "
import ctypes, time
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0, 2 << 20, 0o1600 | 0o4000)
at = libc.shmat(segment, None, 0)
ctypes.c_uint64.from_address(at).value = 1
print('attached', flush=True)
time.sleep(600)
";

#[test]
fn huge_pages_of_a_segment_are_refused() -> anyhow::Result<()> {
    if reason_to_skip("huge_pages_of_a_segment_are_refused").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let huge = HugePages::reserve(2)?;
    if !huge.enough {
        rswap_tests::skip("huge_pages_of_a_segment_are_refused", "no huge pages can be set aside");
        return Ok(());
    }
    scene.run("segment", &[], &["python3", "-c", HUGE_SEGMENT])?;
    let log = scene.fleet.scratch().join("a/segment.log");
    wait_for("the segment", LIMIT, || {
        Ok(fs::read_to_string(&log).unwrap_or_default().contains("attached").then_some(()))
    })?;
    let Err(reason) = scene.a.migrate("segment", &scene.b.migrate_address())?.end()? else {
        anyhow::bail!("it was moved, and its pages became small");
    };
    anyhow::ensure!(reason.contains("a SysV segment in huge pages"), "{reason}");
    Ok(())
}

/// Huge pages that are set aside, and given back at the end.
struct HugePages {
    before: u64,
    enough: bool,
}

const SETTING: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn reserve(pages: u64) -> anyhow::Result<Self> {
        let read = || -> anyhow::Result<u64> {
            fs::read_to_string(SETTING)?.trim().parse().context("no number of huge pages")
        };
        let before = read()?;
        fs::write(SETTING, (before + pages).to_string())?;
        Ok(Self { before, enough: read()? == before + pages })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SETTING, self.before.to_string()) {
            eprintln!("cannot give huge pages back: {error}");
        }
    }
}
