//! Who takes the CPU while an instance waits, as the profile names them, against what the kernel says of both sides.
//!
//! Each needs root, and the kernel's type information with the tracepoints that it measures by.

use std::{
    process::{Child, Command},
    thread,
    time::Duration,
};

use rswap_agent::{
    instance::InstanceName,
    profile::{CpuProfile, Profiler, Who},
    units::UnixMillis,
};
use rswap_tests::{
    hog::set_nice,
    profiled::{TestCgroup, begin, end, profiler, reap},
};

const WINDOW: Duration = Duration::from_secs(3);
/// What else runs on the machine of the test hardly counts next to these.
const ABOVE_ALL: i32 = -20;
const SECOND_NS: f64 = 1e9;

/// All that a core has, for at most 30 s, in a session of its own.
fn loops(cgroup: &TestCgroup) -> Child {
    let child = cgroup.spawn(Command::new("setsid").args([
        "taskset",
        "-c",
        "0",
        "timeout",
        "--foreground",
        "30",
        "sh",
        "-c",
        "while :; do :; done",
    ]));
    thread::sleep(Duration::from_millis(300));
    set_nice(child.id(), ABOVE_ALL).expect("a nice value for its session");
    child
}

/// In nanoseconds, all of a cgroup's threads: how long they ran, and waited.
fn ran_and_waited(cgroup: &TestCgroup) -> [f64; 2] {
    let [ran, waited, _] = cgroup.schedstat();
    [ran as f64, waited as f64]
}

fn waited_for(profile: &CpuProfile, who: &Who) -> f64 {
    profile.neighbours.iter().filter(|of| of.who == *who).map(|of| of.waited_ns as f64).sum()
}

/// What the profile says of one in `instance` that always wants to run, next to one in `hog`, and what the kernel says: of the hog how long it ran, of the
/// instance how long it waited.
fn profile_next_to(profiler: &Profiler, instance: &TestCgroup, hog: &TestCgroup) -> (CpuProfile, [f64; 2]) {
    let children = [loops(instance), loops(hog)];
    begin(profiler, &instance.0);
    let ([_, waited], [ran, _]) = (ran_and_waited(instance), ran_and_waited(hog));
    thread::sleep(WINDOW);
    let ([_, waited_then], [ran_then, _]) = (ran_and_waited(instance), ran_and_waited(hog));
    let profile = end(profiler).cpu;
    eprintln!(
        "the hog ran {:.3} s, the instance waited {:.3} s: {:?}",
        (ran_then - ran) / SECOND_NS,
        (waited_then - waited) / SECOND_NS,
        profile.neighbours
    );
    let others: u64 = profile.by_cpu.iter().map(|of| of.others_wait_ns).sum();
    let told: u64 = profile.neighbours.iter().map(|of| of.waited_ns).sum();
    // All of the time that was waited for others is somebody's, or unknown; but both are not read at the same moment.
    near(told as f64, others as f64, 0.02);
    for cgroup in [instance, hog] {
        std::fs::write(cgroup.0.join("cgroup.kill"), "1").expect("killing what is in it");
    }
    children.into_iter().for_each(reap);
    (profile, [ran_then - ran, waited_then - waited])
}

fn near(found: f64, expected: f64, share: f64) {
    assert!((found - expected).abs() <= expected * share, "{found} against {expected}");
}

#[test]
fn a_hog_on_the_same_core_is_named_with_the_time_that_it_took() {
    let test = "a_hog_on_the_same_core_is_named_with_the_time_that_it_took";
    let Some(profiler) = profiler(test, &["sched_switch"]) else { return };
    let (instance, hog) = (TestCgroup::create(), TestCgroup::create());
    let (profile, [hog_ran, waited]) = profile_next_to(&profiler, &instance, &hog);
    assert!(hog_ran > WINDOW.as_nanos() as f64 * 0.2, "the hog got too little for a test: {hog_ran} ns");
    assert_eq!(profile.neighbours.first().map(|of| &of.who), Some(&hog.who()));
    // The instance always waits while the hog runs. A turn that goes on when the window ends is in the next one.
    near(waited_for(&profile, &hog.who()), hog_ran, 0.05);
    let all: f64 = profile.neighbours.iter().map(|of| of.waited_ns as f64).sum();
    near(all, waited, 0.05);
    assert!(waited_for(&profile, &Who::Unknown) < all * 0.02, "{:?}", profile.neighbours);
}

