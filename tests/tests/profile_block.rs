//! Block I/O of the profile against fio's own figures: time in the queue and on the device, operations, and what is nobody's.
//!
//! Each needs root, loop devices, and the kernel's type information with the tracepoints of block requests.

use std::{
    fs,
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use rswap_agent::profile::{BlockProfile, Operation, Profile, Profiler, UnownedBlock};
use rswap_tests::{
    loop_device::{FileSystem, LoopDevice},
    profiled::{TestCgroup, begin, end, profiler, wait},
    served_disk::Speed,
    skip,
};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Two at a time would share the cores that loop devices are served on.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A disk that nothing is mounted from.
struct Disk {
    device: LoopDevice,
    _directory: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        // Not in /tmp, which may be in memory.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory");
        let device = LoopDevice::create(directory.path(), 64 * MIB).expect("a loop device");
        device.unmount().expect("unmounting it");
        Self { device, _directory: directory }
    }

    /// One that serves one request after the other, and each takes so long: what fio and the kernel do beside is little next to it.
    fn slow(per_request: Duration) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory");
        let device =
            LoopDevice::create_served(directory.path(), 64 * MIB, FileSystem::Ext4).expect("a loop device");
        device.unmount().expect("unmounting it");
        device.set_speed(Speed::of(per_request)).expect("a speed");
        Self { device, _directory: directory }
    }

    fn name(&self) -> &str {
        self.device.device().trim_start_matches("/dev/")
    }

    fn queue(&self, file: &str) -> String {
        fs::read_to_string(format!("/sys/block/{}/queue/{file}", self.name())).expect("reading it")
    }

    fn set_queue(&self, file: &str, value: &str) {
        fs::write(format!("/sys/block/{}/queue/{file}", self.name()), value).expect("writing it");
    }

    fn number(&self) -> String {
        fs::read_to_string(format!("/sys/block/{}/dev", self.name())).expect("reading it").trim().to_owned()
    }

    fn fio(&self, arguments: &[&str]) -> Command {
        let mut fio = Command::new("fio");
        fio.args([
            "--name=block",
            "--direct=1",
            "--size=60m",
            "--output-format=json",
            "--allow_file_create=0",
        ])
        .arg(format!("--filename={}", self.device.device()))
        .args(arguments)
        .stdout(Stdio::piped());
        fio
    }
}

fn report(output: &str) -> Value {
    serde_json::from_str(&output[output.find('{').expect("JSON")..]).expect("JSON")
}

/// The profile of fio in a cgroup of its own, and what fio says.
fn profile_of(profiler: &Profiler, disk: &Disk, arguments: &[&str]) -> (Profile, Value) {
    let cgroup = TestCgroup::create();
    // The first run also reads fio's own program and libraries, if they are not in memory.
    wait(
        disk.fio(&["--rw=randread", "--bs=4k", "--io_size=4k"]).spawn().expect("starting it"),
        Duration::from_secs(30),
    );
    let name = begin(profiler, &cgroup.0);
    let output = wait(cgroup.spawn(&mut disk.fio(arguments)), Duration::from_secs(60));
    let profile = end(profiler);
    profiler.untrack(&name);
    (profile, report(&output))
}

fn of(profile: &Profile, disk: &Disk, operation: Operation) -> BlockProfile {
    let found = profile.block.iter().find(|of| of.device == disk.number() && of.operation == operation);
    found.unwrap_or_else(|| panic!("no {operation:?} of {} in {:?}", disk.number(), profile.block)).clone()
}

fn needed(test: &str) -> Option<Profiler> {
    profiler(test, &["block_rq_complete", "block_io_start"])
}

