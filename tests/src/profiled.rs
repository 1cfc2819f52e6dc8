//! What the tests of the profile have in common: a cgroup of their own, a profiler that tracks it, and what the kernel says of both.

#![expect(
    clippy::unwrap_used,
    reason = "a scenario that can't be set up has failed, and may say so by panicking"
)]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use rswap_agent::{
    instance::InstanceName,
    profile::{
        CpuProfile, ProbeState, Profile, ProfileConfig, Profiler, Who, btf::KernelTypes,
        histogram::Histogram, unified_mount,
    },
    units::UnixMillis,
};

use crate::{moves, reason_to_skip, skip};

/// A cgroup of the test's own. Dropping it kills what is in it and removes it.
#[derive(Debug)]
pub struct TestCgroup(pub PathBuf);

impl TestCgroup {
    /// Makes it.
    pub fn create() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rswap-test-profile-{}-{number}", std::process::id());
        let path = unified_mount().unwrap().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Starts `command` in the cgroup: it is there before its program begins.
    pub fn spawn(&self, command: &mut Command) -> Child {
        let procs = self.0.join("cgroup.procs");
        // SAFETY: needed because the program must be in the cgroup from its first instruction on; between
        // fork and exec it only opens, writes and closes a file (the path was allocated before).
        unsafe { command.pre_exec(move || fs::write(&procs, "0")) };
        command.spawn().expect("start the program under test")
    }

