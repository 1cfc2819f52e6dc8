//! The controller's HTTP for rolls.

use axum::{Json, body::Bytes, extract::State, http::StatusCode};
use rswap_fleet::{HostName, Roll};
use rswap_types::UnixMillis;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    rolling::{Decision, Unwilling},
    routes::{Refusal, Shared, read},
};

/// What a host may take for each of being emptied and coming back, unless it is said.
const LIMIT_MS: u64 = 30 * 60_000;

impl Refusal {
    pub(crate) fn unwilling(error: &Unwilling) -> Self {
        match error {
            Unwilling::Store(error) => Self::store(error),
            error => {
                Self::new(StatusCode::CONFLICT, error.to_string(), "see `rswap fleet status` and /v1/roll")
            }
        }
    }
}

fn view(roll: &Roll) -> Value {
    let host = |(host, stage)| {
        let mut value = json!(stage);
        value["host"] = json!(host);
        value
    };
    let (at_once, limit_ms) = roll.limits();
    json!({
        "hosts": roll.stages().map(host).collect::<Vec<_>>(),
        "at_once": at_once,
        "limit_ms": limit_ms,
        "over": roll.is_over(),
    })
}

pub(crate) async fn show(State(Shared { controller, .. }): State<Shared>) -> Json<Value> {
    Json(controller.with_state(|state| state.roll.as_ref().map_or(Value::Null, view)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Begin {
    hosts: Vec<HostName>,
    #[serde(default = "one")]
    at_once: usize,
    #[serde(default = "limit")]
    limit_ms: u64,
}

fn one() -> usize {
    1
}

fn limit() -> u64 {
    LIMIT_MS
}

pub(crate) async fn begin(
    State(Shared { controller, .. }): State<Shared>,
    body: Bytes,
) -> Result<Json<Value>, Refusal> {
    let hint = "send {\"hosts\": [NAME], \"at_once\": 1, \"limit_ms\": 1800000}";
    let Begin { hosts, at_once, limit_ms } = read(&body, hint)?;
    let begun = controller.begin_roll(hosts, at_once, limit_ms, UnixMillis::now());
    begun.map(|roll| Json(view(&roll))).map_err(|error| Refusal::unwilling(&error))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Decided {
    host: HostName,
    decision: Decision,
}

pub(crate) async fn decide(
    State(Shared { controller, .. }): State<Shared>,
    body: Bytes,
) -> Result<Json<Value>, Refusal> {
    let hint = "send {\"host\": NAME, \"decision\": \"worked_on\"}, \"retry\" or \"skip\"";
    let Decided { host, decision } = read(&body, hint)?;
    let decided = controller.decide_roll(&host, decision, UnixMillis::now());
    decided.map(|roll| Json(view(&roll))).map_err(|error| Refusal::unwilling(&error))
}

pub(crate) async fn end(State(Shared { controller, .. }): State<Shared>) -> Result<Json<Value>, Refusal> {
    controller.end_roll().map(|()| Json(Value::Null)).map_err(|error| Refusal::unwilling(&error))
}
