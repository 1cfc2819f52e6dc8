//! One stream over several connections, where one alone would be slower than the agents are.
//!
//! What a TCP connection has under way is bounded by its sockets' buffers; on a long way its rate is that bound over the round trip,
//! however fast the link is. So a source makes further connections, the lanes. It cuts what it sends into chunks, which go over the
//! lanes in turn, and the destination takes them in turn: the stream is the same, in the same order, and the engine knows
//! nothing of it. Answers come over the first connection. Each lane has a thread at both ends, which does its TLS, too.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    journal::MigrationId,
    link::{Link, SILENCE, left},
};

/// Lanes of a migration at most.
pub const MAX_LANES: u8 = 8;
/// Bytes of a chunk at most. What all lanes hold counts as sent to whoever waits for an answer: with one that waits and one that is written at
/// eight lanes it is 2 MiB, which a slow link carries long before silence is taken for death.
pub const CHUNK_BYTES: usize = 128 << 10;
/// Chunks of a lane that wait at each end, at most.
const WAITING_CHUNKS: usize = 1;
/// Before each chunk: its length (four bytes, little-endian).
const HEADER: usize = 4;

/// What one engine sends per second at most, in bytes: above, further lanes have nothing to carry. Compressing is what bounds it.
const PACE_BYTES_PER_S: f64 = 512.0 * (1 << 20) as f64;
/// How many lanes make a migration as fast as its engine, over a way with this round trip, where a connection's buffer is
/// at most `buffer_bytes`. 1 is no lane but the connection itself.
pub fn worth_while(round_trip: Duration, buffer_bytes: u64) -> u8 {
    // In a round trip no more is sent than is kept until it is acknowledged.
    let per_lane = buffer_bytes as f64 / round_trip.as_secs_f64();
    // As a float's cast goes: no number is 0, and too large ones are the largest.
    ((PACE_BYTES_PER_S / per_lane).ceil() as u8).clamp(1, MAX_LANES)
}

/// A connection to a destination, which can become several.
pub trait Widen {
    /// Makes lanes for the migration `id`, which the destination has accepted, and returns how many. Nothing goes over them yet.
    fn make_lanes(&mut self, _id: MigrationId) -> u8 {
        0
    }

    /// What is written from here on goes over the lanes.
    ///
    /// # Errors
    /// It can't.
    fn spread(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection from a source, which can become several.
pub trait Gather {
    /// What is read from here on comes over so many lanes, which have been made.
    ///
    /// # Errors
    /// They have not.
    fn gather(&mut self, lanes: u8) -> io::Result<()> {
        let text = format!("{lanes} lanes were said to be made, and none was");
        Err(io::Error::new(io::ErrorKind::NotConnected, text))
    }
}

/// The end of the lanes that is written to.
#[derive(Debug)]
pub struct Spread {
    lanes: Vec<Sending>,
    next: usize,
    chunk: Vec<u8>,
    /// A chunk was lost: nothing may follow it.
    failed: bool,
}

/// A lane that is written to by a thread.
#[derive(Debug)]
struct Sending {
    chunks: SyncSender<Vec<u8>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Spread {
    /// Over these connections, in this order.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn over(links: Vec<Link>) -> io::Result<Self> {
        let lanes = links.into_iter().map(Sending::start).collect::<io::Result<_>>()?;
        Ok(Self { lanes, next: 0, chunk: Vec::with_capacity(CHUNK_BYTES), failed: false })
    }

    fn send_chunk(&mut self) -> io::Result<()> {
        if self.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK_BYTES));
        let turn = self.next;
        self.next = (turn + 1) % self.lanes.len();
        let lane = &mut self.lanes[turn];
        lane.chunks.send(chunk).map_err(|_| {
            self.failed = true;
            lane.failure()
        })
    }
}

impl Write for Spread {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let taken = data.len().min(CHUNK_BYTES - self.chunk.len());
        self.chunk.extend_from_slice(&data[..taken]);
        if self.chunk.len() == CHUNK_BYTES {
            self.send_chunk()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() { Ok(()) } else { self.send_chunk() }
    }
}

