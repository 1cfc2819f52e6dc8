//! The side that an instance leaves.

use std::{
    io::{BufWriter, Read, Write},
    time::{Duration, Instant},
};

use super::{
    MigrateError,
    cache::SentPages,
    codec,
    converge::{self, Budget, Observed, Step},
    digest::MemoryDigest,
    journal::{Journal, MigrationId},
    lanes::Widen,
    progress::{Phase, Progress, Report},
    rules::{self, Fate, SourceState, Verdict},
    runs::runs_at_once,
    traits::{PAGE_SIZE, PageRange, SourceTask, TaskError, Written},
    wire::{self, Hello, Tag, WireError},
};
use crate::config::MigrateConfig;

/// Milliseconds of a freeze in which nothing was written, until the first one has been measured.
const FIXED_FREEZE_MS: f64 = 15.0;
/// Memory for copies of sent pages, where nobody says how much.
const USUAL_CACHE_BYTES: u64 = 256 << 20;
const READ_BYTES: usize = wire::BATCH_PAGES * PAGE_SIZE;

/// Asks the destination, on another connection, what became of a migration; for a while, if it doesn't answer.
pub type Ask<'a> = &'a mut dyn FnMut(MigrationId) -> Result<Fate, MigrateError>;

/// Moves `task` through `stream` to a destination, by `journal`, which was just begun. Returns when it runs there and is
/// gone here.
///
/// # Errors
/// With any error but [`MigrateError::InDoubt`] the instance runs here as before.
///
/// The journal is finished when the destination knows how it ended, and says [`SourceState::Ended`] when it has still
/// to be told; after [`MigrateError::InDoubt`] it says that there is still something to `ask`.
pub fn run<S: Read + Write + Widen, T: SourceTask>(
    stream: S,
    task: &mut T,
    config: &MigrateConfig,
    journal: &mut Journal<SourceState>,
    ask: Ask<'_>,
    on_progress: &mut dyn FnMut(&Progress),
) -> Result<Report, MigrateError> {
    let mut source = Source::new(stream, task, config, on_progress);
    let committed = source.prepare_commit(journal.id()).and_then(|()| source.seal()).and_then(|()| {
        // The commit point. A crash before this line's end leaves the source to go on; after it, never.
        journal.record(SourceState::Committed)
    });
    if let Err(error) = committed {
        source.roll_back(&error);
        source.end_rolled_back(journal, &error);
        return Err(error);
    }
    let in_doubt = |error| MigrateError::InDoubt(Box::new(error));
    if let Err(error) = source.hand_over() {
        tracing::warn!(id = %journal.id(), %error, "the commit was not answered: asking");
        match ask(journal.id()).map(rules::on_fate) {
            Ok(Verdict::Remove) => {}
            Ok(Verdict::Thaw) => {
                source.roll_back(&error);
                source.end_rolled_back(journal, &error);
                return Err(error);
            }
            Ok(Verdict::AskAPerson) => return Err(in_doubt(error)),
            Err(unanswered) => {
                tracing::warn!(id = %journal.id(), error = %unanswered, "nor was the question");
                return Err(in_doubt(error));
            }
        }
    }
    // It runs at the destination by now: what could not be removed here must not be taken for running.
    source.deactivate().map_err(in_doubt)?;
    // Only then the destination may forget: until here this side might have had to ask.
    match journal.record(SourceState::Ended).and_then(|()| source.settle(journal.id())) {
        Ok(()) => journal.finish(),
        Err(error) => tracing::info!(%error, "the destination will be told later that the source is gone"),
    }
    Ok(source.into_report())
}

struct Source<'a, S: Write, T> {
    stream: BufWriter<Stream<S>>,
    task: &'a mut T,
    config: &'a MigrateConfig,
    on_progress: &'a mut dyn FnMut(&Progress),
    started: Instant,
    frozen: Option<Instant>,
    doing: &'static str,
    /// The destination may have written something down.
    offered: bool,
    layout: Vec<u8>,
    digest: MemoryDigest,
    sent: SentPages,
    progress: Progress,
    report: Report,
}

/// Lets a buffered writer's stream be read as well.
struct Stream<S>(S);

