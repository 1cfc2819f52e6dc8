//! The controller's HTTP for rolls.

use axum::{Json, body::Bytes, extract::State, http::StatusCode};
use rswap_fleet::{HostName, Roll, maintenance::Stage};
use rswap_http::ApiError;
use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    rolling::{Decision, Unwilling},
    routes::{Shared, read, store_failed},
};

/// What a host may take for each of being emptied and coming back, unless it is said.
const LIMIT_MS: u64 = 30 * 60_000;

/// A wish that is not followed.
pub(crate) fn unwilling(error: &Unwilling) -> ApiError {
    match error {
        Unwilling::Store(error) => store_failed(error),
        error => {
            ApiError::new(StatusCode::CONFLICT, error.to_string(), "see `rswap fleet status` and /v1/roll")
        }
    }
}

/// Rolling maintenance: hosts are emptied, worked on and used again, so many at once.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RollView {
    /// In their order.
    hosts: Vec<HostInRoll>,
    /// How many are under way at once.
    at_once: usize,
    /// What a host may take for each of being emptied and coming back, in milliseconds.
    limit_ms: u64,
    /// Whether nothing is left to be done.
    over: bool,
}

/// One host of a roll.
#[derive(Debug, Serialize, ToSchema)]
struct HostInRoll {
    /// Which.
    host: HostName,
    /// Where it is in the roll.
    #[serde(flatten)]
    stage: Stage,
}

fn view(roll: &Roll) -> RollView {
    let (at_once, limit_ms) = roll.limits();
    let hosts = roll.stages().map(|(host, stage)| HostInRoll { host: host.clone(), stage: stage.clone() });
    RollView { hosts: hosts.collect(), at_once, limit_ms, over: roll.is_over() }
}

/// The roll that is under way, or was last
#[utoipa::path(
    get,
    path = "/v1/roll",
    responses((status = 200, description = "The roll; `null` if there is none", body = Option<RollView>))
)]
pub(crate) async fn show(State(Shared { controller, .. }): State<Shared>) -> Json<Option<RollView>> {
    Json(controller.with_state(|state| state.roll.as_ref().map(view)))
}

/// Which hosts are to be worked on.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RollRequest)]
pub(crate) struct Begin {
    /// In the order in which they are to have their turn.
    hosts: Vec<HostName>,
    /// How many at once.
    #[serde(default = "one")]
    at_once: usize,
    /// What a host may take for each of being emptied and coming back, in milliseconds.
    #[serde(default = "limit")]
    limit_ms: u64,
}

fn one() -> usize {
    1
}

fn limit() -> u64 {
    LIMIT_MS
}

/// Begin a roll
#[utoipa::path(
    post,
    path = "/v1/roll",
    request_body = Begin,
    responses(
        (status = 200, description = "The roll, as it begins", body = RollView),
        (status = 409, description = "The roll does not allow it, or there is none", body = ApiError, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn begin(
    State(Shared { controller, .. }): State<Shared>,
    body: Bytes,
) -> Result<Json<RollView>, ApiError> {
    let hint = "send {\"hosts\": [NAME], \"at_once\": 1, \"limit_ms\": 1800000}";
    let Begin { hosts, at_once, limit_ms } = read(&body, hint)?;
    let begun = controller.begin_roll(hosts, at_once, limit_ms, UnixMillis::now());
    begun.map(|roll| Json(view(&roll))).map_err(|error| unwilling(&error))
}

/// A decision about a host of the roll.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RollDecideRequest)]
pub(crate) struct Decided {
    /// About which host.
    host: HostName,
    /// What.
    decision: Decision,
}

/// Decide about a host of the roll
#[utoipa::path(
    post,
    path = "/v1/roll/decide",
    request_body = Decided,
    responses(
        (status = 200, description = "The roll, as it goes on", body = RollView),
        (status = 409, description = "The roll does not allow it, or there is none", body = ApiError, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn decide(
    State(Shared { controller, .. }): State<Shared>,
    body: Bytes,
) -> Result<Json<RollView>, ApiError> {
    let hint = "send {\"host\": NAME, \"decision\": \"worked_on\"}, \"retry\" or \"skip\"";
    let Decided { host, decision } = read(&body, hint)?;
    let decided = controller.decide_roll(&host, decision, UnixMillis::now());
    decided.map(|roll| Json(view(&roll))).map_err(|error| unwilling(&error))
}

/// End the roll: hosts that are drained for it may be used again
#[utoipa::path(
    post,
    path = "/v1/roll/end",
    responses(
        (status = 200, description = "There is no roll any more: `null`", body = Option<RollView>),
        (status = 409, description = "The roll does not allow it, or there is none", body = ApiError, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn end(
    State(Shared { controller, .. }): State<Shared>,
) -> Result<Json<Option<RollView>>, ApiError> {
    controller.end_roll().map(|()| Json(None)).map_err(|error| unwilling(&error))
}
