//! Programs that hold descriptors of all kinds, and check them, go there and back.

use std::{fs, os::unix::net::UnixListener, process::Command};

use anyhow::Context;
use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    moves::held,
    proxy::Fault,
    reason_to_skip,
    scene::{LIMIT, Scene, further, holds_everything},
    wait_for,
};
use serde_json::Value;

/// Lets `programs/NAME.py` hold what it holds through three moves.
fn held_through_three_moves(test: &str, name: &str, options: &[&str]) -> anyhow::Result<()> {
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let directory = scene.fleet.scratch().join("held");
    scene.python(name, options, &[&directory.to_string_lossy()])?;
    holds_everything(&scene.log)?;
    scene.three_moves(name, holds_everything)
}

#[test]
fn files_of_all_kinds_are_carried() -> anyhow::Result<()> {
    held_through_three_moves("files_of_all_kinds_are_carried", "files", &[])
}

#[test]
fn epolls_inotifies_and_pidfds_are_carried() -> anyhow::Result<()> {
    held_through_three_moves("epolls_inotifies_and_pidfds_are_carried", "events", &[])
}

#[test]
fn unix_sockets_of_all_kinds_are_carried() -> anyhow::Result<()> {
    if reason_to_skip("unix_sockets_of_all_kinds_are_carried").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    // Another user connects by the names in it.
    let directory = tempfile::Builder::new().prefix("rswt").tempdir()?;
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let held = directory.path().join("held");
    scene.python("unix_sockets", &[], &[&held.to_string_lossy()])?;
    holds_everything(&scene.log)?;
    scene.three_moves("unix_sockets", holds_everything)
}

#[test]
fn internet_sockets_without_a_stream_are_carried() -> anyhow::Result<()> {
    let options = ["--net", "10.88.0.10/24,gw=10.88.0.1", "--net", "fd88::10/64,gw=fd88::1"];
    held_through_three_moves("internet_sockets_without_a_stream_are_carried", "internet", &options)
}

#[test]
fn empty_datagrams_that_nobody_reads_are_carried_again_and_again() -> anyhow::Result<()> {
    if reason_to_skip("empty_datagrams_that_nobody_reads_are_carried_again_and_again").is_some() {
        return Ok(());
    }
    let mut scene = Scene::set()?;
    let options = ["--net", "10.88.0.10/24,gw=10.88.0.1", "--net", "fd88::10/64,gw=fd88::1"];
    scene.python("internet", &options, &["fd88::10"])?;
    holds_everything(&scene.log)?;
    // The kernel shows them once: to a move that fails, or to the look at what was made of them, and to agents that are
    // gone by the next move.
    for _ in 0..2 {
        scene.moved("internet", &scene.a, &scene.b)?;
        scene.b.kill_agent()?;
        scene.b.start_agent()?;
        scene.b.wait_for_instance("internet")?;
        scene.moved("internet", &scene.b, &scene.a)?;
        scene.a.kill_agent()?;
        scene.a.start_agent()?;
        scene.a.wait_for_instance("internet")?;
    }
    holds_everything(&scene.log)
}

#[test]
fn pseudo_terminals_are_carried() -> anyhow::Result<()> {
    held_through_three_moves("pseudo_terminals_are_carried", "terminals", &[])
}

#[test]
fn tables_that_are_shared_stay_shared() -> anyhow::Result<()> {
    held_through_three_moves("tables_that_are_shared_stay_shared", "tables", &[])
}

#[test]
fn tables_that_are_left_during_a_move_are_left() -> anyhow::Result<()> {
    if reason_to_skip("tables_that_are_left_during_a_move_are_left").is_some() {
        return Ok(());
    }
    // After the first round, and after the last one, before the freeze.
    for nth in [0, 1] {
        let scene = Scene::set()?;
        let directory = scene.fleet.scratch().join("leaving");
        scene.python("leaving", &[], &[&directory.to_string_lossy()])?;
        further(&scene.log, "shared", 5)?;
        let fault = Fault::PauseAt { tag: Tag::RoundEnd, nth };
        let (proxy, migration) = held("leaving", &scene.a, &scene.b, fault)?;
        fs::write(scene.log.with_extension("log.leave"), "")?;
        further(&scene.log, "left", 2)?;
        proxy.go_on();
        migration.succeed()?;
        further(&scene.log, "left", 5)?;
        scene.moved("leaving", &scene.b, &scene.a)?;
        further(&scene.log, "left", 5)?;
    }
    Ok(())
}

