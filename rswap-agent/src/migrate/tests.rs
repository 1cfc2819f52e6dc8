//! Whole migrations over an in-memory pipe, of arrays of pages, without privileges.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use super::{
    MigrateError, Report,
    destination::{self, Opening},
    journal::{self, Journal, MigrationId},
    lanes::{Gather, Widen},
    ledger::Ledger,
    resolve::Inquiry,
    rules::{DestinationState, Fate, SourceState},
    source,
    traits::{DestinationTask, PAGE_SIZE, PageRange, SourceTask, TaskError, Written},
    wire::Tag,
};
use crate::config::MigrateConfig;

type Memory = BTreeMap<u64, Vec<u8>>;

fn random_page(random: &mut fastrand::Rng) -> Vec<u8> {
    match random.u32(..4) {
        0 => vec![0; PAGE_SIZE],
        1 => vec![random.u8(..); PAGE_SIZE],
        _ => std::iter::repeat_with(|| random.u8(..)).take(PAGE_SIZE).collect(),
    }
}

/// A program that changes its memory between the looks.
pub(super) struct Program {
    memory: Memory,
    dirty: Vec<u64>,
    dropped: Vec<u64>,
    random: fastrand::Rng,
    looks: u32,
    busy: u64,
    frozen: bool,
    destroyed: bool,
    thawed: bool,
    /// The digest of its volumes.
    volumes: u128,
}

impl Program {
    pub(super) fn new(seed: u64, pages: u64, busy: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let memory: Memory =
            (0..pages).map(|page| (page * PAGE_SIZE as u64, random_page(&mut random))).collect();
        let dirty = memory.keys().copied().collect();
        let (dropped, looks) = (Vec::new(), 0);
        let (frozen, destroyed, thawed) = (false, false, false);
        let volumes = 7;
        Self { memory, dirty, dropped, random, looks, busy, frozen, destroyed, thawed, volumes }
    }

    /// It goes on where it was.
    pub(super) fn goes_on(&self) -> bool {
        self.thawed && !self.destroyed
    }

    /// It is gone, and `copy` is what it was.
    pub(super) fn became(&self, copy: &Copy) -> bool {
        self.destroyed && !self.thawed && copy.running && copy.memory == self.memory
    }

    fn run_a_little(&mut self) {
        for _ in 0..self.busy {
            let page = self.random.u64(..400) * PAGE_SIZE as u64;
            match self.random.u32(..4) {
                0 => {
                    self.memory.remove(&page);
                    self.dirty.retain(|dirty| *dirty != page);
                    self.dropped.push(page);
                }
                1 => drop(self.memory.insert(page, random_page(&mut self.random))),
                _ => {
                    let contents = self.memory.entry(page).or_insert_with(|| vec![0; PAGE_SIZE]);
                    contents[self.random.usize(..PAGE_SIZE)] ^= 0x5a;
                }
            }
            if self.memory.contains_key(&page) && !self.dirty.contains(&page) {
                self.dirty.push(page);
            }
        }
    }
}

fn one_page(start: u64) -> PageRange {
    PageRange { space: 0, start, pages: 1 }
}

impl SourceTask for Program {
    fn requirements(&mut self) -> Result<Vec<u8>, TaskError> {
        Ok(b"needs".to_vec())
    }
    fn start_tracking(&mut self) -> Result<(), TaskError> {
        self.dirty = self.memory.keys().copied().collect();
        Ok(())
    }
    fn layout(&mut self) -> Result<Vec<u8>, TaskError> {
        Ok(self.looks.to_le_bytes().to_vec())
    }
    fn written(&mut self) -> Result<Written, TaskError> {
        self.looks += 1;
        let dropped = std::mem::take(&mut self.dropped).into_iter().map(one_page).collect();
        let populated = std::mem::take(&mut self.dirty).into_iter().map(one_page).collect();
        if !self.frozen {
            self.run_a_little();
        }
        Ok(Written { populated, dropped })
    }
    fn read(&mut self, _space: u32, addr: u64, buf: &mut [u8]) -> Result<usize, TaskError> {
        match self.memory.get(&addr) {
            Some(page) => {
                buf[..PAGE_SIZE].copy_from_slice(page);
                Ok(PAGE_SIZE)
            }
            None => Ok(0),
        }
    }
    fn volume_digest(&self) -> u128 {
        self.volumes
    }
    fn freeze(&mut self) -> Result<(), TaskError> {
        self.frozen = true;
        Ok(())
    }
    fn snapshot(&mut self) -> Result<Vec<u8>, TaskError> {
        assert!(self.frozen, "a snapshot is taken of a frozen program only");
        Ok(b"image".to_vec())
    }
    fn thaw(&mut self) -> Result<(), TaskError> {
        assert!(!self.destroyed);
        (self.frozen, self.thawed) = (false, true);
        Ok(())
    }
    fn destroy(&mut self) -> Result<(), TaskError> {
        assert!(self.frozen && !self.thawed);
        self.destroyed = true;
        Ok(())
    }
}

