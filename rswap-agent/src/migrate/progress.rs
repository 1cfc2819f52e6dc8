//! How far a migration is, and what it came to.

use serde::{Deserialize, Serialize};

/// The steps of a migration, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Versions, capabilities and requirements are compared.
    #[default]
    Offer,
    /// Memory is sent while the instance runs.
    Transfer,
    /// The instance is frozen; the last delta and the image are sent.
    Snapshot,
    /// Digests are compared.
    Verify,
    /// The destination takes over.
    Activate,
    /// The source's copy is removed.
    Deactivate,
}

/// How far a migration is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The present step.
    pub phase: Phase,
    /// Pre-copy round, from 0.
    pub round: u32,
    /// Pages to be sent in this round.
    pub round_pages: u64,
    /// Pages sent so far in all rounds.
    pub pages_sent: u64,
    /// Bytes sent so far, on the wire.
    pub bytes_sent: u64,
    /// Bytes of the pages written since the first round, as often as they were written.
    pub bytes_dirtied: u64,
    /// Bytes of memory transferred per second in the last round.
    pub bytes_per_s: f64,
    /// Bytes of memory written per second by the instance in the last round.
    pub dirty_bytes_per_s: f64,
    /// Unavailability if it were frozen now, in milliseconds.
    pub expected_unavailability_ms: f64,
}

/// What a migration came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Rounds before the freeze.
    pub rounds: u32,
    /// Pages sent in all.
    pub pages_sent: u64,
    /// Bytes sent in all, on the wire.
    pub bytes_sent: u64,
    /// Pages written by the instance while it was being copied.
    pub pages_dirtied: u64,
    /// The same in bytes.
    pub bytes_dirtied: u64,
    /// Memory transferred per second in the first round, which sends all that is populated, in bytes.
    pub memory_bytes_per_s: f64,
    /// From the freeze until the destination's word that it runs, in milliseconds.
    pub freeze_ms: f64,
    /// From the offer to the end, in milliseconds.
    pub total_ms: f64,
    /// Connections that carried it.
    pub streams: u8,
    /// Digest of all memory and of the task's state, in hexadecimal, the same on both sides.
    pub digest: String,
    /// Where the time of the freeze went: (step, milliseconds).
    pub freeze_steps_ms: Vec<(String, f64)>,
}