#[test]
fn an_instance_that_takes_the_core_is_named_as_one() {
    let test = "an_instance_that_takes_the_core_is_named_as_one";
    let Some(profiler) = profiler(test, &["sched_switch"]) else { return };
    let (instance, other) = (TestCgroup::create(), TestCgroup::create());
    let name: InstanceName = "greedy".parse().expect("a name");
    profiler.track(&name, &other.0).expect("tracking it");
    // The profile that is asked for is the last one by name.
    let (profile, [other_ran, _]) = profile_next_to(&profiler, &instance, &other);
    near(waited_for(&profile, &Who::Instance(name.clone())), other_ran, 0.05);
    assert_eq!(waited_for(&profile, &other.who()), 0.0);
    // To what is no instance's any more by the window's end belongs the time before, too.
    let children = [loops(&instance), loops(&other)];
    profiler.sample(UnixMillis::now());
    thread::sleep(Duration::from_secs(1));
    profiler.untrack(&name);
    let profile = end(&profiler).cpu;
    eprintln!("{:?}", profile.neighbours);
    assert_eq!(waited_for(&profile, &Who::Instance(name)), 0.0);
    assert!(waited_for(&profile, &other.who()) > 0.2 * SECOND_NS, "{:?}", profile.neighbours);
    drop((instance, other));
    children.into_iter().for_each(reap);
}

#[test]
fn many_turns_of_two_others_are_shared_out_among_both() {
    let test = "many_turns_of_two_others_are_shared_out_among_both";
    let Some(profiler) = profiler(test, &["sched_switch"]) else { return };
    let (instance, one, two) = (TestCgroup::create(), TestCgroup::create(), TestCgroup::create());
    let child = loops(&instance);
    // Each computes for a while before it answers, some hundred times a second.
    let script = "import os, sys, time\nr, w = int(sys.argv[1]), int(sys.argv[2])\n\
                  while True:\n    if not os.read(r, 1): break\n    end = time.thread_time() + 0.0005\n    \
                  while time.thread_time() < end: pass\n    os.write(w, b'x')\n";
    let ([for_one, to_one], [for_two, to_two]) = (pipe(), pipe());
    let play = |cgroup: &TestCgroup, from: &std::os::fd::OwnedFd, to: &std::os::fd::OwnedFd| {
        use std::os::fd::AsRawFd as _;
        let (from, to) = (from.as_raw_fd().to_string(), to.as_raw_fd().to_string());
        let python = rswap_tests::moves::python().expect("python3");
        let mut command = Command::new("setsid");
        command.args(["taskset", "-c", "0"]).arg(python).args(["-c", script, &from, &to]);
        let child = cgroup.spawn(&mut command);
        thread::sleep(Duration::from_millis(300));
        set_nice(child.id(), ABOVE_ALL).expect("a nice value for its session");
        child
    };
    let players = [play(&one, &for_one, &to_two), play(&two, &for_two, &to_one)];
    nix::unistd::write(&to_one, b"x").expect("the first turn");
    begin(&profiler, &instance.0);
    let before = [ran_and_waited(&one)[0], ran_and_waited(&two)[0]];
    thread::sleep(WINDOW);
    let after = [ran_and_waited(&one)[0], ran_and_waited(&two)[0]];
    let profile = end(&profiler).cpu;
    let ran = [after[0] - before[0], after[1] - before[1]];
    eprintln!("ran {ran:?} ns: {:?}", profile.neighbours);
    assert!(ran.iter().all(|ran| *ran > 0.1 * SECOND_NS), "they did not play: {ran:?}");
    for (cgroup, ran) in [&one, &two].into_iter().zip(ran) {
        // Waits of less than 100 us are left out.
        near(waited_for(&profile, &cgroup.who()), ran, 0.15);
    }
    drop((instance, one, two));
    [child].into_iter().chain(players).for_each(reap);
}

/// A pipe that children have: what is read from, and what is written to.
fn pipe() -> [std::os::fd::OwnedFd; 2] {
    let (from, to) = nix::unistd::pipe().expect("a pipe");
    [from, to]
}
