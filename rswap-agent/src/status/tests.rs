//! The read-only routes over real HTTP.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;
use crate::{
    control::client::{Client, Target},
    instance::{Instance, InstanceName},
    plan::{Decision, Plan},
    profile::{
        BlockProfile, CpuNeighbour, CpuProfile, DeviceNeighbours, DiskNeighbour, Faults, IoProfile,
        MemoryProfile, OffCpuProfile, OnClass, Operation, ProbeState, ProbeStatus, Profile, ProgramCost,
        RequestCount, TcpConnections, TcpProfile, UnownedBlock, Who, histogram::Histogram,
    },
    units::UnixMillis,
};

fn board() -> Board {
    Board::new(BoardState {
        host: "a".into(),
        mode: "observe".into(),
        started: UnixMillis::now(),
        ..Default::default()
    })
}

async fn served(board: Board) -> Client {
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, board, std::future::pending()));
    Client::new(Target::Tcp(address))
}

#[tokio::test]
async fn refuses_an_address_that_others_can_reach() {
    let refused = bind("0.0.0.0:0".parse().unwrap()).await.unwrap_err();
    assert!(refused.to_string().contains("agent.status_address"), "{refused}");
}

#[tokio::test]
async fn shows_status_plan_and_migrations() {
    let board = board();
    let id = board.write(|b| b.begin_migration("db".parse().unwrap(), "b".into(), UnixMillis(7)));
    let client = served(board.clone()).await;
    let status: serde_json::Value = client.get("/v1/status").await.unwrap();
    assert_eq!((&status["host"], &status["migrations_running"]), (&"a".into(), &1.into()));
    assert_eq!(client.get::<Plan>("/v1/plan").await.unwrap(), Plan::default());

    let report = MigrationReport { rounds: 3, ..Default::default() };
    board.write(|b| b.set_migration(id, MigrationState::Done { report, ended: UnixMillis(9) }));
    let shown: serde_json::Value = client.get("/v1/migrations").await.unwrap();
    assert_eq!((&shown[0]["state"], &shown[0]["report"]["rounds"]), (&"done".into(), &3.into()));
}

#[tokio::test]
async fn answers_errors_with_a_hint() {
    let client = served(board()).await;
    for path in ["/v1/decisions", "/v1/decisions?instance=gone", "/v1/nothing"] {
        let error = client.get::<serde_json::Value>(path).await.unwrap_err().to_string();
        assert!(
            error.contains("rswap ps") || error.contains("docs/api.md") || error.contains("?instance="),
            "{error}"
        );
    }
}

/// The status line, and all that follows.
async fn asked_as(address: SocketAddr, host: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_page_of_a_stranger_that_points_its_name_here_is_not_answered() {
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, board(), std::future::pending()));
    let own = asked_as(address, &address.to_string(), "/v1/status").await;
    assert!(own.starts_with("HTTP/1.1 200") && own.contains("\"host\":\"a\""), "{own}");
    for path in ["/v1/status", "/metrics", "/"] {
        let foreign = asked_as(address, "evil.example.com", path).await;
        assert!(foreign.starts_with("HTTP/1.1 403") && !foreign.contains("observe"), "{foreign}");
    }
}

