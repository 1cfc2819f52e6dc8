//! What the profile says of memory, with programs that touch a known number of pages at known times.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use rswap_agent::{
    forecast::Resource,
    instance::cgroup::stands_still,
    profile::{MemoryProfile, PageAges, ProbeState, Profile, ProfileConfig, Profiler, histogram::Histogram},
    status::InstanceView,
    units::UnixMillis,
};
use rswap_tests::{
    Fleet, HostOptions, binary, moves,
    profiled::{TestCgroup, begin, end, profiler_with, reap},
    reason_to_skip, wait_for,
};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// What Python uses of itself while it waits, reads and touches; what others use of the same files counts, too.
const INTERPRETER: u64 = 12 * MIB;
const LIMIT: Duration = Duration::from_secs(20);

/// Reads or writes what it is told to: a line has the first page, how many pages apart, how many, and whether they are written. Answers each.
const TOUCHER: &str = r#"
import mmap, sys
size, advice = int(sys.argv[1]), int(sys.argv[2])
memory = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(advice)
for at in range(0, size, 4096): memory[at] = 1
print("ready", flush=True)
for line in sys.stdin:
    first, apart, count, write = map(int, line.split())
    for page in range(first, first + apart * count, apart):
        if write: memory[page * 4096] = 2
        else: memory[page * 4096]
    print("done", flush=True)
"#;

struct Toucher {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Toucher {
    fn start(cgroup: &TestCgroup, bytes: u64, advice: i32) -> Self {
        let mut command = Command::new(moves::python().expect("python3"));
        command.args(["-c", TOUCHER, &bytes.to_string(), &advice.to_string()]);
        let mut child = cgroup.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let to = child.stdin.take().expect("its input");
        let from = BufReader::new(child.stdout.take().expect("its output"));
        let mut this = Self { child, to, from };
        this.answer("ready");
        this
    }

    fn answer(&mut self, expected: &str) {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("an answer");
        assert_eq!(line.trim(), expected);
    }

    fn touch(&mut self, first: u64, apart: u64, count: u64) {
        writeln!(self.to, "{first} {apart} {count} 0").expect("it listens");
        self.answer("done");
    }

    fn write(&mut self, first: u64, apart: u64, count: u64) {
        writeln!(self.to, "{first} {apart} {count} 1").expect("it listens");
        self.answer("done");
    }

    /// Mappings of which writes are noted.
    fn noted(&self) -> usize {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id())).expect("smaps");
        smaps.lines().filter(|line| line.starts_with("VmFlags:") && line.contains(" uw")).count()
    }

    /// Waits until none are noted any more: a window does not wait for that.
    fn is_let_go_of(&self) {
        let deadline = Instant::now() + LIMIT;
        while self.noted() > 0 {
            assert!(Instant::now() < deadline, "its writes are noted still");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn huge_bytes(&self) -> u64 {
        let smaps =
            std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id())).expect("smaps");
        let huge = smaps.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).expect("a line");
        huge.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }
}

fn profiler(test: &str, memory_lock_ms: u64) -> Option<Profiler> {
    reason_to_skip(test).is_none().then_some(())?;
    // As much as it needs: others build on this machine, and the test is of what is counted, not of the budget.
    let config = ProfileConfig { slots: 8, memory_budget: 0.5, memory_lock_ms, ..ProfileConfig::default() };
    Some(Profiler::start(&config))
}

fn sample(profiler: &Profiler) -> Profile {
    thread::sleep(Duration::from_millis(2));
    profiler.sample(UnixMillis::now()).pop().expect("a tracked instance has a profile")
}

/// One that looks at what is written.
fn profiler_of_writes(test: &str, sample_mib: u64) -> Option<Profiler> {
    reason_to_skip(test).is_none().then_some(())?;
    let config = ProfileConfig {
        slots: 8,
        memory_budget: 0.0,
        written_budget: 0.5,
        written_sample_mib: sample_mib,
        ..ProfileConfig::default()
    };
    let profiler = Profiler::start(&config);
    let missing = profiler.probes().into_iter().find_map(|probe| match probe.state {
        ProbeState::Unavailable { reason } if probe.name == "memory.written_ages" => Some(reason),
        _ => None,
    });
    match missing {
        Some(reason) => {
            rswap_tests::skip(test, &reason);
            None
        }
        None => Some(profiler),
    }
}

/// Waits for the first count over a span.
fn ages(profiler: &Profiler, span_s: u64) -> PageAges {
    counted(profiler, span_s, |memory| memory.ages)
}

