//! The read-only routes.

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

use super::{Board, InstanceView, MigrationState, metrics};
use crate::{instance::InstanceName, plan::Decision, pool::Pool, units::UnixMillis};

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
        .route("/v1/decisions", get(decisions))
        .route("/metrics", get(metrics_text))
        .fallback(|| async {
            ApiError::new(
                StatusCode::NOT_FOUND,
                "there is no such route",
                "the routes are listed in docs/api.md",
            )
        })
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
        "at": now,
        "uptime_ms": now.since(board.started),
        "windows": board.windows,
        "last_window_work_us": board.last_window_work_us,
        "instances": board.instances.len(),
        "migrations_running": board.migrations.iter().filter(running).count(),
        "migrations_done": board.migrations_done,
        "migrations_failed": board.migrations_failed,
        "swaps_done": board.swaps_done,
        "swaps_failed": board.swaps_failed,
        "links": board.links,
        "probes": board.probes,
        "programs": board.programs,
    }))
    .into_response()
}

async fn instances(State(board): State<Board>) -> Response {
    let board = board.read();
    Json(board.instances.values().map(|view| &view.instance).collect::<Vec<_>>()).into_response()
}

async fn profiles(State(board): State<Board>) -> Json<Vec<InstanceView>> {
    Json(board.read().instances.values().cloned().collect())
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

#[derive(Deserialize)]
struct DecisionsOf {
    instance: InstanceName,
}

async fn decisions(
    State(board): State<Board>,
    query: Result<Query<DecisionsOf>, QueryRejection>,
) -> Result<Json<Vec<Decision>>, ApiError> {
    let Query(DecisionsOf { instance }) = query.map_err(|rejection| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("cannot read the query: {}", rejection.body_text()),
            "ask for /v1/decisions?instance=NAME",
        )
    })?;
    let board = board.read();
    match board.decisions.get(&instance) {
        Some(kept) => Ok(Json(kept.iter().cloned().collect())),
        None if board.instances.contains_key(&instance) => Ok(Json(Vec::new())),
        None => Err(ApiError::no_instance(instance.as_str())),
    }
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
