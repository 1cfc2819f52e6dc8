//! Damaged images: what is decoded is no larger than what came, and what no source says is refused before anything is done by it.

use proptest::prelude::*;

use super::damaged;
use crate::{
    sys::{ptrace::RseqConfiguration, sysv::Access, tcp::Agreed},
    tracee::{
        advice::{Advice, Part},
        cgroups::{Group, Subtree},
        descriptors::{Fifo, Lock, LockKind, Nameless, Origin, Place, SignalTarget, Watch, Watched},
        image::{
            Buffers, Credentials, Descriptor, DescriptorKind, InstanceImage, MemoryMap, ProcessImage,
            SocketImage, SocketState, StopImage, TaskImage, ThreadImage,
        },
        layout::{Layout, Mapping},
        names::HostNames,
        netlink::NetlinkImage,
        posix_timers::PosixTimer,
        seccomp::{Filter, Seccomp},
        sysv::{Messages, Queues, Semaphores},
        tables::{Directories, Table, Tables, ThreadTables},
        tcp::{Connection, Phase},
        tree::Node,
        unix::{Identity, Message, UnixImage, UnixState},
        waits::TimedWait,
    },
};

fn thread(tid: i32) -> ThreadImage {
    ThreadImage {
        tid,
        comm: "worker".to_owned(),
        registers: vec![7; 27 * 8],
        extended_state: vec![0; 832],
        signal_mask: 1 << 9,
        wait: Some(TimedWait { call: libc::SYS_nanosleep, deadline_ns: 1 << 40 }),
        pending_signals: vec![[&10_i32.to_ne_bytes()[..], &[0; 124]].concat()],
        alternate_stack: [1; 24],
        clear_child_tid: 0x7f00_0000_1000,
        robust_list: (0x7f00_0000_2000, 24),
        rseq: RseqConfiguration { address: 0x7f00_0000_3000, size: 32, ..RseqConfiguration::default() },
        scheduling: vec![0; 48],
        credentials: Credentials { groups: vec![4, 5], ..Credentials::default() },
        seccomp: Seccomp { strict: false, filters: vec![Filter { program: vec![6; 16], log: true }] },
        tables: ThreadTables {
            descriptors: Table::Own(vec![descriptor(4, DescriptorKind::Event { count: 2, semaphore: true })]),
            directories: Table::Of(2),
        },
        attributes: Default::default(),
    }
}

fn descriptor(number: i32, kind: DescriptorKind) -> Descriptor {
    Descriptor { numbers: vec![(number, true)], flags: libc::O_RDWR, signals: None, locks: Vec::new(), kind }
}