#[tokio::test]
async fn shows_moves_with_why_and_rounds_as_they_go() {
    let board = board();
    let name: InstanceName = "db".parse().unwrap();
    let id = board.write(|b| b.begin_migration(name.clone(), "b".into(), UnixMillis(7)));
    board.write(|b| {
        let what = NewMove {
            instance: name.clone(),
            kind: MovedKind::Host,
            volume: None,
            from: Some("this-host".into()),
            to: "b".into(),
            asked_by: AskedBy::Request,
            started: UnixMillis(7),
            migration: Some(id),
        };
        b.moves.begin(what, None);
        for (round, sent, at) in [(1, 10, 8), (1, 20, 9), (2, 25, 10)] {
            let progress = MigrationProgress { round, bytes_sent: sent, ..Default::default() };
            b.migration_went_on(id, progress, UnixMillis(at));
        }
    });
    let client = served(board.clone()).await;
    let shown: serde_json::Value = client.get("/v1/migrations").await.unwrap();
    let rounds: Vec<_> =
        shown[0]["rounds"].as_array().unwrap().iter().map(|r| (&r["round"], &r["bytes_sent"])).collect();
    assert_eq!(rounds, [(&1.into(), &20.into()), (&2.into(), &25.into())]);
    assert_eq!((&shown[0]["rounds"][0]["started"], &shown[0]["rounds"][0]["at"]), (&8.into(), &9.into()));
    let status: serde_json::Value = client.get("/v1/status").await.unwrap();
    assert_eq!((&status["moves_running"], &status["moves_started"]), (&1.into(), &1.into()));

    board.write(|b| b.moves.end(&name, MoveState::Done { ended: UnixMillis(12), pause_ms: Some(1.5) }));
    let shown: serde_json::Value = client.get("/v1/moves").await.unwrap();
    let expected = serde_json::json!({ "id": 1, "instance": "db", "kind": "host", "from": "this-host", "to": "b",
        "asked_by": "request", "started": 7, "migration": 1, "state": "done", "ended": 12, "pause_ms": 1.5,
        "forced": null, "gain_per_hour": null, "why": [] });
    assert_eq!(shown[0], expected);
    let explained: serde_json::Value = client.get("/v1/explain?instance=db").await.unwrap();
    assert_eq!(explained, serde_json::json!({ "now": [], "moved": [{ "move": expected }] }));
    let none: Vec<InstanceView> = client.get("/v1/profiles?instance=gone").await.unwrap();
    assert!(none.is_empty(), "{none:?}");
    for path in ["/v1/explain?instance=gone", "/v1/windows?instance=gone"] {
        let error = client.get::<serde_json::Value>(path).await.unwrap_err().to_string();
        assert!(error.contains("rswap ps"), "{error}");
    }
}

/// An instance that was measured once.
fn show_a_profile(board: &mut BoardState) {
    let view = serde_json::json!({
        "name": "db", "labels": {}, "cgroup": "/x", "cgroup_id": 1, "origin": "run", "init_pid": 1, "command": ["db"],
        "network": null, "pool": null, "since": 0, "profile": null, "demand": null,
    });
    let mut view: InstanceView = serde_json::from_value(view).unwrap();
    let of = |values: &[u64]| {
        let mut histogram = Histogram::default();
        values.iter().for_each(|value| histogram.record(*value));
        histogram
    };
    let io_wait_ns = of(&[300_000_000, 200_000_000]);
    let off_cpu = Some(OffCpuProfile { io_wait_ns, ..OffCpuProfile::default() });
    let hog = Who::Cgroup("/system.slice/hog.service".into());
    let neighbours = vec![CpuNeighbour { who: hog, waited_ns: 250_000_000 }];
    let profile = Profile {
        instance: view.instance.name.clone(),
        at: UnixMillis::now(),
        window_ms: 1000,
        cpu: CpuProfile {
            run_queue_ns: of(&[1000]),
            off_cpu,
            neighbours,
            by_class: vec![OnClass { class: "fast".into(), ran_ns: 500_000_000 }],
            migrations: Some(6),
            cores: 1.25,
            pressure_full: Some(0.125),
            ..CpuProfile::default()
        },
        block: vec![BlockProfile {
            device: "8:0".into(),
            operation: Operation::Write,
            bytes: 8192,
            latency_ns: of(&[2_000_000_000, 4_000_000_000]),
            queue_ns: of(&[1000, 2000]),
            not_split: 0,
            in_flight: 6.0,
        }],
        block_counted: true,
        disk_neighbours: vec![DeviceNeighbours {
            device: "8:0".into(),
            own_ns: 6_000_000_000,
            others: vec![DiskNeighbour {
                who: Who::KernelThreads,
                device_ns: 3_000_000_000,
                waited_ns: 2_000_000_000,
            }],
        }],
        io: IoProfile { pressure_some: Some(0.25), pressure_full: None },
        tcp: TcpProfile {
            bytes_in: 700,
            connections: Some(TcpConnections {
                opened: 2,
                closed: 1,
                open: 3,
                life_us: of(&[1_500_000]),
                ..Default::default()
            }),
            retransmits: Some(4),
            listen_drops: Some(5),
            ..Default::default()
        },
        tcp_counted: true,
        memory: MemoryProfile {
            faults: Some(Faults { minor: 30, major: 2 }),
            pressure_some: Some(0.0),
            ..MemoryProfile::default()
        },
    };
    view.profile = Some(profile.clone());
    board.instances.insert(profile.instance.clone(), view);
    board.keep_window(&profile, &Default::default(), None);
    board.block.not_covered.push("dm-0".into());
    let write_back = RequestCount { requests: 1, bytes: 4096 };
    let (reads, writes) = Default::default();
    board.block.unowned.push(UnownedBlock { device: "8:0".into(), reads, writes, write_back });
}

