//! The control socket: who is who is told by the kernel, each may what the configuration says, and every call that changes
//! something is written down.

use std::{
    fs::{self, Permissions},
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use rswap_tests::{Fleet, Host, HostOptions, api::Api, reason_to_skip, wait_for};
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

const JSON: &str = "content-type: application/json\r\n";

/// Whether the operation has a parameter of this name.
fn takes(api: &Api, path: &str, parameter: &str) -> bool {
    let parameters = api.document()["paths"][path]["get"]["parameters"].as_array();
    parameters.into_iter().flatten().any(|one| one["name"] == parameter)
}

#[test]
fn what_every_route_answers_is_as_the_document_says() -> anyhow::Result<()> {
    if reason_to_skip("what_every_route_answers_is_as_the_document_says").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let a = fleet.host("a", &HostOptions { mode: "act", window_ms: 300, ..HostOptions::default() })?;
    let busy =
        "while :; do echo x > /tmp/rswt-api-$$; sync /tmp/rswt-api-$$; rm /tmp/rswt-api-$$; sleep 0.05; done";
    a.run("busy", &["--label", "app=shop"], &["sh", "-c", busy])?;
    wait_for("windows, distributions and decisions", LIMIT, || {
        let windows: Value = a.get("/v1/windows?instance=busy")?;
        let decisions: Vec<Value> = a.get("/v1/decisions?instance=busy")?;
        let distributions: Vec<Value> = a.get("/v1/distributions?instance=busy")?;
        let enough = windows["windows"].as_array().is_some_and(|all| all.len() > 5);
        Ok((enough
            && !decisions.is_empty()
            && distributions.first().is_some_and(|one| one["distributions"].get(0).is_some()))
        .then_some(()))
    })?;
    let (api, socket) = (Api::agent(), a.socket());
    // A move, and one that fails.
    let pools: Vec<Value> = a.get("/v1/pools")?;
    let cores = pools.iter().find(|pool| pool["kind"]["kind"] == "cpu").context("no cores")?;
    let swap = |pool: &Value| serde_json::json!({ "instance": "busy", "pool": pool }).to_string();
    let moved = api.call(&socket, "post", "/v1/swap", JSON, &swap(&cores["name"]))?;
    ensure!(moved.status == 200, "{moved:?}");
    let failed = r#"{"instance":"busy","host":"10.88.0.99:1"}"#;
    let failed = api.call(&socket, "post", "/v1/migrate", JSON, failed)?;
    ensure!(failed.status == 200 && failed.body.contains("\"failed\""), "{failed:?}");

    let mut asked = 0;
    for path in api.paths("get") {
        let query = if takes(api, path, "instance") { "?instance=busy" } else { "" };
        let answer = api.call(&socket, "get", &format!("{path}{query}"), "", "")?;
        // The page is not in every build.
        ensure!(answer.status == 200 || !path.starts_with("/v1"), "{path}: {answer:?}");
        asked += 1;
    }
    ensure!(asked >= 15, "{asked} routes");
    let shown = api.call(&socket, "get", "/v1/openapi.json", "", "")?.json()?;
    ensure!(shown == *api.document(), "another document is served");
    // What is told is not told by chance only: there is something of each kind.
    for (path, least) in [("/v1/moves", 2), ("/v1/migrations", 1), ("/v1/profiles", 1), ("/v1/pools", 1)] {
        ensure!(a.get::<Vec<Value>>(path)?.len() >= least, "{path} has nothing");
    }

    let long = format!(r#"{{"pool":"{}"}}"#, "x".repeat(5 << 10));
    for (method, path, headers, body, status) in [
        ("get", "/v1/windows?instance=gone", "", "", 404),
        ("get", "/v1/windows", "", "", 400),
        ("get", "/v1/status", "host: evil.example\r\n", "", 403),
        ("post", "/v1/drain", JSON, "no JSON", 400),
        ("post", "/v1/drain", JSON, "{}", 422),
        ("post", "/v1/drain", JSON, long.as_str(), 413),
        // What a page can have a browser send.
        ("post", "/v1/drain", "content-type: text/plain\r\n", r#"{"pool":"this-host"}"#, 415),
        ("post", "/v1/drain", "", r#"{"pool":"this-host"}"#, 415),
        (
            "post",
            "/v1/drain",
            "host: localhost\r\norigin: http://evil.example\r\ncontent-type: application/json\r\n",
            r#"{"pool":"this-host"}"#,
            403,
        ),
        ("post", "/v1/swap", JSON, r#"{"instance":"gone","pool":"x"}"#, 404),
        ("post", "/v1/recover", JSON, r#"{"instance":"busy","decision":"here"}"#, 409),
        ("post", "/v1/drain", JSON, r#"{"pool":"this-host"}"#, 200),
        ("post", "/v1/drain", JSON, r#"{"pool":"this-host","undo":true}"#, 200),
        ("post", "/v1/register", JSON, r#"{"instance":"busy"}"#, 200),
    ] {
        let answer = api.call(&socket, method, path, headers, body)?;
        ensure!(answer.status == status, "{method} {path} {headers:?} {body}: {answer:?}");
    }
    Ok(())
}

/// Becomes another user, keeps a connection to the control socket for each place that one has, and tries once more.
const KEEP: &str = r#"
import os, socket, sys
path, uid = sys.argv[1:]
os.setgroups([])
os.setgid(int(uid))
os.setuid(int(uid))
def calls():
    agent = socket.socket(socket.AF_UNIX)
    agent.settimeout(5)
    agent.connect(path)
    agent.sendall(b"GET /v1/status HTTP/1.1\r\nHost: rswap\r\n\r\n")
    return agent, agent.recv(65536).split(b" ")[1:2]
kept = [calls() for _ in range(8)]
print([status for _, status in kept], flush=True)
try:
    print(calls()[1], flush=True)
except OSError as error:
    print("turned away", flush=True)
sys.stdin.read()
"#;

#[test]
fn one_user_does_not_keep_the_others_from_the_socket() -> anyhow::Result<()> {
    if reason_to_skip("one_user_does_not_keep_the_others_from_the_socket").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let (a, _) = host(&mut fleet, "a", &format!("[[control.grant]]\nuid = {READER}\nright = \"read\"\n"))?;
    let mut keeps = Vec::new();
    for (uid, status) in [(READER, "200"), (NOBODY, "403")] {
        let mut command = Command::new("python3");
        command.args(["-c", KEEP]).arg(a.socket()).arg(uid.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        keeps.push(child);
        let first = lines.next().context("nothing said")??;
        ensure!(first.matches(status).count() == 8, "{uid}: {first}");
        let second = lines.next().context("nothing more said")??;
        ensure!(second == "turned away" || second == "[]", "{uid}: {second}");
        // Root and whoever else may call are answered.
        ensure!(call(&a.socket(), (0, ""), "GET", "/v1/status", "")?.is_ok_and(|(status, _)| status == 200));
    }
    for mut child in keeps {
        drop(child.stdin.take());
        ensure!(child.wait()?.success());
    }
    // The places are free again.
    let answered = |(status, _): (u16, String)| status == 200;
    wait_for("a place for the reader", LIMIT, || {
        Ok(call(&a.socket(), (READER, ""), "GET", "/v1/status", "")?.is_ok_and(answered).then_some(()))
    })
}
