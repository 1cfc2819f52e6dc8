//! What the migration engine needs of the two ends: a running instance to read from, and one to build.
//!
//! The engine knows pages, rounds, frames and the commit point; it knows nothing of processes. `layout`,
//! `requirements` and `snapshot` are bytes that only the two implementations understand.
//!
//! A round is always: [`SourceTask::written`], [`SourceTask::layout`], then reads. On the wire, and so at the
//! destination: the layout (only if it changed), then the discards, then the pages.

use super::offer::Objection;

/// Bytes in a page: the unit of tracking, of the codec and of the digest.
pub use rswap_codec::PAGE_SIZE;

/// A run of pages of one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// Which address space (process), as numbered by the layout.
    pub space: u32,
    /// Address of the first byte; a multiple of [`PAGE_SIZE`].
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
}

/// What a scan of the write tracker found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Pages that must be sent. No page is in it twice.
    pub populated: Vec<PageRange>,
    /// Pages that an earlier scan reported as populated and that are no longer (unmapped, or given back with
    /// `madvise`): the destination must discard them. Pages that were never reported may be in it too.
    ///
    /// `dropped` is applied before `populated`, and a page may be in both: that says that its mapping was
    /// replaced by another one, so the destination's copy is no base for a delta. Every page at whose address
    /// `apply_layout` loses the contents has to be in here.
    pub dropped: Vec<PageRange>,
}

impl Written {
    /// Number of pages to send.
    pub fn populated_pages(&self) -> u64 {
        self.populated.iter().map(|range| range.pages).sum()
    }
}

/// Whatever went wrong in a task; its text says what was attempted, on what, and what to do.
pub type TaskError = Box<dyn std::error::Error + Send + Sync>;

/// The running instance at the source.
pub trait SourceTask {
    /// What the destination must be able to do; opaque, it goes in the offer. Refuses what can't migrate.
    /// Nothing has been touched yet, and this must not touch anything either.
    fn requirements(&mut self) -> Result<Vec<u8>, TaskError>;

    /// Starts tracking writes.
    fn start_tracking(&mut self) -> Result<(), TaskError>;

    /// The address spaces' mappings, opaque; called after `written` of the same round.
    fn layout(&mut self) -> Result<Vec<u8>, TaskError>;

    /// What has to be sent: at the first call all that is populated, later all written since the last call.
    /// Re-arms the tracker.
    fn written(&mut self) -> Result<Written, TaskError>;

    /// Sends what changed in the instance's volumes since the last call, frame by frame; at the first, all of them. With
    /// `last`, the task is frozen, and no other call comes.
    fn copy_volumes(
        &mut self,
        _last: bool,
        _send: &mut dyn FnMut(&[u8]) -> Result<(), TaskError>,
    ) -> Result<(), TaskError> {
        Ok(())
    }

    /// The digest of the volumes as they were sent.
    fn volume_digest(&self) -> u128 {
        0
    }

    /// Reads memory; `addr` and `buf.len()` are multiples of [`PAGE_SIZE`].
    ///
    /// Returns how many bytes at the front of `buf` are valid, a multiple of [`PAGE_SIZE`]. Fewer than
    /// `buf.len()` says that the page after them is **gone**: unmapped since the scan, or outside the
    /// mappings of the last `layout` (the destination has no place for it). The engine skips that page for
    /// this round and goes on after it; the next `written` tells the truth about it, as populated or as
    /// dropped. While the task is frozen nothing can be gone, and the engine takes it as an error.
    fn read(&mut self, space: u32, addr: u64, buf: &mut [u8]) -> Result<usize, TaskError>;

    /// The same for several runs of an address space. What it returns is counted from the first run on; of what follows, nothing
    /// is said.
    fn read_runs(&mut self, space: u32, runs: &mut [(u64, &mut [u8])]) -> Result<usize, TaskError> {
        let mut all = 0;
        for (addr, buf) in runs {
            let got = self.read(space, *addr, buf)?;
            all += got;
            if got < buf.len() {
                break;
            }
        }
        Ok(all)
    }

