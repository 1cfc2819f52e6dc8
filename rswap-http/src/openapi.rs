//! The OpenAPI document, made from the routes themselves: what is registered by `routes!` is described, and nothing else can be.

use std::sync::Arc;

use axum::{
    Extension,
    http::header,
    response::{IntoResponse as _, Response},
};
use serde_json::{Map, Value, json};
use utoipa::{PartialSchema as _, ToSchema as _};

use crate::{ApiError, PROBLEM_JSON};

/// Where the document is.
pub const PATH: &str = "/v1/openapi.json";

/// What any call may be refused with: the routes say what else there is.
const OF_EVERY: &[(&str, &str)] = &[
    ("403", "The caller may not do this, or comes as another site's page would"),
    ("default", "Anything else that went wrong"),
];
/// Of calls with a query.
const OF_QUERIES: &[(&str, &str)] = &[("400", "The query can't be read")];
/// Of calls that change something.
const OF_CHANGES: &[(&str, &str)] = &[
    ("400", "The body is no JSON"),
    ("413", "The body is longer than it may be"),
    ("415", "The request does not say that its body is JSON"),
    ("500", "The audit log can't be written: nothing was done"),
];

/// The document as it is sent.
#[derive(Clone, Debug)]
pub struct Document(Arc<str>);

impl Document {
    /// For [`document`], as an [`Extension`] of its router.
    pub fn new(document: &Value) -> Self {
        Self(document.to_string().into())
    }
}

/// The routes that there are, as an OpenAPI document
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    responses((status = 200, description = "The document, by OpenAPI 3.1", body = Object))
)]
pub async fn document(Extension(Document(text)): Extension<Document>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text.to_string()).into_response()
}

/// The document of these routes, with the errors that each of them may have. Pure.
pub fn finished(api: &utoipa::openapi::OpenApi) -> Value {
    let mut document = serde_json::to_value(api).expect("a document has text keys");
    let schemas = &mut document["components"]["schemas"];
    schemas[ApiError::name().as_ref()] = json!(ApiError::schema());
    for item in document["paths"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            let changes = if method == "get" { &[] } else { OF_CHANGES };
            let queries = if operation["parameters"].is_null() { &[] } else { OF_QUERIES };
            for (status, what) in OF_EVERY.iter().chain(changes).chain(queries) {
                let responses = &mut operation["responses"];
                if responses[status].is_null() {
                    responses[status] = problem(what);
                }
            }
        }
    }
    without_links(&mut document);
    document
}

fn problem(what: &str) -> Value {
    let schema = json!({ "$ref": format!("#/components/schemas/{}", ApiError::name()) });
    json!({ "description": what, "content": { PROBLEM_JSON: { "schema": schema } } })
}

/// Descriptions come from the code, where [`this`] is a link: here it leads nowhere.
fn without_links(value: &mut Value) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                match member {
                    Value::String(text) if ["description", "summary"].contains(&name.as_str()) => {
                        *text = text.replace("[`", "`").replace("`]", "`");
                    }
                    member => without_links(member),
                }
            }
        }
        Value::Array(members) => members.iter_mut().for_each(without_links),
        _ => {}
    }
}
