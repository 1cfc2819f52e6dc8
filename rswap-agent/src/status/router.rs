//! The read-only routes.

use std::collections::BTreeMap;

use axum::{
    Json, Router,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use problem_details::ProblemDetails;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Board, InstanceView, MigrationState, MoveView, metrics};
use crate::{
    instance::InstanceName,
    plan::{Decision, in_words},
    pool::Pool,
    units::UnixMillis,
};

/// Of an instance's moves, the newest are explained.
const MOVES_EXPLAINED: usize = 10;

/// The media type of errors.
const PROBLEM_JSON: &str = "application/problem+json";

/// How every error is answered: as problem details (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(from = "ProblemDetails<Hint>", into = "ProblemDetails<Hint>")]
#[error("{detail}: {hint}")]
pub struct ApiError {
    /// What was attempted, and what went wrong.
    pub detail: String,
    /// What to do about it.
    pub hint: String,
    /// The HTTP status.
    pub status: u16,
}

/// What rswap's problems say beside the members of the standard.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Hint {
    #[serde(default)]
    hint: String,
}

impl From<ApiError> for ProblemDetails<Hint> {
    fn from(error: ApiError) -> Self {
        let details = ProblemDetails::from_status_code(error.code()).with_detail(error.detail);
        details.with_extensions(Hint { hint: error.hint })
    }
}

impl From<ProblemDetails<Hint>> for ApiError {
    fn from(details: ProblemDetails<Hint>) -> Self {
        let status = details.status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::new(status, details.detail.unwrap_or_default(), details.extensions.hint)
    }
}

impl ApiError {
    /// An error with its HTTP status.
    pub fn new(status: StatusCode, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { detail: detail.into(), hint: hint.into(), status: status.as_u16() }
    }

    fn code(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// There is no such instance.
    pub fn no_instance(name: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            format!("there is no instance {name:?} on this host"),
            "see `rswap ps`",
        )
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.code(), [(header::CONTENT_TYPE, PROBLEM_JSON)], Json(self)).into_response()
    }
}

/// The read-only routes over `board`.
pub fn router(board: Board) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/instances", get(instances))
        .route("/v1/profiles", get(profiles))
        .route("/v1/pools", get(pools))
        .route("/v1/inventory", get(inventory))
        .route("/v1/plan", get(plan))
        .route("/v1/migrations", get(migrations))
        .route("/v1/moves", get(moves))
        .route("/v1/decisions", get(decisions))
        .route("/v1/explain", get(explain))
        .route("/v1/windows", get(windows))
        .route("/v1/distributions", get(distributions))
        .route("/metrics", get(metrics_text))
        .fallback(|| async {
            ApiError::new(
                StatusCode::NOT_FOUND,
                "there is no such route",
                "the routes are listed in docs/api.md",
            )
        })
        .merge(rswap_dashboard::routes(rswap_dashboard::Of::Agent))
        .with_state(board)
}

async fn status(State(board): State<Board>) -> Response {
    let now = UnixMillis::now();
    let board = board.read();
    let running = |m: &&super::MigrationView| matches!(m.state, MigrationState::Running { .. });
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "host": board.host,
        "mode": board.mode,
        "pid": std::process::id(),
        "at": now,
        "started": board.started,
        "uptime_ms": now.since(board.started),
        "windows": board.windows,
        "last_window_work_us": board.last_window_work_us,
        "instances": board.instances.len(),
        "migrations_running": board.migrations.iter().filter(running).count(),
        "migrations_done": board.migrations_done,
        "migrations_failed": board.migrations_failed,
        "moves_running": board.moves.running(),
        "moves_started": board.moves.started(),
        "swaps_done": board.swaps_done,
        "swaps_failed": board.swaps_failed,
        "links": board.links,
        "probes": board.probes,
        "programs": board.programs,
        "cgroups": board.cgroups,
        "without_slot": board.shared,
        "profile_cost": board.profile_cost,
        "memory_ages": board.memory_ages,
        "block": board.block,
    }))
    .into_response()
}

async fn instances(State(board): State<Board>) -> Response {
    let board = board.read();
    let shown = board.instances.values().map(|view| {
        let mut shown = json!(view.instance);
        if let Some(peer) = &view.in_doubt {
            shown["in_doubt"] = json!(peer);
        }
        shown
    });
    Json(shown.collect::<Vec<_>>()).into_response()
}

#[derive(Deserialize)]
struct OneOrAll {
    instance: Option<InstanceName>,
}

async fn profiles(
    State(board): State<Board>,
    query: Result<Query<OneOrAll>, QueryRejection>,
) -> Result<Json<Vec<InstanceView>>, ApiError> {
    let one = query
        .map(|Query(asked)| asked.instance)
        .map_err(|rejection| unreadable(&rejection, "/v1/profiles"))?;
    let board = board.read();
    match one {
        None => Ok(Json(board.instances.values().cloned().collect())),
        Some(name) => Ok(Json(board.instances.get(&name).cloned().into_iter().collect())),
    }
}

