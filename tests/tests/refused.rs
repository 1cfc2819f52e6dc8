//! What can't be carried of a process is refused by its pid and its name, before anything is touched.

use std::time::Duration;

use anyhow::{Context, ensure};
use rswap_tests::{
    reason_to_skip,
    scene::{Scene, further, lines},
    wait_for,
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);

/// What is refused.
#[derive(Debug)]
struct Refusal {
    pid: i32,
    item: String,
    reason: String,
}

/// What `rswap check` refuses of instance `name`.
fn rows(scene: &Scene, name: &str) -> anyhow::Result<Vec<Refusal>> {
    let output = scene.a.rswap(&["check", "--json", name])?.output()?;
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let refused = rows.iter().filter(|row| row["severity"] == "refused");
    refused
        .map(|row| {
            let pid = row["pid"].as_i64().context("no pid")?;
            let text =
                |name: &str| row[name].as_str().map(str::to_owned).with_context(|| format!("no {name}"));
            Ok(Refusal { pid: i32::try_from(pid)?, item: text("item")?, reason: text("reason")? })
        })
        .collect()
}

/// The same: (pid, item).
fn refused(scene: &Scene, name: &str) -> anyhow::Result<Vec<(i32, String)>> {
    Ok(rows(scene, name)?.into_iter().map(|row| (row.pid, row.item)).collect())
}

/// It stays where it is, with each of `items` said, and nothing is made at the other host.
fn stays(scene: &Scene, name: &str, items: &[String]) -> anyhow::Result<()> {
    let Err(reason) = scene.a.migrate(name, &scene.b.migrate_address())?.end()? else {
        anyhow::bail!("it was moved with {items:?}");
    };
    for item in items {
        ensure!(reason.contains(item.as_str()), "{item} is not refused: {reason}");
    }
    ensure!(scene.a.has_instance(name)? && !scene.b.has_processes()?, "something was touched");
    Ok(())
}

#[test]
fn namespaces_of_its_own_are_refused_by_their_kinds() -> anyhow::Result<()> {
    if reason_to_skip("namespaces_of_its_own_are_refused_by_their_kinds").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let kinds = ["user", "mnt", "pid", "uts", "ipc", "net", "cgroup", "time"];
    // A time namespace is for children.
    let script = "for kind in user mount uts ipc net cgroup; do unshare --$kind sleep 1000 & done; \
                  unshare --pid --fork sleep 1000 & unshare --time --fork sleep 1000 & wait";
    scene.run("spaces", &[], &["sh", "-c", script])?;
    let items: Vec<String> = kinds.iter().map(|kind| format!("a {kind} namespace of its own")).collect();
    let found = wait_for("all kinds to be refused", LIMIT, || {
        let found = refused(&scene, "spaces")?;
        let named = |item: &String| found.iter().any(|(_, found)| found == item);
        Ok(items.iter().all(named).then_some(found))
    })?;
    let pids = scene.a.pids("spaces")?;
    ensure!(found.iter().all(|(pid, _)| pids.contains(pid)), "{found:?} of {pids:?}");
    stays(&scene, "spaces", &items)
}

/// What `programs/refused_processes.py` has, by the names of its processes: a part of the item, and of what to do.
const OF_PROCESSES: [(&str, &str, &str); 8] = [
    ("trap", "SIGTRAP ignored", "let it have its default"),
    ("segment", "/SYSV", "only whole SysV segments are carried"),
    ("written", "/mapped", "put it into a volume"),
    ("replaced", "a deleted program file", "restart it"),
    ("rings", "requests by io_setup(2)", "switch the program to threads"),
    ("secret", "secret memory", "use another kind"),
    ("watcher", "(F_NOTIFY)", "use inotify(7)"),
    ("teller", "another signal than SIGCHLD", "let it be made by fork(2)"),
];
const OUTSIDER: &str = "a process from outside";

