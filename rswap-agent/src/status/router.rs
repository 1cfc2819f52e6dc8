//! The read-only routes.

use axum::{
    Extension, Json, Router,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
pub use rswap_http::ApiError;
use rswap_http::openapi;
use serde::Deserialize;
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Board, InstanceView, MigrationView, MoveView, metrics,
    views::{DistributionsOf, Explained, Explanation, MovedView, Shown, Status, Windows},
};
use crate::{
    instance::InstanceName,
    plan::{Decision, Plan},
    pool::{Inventory, Pool},
    units::UnixMillis,
};

/// Of an instance's moves, the newest are explained.
const MOVES_EXPLAINED: usize = 10;

/// There is no such instance.
pub(crate) fn no_instance(name: &str) -> ApiError {
    let error = format!("there is no instance {name:?} on this host");
    ApiError::new(StatusCode::NOT_FOUND, error, "see `rswap ps`")
}

/// An agent's HTTP.
#[derive(OpenApi)]
#[openapi(info(
    title = "rswap agent",
    description = "What one host's agent tells, and is told. `agent.status_address` (loopback TCP) has what can be read; what changes \
                   something is on the unix socket `agent.control_socket` only. Times are milliseconds since the Unix epoch, other units \
                   are in the names or with them. Members are added, not renamed or removed: whoever reads an answer leaves out what it \
                   does not know. docs/api.md says more."
))]
struct Api;

/// The read-only routes, described.
pub(crate) fn described() -> OpenApiRouter<Board> {
    OpenApiRouter::with_openapi(Api::openapi())
        .routes(routes!(status))
        .routes(routes!(instances))
        .routes(routes!(profiles))
        .routes(routes!(pools))
        .routes(routes!(inventory))
        .routes(routes!(plan))
        .routes(routes!(migrations))
        .routes(routes!(moves))
        .routes(routes!(decisions))
        .routes(routes!(explain))
        .routes(routes!(windows))
        .routes(routes!(distributions))
        .routes(routes!(metrics_text))
        .routes(routes!(openapi::document))
        .merge(rswap_dashboard::routes(rswap_dashboard::Of::Agent))
}

/// The read-only routes over `board`.
pub fn router(board: Board) -> Router {
    let (router, api) = described().split_for_parts();
    let document = openapi::Document::new(&openapi::finished(&api));
    answering(router, board).layer(Extension(document))
}

/// The routes over `board`, and an answer to whoever asks for another one.
pub(crate) fn answering(router: Router<Board>, board: Board) -> Router {
    let fallback = || async {
        let hint = "the routes are listed in docs/api.md, and in /v1/openapi.json";
        ApiError::new(StatusCode::NOT_FOUND, "there is no such route", hint)
    };
    router.fallback(fallback).with_state(board)
}

/// How the agent is, and what it has done since its start
#[utoipa::path(get, path = "/v1/status", responses((status = 200, description = "How it is", body = Status)))]
async fn status(State(board): State<Board>) -> Json<Status> {
    Json(Status::of(&board.read(), UnixMillis::now()))
}

/// The instances of this host
#[utoipa::path(get, path = "/v1/instances", responses((status = 200, description = "All, by name", body = [Shown])))]
async fn instances(State(board): State<Board>) -> Json<Vec<Shown>> {
    Json(board.read().instances.values().map(Shown::of).collect())
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct OneOrAll {
    /// Only this one.
    instance: Option<InstanceName>,
}

/// The instances, with what was last measured and forecast of each
#[utoipa::path(
    get,
    path = "/v1/profiles",
    params(OneOrAll),
    responses((status = 200, description = "All, by name, or the one that is asked for, or none", body = [InstanceView]))
)]
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

/// What instances' times were over the last window, minute and hour, as histograms, and what was counted
///
/// Histograms without a sample within the hour are left out.
#[utoipa::path(
    get,
    path = "/v1/distributions",
    params(OneOrAll),
    responses((status = 200, description = "All, by name, or the one that is asked for, or none", body = [DistributionsOf]))
)]
async fn distributions(
    State(board): State<Board>,
    query: Result<Query<OneOrAll>, QueryRejection>,
) -> Result<Json<Vec<DistributionsOf>>, ApiError> {
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
    let shown = kept.into_iter().map(|(name, of)| {
        let (distributions, counts) = (of.shown().collect(), of.counts());
        DistributionsOf { name, distributions, counts }
    });
    Ok(Json(shown.collect()))
}

/// The pools, as plans see them
#[utoipa::path(get, path = "/v1/pools", responses((status = 200, description = "This host's, and other hosts", body = [Pool])))]
async fn pools(State(board): State<Board>) -> Json<Vec<Pool>> {
    Json(board.read().pools.clone())
}

