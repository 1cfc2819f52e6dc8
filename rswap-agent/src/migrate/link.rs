//! A connection between two agents that can't hold this one up: neither by silence nor by slowness.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use rswap_trust::Channel;

/// A peer that says nothing for so long is taken for dead.
pub const SILENCE: Duration = Duration::from_secs(10);

/// How long, and how much, a caller that was refused may still send: what is closed with bytes that nobody has read is reset,
/// and the reset would overtake the reason.
const LINGER: (Duration, u64) = (Duration::from_millis(500), 64 << 10);

/// A TCP connection on which no single wait is longer than [`SILENCE`], if nothing else is set, and none goes past a deadline.
#[derive(Debug)]
pub struct Timed {
    stream: TcpStream,
    deadline: Instant,
    /// How long a single wait may be.
    patience: Duration,
}

impl Timed {
    /// Connects to `address`.
    pub fn connect(address: SocketAddr, deadline: Instant) -> io::Result<Self> {
        let limit = left(deadline, SILENCE)?;
        Self::new(TcpStream::connect_timeout(&address, limit)?, deadline)
    }

    /// Takes over a connection.
    pub fn new(stream: TcpStream, deadline: Instant) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, deadline, patience: SILENCE })
    }

    /// Closes it so that the peer can read what was said last.
    pub(super) fn linger(&mut self) {
        let (limit, bytes) = LINGER;
        self.deadline = Instant::now() + limit;
        let _ = self.stream.shutdown(Shutdown::Write);
        let _ = io::copy(&mut self.take(bytes), &mut io::sink());
    }
}

/// A connection to another agent.
#[derive(Debug)]
pub enum Link {
    /// As it is.
    Clear(Timed),
    /// With TLS.
    Secure(Box<Channel<Timed>>),
}

impl Link {
    /// Nothing waits past this moment.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.set_limits(deadline, SILENCE);
    }

    /// Nothing waits past this moment, nor at once for longer than `patience`.
    pub fn set_limits(&mut self, deadline: Instant, patience: Duration) {
        let timed = match self {
            Self::Clear(timed) => timed,
            Self::Secure(channel) => channel.stream_mut(),
        };
        (timed.deadline, timed.patience) = (deadline, patience);
    }

    /// Its socket: to ask it something, or to shut it down from another thread.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Clear(timed) => &timed.stream,
            Self::Secure(channel) => &channel.stream().stream,
        }
    }

    /// Closes it so that the peer can read what was said last.
    pub fn linger(&mut self) {
        match self {
            Self::Clear(timed) => timed.linger(),
            Self::Secure(channel) => {
                channel.close();
                channel.stream_mut().linger();
            }
        }
    }
}

impl Read for Link {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Clear(timed) => timed.read(buf),
            Self::Secure(channel) => channel.read(buf),
        }
    }
}

impl Write for Link {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Clear(timed) => timed.write(data),
            Self::Secure(channel) => channel.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Clear(timed) => timed.flush(),
            Self::Secure(channel) => channel.flush(),
        }
    }
}

/// How long one wait may be.
pub(super) fn left(deadline: Instant, patience: Duration) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the time for this conversation is over"));
    }
    Ok(left.min(patience))
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(left(self.deadline, self.patience)?))?;
        self.stream.read(buf)
    }
}

impl Write for Timed {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(left(self.deadline, self.patience)?))?;
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
        let mut link = Timed::connect(address, began + Duration::from_millis(300)).expect("a connection");
        let error = link.read_exact(&mut [0; 4096]).expect_err("it waited for ever");
        assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
        assert!(began.elapsed() >= Duration::from_millis(300));
        drop(link);
        dripping.join().expect("the peer");
    }
}