#[derive(Default)]
pub(super) struct Copy {
    memory: Memory,
    image: Option<Vec<u8>>,
    running: bool,
    prepared: bool,
    abandoned: bool,
    /// How often it can't be let run before it can.
    stuck: u32,
    /// What of the digest of its volumes is another than the source's.
    damage: u128,
    /// It panics at the image.
    defect: bool,
}

impl Copy {
    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    pub(super) fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }
}

impl DestinationTask for Copy {
    fn prepare(&mut self, requirements: &[u8]) -> Result<Vec<u8>, TaskError> {
        self.prepared = true;
        if requirements == b"needs" {
            Ok(br#"{ "here": true }"#.to_vec())
        } else {
            Err("can't do that".into())
        }
    }
    fn apply_layout(&mut self, _layout: &[u8]) -> Result<(), TaskError> {
        Ok(())
    }
    fn write(&mut self, _space: u32, addr: u64, data: &[u8]) -> Result<(), TaskError> {
        for (page, at) in data.chunks_exact(PAGE_SIZE).zip((addr..).step_by(PAGE_SIZE)) {
            self.memory.insert(at, page.to_vec());
        }
        Ok(())
    }
    fn discard(&mut self, range: &PageRange) -> Result<(), TaskError> {
        self.memory.remove(&range.start);
        Ok(())
    }
    fn read(&mut self, _space: u32, addr: u64, buf: &mut [u8]) -> Result<(), TaskError> {
        for (page, at) in buf.chunks_exact_mut(PAGE_SIZE).zip((addr..).step_by(PAGE_SIZE)) {
            // Like real memory: what was never written reads as zeros.
            match self.memory.get(&at) {
                Some(contents) => page.copy_from_slice(contents),
                None => page.fill(0),
            }
        }
        Ok(())
    }
    fn volume_digest(&mut self) -> Result<u128, TaskError> {
        Ok(7 ^ self.damage)
    }
    fn restore(&mut self, image: &[u8]) -> Result<(), TaskError> {
        assert!(!self.defect, "a defect that the test has made");
        self.image = Some(image.to_vec());
        Ok(())
    }
    fn activate(&mut self) -> Result<(), TaskError> {
        assert!(!self.abandoned && self.image.is_some());
        if self.stuck > 0 {
            self.stuck -= 1;
            return Err("not yet".into());
        }
        self.running = true;
        Ok(())
    }
    fn abandon(&mut self) -> Result<(), TaskError> {
        assert!(!self.running);
        self.abandoned = true;
        self.memory.clear();
        Ok(())
    }
}

/// What happens to the n-th frame with a certain tag on its way.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    Cut(Tag),
    /// The same, from the destination to the source.
    CutBack(Tag),
    Flip(Tag),
}

/// An end of the pipe, which damages what is written.
struct Faulty {
    pipe: UnixStream,
    fault: Fault,
    pending: Vec<u8>,
    cut: bool,
}

