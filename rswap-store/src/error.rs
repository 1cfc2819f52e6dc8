//! What can go wrong with a store.

use std::path::PathBuf;

/// A store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It could not be opened.
    #[error(
        "cannot open the store {path}: check that its directory exists, can be written to, and is no other process's"
    )]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// It is of another release.
    #[error(
        "the store has version {found}, this release knows {known}: use the release that wrote it, or move it away"
    )]
    Version {
        /// The file's.
        found: u64,
        /// Ours.
        known: u64,
    },
    /// A call failed.
    #[error("cannot {attempted} in the store")]
    Call {
        /// What was attempted.
        attempted: &'static str,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// What is stored can't be read.
    #[error("cannot read {what} of the store: it is damaged, or of another release")]
    Value {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: postcard::Error,
    },
    /// The roll can't be read or written.
    #[error("the roll over hosts that the store has is damaged, or of another release")]
    Roll(#[source] serde_json::Error),
    /// There is no such tier.
    #[error("the history has {0} tiers, and no tier {1}")]
    Tier(usize, usize),
}

/// Turns any of redb's errors into ours.
pub(crate) fn failed<E: Into<redb::Error>>(attempted: &'static str) -> impl FnOnce(E) -> StoreError {
    move |source| StoreError::Call { attempted, source: Box::new(source.into()) }
}