/// One descriptor of each kind that has something to be damaged.
fn descriptors() -> Vec<Descriptor> {
    let connection = Connection {
        phase: Phase::Established,
        local: vec![2; 16],
        peer: vec![3; 16],
        send_sequence: 1,
        receive_sequence: 2,
        send_queue: vec![5; 300],
        unsent: 100,
        receive_queue: vec![6; 20],
        agreed: Agreed { mss: 1460, window_scale: Some((7, 7)), selective: true, timestamps: true },
        timestamp: 9,
        window: Default::default(),
        reading_ended: false,
        quick_acknowledgements: true,
    };
    let socket = SocketImage {
        domain: libc::AF_INET,
        kind: libc::SOCK_STREAM,
        options: vec![(1, 2, 3)],
        other_options: vec![(1, 13, vec![0; 8])],
        buffers: Buffers::default(),
        local: vec![2; 16],
        state: SocketState::Connected(Box::new(connection)),
    };
    let nameless = Nameless {
        name: "/tmp/gone".to_owned(),
        inode: (1, 2),
        origin: Origin::Memory(3),
        access: (0o600, 0, 0),
        position: 4,
        contents: b"contents".to_vec(),
        len: 8,
    };
    let message = Message {
        data: b"waits".to_vec(),
        from: b"/run/x".to_vec(),
        sender: Some(Identity { pid: 2, uid: 0, gid: 0 }),
        descriptors: vec![1 << 30],
    };
    let unix = UnixImage {
        kind: libc::SOCK_STREAM,
        inode: 77,
        name: b"/run/x".to_vec(),
        file: None,
        state: UnixState::Connected { peer: 78 },
        peer_credentials: Identity::default(),
        queued: vec![message],
        options: vec![(1, 16, 1)],
        timeouts: [vec![0; 16], Vec::new()],
        send_buffer: 4096,
        shutdown: 1,
    };
    let path = || "/tmp/file".to_owned();
    let kinds = [
        DescriptorKind::File { path: path(), position: 3, size: Some(9), digest: Some(1 << 90) },
        DescriptorKind::Directory { path: path(), position: 3, place: Place { inode: (1, 2) } },
        DescriptorKind::Nameless(nameless),
        DescriptorKind::Fifo(Fifo { path: path(), inode: 3, capacity: 4096, queued: b"fifo".to_vec() }),
        DescriptorKind::Shared { pid: 2, number: 4 },
        DescriptorKind::Pipe { inode: 5, queued: b"pipe".to_vec(), capacity: 4096 },
        DescriptorKind::Timer { clock: 1, spec: [1, 2, 3, 4], flags: 0, ticks: 5 },
        DescriptorKind::Signal { mask: 6 },
        DescriptorKind::Slave { number: 1 },
        DescriptorKind::Epoll { watched: vec![Watched { number: 4, now: 4, events: 1, data: 2 }] },
        DescriptorKind::Inotify { watches: vec![Watch { number: 1, path: path(), mask: 2 }] },
        DescriptorKind::Process { pid: Some(2) },
        DescriptorKind::Socket(socket),
        DescriptorKind::Netlink(NetlinkImage {
            kind: 3,
            protocol: 0,
            port: 7,
            groups: vec![1],
            options: vec![(270, 3, 1)],
            receive_buffer: 4096,
        }),
        DescriptorKind::Unix(Box::new(unix)),
    ];
    let mut all: Vec<_> = (4..).zip(kinds).map(|(number, kind)| descriptor(number, kind)).collect();
    all[0].locks = vec![Lock { kind: LockKind::Process, exclusive: true, start: 1, len: 2 }];
    all[1].signals = Some(SignalTarget { kind: 1, id: 2, signal: 10 });
    all
}

/// An image that has some of everything.
fn image() -> InstanceImage {
    let mapping = Mapping {
        start: 0x7f00_0000_0000,
        end: 0x7f00_0010_0000,
        protection: 3,
        shared: false,
        offset: 0,
        inode: 0,
        name: "[heap]".to_owned(),
    };
    let (start, end) = (mapping.start, mapping.end);
    let part = Part {
        start,
        end,
        advice: vec![libc::MADV_HUGEPAGE],
        locked: Some(1),
        sealed: true,
        key: Some((1, 3)),
    };
    let timer = PosixTimer {
        id: 1,
        clock: 1,
        signal: 14,
        value: 5,
        notify: libc::SIGEV_SIGNAL,
        thread: 0,
        interval_ns: 1 << 30,
        left_ns: 1 << 29,
        overruns: 3,
    };
    let task = TaskImage {
        layout: Layout { mappings: vec![mapping.clone()], huge_pages_off: false },
        kernel_mappings: vec![mapping],
        memory_map: MemoryMap { bounds: [0x1000; 11] },
        advice: Advice {
            parts: vec![part],
            guards: vec![start..start + 4096, end - 4096..end],
            locks_later: 2,
        },
        auxv: vec![1; 320],
        exe: "/bin/sh".to_owned(),
        directories: Directories { root: "/".to_owned(), working: "/tmp".to_owned(), umask: 0o22 },
        attributes: Default::default(),
        limits: vec![(1024, 4096); 16],
        oom_score_adj: -10,
        dumpable: 1,
        child_subreaper: true,
        parent_death_signal: 15,
        signal_actions: vec![(10, [3; 32])],
        pending_signals: vec![[&12_i32.to_ne_bytes()[..], &[0; 124]].concat()],
        interval_timers: vec![[1; 32]; 3],
        posix_timers: vec![timer],
        taken_ns: 1 << 45,
        stopped: Some(StopImage { signal: 19, unread: true }),
        descriptors: descriptors(),
        threads: vec![thread(2), thread(3)],
    };
    let access = Access { uid: 0, gid: 0, mode: 0o600 };
    let group = Group { path: "work".to_owned(), values: vec![("pids.max".to_owned(), "7".to_owned())] };
    let node = |pid, parent, status| Node { pid, parent, session: 2, group: 2, status };
    let (space, terminal, tables) = (0, Some(1), Tables::default());
    InstanceImage {
        processes: vec![ProcessImage { space, node: node(2, 1, None), terminal, tables, task }],
        zombies: vec![node(4, 2, Some(9))],
        names: HostNames { host: "one".to_owned(), domain: "none".to_owned() },
        sysctls: [("net/core/somaxconn".to_owned(), "99\n".to_owned())].into_iter().collect(),
        cgroups: Subtree {
            groups: vec![group],
            members: vec![(2, "work".to_owned())],
            controllers: "pids".to_owned(),
        },
        queues: Queues {
            semaphores: vec![Semaphores { id: 1, key: 2, access, values: vec![1, 2] }],
            messages: vec![Messages { id: 1, key: 2, access, messages: vec![(1, vec![9])], capacity: 99 }],
        },
    }
}