/// Waits until writes are noted: what is written before is not seen.
fn noting(profiler: &Profiler) {
    looked(profiler, 1);
}

/// Looks at what is written, so far.
fn looks(profiler: &Profiler) -> u64 {
    profiler.written_ages_cost().map_or(0, |cost| cost.looks)
}

/// Waits until there were so many of them.
fn looked(profiler: &Profiler, times: u64) {
    let deadline = Instant::now() + LIMIT;
    while looks(profiler) < times {
        assert!(Instant::now() < deadline, "no look at what is written");
        thread::sleep(Duration::from_millis(5));
    }
}

/// As [`ages`], of what is written.
fn written_ages(profiler: &Profiler, span_s: u64) -> PageAges {
    counted(profiler, span_s, |memory| memory.written_ages)
}

fn counted(profiler: &Profiler, span_s: u64, of: impl Fn(MemoryProfile) -> Option<PageAges>) -> PageAges {
    let deadline = Instant::now() + LIMIT;
    loop {
        let ages = of(sample(profiler).memory);
        if let Some(ages) = ages.filter(|ages| ages.within(span_s).is_some()) {
            return ages;
        }
        assert!(Instant::now() < deadline, "nothing over {span_s} s");
        thread::sleep(Duration::from_millis(20));
    }
}

fn bytes_within(ages: &PageAges, span_s: u64) -> u64 {
    ages.within(span_s).expect("it was waited for").bytes
}

/// Whether somebody else takes the processor's marks away on this machine: a kdamond does so with whole regions, whoever's memory they are.
fn a_kdamond_runs() -> bool {
    let states = fs::read_dir("/sys/kernel/mm/damon/admin/kdamonds").into_iter().flatten().flatten();
    let is_on = |path: PathBuf| fs::read_to_string(path).is_ok_and(|text| ["on", "Y"].contains(&text.trim()));
    let mut files: Vec<PathBuf> = states.map(|entry| entry.path().join("state")).collect();
    files.extend(
        ["reclaim", "lru_sort"].map(|name| format!("/sys/module/damon_{name}/parameters/enabled").into()),
    );
    files.into_iter().any(is_on)
}

#[test]
fn ages_are_those_of_the_pages_that_were_touched() {
    let tries = if a_kdamond_runs() { 4 } else { 1 };
    for number in 1..tries {
        if std::panic::catch_unwind(touched_pages_are_told_by_age).is_ok() {
            return;
        }
        eprintln!("once more, as a kdamond runs here: {number} of {tries}");
    }
    touched_pages_are_told_by_age();
}

fn touched_pages_are_told_by_age() {
    const SIZE: u64 = 96 * MIB;
    let Some(profiler) = profiler("ages_are_those_of_the_pages_that_were_touched", 1000) else { return };
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_NOHUGEPAGE);
    let (first, second, third) = (2 * MIB, 16 * MIB, 8 * MIB);
    begin(&profiler, &cgroup.0);
    // Until the first second has passed; what is touched is never the same for two spans.
    thread::sleep(Duration::from_millis(200));
    toucher.touch(0, 1, first / PAGE);
    let one = ages(&profiler, 1);
    toucher.touch(8192, 1, second / PAGE);
    let two = ages(&profiler, 2);
    toucher.touch(16_384, 2, third / PAGE);
    let four = ages(&profiler, 4);
    let eight = ages(&profiler, 8);
    eprintln!("{eight:?}\n{:?}\n{:?}", eight.by_age(), profiler.ages_cost());
    let of_one = bytes_within(&one, 1);
    assert!((first..first + INTERPRETER).contains(&of_one), "{of_one}");
    for (later, earlier, touched) in [
        (bytes_within(&two, 2), of_one, second),
        (bytes_within(&four, 4), bytes_within(&two, 2), third),
        (bytes_within(&eight, 8), bytes_within(&four, 4), 0),
    ] {
        let more = later - earlier;
        // Beside it, what the interpreter itself uses now and then.
        assert!(more >= touched && more <= touched + 2 * MIB, "{more} against {touched}");
    }
    let [.., (_, None, old)] = eight.by_age()[..] else { panic!("the oldest have no end") };
    let untouched = SIZE - first - second - third;
    assert!((untouched..untouched + 16 * MIB).contains(&old), "{old} against {untouched}");
    assert!(eight.within(8).expect("waited for").within_ms < 9000, "the budget is large");
    let cost = profiler.ages_cost().expect("it is looked at");
    assert!(cost.looks >= 5 && cost.used_share > 0.0 && cost.used_share < 0.5, "{cost:?}");
    drop(cgroup);
    reap(toucher.child);
}

