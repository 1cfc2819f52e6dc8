//! `rswap run` behaves as the plain command; `rswap adopt` takes over what runs already.

use std::{
    fs,
    io::Write as _,
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::Context;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::{
    instance::{Instance, Origin},
    pool::CpuSet,
    status::InstanceView,
};
use rswap_tests::{Fleet, Host, HostOptions, foreign::Foreign, reason_to_skip, wait_for};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// Runs `command` as an instance in the foreground, with `input`.
fn run(host: &Host, options: &[&str], command: &[&str], input: &str) -> anyhow::Result<Output> {
    let mut rswap = host.rswap(&[&["run"], options, &["--"], command].concat())?;
    let mut child = rswap
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("rswap run")?;
    child.stdin.take().context("no input")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).trim().to_owned()
}

#[test]
fn input_output_and_exit_status_are_the_commands() -> anyhow::Result<()> {
    if reason_to_skip("input_output_and_exit_status_are_the_commands").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &HostOptions::default())?;

    let echoed = run(&host, &[], &["sh", "-c", "cat; echo no >&2; exit 7"], "hello")?;
    assert_eq!((text(&echoed.stdout), text(&echoed.stderr)), ("hello".into(), "no".into()));
    assert_eq!(echoed.status.code(), Some(7));
    // As a shell says it: 128 and the signal, 127 and 126 for what can't be started.
    for (command, code) in
        [(&["sh", "-c", "kill -TERM $$"][..], 143), (&["no-such-program"], 127), (&["/etc/passwd"], 126)]
    {
        assert_eq!(run(&host, &[], command, "")?.status.code(), Some(code), "{command:?}");
    }
    // The first process of its PID namespace is the init; the command is the second.
    let inside = run(&host, &["--name", "inside"], &["sh", "-c", "echo $$; cat /proc/self/cgroup"], "")?;
    let lines = text(&inside.stdout);
    assert_eq!(lines.lines().next(), Some("2"));
    assert!(lines.contains("0::/") && lines.contains("/inside"), "{lines}");
    wait_for("the instance's cgroup to go", LIMIT, || {
        Ok((!host.cgroup()?.join("inside").exists()).then_some(()))
    })?;

    // On a terminal, which `script` makes, it is on a terminal.
    let mut on_terminal = Command::new("script");
    let call = format!("{} run -- sh -c 'test -t 0 && test -t 1 && exit 9'", host.command_line()?);
    let status = on_terminal.args(["-qec", &call, "/dev/null"]).stdout(Stdio::null()).status()?;
    assert_eq!(status.code(), Some(9));
    Ok(())
}

#[test]
fn signals_reach_the_command_and_names_are_unique() -> anyhow::Result<()> {
    if reason_to_skip("signals_reach_the_command_and_names_are_unique").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &HostOptions::default())?;
    let script = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.02; done";
    let mut rswap =
        host.rswap(&["run", "--name", "looper", "--label", "tier=front", "--", "sh", "-c", script])?;
    let mut child = rswap.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    wait_for("the instance", LIMIT, || Ok(host.has_instance("looper")?.then_some(())))?;
    let listed: Vec<InstanceView> = serde_json::from_str(&host.call(&["ps", "--json"])?)?;
    assert_eq!(listed[0].instance.labels["tier"], "front");
    assert_eq!(listed[0].instance.origin, Origin::Run);

    let again = run(&host, &["--name", "looper"], &["true"], "")?;
    assert!(!again.status.success() && text(&again.stderr).contains("looper is running"), "{again:?}");

    wait_for("the trap to be set", LIMIT, || Ok(Some(()).filter(|()| has_trap(&host))))?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    let status = wait_for("its end", LIMIT, || Ok(child.try_wait()?))?;
    assert_eq!(status.code(), Some(3));
    wait_for("the agent to see that", LIMIT, || Ok((!host.has_instance("looper")?).then_some(())))
}

/// Whether a process of the instance "looper" catches SIGTERM.
fn has_trap(host: &Host) -> bool {
    let procs = host.cgroup().map(|cgroup| cgroup.join("looper/cgroup.procs"));
    let pids = procs.ok().and_then(|procs| fs::read_to_string(procs).ok()).unwrap_or_default();
    pids.lines().any(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let mask = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
        mask >> (Signal::SIGTERM as u64 - 1) & 1 == 1
    })
}

