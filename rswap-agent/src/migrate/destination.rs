//! The side at which an instance arrives.

use std::{
    io::{Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
};

use rswap_trust::Name;

use super::{
    MigrateError, codec,
    digest::MemoryDigest,
    journal::MigrationId,
    lanes::Gather,
    ledger::Ledger,
    probe,
    traits::{DestinationTask, PAGE_SIZE, TaskError},
    wire::{self, Frame, Hello, PageRecord, Tag, WireError},
};

/// How often a copy that was committed and can't be let run is tried again.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_secs(1);

/// What a peer wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    /// To send an instance.
    Offer {
        /// Of this migration.
        id: MigrationId,
        /// It needs this.
        requirements: Vec<u8>,
    },
    /// To be a lane of a migration.
    Join {
        /// Of this one.
        id: MigrationId,
        /// Which of its lanes, from 0.
        number: u8,
    },
    /// To know what became of a migration, or to tell that it is settled: it was answered.
    Answered,
}

/// Greets the peer of this name, if the link says one, and answers whatever it wants but an offer: of its own migrations only.
pub fn greet<S: Read + Write, T: DestinationTask>(
    stream: &mut S,
    task: &mut T,
    ledger: &Ledger,
    peer: Option<&Name>,
) -> Result<Opening, MigrateError> {
    let mut talk = Talk { stream, doing: "greeting" };
    let theirs = talk.expect(Tag::Hello)?;
    let theirs = postcard::from_bytes(&theirs).map_err(|_| talk.broken("a malformed Hello".into()))?;
    wire::negotiate(&Hello::ours(), &theirs).map_err(|reason| talk.broken(reason))?;
    talk.send(Tag::Hello, &postcard::to_stdvec(&Hello::ours()).unwrap_or_default())?;
    loop {
        let Frame { tag, payload } = match talk.receive() {
            // It has asked what it wanted to.
            Err(MigrateError::Link { source, .. })
                if talk.doing == "answering" && source.kind() == std::io::ErrorKind::UnexpectedEof =>
            {
                return Ok(Opening::Answered);
            }
            frame => frame?,
        };
        match tag {
            Tag::Offer => {
                let (id, requirements) = wire::parse_offer(&payload).map_err(|error| talk.wire(error))?;
                return Ok(Opening::Offer { id, requirements: requirements.to_vec() });
            }
            Tag::Join => {
                let (id, number) = wire::parse_join(&payload).map_err(|error| talk.wire(error))?;
                return Ok(Opening::Join { id, number });
            }
            Tag::Inquire => {
                talk.doing = "answering";
                let id = wire::parse_id(tag, &payload).map_err(|error| talk.wire(error))?;
                let fate = ledger.inquire_for(id, peer).inspect_err(|error| talk.refuse(error))?;
                tracing::info!(%id, ?fate, "asked for a migration's fate");
                talk.send(Tag::Fate, &[fate as u8])?;
            }
            Tag::Probe => {
                talk.doing = "answering";
                let found = task.objections(&payload);
                let found = found.map_err(|source| MigrateError::Task { doing: "answering", source })?;
                talk.send(Tag::ProbeAnswer, &probe::encoded(found))?;
            }
            Tag::Settled => {
                talk.doing = "answering";
                let id = wire::parse_id(tag, &payload).map_err(|error| talk.wire(error))?;
                ledger.settle_for(id, peer).inspect_err(|error| talk.refuse(error))?;
                talk.send(Tag::Settled, &id.0.to_le_bytes())?;
            }
            other => return Err(talk.broken(format!("{other:?} came where an offer or a question was due"))),
        }
    }
}

/// Tells a lane that it is expected.
pub fn welcome<S: Read + Write>(stream: &mut S, id: MigrationId) -> Result<(), MigrateError> {
    Talk { stream, doing: "joining a migration" }.send(Tag::Accept, &id.0.to_le_bytes())
}

/// Turns an offer away; the peer may be gone.
pub fn turn_away<S: Read + Write>(stream: &mut S, reason: &str) {
    let _ = Talk { stream, doing: "refusing" }.send(Tag::Abort, reason.as_bytes());
}

/// Takes the instance that was offered by [`greet`]'s peer, and lets it run here. Returns when it runs.
///
/// # Errors
/// Nothing of it is left here, nor ever will run here.
pub fn run<S: Read + Write + Gather, T: DestinationTask>(
    stream: &mut S,
    task: &mut T,
    ledger: &Ledger,
    id: MigrationId,
    requirements: &[u8],
) -> Result<(), MigrateError> {
    let talk = Talk { stream, doing: "offering" };
    let mut destination = Destination {
        talk,
        task,
        digest: MemoryDigest::default(),
        memory: Vec::new(),
        prepared: false,
        verified: false,
    };
    // What a peer sends may find a defect of ours: it must leave as little as any other failure.
    let attempt = AssertUnwindSafe(|| destination.until_commit(ledger, id, requirements));
    let ended = catch_unwind(attempt).unwrap_or_else(|_| {
        Err(destination.talk.broken("a defect of the destination's agent, whose log says more".into()))
    });
    if let Err(error) = ended {
        destination.roll_back(ledger, id, &error);
        return Err(error);
    }
    destination.activate();
    ledger.activated(id);
    destination.tell_activated();
    destination.wait_until_settled(ledger, id);
    Ok(())
}

