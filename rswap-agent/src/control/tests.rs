//! The mutating routes over a real unix socket, with a wiring that answers from the test.

use super::{
    client::{Client, ClientError, Target},
    *,
};

struct Served {
    client: Client,
    commands: mpsc::Receiver<Command>,
    directory: tempfile::TempDir,
}

async fn served() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/control.sock");
    let (sender, commands) = mpsc::channel(4);
    let socket = bind(&path, false).await.unwrap();
    let audit = Audit::open(directory.path().join("audit.jsonl"), 1 << 20).unwrap();
    let gate = Gate::new(Vec::new(), audit);
    tokio::spawn(serve(socket, Board::default(), sender, gate, std::future::pending()));
    Served { client: Client::new(Target::Socket(path)), commands, directory }
}

#[tokio::test]
async fn the_socket_is_its_owners_only() {
    let served = served().await;
    let path = served.directory.path().join("run/control.sock");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(bind(&path, false).await.unwrap_err(), ControlError::InUse(_)));
    let status: serde_json::Value = served.client.get("/v1/status").await.unwrap();
    assert_eq!(status["instances"], 0);
}

#[tokio::test]
async fn replaces_a_dead_agents_socket_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    drop(bind(&path, false).await.unwrap());
    assert!(!path.exists());
    std::fs::write(&path, "mine").unwrap();
    assert!(matches!(bind(&path, false).await.unwrap_err(), ControlError::NotASocket(_)));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

#[tokio::test]
async fn a_swap_is_answered_by_the_wiring() {
    let mut served = served().await;
    let request = SwapRequest { instance: "db".parse().unwrap(), pool: "fast".into() };
    let (answer, ()) = tokio::join!(served.client.post::<SwapDone>("/v1/swap", &request), async {
        let Some(Command::Swap(got, reply)) = served.commands.recv().await else { panic!("no swap") };
        let done = SwapDone {
            instance: got.instance,
            pool: got.pool,
            duration_ms: 1.5,
            detail: serde_json::Value::Null,
        };
        reply.send(Ok(done)).unwrap();
    });
    assert_eq!(answer.unwrap().pool, "fast");
}

#[tokio::test]
async fn a_refusal_keeps_its_status_and_hint() {
    let mut served = served().await;
    let request = RegisterRequest { instance: "db".parse().unwrap() };
    let (answer, ()) = tokio::join!(served.client.post::<Instance>("/v1/register", &request), async {
        let Some(Command::Register(_, reply)) = served.commands.recv().await else { panic!("no register") };
        reply.send(Err(crate::status::no_instance("db"))).unwrap();
    });
    let Err(ClientError::Refused(error)) = answer else { panic!("{answer:?}") };
    assert_eq!((error.status, error.hint.as_str()), (404, "see `rswap ps`"));
}

#[tokio::test]
async fn bad_bodies_never_reach_the_wiring() {
    let mut served = served().await;
    for body in [
        serde_json::json!({}),
        serde_json::json!({"instance": "../etc", "pool": "x"}),
        serde_json::json!({"instance": "db", "pool": "x", "force": true}),
    ] {
        let answer = served.client.post::<SwapDone>("/v1/swap", &body).await;
        assert!(
            matches!(answer, Err(ClientError::Refused(ref e)) if (400..500).contains(&e.status)),
            "{answer:?}"
        );
    }
    assert!(served.commands.try_recv().is_err());
}