#[test]
fn a_running_cgroup_is_adopted_moved_between_cores_and_never_migrated() -> anyhow::Result<()> {
    if reason_to_skip("a_running_cgroup_is_adopted_moved_between_cores_and_never_migrated").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let more = "[[pool]]\nname = \"first\"\ncpus = \"0\"\n".to_owned();
    let mut host = fleet.host("a", &HostOptions { more, ..HostOptions::default() })?;
    let foreign = Foreign::start(&["sleep", "60"])?;
    let path = foreign.path.to_string_lossy().into_owned();

    let missing = host.call(&["adopt", "/no/such/cgroup", "--name", "x"]).expect_err("it adopted nothing");
    assert!(format!("{missing:#}").contains("there is no cgroup"), "{missing:#}");
    let adopted: Instance = serde_json::from_str(
        &host.call(&["adopt", &path, "--name", "sleeper", "--label", "a=b", "--json"])?,
    )?;
    assert_eq!((adopted.origin, adopted.labels["a"].as_str()), (Origin::Adopted, "b"));
    let twice = host.call(&["adopt", &path, "--name", "other"]).expect_err("it was adopted twice");
    assert!(format!("{twice:#}").contains("overlaps the instance sleeper"), "{twice:#}");

    host.call(&["swap", "sleeper", "first"])?;
    assert_eq!(foreign.cpus()?, CpuSet::from([0]));

    let checked = host.rswap(&["check", "sleeper", "--json"])?.output()?;
    let findings: Value = serde_json::from_slice(&checked.stdout)?;
    assert!(!checked.status.success());
    assert_eq!(findings[0]["item"], "no PID namespace of its own");
    let refused = host.migrate("sleeper", "10.88.0.9:1")?.end()?;
    assert!(refused.is_err_and(|reason| reason.contains("can't migrate")));

    // Another agent finds it again, and it runs on when the agent goes.
    host.kill_agent()?;
    host.start_agent()?;
    let listed: Vec<InstanceView> = host.get("/v1/profiles")?;
    assert_eq!(listed[0].instance.pool.as_deref(), Some("first"));
    Ok(())
}

/// Its first thread ends by itself (`SYS_exit` is 60), and another goes on.
const LEADERLESS: &str = "import ctypes, threading, time
threading.Thread(target=time.sleep, args=[600]).start()
ctypes.CDLL(None).syscall(60, 0)";

#[test]
fn a_program_whose_first_thread_has_ended_is_refused_and_runs_on() -> anyhow::Result<()> {
    if reason_to_skip("a_program_whose_first_thread_has_ended_is_refused_and_runs_on").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let host = fleet.host("a", &HostOptions::default())?;
    host.run("leaderless", &[], &["python3", "-c", LEADERLESS])?;
    let reason = wait_for("the first thread to end", LIMIT, || {
        let refused = host.migrate("leaderless", "10.88.0.9:1")?.end()?.expect_err("it was moved to nowhere");
        Ok(refused.contains("a first thread that has ended").then_some(refused))
    })?;
    assert!(reason.contains("can't migrate"), "{reason}");
    assert!(host.has_processes()?);
    Ok(())
}

#[test]
fn another_cgroup_at_the_place_of_an_instances_is_nobodys() -> anyhow::Result<()> {
    if reason_to_skip("another_cgroup_at_the_place_of_an_instances_is_nobodys").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let mut host = fleet.host("a", &HostOptions::default())?;
    let foreign = Foreign::start(&["sleep", "60"])?;
    let path = foreign.path.to_string_lossy().into_owned();
    host.call(&["adopt", &path, "--name", "sleeper"])?;

    // Nobody looks while it goes, and somebody else's work comes to its place.
    host.kill_agent()?;
    let other = foreign.replaced(&["sleep", "60"])?;
    host.start_agent()?;
    let listed: Vec<InstanceView> = host.get("/v1/profiles")?;
    assert!(listed.is_empty(), "{listed:?}");
    let refused = host.call(&["swap", "sleeper", "any"]).expect_err("somebody else's work was moved");
    assert!(format!("{refused:#}").contains("no instance"), "{refused:#}");

    // It is an instance when somebody says so, of the same name even.
    host.call(&["adopt", &path, "--name", "sleeper"])?;
    assert!(host.has_instance("sleeper")?);
    drop(other);
    wait_for("the agent to see that it is gone", LIMIT, || Ok((!host.has_instance("sleeper")?).then_some(())))
}
