//! Whether a copy has room: all of it, or, where it shares blocks with the volume, what can't be shared and what changes meanwhile.
//!
//! While blocks are shared, room is not only the copy's affair: what the program rewrites of a shared block takes room anew, in the file that
//! it writes to. So the swap ends before the program would be told that its disk is full.

use std::{
    cell::Cell,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::StorageError;
use crate::volume::{
    VolumeError,
    built::BuiltVolume,
    place,
    source::{Need, SourceVolume},
};

/// What shared blocks take for themselves: of 64 KiB in a row, entries in the trees of XFS or btrfs of some 250 bytes.
const RECORDS_SHARE: u64 = 256;
/// What an inode takes, with its names.
const INODE_BYTES: u64 = 1024;
/// Of the volume, this part may be rewritten while it moves, and at least so many bytes.
const REWRITTEN_SHARE: u64 = 16;
const REWRITTEN_BYTES: u64 = 16 << 20;

/// What is rewritten is measured over as long.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// For as long there must be room for what is rewritten: the copy has to be removed until then.
const AHEAD: Duration = Duration::from_millis(250);

/// The room that a copy has.
#[derive(Debug)]
pub(super) struct Room {
    pool: PathBuf,
    /// Free bytes below which it ends, if it shares blocks that there would be no room to copy.
    floor_bytes: Option<u64>,
    last: Cell<Option<Look>>,
}

#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    free_bytes: u64,
    /// What was written to the copy since.
    own_bytes: u64,
    /// Free bytes below which it ends, by what was rewritten.
    floor_bytes: u64,
}

impl Room {
    /// Looks whether there is enough for a copy of `source` in `pool`. `built` is empty yet.
    pub(super) fn require(
        source: &SourceVolume,
        built: &BuiltVolume,
        pool: &Path,
    ) -> Result<Self, StorageError> {
        let need = source.need()?;
        let (free_bytes, free_inodes) = place::room(pool)?;
        let has = |bytes: u64| bytes <= free_bytes && need.inodes <= free_inodes;
        let pool = pool.to_owned();
        if has(need.bytes) {
            return Ok(Self { pool, floor_bytes: None, last: Cell::new(None) });
        }
        let mut bytes = need.bytes;
        // Only where it matters: it is found out by sharing a block.
        if let Some(sample) = source.sample()?
            && built.shares_with(&sample)?
        {
            bytes = shared_bytes(&need);
            if has(bytes) {
                let floor_bytes = Some(rewritten_bytes(&need) / 2);
                return Ok(Self { pool, floor_bytes, last: Cell::new(None) });
            }
        }
        let inodes = need.inodes;
        Err(StorageError::NoRoom { pool, bytes, inodes, free_bytes, free_inodes })
    }

    /// The room of a copy in `pool` that shares blocks, and ends below so many free bytes.
    #[cfg(test)]
    pub(super) fn with_floor(pool: &Path, floor_bytes: u64) -> Self {
        Self { pool: pool.to_owned(), floor_bytes: Some(floor_bytes), last: Cell::new(None) }
    }

    /// Whether what the program rewrites still has room; looked at all the time while blocks are shared. `own_bytes` were written to the
    /// copy since it was looked at last.
    pub(super) fn keep(&self, own_bytes: u64) -> Result<(), VolumeError> {
        let Some(least_bytes) = self.floor_bytes else { return Ok(()) };
        let (free_bytes, _) = place::room(&self.pool)?;
        let now = Instant::now();
        let fresh = Look { at: now, free_bytes, own_bytes: 0, floor_bytes: least_bytes };
        let mut last = self.last.get().unwrap_or(fresh);
        last.own_bytes += own_bytes;
        let elapsed = now - last.at;
        if elapsed >= LOOK_EVERY {
            let rewritten = last.free_bytes.saturating_sub(free_bytes).saturating_sub(last.own_bytes);
            last = Look { floor_bytes: floor_bytes(least_bytes, rewritten, elapsed), ..fresh };
        }
        self.last.set(Some(last));
        if free_bytes < last.floor_bytes {
            return Err(VolumeError::NoRoomLeft { free_bytes, floor_bytes: last.floor_bytes });
        }
        Ok(())
    }
}

/// What has to be left where so many bytes were rewritten in this time.
fn floor_bytes(least_bytes: u64, rewritten_bytes: u64, elapsed: Duration) -> u64 {
    let ahead = rewritten_bytes as f64 * AHEAD.as_secs_f64() / elapsed.as_secs_f64().max(1e-3);
    least_bytes.max(ahead as u64)
}

/// What a copy takes that shares blocks.
fn shared_bytes(need: &Need) -> u64 {
    let own = need.bytes.saturating_sub(need.shareable_bytes);
    own + need.shareable_bytes / RECORDS_SHARE + need.inodes * INODE_BYTES + rewritten_bytes(need)
}

/// What may be rewritten meanwhile; it is not known before.
fn rewritten_bytes(need: &Need) -> u64 {
    (need.bytes / REWRITTEN_SHARE).max(REWRITTEN_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_rewrites_much_needs_more_room() {
        let second = Duration::from_secs(1);
        assert_eq!(floor_bytes(1000, 0, second), 1000);
        assert_eq!(floor_bytes(1000, 2000, second), 1000);
        assert_eq!(floor_bytes(1000, 8000, second), 2000);
        assert_eq!(floor_bytes(1000, 8000, second / 8), 16_000);
    }

    #[test]
    fn what_is_shared_takes_little_room_and_what_is_not_takes_all() {
        let gib = 1 << 30;
        let all = Need { bytes: gib, shareable_bytes: gib, inodes: 1000 };
        assert_eq!(shared_bytes(&all), gib / 256 + 1_024_000 + gib / 16);
        let none = Need { shareable_bytes: 0, ..all };
        assert_eq!(shared_bytes(&none), gib + 1_024_000 + gib / 16);
        // Of a small volume more may be rewritten.
        let small = Need { bytes: 1 << 20, shareable_bytes: 1 << 20, inodes: 1 };
        assert_eq!(shared_bytes(&small), (1 << 12) + 1024 + REWRITTEN_BYTES);
    }
}
