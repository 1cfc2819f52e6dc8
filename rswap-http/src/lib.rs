//! What an agent's and a controller's HTTP have in common.
//!
//! ```text
//! Entrance -> serving: so many connections at a time -> [page: no stranger's page sent it] -> routes -> Json, or an ApiError
//!                                                                                             |
//!                                        openapi: the document, made from the same routes <---'
//! ```

pub mod openapi;
pub mod page;
mod problem;
pub mod serving;

pub use problem::{ApiError, PROBLEM_JSON};

/// An error with its causes, as one text.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
