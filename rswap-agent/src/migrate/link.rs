//! A connection between two agents that can't hold this one up: neither by silence nor by slowness.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

/// A peer that says nothing for so long is taken for dead.
pub const SILENCE: Duration = Duration::from_secs(10);

/// A TCP connection on which no single wait is longer than [`SILENCE`], and none goes past a deadline.
#[derive(Debug)]
pub struct Link {
    stream: TcpStream,
    deadline: Instant,
}

impl Link {
    /// Connects to the agent at `address`.
    pub fn connect(address: SocketAddr, deadline: Instant) -> io::Result<Self> {
        let limit = left(deadline)?;
        Self::new(TcpStream::connect_timeout(&address, limit)?, deadline)
    }

    /// Takes over a connection.
    pub fn new(stream: TcpStream, deadline: Instant) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, deadline })
    }

    /// Nothing waits past this moment.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }
}

/// How long one wait may be.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the time for this conversation is over"));
    }
    Ok(left.min(SILENCE))
}

impl Read for Link {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(left(self.deadline)?))?;
        self.stream.read(buf)
    }
}

impl Write for Link {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(left(self.deadline)?))?;
        self.stream.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::TcpListener, thread};

    #[test]
    fn a_peer_that_drips_is_cut_off_at_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("its address");
        let dripping = thread::spawn(move || {
            let (mut peer, _) = listener.accept().expect("a caller");
            while peer.write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let began = Instant::now();
        let mut link = Link::connect(address, began + Duration::from_millis(300)).expect("a connection");
        let error = link.read_exact(&mut [0; 4096]).expect_err("it waited for ever");
        assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
        assert!(began.elapsed() >= Duration::from_millis(300));
        drop(link);
        dripping.join().expect("the peer");
    }
}
