//! Random and damaged input for every decoder of what a peer sends or a disk holds: none may panic, and none may take
//! more memory than what came. 256 cases each in the suite; `cargo xtask fuzz` tries many more.

mod image;

use std::{
    collections::BTreeMap,
    io::{self, Cursor, Read, Write},
};

use proptest::prelude::*;

use super::{
    codec::{self, Encoding},
    destination::{self, Opening},
    journal::{self, Journal, MigrationId},
    lanes::Gather,
    ledger::Ledger,
    offer::{HostTraits, Objection, Requirements},
    recovery::Particulars,
    rules::{Fate, SourceState},
    tests::Copy,
    traits::PAGE_SIZE,
    wire::{self, Hello, Tag},
};
use crate::{
    instance::{Instance, Origin},
    sys::{clock::Clocks, cpuid::Processor},
    tracee::{
        image::InstanceImage,
        layout::{InstanceLayout, Layout, Mapping, ProcessLayout},
        mounts::{Memory, Mount, Mounts, What},
        tables::Tables,
        tree::Node,
    },
};

fn instance() -> Instance {
    Instance {
        name: "redis".parse().expect("a name"),
        labels: BTreeMap::from([("tier".to_owned(), "front".to_owned())]),
        cgroup: "/sys/fs/cgroup/rswap/redis".into(),
        cgroup_id: 4242,
        origin: Origin::Run,
        init_pid: Some(77),
        command: vec!["redis-server".to_owned(), "--save".to_owned()],
        network: None,
        volumes: Vec::new(),
        pool: Some("fast".to_owned()),
        uplink: Some("line".to_owned()),
        memory: None,
        since: Default::default(),
    }
}

fn mounts() -> Mounts {
    let mount =
        |point: &str, what| Mount { point: point.into(), what, flags: 7, follows_host: false, visible: true };
    let size = ("size".to_owned(), Some("64k".to_owned()));
    Mounts {
        memories: vec![Memory { source: "none".to_owned(), options: vec![size.clone()], read_only: false }],
        list: vec![
            mount("/srv/x", What::Memory(0)),
            mount("/srv/y", What::Again { of: 0, path: "z".into() }),
            mount("/srv/x/usr", What::Bind { from: "/usr".into(), directory: true }),
            mount(
                "/srv/x/proc",
                What::Kernel { kind: "proc".to_owned(), options: Vec::new(), read_only: false },
            ),
        ],
    }
}

fn requirements() -> Vec<u8> {
    let host = HostTraits {
        kernel: "6.18".to_owned(),
        cpu_features: vec!["sse".to_owned(), "avx".to_owned()],
        processor: Processor::here(),
        vdso: 7,
        boot_id: "x".to_owned(),
    };
    let requirements = Requirements {
        instance: instance(),
        main_pid: 2,
        host,
        clocks: Clocks::default(),
        clock_offsets: Clocks::default(),
        files: BTreeMap::from([("/bin/sh".to_owned(), 9)]),
        highest_pid: 7,
        volumes: (0, 0),
        mounts: mounts(),
        memory_files_bytes: 1 << 16,
        resident_bytes: 1 << 20,
        huge_pages: 0,
        controllers: vec!["pids".to_owned()],
    };
    postcard::to_stdvec(&requirements).expect("plain data")
}

fn layout() -> Vec<u8> {
    let mapping = Mapping {
        start: 0x1000,
        end: 0x9000,
        protection: 3,
        shared: false,
        offset: 0,
        inode: 0,
        name: "[heap]".to_owned(),
    };
    let node = Node { pid: 2, parent: 1, group: 2, session: 2, status: None };
    let layout = Layout { mappings: vec![mapping.clone(); 3], huge_pages_off: true };
    let (terminal, tables) = (None, Tables::default());
    let process = ProcessLayout { space: 0, node, kernel_mappings: vec![mapping], layout, terminal, tables };
    let layout = InstanceLayout { processes: vec![process], objects: vec![], files: BTreeMap::new() };
    postcard::to_stdvec(&layout).expect("plain data")
}

/// Some bytes changed, and perhaps cut off.
fn damaged(original: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let len = original.len();
    (prop::collection::vec((0..len, any::<u8>()), 0..8), 0..=len).prop_map(move |(changes, keep)| {
        let mut bytes = original.clone();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate(keep);
        bytes
    })
}

/// A peer that has said all that it will, and hears nothing.
struct Said(Cursor<Vec<u8>>);

impl Gather for Said {}