fn encoded() -> Vec<u8> {
    postcard::to_stdvec(&image()).expect("plain data")
}

/// A number that says that very much follows, instead of what stands there.
fn lengthened(original: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    (0..original.len(), 1_usize..10).prop_map(move |(at, bytes)| {
        let mut changed = original[..at].to_vec();
        changed.extend(vec![0xff; bytes]);
        changed.push(1);
        changed.extend(&original[at + 1..]);
        changed
    })
}

/// Parts in each other's place.
fn swapped(original: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let len = original.len();
    (0..len, 0..len, 1_usize..40).prop_map(move |(one, other, length)| {
        let mut changed = original.clone();
        for at in 0..length.min(len - one.max(other)) {
            changed.swap(one + at, other + at);
        }
        changed
    })
}

fn anything_bad() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![damaged(encoded()), lengthened(encoded()), swapped(encoded())]
}

#[test]
fn an_image_of_everything_is_sound() {
    let (decoded, rest) =
        postcard::take_from_bytes::<InstanceImage>(&encoded()).map(|(d, r)| (d, r.len())).expect("whole");
    assert_eq!((decoded == image(), rest), (true, 0));
    image().require_sound().expect("it is sound");
}

#[test]
fn what_no_source_says_is_refused_by_its_name() {
    type Damage = fn(&mut InstanceImage);
    let cases: [(Damage, &str); 19] = [
        (|i| i.processes.clear(), "no pids of their own"),
        (|i| i.processes[0].node.pid = 0, "no pids of their own"),
        (|i| i.zombies[0].pid = 2, "no pids of their own"),
        (|i| i.processes[0].task.threads.clear(), "process 2: the ids of its threads"),
        (|i| i.processes[0].task.threads[1].tid = 2, "the ids of its threads"),
        (|i| i.processes[0].task.threads[1].tid = 4, "the ids of its threads"),
        (|i| i.processes[0].task.limits.push((1, 1)), "its limits"),
        (|i| i.processes[0].task.taken_ns = -1, "its clock"),
        (|i| i.processes[0].task.signal_actions[0].0 = 65, "its signal actions"),
        (|i| i.processes[0].task.pending_signals[0].truncate(127), "its pending signals"),
        (|i| i.processes[0].task.stopped = Some(StopImage { signal: 0, unread: false }), "stopped by"),
        (|i| i.processes[0].task.posix_timers[0].signal = 0, "its timers"),
        (|i| i.processes[0].task.posix_timers[0].left_ns = i64::MIN, "its timers"),
        // MADV_HWPOISON takes a page from the machine.
        (|i| i.processes[0].task.advice.parts[0].advice = vec![100], "advice on its memory"),
        (|i| i.processes[0].task.advice.parts[0].end = u64::MAX, "a part of its memory"),
        (|i| i.processes[0].task.threads[1].registers.truncate(215), "the registers of a thread"),
        (|i| i.processes[0].task.threads[0].extended_state.truncate(8), "the extended state"),
        (|i| i.processes[0].task.threads[0].scheduling.push(0), "the scheduling"),
        (|i| i.processes[0].task.threads[1].comm = "a name that is too long".to_owned(), "the name"),
    ];
    for (damage, reason) in cases {
        let mut image = image();
        damage(&mut image);
        let refused = image.require_sound().expect_err(reason).to_string();
        assert!(
            refused.contains("the image is damaged") && refused.contains(reason),
            "{refused}: not {reason}"
        );
    }
}

proptest! {
    /// What is decoded was there: written again, it is no longer than what came, whatever lengths that told.
    #[test]
    fn fuzz_damaged_images(bytes in anything_bad()) {
        if let Ok(image) = postcard::from_bytes::<InstanceImage>(&bytes) {
            prop_assert!(postcard::to_stdvec(&image).expect("plain data").len() <= bytes.len());
            let _ = image.require_sound();
        }
    }
}