#[test]
fn times_are_those_that_fio_logs() {
    let Some(profiler) = needed("times_are_those_that_fio_logs") else { return };
    let _one = ONE_AT_A_TIME.lock();
    let disk = Disk::slow(Duration::from_millis(2));
    disk.set_queue("scheduler", "none");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let log = format!("--write_lat_log={}", directory.path().join("fio").display());
    let deep = ["--rw=randread", "--bs=4k", "--ioengine=libaio", "--iodepth=8", "--number_ios=1500", &log];
    let (profile, fio) = profile_of(&profiler, &disk, &deep);
    let (reads, logged) = (of(&profile, &disk, Operation::Read), &fio["jobs"][0]["read"]);
    let [ios, bytes, runtime_ms] =
        ["total_ios", "io_bytes", "runtime"].map(|key| logged[key].as_u64().unwrap() as f64);
    let clat = |key: &str| logged["clat_ns"][key].as_f64().unwrap();
    let p50 = logged["clat_ns"]["percentile"]["50.000000"].as_f64().unwrap();
    let device_ns = reads.latency_ns.mean().unwrap();
    let queue_ns = reads.queue_ns.mean().unwrap();
    // The window is longer than fio's run.
    let in_flight = reads.in_flight * profile.window_ms as f64 / runtime_ms;
    eprintln!(
        "{} requests against {ios}; {device_ns:.0} ns on the device, {queue_ns:.0} ns before, clat {:.0} ns; p50 {:?} against \
         {p50} ns; {in_flight:.1} in flight",
        reads.latency_ns.count,
        clat("mean"),
        reads.latency_ns.quantile(0.5)
    );
    let near = |found: f64, expected: f64, share: f64| {
        assert!((found - expected).abs() <= expected * share, "{found} against {expected}");
    };
    assert_eq!(reads.not_split, 0, "this kernel keeps both times");
    near(reads.latency_ns.count as f64, ios, 0.001);
    near(reads.bytes as f64, bytes, 0.001);
    // As it logs them, one by one.
    let lines = fs::read_to_string(directory.path().join("fio_clat.1.log")).expect("fio's log");
    let said = lines.lines().map(|line| line.split(", ").nth(1).expect("a time").parse().expect("a number"));
    let mut said: Vec<u64> = said.collect();
    said.sort_unstable();
    assert_eq!(said.len() as f64, ios);
    let quantiles = [0.1, 0.25, 0.5, 0.75, 0.9, 0.99].map(|q| {
        let own = said[(q * said.len() as f64) as usize];
        let found = reads.latency_ns.quantile(q).expect("there are some");
        eprintln!("  q{q}: {found} ns; fio: {own} ns");
        (q, found, own)
    });
    for (q, found, own) in quantiles {
        // One bucket is an eighth at most.
        assert!(found.abs_diff(own) <= own / 8, "q{q}: {found} against {own}");
    }
    // What fio waits for begins before the request is made, and ends when it looks.
    assert!(device_ns + queue_ns < clat("mean") * 1.01, "{} against {}", device_ns + queue_ns, clat("mean"));
    near(device_ns + queue_ns, clat("mean"), 0.05);
    near(reads.latency_ns.quantile(0.5).unwrap() as f64, p50, 0.1);
    near(in_flight, 8.0, 0.1);
}

#[test]
fn what_waits_in_the_scheduler_waits_in_the_queue() {
    let Some(profiler) = needed("what_waits_in_the_scheduler_waits_in_the_queue") else { return };
    let _one = ONE_AT_A_TIME.lock();
    let disk = Disk::slow(Duration::from_micros(500));
    if !disk.queue("scheduler").contains("mq-deadline") {
        skip("what_waits_in_the_scheduler_waits_in_the_queue", "this kernel has no mq-deadline");
        return;
    }
    // The driver takes 128 at once.
    disk.set_queue("scheduler", "mq-deadline");
    disk.set_queue("nr_requests", "256");
    let run = |depth: &str| {
        let depth = format!("--iodepth={depth}");
        let deep = ["--rw=randread", "--bs=4k", "--ioengine=libaio", &depth, "--time_based", "--runtime=3"];
        let (profile, fio) = profile_of(&profiler, &disk, &deep);
        let reads = of(&profile, &disk, Operation::Read);
        let (queue, device) = (reads.queue_ns.sum as f64, reads.latency_ns.sum as f64);
        let waited = queue / (queue + device);
        eprintln!(
            "{depth}: {waited:.2} of the time in the queue; clat {}",
            fio["jobs"][0]["read"]["clat_ns"]["mean"]
        );
        waited
    };
    let (shallow, deep) = (run("16"), run("256"));
    // By Little's law: 128 of 256 are with the driver.
    assert!((0.4..0.6).contains(&deep), "{deep} of the time waited for the driver");
    assert!(shallow < 0.1, "{shallow} waited, though the driver had room");
}