impl Sending {
    fn start(mut link: Link) -> io::Result<Self> {
        let (sender, chunks) = sync_channel::<Vec<u8>>(WAITING_CHUNKS);
        let send_all = move || {
            for chunk in chunks {
                link.write_all(&(chunk.len() as u32).to_le_bytes())?;
                link.write_all(&chunk)?;
                link.flush()?;
            }
            link.linger();
            Ok(())
        };
        let thread = thread::Builder::new().name("lane".into()).spawn(send_all)?;
        Ok(Self { chunks: sender, thread: Some(thread) })
    }

    /// Why its thread takes nothing more.
    fn failure(&mut self) -> io::Error {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => error,
            _ => io::Error::new(io::ErrorKind::BrokenPipe, "a lane has failed"),
        }
    }
}

/// The end of the lanes that is read from.
#[derive(Debug)]
pub struct Gathered {
    lanes: Vec<Receiving>,
    next: usize,
    chunk: Vec<u8>,
    read: usize,
    deadline: Instant,
    /// A chunk did not come: nothing is taken after it.
    failed: bool,
}

/// A lane that is read from by a thread.
#[derive(Debug)]
struct Receiving {
    chunks: Receiver<io::Result<Vec<u8>>>,
    socket: TcpStream,
}

impl Gathered {
    /// Over these connections, in this order. No read waits past `deadline`.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn over(links: Vec<Link>, deadline: Instant) -> io::Result<Self> {
        let lanes = links.into_iter().map(|link| Receiving::start(link, deadline));
        let lanes = lanes.collect::<io::Result<_>>()?;
        Ok(Self { lanes, next: 0, chunk: Vec::new(), read: 0, deadline, failed: false })
    }

    fn next_chunk(&mut self) -> io::Result<Vec<u8>> {
        if std::mem::replace(&mut self.failed, true) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let lane = &self.lanes[self.next];
        self.next = (self.next + 1) % self.lanes.len();
        let chunk = match lane.chunks.recv_timeout(left(self.deadline, SILENCE)?) {
            Ok(chunk) => chunk?,
            Err(RecvTimeoutError::Timeout) => return Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::UnexpectedEof.into()),
        };
        self.failed = false;
        Ok(chunk)
    }
}

impl Read for Gathered {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.read == self.chunk.len() {
            (self.chunk, self.read) = (self.next_chunk()?, 0);
        }
        let taken = buf.len().min(self.chunk.len() - self.read);
        buf[..taken].copy_from_slice(&self.chunk[self.read..self.read + taken]);
        self.read += taken;
        Ok(taken)
    }
}

