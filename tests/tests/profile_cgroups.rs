//! Cgroups in an instance's own that come and go, more instances than there are slots, and more cgroups than there is room for.

use std::{
    fs,
    io::Read,
    net::TcpListener,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rswap_agent::{
    instance::InstanceName,
    profile::{ProbeState, ProfileConfig, Profiler},
    units::UnixMillis,
};
use rswap_tests::{
    moves,
    profiled::{TestCgroup, begin, end, profiler, reap, wait},
    reason_to_skip, skip,
};

/// What each child sends, in bytes.
const MESSAGE: usize = 10_000;

/// For so many seconds: makes a cgroup in its own, has a child in it send a message, and removes it.
const MAKER: &str = r#"
import os, socket, sys, time
root, port, size, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
message, made, end = b"x" * size, 0, time.monotonic() + seconds
while time.monotonic() < end:
    path = f"{root}/short{made}"
    os.mkdir(path)
    child = os.fork()
    if child == 0:
        procs = os.open(path + "/cgroup.procs", os.O_WRONLY)
        os.write(procs, b"0")
        to = socket.create_connection(("127.0.0.1", port))
        to.sendall(message)
        to.close()
        os._exit(0)
    os.waitpid(child, 0)
    while True:
        try:
            os.rmdir(path)
            break
        except OSError: time.sleep(0.0002)
    made += 1
print(made)
"#;

#[test]
fn cgroups_that_live_for_a_moment_count_with_the_instance() {
    let test = "cgroups_that_live_for_a_moment_count_with_the_instance";
    let needed = ["sched_switch", "inet_sock_set_state", "cgroup_mkdir", "cgroup_release"];
    let Some(profiler) = profiler(test, &needed) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    // Until the test ends.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut stream = stream;
                stream.read_to_end(&mut Vec::new())
            });
        }
    });
    let cgroup = TestCgroup::create();
    let name = begin(&profiler, &cgroup.0);
    let known = profiler.cgroups_known();
    assert_eq!((known.known, known.children), (1, 0));
    let (before, usage_us) = (known.children_made, cgroup.cpu_usage_us());
    let mut command = Command::new(moves::python().expect("python3"));
    command.args(["-c", MAKER]).arg(&cgroup.0).args([port.to_string(), MESSAGE.to_string(), "4".to_owned()]);
    let child = cgroup.spawn(command.stdout(Stdio::piped()));
    // Windows go on meanwhile.
    let (mut sent, mut on_cpu_ns, mut windows) = (0, 0, 0);
    let waiting = thread::spawn(move || wait(child, Duration::from_secs(30)));
    let mut most = 0;
    while !waiting.is_finished() {
        thread::sleep(Duration::from_millis(300));
        let profile = profiler.sample(UnixMillis::now()).pop().expect("each window has a profile");
        (sent, on_cpu_ns, windows) =
            (sent + profile.tcp.bytes_out, on_cpu_ns + profile.cpu.on_cpu_ns.sum, windows + 1);
        most = most.max(profiler.cgroups_known().children);
    }
    let made: u64 = waiting.join().expect("it ends").trim().parse().expect("a number");
    let last = end(&profiler);
    (sent, on_cpu_ns) = (sent + last.tcp.bytes_out, on_cpu_ns + last.cpu.on_cpu_ns.sum);
    let used_ns = (cgroup.cpu_usage_us() - usage_us) * 1000;
    let due = made * MESSAGE as u64;
    let known = profiler.cgroups_known();
    eprintln!(
        "{made} cgroups in {windows} windows, {most} at a time; {sent} of {due} bytes; {on_cpu_ns} of {used_ns} ns; {known:?}"
    );
    // Hundreds per second where nobody else builds.
    assert!(made > 200, "{made}");
    assert!(sent.abs_diff(due) as f64 <= due as f64 * 0.001, "{sent} against {due}");
    // Turns are measured by another clock than CPU time, and interrupts are in them.
    assert!((on_cpu_ns as f64 / used_ns as f64 - 1.0).abs() < 0.01, "{on_cpu_ns} against {used_ns}");
    assert_eq!((known.children_made - before, known.children_displaced, known.unplaced), (made, 0, 0));
    let deadline = Instant::now() + Duration::from_secs(10);
    while profiler.cgroups_known().children > 0 {
        assert!(Instant::now() < deadline, "what has gone is known: {:?}", profiler.cgroups_known());
        thread::sleep(Duration::from_millis(50));
    }
    profiler.untrack(&name);
    assert_eq!(profiler.cgroups_known().known, 0);
}

#[test]
fn what_lives_on_is_written_down_and_what_belonged_to_one_is_not_anothers() {
    let test = "what_lives_on_is_written_down_and_what_belonged_to_one_is_not_anothers";
    let Some(profiler) = profiler(test, &["sched_switch", "cgroup_mkdir", "cgroup_release"]) else { return };
    let cgroup = TestCgroup::create();
    let name = begin(&profiler, &cgroup.0);
    let below = cgroup.0.join("below");
    fs::create_dir(&below).expect("a cgroup");
    fs::create_dir(below.join("deeper")).expect("a cgroup");
    let known = || (profiler.cgroups_known().known, profiler.cgroups_known().children);
    profiler.sample(UnixMillis::now());
    assert_eq!(known(), (1, 2), "both are known at once, and young");
    thread::sleep(Duration::from_millis(2200));
    profiler.sample(UnixMillis::now());
    assert_eq!(known(), (3, 2));
    profiler.untrack(&name);
    assert_eq!(known(), (0, 0), "the slot is free for another one");
    fs::create_dir(cgroup.0.join("later")).expect("a cgroup");
    assert_eq!(known(), (0, 0), "it is nobody's");
    for path in [below.join("deeper"), below, cgroup.0.join("later")] {
        fs::remove_dir(path).expect("it is empty");
    }
}

