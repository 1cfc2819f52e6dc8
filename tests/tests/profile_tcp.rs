//! TCP of the profile: connections against a program's own count, what is sent again against the kernel's count at the sockets, and connections that are dropped.
//!
//! Each needs root, and the kernel's type information with the tracepoints of TCP.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rswap_agent::{
    profile::{Profile, Profiler, TcpProfile},
    units::UnixMillis,
};
use rswap_tests::{
    moves,
    profiled::{TestCgroup, begin, end, profiler, reap, wait},
};

fn needed(test: &str) -> Option<Profiler> {
    profiler(test, &["inet_sock_set_state", "tcp_retransmit_skb"])
}

fn python(script: &str) -> Command {
    let mut command = Command::new(moves::python().expect("python3"));
    command.args(["-c", script]).stdout(Stdio::piped());
    command
}

fn numbers(output: &str) -> Vec<u64> {
    output.split_whitespace().map(|word| word.parse().expect("a number")).collect()
}

/// What the profile says of a program, and what the program prints.
fn profile_of(profiler: &Profiler, script: &str) -> (TcpProfile, Vec<u64>) {
    let cgroup = TestCgroup::create();
    let name = begin(profiler, &cgroup.0);
    let output = wait(cgroup.spawn(&mut python(script)), Duration::from_secs(60));
    let profile = end(profiler);
    profiler.untrack(&name);
    (profile.tcp, numbers(&output))
}

#[test]
fn connections_are_those_that_the_program_makes() {
    let Some(profiler) = needed("connections_are_those_that_the_program_makes") else { return };
    // 200 connections to itself that last 20 ms, 5 that stay, and 7 to where nobody listens. The one that closes first waits in TIME_WAIT: that is no connection.
    let script = "import socket, time\nserver = socket.create_server(('127.0.0.1', 0), backlog=300)\nat = server.getsockname()\n\
        nobody = socket.create_server(('127.0.0.1', 0))\nclosed_at = nobody.getsockname()\nnobody.close()\n\
        kept = []\nopened = accepted = failed = 0\nlife = 0\n\
        for i in range(205):\n    began = time.monotonic_ns()\n    client = socket.create_connection(at)\n    opened += 1\n    \
        peer, _ = server.accept()\n    accepted += 1\n    if i % 41 == 40:\n        kept += [client, peer]\n        continue\n    \
        time.sleep(0.002)\n    client.close()\n    peer.close()\n    life += time.monotonic_ns() - began\n\
        for i in range(7):\n    try: socket.create_connection(closed_at)\n    except ConnectionRefusedError: failed += 1\n\
        print(opened, accepted, failed, len(kept), life // 200 // 1000, flush=True)\nimport sys\nsys.stdin.readline()\n";
    let cgroup = TestCgroup::create();
    begin(&profiler, &cgroup.0);
    let mut child = cgroup.spawn(python(script).stdin(Stdio::piped()));
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().expect("its output"));
    output.read_line(&mut line).expect("its numbers");
    let profile = end(&profiler);
    let said = numbers(&line);
    let [opened, accepted, failed, open, life_us] = said[..] else { panic!("{said:?}") };
    let found = profile.tcp.connections.expect("they are counted");
    eprintln!("{said:?}: {} opened, {} open, life {:?}", found.opened, found.open, found.life_us.mean());
    assert_eq!((found.opened, found.accepted, found.failed, found.open), (opened, accepted, failed, open));
    assert_eq!((found.closed, found.life_us.count), (400, 400));
    // What the program sees begins a little before and ends a little after.
    let mean = found.life_us.mean().expect("some ended");
    assert!(mean < life_us as f64 && mean > life_us as f64 * 0.7, "{mean} against {life_us} us");
    // Those that stayed end with the program.
    drop(child.stdin.take());
    assert!(child.wait().expect("waiting for it").success());
    let found = end_of(&profiler).tcp.connections.expect("they are counted");
    assert_eq!((found.closed, found.open, found.opened), (open, 0, 0));
}

fn end_of(profiler: &Profiler) -> Profile {
    // The kernel may take a moment for what a program leaves.
    thread::sleep(Duration::from_millis(200));
    end(profiler)
}

