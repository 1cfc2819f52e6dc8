//! Who may call what, and the record of who did: as at an agent's control socket, every wish is in the audit log before it is followed,
//! and again with what came of it; when the log can't be written, nothing is done.
//!
//! What a page of another site can have a browser send is refused ([`page`]).

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, StatusCode},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use rswap_audit::{Outcome, TEXT_BYTES};
use rswap_http::{ApiError, page};

use crate::{Peer, Who, server::Controller};

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

/// Whether a call that changes something is none of a stranger's page: the name that was asked for, the page, and the kind of body.
fn sent_by_itself(peer: &Peer, headers: &HeaderMap) -> Result<(), ApiError> {
    let hint = "call as `rswap fleet` does; a page may only look";
    if !is_by_name(peer, headers) {
        let error = "another name was asked for than one of this host";
        return Err(ApiError::new(StatusCode::FORBIDDEN, error, hint));
    }
    page::require_own(headers, hint)
}

/// Lets reports through that no page has sent; from whom one comes is looked at with what it says.
pub(crate) async fn report(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    match sent_by_itself(&peer, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            tracing::warn!(
                from = peer.from,
                call = request.uri().path(),
                why = refusal.detail,
                "a call was refused"
            );
            refusal.into_response()
        }
    }
}

fn refused(peer: &Peer, what: &str) -> ApiError {
    let error = format!("{} may not {what}", peer.from);
    ApiError::new(StatusCode::FORBIDDEN, error, "ask as an operator, or over the controller's socket")
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
    let allowed = match peer.may_operate() {
        true => sent_by_itself(&peer, request.headers()),
        false => Err(refused(&peer, "say what is wanted of the fleet")),
    };
    if let Err(refusal) = allowed {
        tracing::warn!(from = peer.from, call, why = refusal.detail, "a call was refused");
        if let Err(error) = controller.audit.refused(&who, &call) {
            tracing::error!(%error, "that a call was refused is not in the audit log");
        }
        return refusal.into_response();
    }
    let (parts, body) = request.into_parts();
    let given = match axum::body::to_bytes(body, TEXT_BYTES).await {
        Ok(given) => given,
        Err(error) => {
            let text = format!("cannot read the request's body: {error}");
            let refusal = ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, text, "send at most 4 KiB");
            return refusal.into_response();
        }
    };
    let entry = match controller.audit.begin(&who, &call, &given) {
        Ok(entry) => entry,
        Err(error) => {
            tracing::error!(%error, "a call was refused: the audit log can't be written");
            let text = format!("the audit log can't be written: {error}");
            let hint = "nothing was done: see to fleet.audit_log";
            return ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text, hint).into_response();
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

#[cfg(test)]
mod tests {
    use axum::http::{HeaderValue, header};

    use super::*;

    #[test]
    fn over_the_socket_a_name_of_this_host_has_to_be_asked_for() {
        let said = |name: &'static str, origin: &'static str| {
            let headers =
                [(header::HOST, name), (header::CONTENT_TYPE, "application/json"), (header::ORIGIN, origin)];
            let headers = headers.into_iter().map(|(name, value)| (name, HeaderValue::from_static(value)));
            sent_by_itself(&Peer::own("here".to_owned()), &headers.collect()).map_err(|error| error.status)
        };
        assert_eq!(said("localhost:7793", "http://localhost:7793"), Ok(()));
        assert_eq!(said("localhost:7793", "http://evil.example"), Err(403));
        // Another site's name, which that lets point here.
        assert_eq!(said("evil.example:7793", "http://evil.example:7793"), Err(403));
    }

    #[test]
    fn an_operators_browser_is_no_exception_and_may_use_any_name_of_the_controller() {
        let who = Who::Operator { name: "o".parse().expect("a name"), operates: true };
        let peer = Peer { from: "there".to_owned(), who };
        let headers = |origin: &'static str| {
            [
                (header::HOST, "rack-1:7792"),
                (header::CONTENT_TYPE, "application/json"),
                (header::ORIGIN, origin),
            ]
            .into_iter()
            .map(|(name, value)| (name, HeaderValue::from_static(value)))
            .collect::<HeaderMap>()
        };
        assert!(sent_by_itself(&peer, &headers("https://rack-1:7792")).is_ok());
        assert!(sent_by_itself(&peer, &headers("https://evil.example")).is_err());
    }
}