/// What an instance's times were over the last window, minute and hour.
async fn distributions(
    State(board): State<Board>,
    query: Result<Query<OneOrAll>, QueryRejection>,
) -> Result<Response, ApiError> {
    let one = query
        .map(|Query(asked)| asked.instance)
        .map_err(|rejection| unreadable(&rejection, "/v1/distributions"))?;
    let wanted = |name: &InstanceName| one.as_ref().is_none_or(|one| one == name);
    // Copied, and added up afterwards: the board is waited for.
    let kept: Vec<_> = {
        let board = board.read();
        let kept = board.distributions.iter().filter(|(name, _)| wanted(name));
        kept.map(|(name, of)| (name.clone(), of.clone())).collect()
    };
    let shown = kept
        .iter()
        .map(|(name, of)| json!({ "name": name, "distributions": of.shown().collect::<Vec<_>>() }));
    Ok(Json(shown.collect::<Vec<_>>()).into_response())
}

async fn pools(State(board): State<Board>) -> Json<Vec<Pool>> {
    Json(board.read().pools.clone())
}

async fn inventory(State(board): State<Board>) -> Response {
    let inventory = board.read().inventory.clone();
    Json(&*inventory).into_response()
}

async fn plan(State(board): State<Board>) -> Response {
    Json(&board.read().plan).into_response()
}

async fn migrations(State(board): State<Board>) -> Response {
    Json(&board.read().migrations).into_response()
}

async fn moves(State(board): State<Board>) -> Response {
    Json(board.read().moves.iter().collect::<Vec<_>>()).into_response()
}

#[derive(Deserialize)]
struct Of {
    instance: InstanceName,
    #[serde(default)]
    since: UnixMillis,
}

fn unreadable(rejection: &QueryRejection, route: &str) -> ApiError {
    ApiError::new(
        StatusCode::BAD_REQUEST,
        format!("cannot read the query: {}", rejection.body_text()),
        format!("ask for {route}?instance=NAME"),
    )
}

/// What the query asks for.
fn asked(query: Result<Query<Of>, QueryRejection>, route: &str) -> Result<Of, ApiError> {
    query.map(|Query(of)| of).map_err(|rejection| unreadable(&rejection, route))
}

async fn decisions(
    State(board): State<Board>,
    query: Result<Query<Of>, QueryRejection>,
) -> Result<Json<Vec<Decision>>, ApiError> {
    let Of { instance, .. } = asked(query, "/v1/decisions")?;
    let board = board.read();
    match board.decisions.get(&instance) {
        Some(kept) => Ok(Json(kept.iter().cloned().collect())),
        None if board.instances.contains_key(&instance) => Ok(Json(Vec::new())),
        None => Err(ApiError::no_instance(instance.as_str())),
    }
}

/// A decision, with what stands in `rswap explain` next to its numbers; `dropped` says of pools why they are out of the question.
fn explained(decision: &Decision) -> serde_json::Value {
    let pools = decision.current.iter().chain(&decision.candidates);
    let dropped = pools.filter_map(|pool| Some((pool.pool.as_str(), pool.dropped.as_ref()?.to_string())));
    json!({ "words": in_words(decision), "dropped": dropped.collect::<BTreeMap<_, _>>(), "decision": decision })
}

async fn explain(
    State(board): State<Board>,
    query: Result<Query<Of>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Of { instance, .. } = asked(query, "/v1/explain")?;
    let board = board.read();
    let moved: Vec<&MoveView> = board.moves.iter().filter(|view| view.what.instance == instance).collect();
    if moved.is_empty() && !board.instances.contains_key(&instance) {
        return Err(ApiError::no_instance(instance.as_str()));
    }
    let now = board.plan.decisions.iter().filter(|decision| decision.instance == instance);
    let moved = moved.into_iter().rev().take(MOVES_EXPLAINED).map(|view| {
        let mut shown = view.decision.as_ref().map_or_else(|| json!({}), explained);
        shown["move"] = json!(view);
        shown
    });
    Ok(Json(json!({ "now": now.map(explained).collect::<Vec<_>>(), "moved": moved.collect::<Vec<_>>() }))
        .into_response())
}

async fn windows(
    State(board): State<Board>,
    query: Result<Query<Of>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Of { instance, since } = asked(query, "/v1/windows")?;
    let board = board.read();
    if !board.instances.contains_key(&instance) {
        return Err(ApiError::no_instance(instance.as_str()));
    }
    let series = board.series.get(&instance);
    Ok(Json(json!({
        "instance": instance,
        "horizon_ms": series.and_then(super::Series::horizon_ms),
        "windows": series.map(|series| series.windows(since).collect::<Vec<_>>()).unwrap_or_default(),
    }))
    .into_response())
}

async fn metrics_text(
    State(board): State<Board>,
) -> Result<([(HeaderName, &'static str); 1], String), ApiError> {
    let text = metrics::encode(&board.read(), UnixMillis::now()).map_err(|error| {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("cannot encode the metrics: {error}"),
            "try again",
        )
    })?;
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}