/// What this host has to sit on, each number with its source
#[utoipa::path(get, path = "/v1/inventory", responses((status = 200, description = "What was last found", body = Inventory)))]
async fn inventory(State(board): State<Board>) -> Response {
    let inventory = board.read().inventory.clone();
    Json(&*inventory).into_response()
}

/// The last plan: a decision per instance and pool kind, with every candidate's numbers
#[utoipa::path(get, path = "/v1/plan", responses((status = 200, description = "The plan", body = Plan)))]
async fn plan(State(board): State<Board>) -> Response {
    Json(&board.read().plan).into_response()
}

/// Migrations away from this host since the agent's start
#[utoipa::path(
    get,
    path = "/v1/migrations",
    responses((status = 200, description = "All running ones, and the last 100 others, oldest first", body = [MigrationView]))
)]
async fn migrations(State(board): State<Board>) -> Response {
    Json(&board.read().migrations).into_response()
}

/// Moves of every kind since the agent's start
#[utoipa::path(
    get,
    path = "/v1/moves",
    responses((status = 200, description = "All running ones, and the last 200 others, oldest first", body = [MoveView]))
)]
async fn moves(State(board): State<Board>) -> Response {
    Json(board.read().moves.iter().collect::<Vec<_>>()).into_response()
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Of {
    /// Which.
    instance: InstanceName,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Since {
    /// Which.
    instance: InstanceName,
    /// Only windows that ended after this; 0 is all that are kept.
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
fn asked<Q>(query: Result<Query<Q>, QueryRejection>, route: &str) -> Result<Q, ApiError> {
    query.map(|Query(of)| of).map_err(|rejection| unreadable(&rejection, route))
}

/// The decisions about an instance
///
/// At most 200. Of many instances, the older ones only where the result changed.
#[utoipa::path(
    get,
    path = "/v1/decisions",
    params(Of),
    responses(
        (status = 200, description = "Oldest first", body = [Decision]),
        (status = 404, description = "There is no such instance", body = ApiError, content_type = "application/problem+json")
    )
)]
async fn decisions(
    State(board): State<Board>,
    query: Result<Query<Of>, QueryRejection>,
) -> Result<Json<Vec<Decision>>, ApiError> {
    let Of { instance } = asked(query, "/v1/decisions")?;
    let board = board.read();
    match board.decisions.get(&instance) {
        Some(kept) => Ok(Json(kept.iter().cloned().collect())),
        None if board.instances.contains_key(&instance) => Ok(Json(Vec::new())),
        None => Err(no_instance(instance.as_str())),
    }
}

/// Why an instance is where it is: what was last decided about it, and its last moves
#[utoipa::path(
    get,
    path = "/v1/explain",
    params(Of),
    responses(
        (status = 200, description = "Decisions in numbers and in words", body = Explanation),
        (status = 404, description = "There is no such instance", body = ApiError, content_type = "application/problem+json")
    )
)]
async fn explain(
    State(board): State<Board>,
    query: Result<Query<Of>, QueryRejection>,
) -> Result<Json<Explanation>, ApiError> {
    let Of { instance } = asked(query, "/v1/explain")?;
    let board = board.read();
    let moved: Vec<&MoveView> = board.moves.iter().filter(|view| view.what.instance == instance).collect();
    if moved.is_empty() && !board.instances.contains_key(&instance) {
        return Err(no_instance(instance.as_str()));
    }
    let now = board.plan.decisions.iter().filter(|decision| decision.instance == instance);
    let moved = moved.into_iter().rev().take(MOVES_EXPLAINED);
    Ok(Json(Explanation {
        now: now.map(|decision| Explained::of(decision)).collect(),
        moved: moved.map(MovedView::of).collect(),
    }))
}

/// An instance's last windows: what it used, what had been forecast, and how long things took
#[utoipa::path(
    get,
    path = "/v1/windows",
    params(Since),
    responses(
        (status = 200, description = "Oldest first", body = Windows),
        (status = 404, description = "There is no such instance", body = ApiError, content_type = "application/problem+json")
    )
)]
async fn windows(
    State(board): State<Board>,
    query: Result<Query<Since>, QueryRejection>,
) -> Result<Json<Windows>, ApiError> {
    let Since { instance, since } = asked(query, "/v1/windows")?;
    let board = board.read();
    if !board.instances.contains_key(&instance) {
        return Err(no_instance(instance.as_str()));
    }
    let series = board.series.get(&instance);
    Ok(Json(Windows {
        horizon_ms: series.and_then(super::Series::horizon_ms),
        windows: series.map(|series| series.windows(since).collect()).unwrap_or_default(),
        instance,
    }))
}

/// Metrics for Prometheus and the like
#[utoipa::path(
    get,
    path = "/metrics",
    responses((
        status = 200,
        description = "OpenMetrics text",
        body = String,
        content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    ))
)]
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
