//! The controller's HTTP.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{
        ConnectInfo, DefaultBodyLimit, Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    http::{StatusCode, header},
    middleware,
    response::IntoResponse,
};
use rswap_fleet::{
    HostName,
    report::{self, Answer, Envelope, Limits, ReportError},
};
use rswap_forecast::{Lessons, Part};
use rswap_http::{ApiError, openapi};
use rswap_plan::Plan;
use rswap_store::StoreError;
use rswap_types::{InstanceName, UnixMillis};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::{IntoParams, OpenApi, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Peer, Who, gate, metrics, roll_routes,
    roll_routes::unwilling,
    server::Controller,
    taught::{self, Told},
    told,
    views::{Amounts, HostView, InstanceView, KnownPart, Orders, Row, Status},
    writer::{Handed, Writer, chain},
};

/// Parts of what others taught in one answer.
const PARTS_TOLD: usize = 16;

#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) controller: Arc<Controller>,
    writer: Writer,
}

/// The store has failed.
pub(crate) fn store_failed(error: &StoreError) -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, chain(error), "see the controller's log")
}

/// A controller's HTTP.
#[derive(OpenApi)]
#[openapi(info(
    title = "rswap controller",
    description = "What a fleet's controller tells, and is told: at its unix socket `fleet.socket` by root and its own user, at \
                   `fleet.listen` over TLS with certificates at both ends, by operators, and by agents, which may report and nothing else. \
                   Times are milliseconds since the Unix epoch, other units are in the names or with them. Members are added, not renamed \
                   or removed: whoever reads an answer leaves out what it does not know. docs/api.md says more."
))]
struct Api;

/// The routes by who may call them: to look, to say what is wanted, to report.
fn described() -> [OpenApiRouter<Shared>; 3] {
    let looks = OpenApiRouter::with_openapi(Api::openapi())
        .routes(routes!(status))
        .routes(routes!(hosts))
        .routes(routes!(instances))
        .routes(routes!(plan))
        .routes(routes!(orders))
        .routes(routes!(model))
        .routes(routes!(history))
        .routes(routes!(roll_routes::show))
        .routes(routes!(openmetrics))
        .routes(routes!(openapi::document))
        .merge(rswap_dashboard::routes(rswap_dashboard::Of::Controller));
    let operates = OpenApiRouter::new()
        .routes(routes!(drain))
        .routes(routes!(forget))
        .routes(routes!(roll_routes::begin))
        .routes(routes!(roll_routes::decide))
        .routes(routes!(roll_routes::end));
    [looks, operates, OpenApiRouter::new().routes(routes!(take_report))]
}

/// All routes as an OpenAPI document.
pub fn document() -> serde_json::Value {
    let [looks, operates, reports] = described();
    openapi::finished(looks.merge(operates).merge(reports).get_openapi())
}

/// The routes; reports go to `writer`.
pub(crate) fn router(controller: Arc<Controller>, writer: Writer) -> Router {
    let [looks, operates, reports] = described();
    let operating = middleware::from_fn_with_state(controller.clone(), gate::operate);
    let looks = looks.route_layer(middleware::from_fn(gate::look));
    let all = looks
        .merge(operates.route_layer(operating))
        .merge(reports.route_layer(middleware::from_fn(gate::report)));
    let (router, api) = all.split_for_parts();
    router
        .layer(Extension(openapi::Document::new(&openapi::finished(&api))))
        .layer(DefaultBodyLimit::max(controller.settings.limits.body_bytes))
        .fallback(|| async {
            let hint = "the routes are listed in docs/api.md, and in /v1/openapi.json";
            ApiError::new(StatusCode::NOT_FOUND, "there is no such route", hint)
        })
        .with_state(Shared { controller, writer })
}