#[test]
fn a_huge_page_is_used_as_a_whole_and_what_is_too_large_is_left_out() {
    const SIZE: u64 = 64 * MIB;
    let test = "a_huge_page_is_used_as_a_whole_and_what_is_too_large_is_left_out";
    let Some(of_small) = profiler(test, 1000) else { return };
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_HUGEPAGE);
    if toucher.huge_bytes() < SIZE - 4 * MIB {
        rswap_tests::skip(test, "there are no huge pages here");
        return;
    }
    begin(&of_small, &cgroup.0);
    thread::sleep(Duration::from_millis(200));
    // A page in each of eight, with one between.
    toucher.touch(1024, 1024, 8);
    let seen = ages(&of_small, 1);
    let used = bytes_within(&seen, 1);
    eprintln!("{seen:?}");
    assert!((16 * MIB..16 * MIB + INTERPRETER + 2 * MIB).contains(&used), "{used}");
    drop(of_small);
    let Some(of_none) = profiler(test, 0) else { return };
    begin(&of_none, &cgroup.0);
    let seen = ages(&of_none, 1);
    assert_eq!((bytes_within(&seen, 1), seen.left_out_bytes), (0, seen.resident_bytes));
    assert!(seen.left_out_bytes >= SIZE);
    drop(cgroup);
    reap(toucher.child);
}

#[test]
fn written_ages_are_those_of_the_pages_that_were_written() {
    const SIZE: u64 = 96 * MIB;
    let test = "written_ages_are_those_of_the_pages_that_were_written";
    let Some(profiler) = profiler_of_writes(test, 256) else { return };
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_NOHUGEPAGE);
    let (first, second, third) = (2 * MIB, 16 * MIB, 8 * MIB);
    begin(&profiler, &cgroup.0);
    noting(&profiler);
    toucher.write(0, 1, first / PAGE);
    // What is read is not written.
    toucher.touch(20_000, 1, 2000);
    let one = written_ages(&profiler, 1);
    toucher.write(4096, 1, second / PAGE);
    let two = written_ages(&profiler, 2);
    toucher.write(12_288, 2, third / PAGE);
    let four = written_ages(&profiler, 4);
    let eight = written_ages(&profiler, 8);
    eprintln!("{eight:?}\n{:?}\n{:?}", eight.by_age(), profiler.written_ages_cost());
    for (written, earlier, expected) in [
        (bytes_within(&one, 1), 0, first),
        (bytes_within(&two, 2), bytes_within(&one, 1), second),
        (bytes_within(&four, 4), bytes_within(&two, 2), third),
        (bytes_within(&eight, 8), bytes_within(&four, 4), 0),
    ] {
        let more = written - earlier;
        // Beside it, what the interpreter itself writes now and then.
        assert!(more >= expected && more <= expected + MIB, "{more} against {expected}");
    }
    let [.., (_, None, old)] = eight.by_age()[..] else { panic!("the oldest have no end") };
    let unwritten = SIZE - first - second - third;
    assert!((unwritten..unwritten + 16 * MIB).contains(&old), "{old} against {unwritten}");
    // The interpreter's files.
    assert!(eight.left_out_bytes > 0 && eight.left_out_bytes < 16 * MIB, "{}", eight.left_out_bytes);
    drop(cgroup);
    reap(toucher.child);
}

#[test]
fn of_a_huge_page_what_was_written_counts_and_who_is_left_alone_is_so_at_once() {
    const SIZE: u64 = 64 * MIB;
    let test = "of_a_huge_page_what_was_written_counts_and_who_is_left_alone_is_so_at_once";
    let Some(profiler) = profiler_of_writes(test, 256) else { return };
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_HUGEPAGE);
    let huge = toucher.huge_bytes();
    if huge < SIZE - 4 * MIB {
        rswap_tests::skip(test, "there are no huge pages here");
        return;
    }
    let name = begin(&profiler, &cgroup.0);
    noting(&profiler);
    assert!(toucher.noted() > 0 && toucher.huge_bytes() == huge, "to protect them splits none");
    // A page in each of eight, with one between.
    toucher.write(1024, 1024, 8);
    let seen = written_ages(&profiler, 1);
    let written = bytes_within(&seen, 1);
    eprintln!("{seen:?}; {huge} bytes in huge pages, {} afterwards", toucher.huge_bytes());
    assert!((8 * PAGE..MIB).contains(&written), "{written}");
    assert!(toucher.huge_bytes() + 9 * (2 * MIB) >= huge, "only those are split that are written");
    assert!(profiler.leave_alone(&name));
    assert_eq!((toucher.noted(), sample(&profiler).memory.written_ages), (0, None));
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(toucher.noted(), 0);
    profiler.disturbed(|_| false);
    written_ages(&profiler, 1);
    assert!(toucher.noted() > 0);
    drop(profiler);
    assert_eq!(toucher.noted(), 0);
    drop(cgroup);
    reap(toucher.child);
}

