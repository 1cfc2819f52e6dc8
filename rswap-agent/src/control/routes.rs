//! The mutating routes: each turns its body into a [`Command`] and its answer into JSON.

use std::convert::Infallible;

use axum::{
    Extension, Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State, rejection::JsonRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use rswap_http::openapi;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{mpsc, oneshot};
use utoipa::{IntoResponses, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    AdoptRequest, Command, DrainDone, DrainRequest, LearnDone, MigrateEvent, MigrateRequest, RecoverDone,
    RecoverRequest, RegisterRequest, Reply, SwapDone, SwapRequest, SwapVolumeEvent, SwapVolumeRequest,
};
use crate::{
    forecast::Lessons,
    instance::Instance,
    status::{self, ApiError, Board},
};

const LEARN: &str = "/v1/learn";

type Commands = mpsc::Sender<Command>;

/// Requests are a few names; more is a mistake, or is not to be seen in the audit log.
const BODY_LIMIT_BYTES: usize = rswap_audit::TEXT_BYTES;

/// Lessons are some KiB for each instance that ever ran.
const LESSONS_LIMIT_BYTES: usize = 64 << 20;

/// Progress events that wait for a slow reader; more are dropped by the wiring.
const EVENTS_WAITING: usize = 64;

/// How long the body of `call` may be.
pub(super) fn body_limit(call: &str) -> usize {
    if call == LEARN { LESSONS_LIMIT_BYTES } else { BODY_LIMIT_BYTES }
}

/// The mutating routes, described.
fn described() -> OpenApiRouter<Commands> {
    let wishes = OpenApiRouter::new()
        .routes(routes!(swap))
        .routes(routes!(swap_volume))
        .routes(routes!(migrate))
        .routes(routes!(adopt))
        .routes(routes!(register))
        .routes(routes!(recover))
        .routes(routes!(drain))
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES));
    let lessons =
        OpenApiRouter::new().routes(routes!(learn)).layer(DefaultBodyLimit::max(LESSONS_LIMIT_BYTES));
    wishes.merge(lessons)
}

/// All routes as an OpenAPI document.
pub fn document() -> serde_json::Value {
    finished(status::described().into_openapi(), described().into_openapi())
}

fn finished(mut reading: OpenApi, changing: OpenApi) -> serde_json::Value {
    reading.merge(changing);
    openapi::finished(&reading)
}

/// The read-only routes over `board`, and the mutating ones over `commands`.
pub fn router(board: Board, commands: Commands) -> Router {
    let (reads, reading) = status::described().split_for_parts();
    let (changes, changing) = described().split_for_parts();
    let document = openapi::Document::new(&finished(reading, changing));
    status::answering(reads, board).merge(changes.with_state(commands)).layer(Extension(document))
}

/// Why a wish is not followed, as the document says it.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "what is answered is an ApiError with the status; this describes it")]
enum Refused {
    /// There is no such instance or pool
    #[response(status = 404, content_type = "application/problem+json")]
    NotFound(ApiError),
    /// It can't be done as things are
    #[response(status = 409, content_type = "application/problem+json")]
    Conflict(ApiError),
    /// The body is JSON and says something else
    #[response(status = 422, content_type = "application/problem+json")]
    OtherBody(ApiError),
    /// The agent is stopping
    #[response(status = 503, content_type = "application/problem+json")]
    Stopping(ApiError),
}

type Given<T> = Result<Json<T>, JsonRejection>;

/// Move an instance to a set of cores, a link, memory or swap
#[utoipa::path(
    post,
    path = "/v1/swap",
    request_body = SwapRequest,
    responses((status = 200, description = "It is there", body = SwapDone), Refused)
)]
async fn swap(State(commands): State<Commands>, given: Given<SwapRequest>) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Swap).await
}

/// Take over an existing cgroup as an instance
#[utoipa::path(
    post,
    path = "/v1/adopt",
    request_body = AdoptRequest,
    responses((status = 200, description = "The instance", body = Instance), Refused)
)]
async fn adopt(State(commands): State<Commands>, given: Given<AdoptRequest>) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Adopt).await
}

