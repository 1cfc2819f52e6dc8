//! Waits for a CPU, as the kernel times them and as they are measured from when threads are woken (`profile.exact`), against what the kernel counts and what threads
//! see themselves.
//!
//! Each needs root, and the kernel's type information with the tracepoints that it measures by.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rswap_agent::profile::{CpuProfile, ProfileConfig, Profiler, histogram::Histogram, unified_mount};
use rswap_tests::{
    moves,
    profiled::{
        TestCgroup, assert_quantiles, begin, end, numbers, profiler_with, reap, supervisor_schedstat, wait,
        while_told, window,
    },
    seeded, skip,
};

fn exact(test: &str) -> Option<Profiler> {
    let config = ProfileConfig { slots: 8, exact: true, ..ProfileConfig::default() };
    profiler_with(test, &["sched_switch", "sched_waking", "sched_wakeup_new"], &config)
}

/// One that measures exactly, and one that doesn't, side by side. The programs of the first one run first, so that what the others take is in none of its times.
fn both_ways(test: &str) -> Option<[Profiler; 2]> {
    if !Path::new("/proc/self/schedstat").exists() {
        skip(test, "this kernel does not time waits");
        return None;
    }
    let exact = exact(test)?;
    Some([exact, Profiler::start(&ProfileConfig { slots: 8, ..ProfileConfig::default() })])
}

fn say(way: &str, waits: &Histogram) {
    let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|q| waits.quantile(q).expect("there are some"));
    eprintln!("{way}: {} waits of {} ns; p50 {p50}, p90 {p90}, p99 {p99} ns", waits.count, waits.sum);
}

/// To a thousandth, and what else may be in it.
fn near(found: u64, counted: u64, beside: u64) {
    let off = counted.div_ceil(1000);
    assert!(
        (counted - off..=counted + off + beside).contains(&found),
        "{found} against {counted}, with up to {beside} beside"
    );
}