impl Faulty {
    fn pass_frames(&mut self) -> io::Result<()> {
        while self.pending.len() >= 5 {
            let len = u32::from_le_bytes([self.pending[1], self.pending[2], self.pending[3], self.pending[4]])
                as usize;
            if self.pending.len() < 5 + len {
                break;
            }
            let mut frame: Vec<u8> = self.pending.drain(..5 + len).collect();
            match self.fault {
                Fault::Cut(tag) if frame[0] == tag as u8 => {
                    self.cut = true;
                    self.pipe.shutdown(std::net::Shutdown::Both)?;
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Fault::Flip(tag) if frame[0] == tag as u8 => {
                    let middle = 5 + len / 2;
                    frame[middle] ^= 0x10;
                    self.fault = Fault::None;
                }
                _ => {}
            }
            self.pipe.write_all(&frame)?;
        }
        Ok(())
    }
}

impl Write for Faulty {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.cut {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.pending.extend_from_slice(data);
        self.pass_frames()?;
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Widen for Faulty {}
impl Gather for Faulty {}
impl Widen for UnixStream {}
impl Gather for UnixStream {}

impl Read for Faulty {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.pipe.read(buf)
    }
}

pub(super) fn config() -> MigrateConfig {
    MigrateConfig { max_unavailability_ms: 5_000, max_rounds: 6, deadline_s: 60, ..MigrateConfig::default() }
}

/// Two hosts' journals, and whether the destination can be asked.
struct Hosts {
    source: tempfile::TempDir,
    destination: tempfile::TempDir,
    answers: bool,
}

impl Hosts {
    fn new() -> Self {
        let directory = || tempfile::tempdir().expect("a temporary directory");
        Self { source: directory(), destination: directory(), answers: true }
    }

    fn ledger(&self) -> Ledger {
        Ledger::new(self.destination.path().to_owned())
    }

    /// What the journals say: the source's, the destination's.
    fn journals(&self) -> (Vec<SourceState>, Vec<DestinationState>) {
        let source = journal::list(self.source.path()).expect("the source's journals");
        let destination = journal::list(self.destination.path()).expect("the destination's journals");
        let (source, destination) = (source.into_iter(), destination.into_iter());
        (source.map(|(_, e)| e.state).collect(), destination.map(|(_, e)| e.state).collect())
    }

    fn migrate(
        &self,
        program: &mut Program,
        fault: Fault,
        copy: Copy,
    ) -> (Result<Report, MigrateError>, Copy) {
        self.migrate_by(&config(), program, fault, copy)
    }