impl<S: Write> Write for Stream<S> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl<'a, S: Read + Write + Widen, T: SourceTask> Source<'a, S, T> {
    fn new(
        stream: S,
        task: &'a mut T,
        config: &'a MigrateConfig,
        on_progress: &'a mut dyn FnMut(&Progress),
    ) -> Self {
        Self {
            stream: BufWriter::with_capacity(256 * 1024, Stream(stream)),
            task,
            config,
            on_progress,
            started: Instant::now(),
            frozen: None,
            doing: "offering",
            offered: false,
            layout: Vec::new(),
            digest: MemoryDigest::default(),
            sent: SentPages::new(config.cache_bytes.unwrap_or(USUAL_CACHE_BYTES)),
            progress: Progress::default(),
            report: Report::default(),
        }
    }

    /// Everything before the commit: any failure leaves the instance as it was.
    fn prepare_commit(&mut self, id: MigrationId) -> Result<(), MigrateError> {
        self.offer(id)?;
        self.transfer()?;
        self.snapshot()
    }

    fn offer(&mut self, id: MigrationId) -> Result<(), MigrateError> {
        self.enter(Phase::Offer, "offering");
        let requirements = self.task.requirements().map_err(self.task_failed())?;
        let hello = postcard::to_stdvec(&Hello::ours()).unwrap_or_default();
        self.send(Tag::Hello, &hello)?;
        let theirs = self.expect(Tag::Hello)?;
        let theirs = postcard::from_bytes(&theirs).map_err(|_| self.broken("a malformed Hello".into()))?;
        wire::negotiate(&Hello::ours(), &theirs).map_err(|reason| self.broken(reason))?;
        self.offered = true;
        self.send(Tag::Offer, &wire::write_offer(id, &requirements))?;
        let accepted = self.expect(Tag::Accept)?;
        let accepted = wire::parse_id(Tag::Accept, &accepted).map_err(|error| self.wire(error))?;
        if accepted != id {
            return Err(self.broken(format!("migration {accepted} was accepted, and {id} offered")));
        }
        self.widen(id)
    }

    /// Has what follows go over several connections, where that is worth while.
    fn widen(&mut self, id: MigrationId) -> Result<(), MigrateError> {
        let lanes = self.stream.get_mut().0.make_lanes(id);
        self.report.streams = lanes.max(1);
        if lanes == 0 {
            return Ok(());
        }
        self.send(Tag::Lanes, &[lanes])?;
        let doing = self.doing;
        self.stream.get_mut().0.spread().map_err(|source| MigrateError::Link { doing, source })
    }

    /// Pre-copy rounds, until what is left fits the budget.
    fn transfer(&mut self) -> Result<(), MigrateError> {
        self.enter(Phase::Transfer, "copying memory");
        if self.config.stop_and_copy {
            return Ok(());
        }
        self.task.start_tracking().map_err(self.task_failed())?;
        let budget =
            Budget { unavailability_ms: self.config.max_unavailability_ms, rounds: self.config.max_rounds };
        let mut last_look = Instant::now();
        let mut bytes_per_s = 0.0;
        let mut round_ms = f64::INFINITY;
        let mut least_expected_ms: Option<f64> = None;
        let mut fruitless_rounds = 0;
        for round in 0.. {
            self.check_deadline()?;
            let volumes_ms = self.copy_volumes(false)?;
            // Before it: what is written while it goes on may not be found by it.
            let look = Instant::now();
            let written = self.task.written().map_err(self.task_failed())?;
            let since_last_look = look - std::mem::replace(&mut last_look, look);
            let looked = look.elapsed();
            let bytes = written.populated_pages() * PAGE_SIZE as u64;
            self.progress.round = round;
            if round > 0 {
                self.count_dirtied(&written, since_last_look);
            }
            let began = Instant::now();
            self.send_round(&written, true)?;
            let sending = began.elapsed();
            // A round of few pages is all latency: it says nothing of the bandwidth.
            if bytes > 1 << 20 || bytes_per_s == 0.0 {
                bytes_per_s = bytes.max(1) as f64 / sending.as_secs_f64().max(1e-6);
            }
            if round == 0 {
                self.report.memory_bytes_per_s = bytes_per_s;
            }
            self.progress.bytes_per_s = bytes_per_s;
            (self.on_progress)(&self.progress);
            if round == 0 {
                continue;
            }
            round_ms = milliseconds(looked).min(round_ms);
            let observed = Observed {
                rounds: round + 1,
                bytes_per_s,
                since_look_ms: milliseconds(look.elapsed()),
                round_ms,
                dirty_bytes_per_s: self.progress.dirty_bytes_per_s,
                fixed_ms: FIXED_FREEZE_MS + volumes_ms,
                least_expected_ms,
                fruitless_rounds,
            };
            let expected = converge::expected_ms(&observed);
            let step = converge::decide(&observed, &budget);
            tracing::debug!(
                round,
                pages = written.populated_pages(),
                ?looked,
                ?sending,
                expected,
                ?step,
                "round"
            );
            fruitless_rounds = if converge::is_shorter(&observed) { 0 } else { fruitless_rounds + 1 };
            least_expected_ms = Some(least_expected_ms.map_or(expected, |least| least.min(expected)));
            self.progress.expected_unavailability_ms = expected;
            match step {
                Step::Continue => {}
                Step::Freeze => {
                    self.report.rounds = round + 1;
                    return Ok(());
                }
                Step::GiveUp => {
                    let (rounds, allowed_ms) = (round + 1, budget.unavailability_ms);
                    return Err(MigrateError::NotConverging { rounds, expected_ms: expected, allowed_ms });
                }
            }
        }
        Ok(())
    }

