//! Connections taken from one socket and made again in another, in a network namespace of the test's own.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::Command,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;

use super::*;
use crate::{
    sys::filter,
    tracee::{
        image::{Buffers, SocketImage},
        reconnect::{self, RawSockets, Reconnected},
        segment, sockets,
    },
};

/// Longer than anything takes that goes well, and shorter than TCP's own time-outs.
const SOON: Duration = Duration::from_millis(150);

/// Runs `work` on a thread with a loopback of its own; without the right to make one, not at all.
fn in_namespace(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let ended = scope.spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                eprintln!("skipped: no network namespace: {error}");
                return;
            }
            // Segments of the usual size; on a loopback there are hardly any two.
            let up = Command::new("ip").args(["link", "set", "lo", "up", "mtu", "1500"]).status();
            assert!(up.is_ok_and(|status| status.success()), "the loopback stays down");
            work();
        });
        if let Err(panic) = ended.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A client and the server's end of its connection.
fn pair(listen: &str, connect: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(listen).expect("listen");
    let port = listener.local_addr().expect("an address").port();
    let to: SocketAddr = format!("{connect}:{port}").parse().expect("an address");
    let client = TcpStream::connect(to).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        stream.set_nodelay(true).expect("no delay");
    }
    (client, server)
}

fn v4() -> (TcpStream, TcpStream) {
    pair("127.0.0.1:0", "127.0.0.1")
}

fn shared(stream: &TcpStream) -> OwnedFd {
    stream.as_fd().try_clone_to_owned().expect("a duplicate")
}

fn state(stream: &TcpStream) -> u8 {
    socket::tcp_info(&shared(stream)).expect("TCP_INFO").state
}

/// What [`super::super::descriptors::describe`] makes of a connection, without the kernel's own network.
fn described(stream: &TcpStream) -> [Descriptor; 1] {
    let ours = shared(stream);
    let local = socket::local_name(&ours).expect("getsockname");
    let peer = socket::peer_name(&ours).expect("getpeername");
    let connection = Connection::described(Phase::Established, local, peer);
    let domain = socket::option(&ours, libc::SOL_SOCKET, libc::SO_DOMAIN).expect("SO_DOMAIN");
    let state = SocketState::Connected(Box::new(connection));
    let image = sockets::describe(&ours, domain, libc::SOCK_STREAM, Vec::new(), state);
    let (numbers, kind) = (vec![(stream.as_raw_fd(), false)], DescriptorKind::Socket(image));
    [Descriptor { numbers, flags: 0, signals: None, locks: Vec::new(), kind }]
}

fn hold(held: &mut Held, descriptors: &mut [Descriptor]) {
    let pid = std::process::id() as i32;
    held.take(pid, descriptors).expect("take");
    held.read(pid, descriptors).expect("read");
}

/// Takes `server`'s connection, ends the socket as a source does, and makes the connection again. `meanwhile` is what
/// happens before it goes on.
fn carry_with(server: TcpStream, meanwhile: impl FnOnce()) -> TcpStream {
    let before = socket::tcp_info(&shared(&server)).expect("TCP_INFO");
    let mut descriptors = described(&server);
    let mut held = Held::default();
    hold(&mut held, &mut descriptors);
    drop(server);
    drop(held);
    let bytes = postcard::to_stdvec(&descriptors[0]).expect("encode");
    let arrived: Descriptor = postcard::from_bytes(&bytes).expect("decode");
    assert_eq!(arrived, descriptors[0]);

    let DescriptorKind::Socket(image) = &arrived.kind else { panic!("it is a socket") };
    sockets::validate(image).expect("a valid image");
    let SocketState::Connected(connection) = &image.state else { panic!("it is connected") };
    println!(
        "{:?}, {} to send of which {} unsent, {} to read",
        connection.phase,
        connection.send_queue.len(),
        connection.unsent,
        connection.receive_queue.len()
    );
    let raw = RawSockets::for_connections([&**connection].into_iter(), |family| {
        Ok(make(family, libc::SOCK_RAW, libc::IPPROTO_RAW))
    })
    .expect("raw sockets");
    let made = make(image.domain, image.kind, 0);
    sockets::restore(&made, image).expect("options");
    let again = TcpStream::from(made.try_clone().expect("a duplicate"));
    let waiting = reconnect::restore(made, connection, image.buffers, &raw).expect("restore");
    meanwhile();
    let mut reconnected = Reconnected { raw, waiting: vec![waiting] };
    reconnected.resume();
    if !reconnected.waiting.is_empty() {
        std::thread::spawn(move || reconnected.repeat_lost());
    }
    let options = options_of(&again);
    assert_eq!((&options.options, &options.other_options), (&image.options, &image.other_options));
    let after = socket::tcp_info(&shared(&again)).expect("TCP_INFO");
    // Timestamps, selective acknowledgements and scales were agreed on when the connection was made.
    let agreed = |info: &socket::TcpInfo| (info.options & 7, info.window_scale);
    if after.state == before.state {
        assert_eq!(agreed(&after), agreed(&before), "{before:?} {after:?}");
    }
    again
}