fn audited(served: &Served) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(served.directory.path().join("audit.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn what_has_no_room_in_the_audit_log_is_refused() {
    let mut served = served().await;
    let body = serde_json::json!({"pad": "x".repeat(5 << 10), "instance": "db", "pool": "x"});
    let answer = served.client.post::<SwapDone>("/v1/swap", &body).await;
    let Err(ClientError::Refused(error)) = answer else { panic!("{answer:?}") };
    assert_eq!(error.status, 413);
    assert!(error.hint.contains("4 KiB"), "{error}");
    assert!(audited(&served).is_empty());
    assert!(served.commands.try_recv().is_err());
}

#[tokio::test]
async fn of_a_caller_that_hangs_up_the_end_is_unknown() {
    use tokio::io::AsyncWriteExt as _;
    let mut served = served().await;
    let path = served.directory.path().join("run/control.sock");
    let mut caller = UnixStream::connect(path).await.unwrap();
    let body = r#"{"instance":"db","pool":"x"}"#;
    let head = "POST /v1/swap HTTP/1.1\r\nHost: rswap\r\nContent-Type: application/json\r\n";
    let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    caller.write_all(request.as_bytes()).await.unwrap();
    // It is under way, and is not answered.
    let command = served.commands.recv().await.unwrap();
    assert_eq!(audited(&served).len(), 1);
    drop(caller);
    for _ in 0..500 {
        if audited(&served).len() == 2 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let lines = audited(&served);
    assert_eq!((&lines[0]["outcome"], &lines[1]["outcome"]), (&"begun".into(), &"unknown".into()));
    assert_eq!(lines[0]["id"], lines[1]["id"]);
    drop(command);
}

#[tokio::test]
async fn a_migration_streams_its_events() {
    let mut served = served().await;
    let request = MigrateRequest { instance: "db".parse().unwrap(), host: "b".into(), stop_and_copy: false };
    let wiring = async {
        let Some(Command::Migrate(_, events)) = served.commands.recv().await else { panic!("no migrate") };
        for round in 1..=200 {
            events
                .send(MigrateEvent::Progress(MigrationProgress { round, ..Default::default() }))
                .await
                .unwrap();
        }
        events.send(MigrateEvent::Done(MigrationReport { rounds: 200, ..Default::default() })).await.unwrap();
    };
    let caller = async {
        let mut events = served.client.post_stream("/v1/migrate", &request).await.unwrap();
        let mut seen = Vec::new();
        while let Some(event) = events.next::<MigrateEvent>().await.unwrap() {
            seen.push(event);
        }
        seen
    };
    let ((), seen) = tokio::join!(wiring, caller);
    assert_eq!(seen.len(), 201);
    assert!(matches!(&seen[200], MigrateEvent::Done(report) if report.rounds == 200));
}

#[tokio::test]
async fn says_how_to_start_a_missing_agent() {
    let client = Client::new(Target::Socket("/nonexistent/rswap.sock".into()));
    let error = client.get::<serde_json::Value>("/v1/status").await.unwrap_err();
    assert!(error.to_string().contains("rswap agent"), "{error}");
}

/// What is answered to this text: the status and the rest.
async fn raw(served: &Served, text: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let path = served.directory.path().join("run/control.sock");
    let mut caller = UnixStream::connect(path).await.unwrap();
    caller.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    caller.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
}

/// The paths of this method in the document.
fn documented(method: &str) -> Vec<String> {
    let document = document();
    let paths = document["paths"].as_object().unwrap().iter();
    paths.filter(|(_, item)| item.get(method).is_some()).map(|(path, _)| path.clone()).collect()
}

#[tokio::test]
async fn a_page_of_another_site_changes_nothing_through_a_forwarded_socket() {
    let mut served = served().await;
    let (asked, json) = ("host: localhost:7790\r\n", "content-type: application/json\r\n");
    let posts = documented("post");
    assert!(posts.len() >= 8, "{posts:?}");
    for path in &posts {
        for (head, status) in [
            (format!("{asked}content-type: text/plain\r\n"), 415),
            (asked.to_owned(), 415),
            (format!("{asked}{json}origin: http://evil.example\r\n"), 403),
            (format!("host: evil.example:7790\r\n{json}origin: http://evil.example:7790\r\n"), 403),
        ] {
            let text =
                format!("POST {path} HTTP/1.1\r\n{head}content-length: 2\r\nconnection: close\r\n\r\n{{}}");
            let (said, answer) = raw(&served, &text).await;
            assert_eq!(said, status, "{path} {head}: {answer}");
            assert!(answer.contains("application/problem+json") && answer.contains("\"hint\""), "{answer}");
        }
    }
    let text = "GET /v1/status HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n";
    assert_eq!(raw(&served, text).await.0, 403);
    assert!(served.commands.try_recv().is_err() && audited(&served).is_empty());
    // Its own page could.
    let own =
        format!("{asked}{json}origin: http://localhost:7790\r\ncontent-length: 2\r\nconnection: close\r\n");
    assert_eq!(raw(&served, &format!("POST /v1/drain HTTP/1.1\r\n{own}\r\n{{}}")).await.0, 422);
}

#[tokio::test]
async fn every_documented_route_is_there_and_the_document_is_served() {
    let served = served().await;
    let shown: serde_json::Value = served.client.get("/v1/openapi.json").await.unwrap();
    assert_eq!(shown, document());
    for path in documented("get") {
        let (status, answer) =
            raw(&served, &format!("GET {path} HTTP/1.1\r\nhost: rswap\r\nconnection: close\r\n\r\n")).await;
        assert!(![404, 405].contains(&status) || !path.starts_with("/v1/"), "{path}: {answer}");
        assert!(!answer.contains("no such route"), "{path}: {answer}");
    }
    for path in documented("post") {
        let head =
            "host: rswap\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n";
        let (status, answer) = raw(&served, &format!("POST {path} HTTP/1.1\r\n{head}\r\n[]")).await;
        assert_eq!(status, 422, "{path}: {answer}");
    }
}

#[tokio::test]
async fn so_many_connections_are_served_at_a_time() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let served = served().await;
    let path = served.directory.path().join("run/control.sock");
    let calls = async || {
        let mut caller = UnixStream::connect(&path).await.unwrap();
        caller.write_all(b"GET /v1/pools HTTP/1.1\r\nhost: rswap\r\n\r\n").await.unwrap();
        caller
    };
    let is_answered = async |caller: &mut UnixStream, within_ms| {
        let within = std::time::Duration::from_millis(within_ms);
        tokio::time::timeout(within, caller.read_exact(&mut [0; 12])).await.is_ok()
    };
    let mut kept = Vec::new();
    for _ in 0..LIMITS.connections {
        let mut caller = calls().await;
        assert!(is_answered(&mut caller, 5_000).await);
        kept.push(caller);
    }
    let mut waits = calls().await;
    assert!(!is_answered(&mut waits, 300).await, "more than {} are served", LIMITS.connections);
    kept.pop();
    assert!(is_answered(&mut waits, 5_000).await);
}