#[test]
fn a_tmux_session_goes_on() -> anyhow::Result<()> {
    if reason_to_skip("a_tmux_session_goes_on").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let socket = scene.fleet.scratch().join("tmux.sock");
    let socket = socket.to_string_lossy();
    let tmux = |arguments: &[&str]| -> anyhow::Result<String> {
        let output = Command::new("tmux")
            .args(["-N", "-S", &socket])
            .args(arguments)
            .output()
            .context("cannot start tmux")?;
        anyhow::ensure!(output.status.success(), "tmux {arguments:?}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    scene.run("tmux", &[], &["tmux", "-S", &socket, "-f", "/dev/null", "-D"])?;
    wait_for("the tmux server", LIMIT, || {
        let shell = "exec bash --norc --noprofile";
        Ok(tmux(&["new-session", "-d", "-s", "main", "-x", "80", "-y", "24", shell]).ok())
    })?;
    // What was printed once stays on the screen; each answer comes from the same shell.
    let shell = answer(&tmux, "first")?;
    for (number, (from, to)) in
        [(&scene.a, &scene.b), (&scene.b, &scene.a), (&scene.a, &scene.b)].into_iter().enumerate()
    {
        tmux(&["send-keys", "-t", "main", "-l", "echo ty"])?;
        scene.moved("tmux", from, to)?;
        tmux(&["send-keys", "-t", "main", "-l", &format!("ped-{number}")])?;
        tmux(&["send-keys", "-t", "main", "Enter"])?;
        wait_for("what was typed before and after the move", LIMIT, || {
            let screen = tmux(&["capture-pane", "-p", "-S", "-100", "-t", "main"])?;
            Ok(screen.lines().any(|line| line == format!("typed-{number}")).then_some(()))
        })?;
        assert_eq!(answer(&tmux, &format!("after-{number}"))?, shell);
    }
    let screen = tmux(&["capture-pane", "-p", "-S", "-100", "-t", "main"])?;
    assert!(screen.contains("first is "), "{screen}");
    Ok(())
}

#[test]
fn a_session_of_script_goes_on() -> anyhow::Result<()> {
    if reason_to_skip("a_session_of_script_goes_on").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let mounted = scene.fleet.scratch().join("mounted");
    let (volume, record) = (format!("record:{}", mounted.display()), mounted.join("typescript"));
    // It asks for its terminal every time.
    let lines = "i=0; while tty -s; do i=$((i+1)); echo line=$i; sleep 0.05; done";
    let shown = format!("exec script -qfc '{lines}' {} >> {}", record.display(), scene.log.display());
    scene.run("script", &["--volume", &volume], &["sh", "-c", &shown])?;
    further(&scene.log, "line", 4)?;
    scene.three_moves("script", |log| further(log, "line", 10))?;
    // Everything that was printed in the terminal has come out of it, once.
    let shown = fs::read_to_string(&scene.log)?;
    let whole = shown.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let numbers: Vec<_> = whole.lines().map(|line| line.trim_end().to_owned()).collect();
    let expected: Vec<_> = (1..=numbers.len()).map(|number| format!("line={number}")).collect();
    assert_eq!(numbers, expected);
    Ok(())
}

/// What a shell in tmux says of itself: its pid and its terminal.
fn answer(tmux: &dyn Fn(&[&str]) -> anyhow::Result<String>, mark: &str) -> anyhow::Result<String> {
    tmux(&["send-keys", "-t", "main", "-l", &format!("echo {mark} is $$ at $(tty)")])?;
    tmux(&["send-keys", "-t", "main", "Enter"])?;
    wait_for("the shell's answer", LIMIT, || {
        let screen = tmux(&["capture-pane", "-p", "-S", "-100", "-t", "main"])?;
        let start = format!("{mark} is ");
        Ok(screen.lines().find_map(|line| line.strip_prefix(start.as_str()).map(str::to_owned)))
    })
}

/// Holds an exclusive lock of its process on the file that it is given, until another file is there.
const HOLDS_A_LOCK: &str = "
import fcntl, os, sys, time
file = open(sys.argv[1], 'w')
fcntl.lockf(file, fcntl.LOCK_EX)
print('locked', flush=True)
while not os.path.exists(sys.argv[1] + '.enough'): time.sleep(0.01)
fcntl.lockf(file, fcntl.LOCK_UN)
print('unlocked', flush=True)
while True: time.sleep(0.1)
";

#[test]
fn an_exclusive_lock_of_a_process_on_a_shared_file_stays() -> anyhow::Result<()> {
    if reason_to_skip("an_exclusive_lock_of_a_process_on_a_shared_file_stays").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let file = scene.fleet.scratch().join("locked");
    let said = |word: &str| {
        wait_for(word, LIMIT, || {
            let log = std::fs::read_to_string(scene.fleet.scratch().join("a/locker.log"));
            Ok(log.unwrap_or_default().lines().any(|line| line == word).then_some(()))
        })
    };
    scene.run("locker", &[], &["python3", "-c", HOLDS_A_LOCK, &file.to_string_lossy()])?;
    said("locked")?;
    let reason = scene.a.migrate("locker", &scene.b.migrate_address())?.end()?.expect_err("it was moved");
    assert!(reason.contains("exclusive lock of a process"), "{reason}");
    assert!(scene.a.has_instance("locker")?);
    std::fs::write(file.with_extension("enough"), "")?;
    said("unlocked")?;
    scene.moved("locker", &scene.a, &scene.b)
}

#[test]
fn what_cannot_be_carried_is_refused_by_its_name() -> anyhow::Result<()> {
    if reason_to_skip("what_cannot_be_carried_is_refused_by_its_name").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let outside = scene.fleet.scratch().join("outside.sock");
    let _listener = UnixListener::bind(&outside)?;
    let directory = scene.fleet.scratch().join("held");
    fs::create_dir(&directory)?;
    let fifo = directory.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    let _other_end = std::fs::File::options().read(true).write(true).open(&fifo)?;
    let arguments: &[&str] = &[&directory.to_string_lossy(), &outside.to_string_lossy()];
    scene.python("refused", &["--net", "10.88.0.10/24"], arguments)?;
    let holds = wait_for("the program to hold everything", LIMIT, || {
        let text = fs::read_to_string(&scene.log).unwrap_or_default();
        Ok(text.lines().find_map(|line| line.strip_prefix("holds=").map(str::to_owned)))
    })?;
    let output = scene.a.rswap(&["check", "refused"])?.output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let output = scene.a.rswap(&["check", "--json", "refused"])?.output()?;
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let pids = scene.a.pids("refused")?;
    let mut descriptors = 0;
    for one in holds.split(',') {
        let (name, number) = one.rsplit_once(':').context("no descriptor in the log")?;
        assert!(said.contains(name), "{name} is not refused:\n{said}");
        let begins = format!("descriptor {number}: ");
        let is_it = |row: &&Value| {
            let item = row["item"].as_str().unwrap_or_default();
            item.contains(name) && (number == "-" || item.starts_with(&begins))
        };
        let row = rows.iter().find(is_it).with_context(|| format!("{one} is not among {rows:#?}"))?;
        assert_eq!(row["severity"], "refused", "{row}");
        let pid = i32::try_from(row["pid"].as_i64().context("no pid")?)?;
        assert!(pids.contains(&pid), "{row}: of {pids:?}");
        let reason = row["reason"].as_str().unwrap_or_default();
        assert!(reason.split_whitespace().count() >= 2, "no remedy: {row}");
        if number != "-" {
            assert!(fs::symlink_metadata(format!("/proc/{pid}/fd/{number}")).is_ok(), "{row}");
            descriptors += 1;
        }
    }
    assert!(descriptors >= 10, "the program holds only {holds}");
    let moved = scene.a.migrate("refused", &scene.b.migrate_address())?.end()?;
    assert!(moved.is_err(), "it was moved all the same");
    assert!(scene.a.has_instance("refused")?);
    Ok(())
}