/// The options of a socket, as an image without anything else.
fn options_of(stream: &TcpStream) -> SocketImage {
    let image = sockets::describe(&shared(stream), 0, 0, Vec::new(), SocketState::Idle);
    SocketImage { buffers: Buffers::default(), ..image }
}

fn carry(server: TcpStream) -> TcpStream {
    carry_with(server, || {})
}

fn make(family: i32, kind: i32, protocol: i32) -> OwnedFd {
    socket::create(family, kind, protocol).expect("a socket")
}

fn bytes_of(seed: usize, count: usize) -> Vec<u8> {
    (0..count).map(|n| (n * 7 + n / 251 + seed) as u8).collect()
}

/// Writes until nothing more is taken.
fn fill(stream: &mut TcpStream, seed: usize) -> Vec<u8> {
    let data = bytes_of(seed, 64 << 20);
    stream.set_nonblocking(true).expect("non-blocking");
    let mut written = 0;
    let mut full = 0;
    while full < 3 {
        match stream.write(&data[written..]) {
            Ok(taken) => (written, full) = (written + taken, 0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                full += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("writing: {error}"),
        }
    }
    stream.set_nonblocking(false).expect("blocking");
    data[..written].to_vec()
}

fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut data = vec![0; count];
    stream.read_exact(&mut data).expect("all of it");
    data
}

fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut data = Vec::new();
    stream.read_to_end(&mut data).expect("to its end");
    data
}

fn exchange(one: &mut TcpStream, other: &mut TcpStream) {
    one.write_all(b"ping").expect("writing");
    assert_eq!(read(other, 4), b"ping");
    other.write_all(b"pong").expect("writing");
    assert_eq!(read(one, 4), b"pong");
}

fn drop_all(stream: &TcpStream) {
    filter::take_nothing(&shared(stream)).expect("a filter");
}

fn take_again(stream: &TcpStream) {
    filter::detach(&shared(stream)).expect("no filter");
}

/// Options of a connection, and values that are not the usual ones.
const SET: [(i32, i32, i32); 9] = [
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE, 1),
    (libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 33),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2, 11),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 7777),
];

#[test]
fn an_idle_connection_goes_on_with_its_options() {
    in_namespace(|| {
        for (listen, connect) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "[::1]"), ("[::]:0", "127.0.0.1")]
        {
            let (mut client, server) = pair(listen, connect);
            let ours = shared(&server);
            for (level, name, value) in SET {
                socket::set_option(&ours, level, name, value).expect("an option");
            }
            socket::set_option_bytes(&ours, libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno").expect("reno");
            drop(ours);
            let mut server = carry(server);
            let ours = shared(&server);
            for (level, name, value) in SET {
                assert_eq!(socket::option(&ours, level, name).expect("an option"), value, "{level} {name}");
            }
            let congestion = socket::option_bytes(&ours, libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16);
            assert!(congestion.expect("TCP_CONGESTION").starts_with(b"reno"));
            drop(ours);
            exchange(&mut client, &mut server);
            let mut server = carry(server);
            exchange(&mut server, &mut client);
            drop(server);
            assert_eq!(read_to_end(&mut client), b"");
        }
    });
}

#[test]
fn full_queues_in_both_directions_come_over() {
    in_namespace(|| {
        for (listen, connect) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "[::1]")] {
            let (mut client, mut server) = pair(listen, connect);
            let up = fill(&mut client, 1);
            let down = fill(&mut server, 2);
            let mut server = carry(server);
            assert!(read(&mut server, up.len()) == up);
            assert!(read(&mut client, down.len()) == down);
            exchange(&mut client, &mut server);
        }
    });
}

