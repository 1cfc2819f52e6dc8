//! Why a volume did not move.

use std::{io, path::PathBuf};

use crate::{
    instance::InstanceError,
    tracee::{TraceeError, rehome::survey::Refused},
    volume::VolumeError,
};

/// Why a volume did not move. Unless it says so, the instance goes on with the volume where it was.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Something can't be re-homed.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Refused(Vec<Refused>),
    /// The instance or the volume isn't such that it could move.
    #[error("{0}")]
    Unfit(String),
    /// The pool is too small.
    #[error(
        "no room in {}: {bytes} bytes and {inodes} inodes are needed, {free_bytes} and {free_inodes} are free",
        .pool.display()
    )]
    NoRoom {
        /// Its directory.
        pool: PathBuf,
        /// Needed.
        bytes: u64,
        /// Needed.
        inodes: u64,
        /// Free.
        free_bytes: u64,
        /// Free.
        free_inodes: u64,
    },
    /// Passes did not become short enough for a freeze.
    #[error(
        "it changes too fast: after {passes} passes it would stand still for {expected_ms:.0} ms, and {allowed_ms:.0} ms \
         are allowed (migrate.max_unavailability_ms)"
    )]
    TooFast {
        /// How many there were.
        passes: u32,
        /// How long the last one took.
        expected_ms: f64,
        /// How long it may take.
        allowed_ms: f64,
    },
    /// The new disk has not done what it was asked for in the freeze.
    #[error(
        "in {waited_ms} ms its disk has not done all that was asked of it while the instance stood still: it hangs, or others keep it busy \
         (half of migrate.freeze_limit_ms is waited)"
    )]
    DiskHangs {
        /// How long it was waited for.
        waited_ms: u128,
    },
    /// The copy is another than the volume.
    #[error("the copy is not what was copied (digest {there:032x} instead of {here:032x})")]
    Digest {
        /// Of the volume.
        here: u128,
        /// Of the copy.
        there: u128,
    },
    /// Copying failed.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Surgery failed.
    #[error(transparent)]
    Tracee(#[from] TraceeError),
    /// The cgroup could not be held.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// A file could not be read or written.
    #[error("{what}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The freeze was too long.
    #[error("{0}")]
    Watch(String),
    /// What an earlier swap of it has left could not be brought to its end: an instance that stands still for that still does.
    #[error(
        "an earlier swap of it was broken off, and could not be brought to its end: if the instance stands still for that, it does so until a \
         further try succeeds (`rswap swap`, or an agent that is started anew)"
    )]
    NotAtItsEnd {
        /// Why not.
        #[source]
        source: Box<StorageError>,
    },
    /// It failed, and so did the way back: the instance stands still, and the next swap of the volume, or the next agent, tries again.
    #[error(
        "it failed ({cause}), and the way back failed, too: the instance is whole, and stands still until a further `rswap swap` of this volume, \
         or an agent that is started anew, brings it back"
    )]
    NotRestored {
        /// Why the swap failed.
        cause: Box<StorageError>,
        /// Why the way back failed.
        #[source]
        source: Box<StorageError>,
    },
}

impl StorageError {
    pub(super) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |error| Self::Io { what: what.into(), source: error.into() }
    }
}