/// A program that has a connection with itself, in a network namespace of its own; for each number that it is told, it sends as many bytes from one end, and twice as many from the other, and says what both ends' round trips are then, added up, in microseconds.
struct Talker {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Talker {
    fn start(cgroup: &TestCgroup) -> Self {
        let script = "import socket, struct, sys, time\nserver = socket.create_server(('127.0.0.1', 0))\n\
            one = socket.create_connection(server.getsockname())\ntwo, _ = server.accept()\n\
            def move(to, other, count):\n    while count:\n        part = min(count, 30000)\n        to.sendall(b'x' * part)\n        \
            other.recv(part, socket.MSG_WAITALL)\n        count -= part\n\
            rtt = lambda end: struct.unpack('I', end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[68:72])[0]\n\
            print('there', flush=True)\n\
            for line in sys.stdin:\n    move(one, two, int(line))\n    move(two, one, 2 * int(line))\n    \
            time.sleep(0.1)  # The last answers have come.\n    print(rtt(one) + rtt(two), flush=True)\n";
        let python = moves::python().expect("python3");
        let mut command = Command::new("unshare");
        command
            .args(["--net", "sh", "-c", "ip link set lo up && exec \"$0\" -c \"$1\""])
            .arg(python)
            .arg(script);
        let mut child = cgroup.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let (stdin, stdout) =
            (child.stdin.take().expect("its input"), child.stdout.take().expect("its output"));
        let mut talker = Self { child, stdin, stdout: BufReader::new(stdout) };
        assert_eq!(talker.answer(), "there");
        talker
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("its answer");
        line.trim().to_owned()
    }

    fn talk(&mut self, bytes: u64) -> u64 {
        writeln!(self.stdin, "{bytes}").expect("telling it");
        self.answer().parse().expect("a number")
    }

