//! Whole migrations over several TCP connections, of arrays of pages, without privileges.

use std::{
    net::{Shutdown, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use super::*;
use crate::{
    config::{Config, MigrateConfig, TlsConfig},
    migrate::{
        Report,
        destination::{self, Opening},
        journal::Journal,
        ledger::Ledger,
        link::Timed,
        rules::SourceState,
        source,
        tests::{Copy, Program, config},
    },
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn in_the_clear() -> Links {
    Links::open(&Config { tls: TlsConfig::ClearText, ..Config::default() }).expect("links")
}

/// A destination, and what becomes of lanes on their way to it.
struct Scene {
    listener: TcpListener,
    meeting: Meeting,
    ledger: Ledger,
    journals: tempfile::TempDir,
    /// The lane with this number is cut once so many bytes have come over it.
    cut: Option<(u8, u64)>,
    over: AtomicBool,
}

impl Scene {
    fn set(cut: Option<(u8, u64)>) -> Self {
        let journals = tempfile::tempdir().expect("a temporary directory");
        Self {
            listener: TcpListener::bind("127.0.0.1:0").expect("a listener"),
            meeting: Meeting::default(),
            ledger: Ledger::new(journals.path().join("destination")),
            journals,
            cut,
            over: AtomicBool::new(false),
        }
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("its address")
    }

    /// Serves callers until the migration is over; returns the copy that arrived, or did not.
    fn serve(&self) -> Copy {
        thread::scope(|scope| {
            let mut arrivals = Vec::new();
            for stream in self.listener.incoming() {
                if self.over.load(Ordering::Acquire) {
                    break;
                }
                let stream = stream.expect("a caller");
                arrivals.push(scope.spawn(move || self.serve_one(stream)));
            }
            arrivals.into_iter().find_map(|arrival| arrival.join().expect("no panic")).unwrap_or_default()
        })
    }

    fn serve_one(&self, stream: TcpStream) -> Option<Copy> {
        let mut link = Link::Clear(Timed::new(stream, soon()).expect("a connection"));
        let mut copy = Copy::default();
        match destination::greet(&mut link, &mut copy, &self.ledger, None) {
            Ok(Opening::Offer { id, requirements }) => {
                let mut arriving = self.meeting.arriving(id, link, None, soon());
                let arrived = destination::run(&mut arriving, &mut copy, &self.ledger, id, &requirements);
                assert_eq!(arrived.is_ok(), copy.is_running(), "{arrived:?}");
                Some(copy)
            }
            Ok(Opening::Join { id, number }) => {
                let link = match self.cut {
                    Some((cut, bytes)) if cut == number => through_a_cutter(link, bytes),
                    _ => link,
                };
                let joined = self.meeting.join(id, number, None, link, |link| destination::welcome(link, id));
                // Of a migration of which a lane is cut, the others may come too late, and the cut one can't be answered.
                if let Err((_, error)) = joined {
                    assert!(self.cut.is_some(), "it is expected: {error}");
                }
                None
            }
            _ => None,
        }
    }

    fn migrate(&self, program: &mut Program, streams: Option<u8>) -> (Result<Report, MigrateError>, Copy) {
        thread::scope(|scope| {
            let serving = scope.spawn(|| self.serve());
            let links = in_the_clear();
            let (link, _) = links.dial(self.address(), None, soon()).expect("a connection");
            let stream = Departing::new(link, &links, (self.address(), None), streams, soon());
            let id = MigrationId::random().expect("an id");
            let at = self.journals.path();
            let mut journal = Journal::begin(at, id, SourceState::Begun, b"").expect("a journal");
            let mut ask = |id| self.ledger.inquire(id);
            let config = MigrateConfig { streams, ..config() };
            let result = source::run(stream, program, &config, &mut journal, &mut ask, &mut |_| {});
            self.over.store(true, Ordering::Release);
            drop(TcpStream::connect(self.address()));
            (result, serving.join().expect("the destination"))
        })
    }
}

/// The same connection, but cut once so many bytes have come over it.
fn through_a_cutter(mut link: Link, bytes: u64) -> Link {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    let (mut far, _) = listener.accept().expect("a caller");
    let mut back = (far.try_clone().expect("a clone"), link.socket().try_clone().expect("a clone"));
    thread::spawn(move || io::copy(&mut back.0, &mut back.1));
    thread::spawn(move || {
        let _ = io::copy(&mut (&mut link).take(bytes), &mut far);
        let _ = far.shutdown(Shutdown::Both);
        let _ = link.socket().shutdown(Shutdown::Both);
    });
    Link::Clear(Timed::new(near, soon()).expect("a connection"))
}

#[test]
fn a_busy_program_arrives_over_lanes_as_it_was_frozen() {
    for (streams, wanted) in [(1, 1), (2, 2), (3, 3), (8, 8)] {
        for seed in 0..4 {
            eprintln!("seed {seed}, {streams} streams");
            let mut program = Program::new(seed, 300, 50);
            let (result, copy) = Scene::set(None).migrate(&mut program, Some(streams));
            assert_eq!(result.expect("a migration").streams, wanted);
            assert!(program.became(&copy));
        }
    }
}

#[test]
fn on_a_short_way_there_is_one_connection() {
    let mut program = Program::new(1, 100, 10);
    let (result, copy) = Scene::set(None).migrate(&mut program, None);
    assert_eq!(result.expect("a migration").streams, 1);
    assert!(program.became(&copy));
}

#[test]
fn wherever_a_lane_is_cut_the_program_goes_on_or_has_arrived() {
    let (mut arrived, mut stayed) = (0, 0);
    for bytes in [0, 1, 5, 1_000, 50_000, 150_000, 300_000, 350_000, 400_000, 500_000, 1 << 30] {
        for lane in [0, 2] {
            eprintln!("lane {lane} is cut after {bytes} bytes");
            let mut program = Program::new(5, 300, 20);
            let (result, copy) = Scene::set(Some((lane, bytes))).migrate(&mut program, Some(3));
            match result {
                Ok(_) => {
                    assert!(program.became(&copy));
                    arrived += 1;
                }
                Err(MigrateError::InDoubt(error)) => panic!("the destination could be asked: {error}"),
                Err(error) => {
                    println!("{error}");
                    assert!(program.goes_on() && !copy.is_running() && copy.is_empty(), "{error}");
                    stayed += 1;
                }
            }
        }
    }
    assert!(arrived > 0 && stayed > 0, "{arrived} arrived, {stayed} stayed: nothing was tried");
}

#[test]
fn a_lane_of_nothing_and_a_stranger_s_are_turned_away() {
    let (near, far) = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
        (near, listener.accept().expect("a caller").0)
    };
    let link = |stream: &TcpStream| {
        Link::Clear(Timed::new(stream.try_clone().expect("a clone"), soon()).expect("a connection"))
    };
    let meeting = Meeting::default();
    let (id, peer) = (MigrationId(7), "a".parse::<Name>().expect("a name"));
    let join = |id, number, peer: Option<&str>| {
        let peer = peer.map(|name| name.parse::<Name>().expect("a name"));
        let answered = |_: &mut Link| Ok(());
        meeting.join(id, number, peer.as_ref(), link(&far), answered).map_err(|(_, error)| error.to_string())
    };
    let unknown = join(id, 0, Some("a")).expect_err("nothing arrives yet");
    let arriving = meeting.arriving(id, link(&near), Some(peer), soon());
    for (id, number, peer) in [(MigrationId(8), 0, Some("a")), (id, 0, Some("b")), (id, 0, None)] {
        assert_eq!(join(id, number, peer), Err(unknown.clone()), "{peer:?} learns something");
    }
    for number in (0..MAX_LANES).rev() {
        join(id, number, Some("a")).expect("it is expected");
        assert!(join(id, number, Some("a")).is_err(), "twice the same");
    }
    assert!(join(id, MAX_LANES, Some("a")).is_err(), "more than there may be");
    drop(arriving);
    assert_eq!(join(id, 0, Some("a")), Err(unknown), "it arrives no more");
}
