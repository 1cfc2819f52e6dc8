//! The profile against independent counts: the kernel's own, fio's, and a program's that counts its bytes.
//!
//! Each needs root, and the kernel's type information (BTF) with the tracepoints that it measures by: where the
//! kernel has no such thing the test is skipped, and where it has, a probe that does not load fails it.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rswap_agent::profile::Operation;
use rswap_tests::{
    moves,
    profiled::{TestCgroup, begin, end, profiler, reap, supervisor_schedstat, wait},
};

#[test]
fn cpu_time_is_that_of_the_kernels_cpu_stat() {
    let Some(profiler) = profiler("cpu_time_is_that_of_the_kernels_cpu_stat", &[]) else { return };
    let cgroup = TestCgroup::create();
    let child = cgroup.spawn(Command::new("timeout").args([
        "20",
        "taskset",
        "-c",
        "0",
        "sh",
        "-c",
        "while :; do :; done",
    ]));
    thread::sleep(Duration::from_millis(200));
    begin(&profiler, &cgroup.0);
    let (usage, started) = (cgroup.cpu_usage_us(), Instant::now());
    thread::sleep(Duration::from_secs(2));
    let profile = end(&profiler);
    let cores = (cgroup.cpu_usage_us() - usage) as f64 / started.elapsed().as_micros() as f64;
    eprintln!("profile: {:.4} cores; cpu.stat: {cores:.4}", profile.cpu.cores);
    assert!((profile.cpu.cores - cores).abs() < 0.02, "{} against {cores}", profile.cpu.cores);
    assert!(profile.memory.resident_bytes > 0);
    drop(cgroup);
    reap(child);
}

#[test]
fn block_requests_are_those_that_fio_counts() {
    let needed = ["block_rq_complete", "block_io_start"];
    let Some(profiler) = profiler("block_requests_are_those_that_fio_counts", &needed) else { return };
    let cgroup = TestCgroup::create();
    // Not in /tmp, which may be in memory.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = directory.path().join("data");
    let mut data = fs::File::create(&file).unwrap();
    for block in 0..64u8 {
        data.write_all(&vec![block + 1; 1 << 20]).unwrap();
    }
    data.sync_all().unwrap();
    drop(data);

    let fio = |runtime: &str| {
        let mut fio = Command::new("fio");
        fio.args([
            "--name=count",
            "--rw=randread",
            "--bs=4k",
            "--direct=1",
            "--ioengine=psync",
            "--size=64m",
        ])
        .args(["--time_based", "--output-format=json", "--allow_file_create=0"])
        .args([format!("--runtime={runtime}"), format!("--filename={}", file.display())])
        .stdout(Stdio::piped());
        fio
    };
    // The first run also reads fio's own program and libraries from the disk, which fio doesn't count.
    wait(fio("1").spawn().unwrap(), Duration::from_secs(30));
    begin(&profiler, &cgroup.0);
    let (started, [supervisor_before_ns, ..]) = (Instant::now(), supervisor_schedstat());
    let output = wait(cgroup.spawn(&mut fio("3")), Duration::from_secs(30));
    let profile = end(&profiler);
    let supervisor_ns = supervisor_schedstat()[0].saturating_sub(supervisor_before_ns);
    let supervised = supervisor_ns as f64 / started.elapsed().as_nanos() as f64;
    // Half as much again, since requests don't end evenly over the time.
    let unseen = 0.001 + 1.5 * supervised;

    let output: serde_json::Value = serde_json::from_str(&output[output.find('{').unwrap()..]).unwrap();
    let read = &output["jobs"][0]["read"];
    let (requests, bytes) = (read["total_ios"].as_u64().unwrap(), read["io_bytes"].as_u64().unwrap());
    let reads: Vec<_> = profile.block.iter().filter(|block| block.operation == Operation::Read).collect();
    assert_eq!(reads.len(), 1, "one device: {:?}", profile.block);
    let latency = &reads[0].latency_ns;
    eprintln!(
        "profile: {} requests, {} bytes on {}; fio: {requests}, {bytes}, {:.2} % of which may end unseen; p50 {:?} ns, fio's \
         mean {} ns",
        latency.count,
        reads[0].bytes,
        reads[0].device,
        unseen * 100.0,
        latency.quantile(0.5),
        read["clat_ns"]["mean"]
    );
    assert_ne!(reads[0].device, "other", "the disk has a place of its own");
    for (counted, truth) in [(latency.count, requests), (reads[0].bytes, bytes)] {
        assert!(counted as f64 <= truth as f64 * 1.001, "{counted} against {truth}");
        assert!(counted as f64 >= truth as f64 * (1.0 - unseen), "{counted} against {truth}");
    }
    // A request is part of what fio waits for, so it can't take longer on average.
    let clat_mean_ns = read["clat_ns"]["mean"].as_f64().unwrap();
    let mean_ns = latency.mean().unwrap();
    assert!(mean_ns < clat_mean_ns && mean_ns > clat_mean_ns * 0.2, "{mean_ns} against {clat_mean_ns}");
}