#[test]
fn a_freeze_takes_no_age_away_and_who_stands_still_is_looked_at_again_when_it_goes_on() {
    const SIZE: u64 = 64 * MIB;
    let test = "a_freeze_takes_no_age_away_and_who_stands_still_is_looked_at_again_when_it_goes_on";
    let Some(profiler) = profiler_of_writes(test, 256) else { return };
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_NOHUGEPAGE);
    let (first, second, third) = (4 * MIB, 16 * MIB, 8 * MIB);
    begin(&profiler, &cgroup.0);
    noting(&profiler);
    toucher.write(0, 1, first / PAGE);
    let one = written_ages(&profiler, 1);
    // What is noted is counted in a freeze as well: for that it need not run.
    cgroup.freeze(true);
    let four = written_ages(&profiler, 4);
    cgroup.freeze(false);
    toucher.write(4096, 1, second / PAGE);
    let eight = written_ages(&profiler, 8);
    eprintln!("{eight:?}");
    for (ages, span_s, expected) in [(&one, 1, first), (&four, 4, first), (&eight, 8, first + second)] {
        let written = bytes_within(ages, span_s);
        // Beside it, what the interpreter itself writes now and then.
        assert!((expected..expected + 2 * MIB).contains(&written), "{written} within {span_s} s");
    }
    // As the agent does in each window.
    let window = |profiler: &Profiler| profiler.disturbed(|_| stands_still(&cgroup.0));
    cgroup.freeze(true);
    window(&profiler);
    let before = looks(&profiler);
    assert_eq!(sample(&profiler).memory.written_ages, None);
    toucher.is_let_go_of();
    thread::sleep(Duration::from_millis(1500));
    assert_eq!((toucher.noted(), looks(&profiler)), (0, before));
    window(&profiler);
    cgroup.freeze(false);
    window(&profiler);
    looked(&profiler, before + 1);
    assert!(toucher.noted() > 0);
    toucher.write(12_288, 1, third / PAGE);
    let written = bytes_within(&written_ages(&profiler, 1), 1);
    assert!((third..third + MIB).contains(&written), "{written}");
    drop(cgroup);
    reap(toucher.child);
}

#[test]
fn who_stands_still_already_is_not_stopped_for_a_first_look() {
    const SIZE: u64 = 16 * MIB;
    let test = "who_stands_still_already_is_not_stopped_for_a_first_look";
    let Some(profiler) = profiler_of_writes(test, 256) else { return };
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_NOHUGEPAGE);
    // It was frozen after the agent had looked whether it is: the look itself has to see that.
    cgroup.freeze(true);
    begin(&profiler, &cgroup.0);
    noting(&profiler);
    let seen = written_ages(&profiler, 1);
    assert_eq!((toucher.noted(), bytes_within(&seen, 1)), (0, 0));
    assert!(seen.left_out_bytes == seen.resident_bytes && seen.left_out_bytes >= SIZE, "{seen:?}");
    // Windows in the freeze and after it.
    profiler.disturbed(|_| stands_still(&cgroup.0));
    cgroup.freeze(false);
    let before = looks(&profiler);
    profiler.disturbed(|_| stands_still(&cgroup.0));
    looked(&profiler, before + 1);
    assert!(toucher.noted() > 0);
    toucher.write(0, 1, MIB / PAGE);
    let written = bytes_within(&written_ages(&profiler, 1), 1);
    assert!((MIB..3 * MIB).contains(&written), "{written}");
    drop(cgroup);
    reap(toucher.child);
}