#[tokio::test]
async fn shows_distributions_of_one_instance_or_all() {
    let board = board();
    board.write(show_a_profile);
    let client = served(board).await;
    let shown: serde_json::Value = client.get("/v1/distributions?instance=db").await.unwrap();
    let of = &shown[0]["distributions"];
    assert_eq!(
        (&shown[0]["name"], &of[0]["metric"], &of[0]["hour"]["sum"]),
        (&"db".into(), &"run_queue_ns".into(), &1000.into())
    );
    assert_eq!((&of[1]["metric"], &of[1]["reason"]), (&"off_cpu_ns".into(), &"io_wait".into()));
    assert_eq!((&of[2]["metric"], &of[2]["operation"]), (&"block_device_ns".into(), &"write".into()));
    assert_eq!((&of[2]["minute"]["count"], &of[2]["total"]["sum"]), (&2.into(), &6_000_000_000_u64.into()));
    let counts = &shown[0]["counts"];
    for span in ["window", "minute", "hour", "total"] {
        let of = &counts[span];
        assert_eq!((&of["tcp_bytes_in"], &of["core_migrations"]), (&700.into(), &6.into()), "{counts}");
        assert_eq!(
            (&of["refaults"], &of["cpu_us"]),
            (&serde_json::Value::Null, &1_250_000.into()),
            "{counts}"
        );
        let block = serde_json::json!([{ "device": "8:0", "operation": "write", "bytes": 8192 }]);
        assert_eq!(of["block"], block, "{counts}");
    }
    let all: serde_json::Value = client.get("/v1/distributions").await.unwrap();
    assert_eq!(all, shown);
    let none: serde_json::Value = client.get("/v1/distributions?instance=gone").await.unwrap();
    assert_eq!(none, serde_json::json!([]));
    let status: serde_json::Value = client.get("/v1/status").await.unwrap();
    assert_eq!(
        status["block"]["unowned"][0]["write_back"],
        serde_json::json!({ "requests": 1, "bytes": 4096 })
    );
    assert_eq!(status["block"]["not_covered"], serde_json::json!(["dm-0"]));
}