    /// Freezes what is in it, or lets it go on, and waits until that is so.
    pub fn freeze(&self, frozen: bool) {
        fs::write(self.0.join("cgroup.freeze"), if frozen { "1" } else { "0" }).unwrap();
        let wanted = format!("frozen {}", u8::from(frozen));
        // Each of its threads must come to run for that.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !fs::read_to_string(self.0.join("cgroup.events")).unwrap().contains(&wanted) {
            assert!(Instant::now() < deadline, "the cgroup does not become {wanted}");
            thread::sleep(Duration::from_millis(5));
        }
        // The last of its threads are off their CPUs.
        thread::sleep(Duration::from_millis(50));
    }

    /// As profiles of others name it.
    pub fn who(&self) -> Who {
        let below = self.0.strip_prefix(unified_mount().unwrap()).unwrap();
        Who::Cgroup(format!("/{}", below.display()))
    }

    /// The ids of its threads.
    pub fn threads(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.0.join("cgroup.threads")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    /// What `/proc/TID/schedstat` has of all of its threads.
    pub fn schedstat(&self) -> [u64; 3] {
        schedstat_of(self.threads())
    }

    /// CPU time used in it, in microseconds.
    pub fn cpu_usage_us(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("cpu.stat")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
        line.parse().unwrap()
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _old_kernel = fs::write(self.0.join("cgroup.kill"), "1");
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A profiler whose probes of these names count; `None`, counted as skipped, where the kernel doesn't have them.
pub fn profiler(test: &str, needed: &[&str]) -> Option<Profiler> {
    let config = ProfileConfig { slots: 8, measure_program_cost: true, ..ProfileConfig::default() };
    profiler_with(test, needed, &config)
}

/// The same as it is configured.
pub fn profiler_with(test: &str, needed: &[&str], config: &ProfileConfig) -> Option<Profiler> {
    reason_to_skip(test).is_none().then_some(())?;
    let types = KernelTypes::of_this_kernel();
    for tracepoint in needed {
        let lacks = match &types {
            Ok(types) => types.tracepoint_arguments(tracepoint).err().map(|error| error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = lacks {
            skip(test, &reason);
            return None;
        }
    }
    let profiler = Profiler::start(config);
    for status in profiler.probes() {
        if let ProbeState::Unavailable { reason } = status.state {
            assert!(!needed.contains(&status.name.as_str()), "the probe {}: {reason}", status.name);
        }
    }
    Some(profiler)
}

/// Tracks `cgroup` and begins its first window.
pub fn begin(profiler: &Profiler, cgroup: &Path) -> InstanceName {
    let name: InstanceName = "under-test".parse().unwrap();
    profiler.track(&name, cgroup).unwrap();
    assert!(profiler.sample(UnixMillis::now()).is_empty(), "the first sample only begins the window");
    name
}

/// The profile of the one tracked instance since [`begin`], or the last time.
pub fn window(profiler: &Profiler) -> Profile {
    // Of no time, nothing is said.
    thread::sleep(Duration::from_millis(2));
    profiler.sample(UnixMillis::now()).pop().expect("a tracked instance has a profile")
}

/// The same, and says what it cost.
pub fn end(profiler: &Profiler) -> Profile {
    let profile = window(profiler);
    for cost in profiler.program_costs() {
        eprintln!("{}: {} runs, {:.0} ns each", cost.name, cost.runs, cost.ns_per_run);
    }
    profile
}

/// Waits for `child` at most `limit`, then kills it.
pub fn wait(mut child: Child, limit: Duration) -> String {
    let deadline = Instant::now() + limit;
    let mut stdout = child.stdout.take();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        if let Some(stdout) = &mut stdout {
            stdout.read_to_string(&mut text).unwrap();
        }
        text
    });
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "the program under test failed: {status}");
            return reader.join().unwrap();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the program under test took longer than {limit:?}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for a child that its cgroup's removal has killed.
pub fn reap(mut child: Child) {
    let _killed = child.wait();
}

/// The profiles from when a Python program in a cgroup of its own has said that it is there, and is told to go on, to its next line, which is answered, too. It ends with
/// its input.
pub fn while_told<const N: usize>(profilers: [&Profiler; N], script: &str) -> ([CpuProfile; N], String) {
    let cgroup = TestCgroup::create();
    let mut command = Command::new(moves::python().expect("python3"));
    command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = cgroup.spawn(&mut command);
    let (mut to, from) = (child.stdin.take().expect("its input"), child.stdout.take().expect("its output"));
    let mut lines = BufReader::new(from).lines().map(|line| line.expect("its output"));
    assert_eq!(lines.next().as_deref(), Some("there"));
    for profiler in profilers {
        begin(profiler, &cgroup.0);
    }
    writeln!(to, "go").expect("telling it");
    let line = lines.next().expect("its answer");
    let profiles = profilers.map(|profiler| end(profiler).cpu);
    drop(to);
    reap(child);
    (profiles, line)
}

/// A line of numbers.
pub fn numbers(line: &str) -> Vec<u64> {
    line.split_whitespace().map(|word| word.parse().expect("a number")).collect()
}

/// That these quantiles of what was found are between those of what is known of each at least and at most, to a bucket.
pub fn assert_quantiles(what: &str, found: &Histogram, [least, most]: [&[u64]; 2], quantiles: &[f64]) {
    let sorted = |of: &[u64]| {
        let mut of = of.to_vec();
        of.sort_unstable();
        of
    };
    let (least, most) = (sorted(least), sorted(most));
    for q in quantiles {
        let [least, most] = [&least, &most].map(|of| of[(q * of.len() as f64) as usize]);
        let found = found.quantile(*q).expect("samples");
        eprintln!("{what}: q{q} is {found} ns, known to be {least} to {most} ns");
        // One bucket is an eighth at most.
        assert!(
            (least - least / 8..=most + most / 8).contains(&found),
            "{what}: q{q} is {found}, known to be {least} to {most} ns"
        );
    }
}

/// `/proc/PID/schedstat`: nanoseconds on a CPU, nanoseconds waiting for one, number of times on one.
fn schedstat(pid: u32) -> Option<[u64; 3]> {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    numbers(&text).try_into().ok()
}

fn schedstat_of(threads: impl IntoIterator<Item = u32>) -> [u64; 3] {
    let each = threads.into_iter().filter_map(schedstat);
    each.fold([0; 3], |sum, one| [0, 1, 2].map(|at| sum[at] + one[at]))
}

/// What `/proc/TID/schedstat` has of all threads of process 1: time on a CPU, time waiting for one, number of times on one.
///
/// The guest kernel of a virtual machine was seen (6.18) to run no eBPF program while a thread of process 1, the supervisor
/// of the machine, is current: not at its own events, and not at the interrupts that come then, such as the end of somebody's
/// request. The kernel's tracer (tracefs) has those events. On other machines process 1 does next to nothing.
pub fn supervisor_schedstat() -> [u64; 3] {
    let threads = fs::read_dir("/proc/1/task").unwrap().flatten();
    schedstat_of(threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok()))
}