#[test]
fn resident_memory_is_that_of_who_is_there() {
    let test = "resident_memory_is_that_of_who_is_there";
    let Some(profiler) = profiler(test, &["page_fault_user"]) else { return };
    // Has so many megabytes, and touches nothing more.
    let holder = |megabytes: u64| {
        let script = format!(
            "held = b'x' * ({megabytes} << 20)\nprint('there', flush=True)\nimport time\ntime.sleep(60)\n"
        );
        let mut command = Command::new(moves::python().unwrap());
        command.args(["-c", &script]).stdout(Stdio::piped());
        command
    };
    let there = |child: &mut Child| {
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    };
    let cgroup = TestCgroup::create();
    let mut first = cgroup.spawn(&mut holder(50));
    let mut second = cgroup.spawn(&mut holder(200));
    there(&mut first);
    there(&mut second);
    begin(&profiler, &cgroup.0);
    let megabytes = || {
        thread::sleep(Duration::from_millis(20));
        end(&profiler).memory.resident_bytes >> 20
    };
    let both = megabytes();
    assert!((250..320).contains(&both), "{both}");
    // In a while in which nobody has a fault, too.
    thread::sleep(Duration::from_millis(200));
    (0..3).for_each(|_| _ = megabytes());
    second.kill().unwrap();
    second.wait().unwrap();
    let one = megabytes();
    assert!((50..100).contains(&one), "{one}");
    // Who is moved into the cgroup has no fault there.
    let other = TestCgroup::create();
    let mut third = other.spawn(&mut holder(100));
    there(&mut third);
    fs::write(cgroup.0.join("cgroup.procs"), third.id().to_string()).unwrap();
    let windows = (1..=12).find(|_| megabytes() >= 150);
    eprintln!("seen in window {windows:?}");
    assert!(windows.is_some_and(|windows| windows <= 11), "{windows:?}");
    drop(cgroup);
    reap(first);
    reap(third);
}

#[test]
fn tcp_bytes_are_those_that_the_program_counts() {
    let needed = ["inet_sock_set_state"];
    let Some(profiler) = profiler("tcp_bytes_are_those_that_the_program_counts", &needed) else { return };
    let cgroup = TestCgroup::create();
    begin(&profiler, &cgroup.0);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Echoes are larger than requests, so that the directions can't be mistaken for each other.
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut request = [0; 64];
        while stream.read_exact(&mut request).is_ok() {
            stream.write_all(&[7; 1000]).unwrap();
        }
    });
    let client = format!(
        "import socket\ns = socket.create_connection(('127.0.0.1', {port}), timeout=10)\nsent = received = 0\n\
         for i in range(2000):\n    s.sendall(b'x' * 64)\n    sent += 64\n    want = 1000\n    \
         while want:\n        s.recv(10, socket.MSG_PEEK)\n        got = len(s.recv(want))\n        want -= got\n        received += got\n\
         print(sent, received)\n"
    );
    let child = cgroup.spawn(Command::new("python3").args(["-c", &client]).stdout(Stdio::piped()));
    let output = wait(child, Duration::from_secs(30));
    server.join().unwrap();
    let profile = end(&profiler);
    let counted: Vec<u64> = output.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let rtt = &profile.tcp.rtt_us;
    eprintln!(
        "profile: {} out, {} in; program: {counted:?}; {} round-trip samples, p50 {:?} us",
        profile.tcp.bytes_out,
        profile.tcp.bytes_in,
        rtt.count,
        rtt.quantile(0.5)
    );
    assert_eq!([profile.tcp.bytes_out, profile.tcp.bytes_in], counted[..]);
    assert!(profile.tcp_counted);
    // One connection in one window.
    assert!(rtt.count == 1 && rtt.quantile(0.5).unwrap() < 10_000, "{rtt:?}");
}

#[test]
fn events_of_a_cgroup_below_are_counted_and_those_of_an_untracked_one_are_not() {
    let test = "events_of_a_cgroup_below_are_counted_and_those_of_an_untracked_one_are_not";
    let Some(profiler) = profiler(test, &["sched_switch"]) else { return };
    let cgroup = TestCgroup::create();
    let below = TestCgroup(cgroup.0.join("below"));
    fs::create_dir(&below.0).unwrap();
    let name = begin(&profiler, &cgroup.0);
    let naps = || {
        let mut command = Command::new("sh");
        command.args(["-c", "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.01; done"]);
        command
    };
    wait(below.spawn(&mut naps()), Duration::from_secs(10));
    let profile = end(&profiler);
    assert!(profile.cpu.on_cpu_ns.count >= 10, "{} switches below", profile.cpu.on_cpu_ns.count);

    profiler.untrack(&name);
    begin(&profiler, &cgroup.0);
    wait(naps().spawn().unwrap(), Duration::from_secs(10));
    assert_eq!(end(&profiler).cpu.on_cpu_ns.count, 0, "a foreign process was counted");
}