#[test]
fn who_uses_the_same_disk_is_named() {
    let Some(profiler) = needed("who_uses_the_same_disk_is_named") else { return };
    let _one = ONE_AT_A_TIME.lock();
    // It serves one request after the other: of the time of one, all but its own 2 ms is for those before it.
    let disk = Disk::slow(Duration::from_millis(2));
    disk.set_queue("scheduler", "none");
    let run = |depth: &str, seconds: &str| {
        let (depth, seconds) = (format!("--iodepth={depth}"), format!("--runtime={seconds}"));
        disk.fio(&["--rw=randread", "--bs=4k", "--ioengine=libaio", "--time_based", &depth, &seconds])
    };
    let next_to = TestCgroup::create();
    let expected = next_to.who();
    let neighbour = next_to.spawn(&mut run("6", "8"));
    thread::sleep(Duration::from_secs(1));
    let cgroup = TestCgroup::create();
    let name = begin(&profiler, &cgroup.0);
    let fio = report(&wait(cgroup.spawn(&mut run("2", "3")), Duration::from_secs(30)));
    let profile = end(&profiler);
    profiler.untrack(&name);
    drop(next_to);
    rswap_tests::profiled::reap(neighbour);

    let devices: Vec<_> = profile.disk_neighbours.iter().filter(|of| of.device == disk.number()).collect();
    let [device] = devices[..] else { panic!("one device: {:?}", profile.disk_neighbours) };
    eprintln!("{device:?}");
    let first = device.others.first().expect("somebody used it");
    assert_eq!(first.who, expected);
    let read = &fio["jobs"][0]["read"];
    let clat_ns = read["clat_ns"]["mean"].as_f64().expect("a time");
    let runtime_s = read["runtime"].as_f64().expect("a time") / 1e3;
    let near = |found: f64, expected: f64| {
        assert!((found - expected).abs() <= expected * 0.1, "{found} against {expected}");
    };
    // Six of eight that are under way are the neighbour's, also before fio's start and after its end.
    near(first.device_ns as f64 / 1e9, 6.0 * profile.window_ms as f64 / 1e3);
    near(device.own_ns as f64 / 1e9, 2.0 * runtime_s);
    let waited_share = first.waited_ns as f64 / device.own_ns as f64;
    // As fio has it: all of it but for the instance's own two.
    near(waited_share, (clat_ns - 2.0 * 2e6) / clat_ns);
}

#[test]
fn flushes_and_discards_are_counted_as_such() {
    let Some(profiler) = needed("flushes_and_discards_are_counted_as_such") else { return };
    let _one = ONE_AT_A_TIME.lock();
    let disk = Disk::new();
    let (profile, fio) = profile_of(
        &profiler,
        &disk,
        &["--rw=write", "--bs=4k", "--ioengine=psync", "--fsync=1", "--io_size=2m"],
    );
    let writes = of(&profile, &disk, Operation::Write);
    assert_eq!(
        (writes.latency_ns.count, writes.bytes),
        (512, 2 * MIB),
        "of {}",
        fio["jobs"][0]["write"]["total_ios"]
    );
    if disk.queue("write_cache").trim() == "write back" {
        let flushes = of(&profile, &disk, Operation::Flush);
        eprintln!("{} flushes, p50 {:?} ns", flushes.latency_ns.count, flushes.latency_ns.quantile(0.5));
        assert!(
            (511..=514).contains(&flushes.latency_ns.count),
            "{} for 512 writes",
            flushes.latency_ns.count
        );
        assert_eq!((flushes.bytes, flushes.not_split), (0, flushes.latency_ns.count));
    }
    // Only what moves data counts as I/O in one figure; on another disk, fio's own files may have been read.
    let moves_data = |of: &&BlockProfile| matches!(of.operation, Operation::Read | Operation::Write);
    let moved: u64 = profile.block.iter().filter(moves_data).map(|of| of.latency_ns.count).sum();
    assert_eq!(profile.io_latency_ns().count, moved, "{:?}", profile.block);
    assert!(moved >= 512, "{moved}");

    if disk.queue("discard_max_bytes").trim() == "0" {
        eprintln!("no discard on this file system");
        return;
    }
    let cgroup = TestCgroup::create();
    let name = begin(&profiler, &cgroup.0);
    let mut discard = Command::new("blkdiscard");
    discard.args(["--offset", "4194304", "--length", "8388608", disk.device.device()]);
    wait(cgroup.spawn(&mut discard), Duration::from_secs(10));
    let profile = end(&profiler);
    profiler.untrack(&name);
    let discards = of(&profile, &disk, Operation::Discard);
    assert_eq!(discards.bytes, 8 * MIB);
    // Beside, blkdiscard's own program is read, if it was not in memory.
    let moved = profile.io_bytes_per_s().unwrap() * profile.window_ms as f64 / 1e3;
    assert!(moved < 4e6, "{moved} bytes");
}