#[test]
fn instances_past_the_slots_are_counted_together_and_get_one_that_becomes_free() {
    let test = "instances_past_the_slots_are_counted_together_and_get_one_that_becomes_free";
    if reason_to_skip(test).is_some() {
        return;
    }
    let profiler = Profiler::start(&ProfileConfig { slots: 1, ..ProfileConfig::default() });
    let switch =
        profiler.probes().into_iter().find(|probe| probe.name == "sched_switch").expect("it is listed");
    if let ProbeState::Unavailable { reason } = switch.state {
        skip(test, &reason);
        return;
    }
    let cgroups = [TestCgroup::create(), TestCgroup::create(), TestCgroup::create()];
    let naps = "import time\nwhile True: time.sleep(0.002)";
    let python = moves::python().expect("python3");
    let children: Vec<_> =
        cgroups.iter().map(|cgroup| cgroup.spawn(Command::new(&python).args(["-c", naps]))).collect();
    let names: [InstanceName; 3] = ["a", "b", "c"].map(|name| name.parse().expect("a name"));
    for (name, cgroup) in names.iter().zip(&cgroups) {
        profiler.track(name, &cgroup.0).expect("there is always room");
    }
    profiler.sample(UnixMillis::now());
    thread::sleep(Duration::from_secs(1));
    let profiles = profiler.sample(UnixMillis::now());
    let counted: Vec<bool> = profiles.iter().map(|profile| profile.cpu.counted).collect();
    assert_eq!(counted, [true, false, false]);
    let shared = profiler.shared().expect("two share a slot");
    let (one, two) = (profiles[0].cpu.run_queue_ns.count, shared.cpu.run_queue_ns.count);
    eprintln!("{one} turns of one, {two} of two");
    assert_eq!((shared.instances, profiler.cgroups_known().instances_without_slot), (2, 2));
    assert!(one > 100 && two > one * 3 / 2 && two < one * 5 / 2, "{one} and {two}");
    // What was made in one that has no slot of its own is not counted for the others when it goes.
    let makes_known = profiler
        .probes()
        .iter()
        .all(|probe| !probe.name.starts_with("cgroup_") || probe.state == ProbeState::Active);
    cgroups[1..].iter().for_each(|cgroup| fs::create_dir(cgroup.0.join("child")).expect("a cgroup"));
    assert_eq!(profiler.cgroups_known().children, if makes_known { 2 } else { 0 });
    profiler.untrack(&names[1]);
    assert_eq!(profiler.cgroups_known().children, u64::from(makes_known));
    cgroups[1..].iter().for_each(|cgroup| fs::remove_dir(cgroup.0.join("child")).expect("it is empty"));
    profiler.track(&names[1], &cgroups[1].0).expect("there is always room");
    profiler.untrack(&names[0]);
    profiler.sample(UnixMillis::now());
    thread::sleep(Duration::from_millis(500));
    let profiles = profiler.sample(UnixMillis::now());
    assert!(profiles[0].cpu.counted && profiles[0].cpu.run_queue_ns.count > 50, "{:?}", profiles[0].cpu);
    assert_eq!(profiler.cgroups_known().instances_without_slot, 1);
    drop(cgroups);
    children.into_iter().for_each(reap);
}

#[test]
fn cgroups_for_which_there_is_no_room_cost_the_instance_nothing_else() {
    const ROOM: u64 = 8192;
    const TOO_MANY: u64 = 100;
    let test = "cgroups_for_which_there_is_no_room_cost_the_instance_nothing_else";
    let Some(profiler) = profiler(test, &["sched_switch"]) else { return };
    let cgroup = TestCgroup::create();
    let paths: Vec<_> = (0..ROOM + TOO_MANY).map(|n| cgroup.0.join(n.to_string())).collect();
    paths.iter().for_each(|path| fs::create_dir(path).expect("a cgroup"));
    let name = begin(&profiler, &cgroup.0);
    thread::sleep(Duration::from_millis(50));
    let profile = end(&profiler);
    let known = profiler.cgroups_known();
    eprintln!("{known:?}");
    assert!(profile.cpu.counted);
    assert!(known.known + known.unplaced == ROOM + TOO_MANY + 1 && known.unplaced > TOO_MANY, "{known:?}");
    // What goes makes room.
    paths.iter().take(1000).for_each(|path| fs::remove_dir(path).expect("it is empty"));
    end(&profiler);
    assert_eq!(profiler.cgroups_known().unplaced, 0, "{:?}", profiler.cgroups_known());
    profiler.untrack(&name);
    paths.iter().skip(1000).for_each(|path| fs::remove_dir(path).expect("it is empty"));
}
