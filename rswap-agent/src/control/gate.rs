//! Who may call what on the control socket, and the record of who did.
//!
//! The kernel says who is at the other end: uid, gid and pid when it connected (SO_PEERCRED), and its supplementary groups
//! (SO_PEERGROUPS). Root and the agent's own user may do everything; others what `[[control.grant]]` gives them. Every
//! changing call is in the audit log before it is carried out, and again when it has ended; when the log can't be written,
//! nothing is carried out. It is there with all of its arguments: a body that has no room there is refused.

use std::{
    os::fd::AsFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    Router,
    body::{Body, BodyDataStream, Bytes},
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
};
use futures_util::Stream;
use rswap_http::{
    page,
    serving::{self, Entered, Entrance},
};
use tokio::net::{UnixListener, UnixStream};

use rswap_audit::{Audit, Entry, Outcome, Who};

use super::routes::body_limit;
use crate::{
    config::{Grant, Right},
    status::ApiError,
    sys::socket,
};

/// Answers with an error are a few lines.
const ANSWER_BYTES: usize = 1 << 20;
/// What is kept of the last line of a stream.
const LINE_BYTES: usize = 64 << 10;

/// Who has connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Caller {
    /// Its process, when it connected.
    pub(super) pid: Option<i32>,
    /// Its user; `None` if the kernel doesn't say.
    pub(super) uid: Option<u32>,
    /// Its groups.
    pub(super) gids: Vec<u32>,
    /// Whether it is root or the agent's own user.
    pub(super) is_own: bool,
}

impl Caller {
    fn who(&self) -> Who {
        Who { uid: self.uid, pid: self.pid, peer: None }
    }

    /// As the kernel says.
    fn of(stream: &UnixStream, owner: u32) -> Self {
        let Ok(socket) = stream.as_fd().try_clone_to_owned() else { return Self::default() };
        let Ok((pid, uid, gid)) = socket::peer_credentials(&socket) else { return Self::default() };
        let mut gids = socket::peer_groups(&socket).unwrap_or_default();
        gids.push(gid);
        Self { pid: Some(pid), uid: Some(uid), gids, is_own: uid == 0 || uid == owner }
    }
}

impl serving::Caller for Caller {
    fn from(&self) -> String {
        self.uid.map_or_else(|| "an unknown user".to_owned(), |uid| format!("user {uid}"))
    }

    /// Others than root and the agent's user, whether they may call or not, have few places each.
    fn counted_as(&self) -> Option<String> {
        (!self.is_own).then(|| self.from())
    }
}

/// Those who connect to the socket.
pub(super) struct Callers {
    listener: UnixListener,
    owner: u32,
}

impl Entrance<Caller> for Callers {
    fn next(&mut self) -> Pin<Box<dyn Future<Output = Entered<Caller>> + Send + '_>> {
        Box::pin(async move {
            // Waits a while where no descriptor is free.
            let (stream, _) = axum::serve::Listener::accept(&mut self.listener).await;
            let caller = Caller::of(&stream, self.owner);
            let stream: Box<dyn serving::Stream> = Box::new(stream);
            (stream, caller)
        })
    }
}

/// What `caller` may, where `owner` is the agent's user. Pure.
fn right_of(caller: &Caller, owner: u32, grants: &[Grant]) -> Option<Right> {
    let uid = caller.uid?;
    if uid == 0 || uid == owner {
        return Some(Right::Operate);
    }
    let is_meant = |grant: &&Grant| match grant {
        Grant::User { uid: of, .. } => *of == uid,
        Grant::Group { gid, .. } => caller.gids.contains(gid),
    };
    grants.iter().filter(is_meant).map(Grant::right).max()
}

/// Stands before the routes.
#[derive(Debug)]
pub struct Gate {
    owner: u32,
    grants: Vec<Grant>,
    audit: Audit,
}

impl Gate {
    /// For an agent of this process's user.
    pub fn new(grants: Vec<Grant>, audit: Audit) -> Self {
        Self { owner: nix::unistd::geteuid().as_raw(), grants, audit }
    }

    /// Whether others than the owner may call at all.
    pub fn is_open(&self) -> bool {
        !self.grants.is_empty()
    }

    /// Those who come in by `listener`.
    pub(super) fn callers(&self, listener: UnixListener) -> Callers {
        Callers { listener, owner: self.owner }
    }

    /// Puts it before `routes`.
    pub(super) fn before(self, routes: Router) -> Router {
        routes.layer(middleware::from_fn_with_state(Arc::new(self), pass))
    }
}

fn refused(needed: Right) -> ApiError {
    let right = match needed {
        Right::Read => "read",
        Right::Operate => "operate",
    };
    ApiError::new(
        StatusCode::FORBIDDEN,
        format!("you may not do this: it needs the right {right:?}"),
        "call as root, or have a [[control.grant]] for your uid or gid",
    )
}

/// Whether it is no page of a stranger that a browser of the caller shows: it may come by a forwarded port (`ssh -L`).
fn by_itself(headers: &HeaderMap, changes: bool) -> Result<(), ApiError> {
    let hint = "call as `rswap` does; a page may only look, and asks for localhost";
    if !rswap_dashboard::is_local(headers) {
        let error = "another name was asked for than one of this host";
        return Err(ApiError::new(StatusCode::FORBIDDEN, error, hint));
    }
    if changes { page::require_own(headers, hint) } else { Ok(()) }
}

