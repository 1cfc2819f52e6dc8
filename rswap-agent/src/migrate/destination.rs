//! The side at which an instance arrives.

use std::{
    io::{Read, Write},
    path::Path,
};

use super::{
    MigrateError, codec,
    digest::MemoryDigest,
    journal::{Journal, Role, State},
    probe,
    traits::{DestinationTask, PAGE_SIZE, PageRange, TaskError},
    wire::{self, Frame, Hello, Tag, WireError},
};

/// Takes an instance from `stream` and lets it run here. Returns when it runs.
///
/// # Errors
/// Nothing of it is left here, with one exception: an error after the commit, which the journal shows.
pub fn run<S: Read + Write, T: DestinationTask>(
    stream: S,
    task: &mut T,
    journal_dir: &Path,
    name: &str,
) -> Result<(), MigrateError> {
    let journal = Journal::begin(journal_dir, name, Role::Destination)?;
    let mut destination =
        Destination { stream, task, doing: "offering", digest: MemoryDigest::default(), fresh: Vec::new() };
    let committed = destination.until_commit().and_then(|()| journal.record(State::Committed));
    if let Err(error) = committed {
        destination.roll_back(&error);
        journal.finish();
        return Err(error);
    }
    destination.activate()?;
    journal.finish();
    Ok(())
}

struct Destination<'a, S, T> {
    stream: S,
    task: &'a mut T,
    doing: &'static str,
    digest: MemoryDigest,
    /// Pages that came and were not read back yet.
    fresh: Vec<PageRange>,
}