struct Destination<'a, S, T> {
    talk: Talk<'a, S>,
    task: &'a mut T,
    digest: MemoryDigest,
    /// Room for a run of pages.
    memory: Vec<u8>,
    /// The ledger knows of it.
    prepared: bool,
    /// The source was told that it may commit.
    verified: bool,
}

/// The conversation with the peer.
struct Talk<'a, S> {
    stream: &'a mut S,
    doing: &'static str,
}

impl<S: Read + Write + Gather, T: DestinationTask> Destination<'_, S, T> {
    /// Everything before the commit, and writing it down: any failure leaves nothing here.
    fn until_commit(
        &mut self,
        ledger: &Ledger,
        id: MigrationId,
        requirements: &[u8],
    ) -> Result<(), MigrateError> {
        let particulars = self.task.prepare(requirements).map_err(self.task_failed())?;
        ledger.prepare(id, &particulars)?;
        self.prepared = true;
        self.task.begin().map_err(self.task_failed())?;
        self.talk.send(Tag::Accept, &id.0.to_le_bytes())?;
        let image = self.transfer()?;
        self.verify(&image)?;
        self.talk.doing = "waiting for the commit";
        self.talk.expect(Tag::Commit)?;
        if !ledger.commit(id)? {
            let problem = "the commit came after the source had been told that it never will run here";
            return Err(self.talk.broken(problem.into()));
        }
        Ok(())
    }

    /// Takes rounds of memory until the image comes, which is returned.
    fn transfer(&mut self) -> Result<Vec<u8>, MigrateError> {
        self.talk.doing = "copying memory";
        let mut first = true;
        loop {
            let Frame { tag, payload } = self.talk.receive()?;
            let was_first = std::mem::replace(&mut first, false);
            match tag {
                Tag::Lanes if was_first => self.gather(&payload)?,
                Tag::Layout => self.task.apply_layout(&payload).map_err(self.task_failed())?,
                Tag::Discard => self.discard(&payload)?,
                Tag::Pages => self.take_pages(&payload)?,
                Tag::Volume => self.task.take_volume(&payload).map_err(self.task_failed())?,
                Tag::RoundEnd => self.talk.send(Tag::RoundAck, &[])?,
                Tag::Image => return Ok(payload),
                other => return Err(self.talk.broken(format!("{other:?} came during the transfer"))),
            }
        }
    }

    fn gather(&mut self, payload: &[u8]) -> Result<(), MigrateError> {
        let lanes = wire::parse_lanes(payload).map_err(|error| self.talk.wire(error))?;
        let doing = self.talk.doing;
        self.talk.stream.gather(lanes).map_err(|source| MigrateError::Link { doing, source })
    }

    fn discard(&mut self, payload: &[u8]) -> Result<(), MigrateError> {
        for range in wire::parse_ranges(payload).map_err(|error| self.talk.wire(error))? {
            self.digest.discard(&range);
            self.task.discard(&range).map_err(self.task_failed())?;
        }
        Ok(())
    }

    fn take_pages(&mut self, payload: &[u8]) -> Result<(), MigrateError> {
        let records = wire::parse_pages(payload).map_err(|error| self.talk.wire(error))?;
        // Many are written together, neighbours as one run: a call per page costs more than its bytes. No page is twice among
        // them, as one may be the base of the other.
        for records in records.chunk_by(|a, b| b.space == a.space && b.addr > a.addr) {
            let (space, doing) = (records[0].space, self.talk.doing);
            self.memory.resize(self.memory.len().max(records.len() * PAGE_SIZE), 0);
            let mut memory = &mut self.memory[..records.len() * PAGE_SIZE];
            let mut runs = Vec::new();
            for records in records.chunk_by(|a, b| b.addr == a.addr + PAGE_SIZE as u64) {
                let (pages, rest) = memory.split_at_mut(records.len() * PAGE_SIZE);
                runs.push((records, pages));
                memory = rest;
            }
            let has_base = |records: &[PageRecord<'_>]| {
                records.iter().any(|record| record.encoding == codec::Encoding::Delta)
            };
            let with_base = runs.iter_mut().filter(|(records, _)| has_base(records));
            let mut bases: Vec<_> =
                with_base.map(|(records, pages)| (records[0].addr, &mut **pages)).collect();
            if !bases.is_empty() {
                self.task.read_runs(space, &mut bases).map_err(task_failed(doing))?;
            }
            for (records, pages) in &mut runs {
                for (record, page) in records.iter().zip(pages.chunks_exact_mut(PAGE_SIZE)) {
                    codec::decode(record.encoding, record.data, page)
                        .map_err(|error| self.talk.broken(error.to_string()))?;
                }
            }
            let decoded: Vec<_> = runs.iter().map(|(records, pages)| (records[0].addr, &**pages)).collect();
            self.task.write_runs(space, &decoded).map_err(task_failed(doing))?;
            // Read from where they were written to: the digest is of what is really there.
            let mut there: Vec<_> =
                runs.iter_mut().map(|(records, pages)| (records[0].addr, &mut **pages)).collect();
            self.task.read_runs(space, &mut there).map_err(task_failed(doing))?;
            for (addr, pages) in there {
                for (page, addr) in pages.chunks_exact(PAGE_SIZE).zip((addr..).step_by(PAGE_SIZE)) {
                    self.digest.set(space, addr, page);
                }
            }
        }
        Ok(())
    }

    fn verify(&mut self, image: &[u8]) -> Result<(), MigrateError> {
        self.talk.doing = "restoring";
        let volumes = self.task.volume_digest().map_err(self.task_failed())?;
        self.task.restore(image).map_err(self.task_failed())?;
        self.talk.doing = "verifying";
        let digest = self.digest.with_image(image) ^ volumes;
        self.verified = true;
        self.talk.send(Tag::Verified, &digest.to_le_bytes())
    }

    /// It is committed, and the copy here is the instance: there is no way back.
    fn activate(&mut self) {
        self.talk.doing = "activating";
        tracing::debug!("committed");
        while let Err(error) = self.task.activate() {
            tracing::error!(%error, "the instance is committed to this host and can't be let run yet: trying again");
            std::thread::sleep(RETRY_AFTER);
        }
    }

    fn tell_activated(&mut self) {
        // It runs here, whether the source hears of it or not; not hearing it, the source asks.
        if let Err(error) = self.talk.send(Tag::Activated, &[]) {
            tracing::warn!(%error, "the source was not told that the instance runs here: it will ask");
        }
    }

    /// The journal is kept until the source has removed its copy.
    fn wait_until_settled(&mut self, ledger: &Ledger, id: MigrationId) {
        self.talk.doing = "waiting for the source to end";
        let settled =
            self.talk.expect(Tag::Settled).and_then(|payload| self.talk.settle(id, &payload, ledger));
        if let Err(error) = settled {
            tracing::info!(%id, %error, "the source has still to say that its copy is gone");
        }
    }

    fn roll_back(&mut self, ledger: &Ledger, id: MigrationId, error: &MigrateError) {
        // Written before anything is removed: a question may come at any time. Before Verified the source can't have
        // committed, and its own word that it rolled back is as good.
        let rolled_back = matches!(error, MigrateError::Peer { .. });
        let written = match (self.prepared, self.verified && !rolled_back) {
            (false, _) => Ok(()),
            (true, true) => ledger.never(id),
            (true, false) => ledger.settle(id),
        };
        if let Err(error) = written {
            tracing::error!(%id, %error, "the end of an arrival was not written down");
        }
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
        let _ = self.talk.send(Tag::Abort, reason.as_bytes());
    }

    fn task_failed(&self) -> impl FnOnce(TaskError) -> MigrateError + use<S, T> {
        task_failed(self.talk.doing)
    }
}