#[tokio::test]
async fn exposes_metrics() {
    let board = board();
    board.write(|b| {
        b.swaps_done = 4;
        b.profile_cost.untiered_share = 0.0625;
        b.bookkeeping.slots_free = 250;
        b.bookkeeping.lost.exact_waits = 7;
        let (name, runs, ns_per_run) = ("sched_switch".to_owned(), 10, 50.0);
        b.programs.push(ProgramCost { name, runs, ns_per_run, core_share: None, missed: Some(2) });
        b.probes.push(ProbeStatus {
            name: "sched".into(),
            state: ProbeState::Unavailable { reason: "no BTF".into() },
        });
        b.probes.push(ProbeStatus {
            name: "memory.written_ages".into(),
            state: ProbeState::Off { reason: "profile.written_budget is 0".into() },
        });
    });
    board.write(show_a_profile);
    let text = served(board).await.get_text("/metrics").await.unwrap();
    for line in [
        "rswap_instance_block_device_seconds_count{instance=\"db\",device=\"8:0\",operation=\"write\"} 2",
        "rswap_instance_block_device_seconds_sum{instance=\"db\",device=\"8:0\",operation=\"write\"} 6.0",
        "rswap_instance_block_device_seconds_bucket{le=\"+Inf\",instance=\"db\",device=\"8:0\",operation=\"write\"} 2",
        "rswap_instance_run_queue_seconds_count{instance=\"db\"} 1",
        "rswap_block_unowned_bytes_total{device=\"8:0\",kind=\"write_back\"} 4096",
        "rswap_block_not_covered{name=\"dm-0\"} 1",
        "rswap_instance_off_cpu_threads{instance=\"db\",reason=\"io_wait\"} 0.5",
        "rswap_instance_off_cpu_seconds_sum{instance=\"db\",reason=\"io_wait\"} 0.5",
        "rswap_instance_off_cpu_seconds_count{instance=\"db\",reason=\"io_wait\"} 2",
        "rswap_profile_lost_total{name=\"exact_waits\"} 7",
        "rswap_bpf_missed_total{name=\"sched_switch\"} 2",
        "rswap_slots_free 250.0",
        "rswap_instance_cpu_taken_by{instance=\"db\",kind=\"cgroup\",neighbour=\"/system.slice/hog.service\"} 0.25",
        "rswap_instance_tcp_connections{instance=\"db\"} 3.0",
        "rswap_instance_tcp_connections_per_second{instance=\"db\"} 2.0",
        "rswap_instance_tcp_retransmits_per_second{instance=\"db\"} 4.0",
        "rswap_instance_tcp_listen_drops_total{instance=\"db\"} 5",
        "rswap_instance_tcp_life_seconds_sum{instance=\"db\"} 1.5",
        "rswap_profile_untiered_core_share 0.0625",
        "rswap_instance_class_cores{instance=\"db\",class=\"fast\"} 0.5",
        "rswap_instance_core_migrations_per_second{instance=\"db\"} 6.0",
        "rswap_instance_disk_taken_by{instance=\"db\",device=\"8:0\",kind=\"kernel_threads\",neighbour=\"\"} 2.0",
        "rswap_instance_pressure_share{instance=\"db\",resource=\"io\",kind=\"some\"} 0.25",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in {text}");
    }
    assert!(text.contains("# TYPE rswap_instance_block_device_seconds histogram"), "{text}");
    assert!(text.contains("rswap_core_swaps_total 4"), "{text}");
    assert!(text.contains("rswap_probe_active{name=\"sched\"} 0"), "{text}");
    assert!(!text.contains("rswap_probe_active{name=\"memory.written_ages\"}"), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/profile.md")).unwrap();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE rswap_")) {
        let name = line.split(' ').next().unwrap();
        assert!(docs.contains(&format!("`{name}`")), "docs/profile.md does not explain {name}");
    }
}

#[tokio::test]
async fn exposes_what_was_counted_and_nothing_that_was_not() {
    let board = board();
    board.write(|board| {
        show_a_profile(board);
        let mut next = board.instances.values().next().unwrap().profile.clone().unwrap();
        // A window in which little is known takes nothing away.
        (next.at, next.block_counted, next.tcp_counted) = (UnixMillis(next.at.0 + 1000), false, false);
        (next.tcp.connections, next.tcp.retransmits, next.memory.faults) = Default::default();
        (next.cpu.pressure_full, next.io.pressure_some) = (Some(0.5), None);
        board.keep_window(&next, &Default::default(), None);
    });
    let text = served(board).await.get_text("/metrics").await.unwrap();
    for line in [
        "rswap_instance_cpu_seconds_total{instance=\"db\"} 2.5",
        "rswap_instance_core_migrations_total{instance=\"db\"} 12",
        "rswap_instance_net_in_bytes_total{instance=\"db\"} 700",
        "rswap_instance_net_out_bytes_total{instance=\"db\"} 0",
        "rswap_instance_tcp_retransmits_total{instance=\"db\"} 4",
        "rswap_instance_tcp_connections_opened_total{instance=\"db\"} 2",
        "rswap_instance_tcp_connections_accepted_total{instance=\"db\"} 0",
        "rswap_instance_tcp_connections_failed_total{instance=\"db\"} 0",
        "rswap_instance_tcp_connections_closed_total{instance=\"db\"} 1",
        "rswap_instance_tcp_listen_drops_total{instance=\"db\"} 10",
        "rswap_instance_page_faults_total{instance=\"db\",kind=\"minor\"} 30",
        "rswap_instance_page_faults_total{instance=\"db\",kind=\"major\"} 2",
        "rswap_instance_block_bytes_total{instance=\"db\",device=\"8:0\",operation=\"write\"} 8192",
        "rswap_instance_pressure_seconds_total{instance=\"db\",resource=\"cpu\",kind=\"full\"} 0.625",
        "rswap_instance_pressure_seconds_total{instance=\"db\",resource=\"memory\",kind=\"some\"} 0.0",
        "rswap_instance_pressure_seconds_total{instance=\"db\",resource=\"io\",kind=\"some\"} 0.25",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in {text}");
    }
    for unknown in
        ["rswap_instance_refaults_total", "resource=\"io\",kind=\"full\"", "resource=\"cpu\",kind=\"some\""]
    {
        assert!(!text.contains(unknown), "{unknown} in {text}");
    }
}

