//! A core swap moves every thread of a program that keeps making new ones, and a refused one changes nothing.
//! Needs root and two online CPUs; is skipped where it has not.

#![expect(clippy::unwrap_used, reason = "in a scenario a failed step fails the test, where it stands")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rswap_agent::{
    instance::{Instance, Origin, cgroup, launch::Place},
    pool::{CpuSet, cpu_list},
    swap::{
        SwapError,
        cpu::{self, Seat},
    },
    units::UnixMillis,
};
use rswap_tests::{reason_to_skip, skip};

const SPAWNER: &str = "RSWAP_TEST_SPAWNER";

/// Not a test of its own: the program that the tests move, started by them from this same file.
#[test]
fn spawner() {
    if std::env::var_os(SPAWNER).is_none() {
        return;
    }
    // The line says that it is in its cgroup; end of input, that the test is over.
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    println!("started");
    // A generation makes the next and ends: there is always a thread younger than the last look.
    for _ in 0..4 {
        thread::spawn(generation);
    }
    thread::sleep(Duration::from_secs(60));
    std::process::exit(0);
}

fn generation() {
    thread::sleep(Duration::from_millis(1));
    let next = thread::spawn(generation);
    thread::sleep(Duration::from_millis(20));
    drop(next);
}

/// The spawner in a cgroup of its own; both are gone when it is dropped.
struct Running {
    child: Child,
    cgroup: PathBuf,
}

impl Running {
    fn start(name: &str) -> Self {
        let cgroup = cgroup::mount_point().unwrap().join(format!("rswap-test-{name}-{}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "spawner", "--nocapture"])
            .env(SPAWNER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut running = Self { child, cgroup };
        fs::write(running.cgroup.join("cgroup.procs"), running.child.id().to_string()).unwrap();
        running.child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        let mut lines = BufReader::new(running.child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("started")), "the spawner did not start");
        thread::sleep(Duration::from_millis(100));
        running
    }

    fn instance(&self) -> Instance {
        Instance {
            name: "spawner".parse().unwrap(),
            labels: BTreeMap::new(),
            cgroup: self.cgroup.clone(),
            cgroup_id: 0,
            origin: Origin::Adopted,
            init_pid: None,
            command: vec![],
            network: None,
            volumes: Vec::new(),
            pool: None,
            uplink: None,
            memory: None,
            since: UnixMillis::now(),
        }
    }

    /// Every thread's `Cpus_allowed_list`, from /proc: another source than the swap reads.
    fn allowed(&self) -> Vec<CpuSet> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let status = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
        status
            .filter_map(|text| {
                let line = text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
                Some(cpu_list::parse(line).unwrap())
            })
            .collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.cgroup).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn place() -> (tempfile::TempDir, Place) {
    let directory = tempfile::tempdir().unwrap();
    let place = Place {
        state_dir: directory.path().to_owned(),
        cgroup_parent: "rswap-test".to_owned(),
        bridge: None,
        shared: Vec::new(),
        volumes: directory.path().join("volumes"),
    };
    fs::create_dir(place.state_dir.join("instances")).unwrap();
    (directory, place)
}

/// The online CPUs, if the test can run here.
fn usable(test: &str) -> Option<CpuSet> {
    reason_to_skip(test).is_none().then_some(())?;
    let online = cpu_list::parse(&fs::read_to_string("/sys/devices/system/cpu/online").unwrap()).unwrap();
    if online.len() < 2 {
        skip(test, "it needs two online CPUs");
        return None;
    }
    Some(online)
}

#[test]
fn every_thread_is_moved_and_moved_back() {
    let Some(online) = usable("every_thread_is_moved_and_moved_back") else { return };
    let running = Running::start("swap");
    let (_directory, place) = place();
    let mut from = Seat::default();
    for &cpu in online.iter().take(2) {
        let target = CpuSet::from([cpu]);
        let to = Seat { cpus: Some(target.clone()), ..Seat::default() };
        let report = cpu::move_to(&place, &running.instance(), &from, &to).unwrap();
        from = to;
        assert!(report.threads_moved >= 2 && report.passes >= 2, "{report:?}");
        // Generations come and go: all of them must stay inside.
        for _ in 0..10 {
            let allowed = running.allowed();
            assert!(allowed.len() >= 2, "the spawner has no threads");
            assert!(allowed.iter().all(|cpus| *cpus == target), "wanted {target:?}, found {allowed:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_refused_swap_changes_nothing() {
    let Some(online) = usable("a_refused_swap_changes_nothing") else { return };
    let running = Running::start("refused");
    let before: BTreeSet<CpuSet> = running.allowed().into_iter().collect();
    let offline = online.iter().max().unwrap() + 1;
    let (_directory, place) = place();
    let move_to = |cpus: CpuSet| {
        let to = Seat { cpus: Some(cpus), ..Seat::default() };
        cpu::move_to(&place, &running.instance(), &Seat::default(), &to)
    };
    let error = move_to(CpuSet::from([0, offline])).unwrap_err();
    assert!(matches!(&error, SwapError::NotOnline { cpus } if *cpus == CpuSet::from([offline])), "{error}");
    let after: BTreeSet<CpuSet> = running.allowed().into_iter().collect();
    assert_eq!(before, after);
    // And it can still be moved.
    move_to(CpuSet::from([0])).unwrap();
    assert!(running.allowed().iter().all(|cpus| *cpus == CpuSet::from([0])));
}