/// Say that `rswap run` has started an instance
#[utoipa::path(
    post,
    path = "/v1/register",
    request_body = RegisterRequest,
    responses((status = 200, description = "The instance", body = Instance), Refused)
)]
async fn register(
    State(commands): State<Commands>,
    given: Given<RegisterRequest>,
) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Register).await
}

/// Take in what another host has learnt: what `rswap forecast export` prints
#[utoipa::path(
    post,
    path = "/v1/learn",
    request_body = Lessons,
    responses((status = 200, description = "It is taken in", body = LearnDone), Refused)
)]
async fn learn(State(commands): State<Commands>, given: Given<Lessons>) -> Result<Response, ApiError> {
    ask(&commands, given, |lessons, reply| Command::Learn(Box::new(lessons), reply)).await
}

/// Empty a set of cores, storage, a link, this host or another one; or let it be used again
#[utoipa::path(
    post,
    path = "/v1/drain",
    request_body = DrainRequest,
    responses((status = 200, description = "It is being done", body = DrainDone), Refused)
)]
async fn drain(State(commands): State<Commands>, given: Given<DrainRequest>) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Drain).await
}

/// Decide about an instance in doubt: say which of its copies counts
#[utoipa::path(
    post,
    path = "/v1/recover",
    request_body = RecoverRequest,
    responses((status = 200, description = "It is carried out", body = RecoverDone), Refused)
)]
async fn recover(
    State(commands): State<Commands>,
    given: Given<RecoverRequest>,
) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Recover).await
}

/// Migrate an instance to another host
///
/// It goes on when the caller goes away.
#[utoipa::path(
    post,
    path = "/v1/migrate",
    request_body = MigrateRequest,
    responses(
        (
            status = 200,
            description = "An event per line, the last one is no `progress`: the status says only that it was begun",
            body = MigrateEvent,
            content_type = "application/x-ndjson"
        ),
        Refused
    )
)]
async fn migrate(
    State(commands): State<Commands>,
    given: Given<MigrateRequest>,
) -> Result<Response, ApiError> {
    follow(&commands, given, Command::Migrate).await
}

/// Move a volume of an instance to a storage pool, while it runs
#[utoipa::path(
    post,
    path = "/v1/swap-volume",
    request_body = SwapVolumeRequest,
    responses(
        (
            status = 200,
            description = "An event per line, the last one is no `progress`: the status says only that it was begun",
            body = SwapVolumeEvent,
            content_type = "application/x-ndjson"
        ),
        Refused
    )
)]
async fn swap_volume(
    State(commands): State<Commands>,
    given: Given<SwapVolumeRequest>,
) -> Result<Response, ApiError> {
    follow(&commands, given, Command::SwapVolume).await
}

/// Answers with a line per event.
async fn follow<B: DeserializeOwned, E: Serialize + Send + 'static>(
    commands: &Commands,
    given: Given<B>,
    command: impl FnOnce(B, mpsc::Sender<E>) -> Command,
) -> Result<Response, ApiError> {
    let request = body(given)?;
    let (events, incoming) = mpsc::channel(EVENTS_WAITING);
    commands.send(command(request, events)).await.map_err(|_| stopping())?;
    let lines = stream::unfold(incoming, |mut incoming: mpsc::Receiver<E>| async move {
        let event = incoming.recv().await?;
        Some((Ok::<_, Infallible>(line(&event)), incoming))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

fn line(event: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec(event).expect("events are plain structs with text keys");
    text.push(b'\n');
    text.into()
}

async fn ask<B: DeserializeOwned, T: Serialize>(
    commands: &Commands,
    given: Given<B>,
    command: impl FnOnce(B, Reply<T>) -> Command,
) -> Result<Response, ApiError> {
    let (reply, answer) = oneshot::channel();
    commands.send(command(body(given)?, reply)).await.map_err(|_| stopping())?;
    let answered = answer.await.map_err(|_| stopping())??;
    Ok(Json(answered).into_response())
}

fn body<B>(given: Given<B>) -> Result<B, ApiError> {
    given.map(|Json(body)| body).map_err(|rejection| {
        ApiError::new(
            rejection.status(),
            format!("cannot read the request's body: {}", rejection.body_text()),
            "send JSON as docs/api.md shows it, with content-type: application/json",
        )
    })
}

fn stopping() -> ApiError {
    ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "the agent is stopping",
        "start it again, and repeat the call",
    )
}
