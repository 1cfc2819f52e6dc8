//! Waits for a CPU as they are measured from when threads are woken (`profile.exact`), against what the kernel counts and what a thread sees itself.
//!
//! Each needs root, and the kernel's type information with the tracepoints that it measures by.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rswap_agent::profile::{CpuProfile, ProfileConfig, Profiler};
use rswap_tests::{
    moves,
    profiled::{TestCgroup, begin, end, profiler_with, reap, schedstat, supervisor_cpu_ns, wait},
};

fn exact(test: &str) -> Option<Profiler> {
    let config = ProfileConfig { slots: 8, exact: true, ..ProfileConfig::default() };
    profiler_with(test, &["sched_switch", "sched_waking", "sched_wakeup_new"], &config)
}

/// All threads that were switched to, as the kernel counts them for each: how long they waited, and how often they came. Context switches beside, by another of the
/// kernel's counters (`/proc/PID/status`).
fn counted(pids: &[u32]) -> [u64; 3] {
    let switches = |pid: &u32| -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let lines = text.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    pids.iter().fold([0; 3], |sum, pid| {
        let [_, waited, times] = schedstat(*pid).unwrap_or_default();
        [sum[0] + waited, sum[1] + times, sum[2] + switches(pid)]
    })
}

#[test]
fn switches_and_waits_are_those_that_the_kernel_counts() {
    let test = "switches_and_waits_are_those_that_the_kernel_counts";
    let Some(profiler) = exact(test) else { return };
    let cgroup = TestCgroup::create();
    // Two give way to each other thousands of times a second, next to one that always wants the core.
    let script = "import os\nr, w = os.pipe()\nr2, w2 = os.pipe()\n\
                  if os.fork() == 0:\n    while os.read(r, 1): os.write(w2, b'x')\n\
                  while True:\n    os.write(w, b'x')\n    os.read(r2, 1)\n";
    let python = moves::python().expect("python3");
    let on_core = |command: &[&str]| cgroup.spawn(Command::new("taskset").args(["-c", "0"]).args(command));
    let children = [
        on_core(&["timeout", "30", python.to_str().expect("a path"), "-c", script]),
        on_core(&["timeout", "30", "sh", "-c", "while :; do :; done"]),
    ];
    thread::sleep(Duration::from_secs(1));
    cgroup.freeze(true);
    let text = fs::read_to_string(cgroup.0.join("cgroup.procs")).expect("its members");
    let pids: Vec<u32> = text.lines().map(|pid| pid.parse().expect("a pid")).collect();
    begin(&profiler, &cgroup.0);
    let (before, began, supervisor) = (counted(&pids), Instant::now(), supervisor_cpu_ns());
    cgroup.freeze(false);
    thread::sleep(Duration::from_secs(3));
    cgroup.freeze(true);
    let supervisor = supervisor_cpu_ns().saturating_sub(supervisor) as f64;
    let after = counted(&pids);
    let profile = end(&profiler).cpu;
    let [waited, times, switches] = [0, 1, 2].map(|at| after[at] - before[at]);
    let found = &profile.run_queue_ns;
    // No program runs while a thread of the supervisor's is current: see `supervisor_cpu_ns`.
    let unseen = 0.001 + 1.5 * supervisor / began.elapsed().as_nanos() as f64;
    eprintln!(
        "{} waits of {} ns; schedstat: {times}, {waited} ns; {switches} switches; {:.3} % may be unseen",
        found.count,
        found.sum,
        unseen * 100.0
    );
    assert!(profile.exact && times > 5_000, "{times} turns are too few");
    for counted in [times, switches] {
        let missed = counted.abs_diff(found.count) as f64 / counted as f64;
        assert!(missed <= unseen, "{} against {counted}: {missed}", found.count);
    }
    // The kernel's own begins when a thread is put into the queue, a moment after it begins to be woken, and each is off by a part of a microsecond.
    let more = found.sum as f64 - waited as f64;
    assert!(more.abs() <= waited as f64 * 0.01 + times as f64 * 2_000.0, "{} against {waited}", found.sum);
    drop(cgroup);
    children.into_iter().for_each(reap);
}

/// What a thread that sleeps on a core by itself sees of how late it comes, in nanoseconds; and what the profile says.
fn late(profiler: &Profiler) -> (f64, CpuProfile) {
    // Woken by another thread on another core, which says when it did.
    let script = "import os, statistics, threading, time\nr, w = os.pipe()\nlate, woken = [], [0]\n\
                  def wake():\n    os.sched_setaffinity(0, {0})\n    for i in range(400):\n        time.sleep(0.004)\n        \
                  woken[0] = time.monotonic_ns()\n        os.write(w, b'x')\n    os.close(w)\n\
                  os.sched_setaffinity(0, {1})\nthread = threading.Thread(target=wake)\nthread.start()\n\
                  while os.read(r, 1): late.append(time.monotonic_ns() - woken[0])\nthread.join()\nprint(statistics.median(late))\n";
    let cgroup = TestCgroup::create();
    let name = begin(profiler, &cgroup.0);
    let child = cgroup
        .spawn(Command::new(moves::python().expect("python3")).args(["-c", script]).stdout(Stdio::piped()));
    let output = wait(child, Duration::from_secs(60));
    let profile = end(profiler).cpu;
    profiler.untrack(&name);
    (output.trim().parse().expect("a time"), profile)
}

#[test]
fn what_an_idle_cpu_takes_to_wake_is_in_it() {
    let Some(profiler) = exact("what_an_idle_cpu_takes_to_wake_is_in_it") else { return };
    let (seen, profile) = late(&profiler);
    drop(profiler);
    let exact = profile.run_queue_ns;
    let quick = Profiler::start(&ProfileConfig { slots: 8, ..ProfileConfig::default() });
    let (seen_quick, quick_profile) = late(&quick);
    let quick = quick_profile.run_queue_ns;
    let zeros = |of: &rswap_agent::profile::histogram::Histogram| {
        of.lows().filter(|(low, _)| *low == 0).map(|(_, count)| count).sum::<u64>() as f64 / of.count as f64
    };
    eprintln!(
        "exact: p50 {:?} ns, {:.0} % zeros, the thread saw {seen} ns; quick: p50 {:?} ns, {:.0} % zeros, the thread saw {seen_quick} ns",
        exact.quantile(0.5),
        zeros(&exact) * 100.0,
        quick.quantile(0.5),
        zeros(&quick) * 100.0
    );
    assert!(profile.exact && !quick_profile.exact);
    // Nobody comes in no time.
    assert!(zeros(&exact) < 0.01 && exact.sum as f64 / exact.count as f64 > 200.0, "{exact:?}");
    let (exact, quick) = (exact.quantile(0.5).expect("waits"), quick.quantile(0.5).expect("waits"));
    assert!(
        (exact as f64) < seen,
        "the thread itself comes later than it is switched to: {exact} of {seen} ns"
    );
    assert!(exact > quick, "{exact} against {quick} ns");
}
