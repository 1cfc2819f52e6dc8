//! The read-only routes over real HTTP.

use super::*;
use crate::{
    control::client::{Client, Target},
    plan::Plan,
    profile::{ProbeState, ProbeStatus},
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

#[tokio::test]
async fn exposes_metrics() {
    let board = board();
    board.write(|b| {
        b.swaps_done = 4;
        b.probes.push(ProbeStatus {
            name: "sched".into(),
            state: ProbeState::Unavailable { reason: "no BTF".into() },
        });
    });
    let text = served(board).await.get_text("/metrics").await.unwrap();
    assert!(text.contains("rswap_core_swaps_total 4"), "{text}");
    assert!(text.contains("rswap_probe_active{name=\"sched\"} 0"), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
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