    fn migrate_by(
        &self,
        config: &MigrateConfig,
        program: &mut Program,
        fault: Fault,
        mut copy: Copy,
    ) -> (Result<Report, MigrateError>, Copy) {
        let (here, there) = UnixStream::pair().expect("a pipe");
        let ledger = self.ledger();
        let (forth, back) = match fault {
            Fault::CutBack(tag) => (Fault::None, Fault::Cut(tag)),
            fault => (fault, Fault::None),
        };
        let faulty = |pipe, fault| Faulty { pipe, fault, pending: Vec::new(), cut: false };
        std::thread::scope(|scope| {
            let arriving = scope.spawn(|| {
                let mut stream = faulty(there, back);
                let result =
                    destination::greet(&mut stream, &mut copy, &ledger, None).and_then(
                        |opening| match opening {
                            Opening::Offer { id, requirements } => {
                                destination::run(&mut stream, &mut copy, &ledger, id, &requirements)
                            }
                            Opening::Join { .. } | Opening::Answered => Ok(()),
                        },
                    );
                assert_eq!(result.is_ok(), copy.running);
                assert_eq!(result.is_err() && copy.prepared, copy.abandoned);
                copy
            });
            let id = MigrationId::random().expect("an id");
            let mut journal =
                Journal::begin(self.source.path(), id, SourceState::Begun, b"").expect("a journal");
            let mut ask = |id| match self.answers {
                true => ledger.inquire(id),
                false => Err(MigrateError::Deadline(0)),
            };
            let stream = faulty(here, forth);
            let result = source::run(stream, program, config, &mut journal, &mut ask, &mut |_| {});
            (result, arriving.join().expect("the destination's thread"))
        })
    }
}

fn migrate(program: &mut Program, fault: Fault) -> (Result<Report, MigrateError>, Copy) {
    Hosts::new().migrate(program, fault, Copy::default())
}

#[test]
fn a_busy_program_arrives_as_it_was_frozen() {
    for seed in 0..20 {
        eprintln!("seed {seed}");
        let mut program = Program::new(seed, 300, 50);
        let (result, copy) = migrate(&mut program, Fault::None);
        let report = result.expect("a migration");
        assert!(copy.running && program.destroyed);
        assert_eq!(copy.memory, program.memory);
        assert!(report.bytes_dirtied > 0 && report.rounds >= 2);
    }
}

#[test]
fn a_link_that_is_cut_leaves_the_program_running_and_the_next_try_succeeds() {
    let before_the_commit =
        [Tag::Hello, Tag::Offer, Tag::Layout, Tag::Discard, Tag::Pages, Tag::RoundEnd, Tag::Image];
    for tag in before_the_commit {
        let mut program = Program::new(7, 100, 20);
        let (result, copy) = migrate(&mut program, Fault::Cut(tag));
        assert!(matches!(result, Err(MigrateError::Link { .. })), "{tag:?}: {result:?}");
        assert!(!copy.running && !program.frozen && program.thawed && !program.destroyed, "{tag:?}");
        program.thawed = false;
        let (result, copy) = migrate(&mut program, Fault::None);
        result.expect("the second try");
        assert_eq!(copy.memory, program.memory, "{tag:?}");
    }
}

#[test]
fn nothing_is_left_in_the_journals_when_both_sides_know() {
    let hosts = Hosts::new();
    let (result, _) = hosts.migrate(&mut Program::new(7, 100, 20), Fault::None, Copy::default());
    result.expect("a migration");
    assert_eq!(hosts.journals(), (vec![], vec![]));
}

#[test]
fn a_commit_that_does_not_arrive_is_asked_for_and_called_off() {
    let (hosts, mut program) = (Hosts::new(), Program::new(7, 100, 20));
    let (result, copy) = hosts.migrate(&mut program, Fault::Cut(Tag::Commit), Copy::default());
    assert!(matches!(result, Err(MigrateError::Link { .. })), "{result:?}");
    assert!(copy.abandoned && program.thawed && !program.destroyed);
    assert_eq!(hosts.journals(), (vec![SourceState::Ended], vec![DestinationState::Never]));
}

#[test]
fn a_commit_without_an_answer_leaves_the_source_frozen_until_the_destination_can_be_asked() {
    let (mut hosts, mut program) = (Hosts::new(), Program::new(7, 100, 20));
    hosts.answers = false;
    let (result, copy) = hosts.migrate(&mut program, Fault::Cut(Tag::Commit), Copy::default());
    assert!(matches!(result, Err(MigrateError::InDoubt(_))), "{result:?}");
    assert!(copy.abandoned && program.frozen && !program.thawed && !program.destroyed);
    assert_eq!(hosts.journals(), (vec![SourceState::Committed], vec![DestinationState::Never]));
}

#[test]
fn an_activation_that_is_not_heard_of_is_asked_for_and_the_source_is_removed() {
    for (stuck, answers) in [(0, true), (1, true), (0, false)] {
        let (mut hosts, mut program) = (Hosts::new(), Program::new(7, 100, 20));
        hosts.answers = answers;
        let copy = Copy { stuck, ..Copy::default() };
        let (result, copy) = hosts.migrate(&mut program, Fault::CutBack(Tag::Activated), copy);
        assert!(copy.running && !program.thawed);
        assert_eq!((result.is_ok(), program.destroyed), (answers, answers), "{result:?}");
        let source = if answers { SourceState::Ended } else { SourceState::Committed };
        assert_eq!(hosts.journals(), (vec![source], vec![DestinationState::Activated]));
    }
}

#[test]
fn a_destination_answers_questions_on_the_wire() {
    let hosts = Hosts::new();
    let ledger = hosts.ledger();
    let (committed, open, unknown) = (MigrationId(1), MigrationId(2), MigrationId(3));
    for id in [committed, open] {
        ledger.prepare(id, b"{}").expect("prepare");
    }
    assert!(ledger.commit(committed).expect("commit"));
    ledger.activated(committed);
    let (here, mut there) = UnixStream::pair().expect("a pipe");
    std::thread::scope(|scope| {
        let answering = scope.spawn(|| {
            let opening = destination::greet(&mut there, &mut Copy::default(), &ledger, None);
            assert!(matches!(opening, Ok(Opening::Answered)), "{opening:?}");
        });
        let mut inquiry = Inquiry::begin(here).expect("a conversation");
        let mut fate = |id| inquiry.fate(id).expect("an answer");
        assert_eq!([committed, open, unknown].map(&mut fate), [Fate::Running, Fate::Never, Fate::Unknown]);
        inquiry.settle(committed).expect("settle");
        drop(inquiry);
        answering.join().expect("the destination's thread");
    });
    assert_eq!(hosts.journals().1, [DestinationState::Never]);
}

#[test]
fn a_damaged_frame_is_found_and_rolled_back() {
    for tag in [Tag::Hello, Tag::Offer, Tag::Pages, Tag::Image] {
        let mut program = Program::new(11, 100, 20);
        let (result, copy) = migrate(&mut program, Fault::Flip(tag));
        assert!(result.is_err(), "{tag:?} was damaged, and nobody noticed");
        assert!(!copy.running && program.thawed && !program.destroyed, "{tag:?}");
        program.thawed = false;
        let (result, copy) = migrate(&mut program, Fault::None);
        result.expect("the second try");
        assert_eq!(copy.memory, program.memory, "{tag:?}");
    }
}

#[test]
fn volumes_that_arrive_otherwise_than_they_left_are_found() {
    let mut program = Program::new(11, 50, 0);
    let (result, copy) =
        Hosts::new().migrate_by(&config(), &mut program, Fault::None, Copy { damage: 1, ..Copy::default() });
    assert!(matches!(result, Err(MigrateError::Digest { .. })), "{result:?}");
    assert!(program.thawed && !program.destroyed && !copy.running && copy.abandoned);
}

#[test]
fn a_defect_of_the_destination_leaves_nothing_there() {
    let (hosts, mut program) = (Hosts::new(), Program::new(11, 50, 0));
    let copy = Copy { defect: true, ..Copy::default() };
    let (result, copy) = hosts.migrate(&mut program, Fault::None, copy);
    let error = result.expect_err("it arrived all the same").to_string();
    assert!(error.contains("a defect of the destination's agent"), "{error}");
    assert!(program.thawed && !program.destroyed && !copy.running && copy.abandoned && copy.is_empty());
    assert_eq!(hosts.journals().1, []);
}

#[test]
fn the_deadline_is_over_the_whole_operation() {
    let mut program = Program::new(12, 50, 0);
    let config = MigrateConfig { deadline_s: 0, ..config() };
    let (result, copy) = Hosts::new().migrate_by(&config, &mut program, Fault::None, Copy::default());
    assert!(matches!(result, Err(MigrateError::Deadline(0))), "{result:?}");
    assert!(program.thawed && !program.destroyed && !copy.running);
}

#[test]
fn without_precopy_all_goes_in_the_freeze() {
    let mut program = Program::new(13, 50, 5);
    let config = MigrateConfig { stop_and_copy: true, ..config() };
    let (result, copy) = Hosts::new().migrate_by(&config, &mut program, Fault::None, Copy::default());
    let report = result.expect("it moves");
    assert_eq!((report.rounds, report.pages_sent), (0, 50));
    assert!(copy.running && copy.memory == program.memory && program.destroyed);
}

#[test]
fn a_program_that_never_rests_is_given_up() {
    let mut program = Program::new(3, 100, 2_000);
    let (here, mut there) = UnixStream::pair().expect("a pipe");
    let hosts = Hosts::new();
    let ledger = hosts.ledger();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let Ok(Opening::Offer { id, requirements }) =
                destination::greet(&mut there, &mut Copy::default(), &ledger, None)
            else {
                panic!("no offer came")
            };
            destination::run(&mut there, &mut Copy::default(), &ledger, id, &requirements)
        });
        let config = MigrateConfig { max_unavailability_ms: 15, ..config() };
        let mut journal =
            Journal::begin(hosts.source.path(), MigrationId(1), SourceState::Begun, b"").expect("begin");
        let mut ask = |id| ledger.inquire(id);
        let result = source::run(here, &mut program, &config, &mut journal, &mut ask, &mut |_| {});
        assert!(matches!(result, Err(MigrateError::NotConverging { .. })), "{result:?}");
    });
    assert!(program.thawed && !program.destroyed);
}
