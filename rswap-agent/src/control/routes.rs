//! The mutating routes: each turns its body into a [`Command`] and its answer into JSON.

use std::convert::Infallible;

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State, rejection::JsonRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use futures_util::stream;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{mpsc, oneshot};

use super::{
    AdoptRequest, Command, DrainRequest, MigrateRequest, RecoverRequest, RegisterRequest, Reply, SwapRequest,
    SwapVolumeRequest,
};
use crate::{
    forecast::Lessons,
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

/// The read-only routes over `board`, and the mutating ones over `commands`.
pub fn router(board: Board, commands: Commands) -> Router {
    let mutating = Router::new()
        .route("/v1/swap", post(swap))
        .route("/v1/swap-volume", post(swap_volume))
        .route("/v1/migrate", post(migrate))
        .route("/v1/adopt", post(adopt))
        .route("/v1/register", post(register))
        .route("/v1/recover", post(recover))
        .route("/v1/drain", post(drain))
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .merge(Router::new().route(LEARN, post(learn)).layer(DefaultBodyLimit::max(LESSONS_LIMIT_BYTES)))
        .with_state(commands);
    status::router(board).merge(mutating)
}

type Given<T> = Result<Json<T>, JsonRejection>;

async fn swap(State(commands): State<Commands>, given: Given<SwapRequest>) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Swap).await
}

async fn adopt(State(commands): State<Commands>, given: Given<AdoptRequest>) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Adopt).await
}

async fn register(
    State(commands): State<Commands>,
    given: Given<RegisterRequest>,
) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Register).await
}

async fn learn(State(commands): State<Commands>, given: Given<Lessons>) -> Result<Response, ApiError> {
    ask(&commands, given, |lessons, reply| Command::Learn(Box::new(lessons), reply)).await
}

async fn drain(State(commands): State<Commands>, given: Given<DrainRequest>) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Drain).await
}

async fn recover(
    State(commands): State<Commands>,
    given: Given<RecoverRequest>,
) -> Result<Response, ApiError> {
    ask(&commands, given, Command::Recover).await
}

async fn migrate(
    State(commands): State<Commands>,
    given: Given<MigrateRequest>,
) -> Result<Response, ApiError> {
    follow(&commands, given, Command::Migrate).await
}

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
