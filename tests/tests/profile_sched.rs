//! Why threads are off the CPU, as the profile has it, with programs of which it is known.
//!
//! Each needs root, and the kernel's type information with `sched_switch`, which must say in which state a task goes (Linux 5.18 and later).

use std::{
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::profile::{CpuProfile, OffCpuProfile, ProbeState, Profiler};
use rswap_tests::{
    loop_device::{FileSystem, LoopDevice},
    moves,
    profiled::{TestCgroup, begin, end, profiler, reap, wait},
    served_disk::Speed,
    skip,
};

const SECOND_NS: u64 = 1_000_000_000;

fn needed(test: &str) -> Option<Profiler> {
    let profiler = profiler(test, &["sched_switch"])?;
    let state = profiler
        .probes()
        .into_iter()
        .find(|probe| probe.name == "sched_switch.prev_state")
        .expect("the probe is listed")
        .state;
    match state {
        ProbeState::Active => Some(profiler),
        ProbeState::Unavailable { reason } | ProbeState::Dropped { reason } => {
            skip(test, &reason);
            None
        }
    }
}

/// What the profile says of a program from before its start to after its end, and what it wrote.
fn profile_of(
    profiler: &Profiler,
    command: &mut Command,
    meanwhile: impl FnOnce(&Child),
) -> (CpuProfile, String) {
    let cgroup = TestCgroup::create();
    let name = begin(profiler, &cgroup.0);
    let child = cgroup.spawn(command.stdout(Stdio::piped()));
    meanwhile(&child);
    let output = wait(child, Duration::from_secs(60));
    let profile = end(profiler);
    profiler.untrack(&name);
    (profile.cpu, output)
}

fn python(script: &str) -> Command {
    let mut command = Command::new(moves::python().expect("python3"));
    command.args(["-c", script]);
    command
}

/// The time that a program says it has taken, in nanoseconds.
fn said_ns(output: &str) -> u64 {
    output.trim().parse().expect("a number")
}

fn off(profile: &CpuProfile) -> OffCpuProfile {
    let off = profile.off_cpu.expect("the kernel tells");
    eprintln!("{off:?}; {} ns waiting for a CPU", profile.run_queue_ns.sum);
    off
}

#[test]
fn a_program_that_sleeps_sleeps() {
    let Some(profiler) = needed("a_program_that_sleeps_sleeps") else { return };
    let script = "import time\nbegan = time.monotonic_ns()\nfor i in range(100): time.sleep(0.01)\nprint(time.monotonic_ns() - began)";
    // What is called so may be a script that waits for others, which say where Python is.
    let (start, _) = profile_of(&profiler, &mut python("pass"), |_| {});
    let start = off(&start).sleep;
    let (profile, output) = profile_of(&profiler, &mut python(script), |_| {});
    let off = off(&profile);
    let (said, times) = (said_ns(&output), off.sleep.times - start.times.min(off.sleep.times));
    assert!((90..=120).contains(&times), "{times} times beside {}", start.times);
    // A start takes as long as another only roughly.
    let slept = off.sleep.ns.saturating_sub(start.ns);
    assert!((said * 8 / 10..said * 13 / 10).contains(&slept), "{slept} of {said} ns");
    assert!(off.io_wait.ns + off.blocked.ns < SECOND_NS / 2 && off.stopped.ns == 0, "{off:?}");
}

#[test]
fn a_program_that_reads_from_a_slow_disk_waits_for_io() {
    let Some(profiler) = needed("a_program_that_reads_from_a_slow_disk_waits_for_io") else { return };
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = LoopDevice::create_served(directory.path(), 32 << 20, FileSystem::Ext4).unwrap();
    disk.unmount().unwrap();
    disk.set_speed(Speed::of(Duration::from_millis(5))).unwrap();
    // Past the page cache, into memory that is aligned for it.
    let script = format!(
        "import mmap, os, time\nbuffer = mmap.mmap(-1, 4096)\nfd = os.open({:?}, os.O_RDONLY | os.O_DIRECT)\n\
         began = time.monotonic_ns()\nfor i in range(100): os.preadv(fd, [buffer], 4096 * i)\nprint(time.monotonic_ns() - began)",
        disk.device()
    );
    let (profile, output) = profile_of(&profiler, &mut python(&script), |_| {});
    let off = off(&profile);
    let said = said_ns(&output);
    assert!(said >= SECOND_NS / 2, "the disk is not as slow as was asked for: {said} ns");
    assert!((99..250).contains(&off.io_wait.times), "{} times", off.io_wait.times);
    // When it is opened and closed the disk may be read as well.
    assert!(
        (said * 8 / 10..said + SECOND_NS / 4).contains(&off.io_wait.ns),
        "{} of {said} ns",
        off.io_wait.ns
    );
    assert!(off.sleep.ns < SECOND_NS / 4, "{off:?}");
}

#[test]
fn a_program_that_was_stopped_was_stopped() {
    let Some(profiler) = needed("a_program_that_was_stopped_was_stopped") else { return };
    let script = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass";
    let (profile, _) = profile_of(&profiler, &mut python(script), |child| {
        let send = |signal| kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        thread::sleep(Duration::from_millis(500));
        send(Signal::SIGSTOP);
        thread::sleep(Duration::from_millis(700));
        send(Signal::SIGCONT);
    });
    let off = off(&profile);
    assert_eq!(off.stopped.times, 1);
    assert!((SECOND_NS * 6 / 10..SECOND_NS).contains(&off.stopped.ns), "{off:?}");
}

#[test]
fn programs_that_take_turns_on_a_core_are_not_off_it_for_any_reason() {
    let Some(profiler) = needed("programs_that_take_turns_on_a_core_are_not_off_it_for_any_reason") else {
        return;
    };
    let cgroup = TestCgroup::create();
    let busy = || {
        cgroup.spawn(Command::new("taskset").args([
            "-c",
            "0",
            "timeout",
            "20",
            "sh",
            "-c",
            "while :; do :; done",
        ]))
    };
    let children = [busy(), busy()];
    thread::sleep(Duration::from_millis(300));
    begin(&profiler, &cgroup.0);
    thread::sleep(Duration::from_secs(2));
    let profile = end(&profiler);
    let off = off(&profile.cpu);
    let waited = profile.cpu.run_queue_ns.sum;
    // One of both always waits.
    assert!(waited > SECOND_NS * 15 / 10, "{waited} ns");
    assert!(off.sleep.ns + off.io_wait.ns + off.blocked.ns + off.stopped.ns < SECOND_NS / 5, "{off:?}");
    drop(cgroup);
    children.into_iter().for_each(reap);
}
