//! A host as a pool: write tracking, delta codec, wire frames, source, destination, verify, journal.
//!
//! ```text
//! source                                        destination
//!   offer     Hello, Offer  ------------------>   prepare: compare, make a stub
//!             <------------------ Accept/Refuse
//!   transfer  Layout, Discard, Pages, RoundEnd ->  apply, write, read back
//!             <------------------------ RoundAck   (again until little is written)
//!   snapshot  freeze; last delta, Image -------->  restore, all but running
//!   verify    <----------------------- Verified   digests of all memory and of the image
//!   COMMIT    journal; Commit ------------------>  journal; run
//!   end       <---------------------- Activated
//!             destroy
//! ```
//!
//! Before the commit is journalled at the source, any failure thaws the source, and the destination
//! forgets what it built. Afterwards the source stays frozen until the destination has said what became of
//! the migration ([`resolve`]), or a person has (`rswap recover`). The destination runs only what it has
//! verified, only after it has journalled the commit, and never what it has called off before; so there are
//! never two running copies. The decisions are in [`rules`].

pub mod cache;
pub mod converge;
pub mod destination;
pub mod digest;
pub mod guard;
pub mod journal;
pub mod lanes;
pub mod ledger;
pub mod link;
pub mod links;
pub mod linux;
pub mod linux_destination;
pub mod linux_source;
pub mod meeting;
pub mod offer;
pub mod probe;
pub mod progress;
pub mod recovery;
pub mod resolve;
pub mod rules;
mod runs;
pub mod source;
pub mod source_process;
pub mod traits;
pub mod volumes;
pub mod wire;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use rswap_codec as codec;

pub use progress::{Phase, Progress, Report};
pub use traits::{DestinationTask, PAGE_SIZE, PageRange, SourceTask, TaskError, Written};

/// Why a migration did not happen.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// Talking to the peer failed.
    #[error("the link to the peer failed while {doing}")]
    Link {
        /// In which phase.
        doing: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The peer sent something that it must not send.
    #[error("the peer broke the protocol while {doing}: {problem}")]
    Protocol {
        /// In which phase.
        doing: &'static str,
        /// What was wrong.
        problem: String,
    },
    /// The peer said no, or had a failure.
    #[error("the peer refused while {doing}: {reason}")]
    Peer {
        /// In which phase.
        doing: &'static str,
        /// Its words.
        reason: String,
    },
    /// Our own instance could not be read, frozen or built.
    #[error("the instance failed while {doing}")]
    Task {
        /// In which phase.
        doing: &'static str,
        /// Why.
        source: TaskError,
    },
    /// The two copies are not the same.
    #[error("the copy at the destination is not the same: digest {there:032x} there, {here:032x} here")]
    Digest {
        /// Ours.
        here: u128,
        /// The peer's.
        there: u128,
    },
    /// Memory is written faster than it can be sent.
    #[error(
        "it does not converge: after {rounds} rounds {expected_ms:.0} ms of unavailability are expected and \
         {allowed_ms} allowed; try when less is written, or raise migrate.max_unavailability_ms"
    )]
    NotConverging {
        /// How many rounds were made.
        rounds: u32,
        /// Milliseconds of unavailability to be expected.
        expected_ms: f64,
        /// Milliseconds allowed.
        allowed_ms: u64,
    },
    /// It took too long.
    #[error("not committed within {0} s (migrate.deadline_s): rolled back")]
    Deadline(u64),
    /// The journal could not be written.
    #[error("writing the journal {path}")]
    Journal {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The commit was sent, and the destination's answer did not come: only it knows whether it runs.
    #[error(
        "in doubt: the commit was sent and not answered; the instance stays frozen here until the destination can \
         be asked, or until `rswap recover`"
    )]
    InDoubt(#[source] Box<MigrateError>),
}
