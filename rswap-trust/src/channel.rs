//! TLS over a blocking stream.
//!
//! Whoever uses it reads and writes in turn, on one thread. No wait is its own: the stream's time limits hold. What it holds in
//! memory is bounded, before and after the handshake (rustls takes no handshake message above 64 KiB).

use std::{
    io::{self, Read, Write},
    net::IpAddr,
};

use rustls::{ClientConnection, Connection, ServerConnection, pki_types::ServerName};

use crate::{
    credentials::Loaded,
    identity::Identity,
    rule::Rule,
    said::{self, is_cut, unusable},
    verify::Found,
};

/// What is taken from the stream at a time: several records, each of at most 16 KiB.
const INBOX_BYTES: usize = 64 << 10;

/// Which end this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It has dialled.
    Dialled,
    /// It was dialled.
    Accepted,
}

/// A stream on which both ends have shown who they are.
#[derive(Debug)]
pub struct Channel<S> {
    tls: Connection,
    stream: S,
    side: Side,
    found: Found,
    inbox: Box<[u8]>,
    /// What of it has not been looked at.
    unread: std::ops::Range<usize>,
}

impl<S: Read + Write> Channel<S> {
    /// For a stream to `address`, which this end has dialled; nothing has been said yet.
    ///
    /// # Errors
    /// The credentials can't be used.
    pub fn dialled(stream: S, address: IpAddr, own: &Loaded, rule: Rule) -> io::Result<Self> {
        let (config, found) = own.client(rule).map_err(unusable)?;
        // An address, so that no name is sent in the clear.
        let tls = ClientConnection::new(config, ServerName::IpAddress(address.into())).map_err(unusable)?;
        Ok(Self::new(stream, tls.into(), Side::Dialled, found))
    }

    /// For a stream that was accepted; nothing has been said yet.
    ///
    /// # Errors
    /// The credentials can't be used.
    pub fn accepted(stream: S, own: &Loaded, rule: Rule) -> io::Result<Self> {
        let (config, found) = own.server(rule).map_err(unusable)?;
        let tls = ServerConnection::new(config).map_err(unusable)?;
        Ok(Self::new(stream, tls.into(), Side::Accepted, found))
    }

    fn new(stream: S, tls: Connection, side: Side, found: Found) -> Self {
        Self { tls, stream, side, found, inbox: vec![0; INBOX_BYTES].into(), unread: 0..0 }
    }

    /// Both show who they are. The end that has dialled is done before the other has judged it: a refusal comes with its
    /// first read.
    ///
    /// # Errors
    /// The stream failed, or one of both is not taken by the other; the text says by which, and why.
    pub fn shake_hands(&mut self) -> io::Result<Identity> {
        while self.tls.is_handshaking() {
            let step = self.send().and_then(|()| if self.tls.is_handshaking() { self.take() } else { Ok(1) });
            match step {
                Ok(0) => return Err(said::broken_off(self.side, &io::ErrorKind::UnexpectedEof.into())),
                Err(error) if is_cut(&error) => return Err(said::broken_off(self.side, &error)),
                step => drop(step?),
            }
        }
        self.send()?;
        match self.found.get() {
            Some(Ok(identity)) => Ok(identity),
            _ => Err(io::Error::other("the other has not shown who it is")),
        }
    }

    /// Its stream.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Its stream, for its time limits.
    pub fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Says that no more comes. Whoever reads on then, finds an end and not a cut.
    pub fn close(&mut self) {
        self.tls.send_close_notify();
        // Who is gone need not know.
        let _ = self.send();
    }

    fn send(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.stream) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes in what has come: 0 at the end of the stream.
    fn take(&mut self) -> io::Result<usize> {
        if self.unread.is_empty() {
            let length = loop {
                match self.stream.read(&mut self.inbox) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => break read?,
                }
            };
            self.unread = 0..length;
        }
        let taken = self.tls.read_tls(&mut &self.inbox[self.unread.clone()])?;
        self.unread.start += taken;
        if let Err(error) = self.tls.process_new_packets() {
            // The other is told why, if it still listens.
            let _ = self.send();
            return Err(said::of(&error, &self.found, self.side));
        }
        Ok(taken)
    }
}

impl<S: Read + Write> Read for Channel<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Frames have lengths: where the stream is cut, they are too short.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            self.take()?;
            // The answer to a change of keys.
            self.send()?;
        }
    }
}

impl<S: Read + Write> Write for Channel<S> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let taken = self.tls.writer().write(data)?;
        match self.send() {
            Ok(()) => Ok(taken),
            Err(error)
                if [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset].contains(&error.kind()) =>
            {
                // It may have said why before it went.
                match self.take() {
                    Err(reason) if reason.kind() == io::ErrorKind::PermissionDenied => Err(reason),
                    _ => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()?;
        self.stream.flush()
    }
}
