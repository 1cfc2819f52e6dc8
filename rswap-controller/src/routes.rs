//! The controller's HTTP.

use std::{sync::Arc, time::Instant};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        ConnectInfo, DefaultBodyLimit, Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    http::{StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use problem_details::ProblemDetails;
use rswap_fleet::{
    HostName,
    report::{self, Answer, Envelope, Limits, ReportError},
};
use rswap_store::{Member, StoreError};
use rswap_types::{InstanceName, UnixMillis};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::oneshot;

use crate::{
    Peer, Who, gate,
    link::Hint,
    metrics, roll_routes,
    server::Controller,
    writer::{Handed, Writer, chain},
};

/// Parts of what others taught in one answer.
const PARTS_TOLD: usize = 16;

#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) controller: Arc<Controller>,
    writer: Writer,
}

/// How every error is answered, as by an agent.
pub(crate) struct Refusal {
    status: StatusCode,
    error: String,
    hint: &'static str,
    /// When it can be tried again, in seconds from now.
    retry_after_s: Option<u64>,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let details = ProblemDetails::from_status_code(self.status).with_detail(self.error);
        let details = details.with_extensions(Hint { hint: self.hint.into() });
        let kind = [(header::CONTENT_TYPE, "application/problem+json")];
        let mut response = (self.status, kind, Json(details)).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, error: impl Into<String>, hint: &'static str) -> Self {
        Self { status, error: error.into(), hint, retry_after_s: None }
    }

    /// For people.
    pub(crate) fn error(&self) -> &str {
        &self.error
    }

    pub(crate) fn store(error: &StoreError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, chain(error), "see the controller's log")
    }
}

/// The routes; reports go to `writer`.
pub(crate) fn router(controller: Arc<Controller>, writer: Writer) -> Router {
    let looks = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/hosts", get(hosts))
        .route("/v1/instances", get(instances))
        .route("/v1/plan", get(plan))
        .route("/v1/orders", get(orders))
        .route("/v1/model", get(model))
        .route("/v1/history", get(history))
        .route("/v1/roll", get(roll_routes::show))
        .route("/metrics", get(openmetrics))
        .merge(rswap_dashboard::routes(rswap_dashboard::Of::Controller))
        .route_layer(middleware::from_fn(gate::look));
    let operates = Router::new()
        .route("/v1/drain", post(drain))
        .route("/v1/roll", post(roll_routes::begin))
        .route("/v1/roll/decide", post(roll_routes::decide))
        .route("/v1/roll/end", post(roll_routes::end))
        .route_layer(middleware::from_fn_with_state(controller.clone(), gate::operate));
    let reports =
        Router::new().route("/v1/report", post(take_report)).route_layer(middleware::from_fn(gate::report));
    looks
        .merge(operates)
        .merge(reports)
        .layer(DefaultBodyLimit::max(controller.settings.limits.body_bytes))
        .fallback(|| async {
            Refusal::new(
                StatusCode::NOT_FOUND,
                "there is no such route",
                "the routes are listed in docs/api.md",
            )
        })
        .with_state(Shared { controller, writer })
}