#[test]
fn what_was_lost_on_the_way_is_sent_again_at_once() {
    in_namespace(|| {
        for bytes in [1000, 60_000, 400_000] {
            let (mut client, mut server) = v4();
            // Otherwise the kernel would not have more on the way than it has at the beginning.
            let before = bytes_of(9, 2 << 20);
            std::thread::scope(|scope| {
                scope.spawn(|| server.write_all(&before).expect("writing"));
                assert!(read(&mut client, before.len()) == before);
            });
            drop_all(&client);
            let sent = bytes_of(3, bytes);
            server.write_all(&sent).expect("writing");
            let mut resumed = Instant::now();
            let mut server = carry_with(server, || {
                take_again(&client);
                resumed = Instant::now();
            });
            assert!(read(&mut client, sent.len()) == sent);
            println!("{bytes} bytes came again after {:?}", resumed.elapsed());
            assert!(resumed.elapsed() < SOON);
            exchange(&mut client, &mut server);
        }
    });
}

#[test]
fn every_half_closed_phase_goes_on() {
    in_namespace(|| {
        // CLOSE_WAIT, with data before the end.
        let (mut client, server) = v4();
        client.write_all(b"last words").expect("writing");
        client.shutdown(Shutdown::Write).expect("shutdown");
        wait_for(&server, Phase::CloseWait);
        let mut server = carry(server);
        assert_eq!(state(&server), Phase::CloseWait as u8);
        assert_eq!(read_to_end(&mut server), b"last words");
        server.write_all(b"answer").expect("writing");
        drop(server);
        assert_eq!(read_to_end(&mut client), b"answer");

        // FIN_WAIT2.
        let (mut client, server) = v4();
        server.shutdown(Shutdown::Write).expect("shutdown");
        wait_for(&server, Phase::FinWait2);
        let mut server = carry(server);
        assert_eq!(state(&server), Phase::FinWait2 as u8);
        assert_eq!(read_to_end(&mut client), b"");
        client.write_all(b"still here").expect("writing");
        drop(client);
        assert_eq!(read_to_end(&mut server), b"still here");

        // FIN_WAIT1: data and end sent, and lost.
        let (mut client, mut server) = v4();
        drop_all(&client);
        server.write_all(b"lost").expect("writing");
        server.shutdown(Shutdown::Write).expect("shutdown");
        wait_for(&server, Phase::FinWait1);
        let began = Instant::now();
        let mut server = carry_with(server, || take_again(&client));
        assert_eq!(read_to_end(&mut client), b"lost");
        assert!(began.elapsed() < SOON);
        client.write_all(b"got it").expect("writing");
        drop(client);
        assert_eq!(read_to_end(&mut server), b"got it");

        // FIN_WAIT1: the end behind data that does not fit the window.
        let (mut client, mut server) = v4();
        let data = fill(&mut server, 5);
        server.shutdown(Shutdown::Write).expect("shutdown");
        wait_for(&server, Phase::FinWait1);
        let mut server = carry(server);
        assert!(read_to_end(&mut client) == data);
        drop(client);
        assert_eq!(read_to_end(&mut server), b"");

        // LAST_ACK.
        let (mut client, server) = v4();
        client.shutdown(Shutdown::Write).expect("shutdown");
        wait_for(&server, Phase::CloseWait);
        drop_all(&client);
        server.shutdown(Shutdown::Write).expect("shutdown");
        wait_for(&server, Phase::LastAck);
        let began = Instant::now();
        let _server = carry_with(server, || take_again(&client));
        assert_eq!(read_to_end(&mut client), b"");
        assert!(began.elapsed() < SOON);

        // CLOSING.
        let (mut client, server) = v4();
        drop_all(&client);
        server.shutdown(Shutdown::Write).expect("shutdown");
        client.shutdown(Shutdown::Write).expect("shutdown");
        wait_for(&server, Phase::Closing);
        let began = Instant::now();
        let mut server = carry_with(server, || take_again(&client));
        assert_eq!(read_to_end(&mut client), b"");
        assert_eq!(read_to_end(&mut server), b"");
        assert!(began.elapsed() < SOON);
    });
}