impl<S: Read + Write, T: DestinationTask> Destination<'_, S, T> {
    /// Everything before the commit: any failure leaves nothing here.
    fn until_commit(&mut self) -> Result<(), MigrateError> {
        self.offer()?;
        let image = self.transfer()?;
        self.verify(&image)?;
        self.doing = "waiting for the commit";
        self.expect(Tag::Commit).map(|_| ())
    }

    fn offer(&mut self) -> Result<(), MigrateError> {
        let theirs = self.expect(Tag::Hello)?;
        let theirs = postcard::from_bytes(&theirs).map_err(|_| self.broken("a malformed Hello".into()))?;
        wire::negotiate(&Hello::ours(), &theirs).map_err(|reason| self.broken(reason))?;
        self.send(Tag::Hello, &postcard::to_stdvec(&Hello::ours()).unwrap_or_default())?;
        let requirements = probe::questions_before_offer(&mut self.stream, self.task)?;
        self.task.prepare(&requirements).map_err(self.task_failed())?;
        self.send(Tag::Accept, &[])
    }

    /// Takes rounds of memory until the image comes, which is returned.
    fn transfer(&mut self) -> Result<Vec<u8>, MigrateError> {
        self.doing = "copying memory";
        loop {
            let Frame { tag, payload } = self.receive()?;
            match tag {
                Tag::Layout => self.task.apply_layout(&payload).map_err(self.task_failed())?,
                Tag::Discard => self.discard(&payload)?,
                Tag::Pages => self.take_pages(&payload)?,
                Tag::Volume => self.task.take_volume(&payload).map_err(self.task_failed())?,
                Tag::RoundEnd => {
                    self.read_back()?;
                    self.send(Tag::RoundAck, &[])?;
                }
                Tag::Image => return Ok(payload),
                other => return Err(self.broken(format!("{other:?} came during the transfer"))),
            }
        }
    }

    fn discard(&mut self, payload: &[u8]) -> Result<(), MigrateError> {
        // Pages that were sent before are part of no digest once they are gone.
        self.read_back()?;
        for range in wire::parse_ranges(payload).map_err(|error| self.wire(error))? {
            self.digest.discard(&range);
            self.task.discard(&range).map_err(self.task_failed())?;
        }
        Ok(())
    }

    fn take_pages(&mut self, payload: &[u8]) -> Result<(), MigrateError> {
        let records = wire::parse_pages(payload).map_err(|error| self.wire(error))?;
        // Neighbours are written together: a call per page costs more than its bytes.
        for run in records.chunk_by(|a, b| b.space == a.space && b.addr == a.addr + PAGE_SIZE as u64) {
            let (space, addr) = (run[0].space, run[0].addr);
            let mut memory = vec![0; run.len() * PAGE_SIZE];
            if run.iter().any(|record| record.encoding == codec::Encoding::Delta) {
                self.task.read(space, addr, &mut memory).map_err(self.task_failed())?;
            }
            for (record, page) in run.iter().zip(memory.chunks_exact_mut(PAGE_SIZE)) {
                codec::decode(record.encoding, record.data, page)
                    .map_err(|error| self.broken(error.to_string()))?;
            }
            self.task.write(space, addr, &memory).map_err(self.task_failed())?;
            self.fresh.push(PageRange { space, start: addr, pages: run.len() as u64 });
        }
        Ok(())
    }

    /// Reads what came from the memory that it was written to: the digest is of what is really there.
    fn read_back(&mut self) -> Result<(), MigrateError> {
        let mut memory = vec![0; wire::BATCH_PAGES * PAGE_SIZE];
        for PageRange { space, start, pages } in std::mem::take(&mut self.fresh) {
            let memory = &mut memory[..pages as usize * PAGE_SIZE];
            self.task.read(space, start, memory).map_err(self.task_failed())?;
            for (page, addr) in memory.chunks_exact(PAGE_SIZE).zip((start..).step_by(PAGE_SIZE)) {
                self.digest.set(space, addr, page);
            }
        }
        Ok(())
    }

    fn verify(&mut self, image: &[u8]) -> Result<(), MigrateError> {
        self.doing = "restoring";
        // Before the task is restored: from then on the kernel writes to its memory, too.
        self.read_back()?;
        let volumes = self.task.volume_digest().map_err(self.task_failed())?;
        self.task.restore(image).map_err(self.task_failed())?;
        self.doing = "verifying";
        let digest = self.digest.with_image(image) ^ volumes;
        self.send(Tag::Verified, &digest.to_le_bytes())
    }

    fn activate(&mut self) -> Result<(), MigrateError> {
        self.doing = "activating";
        tracing::debug!("committed");
        self.task.activate().map_err(self.task_failed())?;
        // It runs here, whether the source hears of it or not; not hearing it, the source stays frozen.
        if let Err(error) = self.send(Tag::Activated, &[]) {
            tracing::error!(%error, "the source was not told that the instance runs here");
        }
        Ok(())
    }

    fn roll_back(&mut self, error: &MigrateError) {
        if let Err(error) = self.task.abandon() {
            tracing::error!(%error, "a failed arrival could not be removed");
        }
        let mut reason = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            reason = format!("{reason}: {error}");
            cause = error.source();
        }
        reason.truncate(reason.floor_char_boundary(Tag::Abort.limit()));
        // The peer may be what failed; it finds out by the closed link, too.
        let _ = self.send(Tag::Abort, reason.as_bytes());
    }

    fn send(&mut self, tag: Tag, payload: &[u8]) -> Result<(), MigrateError> {
        wire::write_frame(&mut self.stream, tag, payload).map_err(|error| self.wire(error))?;
        let doing = self.doing;
        self.stream.flush().map_err(|source| MigrateError::Link { doing, source })
    }

    fn receive(&mut self) -> Result<Frame, MigrateError> {
        let frame = wire::read_frame(&mut self.stream).map_err(|error| self.wire(error))?;
        if frame.tag == Tag::Abort {
            let reason = String::from_utf8_lossy(&frame.payload).into_owned();
            return Err(MigrateError::Peer { doing: self.doing, reason });
        }
        Ok(frame)
    }

    fn expect(&mut self, tag: Tag) -> Result<Vec<u8>, MigrateError> {
        match self.receive()? {
            frame if frame.tag == tag => Ok(frame.payload),
            frame => Err(self.broken(format!("{:?} came where {tag:?} was due", frame.tag))),
        }
    }

    fn task_failed(&self) -> impl FnOnce(TaskError) -> MigrateError + use<S, T> {
        let doing = self.doing;
        move |source| MigrateError::Task { doing, source }
    }

    fn broken(&self, problem: String) -> MigrateError {
        MigrateError::Protocol { doing: self.doing, problem }
    }

    fn wire(&self, error: WireError) -> MigrateError {
        match error {
            WireError::Io(source) => MigrateError::Link { doing: self.doing, source },
            other => self.broken(other.to_string()),
        }
    }
}
