//! A TCP server for the scenarios, of blocking threads and of edges of epoll. The first byte of a connection says what
//! it is for: `S` streams to the client as fast as it can, `R` reads a stream slowly, compares it and answers with the
//! number of bytes when it ends, `E` echoes, `C` writes much and closes at once, `P` lets it accept nothing (but for one
//! connection) as long as this one is open. Anything wrong ends the program. With a second address it also streams to
//! itself there for ever, by its loopback.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    process::ExitCode,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rswap_tests::stream::Pattern;

const BUFFER: usize = 64 << 10;
/// More than a client's receive buffer takes at once, and less than both buffers together.
const CLOSING_BYTES: usize = 128 << 10;
static PAUSED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stream_server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(address) = arguments.first() else { bail!("usage: stream_server ADDRESS [ADDRESS_FOR_ITSELF]") };
    let (failures, failed) = mpsc::channel();
    let (echoes, taken) = mpsc::channel();
    let ears = Epoll::new(EpollCreateFlags::empty()).context("no epoll")?;
    spawn(&failures, move || echo(&ears, &taken));
    let mut addresses = vec![address];
    if let Some(own) = arguments.get(1) {
        addresses.push(own);
        let own = own.clone();
        let listener = TcpListener::bind(&own).context("cannot listen for itself")?;
        serve(listener, &failures, &echoes);
        spawn(&failures, move || {
            let mut stream = TcpStream::connect(&own)?;
            stream.write_all(b"S")?;
            receive(&mut stream).map(drop)
        });
    }
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    serve(listener, &failures, &echoes);
    Err(failed.recv().context("nobody is left to fail")?)
}

fn spawn(failures: &Sender<anyhow::Error>, work: impl FnOnce() -> anyhow::Result<()> + Send + 'static) {
    let failures = failures.clone();
    thread::spawn(move || {
        if let Err(error) = work() {
            // Nobody hears it when the program is ending already.
            let _ = failures.send(error);
        }
    });
}

fn serve(listener: TcpListener, failures: &Sender<anyhow::Error>, echoes: &Sender<TcpStream>) {
    let (own, echoes) = (failures.clone(), echoes.clone());
    spawn(failures, move || {
        loop {
            while PAUSED.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(5));
            }
            let (mut stream, _) = listener.accept().context("cannot accept")?;
            let echoes = echoes.clone();
            spawn(&own, move || {
                let mut word = [0];
                if stream.read_exact(&mut word).is_err() {
                    // Somebody looked whether it is there.
                    return Ok(());
                }
                match word[0] {
                    b'C' => {
                        let mut much = vec![0; CLOSING_BYTES];
                        Pattern::default().fill(&mut much);
                        stream.write_all(&much).context("writing before the close")
                    }
                    b'P' => {
                        PAUSED.store(true, Ordering::Release);
                        let ended = stream.read(&mut word);
                        PAUSED.store(false, Ordering::Release);
                        ended.map(drop).context("waiting for the pause to end")
                    }
                    b'S' => send(&mut stream),
                    b'R' => {
                        let bytes = receive(&mut stream)?;
                        stream.write_all(bytes.to_string().as_bytes()).context("answering")
                    }
                    b'E' => echoes.send(stream).context("the echo has ended"),
                    other => bail!("{other} is no word"),
                }
            });
        }
    });
}

/// Until the client goes away, which is its right.
fn send(stream: &mut TcpStream) -> anyhow::Result<()> {
    let mut pattern = Pattern::default();
    let mut buffer = vec![0; BUFFER];
    loop {
        pattern.fill(&mut buffer);
        match stream.write_all(&buffer) {
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                return Ok(());
            }
            done => done.context("streaming")?,
        }
    }
}

fn receive(stream: &mut TcpStream) -> anyhow::Result<u64> {
    let mut pattern = Pattern::default();
    let mut buffer = vec![0; BUFFER];
    loop {
        match stream.read(&mut buffer).context("reading a stream")? {
            0 => return Ok(pattern.position()),
            got => pattern.compare(&buffer[..got])?,
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Echoes the connections that it is given, each told of by edges only.
fn echo(ears: &Epoll, taken: &Receiver<TcpStream>) -> anyhow::Result<()> {
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut events = [EpollEvent::empty(); 16];
    let mut buffer = vec![0; BUFFER];
    loop {
        while let Ok(stream) = taken.try_recv() {
            stream.set_nonblocking(true)?;
            let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, streams.len() as u64);
            ears.add(&stream, event).context("cannot wait for it")?;
            streams.push(stream);
        }
        let count = match ears.wait(&mut events, EpollTimeout::from(50_u8)) {
            Err(nix::Error::EINTR) => 0,
            count => count.context("waiting for edges")?,
        };
        for event in &events[..count] {
            let stream = &mut streams[event.data() as usize];
            // To the end: the next edge comes with the next byte only.
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(got) => {
                        ensure!(stream.write(&buffer[..got])? == got, "the client does not read its echo");
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                    Err(error) => return Err(error).context("reading what is to be echoed"),
                }
            }
        }
    }
}
