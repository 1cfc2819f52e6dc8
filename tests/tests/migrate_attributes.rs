//! What processes have set for themselves migrates: rights, restrictions, priorities, directories, and what they have
//! asked of their memory.

use std::{fs, path::Path, process::Command};

use rswap_tests::{
    huge_pages::HugePages,
    reason_to_skip,
    scene::{LIMIT, Scene, further},
    skip, wait_for,
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
        let of_processes =
            ["credentials", "secret", "public", "dispositions", "habits", "identity", "family", "root"];
        let of_memory_and_time = ["barriers", "joined", "alarm"];
        let of_threads = ["thread rights", "thread habits", "filter", "strict"];
        of_processes
            .iter()
            .chain(&of_memory_and_time)
            .chain(&of_threads)
            .try_for_each(|name| further(log, name, 3))
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
fn protection_keys_stay_with_memory_and_threads() -> anyhow::Result<()> {
    const TEST: &str = "protection_keys_stay_with_memory_and_threads";
    if reason_to_skip(TEST).is_some() {
        return Ok(());
    }
    // The kernel lists this one where it lets programs use them.
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    if !processor.split_whitespace().any(|word| word == "ospke") {
        skip(TEST, "this processor has no protection keys (pku), or the kernel does not use them");
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.python("keys", &[], &[])?;
    let goes_on = |log: &Path| {
        ["keys", "thread0", "thread1", "thread2"].iter().try_for_each(|word| further(log, word, 3))
    };
    goes_on(&scene.log)?;
    scene.three_moves("keys", goes_on)
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

/// Has a policy of its own, for the process or a mapping, until a file is there.
const POLICY: &str = "
import ctypes, mmap, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
SET_MEMPOLICY, MBIND, DEFAULT, BIND, INTERLEAVE = 238, 237, 0, 2, 3
memory = mmap.mmap(-1, 1 << 20)
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
nodes = ctypes.byref(ctypes.c_ulong(1))
def set_policy(kind, nodes, bits):
    if sys.argv[1] == 'process':
        result = libc.syscall(SET_MEMPOLICY, kind, nodes, ctypes.c_ulong(bits))
    else:
        result = libc.syscall(MBIND, ctypes.c_void_p(at), ctypes.c_ulong(len(memory)), kind, nodes, ctypes.c_ulong(bits), 0)
    if result:
        print('NO', os.strerror(ctypes.get_errno()), flush=True)
set_policy(BIND if sys.argv[1] == 'process' else INTERLEAVE, nodes, 64)
print('set', flush=True)
while not os.path.exists(sys.argv[2]): time.sleep(0.02)
set_policy(DEFAULT, None, 0)
print('left', flush=True)
while True: time.sleep(0.1)
";

#[test]
fn memory_policies_are_refused_until_they_are_left() -> anyhow::Result<()> {
    const TEST: &str = "memory_policies_are_refused_until_they_are_left";
    if reason_to_skip(TEST).is_some() {
        return Ok(());
    }
    for (what, policy) in [("process", "bind"), ("mapping", "interleave")] {
        let scene = Scene::set()?;
        let enough = scene.fleet.scratch().join("enough");
        scene.run("policy", &[], &["python3", "-c", POLICY, what, &enough.to_string_lossy()])?;
        let said = |word: &str| {
            wait_for(word, LIMIT, || {
                let log = fs::read_to_string(scene.fleet.scratch().join("a/policy.log")).unwrap_or_default();
                Ok(log.lines().any(|line| line == word).then_some(log))
            })
        };
        if said("set")?.contains("NO") {
            skip(TEST, "this kernel has no memory policies (CONFIG_NUMA)");
            return Ok(());
        }
        let Err(reason) = scene.a.migrate("policy", &scene.b.migrate_address())?.end()? else {
            anyhow::bail!("the policy of a {what} was lost");
        };
        anyhow::ensure!(reason.contains(&format!("memory policy {policy}")), "{reason}");
        anyhow::ensure!(!scene.b.has_processes()?, "something was made");
        fs::write(&enough, "")?;
        said("left")?;
        scene.moved("policy", &scene.a, &scene.b)?;
    }
    Ok(())
}

/// Maps memory that grows by itself (`MAP_GROWSDOWN`), or a page with other rights in the middle of its stack.
const GROWS: &str = "
import ctypes, mmap, sys, time
libc = ctypes.CDLL(None, use_errno=True)
if sys.argv[1] == 'mapping':
    kept = mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100)
else:
    here = next(line.split('-') for line in open('/proc/self/maps') if line.endswith('[stack]\\n'))
    page = int(here[0], 16) + 4 * 4096
    if libc.mprotect(ctypes.c_void_p(page), 4096, 1): sys.exit(1)
print('mapped', flush=True)
while True: time.sleep(0.1)
";

#[test]
fn memory_that_grows_by_itself_is_refused_and_the_program_runs_on() -> anyhow::Result<()> {
    if reason_to_skip("memory_that_grows_by_itself_is_refused_and_the_program_runs_on").is_some() {
        return Ok(());
    }
    for what in ["mapping", "stack"] {
        let scene = Scene::set()?;
        scene.run("grows", &[], &["python3", "-c", GROWS, what])?;
        let log = scene.fleet.scratch().join("a/grows.log");
        wait_for("the mapping", LIMIT, || {
            Ok(fs::read_to_string(&log).unwrap_or_default().contains("mapped").then_some(()))
        })?;
        let Err(reason) = scene.a.migrate("grows", &scene.b.migrate_address())?.end()? else {
            anyhow::bail!("it was moved, and a {what} no longer grows");
        };
        anyhow::ensure!(reason.contains("MAP_GROWSDOWN"), "{reason}");
        anyhow::ensure!(scene.a.has_instance("grows")? && scene.a.has_processes()?, "it does not run on");
        wait_for("nothing to be left", LIMIT, || Ok((!scene.b.has_processes()?).then_some(())))?;
    }
    Ok(())
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