fn wait_for(stream: &TcpStream, phase: Phase) {
    let deadline = Instant::now() + Duration::from_secs(2);
    while state(stream) != phase as u8 {
        assert!(
            Instant::now() < deadline,
            "it stays in state {} and does not come to {phase:?}",
            state(stream)
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_connection_that_is_released_goes_on_where_it_is() {
    in_namespace(|| {
        let (mut client, mut server) = v4();
        exchange(&mut client, &mut server);
        let before = options_of(&server);
        let mut held = Held::default();
        hold(&mut held, &mut described(&server));
        client.write_all(b"during the freeze").expect("writing");
        held.release();
        assert_eq!(read(&mut server, 17), b"during the freeze");
        exchange(&mut server, &mut client);
        assert_eq!(options_of(&server), before);
    });
}

#[test]
fn both_ends_of_one_connection_come_over() {
    in_namespace(|| {
        let (mut client, mut server) = v4();
        exchange(&mut client, &mut server);
        let up = fill(&mut client, 8);
        let [a, b] = [described(&client), described(&server)];
        let mut descriptors = [a, b].concat();
        let mut held = Held::default();
        hold(&mut held, &mut descriptors);
        drop((client, server, held));
        let (mut made, mut waiting) = (Vec::new(), Vec::new());
        let raw = RawSockets::for_connections(
            descriptors.iter().filter_map(connection).map(|(_, c)| c),
            |family| Ok(make(family, libc::SOCK_RAW, libc::IPPROTO_RAW)),
        )
        .expect("raw sockets");
        for descriptor in &descriptors {
            let DescriptorKind::Socket(image) = &descriptor.kind else { panic!("it is a socket") };
            let SocketState::Connected(connection) = &image.state else { panic!("it is connected") };
            let ours = make(image.domain, image.kind, 0);
            sockets::restore(&ours, image).expect("options");
            made.push(TcpStream::from(ours.try_clone().expect("a duplicate")));
            waiting.push(reconnect::restore(ours, connection, image.buffers, &raw).expect("restore"));
        }
        let mut reconnected = Reconnected { raw, waiting };
        reconnected.resume();
        reconnected.repeat_lost();
        let [client, server] = made.as_mut_slice() else { panic!("two of them") };
        assert!(read(server, up.len()) == up);
        exchange(client, server);
    });
}

fn an_image() -> SocketImage {
    let name = |last: u8| {
        let mut name = vec![0; 16];
        name[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        name[2..8].copy_from_slice(&[31, 64, 10, 0, 0, last]);
        name
    };
    let mut connection = Connection::described(Phase::CloseWait, name(1), name(2));
    connection.send_queue = bytes_of(1, 50);
    connection.unsent = 20;
    connection.receive_queue = bytes_of(2, 30);
    connection.agreed.mss = 1460;
    SocketImage {
        domain: libc::AF_INET,
        kind: libc::SOCK_STREAM,
        options: vec![(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)],
        other_options: Vec::new(),
        buffers: Buffers::default(),
        local: Vec::new(),
        state: SocketState::Connected(Box::new(connection)),
    }
}

#[test]
fn impossible_images_are_refused() {
    assert_eq!(sockets::validate(&an_image()), Ok(()));
    let refused = |change: &dyn Fn(&mut SocketImage, &mut Connection)| {
        let mut image = an_image();
        let SocketState::Connected(connection) = image.state.clone() else { panic!("it is connected") };
        let mut connection = *connection;
        change(&mut image, &mut connection);
        image.state = SocketState::Connected(Box::new(connection));
        sockets::validate(&image).expect_err("it was accepted")
    };
    for reason in [
        refused(&|image, _| image.domain = libc::AF_UNIX),
        refused(&|image, _| image.domain = libc::AF_INET6),
        refused(&|image, _| image.options.push((libc::SOL_SOCKET, libc::SO_DEBUG, 1))),
        refused(&|image, _| image.other_options.push((libc::SOL_SOCKET, libc::SO_LINGER, vec![0; 9]))),
        refused(&|image, _| image.buffers.send = -1),
        refused(&|_, connection| connection.peer.truncate(15)),
        refused(&|_, connection| connection.local[2..4].fill(0)),
        refused(&|_, connection| connection.unsent = 51),
        refused(&|_, connection| connection.agreed.window_scale = Some((15, 0))),
        refused(&|_, connection| connection.agreed.mss = 0),
        refused(&|_, connection| connection.phase = Phase::FinWait2),
        refused(&|_, connection| connection.receive_queue = vec![0; QUEUE_LIMIT]),
    ] {
        println!("{reason}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_an_error_or_a_checked_image(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(image) = postcard::from_bytes::<SocketImage>(&bytes) {
            let _ = sockets::validate(&image);
        }
    }

    #[test]
    fn a_damaged_image_is_an_error_or_within_bounds(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = postcard::to_stdvec(&an_image()).expect("encode");
        let place = at.index(bytes.len());
        bytes[place] = byte;
        if let Ok(image) = postcard::from_bytes::<SocketImage>(&bytes)
            && sockets::validate(&image).is_ok()
            && let SocketState::Connected(connection) = &image.state
        {
            // What restoring relies on without looking again.
            prop_assert!(connection.sent() + connection.unsent as usize == connection.send_queue.len());
            prop_assert!(segment::socket_address(&connection.peer).is_some());
            let _ = (connection.send_start(), connection.receive_start());
        }
    }
}