impl Receiving {
    fn start(mut link: Link, deadline: Instant) -> io::Result<Self> {
        let socket = link.socket().try_clone()?;
        // Others may have more to carry: whether the peer is silent is seen by the one who waits for its turn.
        link.set_limits(deadline, Duration::MAX);
        let (sender, chunks) = sync_channel(WAITING_CHUNKS);
        let receive_all = move || {
            loop {
                let chunk = read_chunk(&mut link);
                let failed = chunk.is_err();
                if sender.send(chunk).is_err() || failed {
                    return;
                }
            }
        };
        thread::Builder::new().name("lane".into()).spawn(receive_all)?;
        Ok(Self { chunks, socket })
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        // Its thread may wait for more.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Reads one chunk. The lengths come from a peer: nothing is allocated for one that is too long.
fn read_chunk(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let bytes = u32::from_le_bytes(header) as usize;
    if bytes == 0 || bytes > CHUNK_BYTES {
        let text = format!("a chunk of {bytes} bytes, 1 to {CHUNK_BYTES} are allowed");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut chunk = vec![0; bytes];
    stream.read_exact(&mut chunk)?;
    Ok(chunk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::link::Timed;
    use proptest::prelude::*;
    use std::net::TcpListener;

    /// Connections whose near ends are written to, and whose far ends are read from.
    fn pairs(lanes: usize, deadline: Instant) -> (Vec<Link>, Vec<Link>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("its address");
        (0..lanes)
            .map(|_| {
                let near = Timed::connect(address, deadline).expect("a connection");
                let far = Timed::new(listener.accept().expect("a caller").0, deadline).expect("a connection");
                (Link::Clear(near), Link::Clear(far))
            })
            .unzip()
    }

    fn ends(lanes: usize) -> (Spread, Gathered) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let (near, far) = pairs(lanes, deadline);
        (Spread::over(near).expect("threads"), Gathered::over(far, deadline).expect("threads"))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_written_is_read_in_its_order(
            lanes in 1_usize..=8,
            pieces in prop::collection::vec((0_usize..3 * CHUNK_BYTES / 2, any::<bool>()), 0..20),
            seed in any::<u64>(),
        ) {
            let (mut spread, mut gathered) = ends(lanes);
            let mut random = fastrand::Rng::with_seed(seed);
            let pieces: Vec<(Vec<u8>, bool)> = pieces
                .into_iter()
                .map(|(bytes, flush)| {
                    let mut piece = vec![0; bytes];
                    random.fill(&mut piece);
                    (piece, flush)
                })
                .collect();
            let wanted: Vec<u8> = pieces.iter().flat_map(|(piece, _)| piece).copied().collect();
            let length = wanted.len();
            let reading = thread::spawn(move || {
                let mut got = vec![0; length];
                gathered.read_exact(&mut got).map(|()| got)
            });
            for (piece, flush) in &pieces {
                spread.write_all(piece).expect("a write");
                if *flush {
                    spread.flush().expect("a flush");
                }
            }
            spread.flush().expect("the last flush");
            prop_assert!(reading.join().expect("the reader").expect("all of it") == wanted);
        }

        #[test]
        fn no_chunk_is_longer_than_it_may_be(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(chunk) = read_chunk(&mut &bytes[..]) {
                prop_assert!(!chunk.is_empty() && chunk.len() + HEADER <= bytes.len());
            }
        }
    }

    #[test]
    fn a_lane_that_is_cut_ends_the_stream_at_both_ends() {
        let deadline = Instant::now() + Duration::from_secs(60);
        let (near, far) = pairs(3, deadline);
        let cut = far[1].socket().try_clone().expect("a clone");
        let mut spread = Spread::over(near).expect("threads");
        let mut gathered = Gathered::over(far, deadline).expect("threads");
        let began = Instant::now();
        let reading = thread::spawn(move || io::copy(&mut gathered, &mut io::sink()));
        spread.write_all(&vec![1; 6 * CHUNK_BYTES]).expect("nothing is cut yet");
        cut.shutdown(Shutdown::Both).expect("to cut it");
        let chunk = vec![2; CHUNK_BYTES];
        let error = (0..1000).find_map(|_| spread.write_all(&chunk).err()).expect("it writes on for ever");
        println!("{error}");
        assert!(reading.join().expect("the reader").is_err(), "the end that is read took it for whole");
        assert!(began.elapsed() < SILENCE, "it was found by silence alone");
    }

    #[test]
    fn a_chunk_that_is_too_long_is_refused() {
        let mut bytes = (CHUNK_BYTES as u32 + 1).to_le_bytes().to_vec();
        bytes.resize(CHUNK_BYTES + 100, 0);
        let error = read_chunk(&mut &bytes[..]).expect_err("it was taken");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(
            read_chunk(&mut &[0; 8][..]).expect_err("it was taken").kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn a_long_way_is_worth_lanes_and_a_short_one_is_not() {
        let lanes = |us, bytes| worth_while(Duration::from_micros(us), bytes);
        assert_eq!(lanes(100, 4 << 20), 1);
        assert_eq!(lanes(3_000, 4 << 20), 1);
        assert_eq!(lanes(10_000, 4 << 20), 2);
        assert_eq!(lanes(20_000, 4 << 20), 3);
        assert_eq!(lanes(200_000, 4 << 20), MAX_LANES);
        // What the kernel did not say is no reason for any.
        assert_eq!(lanes(0, 4 << 20), 1);
        assert_eq!(lanes(0, 0), 1);
    }
}
