//! Whether what agents and controllers answer is as their OpenAPI documents say: each member by its schema, and no member that is in none.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::{Context, ensure};
use jsonschema::Validator;
use serde_json::{Value, json};

/// Errors of an answer that are told.
const ERRORS_TOLD: usize = 5;
/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// An OpenAPI document.
pub struct Api {
    document: Value,
    /// Of answers, by where their schema is in the document.
    known: Mutex<HashMap<String, Arc<Validator>>>,
}

/// What came for a call.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// Its media type.
    pub content_type: String,
    /// Its body.
    pub body: String,
}

impl Answer {
    /// The body, as JSON.
    ///
    /// # Errors
    ///
    /// If it is none.
    pub fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("no JSON: {}", self.body))
    }
}

impl Api {
    fn new(document: Value) -> Self {
        Self { document, known: Mutex::default() }
    }

    /// An agent's.
    pub fn agent() -> &'static Self {
        static API: OnceLock<Api> = OnceLock::new();
        API.get_or_init(|| Self::new(rswap_agent::control::document()))
    }

    /// A controller's.
    pub fn controller() -> &'static Self {
        static API: OnceLock<Api> = OnceLock::new();
        API.get_or_init(|| Self::new(rswap_controller::document()))
    }

    /// The document.
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// Paths of the operations by this method.
    pub fn paths(&self, method: &str) -> Vec<&str> {
        let paths = self.document["paths"].as_object().into_iter().flatten();
        paths.filter(|(_, item)| item.get(method).is_some()).map(|(path, _)| path.as_str()).collect()
    }

    /// Whether this JSON may be the answer with `status` to `method` at `path`, of which the query is left out.
    ///
    /// # Errors
    ///
    /// If it may not, with what is wrong.
    pub fn check(
        &self,
        method: &str,
        path: &str,
        status: u16,
        kind: &str,
        json: &Value,
    ) -> anyhow::Result<()> {
        let route = path.split('?').next().unwrap_or_default();
        let responses = &self.document["paths"][route][method]["responses"];
        let status = status.to_string();
        let of = responses.get(&status).map_or("default", |_| status.as_str());
        let schema = &responses[of]["content"][kind]["schema"];
        ensure!(
            !schema.is_null(),
            "the document has no {method} {route} that answers {status} as {kind}: {json}"
        );
        let validator = self.validator(&format!("{method} {route} {of} {kind}"), schema)?;
        let errors = validator.iter_errors(json).take(ERRORS_TOLD);
        let errors: Vec<_> = errors.map(|error| format!("{}: {error}", error.instance_path())).collect();
        ensure!(errors.is_empty(), "{method} {route}: {status} is not as the document says: {errors:#?}");
        Ok(())
    }

    fn validator(&self, place: &str, schema: &Value) -> anyhow::Result<Arc<Validator>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(validator) = known.get(place) {
            return Ok(validator.clone());
        }
        let mut root = closed(schema, false);
        let mut components = self.document["components"].clone();
        for schema in components["schemas"].as_object_mut().into_iter().flat_map(|all| all.values_mut()) {
            *schema = closed(schema, true);
        }
        root["components"] = components;
        let validator =
            jsonschema::draft202012::new(&root).with_context(|| format!("the schema of {place}"))?;
        let validator = Arc::new(validator);
        known.insert(place.to_owned(), validator.clone());
        Ok(validator)
    }

    /// Calls over a unix socket, and looks at what comes.
    ///
    /// # Errors
    ///
    /// If nothing comes, or it is not as the document says.
    pub fn call(
        &self,
        socket: &Path,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> anyhow::Result<Answer> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        // HTTP/1.0: what comes is in one piece, up to the end.
        let upper = method.to_uppercase();
        let length = body.len();
        let request = format!("{upper} {path} HTTP/1.0\r\n{headers}content-length: {length}\r\n\r\n{body}");
        match stream.write_all(request.as_bytes()) {
            // It may have been refused by its head: the answer is there all the same.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            written => written?,
        }
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        let all = String::from_utf8(all)?;
        let (head, body) = all.split_once("\r\n\r\n").context("no end of the head")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        let kind = head.lines().filter_map(|line| line.split_once(':'));
        let mut kind =
            kind.filter(|(name, _)| name.eq_ignore_ascii_case("content-type")).map(|(_, value)| value);
        let content_type = kind.next_back().unwrap_or_default().trim().to_owned();
        let answer = Answer { status, content_type, body: body.to_owned() };
        self.check_answer(method, path, &answer)?;
        Ok(answer)
    }

    fn check_answer(&self, method: &str, path: &str, answer: &Answer) -> anyhow::Result<()> {
        let Answer { status, content_type, body } = answer;
        match content_type.as_str() {
            "application/json" | "application/problem+json" => {
                self.check(method, path, *status, content_type, &answer.json()?)
            }
            "application/x-ndjson" => body.lines().try_for_each(|line| {
                let event = serde_json::from_str(line).with_context(|| format!("no JSON: {line}"))?;
                self.check(method, path, *status, content_type, &event)
            }),
            _ => self.check(method, path, *status, content_type, &json!(body)),
        }
    }
}

