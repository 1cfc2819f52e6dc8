//! How every error is answered: as problem details (RFC 9457).

use std::borrow::Cow;

use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use problem_details::ProblemDetails;
use serde::{Deserialize, Serialize};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

/// The media type of errors.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// How every error is answered: as problem details (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(from = "ProblemDetails<Hint>", into = "ProblemDetails<Hint>")]
#[error("{detail}: {hint}")]
pub struct ApiError {
    /// What was attempted, and what went wrong.
    pub detail: String,
    /// What to do about it.
    pub hint: String,
    /// The HTTP status.
    pub status: u16,
    /// When it can be tried again, in seconds from now: the header `Retry-After`.
    pub retry_after_s: Option<u64>,
}

/// What rswap's problems say beside the members of the standard.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Hint {
    #[serde(default)]
    hint: String,
}

impl From<ApiError> for ProblemDetails<Hint> {
    fn from(error: ApiError) -> Self {
        let details = ProblemDetails::from_status_code(error.code()).with_detail(error.detail);
        details.with_extensions(Hint { hint: error.hint })
    }
}

impl From<ProblemDetails<Hint>> for ApiError {
    fn from(details: ProblemDetails<Hint>) -> Self {
        let status = details.status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::new(status, details.detail.unwrap_or_default(), details.extensions.hint)
    }
}

impl ApiError {
    /// An error with its HTTP status.
    pub fn new(status: StatusCode, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { detail: detail.into(), hint: hint.into(), status: status.as_u16(), retry_after_s: None }
    }

    /// The same, to be tried again after so many seconds.
    pub fn after(self, seconds: u64) -> Self {
        Self { retry_after_s: Some(seconds), ..self }
    }

    /// The HTTP status.
    pub fn code(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let retry_after_s = self.retry_after_s;
        let mut response = (self.code(), [(header::CONTENT_TYPE, PROBLEM_JSON)], Json(self)).into_response();
        if let Some(seconds) = retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// What an error looks like on the wire: problem details (RFC 9457), with what to do about it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it describes what `ProblemDetails<Hint>` writes, for the document")]
struct Problem {
    /// The HTTP status in words.
    title: String,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What was attempted, and what went wrong.
    detail: String,
    /// What to do about it.
    hint: String,
}

impl PartialSchema for ApiError {
    fn schema() -> RefOr<Schema> {
        Problem::schema()
    }
}

impl ToSchema for ApiError {
    fn name() -> Cow<'static, str> {
        Problem::name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_a_problem_of_the_standard() {
        let error = || ApiError::new(StatusCode::NOT_FOUND, "there is no such thing", "look elsewhere");
        let response = error().into_response();
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        assert_eq!(response.status(), 404);
        let json = serde_json::to_value(error()).unwrap();
        let wanted = serde_json::json!({
            "title": "Not Found", "status": 404, "detail": "there is no such thing", "hint": "look elsewhere",
        });
        assert_eq!(json, wanted);
        assert_eq!(serde_json::from_value::<ApiError>(json).unwrap(), error());
        assert!(!response.headers().contains_key("retry-after"));
        assert_eq!(error().after(3).into_response().headers()["retry-after"], "3");
    }
}
