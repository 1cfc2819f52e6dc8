//! Who may call what, and the record of who did: as at an agent's control socket, every wish is in the audit log before it is followed,
//! and again with what came of it; when the log can't be written, nothing is done.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, StatusCode},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use rswap_audit::{Outcome, TEXT_BYTES};

use crate::{Peer, Who, routes::Refusal, server::Controller};

/// What is kept of an answer with an error.
const ANSWER_BYTES: usize = 64 << 10;

/// Lets those through who may look.
pub(crate) async fn look(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.may_look() && is_by_name(&peer, request.headers()) {
        return next.run(request).await;
    }
    tracing::warn!(from = peer.from, call = request.uri().path(), "a call was refused");
    refused(&peer, "look at the fleet").into_response()
}

/// Over a forwarded port, a browser comes by the socket too: with it may come a stranger's page whose name points here.
fn is_by_name(peer: &Peer, headers: &HeaderMap) -> bool {
    peer.who != Who::Own || rswap_dashboard::is_local(headers)
}

fn refused(peer: &Peer, what: &str) -> Refusal {
    let error = format!("{} may not {what}", peer.from);
    Refusal::new(StatusCode::FORBIDDEN, error, "ask as an operator, or over the controller's socket")
}

/// Lets those through who may say what is wanted, and writes it down.
pub(crate) async fn operate(
    State(controller): State<Arc<Controller>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let who = rswap_audit::Who { uid: None, pid: None, peer: Some(peer.from.clone()) };
    let call = request.uri().path().to_owned();
    if !peer.may_operate() || !is_by_name(&peer, request.headers()) {
        tracing::warn!(from = peer.from, call, "a call was refused");
        if let Err(error) = controller.audit.refused(&who, &call) {
            tracing::error!(%error, "that a call was refused is not in the audit log");
        }
        return refused(&peer, "say what is wanted of the fleet").into_response();
    }
    let (parts, body) = request.into_parts();
    let given = match axum::body::to_bytes(body, TEXT_BYTES).await {
        Ok(given) => given,
        Err(error) => {
            let text = format!("cannot read the request's body: {error}");
            let refusal = Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text, "send at most 4 KiB");
            return refusal.into_response();
        }
    };
    let entry = match controller.audit.begin(&who, &call, &given) {
        Ok(entry) => entry,
        Err(error) => {
            tracing::error!(%error, "a call was refused: the audit log can't be written");
            let text = format!("the audit log can't be written: {error}");
            let hint = "nothing was done: see to fleet.audit_log";
            return Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text, hint).into_response();
        }
    };
    let answer = next.run(Request::from_parts(parts, Body::from(given))).await;
    if answer.status().is_success() {
        entry.end(Outcome::Done);
        return answer;
    }
    let (parts, body) = answer.into_parts();
    let said = axum::body::to_bytes(body, ANSWER_BYTES).await.unwrap_or_default();
    entry.end(Outcome::Failed(String::from_utf8_lossy(&said).into_owned()));
    Response::from_parts(parts, Body::from(said))
}