async fn pass(
    State(gate): State<Arc<Gate>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let changes = ![Method::GET, Method::HEAD].contains(request.method());
    let needed = if changes { Right::Operate } else { Right::Read };
    let may = right_of(&caller, gate.owner, &gate.grants) >= Some(needed);
    let allowed = match may {
        true => by_itself(request.headers(), changes),
        false => Err(refused(needed)),
    };
    if !changes {
        return match allowed {
            Ok(()) => next.run(request).await,
            Err(error) => error.into_response(),
        };
    }
    let call = request.uri().path().to_owned();
    // Of whoever may not call, nothing is read.
    if let Err(error) = allowed {
        tracing::warn!(?caller, call, why = error.detail, "a call was refused");
        if let Err(error) = gate.audit.refused(&caller.who(), &call) {
            tracing::error!(%error, "that a call was refused is not in the audit log");
        }
        return error.into_response();
    }
    let (parts, body) = request.into_parts();
    let limit = body_limit(&call);
    let given = match axum::body::to_bytes(body, limit).await {
        Ok(given) => given,
        Err(error) => {
            let text = format!("cannot read the request's body: {error}");
            let hint = format!("send at most {} KiB", limit >> 10);
            return ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, text, hint).into_response();
        }
    };
    let entry = match gate.audit.begin(&caller.who(), &call, &given) {
        Ok(entry) => entry,
        Err(error) => {
            tracing::error!(%error, "a call was refused: the audit log can't be written");
            let text = format!("the audit log can't be written: {error}");
            let hint = "nothing was done: see to control.audit_log";
            return ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text, hint).into_response();
        }
    };
    let answer = next.run(Request::from_parts(parts, Body::from(given))).await;
    recorded(answer, entry).await
}

/// Writes down what came of it: at once, or at the end of a stream.
async fn recorded(answer: Response, entry: Entry) -> Response {
    let (parts, body) = answer.into_parts();
    let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if parts.status.is_success() && kind == Some("application/x-ndjson") {
        let followed = Followed { inner: body.into_data_stream(), line: Vec::new(), entry: Some(entry) };
        return Response::from_parts(parts, Body::from_stream(followed));
    }
    if parts.status.is_success() {
        entry.end(Outcome::Done);
        return Response::from_parts(parts, body);
    }
    let said = axum::body::to_bytes(body, ANSWER_BYTES).await.unwrap_or_default();
    entry.end(Outcome::Failed(String::from_utf8_lossy(&said).into_owned()));
    Response::from_parts(parts, Body::from(said))
}

/// A stream whose last line says what came of the call.
struct Followed {
    inner: BodyDataStream,
    line: Vec<u8>,
    entry: Option<Entry>,
}

impl Followed {
    fn ended(&mut self, otherwise: &str) {
        let Some(entry) = self.entry.take() else { return };
        let last: Option<serde_json::Value> = serde_json::from_slice(&self.line).ok();
        let event = last.as_ref().and_then(|last| last["event"].as_str());
        entry.end(match event {
            Some("done") => Outcome::Done,
            Some("failed" | "in_doubt") => {
                Outcome::Failed(String::from_utf8_lossy(&self.line).trim_end().to_owned())
            }
            _ => Outcome::Unknown(otherwise.to_owned()),
        });
    }
}

impl Stream for Followed {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = Pin::new(&mut self.inner).poll_next(cx);
        match &next {
            // A line at a time, as it is sent.
            Poll::Ready(Some(Ok(line))) => self.line = line[..line.len().min(LINE_BYTES)].to_vec(),
            Poll::Ready(Some(Err(_)) | None) => self.ended("it ended without a word"),
            Poll::Pending => {}
        }
        next
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.ended("the caller went away before its end: see /v1/migrations and the agent's log");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_that_somebody_was_given_counts_and_root_may_everything() {
        let grants = [
            Grant::User { uid: 1000, right: Right::Read },
            Grant::Group { gid: 50, right: Right::Operate },
            Grant::Group { gid: 60, right: Right::Read },
        ];
        let may = |uid, gids: &[u32]| {
            let caller = Caller { pid: Some(1), uid, gids: gids.to_vec(), is_own: false };
            right_of(&caller, 7, &grants)
        };
        assert_eq!(may(Some(0), &[0]), Some(Right::Operate));
        assert_eq!(may(Some(7), &[7]), Some(Right::Operate));
        assert_eq!(may(Some(1000), &[1000]), Some(Right::Read));
        assert_eq!(may(Some(1000), &[1000, 60, 50]), Some(Right::Operate));
        assert_eq!(may(Some(1001), &[60]), Some(Right::Read));
        // A user is not a group of the same number, and group 0 is not root.
        assert_eq!(may(Some(50), &[0]), None);
        assert_eq!(may(Some(1001), &[1000]), None);
        // Of whom the kernel says nothing, nothing is taken.
        assert_eq!(may(None, &[50]), None);
    }
}