    fn end(self) {
        let Self { child, stdin, .. } = self;
        drop(stdin);
        reap(child);
    }
}

/// Bytes in and out since the window began, how many round trips are told, and their sum in microseconds.
fn moved(profiler: &Profiler) -> (u64, u64, u64, u64) {
    let profile = end(profiler);
    assert!(profile.tcp_counted);
    (profile.tcp.bytes_in, profile.tcp.bytes_out, profile.tcp.rtt_us.count, profile.tcp.rtt_us.sum)
}

#[test]
fn what_goes_over_a_connection_counts_from_when_its_instance_came_for_each_window() {
    let test = "what_goes_over_a_connection_counts_from_when_its_instance_came_for_each_window";
    let Some(profiler) = needed(test) else { return };
    let cgroup = TestCgroup::create();
    let mut talker = Talker::start(&cgroup);
    talker.talk(1_000_000);
    let name = begin(&profiler, &cgroup.0);
    for bytes in [1, 100_000, 0, 7] {
        let round_trips = talker.talk(bytes);
        // Both ends are the instance's, and each has a sample, if anything went.
        let (samples, sum) = if bytes > 0 { (2, round_trips) } else { (0, 0) };
        assert_eq!(moved(&profiler), (3 * bytes, 3 * bytes, samples, sum), "of {bytes}");
    }
    // What is nobody's for a while is not counted later, also if it comes to the same slot.
    talker.talk(10);
    profiler.untrack(&name);
    talker.talk(100);
    begin(&profiler, &cgroup.0);
    let round_trips = talker.talk(1000);
    assert_eq!(moved(&profiler), (3000, 3000, 2, round_trips));
    // Of a connection that ends, the rest counts with its end, of which that of the other side is no byte.
    talker.talk(10_000);
    talker.end();
    thread::sleep(Duration::from_millis(200));
    let (came, went, samples, _) = moved(&profiler);
    assert_eq!((came, went, samples), (30_000, 30_000, 2));
}

#[test]
fn what_goes_over_connections_that_come_and_go_within_a_window_is_counted() {
    let test = "what_goes_over_connections_that_come_and_go_within_a_window_is_counted";
    let Some(profiler) = needed(test) else { return };
    // In turns who ends first, and how: with an orderly end, or without one while the other side's end has come.
    let script = "import socket, struct\nserver = socket.create_server(('127.0.0.1', 0))\nat = server.getsockname()\nsent = 0\n\
        for i in range(300):\n    one = socket.create_connection(at)\n    two, _ = server.accept()\n    \
        one.sendall(b'x' * i)\n    two.sendall(b'y' * 5)\n    two.recv(i, socket.MSG_WAITALL) if i else None\n    one.recv(5, socket.MSG_WAITALL)\n    sent += i + 5\n    \
        first, last = (one, two) if i % 2 else (two, one)\n    first.shutdown(socket.SHUT_WR)\n    last.recv(1)\n    \
        if i % 3 == 0: last.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n    \
        last.close()\n    first.close()\nprint(sent)\n";
    let cgroup = TestCgroup::create();
    begin(&profiler, &cgroup.0);
    let said = numbers(&wait(cgroup.spawn(&mut python(script)), Duration::from_secs(60)));
    let profile = end_of(&profiler);
    eprintln!("{said:?}: {} in, {} out", profile.tcp.bytes_in, profile.tcp.bytes_out);
    assert_eq!([profile.tcp.bytes_in, profile.tcp.bytes_out], [said[0]; 2]);
    assert_eq!(profile.tcp.rtt_us.count, 600);
}

#[test]
fn what_is_sent_again_is_what_the_kernel_counts() {
    let Some(profiler) = needed("what_is_sent_again_is_what_the_kernel_counts") else { return };
    // Sent with pauses, so that the kernel does not make a few segments of it all. Of what comes to the receiver one in ten is dropped before TCP sees it, by a filter at its socket: `ld rand; jge #0x1999999a, keep; ret #0`.
    let script = "import ctypes, socket, struct, threading, sys\n\
        server = socket.create_server(('127.0.0.1', 0))\nsender = socket.create_connection(server.getsockname())\n\
        receiver, _ = server.accept()\n\
        code = [(0x20, 0, 0, 0xfffff000 + 56), (0x35, 1, 0, 0x1999999a), (0x06, 0, 0, 0), (0x06, 0, 0, 0xffffffff)]\n\
        text = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *one) for one in code))\n\
        receiver.setsockopt(socket.SOL_SOCKET, 26, struct.pack('HL', len(code), ctypes.addressof(text)))\n\
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\nsender.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)\n\
        got = 0\ndef receive():\n    global got\n    while True:\n        data = receiver.recv(65536)\n        if not data: break\n        got += len(data)\n\
        thread = threading.Thread(target=receive)\nthread.start()\n\
        import time\nfor i in range(400):\n    sender.send(b'x' * 100)\n    time.sleep(0.001)\n\
        sender.shutdown(socket.SHUT_WR)\nthread.join()\ntime.sleep(0.5)\ninfo = sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)\n\
        print(struct.unpack('I', info[100:104])[0], got)\n";
    let (profile, said) = profile_of(&profiler, script);
    let [again, got] = said[..] else { panic!("{said:?}") };
    eprintln!("{:?} times against {again}; {} bytes", profile.retransmits, profile.bytes_in);
    assert_eq!((got, profile.bytes_in, profile.bytes_out), (40_000, 40_000, 40_000));
    assert!(again > 0, "the filter dropped nothing");
    let found = profile.retransmits.expect("they are counted");
    // The kernel counts segments, of which one call may send several.
    assert!(found <= again && found as f64 >= again as f64 * 0.5, "{found} against {again}");
}

#[test]
fn nothing_is_sent_again_where_nothing_is_lost() {
    let Some(profiler) = needed("nothing_is_sent_again_where_nothing_is_lost") else { return };
    let script = "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n\
        one = socket.create_connection(server.getsockname())\ntwo, _ = server.accept()\n\
        for i in range(500):\n    one.sendall(b'x' * 100)\n    assert len(two.recv(100, socket.MSG_WAITALL)) == 100\nprint(500)\n";
    let (profile, _) = profile_of(&profiler, script);
    assert_eq!((profile.retransmits, profile.listen_drops), (Some(0), Some(0)));
}

#[test]
fn connections_that_find_the_backlog_full_are_dropped() {
    let Some(profiler) = needed("connections_that_find_the_backlog_full_are_dropped") else { return };
    if !profiler.sample(UnixMillis::now()).is_empty() {
        panic!("nothing is tracked yet");
    }
    let cgroup = TestCgroup::create();
    // It accepts nothing, and has room for two.
    let server = "import socket, sys, time\nserver = socket.create_server(('127.0.0.1', 0), backlog=1)\n\
                  print(server.getsockname()[1], flush=True)\ntime.sleep(60)\n";
    let mut child = cgroup.spawn(&mut python(server));
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().expect("its output"));
    output.read_line(&mut line).expect("its port");
    let name = begin(&profiler, &cgroup.0);
    // Looked at every five seconds: the first look is the one that it begins with.
    let look = |at_least: u64| {
        let deadline = Instant::now() + Duration::from_secs(15);
        let mut dropped = 0;
        while dropped < at_least && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(500));
            dropped += end(&profiler).tcp.listen_drops.expect("the kernel tells");
        }
        dropped
    };
    thread::sleep(Duration::from_millis(5200));
    assert_eq!(end(&profiler).tcp.listen_drops, Some(0));
    let port: u16 = line.trim().parse().expect("a port");
    let before = listen_drops();
    let clients: Vec<_> = (0..8)
        .map(|_| {
            thread::spawn(move || {
                let at = std::net::SocketAddr::from(([127, 0, 0, 1], port));
                std::net::TcpStream::connect_timeout(&at, Duration::from_millis(2500))
            })
        })
        .collect();
    let connected =
        clients.into_iter().map(|client| client.join().expect("a client")).filter(Result::is_ok).count();
    let dropped = listen_drops() - before;
    let found = look(dropped);
    eprintln!("{connected} of 8 connected; the kernel dropped {dropped}, the profile says {found}");
    assert!(dropped >= 6, "the backlog was not full: {dropped}");
    assert_eq!(found, dropped);
    profiler.untrack(&name);
    drop(cgroup);
    reap(child);
}

/// `ListenDrops` of this network namespace.
fn listen_drops() -> u64 {
    let text = std::fs::read_to_string("/proc/net/netstat").expect("reading it");
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let place = names.split(' ').position(|name| name == "ListenDrops").expect("its name");
    values.split(' ').nth(place).expect("its value").parse().expect("a number")
}