fn task_failed(doing: &'static str) -> impl FnOnce(TaskError) -> MigrateError {
    move |source| MigrateError::Task { doing, source }
}

impl<S: Read + Write> Talk<'_, S> {
    fn settle(&mut self, own: MigrationId, payload: &[u8], ledger: &Ledger) -> Result<(), MigrateError> {
        let id = wire::parse_id(Tag::Settled, payload).map_err(|error| self.wire(error))?;
        if id != own {
            return Err(self.broken(format!("migration {id} was to be settled, and this is {own}")));
        }
        ledger.settle(id)?;
        self.send(Tag::Settled, &id.0.to_le_bytes())
    }

    /// Says why there is no answer; the peer may be gone.
    fn refuse(&mut self, error: &MigrateError) {
        let _ = self.send(Tag::Abort, error.to_string().as_bytes());
    }

    fn send(&mut self, tag: Tag, payload: &[u8]) -> Result<(), MigrateError> {
        wire::write_frame(self.stream, tag, payload).map_err(|error| self.wire(error))?;
        let doing = self.doing;
        self.stream.flush().map_err(|source| MigrateError::Link { doing, source })
    }

    fn receive(&mut self) -> Result<Frame, MigrateError> {
        let frame = wire::read_frame(self.stream).map_err(|error| self.wire(error))?;
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
