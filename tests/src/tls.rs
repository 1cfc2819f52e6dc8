//! TLS as a hostile peer speaks it, who has the key of a host: it shows that host's certificate, takes any, and reads and writes
//! at the same time.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use rswap_trust::Files;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, Error, ServerConfig, ServerConnection,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
};

/// How long an agent may take for its part of the handshake.
const PATIENCE: Duration = Duration::from_secs(10);

/// One end of a connection with TLS; its clones are the same end.
#[derive(Debug)]
pub struct Secured {
    shared: Arc<Shared>,
    inbox: Vec<u8>,
    unread: Range<usize>,
}

#[derive(Debug)]
struct Shared {
    tls: Mutex<Connection>,
    /// Records must leave in the order in which they were made.
    sending: Mutex<()>,
    stream: TcpStream,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn shown(files: &Files) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_file_iter(&files.certificate)?.collect::<Result<Vec<_>, _>>()?;
    Ok((chain, PrivateKeyDer::from_pem_file(&files.key)?))
}

impl Secured {
    /// Calls the agent at `address`.
    pub fn dial(address: SocketAddr, files: &Files) -> anyhow::Result<Self> {
        Self::dialled(TcpStream::connect(address).context("connecting")?, files)
    }

    /// The same, with a connection that is there.
    pub fn dialled(stream: TcpStream, files: &Files) -> anyhow::Result<Self> {
        let (chain, key) = shown(files)?;
        let provider = Arc::new(ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
            .with_client_auth_cert(chain, key)?;
        let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
        Self::shaken(ClientConnection::new(Arc::new(config), name)?.into(), stream)
    }

    /// Takes an agent's call.
    pub fn accepted(stream: TcpStream, files: &Files) -> anyhow::Result<Self> {
        let (chain, key) = shown(files)?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        Self::shaken(ServerConnection::new(Arc::new(config))?.into(), stream)
    }

    fn shaken(mut tls: Connection, stream: TcpStream) -> anyhow::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        while tls.is_handshaking() {
            tls.complete_io(&mut &stream).context("in the TLS handshake")?;
        }
        while tls.wants_write() {
            tls.write_tls(&mut &stream)?;
        }
        stream.set_read_timeout(None)?;
        let shared = Shared { tls: Mutex::new(tls), sending: Mutex::new(()), stream };
        Ok(Self { shared: Arc::new(shared), inbox: vec![0; 64 << 10], unread: 0..0 })
    }

    /// Its TCP connection.
    pub fn stream(&self) -> &TcpStream {
        &self.shared.stream
    }

    /// The other hand of this end: one reads, the other writes.
    pub fn other_hand(&self) -> Self {
        Self { shared: self.shared.clone(), inbox: self.inbox.clone(), unread: 0..0 }
    }

    /// Says that no more comes.
    pub fn end(&self) {
        let _sending = held(&self.shared.sending);
        let mut last = Vec::new();
        {
            let mut tls = held(&self.shared.tls);
            tls.send_close_notify();
            // Memory takes everything.
            let _ = tls.write_tls(&mut last);
        }
        let _ = (&self.shared.stream).write_all(&last);
        let _ = self.shared.stream.shutdown(Shutdown::Write);
    }
}

impl Read for Secured {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match held(&self.shared.tls).reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            if self.unread.is_empty() {
                // Not while the other hand would have to wait.
                self.unread = 0..(&self.shared.stream).read(&mut self.inbox)?;
            }
            let mut tls = held(&self.shared.tls);
            self.unread.start += tls.read_tls(&mut &self.inbox[self.unread.clone()])?;
            tls.process_new_packets().map_err(io::Error::other)?;
        }
    }
}

impl Write for Secured {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let _sending = held(&self.shared.sending);
        let mut records = Vec::new();
        let taken = {
            let mut tls = held(&self.shared.tls);
            let taken = tls.writer().write(data)?;
            while tls.wants_write() {
                tls.write_tls(&mut records)?;
            }
            taken
        };
        (&self.shared.stream).write_all(&records)?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A hostile peer does not care whom it deceives.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
