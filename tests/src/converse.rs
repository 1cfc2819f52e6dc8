//! Clients that ask over connections that they keep, and verify every answer: one that is lost, doubled or late shows.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};

use crate::{
    netns::Netns,
    persistent::{Gaps, Running, connect},
};

/// One connection, as its conversation sees it.
pub type Connection = BufReader<TcpStream>;

/// Holds a conversation on each of `connections` connections to `server`: `ask` gets the connection, its number from 0 and
/// the question's number from 1, and returns when the answer is right.
pub fn converse(
    netns: &Netns,
    server: SocketAddr,
    connections: u64,
    ask: impl Fn(&mut Connection, u64, u64) -> anyhow::Result<()> + Send + Sync + 'static,
) -> anyhow::Result<Running> {
    Running::start(netns, "conversation", move |stop, answered| {
        let ask = Arc::new(ask);
        thread::scope(|scope| {
            let talk = |number: u64| {
                let ask = ask.clone();
                move || one(stop, answered, server, number, &*ask)
            };
            let talking: Vec<_> = (0..connections).map(|number| scope.spawn(talk(number))).collect();
            let mut longest = Duration::ZERO;
            let mut failed = None;
            for one in talking {
                match one.join().map_err(|_| anyhow::anyhow!("a client panicked")).flatten() {
                    Ok(gap) => longest = longest.max(gap),
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            failed.map_or(Ok(longest), Err)
        })
    })
}

fn one(
    stop: &AtomicBool,
    answered: &AtomicU64,
    server: SocketAddr,
    number: u64,
    ask: &impl Fn(&mut Connection, u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Duration> {
    let talk = || {
        let mut connection = BufReader::new(connect(server)?);
        let mut gaps = Gaps::new();
        for question in 1.. {
            if stop.load(Ordering::Acquire) {
                break;
            }
            ask(&mut connection, number, question)
                .with_context(|| format!("question {question} on connection {number}"))?;
            answered.fetch_add(1, Ordering::AcqRel);
            gaps.event();
            thread::sleep(Duration::from_millis(1));
        }
        Ok(gaps.longest)
    };
    // One that ends ends all.
    talk().inspect_err(|_| stop.store(true, Ordering::Release))
}

/// Asks an HTTP server for `/CONNECTION/QUESTION`. The server keeps the last question of each connection, and answers the
/// next one only, as [`body`] says.
pub fn http(connection: &mut Connection, number: u64, question: u64) -> anyhow::Result<()> {
    let request = format!("GET /{number}/{question} HTTP/1.1\r\nHost: server\r\n\r\n");
    let found = get(connection, &request)?;
    let wanted = body(number, question);
    ensure!(
        found == wanted.as_bytes(),
        "{:?} came where {wanted:?} was due",
        String::from_utf8_lossy(&found)
    );
    Ok(())
}

/// Asks an HTTP server for `/CONNECTION/QUESTION` that answers `CONNECTION:QUESTION` and keeps nothing.
pub fn http_echo(connection: &mut Connection, number: u64, question: u64) -> anyhow::Result<()> {
    let found = get(connection, &format!("GET /{number}/{question} HTTP/1.1\r\nHost: server\r\n\r\n"))?;
    let wanted = format!("{number}:{question}");
    ensure!(
        found == wanted.as_bytes(),
        "{:?} came where {wanted:?} was due",
        String::from_utf8_lossy(&found)
    );
    Ok(())
}

/// What a server answers.
pub fn body(number: u64, question: u64) -> String {
    format!("{number}:{question}:{}", "x".repeat((question % 1000) as usize))
}

/// Sends a request and reads the answer's body; anything but 200 is an error, and so is the connection's end.
pub fn get(connection: &mut Connection, request: &str) -> anyhow::Result<Vec<u8>> {
    connection.get_mut().write_all(request.as_bytes()).context("sending a request")?;
    let status = line(connection)?;
    ensure!(status.starts_with("HTTP/1.1 200"), "the server answers {status:?}");
    let (mut length, mut chunked) = (None, false);
    loop {
        let header = line(connection)?.to_ascii_lowercase();
        match header.split_once(':').map(|(name, value)| (name, value.trim())) {
            None if header.is_empty() => break,
            Some(("content-length", value)) => length = Some(value.parse::<usize>()?),
            Some(("transfer-encoding", "chunked")) => chunked = true,
            Some(("connection", "close")) => anyhow::bail!("the server closes the connection"),
            _ => {}
        }
    }
    let mut body = Vec::new();
    if chunked {
        loop {
            let length = usize::from_str_radix(&line(connection)?, 16).context("a chunk without a length")?;
            let at = body.len();
            body.resize(at + length, 0);
            connection.read_exact(&mut body[at..])?;
            ensure!(line(connection)?.is_empty(), "a chunk is longer than it says");
            if length == 0 {
                return Ok(body);
            }
        }
    }
    body.resize(length.context("an answer without a length")?, 0);
    connection.read_exact(&mut body).context("reading an answer")?;
    Ok(body)
}

/// The next line, without its end.
pub fn line(connection: &mut Connection) -> anyhow::Result<String> {
    let mut line = String::new();
    ensure!(
        connection.read_line(&mut line).context("waiting for an answer")? > 0,
        "the connection has ended"
    );
    Ok(line.trim_end().to_owned())
}

/// Sets keys of memcached to numbers that go up, and reads what was set before.
pub fn memcached(connection: &mut Connection, number: u64, question: u64) -> anyhow::Result<()> {
    let key = |question: u64| format!("key-{number}-{}", question % 50);
    let value = body(number, question);
    let set = format!("set {} 0 0 {}\r\n{value}\r\n", key(question), value.len());
    connection.get_mut().write_all(set.as_bytes())?;
    let answer = line(connection)?;
    ensure!(answer == "STORED", "{answer:?} came for a set");
    // The one that will be overwritten next: the oldest.
    let Some(old) = (question + 1).checked_sub(50).filter(|old| *old > 0) else { return Ok(()) };
    connection.get_mut().write_all(format!("get {}\r\n", key(old)).as_bytes())?;
    let (head, found, end) = (line(connection)?, line(connection)?, line(connection)?);
    ensure!(found == body(number, old) && end == "END", "{head:?} {found:?} came for question {old}");
    Ok(())
}