    /// The freeze: last delta, image, and the destination's digest.
    fn snapshot(&mut self) -> Result<(), MigrateError> {
        self.enter(Phase::Snapshot, "freezing");
        self.task.settle().map_err(self.task_failed())?;
        let frozen = Instant::now();
        self.frozen = Some(frozen);
        self.task.freeze().map_err(self.task_failed())?;
        self.step("freeze");
        self.copy_volumes(true)?;
        self.step("volumes");
        let written = self.task.written().map_err(self.task_failed())?;
        self.count_dirtied(&written, Duration::ZERO);
        self.step("last look");
        self.send_round(&written, false)?;
        self.step("last delta");
        let image = self.task.snapshot().map_err(self.task_failed())?;
        self.step("image");
        self.send(Tag::Image, &image)?;
        self.enter(Phase::Verify, "verifying");
        let here = self.digest.with_image(&image) ^ self.task.volume_digest();
        let answer = self.expect(Tag::Verified)?;
        let bytes = answer.try_into().map_err(|_| self.broken("a malformed Verified".into()))?;
        let there = u128::from_le_bytes(bytes);
        self.step("restore and verify");
        if here != there {
            return Err(MigrateError::Digest { here, there });
        }
        self.report.digest = format!("{here:032x}");
        self.check_deadline()
    }

    fn seal(&mut self) -> Result<(), MigrateError> {
        self.task.seal().map_err(self.task_failed())
    }

    /// After the commit: the destination runs.
    fn hand_over(&mut self) -> Result<(), MigrateError> {
        self.step("journal");
        self.task.give_way();
        self.enter(Phase::Activate, "handing over");
        self.send(Tag::Commit, &[])?;
        self.expect(Tag::Activated)?;
        self.step("activate");
        Ok(())
    }

    fn deactivate(&mut self) -> Result<(), MigrateError> {
        self.report.freeze_ms = self.frozen.map_or(0.0, |at| milliseconds(at.elapsed()));
        self.enter(Phase::Deactivate, "removing the source");
        self.task.destroy().map_err(self.task_failed())
    }

    /// Lets the destination forget the migration.
    fn settle(&mut self, id: MigrationId) -> Result<(), MigrateError> {
        self.send(Tag::Settled, &id.0.to_le_bytes())?;
        self.expect(Tag::Settled).map(drop)
    }

    fn into_report(self) -> Report {
        let progress = &self.progress;
        Report {
            pages_sent: progress.pages_sent,
            bytes_sent: progress.bytes_sent,
            pages_dirtied: progress.bytes_dirtied / PAGE_SIZE as u64,
            bytes_dirtied: progress.bytes_dirtied,
            total_ms: milliseconds(self.started.elapsed()),
            ..self.report
        }
    }

    fn roll_back(&mut self, error: &MigrateError) {
        if let Err(thaw) = self.task.thaw() {
            tracing::error!(error = %thaw, "the instance could not be let go after a failed migration");
        }
        // The peer may be what failed; it finds out by the closed link, too.
        let _ = self.send(Tag::Abort, error.to_string().as_bytes());
    }

    /// It goes on here, for certain. What the destination still has of it is settled with it later.
    fn end_rolled_back(&self, journal: &mut Journal<SourceState>, error: &MigrateError) {
        // It refused, and has forgotten it.
        let refused = matches!(error, MigrateError::Peer { doing: "offering", .. });
        if !self.offered || refused {
            return journal.finish();
        }
        if let Err(error) = journal.record(SourceState::Ended) {
            tracing::error!(%error, "a migration that was rolled back is not written down as such");
        }
    }