/// Take an agent's reports
///
/// When it is answered, all of them are on the disk.
#[utoipa::path(
    post,
    path = "/v1/report",
    request_body = Envelope,
    responses(
        (status = 200, description = "They are stored; what others have taught, and what to do", body = Answer),
        (status = 409, description = "They are of another version: kept until there is a controller of that one", body = ApiError, content_type = "application/problem+json"),
        (status = 422, description = "They can never be taken, or have more than `fleet.limits` allows", body = ApiError, content_type = "application/problem+json"),
        (status = 429, description = "The host reports too often: `Retry-After` says when it can be taken, in seconds", body = ApiError, content_type = "application/problem+json", headers(("Retry-After" = u64, description = "In seconds from now"))),
        (status = 503, description = "The controller is ending: send it again", body = ApiError, content_type = "application/problem+json")
    )
)]
async fn take_report(
    State(Shared { controller, writer }): State<Shared>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Told>, ApiError> {
    let limits = &controller.settings.limits;
    let body = body.map_err(|rejection| unread(&rejection, limits))?;
    // Before anything is made of it. Of who comes by the socket it is known by what it says, below.
    if let Who::Agent(host) = &peer.who {
        in_time(&controller, host)?;
    }
    let same = "use an agent and a controller of the same version";
    // What can't be taken now can't be taken later: the agent sets it aside.
    let never = |error: String| ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, error, same);
    // But for this: a controller of that version can take it, and the agent keeps it until there is one.
    let other_version = |error: String| ApiError::new(StatusCode::CONFLICT, error, same);
    let envelope: Envelope = serde_json::from_slice(&body).map_err(|error| match foreign_version(&body) {
        Some(version) => other_version(ReportError::Version(version).to_string()),
        None => never(format!("the report can't be read: {error}")),
    })?;
    drop(body);
    let host = check(&envelope, &peer, limits).map_err(|error| match error {
        ReportError::Many(..) => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string(), BOUNDS),
        ReportError::Version(_) => other_version(error.to_string()),
        ReportError::Foreign(..) => {
            tracing::warn!(from = peer.from, %error, "a report was refused");
            controller.with_state(|state| state.counts.reports_foreign += 1);
            let hint =
                "an agent reports for the host that its certificate names: agent.host must be the same";
            ApiError::new(StatusCode::FORBIDDEN, error.to_string(), hint)
        }
        error => never(error.to_string()),
    })?;
    if peer.who == Who::Own {
        in_time(&controller, &host)?;
    }
    let Envelope { reports, lessons, knows, leads } = envelope;
    controller.with_rates(|rates| rates.brought(&host, reports.len(), Instant::now()));
    let last = reports.last().map_or(0, |report| report.sequence);
    let (stored, answer) = oneshot::channel();
    let gone = || ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the controller is ending", "send it again");
    let handed = Handed { reports, lessons, host: host.clone(), stored };
    writer.send(handed).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?.map_err(|error| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error, "see the controller's log; send it again")
    })?;
    let acts = controller.settings.acts;
    let (lessons, knows, orders) = controller.with_state(|state| {
        let (lessons, knows) = state.model.for_host(&host, (leads.0, &leads.1), knows, PARTS_TOLD);
        (lessons, knows, if acts { state.book.of(&host) } else { Vec::new() })
    });
    let words = |(part, lessons): (Part, Arc<Lessons>)| {
        let words = taught::words(&controller, &part, lessons)?;
        Ok((part, words))
    };
    let lessons =
        lessons.into_iter().map(words).collect::<Result<_, _>>().map_err(|error: serde_json::Error| {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string(), "see the controller's log")
        })?;
    Ok(Json(Told { stored: last, lessons, knows, orders, places: acts }))
}

/// Whether this member may report again already.
fn in_time(controller: &Controller, host: &HostName) -> Result<(), ApiError> {
    let wait = controller.with_rates(|rates| rates.take(host, Instant::now()));
    let Err(wait) = wait else { return Ok(()) };
    controller.with_state(|state| state.counts.reports_hasty += 1);
    let per_s = controller.settings.limits.reports_per_s;
    let error =
        format!("host {host} reports more often than {per_s} times a second (fleet.limits.reports_per_s)");
    let seconds = wait.as_secs_f64().ceil().max(1.0) as u64;
    Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, error, BOUNDS).after(seconds))
}

const BOUNDS: &str = "what a controller takes of a host is bounded by its configuration: [fleet.limits]";

/// Why a body could not be read.
fn unread(rejection: &BytesRejection, limits: &Limits) -> ApiError {
    let status = rejection.status();
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        let error = format!("the body has more than {} bytes (fleet.limits.body_mib)", limits.body_bytes);
        return ApiError::new(status, error, BOUNDS);
    }
    let error = format!("cannot read the request's body: {}", rejection.body_text());
    ApiError::new(status, error, "send it again")
}

