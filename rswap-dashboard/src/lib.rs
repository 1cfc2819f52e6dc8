//! The page that agents and controllers serve to browsers: its files, and how they are served.
//!
//! Everything is in the binary. The page asks nobody but the server that it came from: the policy sent with each file forbids the
//! browser any other request, and any script or style that is not one of these files.
//!
//! ```text
//! page/ (ours) ----------------------------------.
//!                                                 +-- embedded --> /, /page/NAME
//! npm ci (cargo xtask build) -> target/dashboard -'
//! ```

mod local;

use axum::{
    Extension,
    extract::Path,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use utoipa_axum::{router::OpenApiRouter, routes};

pub use local::is_local;

/// What a browser may do with the page: nothing that doesn't come from where the page came from.
pub const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Name and content.
const FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/files.rs"));

const WITHOUT_LIBRARIES: &str = "This rswap was built without the dashboard: `cargo xtask build` builds it with it. \
                                 The JSON routes are there; docs/api.md lists them.\n";
const TEXT: &str = "text/plain; charset=utf-8";

/// Whose routes the page shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// One host's.
    Agent,
    /// A fleet's.
    Controller,
}

impl Of {
    /// The file that is sent for a name: the page begins with another script for each.
    fn named(self, name: &str) -> &str {
        match (name, self) {
            ("start.js", Self::Agent) => "host.js",
            ("start.js", Self::Controller) => "fleet.js",
            (name, _) => name,
        }
    }
}

/// `/`, and what the page is made of: `/page/NAME`.
pub fn routes<S: Clone + Send + Sync + 'static>(of: Of) -> OpenApiRouter<S> {
    OpenApiRouter::new().routes(routes!(page)).routes(routes!(part)).layer(Extension(of))
}

/// The dashboard: a page that shows the other routes in a browser
#[utoipa::path(
    get,
    path = "/",
    responses(
        (status = 200, description = "The page", body = String, content_type = "text/html; charset=utf-8"),
        (status = 404, description = "This rswap was built without it", body = String, content_type = "text/plain; charset=utf-8")
    )
)]
async fn page() -> Response {
    file("index.html")
}

/// What the dashboard is made of: scripts, styles, pictures
#[utoipa::path(
    get,
    path = "/page/{name}",
    params(("name" = String, Path, description = "The file, as the page names it")),
    responses(
        (status = 200, description = "The file", content(
            (String = "text/javascript; charset=utf-8"),
            (String = "text/css; charset=utf-8"),
            (String = "image/svg+xml")
        )),
        (status = 404, description = "There is no such file", body = String, content_type = "text/plain; charset=utf-8")
    )
)]
async fn part(Extension(of): Extension<Of>, Path(name): Path<String>) -> Response {
    file(of.named(&name))
}

fn file(name: &str) -> Response {
    if !cfg!(rswap_dashboard_libraries) {
        return (StatusCode::NOT_FOUND, [(header::CONTENT_TYPE, TEXT)], WITHOUT_LIBRARIES).into_response();
    }
    let Some((_, content)) = FILES.iter().find(|(known, _)| *known == name) else {
        return (StatusCode::NOT_FOUND, [(header::CONTENT_TYPE, TEXT)], "there is no such file\n")
            .into_response();
    };
    let headers = [
        (header::CONTENT_TYPE, media_type(name)),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // Another rswap may serve here next time.
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, *content).into_response()
}

fn media_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => TEXT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names within these quotes, with what is before and after them.
    fn named<'t>(text: &'t str, before: &str, after: &str) -> Vec<&'t str> {
        text.split(before).skip(1).filter_map(|rest| rest.split(after).next()).collect()
    }

    #[test]
    fn every_file_that_the_page_names_is_there_and_is_sent_with_the_policy() {
        if !cfg!(rswap_dashboard_libraries) {
            return;
        }
        let mut names = vec!["index.html"];
        for (name, content) in FILES {
            let text = std::str::from_utf8(content).unwrap();
            match name.rsplit_once('.').map(|(_, extension)| extension) {
                Some("html") => names.extend(named(text, "\"page/", "\"")),
                // The libraries import nothing.
                Some("js") => names.extend(named(text, " from \"./", "\"")),
                _ => {}
            }
        }
        assert!(names.len() > 20, "{names:?}");
        for (name, of) in names.iter().flat_map(|name| [(name, Of::Agent), (name, Of::Controller)]) {
            let sent = file(of.named(name));
            assert_eq!(sent.status(), StatusCode::OK, "{name}");
            assert_eq!(sent.headers()[header::CONTENT_SECURITY_POLICY], POLICY);
            assert_ne!(sent.headers()[header::CONTENT_TYPE], TEXT, "{name}");
        }
    }

    #[test]
    fn there_are_no_other_files() {
        for name in ["Cargo.toml", "../Cargo.toml", "..", ""] {
            assert_eq!(file(name).status(), StatusCode::NOT_FOUND, "{name:?}");
        }
    }
}
