//! Directories that belong to an instance and move with it: read in passes while it runs, written at the destination
//! into fresh directories, compared by digest.
//!
//! ```text
//! source                                     destination
//!   tree    what is there, by inode            built   inodes/ID: every file under the source's inode number
//!   blocks  what changed in a file                     tree/: names, which are links to them
//!   source  a pass -> records   -------------> built   applies them, reads back what it wrote
//!   digest  of what was sent                   digest  of what is there
//! ```
//!
//! A pass finds files that changed by their times and size, reads them, and sends the blocks whose hash is another than at
//! the last pass. What it may have missed (a file that changed while the pass ran, or that somebody maps for writing, whose
//! times need not change) is read again in the next one; the last pass is made in the freeze, so nothing is missed by it.

pub mod blocks;
pub mod built;
pub mod digest;
pub mod memory;
pub mod place;
pub mod record;
pub mod source;
pub mod tree;

use std::{io, path::Path};

/// Why a volume could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A system call failed.
    #[error("{what} {path} in a volume")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what, below the volume's root.
        path: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Something that isn't carried.
    #[error("{path} in a volume: {problem}")]
    Unsupported {
        /// What, below the volume's root.
        path: String,
        /// Why not, and what would make it possible.
        problem: &'static str,
    },
    /// The peer sent something that no source sends.
    #[error("a damaged record of a volume: {0}")]
    Damaged(&'static str),
    /// Something was written, and neither the kernel's account of what is written nor the times of its file say so.
    #[error(
        "{path} in a volume has changed at byte {offset} or soon after, and nothing told that it was written: a copy can't be relied on"
    )]
    Missed {
        /// Which file, below the volume's root.
        path: String,
        /// In the block that begins there.
        offset: u64,
    },
    /// The disk of a copy has other contents than were written to it.
    #[error("a file of the copy is another on its disk than it was written, at byte {offset} or soon after")]
    NotOnDisk {
        /// In the block that begins there.
        offset: u64,
    },
    /// Blocks are shared, and what the program rewrites of them would soon have no room.
    #[error(
        "{free_bytes} bytes are left while blocks are shared, and it ends below {floor_bytes}: what is rewritten meanwhile needs them"
    )]
    NoRoomLeft {
        /// Free where it is copied to.
        free_bytes: u64,
        /// What has to be left.
        floor_bytes: u64,
    },
    /// What a pass has found could not be sent.
    #[error("sending a volume")]
    Send(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl VolumeError {
    /// For `map_err`: a call on `path`, which is below the volume's root.
    fn io<E: Into<io::Error>>(what: &'static str, path: &[u8]) -> impl FnOnce(E) -> Self {
        let path = shown(path);
        move |error| Self::Io { what, path, source: error.into() }
    }

    /// As [`VolumeError::io`], of a path of this host.
    fn host<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.display().to_string();
        move |error| Self::Io { what, path, source: error.into() }
    }

    fn missed(path: &[u8], offset: u64) -> Self {
        Self::Missed { path: shown(path), offset }
    }

    fn unsupported(path: &[u8], problem: &'static str) -> Self {
        Self::Unsupported { path: shown(path), problem }
    }
}

/// A path for people; the root itself is a dot.
fn shown(path: &[u8]) -> String {
    if path.is_empty() { ".".to_owned() } else { String::from_utf8_lossy(path).into_owned() }
}
