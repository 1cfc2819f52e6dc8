//! Long answers, made while they are sent: of a hundred thousand instances, all of it at once would be most of what the controller holds,
//! and reports would wait until it is made.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    http::header,
    response::{IntoResponse, Response},
};
use hyper::body::Frame;
use rswap_plan::Plan;
use serde::{Serialize, Serializer};

/// Things that are made at once.
pub(crate) const AT_ONCE: usize = 64;

/// The next part of a text; `None` after the last.
type Next = Box<dyn FnMut() -> Result<Option<Bytes>, serde_json::Error> + Send>;

struct Parts(Next);

impl HttpBody for Parts {
    type Data = Bytes;
    type Error = serde_json::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, serde_json::Error>>> {
        let Self(next) = self.get_mut();
        let part = next().transpose();
        Poll::Ready(part.map(|part| part.map(Frame::data)))
    }
}

/// A list as JSON, between `head` and `tail`. `next` gives the next few things of it, and nothing after the last.
pub(crate) fn list<T: Serialize>(
    head: Vec<u8>,
    tail: &'static str,
    next: impl FnMut() -> Vec<T> + Send + 'static,
) -> Response {
    let body = Body::new(Parts(parts(head, tail, next)));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn parts<T: Serialize>(
    head: Vec<u8>,
    tail: &'static str,
    mut next: impl FnMut() -> Vec<T> + Send + 'static,
) -> Next {
    let (mut head, mut any, mut over) = (Some(head), false, false);
    Box::new(move || -> Result<Option<Bytes>, serde_json::Error> {
        if over {
            return Ok(None);
        }
        let mut text = head.take().unwrap_or_default();
        let things = next();
        if things.is_empty() {
            over = true;
            text.extend_from_slice(tail.as_bytes());
        }
        for thing in &things {
            if any {
                text.push(b',');
            }
            any = true;
            serde_json::to_writer(&mut text, thing)?;
        }
        Ok(Some(text.into()))
    })
}

/// A decision of a plan that is shared.
struct Of(Arc<Plan>, usize);

impl Serialize for Of {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.decisions[self.1].serialize(serializer)
    }
}

/// A plan as JSON.
pub(crate) fn plan(plan: Arc<Plan>) -> Response {
    let head = format!("{{\"at\":{},\"decisions\":[", plan.at.0);
    list(head.into_bytes(), "]}", decisions(plan))
}

fn decisions(plan: Arc<Plan>) -> impl FnMut() -> Vec<Of> + Send + 'static {
    let mut from = 0;
    move || {
        let until = plan.decisions.len().min(from + AT_ONCE);
        let part = (from..until).map(|number| Of(plan.clone(), number)).collect();
        from = until;
        part
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use rswap_plan::{InstanceView, MoveKind, PlanConfig, Planner};
    use rswap_types::UnixMillis;
    use serde_json::Value;

    use super::*;

    async fn read(answer: Response) -> Value {
        let text = answer.into_body().collect().await.expect("a body").to_bytes();
        serde_json::from_slice(&text).expect("JSON")
    }

    #[tokio::test]
    async fn what_is_told_in_parts_is_what_would_be_told_at_once() {
        let view = |number: usize| {
            let of = serde_json::json!({
                "instance": format!("i{number:04}"), "host": null, "cpu_pool": null, "cores": 1.0, "resident_bytes": 1,
                "demand": { "instance": format!("i{number:04}"), "at": 0, "points": [] },
                "dirty_bytes_per_s": null, "movable": [MoveKind::Host],
            });
            serde_json::from_value::<InstanceView>(of).expect("an instance")
        };
        for count in [0, 1, AT_ONCE, 3 * AT_ONCE + 1] {
            let views: Vec<_> = (0..count).map(view).collect();
            let made = Planner::new(PlanConfig::default()).plan(UnixMillis(7), &views, &[]);
            assert_eq!(made.decisions.len(), count);
            let told = read(plan(Arc::new(made.clone()))).await;
            assert_eq!(told, serde_json::to_value(&made).expect("a plan"));
        }
    }

    #[tokio::test]
    async fn of_nothing_the_list_is_empty() {
        assert_eq!(read(list::<u8>(b"[".to_vec(), "]", Vec::new)).await, serde_json::json!([]));
    }
}
