//! How often threads are switched, next to perf's own count, and why they are off the CPU, with programs of which it is known.
//!
//! Each needs root, and the kernel's type information with `sched_switch`, which must say in which state a task goes (Linux 5.18 and later).

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use perf_event::{Builder, Counter, events::Software};
use rswap_agent::{
    pool::cpu_list,
    profile::{CpuProfile, OffCpuProfile, ProbeState, Profiler},
};
use rswap_tests::{
    loop_device::{FileSystem, LoopDevice},
    moves,
    profiled::{
        TestCgroup, assert_quantiles, begin, end, numbers, profiler, reap, supervisor_schedstat, wait,
        while_told,
    },
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
        ProbeState::Off { reason } | ProbeState::Unavailable { reason } | ProbeState::Dropped { reason } => {
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
    let off = profile.off_cpu.clone().expect("the kernel tells");
    eprintln!("{off:?}; {} ns waiting for a CPU", profile.run_queue_ns.sum);
    off
}

/// Perf's counters of context switches in a cgroup, one for each CPU, counting.
fn perf_switches(cgroup: &TestCgroup) -> Vec<Counter> {
    let directory = File::open(&cgroup.0).expect("the cgroup");
    let online = fs::read_to_string("/sys/devices/system/cpu/online").expect("the CPUs");
    let cpus = cpu_list::parse(&online).expect("a list of CPUs");
    let start = |cpu: usize| {
        let builder = Builder::new().kind(Software::CONTEXT_SWITCHES).observe_cgroup(&directory);
        let mut builder = builder.one_cpu(cpu);
        // All switches are made by the kernel.
        builder.include_kernel();
        let mut counter = builder.build().expect("perf counts context switches");
        counter.enable().expect("it begins");
        counter
    };
    cpus.into_iter().map(start).collect()
}

#[test]
fn turns_are_the_context_switches_that_perf_counts() {
    let test = "turns_are_the_context_switches_that_perf_counts";
    let Some(profiler) = profiler(test, &["sched_switch"]) else { return };
    // As perf_event_open(2) says how to know.
    if !Path::new("/proc/sys/kernel/perf_event_paranoid").exists() {
        return skip(test, "this kernel is built without perf's events");
    }
    let cgroup = TestCgroup::create();
    // Two that answer each other and one that always wants the core, all on one; two that may go from one core to another; and ever new short-lived ones.
    let pair = "import os\nr, w = os.pipe()\nr2, w2 = os.pipe()\n\
                if os.fork() == 0:\n    while os.read(r, 1): os.write(w2, b'x')\n\
                while True:\n    os.write(w, b'x')\n    os.read(r2, 1)\n";
    let python = moves::python().expect("python3");
    let python = python.to_str().expect("a path");
    let start = |command: &[&str]| cgroup.spawn(Command::new("timeout").arg("30").args(command));
    let children = [
        start(&["taskset", "-c", "0", python, "-c", pair]),
        start(&["taskset", "-c", "0", "sh", "-c", "while :; do :; done"]),
        start(&[python, "-c", pair]),
        start(&["sh", "-c", "while :; do sleep 0.01; done"]),
    ];
    thread::sleep(Duration::from_secs(1));
    cgroup.freeze(true);
    let mut counters = perf_switches(&cgroup);
    begin(&profiler, &cgroup.0);
    cgroup.freeze(false);
    thread::sleep(Duration::from_secs(3));
    cgroup.freeze(true);
    let turns = end(&profiler).cpu.on_cpu_ns.count;
    let by_cpu: Vec<u64> = counters.iter_mut().map(|counter| counter.read().expect("its count")).collect();
    let counted: u64 = by_cpu.iter().sum();
    eprintln!("{turns} turns, perf {counted} switches by CPU {by_cpu:?}");
    assert!(counted > 5_000, "{counted} switches are too few");
    assert!(turns.abs_diff(counted) as f64 <= counted as f64 * 0.001, "{turns} turns, {counted} switches");
    drop(cgroup);
    children.into_iter().for_each(reap);
}

#[test]
fn turns_are_as_long_as_a_pinned_program_computes() {
    let test = "turns_are_as_long_as_a_pinned_program_computes";
    let Some(profiler) = profiler(test, &["sched_switch"]) else { return };
    // Real-time, and on a core by itself, it is never made to give way. It computes for 0.1, 0.5 or 1.5 ms by its own clock, sleeps, and says how long it
    // really was from one sleep to the next.
    const TURNS: u64 = 6000;
    let script = format!(
        "import os, sys, time\nos.sched_setaffinity(0, {{max(os.sched_getaffinity(0))}})\n\
         os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))\n\
         said = [0] * {TURNS}\nprint('there', flush=True)\nsys.stdin.readline()\ntime.sleep(0.001)\n\
         for i in range({TURNS}):\n    said[i] = time.thread_time_ns()\n    until = said[i] + (100_000, 500_000, 1_500_000)[i % 3]\n    \
         while time.thread_time_ns() < until: pass\n    time.sleep(0.001)\n\
         said.append(time.thread_time_ns())\nprint(*[later - said[i] for i, later in enumerate(said[1:])], flush=True)\nsys.stdin.readline()\n"
    );
    let supervisor_before = supervisor_schedstat();
    let ([cpu], line) = while_told([&profiler], &script);
    let found = cpu.on_cpu_ns;
    // What no program sees ([`supervisor_schedstat`]): who comes after it, and who goes for it.
    let unseen = 2 * (supervisor_schedstat()[2] - supervisor_before[2]);
    let said = numbers(&line);
    let sum: u64 = said.iter().sum();
    eprintln!("{} turns of {} ns; the program: {TURNS} of {sum} ns", found.count, found.sum);
    // Beside them: until it was told to go, and when it said how long they were.
    assert!(found.count + unseen >= TURNS && found.count <= TURNS + TURNS / 1000, "{} turns", found.count);
    // Interrupts are in them, of which a machine that does much beside has some, and are not in the program's own clock.
    let ratio = found.sum as f64 / sum as f64;
    assert!((0.999..1.05).contains(&ratio), "{} against {sum}", found.sum);
    assert_quantiles("turns", &found, [&said, &said], &[0.1, 0.3, 0.5, 0.7, 0.9, 0.99]);
}

#[test]
fn sleeps_are_as_long_as_a_pinned_program_sleeps() {
    let test = "sleeps_are_as_long_as_a_pinned_program_sleeps";
    let Some(profiler) = needed(test) else { return };
    // As above: nobody keeps it from running when it wakes.
    const SLEEPS: u64 = 2000;
    // Its own ways to the call and back are not of a sleep: on a slow machine they are more than a bucket of the shortest.
    let script = format!(
        "import os, sys, time\nos.sched_setaffinity(0, {{max(os.sched_getaffinity(0))}})\n\
         os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))\n\
         said = [0] * {SLEEPS}\nprint('there', flush=True)\nsys.stdin.readline()\n\
         for i in range({SLEEPS}):\n    began, ran = time.monotonic_ns(), time.thread_time_ns()\n    \
         time.sleep((0.0003, 0.001, 0.004)[i % 3])\n    \
         said[i] = time.monotonic_ns() - began - (time.thread_time_ns() - ran)\n\
         print(*said, flush=True)\nsys.stdin.readline()\n"
    );
    let supervisor_before = supervisor_schedstat();
    let ([cpu], line) = while_told([&profiler], &script);
    let found = off(&cpu).sleep_ns;
    // What no program sees ([`supervisor_schedstat`]): who comes after it, and who goes for it.
    let unseen = 2 * (supervisor_schedstat()[2] - supervisor_before[2]);
    // Beside them: until it was told to go.
    assert!(found.count + unseen >= SLEEPS && found.count <= SLEEPS + SLEEPS / 1000, "{} times", found.count);
    let said = numbers(&line);
    assert_quantiles("sleeps", &found, [&said, &said], &[0.1, 0.3, 0.5, 0.7, 0.9]);
}

#[test]
fn migrations_are_those_that_the_kernel_counts() {
    let test = "migrations_are_those_that_the_kernel_counts";
    let Some(profiler) = profiler(test, &["sched_migrate_task"]) else { return };
    if !Path::new("/proc/self/sched").exists() {
        return skip(test, "this kernel is built without CONFIG_SCHED_DEBUG");
    }
    let online = fs::read_to_string("/sys/devices/system/cpu/online").expect("the CPUs");
    let cpus: Vec<usize> = cpu_list::parse(&online).expect("a list of CPUs").into_iter().collect();
    let [one, .., other] = cpus[..] else { return skip(test, "one CPU: nothing can migrate") };
    // Told to, it goes to and fro, and says how often the kernel saw that.
    let script = format!(
        "import os, sys, time\ndef seen():\n    for line in open('/proc/self/sched'):\n        \
         if line.startswith('se.nr_migrations'): return int(line.split(':')[1])\n\
         os.sched_setaffinity(0, {{{one}}})\nprint('there', flush=True)\nsys.stdin.readline()\nbefore = seen()\n\
         for i in range(300):\n    os.sched_setaffinity(0, {{{other} if i % 2 == 0 else {one}}})\n    time.sleep(0.0005)\n\
         print(seen() - before, flush=True)\nsys.stdin.readline()\n"
    );
    let ([cpu], line) = while_told([&profiler], &script);
    let (counted, seen): (_, u64) = (cpu.migrations, line.parse().expect("a number"));
    eprintln!("{counted:?} migrations, the kernel saw {seen}");
    assert!(seen >= 300, "{seen}");
    assert_eq!(counted, Some(seen));
}

#[test]
fn a_program_that_sleeps_sleeps() {
    let Some(profiler) = needed("a_program_that_sleeps_sleeps") else { return };
    let script = "import time\nbegan = time.monotonic_ns()\nfor i in range(100): time.sleep(0.01)\nprint(time.monotonic_ns() - began)";
    // What is called so may be a script that waits for others, which say where Python is.
    let (start, _) = profile_of(&profiler, &mut python("pass"), |_| {});
    let start = off(&start).sleep_ns;
    let (profile, output) = profile_of(&profiler, &mut python(script), |_| {});
    let off = off(&profile);
    let (said, times) = (said_ns(&output), off.sleep_ns.count - start.count.min(off.sleep_ns.count));
    assert!((90..=120).contains(&times), "{times} times beside {}", start.count);
    // A start takes as long as another only roughly.
    let slept = off.sleep_ns.sum.saturating_sub(start.sum);
    assert!((said * 8 / 10..said * 13 / 10).contains(&slept), "{slept} of {said} ns");
    assert!(off.io_wait_ns.sum + off.blocked_ns.sum < SECOND_NS / 2 && off.stopped_ns.sum == 0, "{off:?}");
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
    assert!((99..250).contains(&off.io_wait_ns.count), "{} times", off.io_wait_ns.count);
    // When it is opened and closed the disk may be read as well.
    assert!(
        (said * 8 / 10..said + SECOND_NS / 4).contains(&off.io_wait_ns.sum),
        "{} of {said} ns",
        off.io_wait_ns.sum
    );
    assert!(off.sleep_ns.sum < SECOND_NS / 4, "{off:?}");
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
    assert_eq!(off.stopped_ns.count, 1);
    assert!((SECOND_NS * 6 / 10..SECOND_NS).contains(&off.stopped_ns.sum), "{off:?}");
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
    assert!(
        off.sleep_ns.sum + off.io_wait_ns.sum + off.blocked_ns.sum + off.stopped_ns.sum < SECOND_NS / 5,
        "{off:?}"
    );
    drop(cgroup);
    children.into_iter().for_each(reap);
}
