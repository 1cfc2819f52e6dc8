//! TCP of the profile: connections against a program's own count, what is sent again against the kernel's count at the sockets, and connections that are dropped.
//!
//! Each needs root, and the kernel's type information with the tracepoints of TCP.

use std::{
    process::{Command, Stdio},
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
    let mut output = std::io::BufReader::new(child.stdout.take().expect("its output"));
    std::io::BufRead::read_line(&mut output, &mut line).expect("its numbers");
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
    let mut output = std::io::BufReader::new(child.stdout.take().expect("its output"));
    std::io::BufRead::read_line(&mut output, &mut line).expect("its port");
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
