//! Whole migrations over an in-memory pipe, of arrays of pages, without privileges.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use super::{
    MigrateError, Report, destination, source,
    traits::{DestinationTask, PAGE_SIZE, PageRange, SourceTask, TaskError, Written},
    wire::Tag,
};
use crate::config::MigrateConfig;

type Memory = BTreeMap<u64, Vec<u8>>;

fn random(seed: &mut u64) -> u64 {
    // splitmix64
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn random_page(seed: &mut u64) -> Vec<u8> {
    match random(seed) % 4 {
        0 => vec![0; PAGE_SIZE],
        1 => vec![random(seed) as u8; PAGE_SIZE],
        _ => (0..PAGE_SIZE / 8).flat_map(|_| random(seed).to_le_bytes()).collect(),
    }
}

/// A program that changes its memory between the looks.
struct Program {
    memory: Memory,
    dirty: Vec<u64>,
    dropped: Vec<u64>,
    seed: u64,
    looks: u32,
    busy: u64,
    frozen: bool,
    destroyed: bool,
    thawed: bool,
}

impl Program {
    fn new(seed: u64, pages: u64, busy: u64) -> Self {
        let mut state = seed;
        let memory: Memory =
            (0..pages).map(|page| (page * PAGE_SIZE as u64, random_page(&mut state))).collect();
        let dirty = memory.keys().copied().collect();
        let (dropped, looks) = (Vec::new(), 0);
        let (frozen, destroyed, thawed) = (false, false, false);
        Self { memory, dirty, dropped, seed: state, looks, busy, frozen, destroyed, thawed }
    }

    fn run_a_little(&mut self) {
        for _ in 0..self.busy {
            let page = random(&mut self.seed) % 400 * PAGE_SIZE as u64;
            match random(&mut self.seed) % 4 {
                0 => {
                    self.memory.remove(&page);
                    self.dirty.retain(|dirty| *dirty != page);
                    self.dropped.push(page);
                }
                1 => drop(self.memory.insert(page, random_page(&mut self.seed))),
                _ => {
                    let contents = self.memory.entry(page).or_insert_with(|| vec![0; PAGE_SIZE]);
                    contents[random(&mut self.seed) as usize % PAGE_SIZE] ^= 0x5a;
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
struct Copy {
    memory: Memory,
    image: Option<Vec<u8>>,
    running: bool,
    abandoned: bool,
}

impl DestinationTask for Copy {
    fn prepare(&mut self, requirements: &[u8]) -> Result<(), TaskError> {
        if requirements == b"needs" { Ok(()) } else { Err("can't do that".into()) }
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
    fn restore(&mut self, image: &[u8]) -> Result<(), TaskError> {
        self.image = Some(image.to_vec());
        Ok(())
    }
    fn activate(&mut self) -> Result<(), TaskError> {
        assert!(!self.abandoned && self.image.is_some());
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
    Flip(Tag),
}

/// The source's end of the pipe, which damages what is written.
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

impl Read for Faulty {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.pipe.read(buf)
    }
}

fn config() -> MigrateConfig {
    MigrateConfig { max_unavailability_ms: 5_000, max_rounds: 6, deadline_s: 60, ..MigrateConfig::default() }
}

fn migrate(program: &mut Program, fault: Fault) -> (Result<Report, MigrateError>, Copy) {
    let (here, there) = UnixStream::pair().expect("a pipe");
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::thread::scope(|scope| {
        let arriving = scope.spawn(|| {
            let mut copy = Copy::default();
            let result = destination::run(there, &mut copy, directory.path(), "test");
            assert_eq!(result.is_ok(), copy.running);
            assert_eq!(result.is_err(), copy.abandoned);
            copy
        });
        let stream = Faulty { pipe: here, fault, pending: Vec::new(), cut: false };
        let result = source::run(stream, program, &config(), directory.path(), "test", &mut |_| {});
        (result, arriving.join().expect("the destination's thread"))
    })
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
        assert!(copy.abandoned && !program.frozen && program.thawed && !program.destroyed, "{tag:?}");
        program.thawed = false;
        let (result, copy) = migrate(&mut program, Fault::None);
        result.expect("the second try");
        assert_eq!(copy.memory, program.memory, "{tag:?}");
    }
}

#[test]
fn a_commit_that_does_not_arrive_leaves_the_source_frozen_and_the_destination_empty() {
    let mut program = Program::new(7, 100, 20);
    let (result, copy) = migrate(&mut program, Fault::Cut(Tag::Commit));
    assert!(matches!(result, Err(MigrateError::InDoubt(_))), "{result:?}");
    assert!(copy.abandoned && program.frozen && !program.thawed && !program.destroyed);
}

#[test]
fn a_damaged_frame_is_found_and_rolled_back() {
    for tag in [Tag::Hello, Tag::Offer, Tag::Pages, Tag::Image] {
        let mut program = Program::new(11, 100, 20);
        let (result, copy) = migrate(&mut program, Fault::Flip(tag));
        assert!(result.is_err(), "{tag:?} was damaged, and nobody noticed");
        assert!(copy.abandoned && program.thawed && !program.destroyed, "{tag:?}");
        program.thawed = false;
        let (result, copy) = migrate(&mut program, Fault::None);
        result.expect("the second try");
        assert_eq!(copy.memory, program.memory, "{tag:?}");
    }
}

#[test]
fn a_program_that_never_rests_is_given_up() {
    let mut program = Program::new(3, 100, 2_000);
    let (here, there) = UnixStream::pair().expect("a pipe");
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::thread::scope(|scope| {
        scope.spawn(|| destination::run(there, &mut Copy::default(), directory.path(), "test"));
        let config = MigrateConfig { max_unavailability_ms: 15, ..config() };
        let result = source::run(here, &mut program, &config, directory.path(), "test", &mut |_| {});
        assert!(matches!(result, Err(MigrateError::NotConverging { .. })), "{result:?}");
    });
    assert!(program.thawed && !program.destroyed);
}