    /// Right before the freeze, the task still running: lets what can't be carried come to its end. When it fails, the
    /// engine calls `thaw`.
    fn settle(&mut self) -> Result<(), TaskError> {
        Ok(())
    }

    /// Stops every thread. When it fails, the engine calls `thaw`.
    fn freeze(&mut self) -> Result<(), TaskError>;

    /// The task's image without its memory, opaque; only when frozen. From here on the task stands still by itself, whatever
    /// becomes of this process, until `thaw`.
    fn snapshot(&mut self) -> Result<Vec<u8>, TaskError>;

    /// Right before the commit is journalled: whoever would let the task go on without asking no longer does.
    ///
    /// # Errors
    /// It goes on already.
    fn seal(&mut self) -> Result<(), TaskError> {
        Ok(())
    }

    /// Lets the task run again and stops tracking; idempotent, called on every failure before the commit,
    /// also if the task was never tracked or frozen.
    fn thaw(&mut self) -> Result<(), TaskError>;

    /// The task never runs here again: gives up what the destination can't have as long as it is held here. Called right
    /// after the commit.
    fn give_way(&mut self) {}

    /// Ends the frozen task for good; only after the commit, when the destination runs.
    fn destroy(&mut self) -> Result<(), TaskError>;
}

/// The instance being built at the destination. Nothing but the engine changes its memory until `activate`.
pub trait DestinationTask {
    /// What this host would refuse, by looking only: nothing is made.
    fn objections(&mut self, _requirements: &[u8]) -> Result<Vec<Objection>, TaskError> {
        Ok(Vec::new())
    }

    /// Refuses here, by name, what this host can't do. After a refusal, and after a crash before `begin`, nothing is
    /// left behind. Returns what the journal has to keep, so that the task can be found again after a crash.
    fn prepare(&mut self, requirements: &[u8]) -> Result<Vec<u8>, TaskError>;

    /// The journal knows of it: begins to build.
    fn begin(&mut self) -> Result<(), TaskError> {
        Ok(())
    }

    /// Brings the mappings to this layout. The contents of pages that lie in both stay, unless the source
    /// reports them as dropped in the same round.
    fn apply_layout(&mut self, layout: &[u8]) -> Result<(), TaskError>;

    /// Takes what [`SourceTask::copy_volumes`] sends.
    fn take_volume(&mut self, _frame: &[u8]) -> Result<(), TaskError> {
        Err("this instance has no volumes".into())
    }

    /// The digest of the volumes as they are, after the last of them came.
    fn volume_digest(&mut self) -> Result<u128, TaskError> {
        Ok(0)
    }

    /// Writes whole pages, inside the last layout, whatever the protection of their mapping.
    fn write(&mut self, space: u32, addr: u64, data: &[u8]) -> Result<(), TaskError>;

    /// The same for several runs of an address space.
    fn write_runs(&mut self, space: u32, runs: &[(u64, &[u8])]) -> Result<(), TaskError> {
        runs.iter().try_for_each(|(addr, data)| self.write(space, *addr, data))
    }

    /// Makes pages unpopulated. Those outside the layout (already unmapped by it) are no error.
    fn discard(&mut self, range: &PageRange) -> Result<(), TaskError>;

    /// Reads back whole pages that were written: for the digest, and as the base of a delta.
    fn read(&mut self, space: u32, addr: u64, buf: &mut [u8]) -> Result<(), TaskError>;

    /// The same for several runs of an address space.
    fn read_runs(&mut self, space: u32, runs: &mut [(u64, &mut [u8])]) -> Result<(), TaskError> {
        runs.iter_mut().try_for_each(|(addr, buf)| self.read(space, *addr, buf))
    }

    /// Restores everything but running. Afterwards the task stands still by itself, whatever becomes of this process.
    fn restore(&mut self, image: &[u8]) -> Result<(), TaskError>;

    /// Lets it run; only after the commit. When it fails, it is called again.
    fn activate(&mut self) -> Result<(), TaskError>;

    /// Forgets everything; idempotent, never called after the commit.
    fn abandon(&mut self) -> Result<(), TaskError>;
}