#[test]
fn who_stood_still_at_a_first_look_is_looked_at_soon_after_it_goes_on() {
    const SIZE: u64 = 16 * MIB;
    let test = "who_stood_still_at_a_first_look_is_looked_at_soon_after_it_goes_on";
    for all in [false, true] {
        let Some(profiler) = profiler_of_writes(test, 256) else { return };
        let cgroup = TestCgroup::create();
        let below = TestCgroup(cgroup.0.join("below"));
        std::fs::create_dir(&below.0).expect("a cgroup below");
        let mut touchers = [&cgroup, &below].map(|of| Toucher::start(of, SIZE, nix::libc::MADV_NOHUGEPAGE));
        let frozen = if all { &cgroup } else { &below };
        // No window sees it: it is one of a cgroup below, or is over before the next.
        frozen.freeze(true);
        begin(&profiler, &cgroup.0);
        noting(&profiler);
        let seen = written_ages(&profiler, 1);
        assert_eq!(touchers.each_ref().map(|of| of.noted() > 0), [!all, false]);
        let looked_at = seen.resident_bytes - seen.left_out_bytes;
        assert!(seen.left_out_bytes >= SIZE && (looked_at == 0) == all, "{seen:?}");
        frozen.freeze(false);
        let deadline = Instant::now() + LIMIT;
        while touchers.iter().any(|of| of.noted() == 0) {
            assert!(Instant::now() < deadline, "it goes on, and is not looked at");
            thread::sleep(Duration::from_millis(20));
        }
        // Until all of the last one is protected.
        thread::sleep(Duration::from_millis(200));
        touchers.iter_mut().for_each(|of| of.write(0, 1, MIB / PAGE));
        let seen = written_ages(&profiler, 4);
        let written = bytes_within(&seen, 4);
        assert!((2 * MIB..6 * MIB).contains(&written), "{written}");
        assert!(seen.resident_bytes - seen.left_out_bytes >= 2 * SIZE, "{seen:?}");
        drop(below);
        drop(cgroup);
        touchers.into_iter().for_each(|of| reap(of.child));
    }
}

#[test]
fn the_agent_says_nothing_of_writes_of_who_is_frozen_and_goes_on_after_that() -> anyhow::Result<()> {
    const SIZE: u64 = 64 * MIB;
    let test = "the_agent_says_nothing_of_writes_of_who_is_frozen_and_goes_on_after_that";
    if profiler_of_writes(test, 256).is_none() {
        return Ok(());
    }
    let more = "[profile]\nwritten_budget = 0.5\n".to_owned();
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &HostOptions { window_ms: 250, more, ..HostOptions::default() })?;
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_NOHUGEPAGE);
    let path = cgroup.0.to_str().context("a path that is no text")?;
    host.call(&["adopt", path, "--name", "toucher"])?;
    let memory = || -> anyhow::Result<Option<MemoryProfile>> {
        let views: Vec<InstanceView> = host.get("/v1/profiles")?;
        Ok(views.into_iter().find_map(|view| view.profile).map(|profile| profile.memory))
    };
    let ages = |span_s: u64| {
        wait_for(&format!("what was written within {span_s} s"), LIMIT, || {
            let ages = memory()?.and_then(|memory| memory.written_ages);
            Ok(ages.filter(|ages| ages.within(span_s).is_some()))
        })
    };
    ages(1)?;
    ensure!(toucher.noted() > 0, "nothing is noted");
    cgroup.freeze(true);
    let silent = || -> anyhow::Result<Option<MemoryProfile>> {
        Ok(memory()?.filter(|memory| memory.written_ages.is_none()))
    };
    wait_for("a window of who stands still", LIMIT, silent)?;
    thread::sleep(Duration::from_millis(1500));
    let memory_then = silent()?.context("its writes are told of while it is frozen")?;
    ensure!(toucher.noted() == 0, "its writes are noted while it is frozen");
    ensure!(memory_then.resident_bytes >= SIZE, "all else is told of: {memory_then:?}");
    cgroup.freeze(false);
    // From the first count on, all is noted.
    ages(1)?;
    toucher.write(0, 1, 8 * MIB / PAGE);
    let written = bytes_within(&ages(4)?, 4);
    ensure!((8 * MIB..10 * MIB).contains(&written), "{written}");
    drop((host, cgroup));
    reap(toucher.child);
    Ok(())
}