#[test]
fn forgets_the_oldest_ended_migrations_only() {
    let mut state = BoardState::default();
    let running = state.begin_migration("db".parse().unwrap(), "b".into(), UnixMillis(0));
    for n in 1..=(MIGRATIONS_KEPT as u64 + 5) {
        let id = state.begin_migration("db".parse().unwrap(), "b".into(), UnixMillis(n));
        state.set_migration(id, MigrationState::Failed { error: "x".into(), ended: UnixMillis(n) });
    }
    assert!(state.migrations.iter().any(|m| m.id == running));
    assert!(state.migrations.len() <= MIGRATIONS_KEPT + 2);
    assert_eq!(state.migrations_failed, MIGRATIONS_KEPT as u64 + 5);
}

#[test]
fn what_is_known_stays_with_who_stays_and_decisions_as_long_as_a_migration_is_shown() {
    let mut state = BoardState::default();
    show_a_profile(&mut state);
    let db = state.instances.values().next().unwrap().instance.clone();
    let decision = serde_json::json!({
        "instance": "db", "kind": "cpu", "at": 0, "candidates": [], "threshold": 0.0, "hysteresis": 0.0,
        "outcome": { "outcome": "stay", "reason": { "why": "no_pool_fits" } },
    });
    let decision: Decision = serde_json::from_value(decision).unwrap();
    let plan = Plan { at: UnixMillis(5), decisions: vec![decision] };
    state.keep_plan(plan.clone());
    assert_eq!(serde_json::to_value(&state.plan).unwrap(), serde_json::to_value(&plan).unwrap());
    state.set_instances([Instance { pool: Some("fast".into()), ..db.clone() }]);
    let view = &state.instances[&db.name];
    assert!(view.profile.is_some() && view.instance.pool.as_deref() == Some("fast"), "{view:?}");
    assert_eq!((state.series.len(), state.distributions.len(), state.decisions.len()), (1, 1, 1));

    let migrate = |state: &mut BoardState, name: &InstanceName| {
        let id = state.begin_migration(name.clone(), "b".into(), UnixMillis(0));
        let (report, ended) = Default::default();
        state.set_migration(id, MigrationState::Done { report, ended });
    };
    migrate(&mut state, &db.name);
    state.set_instances([]);
    assert_eq!((state.series.len(), state.distributions.len(), state.decisions.len()), (0, 0, 1));
    for _ in 0..=MIGRATIONS_KEPT {
        migrate(&mut state, &"other".parse().unwrap());
    }
    assert!(state.decisions.is_empty(), "{:?}", state.decisions);
}

#[tokio::test]
async fn so_many_connections_are_served_at_a_time() {
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, board(), std::future::pending()));
    let calls = async || {
        let mut caller = TcpStream::connect(address).await.unwrap();
        caller.write_all(b"GET /v1/pools HTTP/1.1\r\nhost: rswap\r\n\r\n").await.unwrap();
        caller
    };
    let is_answered = async |caller: &mut TcpStream, within_ms| {
        let within = Duration::from_millis(within_ms);
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

#[tokio::test]
async fn the_document_has_what_can_be_read_and_no_more() {
    let document: serde_json::Value = served(board()).await.get("/v1/openapi.json").await.unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/status") && paths.contains_key("/v1/openapi.json"));
    assert!(paths.values().all(|item| item.get("get").is_some() && item.get("post").is_none()), "{paths:?}");
}