    /// Sends the layout if it changed, what was dropped, and the pages; waits for the destination to have
    /// them if `acknowledged`.
    fn send_round(&mut self, written: &Written, acknowledged: bool) -> Result<(), MigrateError> {
        let layout = self.task.layout().map_err(self.task_failed())?;
        if layout != self.layout {
            self.put(Tag::Layout, &layout)?;
            self.layout = layout;
        }
        for ranges in written.dropped.chunks(wire::DISCARD_RANGES) {
            for range in ranges {
                self.digest.discard(range);
                let end = range.start + range.pages * PAGE_SIZE as u64;
                self.sent.discard(range.space, range.start, end);
            }
            self.put(Tag::Discard, &wire::write_ranges(ranges))?;
        }
        self.progress.round_pages = written.populated_pages();
        let mut batch = Batch::default();
        let mut memory = vec![0; READ_BYTES];
        for runs in runs_at_once(&written.populated) {
            self.send_runs(&runs, &mut memory, &mut batch)?;
        }
        self.flush_batch(&mut batch)?;
        if acknowledged {
            self.send(Tag::RoundEnd, &[])?;
            self.expect(Tag::RoundAck)?;
        }
        Ok(())
    }

    /// Why nothing can be sent any more: the peer's last word, if there is one.
    fn cut(&mut self, error: WireError) -> MigrateError {
        self.last_word().unwrap_or_else(|| self.wire(error))
    }

    /// Why the peer closed the link, if it said so: a disk that fills is its reason, and the closed link only what follows.
    fn last_word(&mut self) -> Option<MigrateError> {
        let frame = wire::read_frame(&mut self.stream.get_mut().0).ok()?;
        let reason = String::from_utf8_lossy(&frame.payload).into_owned();
        (frame.tag == Tag::Abort).then_some(MigrateError::Peer { doing: self.doing, reason })
    }

    /// Sends what changed in the volumes; returns how many milliseconds a freeze is expected to take longer for them.
    fn copy_volumes(&mut self, last: bool) -> Result<f64, MigrateError> {
        let began = Instant::now();
        let deadline = self.started + Duration::from_secs(self.config.deadline_s);
        let (stream, sent) = (&mut self.stream, &mut self.progress.bytes_sent);
        let mut link = None;
        let copied = self.task.copy_volumes(last, &mut |frame| {
            if Instant::now() > deadline {
                return Err("it takes too long".into());
            }
            let written =
                wire::write_frame(stream, Tag::Volume, frame).and_then(|bytes| Ok((bytes, stream.flush()?)));
            match written {
                Ok((bytes, ())) => *sent += bytes,
                Err(error) => {
                    link = Some(error);
                    return Err("the link failed".into());
                }
            }
            Ok(())
        });
        if let Some(error) = link {
            return Err(self.cut(error));
        }
        self.check_deadline()?;
        copied.map_err(self.task_failed())?;
        // The destination reads back what it has written, and walks once more: about the same again.
        Ok(2.0 * milliseconds(began.elapsed()))
    }

    /// Sends runs of one address space that are read at once: most are of a page or two, and a call for each costs more than
    /// its bytes.
    fn send_runs(
        &mut self,
        runs: &[PageRange],
        memory: &mut [u8],
        batch: &mut Batch,
    ) -> Result<(), MigrateError> {
        let Some(&PageRange { space, .. }) = runs.first() else { return Ok(()) };
        let mut rest = &mut *memory;
        let mut places = Vec::with_capacity(runs.len());
        for run in runs {
            let (place, behind) = std::mem::take(&mut rest).split_at_mut(run.pages as usize * PAGE_SIZE);
            places.push((run.start, place));
            rest = behind;
        }
        let mut got = self.task.read_runs(space, &mut places).map_err(self.task_failed())?;
        let mut alone = Vec::new();
        for (run, (_, read)) in runs.iter().zip(places) {
            let valid = got.min(read.len());
            got -= valid;
            for (page, at) in read[..valid].chunks_exact(PAGE_SIZE).zip((run.start..).step_by(PAGE_SIZE)) {
                self.send_page(space, at, page, batch)?;
            }
            let pages = (valid / PAGE_SIZE) as u64;
            if pages < run.pages {
                alone.resize(READ_BYTES, 0);
                let start = run.start + valid as u64;
                self.send_range(&PageRange { space, start, pages: run.pages - pages }, &mut alone, batch)?;
            }
        }
        Ok(())
    }