#[test]
fn what_a_program_writes_per_second_is_forecast_before_it_ever_moves() -> anyhow::Result<()> {
    const SIZE: u64 = 96 * MIB;
    /// Pages, and how often so many are written: 25 MiB/s, so that none is written twice within two seconds.
    const PART: u64 = 128;
    const EVERY: Duration = Duration::from_millis(20);
    let test = "what_a_program_writes_per_second_is_forecast_before_it_ever_moves";
    if profiler_of_writes(test, 256).is_none() {
        return Ok(());
    }
    let more = "[profile]\nwritten_budget = 0.5\n".to_owned();
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &HostOptions { window_ms: 250, more, ..HostOptions::default() })?;
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_NOHUGEPAGE);
    let path = cgroup.0.to_str().context("a path that is no text")?;
    let view = || -> anyhow::Result<Option<InstanceView>> {
        let views: Vec<InstanceView> = host.get("/v1/profiles")?;
        Ok(views.into_iter().find(|view| view.instance.name.as_str() == "writer"))
    };
    let rates = || -> anyhow::Result<Vec<f64>> {
        let windows: Value = host.get("/v1/windows?instance=writer")?;
        let windows = windows["windows"].as_array().context("no windows")?;
        Ok(windows.iter().filter_map(|window| window["used"]["written_bytes_per_s"].as_f64()).collect())
    };
    let stop = AtomicBool::new(false);
    let (seen, written_per_s) = thread::scope(|scope| {
        let toucher = &mut toucher;
        let stopped = &stop;
        let writing = scope.spawn(move || {
            let (began, mut parts) = (Instant::now(), 0);
            while !stopped.load(Ordering::Acquire) {
                toucher.write(parts * PART % (SIZE / PAGE), 1, PART);
                parts += 1;
                thread::sleep((began + EVERY * parts as u32).saturating_duration_since(Instant::now()));
            }
            (parts * PART * PAGE) as f64 / began.elapsed().as_secs_f64()
        });
        let look = || -> anyhow::Result<_> {
            host.call(&["adopt", path, "--name", "writer"])?;
            // Longer spans have been counted as well, in windows of their own.
            wait_for("what was written within 4 s", LIMIT, || {
                let profile = view()?.and_then(|view| view.profile);
                let ages = profile.and_then(|profile| profile.memory.written_ages);
                Ok(ages.filter(|ages| ages.within(4).is_some()))
            })?;
            let demand = view()?.and_then(|view| view.demand).context("no forecast")?;
            let points = demand.points.into_iter().filter(|point| point.resource == Resource::Written);
            Ok((rates()?, points.map(|point| point.need.p50).collect::<Vec<_>>()))
        };
        let seen = look();
        stop.store(true, Ordering::Release);
        (seen, writing.join().expect("it writes until it is told to stop"))
    });
    let (rates, medians) = seen?;
    eprintln!("{rates:?}, forecast {medians:?}; it writes {written_per_s} a second");
    ensure!(rates.len() == 1, "a look is of one window: {rates:?}");
    ensure!(!medians.is_empty(), "what it writes is not forecast");
    // The look is at one or two seconds of what the program did all the time, beside others that build here.
    for rate in rates.into_iter().chain(medians) {
        ensure!((0.5..1.5).contains(&(rate / written_per_s)), "{rate} against {written_per_s}");
    }
    drop((host, cgroup));
    reap(toucher.child);
    Ok(())
}

#[test]
fn a_sample_tells_about_how_much_of_a_large_instance_was_written() {
    const SIZE: u64 = 512 * MIB;
    let test = "a_sample_tells_about_how_much_of_a_large_instance_was_written";
    let Some(profiler) = profiler_of_writes(test, 128) else { return };
    let cgroup = TestCgroup::create();
    let mut toucher = Toucher::start(&cgroup, SIZE, nix::libc::MADV_NOHUGEPAGE);
    begin(&profiler, &cgroup.0);
    noting(&profiler);
    toucher.write(0, 1, SIZE / 2 / PAGE);
    let deadline = Instant::now() + LIMIT;
    let seen = loop {
        // Writing so much takes a while.
        let seen = written_ages(&profiler, 1);
        let last = *seen.used.last().expect("it was counted");
        if last.span_s >= 2 || Instant::now() > deadline {
            break last;
        }
        thread::sleep(Duration::from_millis(50));
    };
    eprintln!("{seen:?} {:?}", profiler.written_ages_cost());
    assert!(seen.bytes.abs_diff(SIZE / 2) <= SIZE / 8, "{seen:?}");
    drop(cgroup);
    reap(toucher.child);
}