#[test]
fn what_a_process_has_is_refused_by_its_pid() -> anyhow::Result<()> {
    if reason_to_skip("what_a_process_has_is_refused_by_its_pid").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    scene.python("refused_processes", &[], &[&scene.fleet.scratch().to_string_lossy()])?;
    wait_for("all processes to be ready", LIMIT, || Ok((lines(&scene.log, "ready")? == 1).then_some(())))?;
    let mut outsider = std::process::Command::new("sleep").arg("1000").spawn()?;
    let joined = scene.a.cgroup().and_then(|all| {
        let members = all.join("refused_processes/cgroup.procs");
        Ok(std::fs::write(members, outsider.id().to_string())?)
    });
    let found = joined.and_then(|()| rows(&scene, "refused_processes"));
    let moved = scene.a.migrate("refused_processes", &scene.b.migrate_address())?.end();
    outsider.kill()?;
    outsider.wait()?;
    let (found, Err(said)) = (found?, moved?) else { anyhow::bail!("it was moved all the same") };
    let mut pids = Vec::new();
    for (name, item, reason) in OF_PROCESSES {
        let is_it = |row: &&Refusal| row.item.contains(item) && row.reason.contains(reason);
        let row = found.iter().find(is_it).with_context(|| format!("{name} is not in {found:#?}"))?;
        let command = std::fs::read_to_string(format!("/proc/{}/comm", row.pid))?;
        ensure!(command.trim_end() == name, "{row:?} names {command}");
        ensure!(said.contains(reason), "{reason} is not in {said}");
        pids.push(row.pid);
    }
    let outside = found.iter().find(|row| row.item == OUTSIDER).context("the one from outside")?;
    ensure!(outside.pid == i32::try_from(outsider.id())? && said.contains(OUTSIDER), "{outside:?}: {said}");
    pids.push(outside.pid);
    ensure!(found.iter().all(|row| pids.contains(&row.pid)), "more is refused than there is: {found:#?}");
    ensure!(scene.a.has_instance("refused_processes")? && !scene.b.has_processes()?, "something was touched");
    Ok(())
}

/// Traces its child, until a file is there.
const TRACES: &str = "
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
child = os.fork()
if child == 0:
    while True: time.sleep(0.1)
if libc.ptrace(0x4206, child, None, None): sys.exit(1)
while not os.path.exists(sys.argv[1]): time.sleep(0.02)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
while True: time.sleep(0.1)
";

#[test]
fn a_process_that_is_traced_is_refused_until_it_is_not() -> anyhow::Result<()> {
    if reason_to_skip("a_process_that_is_traced_is_refused_until_it_is_not").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    let enough = scene.fleet.scratch().join("enough");
    scene.run("traced", &[], &["python3", "-c", TRACES, &enough.to_string_lossy()])?;
    let debugger = "a debugger".to_owned();
    let pid = wait_for("the tracer to be refused", LIMIT, || {
        let found = refused(&scene, "traced")?;
        Ok(found.iter().find(|(_, item)| *item == debugger).map(|(pid, _)| *pid))
    })?;
    let traced = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    ensure!(!traced.contains("TracerPid:\t0"), "{pid} is not the one that is traced");
    stays(&scene, "traced", &[debugger])?;
    std::fs::write(&enough, "")?;
    wait_for("the traced one to be gone", LIMIT, || Ok(refused(&scene, "traced")?.is_empty().then_some(())))?;
    scene.moved("traced", &scene.a, &scene.b)
}

/// What only a look inside shows, by what the program does first.
const INSIDE: [(&str, &str, &str); 2] = [
    // `PR_SET_SYSCALL_USER_DISPATCH`, with a byte that allows all calls at the moment.
    (
        "dispatch",
        "allow = ctypes.create_string_buffer(1)\n\
         assert libc.prctl(59, 1, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(ctypes.addressof(allow))) == 0",
        "PR_SET_SYSCALL_USER_DISPATCH",
    ),
    // `struct user_desc` of a data segment.
    (
        "segments",
        "assert libc.syscall(154, 1, struct.pack('=IIII', 0, 0x1000, 0xfff, 0x51), 16) == 0",
        "modify_ldt",
    ),
];

#[test]
fn what_only_a_look_inside_shows_ends_a_move_and_not_the_program() -> anyhow::Result<()> {
    if reason_to_skip("what_only_a_look_inside_shows_ends_a_move_and_not_the_program").is_some() {
        return Ok(());
    }
    let scene = Scene::set()?;
    for (name, first, said) in INSIDE {
        let log = scene.fleet.scratch().join(name);
        let program = format!(
            "import ctypes, struct, sys, time\nlibc = ctypes.CDLL(None, use_errno=True)\n{first}\n\
             while True:\n    open(sys.argv[1], 'a').write('line=1\\n')\n    time.sleep(0.02)"
        );
        scene.run(name, &[], &["python3", "-c", &program, &log.to_string_lossy()])?;
        further(&log, "line", 2)?;
        for _ in 0..2 {
            stays(&scene, name, &[said.to_owned()])?;
            further(&log, "line", 3)?;
        }
    }
    Ok(())
}