async fn take_report(
    State(Shared { controller, writer }): State<Shared>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Answer>, Refusal> {
    let limits = &controller.settings.limits;
    let body = body.map_err(|rejection| unread(&rejection, limits))?;
    // Before anything is made of it. Of who comes by the socket it is known by what it says, below.
    if let Who::Agent(host) = &peer.who {
        in_time(&controller, host)?;
    }
    let same = "use an agent and a controller of the same version";
    // What can't be taken now can't be taken later: the agent sets it aside.
    let never = |error: String| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, error, same);
    // But for this: a controller of that version can take it, and the agent keeps it until there is one.
    let other_version = |error: String| Refusal::new(StatusCode::CONFLICT, error, same);
    let envelope: Envelope = serde_json::from_slice(&body).map_err(|error| match foreign_version(&body) {
        Some(version) => other_version(ReportError::Version(version).to_string()),
        None => never(format!("the report can't be read: {error}")),
    })?;
    drop(body);
    let host = check(&envelope, &peer, limits).map_err(|error| match error {
        ReportError::Many(..) => Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string(), BOUNDS),
        ReportError::Version(_) => other_version(error.to_string()),
        ReportError::Foreign(..) => {
            tracing::warn!(from = peer.from, %error, "a report was refused");
            controller.with_state(|state| state.counts.reports_foreign += 1);
            let hint =
                "an agent reports for the host that its certificate names: agent.host must be the same";
            Refusal::new(StatusCode::FORBIDDEN, error.to_string(), hint)
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
    let gone = || Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the controller is ending", "send it again");
    let handed = Handed { reports, lessons, host: host.clone(), stored };
    writer.send(handed).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?.map_err(|error| {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error, "see the controller's log; send it again")
    })?;
    Ok(Json(controller.with_state(|state| {
        let (lessons, knows) = state.model.for_host(&host, (leads.0, &leads.1), knows, PARTS_TOLD);
        let orders = if controller.settings.acts { state.book.of(&host) } else { Vec::new() };
        Answer { stored: last, lessons, knows, orders, places: controller.settings.acts }
    })))
}

/// Whether this member may report again already.
fn in_time(controller: &Controller, host: &HostName) -> Result<(), Refusal> {
    let wait = controller.with_rates(|rates| rates.take(host, Instant::now()));
    let Err(wait) = wait else { return Ok(()) };
    controller.with_state(|state| state.counts.reports_hasty += 1);
    let per_s = controller.settings.limits.reports_per_s;
    let error =
        format!("host {host} reports more often than {per_s} times a second (fleet.limits.reports_per_s)");
    let mut refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, error, BOUNDS);
    refusal.retry_after_s = Some(wait.as_secs_f64().ceil().max(1.0) as u64);
    Err(refusal)
}

const BOUNDS: &str = "what a controller takes of a host is bounded by its configuration: [fleet.limits]";

/// Why a body could not be read.
fn unread(rejection: &BytesRejection, limits: &Limits) -> Refusal {
    let status = rejection.status();
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        let error = format!("the body has more than {} bytes (fleet.limits.body_mib)", limits.body_bytes);
        return Refusal::new(status, error, BOUNDS);
    }
    let error = format!("cannot read the request's body: {}", rejection.body_text());
    Refusal::new(status, error, "send it again")
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

async fn status(State(Shared { controller, .. }): State<Shared>) -> Json<serde_json::Value> {
    let now = UnixMillis::now();
    let interval_ms = controller.settings.interval_ms;
    Json(controller.with_state(|state| {
        let away =
            state.inventory.hosts().keys().filter(|host| state.inventory.is_away(host, interval_ms, now));
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "life": controller.life,
            "mode": if controller.settings.acts { "act" } else { "observe" },
            "at": now,
            "uptime_ms": now.since(controller.started),
            "interval_ms": interval_ms,
            "members": state.members.len(),
            "hosts": state.inventory.hosts().len(),
            "hosts_away": away.count(),
            "instances": state.inventory.instances().count(),
            "unclear": state.inventory.unclear().map(|(host, local, instance)| {
                json!({ "host": host, "local": local, "instance": instance })
            }).collect::<Vec<_>>(),
            "orders_waiting": state.book.waiting().count(),
            "counts": state.counts,
        })
    }))
}

async fn hosts(State(Shared { controller, .. }): State<Shared>) -> Result<Json<serde_json::Value>, Refusal> {
    let now = UnixMillis::now();
    let mut shown = controller.with_state(|state| {
        let host = |(name, member): (&HostName, &Member)| {
            let known = state.inventory.hosts().get(name);
            let value = json!({
                "host": name,
                "joined": member.joined,
                "drained": member.drained,
                "away": state.inventory.is_away(name, controller.settings.interval_ms, now),
                "heard": known.map(|host| host.heard),
                "acts": known.map(|host| host.acts),
                "address": known.and_then(|host| host.address),
                "instances": known.map_or(0, |host| host.instances.len()),
                "running": known.map(|host| &host.running),
                "pools": known.map(|host| &host.pools),
                "whole": known.and_then(|host| host.whole()),
                "links": known.map(|host| &host.links),
            });
            (name.clone(), value)
        };
        state.members.iter().map(host).collect::<Vec<_>>()
    });
    for (name, value) in &mut shown {
        let received = controller.stores.history.received(name).map_err(|error| Refusal::store(&error))?;
        value["reports"] = json!({
            "taken": received.taken, "skipped": received.skipped, "repeated": received.repeated,
        });
    }
    Ok(Json(shown.into_iter().map(|(_, value)| value).collect()))
}