/// The schema, by which no member may be there that it does not name; not within a part of a schema that is `composed` with others,
/// each of which names some.
fn closed(schema: &Value, composed: bool) -> Value {
    let Some(members) = schema.as_object() else { return schema.clone() };
    let mut closes = false;
    let mut out = serde_json::Map::new();
    for (key, value) in members {
        let each = |composed| match value {
            Value::Array(all) => all.iter().map(|one| closed(one, composed)).collect(),
            one => closed(one, composed),
        };
        let value = match key.as_str() {
            "properties" => {
                closes = true;
                let all = value.as_object().into_iter().flatten();
                all.map(|(name, one)| (name.clone(), closed(one, false))).collect()
            }
            "items" | "prefixItems" | "additionalProperties" => each(false),
            "allOf" | "oneOf" | "anyOf" => {
                closes = true;
                each(true)
            }
            "$ref" => {
                closes = true;
                value.clone()
            }
            _ => value.clone(),
        };
        out.insert(key.clone(), value);
    }
    if closes && !composed && !out.contains_key("additionalProperties") {
        out.insert("unevaluatedProperties".to_owned(), Value::Bool(false));
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api() -> Api {
        let schema = json!({
            "Named": { "type": "object", "required": ["name"], "properties": { "name": { "type": "string" } } },
            "Thing": { "allOf": [
                { "$ref": "#/components/schemas/Named" },
                { "type": "object", "required": ["at"], "properties": {
                    "at": { "type": "integer" },
                    "in": { "oneOf": [{ "type": "null" }, { "$ref": "#/components/schemas/Named" }] },
                } },
            ] },
        });
        let of = json!({ "type": "array", "items": { "$ref": "#/components/schemas/Thing" } });
        let responses = json!({ "200": { "content": { "application/json": { "schema": of } } } });
        Api::new(json!({
            "paths": { "/things": { "get": { "responses": responses } } },
            "components": { "schemas": schema },
        }))
    }

    #[test]
    fn what_is_missing_of_another_type_or_unknown_is_found() {
        let api = api();
        let check = |thing: Value| api.check("get", "/things?x=1", 200, "application/json", &json!([thing]));
        for good in [
            json!({ "name": "a", "at": 1 }),
            json!({ "name": "a", "at": 1, "in": null }),
            json!({ "name": "a", "at": 1, "in": { "name": "b" } }),
        ] {
            assert!(check(good.clone()).is_ok(), "{good}: {:?}", check(good.clone()));
        }
        for bad in [
            json!({ "name": "a" }),
            json!({ "name": 7, "at": 1 }),
            json!({ "name": "a", "at": 1.5 }),
            json!({ "name": "a", "at": 1, "more": true }),
            json!({ "name": "a", "at": 1, "in": { "name": "b", "more": true } }),
        ] {
            assert!(check(bad.clone()).is_err(), "{bad}");
        }
        let not_there = api.check("get", "/nothing", 200, "application/json", &json!([]));
        assert!(not_there.is_err());
        assert!(api.check("get", "/things", 404, "application/json", &json!([])).is_err());
    }
}