/// What every version's envelope has.
#[derive(Deserialize)]
struct Versions {
    reports: Vec<Versioned>,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// The version of a report that is not of this one.
fn foreign_version(body: &[u8]) -> Option<u32> {
    let Versions { reports } = serde_json::from_slice::<Versions>(body).ok()?;
    reports.into_iter().map(|report| report.version).find(|version| *version != report::VERSION)
}

/// Whose envelope it is, if it is one.
fn check(envelope: &Envelope, peer: &Peer, limits: &Limits) -> Result<HostName, ReportError> {
    let first = envelope.reports.first().ok_or(ReportError::Number("first report"))?;
    for (count, what, most) in [
        (envelope.lessons.len(), "lessons", limits.lessons),
        (envelope.reports.len(), "predecessors", report::MOST_REPORTS),
    ] {
        if count > most {
            return Err(ReportError::Many(count, what, most));
        }
    }
    let mut before = 0;
    for report in &envelope.reports {
        report.check(limits)?;
        if report.host != first.host || report.epoch != first.epoch || report.sequence <= before {
            return Err(ReportError::Number("order"));
        }
        before = report.sequence;
    }
    match peer.may_report(&first.host) {
        true => Ok(first.host.clone()),
        false => Err(ReportError::Foreign(first.host.clone(), peer.who.to_string())),
    }
}

/// How the controller is
#[utoipa::path(get, path = "/v1/status", responses((status = 200, description = "How it is", body = Status)))]
async fn status(State(Shared { controller, .. }): State<Shared>) -> Json<Status> {
    let now = UnixMillis::now();
    Json(controller.with_state(|state| Status::of(&controller, state, now)))
}

/// The hosts of the fleet
#[utoipa::path(get, path = "/v1/hosts", responses((status = 200, description = "All, by name", body = [HostView])))]
async fn hosts(State(Shared { controller, .. }): State<Shared>) -> Result<Json<Vec<HostView>>, ApiError> {
    let all = HostView::all(&controller, UnixMillis::now());
    all.map(Json).map_err(|error| store_failed(&error))
}

/// What runs in the fleet
#[utoipa::path(get, path = "/v1/instances", responses((status = 200, description = "All, by name", body = [InstanceView])))]
async fn instances(State(Shared { controller, .. }): State<Shared>) -> impl IntoResponse {
    let mut last: Option<InstanceName> = None;
    told::list(b"[".to_vec(), "]", move || {
        let part: Vec<InstanceView> = controller.with_state(|state| {
            let part = state.inventory.instances_after(last.as_ref()).take(told::AT_ONCE);
            part.map(|(name, placed)| InstanceView::of(name, placed, state)).collect()
        });
        if let Some(view) = part.last() {
            last = Some(view.instance.clone());
        }
        part
    })
}

/// The last plan of the fleet; its pools are hosts
///
/// Of an instance that stays, the present host and the best other one are in it, and how many others were compared.
#[utoipa::path(get, path = "/v1/plan", responses((status = 200, description = "The plan", body = Plan)))]
async fn plan(State(Shared { controller, .. }): State<Shared>) -> impl IntoResponse {
    told::plan(controller.with_state(|state| state.plan.clone()))
}

/// Orders that wait for an outcome, and the last ones that have one
#[utoipa::path(get, path = "/v1/orders", responses((status = 200, description = "The orders", body = Orders)))]
async fn orders(State(Shared { controller, .. }): State<Shared>) -> Json<Orders> {
    Json(controller.with_state(|state| Orders {
        waiting: state.book.waiting().cloned().collect(),
        ended: state.outcomes.iter().cloned().collect(),
    }))
}

/// Of how many hosts and series something is known
#[utoipa::path(get, path = "/v1/model", responses((status = 200, description = "Per part", body = [KnownPart])))]
async fn model(State(Shared { controller, .. }): State<Shared>) -> Json<Vec<KnownPart>> {
    Json(controller.with_state(|state| {
        let known = state.model.known();
        known.map(|(part, hosts, series)| KnownPart { part: part.clone(), hosts, series }).collect()
    }))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct HistoryOf {
    /// Which.
    instance: InstanceName,
    /// Only what ended then or later, in milliseconds since the Unix epoch.
    #[serde(default)]
    from: u64,
    /// Only what ended before, in milliseconds since the Unix epoch.
    to: Option<u64>,
    /// How fine: 0 is a row per report, 1 per minute, 2 per hour.
    #[serde(default)]
    tier: usize,
}

/// What an instance used, on all hosts that it was on
#[utoipa::path(
    get,
    path = "/v1/history",
    params(HistoryOf),
    responses(
        (status = 200, description = "Oldest first", body = [Row]),
        (status = 404, description = "There is no such instance in the fleet", body = ApiError, content_type = "application/problem+json")
    )
)]
async fn history(
    State(Shared { controller, .. }): State<Shared>,
    query: Result<Query<HistoryOf>, QueryRejection>,
) -> Result<Json<Vec<Row>>, ApiError> {
    let Query(HistoryOf { instance, from, to, tier }) = query.map_err(|rejection| {
        let error = format!("cannot read the query: {}", rejection.body_text());
        ApiError::new(
            StatusCode::BAD_REQUEST,
            error,
            "ask for /v1/history?instance=NAME&from=MS&to=MS&tier=0",
        )
    })?;
    let owner = controller.stores.ownership.owner(&instance).map_err(|error| store_failed(&error))?;
    let owner = owner.ok_or_else(|| {
        let error = format!("there is no instance {instance} in the fleet");
        ApiError::new(StatusCode::NOT_FOUND, error, "see /v1/instances")
    })?;
    let mut on: Vec<_> = owner.before.clone();
    on.push((owner.host, owner.local));
    on.sort();
    on.dedup();
    let mut rows = Vec::new();
    for (host, local) in on {
        let to = UnixMillis(to.unwrap_or(u64::MAX));
        let query =
            rswap_store::Query { host: host.clone(), instance: local, from: UnixMillis(from), to, tier };
        let found = controller.stores.history.read(&query).map_err(|error| match error {
            StoreError::Tier(..) => {
                ApiError::new(StatusCode::BAD_REQUEST, error.to_string(), "the finest is tier 0")
            }
            error => store_failed(&error),
        })?;
        rows.extend(found.into_iter().map(|(at, used)| (at, host.clone(), used)));
    }
    rows.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let row = |(at, host, used): (_, _, BTreeMap<_, _>)| Row {
        at,
        host,
        used: used.iter().map(|(resource, sum)| (*resource, Amounts::of(*resource, sum))).collect(),
    };
    Ok(Json(rows.into_iter().map(row).collect()))
}