async fn instances(State(Shared { controller, .. }): State<Shared>) -> Json<serde_json::Value> {
    Json(controller.with_state(|state| {
        let instance = |(name, placed)| {
            let report = state.inventory.report(placed);
            json!({
                "instance": name,
                "host": placed.host,
                "local": placed.local,
                "since": state.owners.get(name).map(|owner| owner.since),
                "kin": report.map(|report| &report.kin),
                "labels": report.map(|report| &report.view.labels),
                "cores": report.map(|report| report.view.cores),
                "resident_bytes": report.map(|report| report.view.resident_bytes),
                "demand": report.map(|report| &report.view.demand),
            })
        };
        state.inventory.instances().map(instance).collect()
    }))
}

async fn plan(State(Shared { controller, .. }): State<Shared>) -> Json<serde_json::Value> {
    Json(controller.with_state(|state| json!(state.plan)))
}

async fn orders(State(Shared { controller, .. }): State<Shared>) -> Json<serde_json::Value> {
    Json(controller.with_state(
        |state| json!({ "waiting": state.book.waiting().collect::<Vec<_>>(), "ended": state.outcomes }),
    ))
}

async fn model(State(Shared { controller, .. }): State<Shared>) -> Json<serde_json::Value> {
    Json(controller.with_state(|state| {
        let known = state.model.known();
        known.map(|(part, hosts, series)| json!({ "part": part, "hosts": hosts, "series": series })).collect()
    }))
}

#[derive(Deserialize)]
struct HistoryOf {
    instance: InstanceName,
    #[serde(default)]
    from: u64,
    to: Option<u64>,
    #[serde(default)]
    tier: usize,
}

async fn history(
    State(Shared { controller, .. }): State<Shared>,
    query: Result<Query<HistoryOf>, QueryRejection>,
) -> Result<Json<serde_json::Value>, Refusal> {
    let Query(HistoryOf { instance, from, to, tier }) = query.map_err(|rejection| {
        let error = format!("cannot read the query: {}", rejection.body_text());
        Refusal::new(StatusCode::BAD_REQUEST, error, "ask for /v1/history?instance=NAME&from=MS&to=MS&tier=0")
    })?;
    let owner = controller.stores.ownership.owner(&instance).map_err(|error| Refusal::store(&error))?;
    let owner = owner.ok_or_else(|| {
        let error = format!("there is no instance {instance} in the fleet");
        Refusal::new(StatusCode::NOT_FOUND, error, "see /v1/instances")
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
                Refusal::new(StatusCode::BAD_REQUEST, error.to_string(), "the finest is tier 0")
            }
            error => Refusal::store(&error),
        })?;
        rows.extend(found.into_iter().map(|(at, used)| (at, host.clone(), used)));
    }
    rows.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let rows = rows.into_iter().map(|(at, host, used)| {
        let used = used.iter().map(|(resource, sum)| {
            let value = json!({ "windows": sum.count, "mean": sum.mean(*resource),
                "most": sum.most as f64 / rswap_fleet::amounts::unit(*resource) });
            (resource.name().to_owned(), value)
        });
        json!({ "at": at, "host": host, "used": used.collect::<serde_json::Map<_, _>>() })
    });
    Ok(Json(rows.collect()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DrainRequest {
    host: HostName,
    #[serde(default)]
    undo: bool,
}

async fn drain(
    State(Shared { controller, .. }): State<Shared>,
    body: Bytes,
) -> Result<Json<serde_json::Value>, Refusal> {
    let DrainRequest { host, undo } = read(&body, "send {\"host\": NAME, \"undo\": false}")?;
    let drained = controller.drain_host(&host, undo).map_err(|error| Refusal::unwilling(&error))?;
    drained.ok_or_else(|| {
        Refusal::new(StatusCode::NOT_FOUND, format!("there is no host {host} in the fleet"), "see /v1/hosts")
    })?;
    Ok(Json(json!({ "host": host, "draining": !undo, "acts": controller.settings.acts })))
}

/// The body of a wish.
pub(crate) fn read<T: serde::de::DeserializeOwned>(body: &Bytes, hint: &'static str) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| {
        Refusal::new(StatusCode::BAD_REQUEST, format!("cannot read the request: {error}"), hint)
    })
}

async fn openmetrics(State(Shared { controller, .. }): State<Shared>) -> Result<impl IntoResponse, Refusal> {
    let now = UnixMillis::now();
    let text = controller.with_state(|state| metrics::encode(&controller, state, now));
    let text = text.map_err(|error| {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string(), "see the controller's log")
    })?;
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}