#[test]
fn what_is_nobodys_is_shown_as_nobodys() {
    let Some(profiler) = needed("what_is_nobodys_is_shown_as_nobodys") else { return };
    let _one = ONE_AT_A_TIME.lock();
    let disk = Disk::new();
    let cgroup = TestCgroup::create();
    begin(&profiler, &cgroup.0);
    let shown = || {
        profiler.sample(rswap_agent::units::UnixMillis::now());
        let block = profiler.host_block();
        block.unowned.into_iter().find(|of| of.device == disk.number())
    };
    let before = shown();
    let output = wait(
        disk.fio(&["--rw=read", "--bs=64k", "--ioengine=psync", "--io_size=8m"]).spawn().unwrap(),
        Duration::from_secs(30),
    );
    let read = report(&output)["jobs"][0]["read"]["io_bytes"].as_u64().unwrap();
    let after = shown().expect("it was read");
    let reads = |of: &UnownedBlock| of.reads.bytes;
    let counted = reads(&after) - before.as_ref().map_or(0, reads);
    // udev, where it is, looks at a device that was opened.
    assert!((read..read + MIB).contains(&counted), "{counted} against {read}");

    // What an instance has written and the kernel writes back later is nobody's, unless cgroup v2 has the io controller.
    let mount = rswap_agent::profile::unified_mount().unwrap();
    if fs::read_to_string(mount.join("cgroup.controllers")).unwrap().split_whitespace().any(|of| of == "io") {
        eprintln!("write-back has owners here");
        return;
    }
    // Who calls sync(2) meanwhile has it written sooner, and not in the background.
    let written = (0..3).map(|_| written_back(&cgroup, &disk, &shown)).find(|bytes| *bytes > 0);
    assert_eq!(written, Some(8 * MIB), "written back");
}

/// Has 8 MiB written by a program in `cgroup`, and waits until somebody has written them to the disk: how many were written in the background.
fn written_back(cgroup: &TestCgroup, disk: &Disk, shown: &dyn Fn() -> Option<UnownedBlock>) -> u64 {
    let before = shown().expect("it is there");
    // Through the page cache of a file that is not closed: a device that nobody has open any more is written back at once.
    let script = format!(
        "import os, time\nfd = os.open({:?}, os.O_RDWR)\nfor i in range(8): os.pwrite(fd, b'x' * (1 << 20), i << 20)\ntime.sleep(90)\n",
        disk.device.device()
    );
    let mut writer = cgroup.spawn(Command::new("python3").args(["-c", &script]));
    // Pages are written back that are older than this, every few seconds.
    let centiseconds: u64 = fs::read_to_string("/proc/sys/vm/dirty_expire_centisecs")
        .expect("reading it")
        .trim()
        .parse()
        .expect("reading it");
    let deadline = Instant::now() + Duration::from_millis(centiseconds * 10) + Duration::from_secs(30);
    let (mut sooner, mut in_background) = (0, 0);
    while sooner + in_background < 8 * MIB && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(500));
        let now = shown().expect("it is there");
        sooner = now.writes.bytes - before.writes.bytes;
        in_background = now.write_back.bytes - before.write_back.bytes;
    }
    let _ended = writer.kill();
    writer.wait().expect("waiting for it");
    assert_eq!(sooner + in_background, 8 * MIB, "{sooner} sooner, {in_background} in the background");
    if sooner > 0 { 0 } else { in_background }
}