/// Whether a host is to be left.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct DrainRequest {
    /// Which.
    host: HostName,
    /// Let it be used again.
    #[serde(default)]
    undo: bool,
}

/// What is wanted of a host from now on.
#[derive(Serialize, ToSchema)]
struct DrainDone {
    /// Which.
    host: HostName,
    /// Whether it is to be left.
    draining: bool,
    /// Whether the controller gives orders, or only plans.
    acts: bool,
}

/// Empty a host, or let it be used again
#[utoipa::path(
    post,
    path = "/v1/drain",
    request_body = DrainRequest,
    responses(
        (status = 200, description = "It is stored, and will be done", body = DrainDone),
        (status = 404, description = "There is no such host in the fleet", body = ApiError, content_type = "application/problem+json"),
        (status = 409, description = "The host is in a roll", body = ApiError, content_type = "application/problem+json")
    )
)]
async fn drain(
    State(Shared { controller, .. }): State<Shared>,
    body: Bytes,
) -> Result<Json<DrainDone>, ApiError> {
    let DrainRequest { host, undo } = read(&body, "send {\"host\": NAME, \"undo\": false}")?;
    let drained = controller.drain_host(&host, undo).map_err(|error| unwilling(&error))?;
    drained.ok_or_else(|| no_host(&host))?;
    Ok(Json(DrainDone { host, draining: !undo, acts: controller.settings.acts }))
}

/// A host that has left the fleet.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ForgetRequest {
    /// Which.
    host: HostName,
    /// What ran there when it last reported is lost.
    #[serde(default)]
    lost: bool,
}

/// A host that is not listed any more.
#[derive(Serialize, ToSchema)]
struct ForgetDone {
    /// Which.
    host: HostName,
    /// What ran there when it last reported, by the names in the fleet.
    instances: Vec<InstanceName>,
}

/// Forget a host that does not report any more
///
/// What it has taught and its history stay. If its agent reports once more, it is a new member.
#[utoipa::path(
    post,
    path = "/v1/forget",
    request_body = ForgetRequest,
    responses(
        (status = 200, description = "It is not in the fleet any more", body = ForgetDone),
        (status = 404, description = "There is no such host in the fleet", body = ApiError, content_type = "application/problem+json"),
        (status = 409, description = "The host reports, is in a roll, or had instances that nobody says to be lost", body = ApiError, content_type = "application/problem+json")
    )
)]
async fn forget(
    State(Shared { controller, .. }): State<Shared>,
    body: Bytes,
) -> Result<Json<ForgetDone>, ApiError> {
    let ForgetRequest { host, lost } = read(&body, "send {\"host\": NAME, \"lost\": false}")?;
    let forgotten =
        controller.forget_host(&host, lost, UnixMillis::now()).map_err(|error| unwilling(&error))?;
    let instances = forgotten.ok_or_else(|| no_host(&host))?;
    Ok(Json(ForgetDone { host, instances }))
}

fn no_host(host: &HostName) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no host {host} in the fleet"), "see /v1/hosts")
}

/// The body of a wish.
pub(crate) fn read<T: serde::de::DeserializeOwned>(body: &Bytes, hint: &'static str) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        ApiError::new(StatusCode::BAD_REQUEST, format!("cannot read the request: {error}"), hint)
    })
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
async fn openmetrics(State(Shared { controller, .. }): State<Shared>) -> Result<impl IntoResponse, ApiError> {
    let now = UnixMillis::now();
    let seen = controller.with_state(|state| metrics::Seen::of(&controller, state, now));
    let text = metrics::encode(&controller, &seen, now);
    let text = text.map_err(|error| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string(), "see the controller's log")
    })?;
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}
