//! Who may call what, and the record of who did: as at an agent's control socket, every wish is in the audit log before it is followed,
//! and again with what came of it; when the log can't be written, nothing is done.
//!
//! A browser may be among those who call: over a forwarded port, or with an operator's certificate. Any page in it can have it send a
//! POST here that is plain text or a form. So what changes something has to say that it is JSON, which a browser asks about first where
//! the page is another site's, and is told nothing; and what is said to come from another site is refused.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
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

/// Whether a call that changes something is none of a stranger's page: the name that was asked for, the page, and the kind of body.
fn sent_by_itself(peer: &Peer, headers: &HeaderMap) -> Result<(), Refusal> {
    let stranger = |error: String| {
        let hint = "call as `rswap fleet` does; a page may only look";
        Err(Refusal::new(StatusCode::FORBIDDEN, error, hint))
    };
    if !is_by_name(peer, headers) {
        return stranger("another name was asked for than one of this host".to_owned());
    }
    let asked = headers.get(header::HOST).map(HeaderValue::as_bytes);
    let foreign = |origin: &&HeaderValue| !is_own_origin(origin.as_bytes(), asked);
    if let Some(origin) = headers.get(header::ORIGIN).filter(foreign) {
        return stranger(format!("it is sent by a page of {}", String::from_utf8_lossy(origin.as_bytes())));
    }
    if headers.get(header::CONTENT_TYPE).is_some_and(|kind| is_json(kind.as_bytes())) {
        return Ok(());
    }
    let error = "the request does not say that its body is JSON";
    Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, error, "send content-type: application/json"))
}

/// `http://NAME:PORT` of the same NAME:PORT that is asked.
fn is_own_origin(origin: &[u8], asked: Option<&[u8]>) -> bool {
    let scheme = [b"http://" as &[u8], b"https://"].into_iter().find(|scheme| origin.starts_with(scheme));
    let page = scheme.and_then(|scheme| origin.get(scheme.len()..));
    page.zip(asked).is_some_and(|(page, asked)| page.eq_ignore_ascii_case(asked))
}

/// `application/json`, with whatever parameters.
fn is_json(kind: &[u8]) -> bool {
    let essence = kind.split(|byte| *byte == b';').next().unwrap_or_default();
    essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
}

/// Lets reports through that no page has sent; from whom one comes is looked at with what it says.
pub(crate) async fn report(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    match sent_by_itself(&peer, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            tracing::warn!(
                from = peer.from,
                call = request.uri().path(),
                why = refusal.error(),
                "a call was refused"
            );
            refusal.into_response()
        }
    }
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
    let allowed = match peer.may_operate() {
        true => sent_by_itself(&peer, request.headers()),
        false => Err(refused(&peer, "say what is wanted of the fleet")),
    };
    if let Err(refusal) = allowed {
        tracing::warn!(from = peer.from, call, why = refusal.error(), "a call was refused");
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

#[cfg(test)]
mod tests {
    use super::*;

    fn said(headers: &[(&'static str, &'static str)]) -> Result<(), StatusCode> {
        let map = headers
            .iter()
            .map(|(name, value)| (header::HeaderName::from_static(name), HeaderValue::from_static(value)));
        let peer = Peer::own("here".to_owned());
        sent_by_itself(&peer, &map.collect()).map_err(|refusal| refusal.into_response().status())
    }

    #[test]
    fn what_a_page_of_another_site_can_send_is_refused() {
        let json = ("content-type", "application/json");
        let asked = ("host", "localhost:7793");
        for good in [
            &[json] as &[_],
            &[asked, json],
            &[asked, ("content-type", "Application/JSON; charset=utf-8")],
            &[asked, json, ("origin", "http://localhost:7793")],
            &[asked, json, ("origin", "https://LOCALHOST:7793")],
        ] {
            assert_eq!(said(good), Ok(()), "{good:?}");
        }
        // All that a browser sends without asking first.
        for kind in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=a",
            "",
            "application/jsonp",
        ] {
            assert_eq!(
                said(&[asked, ("content-type", kind)]),
                Err(StatusCode::UNSUPPORTED_MEDIA_TYPE),
                "{kind}"
            );
        }
        assert_eq!(said(&[asked]), Err(StatusCode::UNSUPPORTED_MEDIA_TYPE), "no kind at all");
        for page in [
            "http://evil.example",
            "http://localhost",
            "http://localhost:80",
            "null",
            "",
            "localhost:7793",
            "http://localhost:7793.evil.example",
        ] {
            assert_eq!(said(&[asked, json, ("origin", page)]), Err(StatusCode::FORBIDDEN), "{page}");
        }
        assert_eq!(
            said(&[json, ("origin", "http://localhost:7793")]),
            Err(StatusCode::FORBIDDEN),
            "nobody was asked for"
        );
        // Another site's name, which that lets point here.
        let rebound = [("host", "evil.example:7793"), json, ("origin", "http://evil.example:7793")];
        assert_eq!(said(&rebound), Err(StatusCode::FORBIDDEN));
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