impl Read for Said {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Said {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const TAGS: [Tag; 19] = [
    Tag::Hello,
    Tag::Offer,
    Tag::Accept,
    Tag::Layout,
    Tag::Discard,
    Tag::Pages,
    Tag::RoundEnd,
    Tag::RoundAck,
    Tag::Image,
    Tag::Verified,
    Tag::Commit,
    Tag::Activated,
    Tag::Abort,
    Tag::Probe,
    Tag::ProbeAnswer,
    Tag::Volume,
    Tag::Inquire,
    Tag::Fate,
    Tag::Settled,
];

/// One frame: plausible or not.
fn frame() -> impl Strategy<Value = (Tag, Vec<u8>)> {
    let mut page = Vec::new();
    wire::push_page(&mut page, 0, 0x1000, Encoding::Raw, &[7; PAGE_SIZE]);
    prop_oneof![
        3 => (prop::sample::select(&TAGS[..]), prop::collection::vec(any::<u8>(), 0..40)),
        2 => Just((Tag::Pages, page.clone())),
        1 => damaged(page).prop_map(|bytes| (Tag::Pages, bytes)),
        1 => Just((Tag::RoundEnd, Vec::new())),
        1 => Just((Tag::Image, b"image".to_vec())),
        1 => Just((Tag::Commit, Vec::new())),
        1 => Just((Tag::Settled, MigrationId(5).0.to_le_bytes().to_vec())),
        1 => Just((Tag::Inquire, MigrationId(5).0.to_le_bytes().to_vec())),
    ]
}

proptest! {
    #[test]
    fn fuzz_frames_and_their_parts(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(frame) = wire::read_frame(&mut &bytes[..]) {
            prop_assert!(frame.payload.len() <= bytes.len());
        }
        let pages = wire::parse_pages(&bytes).unwrap_or_default();
        for record in pages {
            let mut page = [0; PAGE_SIZE];
            let _ = codec::decode(record.encoding, record.data, &mut page);
        }
        let _ = wire::parse_ranges(&bytes);
        let _ = wire::parse_offer(&bytes);
        let _ = wire::parse_id(Tag::Settled, &bytes);
        let _ = postcard::from_bytes::<Hello>(&bytes);
        let _ = postcard::from_bytes::<Vec<Objection>>(&bytes);
        let _ = Fate::from_number(bytes.first().copied().unwrap_or_default());
    }

    #[test]
    fn fuzz_pages(encoding in 0_u8..5, data in prop::collection::vec(any::<u8>(), 0..PAGE_SIZE + 9)) {
        if let Some(encoding) = Encoding::from_number(encoding) {
            let mut page = [0x5a; PAGE_SIZE];
            let _ = codec::decode(encoding, &data, &mut page);
        }
    }

    #[test]
    fn fuzz_requirements(bytes in damaged(requirements())) {
        let _ = postcard::from_bytes::<Requirements>(&bytes);
    }

    #[test]
    fn fuzz_layouts(bytes in damaged(layout())) {
        let _ = postcard::from_bytes::<InstanceLayout>(&bytes);
    }

    #[test]
    fn fuzz_images(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = postcard::from_bytes::<InstanceImage>(&bytes);
    }

    #[test]
    fn fuzz_journals(bytes in damaged(journal_file())) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = journal::path::<SourceState>(directory.path(), MigrationId(1));
        std::fs::write(&path, &bytes).expect("write");
        if let Ok(entry) = journal::read::<SourceState>(&path) {
            let _ = Particulars::from_bytes(&entry.particulars);
        }
        let _ = journal::list::<SourceState>(directory.path()).expect("a list without what can't be read");
    }

    /// Whatever a source says, nothing runs without a commit in its place, and nothing is left behind.
    #[test]
    fn fuzz_conversations(frames in prop::collection::vec(frame(), 0..12), honest in any::<bool>()) {
        let mut said = Vec::new();
        if honest {
            let hello = postcard::to_stdvec(&Hello::ours()).expect("plain data");
            wire::write_frame(&mut said, Tag::Hello, &hello).expect("memory");
            let offer = wire::write_offer(MigrationId(5), b"needs");
            wire::write_frame(&mut said, Tag::Offer, &offer).expect("memory");
        }
        for (tag, payload) in &frames {
            let _ = wire::write_frame(&mut said, *tag, payload);
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let ledger = Ledger::new(directory.path().to_owned());
        let (mut stream, mut copy) = (Said(Cursor::new(said)), Copy::default());
        let opening = destination::greet(&mut stream, &mut copy, &ledger, None);
        if let Ok(Opening::Offer { id, requirements }) = opening {
            let ended = destination::run(&mut stream, &mut copy, &ledger, id, &requirements);
            prop_assert_eq!(ended.is_ok(), copy.is_running());
            let committed = frames.iter().any(|(tag, _)| *tag == Tag::Commit);
            prop_assert!(committed || !copy.is_running(), "it runs without a commit");
        }
        prop_assert!(copy.is_running() || copy.is_empty(), "something was left behind");
    }
}

fn journal_file() -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let particulars = Particulars {
        instance: instance(),
        peer: Some(([10, 0, 0, 1], 7791).into()),
        peer_name: Some("b".parse().unwrap()),
        volumes: Vec::new(),
    };
    let particulars = particulars.to_bytes().expect("plain data");
    let journal = Journal::begin(directory.path(), MigrationId(1), SourceState::Begun, &particulars);
    std::fs::read(journal.expect("a journal").path()).expect("its file")
}