#[test]
fn nothing_is_said_of_memory_that_others_read_and_the_budget_slows() {
    let test = "nothing_is_said_of_memory_that_others_read_and_the_budget_slows";
    let Some(_) = reason_to_skip(test).is_none().then_some(()) else { return };
    let config = ProfileConfig { slots: 8, memory_budget: 0.0004, ..ProfileConfig::default() };
    let profiler = Profiler::start(&config);
    let cgroup = TestCgroup::create();
    let toucher = Toucher::start(&cgroup, 128 * MIB, nix::libc::MADV_NOHUGEPAGE);
    begin(&profiler, &cgroup.0);
    // The first look takes some milliseconds: at 0.4 ms per second, the next is late.
    thread::sleep(Duration::from_secs(5));
    let (slowed, cost) = (sample(&profiler).memory.ages, profiler.ages_cost().expect("it is looked at"));
    eprintln!("{cost:?}");
    assert!(slowed.is_none() && cost.looks == 1 && cost.behind_ms > 2000, "{cost:?} {slowed:?}");
    drop(profiler);
    let profiler = Profiler::start(&ProfileConfig { memory_budget: 0.5, ..config });
    begin(&profiler, &cgroup.0);
    ages(&profiler, 1);
    profiler.disturbed(|_| true);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(sample(&profiler).memory.ages, None);
    profiler.disturbed(|_| false);
    ages(&profiler, 1);
    drop(cgroup);
    reap(toucher.child);
}

#[test]
fn faults_are_those_that_the_program_makes_in_children_too() {
    const PAGES: u64 = 10_000;
    const FILE_PAGES: u64 = 500;
    let test = "faults_are_those_that_the_program_makes_in_children_too";
    let Some(profiler) = profiler(test, 20) else { return };
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = directory.path().join("data");
    let mut file = File::create(&path).expect("a file");
    file.write_all(&vec![7; (FILE_PAGES * PAGE) as usize]).and_then(|()| file.sync_all()).expect("written");
    let script = r#"
import mmap, os, sys
pages, path = int(sys.argv[1]), sys.argv[2]
def touch():
    memory = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(15)
    for at in range(0, pages * 4096, 4096): memory[at] = 1
print("ready", flush=True)
sys.stdin.readline()
if os.fork() == 0:
    touch()
    os._exit(0)
os.wait()
touch()
file = open(path, "rb")
os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
data.madvise(mmap.MADV_RANDOM)
for at in range(0, len(data), 4096): data[at]
print("done", flush=True)
sys.stdin.readline()
"#;
    let cgroup = TestCgroup::create();
    let mut command = Command::new(moves::python().expect("python3"));
    command.args(["-c", script, &PAGES.to_string()]).arg(&path);
    let mut child = cgroup.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut to = child.stdin.take().expect("its input");
    let mut from = BufReader::new(child.stdout.take().expect("its output"));
    let mut answer = |expected: &str| {
        let mut line = String::new();
        from.read_line(&mut line).expect("an answer");
        assert_eq!(line.trim(), expected);
    };
    answer("ready");
    begin(&profiler, &cgroup.0);
    writeln!(to).expect("it listens");
    answer("done");
    let faults = sample(&profiler).memory.faults.expect("they are counted");
    eprintln!("{faults:?}");
    // What the fork and the interpreter take is some hundreds.
    assert!((2 * PAGES..2 * PAGES + 2000).contains(&faults.minor), "{faults:?}");
    assert!((FILE_PAGES..FILE_PAGES + 100).contains(&faults.major), "{faults:?}");
    let idle = sample(&profiler).memory.faults.expect("they are counted");
    assert!(idle.minor < 10 && idle.major == 0, "{idle:?}");
    drop(cgroup);
    reap(child);
}

/// What a program can't tell from the fault itself takes less than that: the processor's way into the kernel and back, what the programs of the profile
/// take, and its two looks at the clock.
const MOST_UNSEEN_NS: u64 = 10_000;

/// Checks times that were measured against those that a program says, in nanoseconds. The shortest say how long that takes on this machine which is not
/// seen; it is the same of all others. Of the longest tenth, some are of what came between its fault and its look at the clock: it was taken from the CPU
/// there.
fn are_the_same(kind: &str, found: &Histogram, said: &mut [u64]) {
    said.sort_unstable();
    let (sum, usual): (u64, u64) = (said.iter().sum(), said[..said.len() * 9 / 10].iter().sum());
    eprintln!("{kind}: {} of {} ns; the program: {} of {sum} ns", found.count, found.sum, said.len());
    let both = |q: f64| {
        let own = said[(q * said.len() as f64) as usize];
        let quantile = found.quantile(q).expect("there are some");
        eprintln!("  q{q}: {quantile} ns; the program: {own} ns");
        (quantile, own)
    };
    let (quickest, own) = both(0.1);
    // One bucket is an eighth at most.
    assert!(quickest <= own + own / 8, "{kind}: {quickest} against {own}");
    let unseen = own.saturating_sub(quickest);
    assert!(unseen < MOST_UNSEEN_NS, "{kind}: {quickest} against {own}");
    // It was measured to within a bucket itself.
    let within = quickest / 8;
    for q in [0.5, 0.9] {
        let (quantile, own) = both(q);
        assert!(quantile <= own + own / 8, "{kind}, q{q}: {quantile} against {own}");
        assert!(
            quantile + quantile / 8 + unseen + within >= own,
            "{kind}, q{q}: {quantile} against {own}, {unseen} of it unseen"
        );
    }
    assert!(found.sum <= sum + sum / 1000, "{kind}: {} against {sum}", found.sum);
    assert!(found.sum + (unseen + within) * found.count >= usual, "{kind}: {} against {usual}", found.sum);
}

