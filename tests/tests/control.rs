//! The control socket: who is who is told by the kernel, each may what the configuration says, and every call that changes
//! something is written down.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use rswap_tests::{Fleet, Host, HostOptions, reason_to_skip, wait_for};
use serde_json::Value;

/// A user who may read, one who may nothing, and a group that may everything.
const READER: u32 = 3001;
const NOBODY: u32 = 3004;
const MEMBER: u32 = 3003;
const OPERATORS: u32 = 3002;

const LIMIT: Duration = Duration::from_secs(20);

/// Becomes somebody else, and calls the control socket.
const CALL: &str = r#"
import os, socket, sys
path, uid, groups, method, route, body = sys.argv[1:]
os.setgroups([int(group) for group in groups.split(",") if group])
os.setgid(int(uid))
os.setuid(int(uid))
agent = socket.socket(socket.AF_UNIX)
agent.connect(path)
head = f"{method} {route} HTTP/1.1\r\nHost: rswap\r\nConnection: close\r\n"
head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
agent.sendall((head + body).encode())
answer = b""
while part := agent.recv(65536):
    answer += part
sys.stdout.write(answer.decode())
"#;

/// A call of user `uid`, who is in `groups`: the status and the rest of the answer, or why there is none.
fn call(
    socket: &Path,
    (uid, groups): (u32, &str),
    method: &str,
    route: &str,
    body: &str,
) -> anyhow::Result<Result<(u16, String), String>> {
    let mut command = Command::new("python3");
    command.args(["-c", CALL]).arg(socket).args([&uid.to_string(), groups, method, route, body]);
    let output = command.stdin(Stdio::null()).output().context("cannot start python3")?;
    if !output.status.success() {
        return Ok(Err(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    let status = answer.split(' ').nth(1).context("no status line")?.parse()?;
    Ok(Ok((status, answer)))
}

fn audit(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// A host, in a directory through which everybody gets.
fn host(fleet: &mut Fleet, name: &str, more: &str) -> anyhow::Result<(Host, PathBuf)> {
    fs::set_permissions(fleet.scratch(), Permissions::from_mode(0o711))?;
    let host = fleet.host(name, &HostOptions { more: more.to_owned(), ..HostOptions::default() })?;
    let at = fleet.scratch().join(name);
    fs::set_permissions(&at, Permissions::from_mode(0o711))?;
    Ok((host, at.join("audit.jsonl")))
}

#[test]
fn each_may_what_the_configuration_says_and_every_change_is_written_down() -> anyhow::Result<()> {
    if reason_to_skip("each_may_what_the_configuration_says_and_every_change_is_written_down").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let grants = format!(
        "[[control.grant]]\nuid = {READER}\nright = \"read\"\n[[control.grant]]\ngid = {OPERATORS}\nright = \"operate\"\n"
    );
    let (a, log) = host(&mut fleet, "a", &grants)?;
    let (reader, nobody, member) = ((READER, ""), (NOBODY, ""), (MEMBER, "3002"));
    let says = |who, method: &str, route: &str, body: &str| -> anyhow::Result<(u16, String)> {
        call(&a.socket(), who, method, route, body)?.map_err(anyhow::Error::msg)
    };
    let drain = r#"{"pool":"this-host"}"#;
    let drained =
        || -> anyhow::Result<bool> { Ok(a.get::<Value>("/v1/pools")?.to_string().contains("draining")) };

    // Shown from the next window on.
    let is_drained =
        |is: bool| wait_for("the pool to be shown", LIMIT, || Ok((drained()? == is).then_some(())));

    // Reading.
    for (who, status) in [(reader, 200), (member, 200), (nobody, 403), ((READER + 1000, "3001"), 403)] {
        ensure!(says(who, "GET", "/v1/instances", "")?.0 == status, "{who:?}");
    }
    // Changing: whoever may not changes nothing.
    for who in [reader, nobody, (OPERATORS, "")] {
        // A group of one's own that has the number of the operators' is theirs: the kernel knows no other.
        let may = who.0 == OPERATORS;
        let (status, answer) = says(who, "POST", "/v1/drain", drain)?;
        ensure!(status == if may { 200 } else { 403 }, "{who:?}: {answer}");
        is_drained(may)?;
    }
    let undo = r#"{"pool":"this-host","undo":true}"#;
    ensure!(says(member, "POST", "/v1/drain", undo)?.0 == 200);
    is_drained(false)?;
    // What fails, at once and at the end of a stream.
    ensure!(says(member, "POST", "/v1/swap", r#"{"instance":"x","pool":"y"}"#)?.0 >= 400);
    let (status, answer) = says(member, "POST", "/v1/migrate", r#"{"instance":"x","host":"10.88.0.9:1"}"#)?;
    ensure!(status == 200 && answer.contains("\"failed\""), "{answer}");
    ensure!(says(member, "POST", "/v1/drain", "no JSON")?.0 >= 400);
    // Root, by the command line.
    a.call(&["drain", "this-host", "--undo"])?;

    fn told(lines: &[Value]) -> Vec<(u64, &str, &str)> {
        lines
            .iter()
            .map(|line| {
                let (call, outcome) = (line["call"].as_str(), line["outcome"].as_str());
                (
                    line["uid"].as_u64().unwrap_or(u64::MAX),
                    call.unwrap_or_default(),
                    outcome.unwrap_or_default(),
                )
            })
            .collect()
    }
    let lines = audit(&log)?;
    let (reader, nobody, member) = (u64::from(READER), u64::from(NOBODY), u64::from(MEMBER));
    let wanted = [
        (u64::from(OPERATORS), "/v1/drain", "begun"),
        (u64::from(OPERATORS), "/v1/drain", "done"),
        (member, "/v1/drain", "begun"),
        (member, "/v1/drain", "done"),
        (member, "/v1/swap", "begun"),
        (member, "/v1/swap", "failed"),
        (member, "/v1/migrate", "begun"),
        (member, "/v1/migrate", "failed"),
        (member, "/v1/drain", "begun"),
        (member, "/v1/drain", "failed"),
        (0, "/v1/drain", "begun"),
        (0, "/v1/drain", "done"),
    ];
    ensure!(told(&lines) == wanted, "{lines:#?}");
    // Refusals are elsewhere, where they push out nothing.
    let refused = audit(&log.with_extension("jsonl.refused"))?;
    let wanted = [(reader, "/v1/drain", "refused"), (nobody, "/v1/drain", "refused")];
    ensure!(told(&refused) == wanted, "{refused:#?}");
    ensure!(lines[0]["arguments"]["pool"] == "this-host", "{}", lines[0]);
    ensure!(lines[5]["said"].as_str().is_some_and(|said| said.contains("detail")), "{}", lines[5]);
    let mut all = lines.iter().chain(&refused);
    ensure!(all.all(|line| line["pid"].as_i64() > Some(0) && line["at"].as_u64() > Some(0)));
    ensure!(log.metadata()?.permissions().mode() & 0o777 == 0o600, "others may read the audit log");

    // What can't be written down is not done; then it is again.
    fs::remove_file(&log)?;
    fs::create_dir(&log)?;
    let error = a.call(&["drain", "this-host"]).err().context("it was done, and not written down")?;
    ensure!(format!("{error:#}").contains("audit log"), "{error:#}");
    ensure!(!drained()?, "it was done, and not written down");
    fs::remove_dir(&log)?;
    a.call(&["drain", "this-host"])?;
    is_drained(true)?;
    ensure!(audit(&log)?.len() == 2);
    Ok(())
}

#[test]
fn without_grants_the_socket_is_its_owners_and_a_full_log_is_kept() -> anyhow::Result<()> {
    if reason_to_skip("without_grants_the_socket_is_its_owners_and_a_full_log_is_kept").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let (a, log) = host(&mut fleet, "a", "[control]\naudit_kib = 2\n")?;
    let refused = call(&a.socket(), (READER, "3002"), "GET", "/v1/status", "")?;
    ensure!(refused.as_ref().is_err_and(|error| error.contains("PermissionError")), "{refused:?}");
    ensure!(call(&a.socket(), (0, ""), "GET", "/v1/status", "")?.is_ok_and(|(status, _)| status == 200));
    for _ in 0..10 {
        a.call(&["drain", "this-host", "--undo"])?;
    }
    let before = log.with_extension("jsonl.1");
    let (now, before) = (audit(&log)?, audit(&before)?);
    ensure!(!now.is_empty() && !before.is_empty());
    ensure!(now.last().is_some_and(|line| line["outcome"] == "done"), "{now:?}");
    Ok(())
}