/// Context switches of a cgroup's threads, by another of the kernel's counters than schedstat's.
fn switches(cgroup: &TestCgroup) -> u64 {
    let of = |thread: u32| -> u64 {
        let text = fs::read_to_string(format!("/proc/{thread}/status")).expect("the thread is there");
        let lines = text.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    cgroup.threads().into_iter().map(of).sum()
}

const TICK_NS: u64 = 10_000_000;

/// Time that a hypervisor has taken from all CPUs: turns have it, and the kernel's run times don't. `None` if it never took any.
fn stolen_ns() -> Option<u64> {
    let stat = fs::read_to_string("/proc/stat").expect("the kernel's times");
    let ticks: u64 = stat.lines().next()?.split_whitespace().nth(8)?.parse().ok()?;
    (ticks > 0).then_some(ticks * TICK_NS)
}

/// What profiles have of a cgroup, and what the kernel counts.
#[derive(Default)]
struct Counted {
    exact: Histogram,
    quick: Histogram,
    waited_ns: u64,
    turns: u64,
    switches: u64,
}

/// Lets what is in `cgroup` go on for some windows, at whose ends it stands still, and compares what both have of them. Waits are of those in which process 1 did not
/// run, as no program sees who comes after it ([`supervisor_schedstat`]), and in which none ended of which the beginning was missed for that.
fn counted([exact, quick]: &[Profiler; 2], cgroup: &TestCgroup) -> Counted {
    const WINDOWS: u32 = 20;
    const LIMIT: Duration = Duration::from_secs(100);
    cgroup.freeze(true);
    for profiler in [exact, quick] {
        begin(profiler, &cgroup.0);
    }
    let mut all = Counted::default();
    let (mut on_cpu, [ran_before, ..], stolen_before) =
        (Histogram::default(), cgroup.schedstat(), stolen_ns());
    let (mut windows, began) = (0, Instant::now());
    // More of them where process 1 runs in each.
    while windows < WINDOWS || all.turns == 0 && began.elapsed() < LIMIT {
        windows += 1;
        let unseen = || (supervisor_schedstat(), exact.bookkeeping().lost.exact_waits);
        let unseen_before = unseen();
        let ([_, waited, turns], switched) = (cgroup.schedstat(), switches(cgroup));
        cgroup.freeze(false);
        thread::sleep(Duration::from_millis(250));
        cgroup.freeze(true);
        let [of_exact, of_quick] = [exact, quick].map(|profiler| window(profiler).cpu);
        assert!(of_exact.exact && !of_quick.exact);
        on_cpu.merge(&of_quick.on_cpu_ns);
        if unseen() != unseen_before {
            continue;
        }
        let [_, waited_then, turns_then] = cgroup.schedstat();
        all.exact.merge(&of_exact.run_queue_ns);
        all.quick.merge(&of_quick.run_queue_ns);
        all.waited_ns += waited_then - waited;
        all.turns += turns_then - turns;
        all.switches += switches(cgroup) - switched;
    }
    assert!(all.turns > 0, "process 1 never kept still");
    let ran_ns = cgroup.schedstat()[0] - ran_before;
    let stolen = stolen_ns().map_or(0, |ns| ns - stolen_before.unwrap_or(0) + 2 * TICK_NS);
    eprintln!(
        "{} turns of {} ns; schedstat: {ran_ns} ns; {stolen} ns may be stolen",
        on_cpu.count, on_cpu.sum
    );
    eprintln!("schedstat: {} turns after {} ns; {} switches", all.turns, all.waited_ns, all.switches);
    say("quick", &all.quick);
    say("exact", &all.exact);
    let longer_ns = (all.exact.sum as f64 - all.waited_ns as f64) / all.turns as f64;
    eprintln!("exact: longer than schedstat's by {longer_ns:.0} ns each");
    near(on_cpu.sum, ran_ns, stolen);
    for counted in [all.turns, all.switches] {
        near(all.quick.count, counted, 0);
        near(all.exact.count, counted, 0);
    }
    all
}

const BUSY: &[&str] = &["sh", "-c", "while :; do :; done"];

/// Starts them on these cores, for as long as a test takes at most.
fn start<const N: usize>(cgroup: &TestCgroup, commands: [&[&str]; N], affinity: &str) -> [Child; N] {
    let children = commands.map(|command| {
        cgroup.spawn(Command::new("taskset").args(["-c", affinity, "timeout", "200"]).args(command))
    });
    thread::sleep(Duration::from_secs(1));
    children
}

#[test]
fn turns_and_waits_are_those_that_the_kernel_counts() {
    let test = "turns_and_waits_are_those_that_the_kernel_counts";
    let Some(profilers) = both_ways(test) else { return };
    let cgroup = TestCgroup::create();
    // Two give way to each other thousands of times a second, next to one that always wants the core.
    let script = "import os\nr, w = os.pipe()\nr2, w2 = os.pipe()\n\
                  if os.fork() == 0:\n    while os.read(r, 1): os.write(w2, b'x')\n\
                  while True:\n    os.write(w, b'x')\n    os.read(r2, 1)\n";
    let python = moves::python().expect("python3");
    let children = start(&cgroup, [&[python.to_str().expect("a path"), "-c", script], BUSY], "0");
    let all = counted(&profilers, &cgroup);
    assert!(all.turns > 5_000, "{} turns are too few", all.turns);
    near(all.quick.sum, all.waited_ns, 0);
    // The kernel's own begin when a thread is put into the queue, a moment after it begins to be woken.
    near(all.exact.sum, all.waited_ns, all.turns * 5_000);
    drop(cgroup);
    children.into_iter().for_each(reap);
}

#[test]
fn waits_of_who_is_moved_meanwhile_are_whole_where_they_are_exact() {
    let test = "waits_of_who_is_moved_meanwhile_are_whole_where_they_are_exact";
    let Some(profilers) = both_ways(test) else { return };
    let cgroup = TestCgroup::create();
    // More than there are cores, so that the kernel always has a reason to move one.
    let children = start(&cgroup, [BUSY; 7], "0,1");
    let all = counted(&profilers, &cgroup);
    near(all.exact.sum, all.waited_ns, all.turns * 5_000);
    // What it waited at the core that it left is lost.
    assert!(all.quick.sum <= all.waited_ns + all.waited_ns / 1000, "{} ns", all.quick.sum);
    drop(cgroup);
    children.into_iter().for_each(reap);
}

#[test]
fn waits_are_as_long_as_the_one_on_the_core_computes() {
    let test = "waits_are_as_long_as_the_one_on_the_core_computes";
    let Some(profilers) = both_ways(test) else { return };
    const WAITS: usize = 1500;
    const QUANTILES: [f64; 7] = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99];
    // Two on one core, both real-time: one wakes the other, of a lower priority, which waits until the first has computed for 0.2 to 20 ms, and sleeps. Only who waits
    // is in the instance.
    let seed = seeded().expect("a seed").u64(..);
    let outside = unified_mount().expect("cgroup v2").join("cgroup.procs");
    let script = format!(
        "import mmap, os, random, sys, time\nos.sched_setaffinity(0, {{max(os.sched_getaffinity(0))}})\n\
         times = memoryview(mmap.mmap(-1, 8 * 4 * {WAITS})).cast('Q')\nrandom.seed({seed})\nnow = time.monotonic_ns\n\
         begin, (r, w) = os.pipe(), os.pipe()\n\
         def real_time(priority): os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))\n\
         if os.fork() == 0:\n    open({outside:?}, 'w').write('0')\n    real_time(50)\n    os.read(begin[0], 1)\n    time.sleep(0.01)\n    \
         for at in range(0, len(times), 4):\n        takes = int(200_000 * 100 ** random.random())\n        \
         times[at] = now()\n        os.write(w, b'x')\n        times[at + 1] = now()\n        \
         while now() < times[at] + takes: pass\n        times[at + 2] = now()\n        time.sleep(0.0005 + takes / 5e9)\n    os._exit(0)\n\
         real_time(49)\nprint('there', flush=True)\nsys.stdin.readline()\nos.write(begin[1], b'x')\n\
         for at in range(0, len(times), 4):\n    os.read(r, 1)\n    times[at + 3] = now()\n\
         print(*times, flush=True)\nsys.stdin.readline()\nos.wait()\n"
    );
    let ([exact, quick], line) = while_told(profilers.each_ref(), &script);
    // It waits at least from when it has been woken to when the other one sleeps, and at most from when that began to when it goes on.
    let times = numbers(&line);
    let least: Vec<u64> = times.chunks(4).map(|of| of[2] - of[1]).collect();
    let most: Vec<u64> = times.chunks(4).map(|of| of[3] - of[0]).collect();
    let [least_ns, most_ns] = [&least, &most].map(|of| of.iter().sum::<u64>());
    eprintln!("{WAITS} waits of {least_ns} to {most_ns} ns by the programs' clock");
    for (way, waits) in [("quick", quick.run_queue_ns), ("exact", exact.run_queue_ns)] {
        say(way, &waits);
        // Beside them: until it was told to go.
        assert!((WAITS..=WAITS + WAITS / 100).contains(&(waits.count as usize)), "{} waits", waits.count);
        // Others that are real-time, and a hypervisor, may take the core at any moment.
        let sums = least_ns - least_ns / 100..=most_ns + most_ns / 100;
        assert!(sums.contains(&waits.sum), "{} ns of {sums:?}", waits.sum);
        assert_quantiles(way, &waits, [&least, &most], &QUANTILES);
    }
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