#[test]
fn faults_take_as_long_as_the_program_finds_that_they_do() {
    const MINOR: u64 = 20_000;
    const MAJOR: u64 = 1_000;
    let test = "faults_take_as_long_as_the_program_finds_that_they_do";
    let config = ProfileConfig {
        slots: 8,
        minor_faults: true,
        memory_budget: 0.0,
        measure_program_cost: true,
        ..ProfileConfig::default()
    };
    let Some(profiler) = profiler_with(test, &[], &config) else { return };
    let needed = ["page_fault_user", "page_fault_kernel", "major_faults", "minor_faults"];
    let missing = profiler.probes().into_iter().find_map(|probe| match probe.state {
        ProbeState::Unavailable { reason } if needed.contains(&probe.name.as_str()) => {
            Some(format!("{}: {reason}", probe.name))
        }
        _ => None,
    });
    if let Some(reason) = missing {
        rswap_tests::skip(test, &reason);
        return;
    }
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    if statfs(directory.path()).expect("a file system").filesystem_type() == TMPFS_MAGIC {
        rswap_tests::skip(test, "files are in memory here (tmpfs): nothing is fetched from a disk");
        return;
    }
    let path = directory.path().join("data");
    let mut file = File::create(&path).expect("a file");
    file.write_all(&vec![7; (MAJOR * PAGE) as usize]).and_then(|()| file.sync_all()).expect("written");
    let cgroup = TestCgroup::create();
    let mut command = Command::new(binary("faulter").expect("the program"));
    command.args([MINOR, MAJOR].map(|count| count.to_string())).arg(&path);
    let mut child = cgroup.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut to = child.stdin.take().expect("its input");
    let mut from = BufReader::new(child.stdout.take().expect("its output"));
    let mut line = || {
        let mut line = String::new();
        from.read_line(&mut line).expect("an answer");
        line
    };
    assert_eq!(line().trim(), "ready");
    let mut numbers = |to: &mut ChildStdin| {
        writeln!(to).expect("it listens");
        [(); 3].map(|()| {
            let said = line();
            said.split_whitespace().map(|word| word.parse().expect("a number")).collect::<Vec<u64>>()
        })
    };
    // What it does for the first time has faults of its own: on its stack, in its files.
    numbers(&mut to);
    begin(&profiler, &cgroup.0);
    let [mut minor, mut major, of_kernel] = numbers(&mut to);
    let memory = end(&profiler).memory;
    let found = memory.fault_latency.expect("it is measured");
    let found_minor = found.minor_ns.expect("they are timed, too");
    eprintln!("the kernel: {of_kernel:?}; {:?}; not timed {}", memory.faults, found.not_timed);
    // Nobody knows beforehand which faults the kernel has to make twice, or finds served by others meanwhile: its own count decides.
    let near = |found: u64, expected: u64| found.abs_diff(expected) <= expected.div_ceil(1000);
    // Of so few, one or two more weigh: pages of the program's own that were taken away, or others' reads.
    let near_major = |found: u64, expected: u64| found.abs_diff(expected) <= 1 + expected.div_ceil(100);
    // What it says and how has faults, too, and is in the window, but not in its own count.
    let speech = 300;
    assert!(near_major(found.major_ns.count, of_kernel[1]), "{} against {of_kernel:?}", found.major_ns.count);
    let more = found_minor.count.saturating_sub(of_kernel[0]);
    assert!(near(found_minor.count - more, of_kernel[0]) && more < speech, "{}", found_minor.count);
    assert!(of_kernel[0] >= MINOR && near_major(of_kernel[1], MAJOR), "{of_kernel:?}");
    assert!(found.not_timed <= (MINOR + MAJOR) / 1000, "{}", found.not_timed);
    are_the_same("minor", &found_minor, &mut minor);
    are_the_same("major", &found.major_ns, &mut major);
    drop(cgroup);
    reap(child);
}
