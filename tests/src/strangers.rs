//! Callers who are nobody: they say what others have said, garbage, or next to nothing; and certificates that are not right.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use fastrand::Rng;
use rswap_trust::{Authority, Files, Role, Validity};

use crate::{
    Fleet,
    fleet::{files_in, pki},
    mangle::bytes,
    netns::Netns,
};

const LIMIT: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(3600);

/// What a caller has said.
pub type Kept = Arc<Mutex<Vec<u8>>>;

/// Passes one connection to an address in `netns` on to `destination`, and keeps what the caller says. Returns the address.
pub fn record(netns: &Netns, destination: SocketAddr) -> anyhow::Result<(String, Kept)> {
    let kept = Kept::default();
    let keep = kept.clone();
    let (sender, receiver) = std::sync::mpsc::channel();
    netns.spawn("recorder", move || {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        sender.send(listener.local_addr()?.to_string())?;
        let (mut from, _) = listener.accept()?;
        let mut to = TcpStream::connect(destination)?;
        let (mut back_from, mut back_to) = (to.try_clone()?, from.try_clone()?);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut back_from, &mut back_to);
            let _ = back_to.shutdown(Shutdown::Write);
        });
        let mut buffer = [0; 64 << 10];
        loop {
            let length = from.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            keep.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..length]);
            to.write_all(&buffer[..length])?;
        }
    })?;
    Ok((receiver.recv_timeout(LIMIT)?, kept))
}

/// Says at `destination` what was said before.
pub fn replay(netns: &Netns, destination: SocketAddr, recorded: Vec<u8>) -> anyhow::Result<()> {
    let replay = netns.spawn("replay", move || {
        let mut stream = TcpStream::connect(destination)?;
        stream.set_read_timeout(Some(LIMIT))?;
        // It may be cut off before it has said all.
        let _ = stream.write_all(&recorded);
        Ok(stream.read_to_end(&mut Vec::new()).is_ok())
    })?;
    replay.join().map_err(|_| anyhow::anyhow!("the replay panicked"))?.map(drop)
}

/// Calls sixty times with garbage, and with what is almost the beginning of a handshake.
pub fn garbage(netns: &Netns, destination: SocketAddr) -> anyhow::Result<()> {
    let garbage = netns.spawn("garbage", move || {
        for seed in 0..60 {
            let mut random = Rng::with_seed(seed);
            let mut stream = TcpStream::connect(destination)?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            let length = random.usize(1..70_000);
            let mut said = bytes(&mut random, length);
            if seed % 2 == 0 {
                // A handshake record, and in it a ClientHello that says that it is longer than any.
                let head = [22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff, 3, 3];
                let length = head.len().min(said.len());
                said[..length].copy_from_slice(&head[..length]);
            }
            let _ = stream.write_all(&said);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        Ok(())
    })?;
    garbage.join().map_err(|_| anyhow::anyhow!("the garbage panicked"))?
}

/// Forty handshakes at once that take for ever, for eight seconds. The thread returns how many there were.
pub fn slow_handshakes(
    netns: &Netns,
    destination: SocketAddr,
) -> anyhow::Result<JoinHandle<anyhow::Result<usize>>> {
    netns.spawn("slow handshakes", move || {
        let began = Instant::now();
        let mut streams = (0..40).map(|_| TcpStream::connect(destination)).collect::<Result<Vec<_>, _>>()?;
        let mut drops =
            [22_u8, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3].into_iter().chain(std::iter::repeat(0));
        while began.elapsed() < Duration::from_secs(8) {
            let next = drops.next().unwrap_or_default();
            for stream in &mut streams {
                let _ = stream.write_all(&[next]);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(streams.len())
    })
}

/// From and until, in hours from now.
pub fn hours(from: i32, until: i32) -> Validity {
    let moment = |hours: i32| match u32::try_from(hours) {
        Ok(later) => SystemTime::now() + HOUR * later,
        Err(_) => SystemTime::now() - HOUR * hours.unsigned_abs(),
    };
    Validity { from: moment(from), until: moment(until) }
}

/// A certificate of the fleet's authority, or of another (`other`) of the same trust domain.
pub fn certificate(
    fleet: &Fleet,
    name: &str,
    role: Role,
    valid: Validity,
    other: bool,
) -> anyhow::Result<Files> {
    let authority = match other {
        false => Authority::open(&fleet.authority())?,
        true => {
            let at = fleet.scratch().join("other");
            if !at.exists() {
                pki(&["init", &at.to_string_lossy()])?;
            }
            Authority::open(&at)?
        }
    };
    let to = fleet.scratch().join("tls").join(format!("wrong-{name}"));
    authority.issue(&name.parse()?, role, valid, &to, true)?;
    Ok(files_in(&to))
}

/// Puts a copy of `from` into the place of `to`, as a careful person does: whole, or not at all.
pub fn put(from: &Path, to: &Path) -> anyhow::Result<()> {
    let unready = to.with_extension("unready");
    fs::copy(from, &unready).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(fs::rename(unready, to)?)
}

/// Puts another certificate and its key into the place of these; what is trusted stays as it is.
pub fn show(files: &Files, at: &Files) -> anyhow::Result<()> {
    put(&files.key, &at.key)?;
    put(&files.certificate, &at.certificate)
}

/// Copies of these files, in a new directory.
pub fn kept(files: &Files, directory: &Path) -> anyhow::Result<Files> {
    fs::create_dir_all(directory)?;
    let to = files_in(directory);
    for (from, to) in [(&files.ca, &to.ca), (&files.certificate, &to.certificate), (&files.key, &to.key)] {
        put(from, to)?;
    }
    Ok(to)
}
