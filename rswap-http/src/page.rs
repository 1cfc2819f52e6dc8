//! What a page of another site can have a browser send.
//!
//! A browser may be among those who call: over a forwarded port, or with an operator's certificate. Any page in it can have it send a
//! POST here that is plain text or a form. So what changes something has to say that it is JSON, which a browser asks about first where
//! the page is another site's, and is told nothing; and what is said to come from another site is refused.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};

use crate::ApiError;

/// Of a call that changes something: why it may be a stranger's page's. `hint` says how to call instead.
///
/// # Errors
///
/// 403 if another site's page sends it, 415 if it does not say that its body is JSON.
pub fn require_own(headers: &HeaderMap, hint: &str) -> Result<(), ApiError> {
    let asked = headers.get(header::HOST).map(HeaderValue::as_bytes);
    let foreign = |origin: &&HeaderValue| !is_own_origin(origin.as_bytes(), asked);
    if let Some(origin) = headers.get(header::ORIGIN).filter(foreign) {
        let error = format!("it is sent by a page of {}", String::from_utf8_lossy(origin.as_bytes()));
        return Err(ApiError::new(StatusCode::FORBIDDEN, error, hint));
    }
    if headers.get(header::CONTENT_TYPE).is_some_and(|kind| is_json(kind.as_bytes())) {
        return Ok(());
    }
    let error = "the request does not say that its body is JSON";
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, error, "send content-type: application/json"))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn said(headers: &[(&'static str, &'static str)]) -> Result<(), StatusCode> {
        let map = headers
            .iter()
            .map(|(name, value)| (header::HeaderName::from_static(name), HeaderValue::from_static(value)));
        require_own(&map.collect(), "call by yourself").map_err(|error| error.code())
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
            &[("host", "rack-1:7792"), json, ("origin", "https://rack-1:7792")],
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
    }
}