    fn send_range(
        &mut self,
        range: &PageRange,
        memory: &mut [u8],
        batch: &mut Batch,
    ) -> Result<(), MigrateError> {
        let end = range.start + range.pages * PAGE_SIZE as u64;
        let mut at = range.start;
        while at < end {
            let wanted = memory.len().min((end - at) as usize);
            let got = self.task.read(range.space, at, &mut memory[..wanted]).map_err(self.task_failed())?;
            for page in memory[..got].chunks_exact(PAGE_SIZE) {
                self.send_page(range.space, at, page, batch)?;
                at += PAGE_SIZE as u64;
            }
            if got == 0 {
                if self.frozen.is_some() {
                    let source = TaskError::from(format!("memory at {at:#x} can't be read in the freeze"));
                    return Err(MigrateError::Task { doing: self.doing, source });
                }
                // Gone since the scan: the next one will tell.
                at += PAGE_SIZE as u64;
            }
        }
        Ok(())
    }

    fn send_page(
        &mut self,
        space: u32,
        addr: u64,
        page: &[u8],
        batch: &mut Batch,
    ) -> Result<(), MigrateError> {
        let base = self.sent.get(space, addr);
        let encoding = codec::encode(page, base, &mut batch.encoded);
        wire::push_page(&mut batch.payload, space, addr, encoding, &batch.encoded);
        self.sent.put(space, addr, page, self.progress.round > 0);
        self.digest.set(space, addr, page);
        self.progress.pages_sent += 1;
        batch.pages += 1;
        if batch.pages == wire::BATCH_PAGES {
            self.flush_batch(batch)?;
            if self.progress.pages_sent.is_multiple_of(16 * wire::BATCH_PAGES as u64) {
                self.check_deadline()?;
                (self.on_progress)(&self.progress);
            }
        }
        Ok(())
    }

    fn flush_batch(&mut self, batch: &mut Batch) -> Result<(), MigrateError> {
        if batch.pages > 0 {
            // Sent off: the destination takes them while the next ones are read.
            self.send(Tag::Pages, &batch.payload)?;
            batch.payload.clear();
            batch.pages = 0;
        }
        Ok(())
    }

    fn count_dirtied(&mut self, written: &Written, during: Duration) {
        let bytes = written.populated_pages() * PAGE_SIZE as u64;
        self.progress.bytes_dirtied += bytes;
        if !during.is_zero() {
            self.progress.dirty_bytes_per_s = bytes as f64 / during.as_secs_f64();
        }
    }

    /// Puts a frame into the buffer.
    fn put(&mut self, tag: Tag, payload: &[u8]) -> Result<(), MigrateError> {
        let sent = wire::write_frame(&mut self.stream, tag, payload).map_err(|error| self.cut(error))?;
        self.progress.bytes_sent += sent;
        Ok(())
    }

    /// Puts a frame into the buffer and sends the buffer off.
    fn send(&mut self, tag: Tag, payload: &[u8]) -> Result<(), MigrateError> {
        self.put(tag, payload)?;
        self.stream.flush().map_err(|error| self.cut(WireError::Io(error)))
    }

    fn expect(&mut self, tag: Tag) -> Result<Vec<u8>, MigrateError> {
        let frame = wire::read_frame(&mut self.stream.get_mut().0).map_err(|error| self.wire(error))?;
        match frame.tag {
            got if got == tag => Ok(frame.payload),
            Tag::Abort => {
                let reason = String::from_utf8_lossy(&frame.payload).into_owned();
                Err(MigrateError::Peer { doing: self.doing, reason })
            }
            got => Err(self.broken(format!("{got:?} came where {tag:?} was due"))),
        }
    }

    fn check_deadline(&self) -> Result<(), MigrateError> {
        let allowed = Duration::from_secs(self.config.deadline_s);
        if self.started.elapsed() > allowed {
            return Err(MigrateError::Deadline(self.config.deadline_s));
        }
        Ok(())
    }

    fn enter(&mut self, phase: Phase, doing: &'static str) {
        self.doing = doing;
        self.progress.phase = phase;
        (self.on_progress)(&self.progress);
    }

    /// Notes where the time of the freeze went.
    fn step(&mut self, name: &str) {
        let Some(frozen) = self.frozen else { return };
        let before: f64 = self.report.freeze_steps_ms.iter().map(|(_, ms)| ms).sum();
        self.report.freeze_steps_ms.push((name.to_owned(), milliseconds(frozen.elapsed()) - before));
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

/// Pages that wait to be sent together.
#[derive(Default)]
struct Batch {
    payload: Vec<u8>,
    encoded: Vec<u8>,
    pages: usize,
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
