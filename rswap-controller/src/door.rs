//! The controller's two doors: a unix socket of its host, and TCP with certificates at both ends.
//!
//! ```text
//! unix socket:  connected -> root, or the own user? (the kernel says) ------------------------------> Peer
//! TCP:          connected -> a place for a stranger -> TLS 1.3 within 5 s -> role and name allowed? -> Peer
//! ```
//!
//! A handshake holds up nobody: each is on its own, and strangers have few places per network.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::serve::Listener;
use rswap_trust::{
    Credentials, CredentialsError, Files, Identity, Name, Role, Rule,
    asynchronous::{self, Stream},
    strangers::{Stranger, Strangers},
};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};

use crate::Peer;

/// How long both ends may take to show each other who they are.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(5);
/// Connections that have shown who they are and wait to be served.
const WAITING: usize = 16;
/// Addresses of those who have shown who they are that are remembered.
const KNOWN: usize = 4096;
/// After an error of accepting (no descriptor is free, say).
const PAUSE: Duration = Duration::from_millis(100);

/// Whether who is at the other end of a unix socket is root, or the user that this process runs as.
///
/// # Errors
/// It is somebody else, or the kernel doesn't say.
pub(crate) fn require_own(stream: &UnixStream) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if uid == 0 || uid == nix::unistd::geteuid().as_raw() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {uid} is at the other end")))
}

/// A socket that only its owner can open, in place of one that nobody serves any more.
pub(crate) async fn bind(path: &Path) -> io::Result<Socket> {
    if let Ok(found) = std::fs::metadata(path) {
        if !found.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something that is no socket"));
        }
        if UnixStream::connect(path).await.is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another controller serves it"));
        }
        std::fs::remove_file(path)?;
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // Nobody can open it before its mode is set.
    let mut unready = path.as_os_str().to_owned();
    unready.push(".new");
    let unready = PathBuf::from(unready);
    match std::fs::remove_file(&unready) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&unready)?;
    std::fs::set_permissions(&unready, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&unready, path)?;
    Ok(Socket(listener))
}

/// A unix socket.
pub(crate) struct Socket(UnixListener);

/// It is root, or this process's own user.
#[derive(Clone, Debug)]
pub(crate) struct OverSocket;

impl From<OverSocket> for Peer {
    fn from(_: OverSocket) -> Self {
        Self::own("the unix socket".to_owned())
    }
}

impl Listener for Socket {
    type Io = UnixStream;
    type Addr = OverSocket;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => match require_own(&stream) {
                    Ok(()) => return (stream, OverSocket),
                    Err(error) => tracing::warn!(%error, "a connection was turned away"),
                },
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(OverSocket)
    }
}

/// Why a controller can't be reached over the network.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The files of its certificate.
    #[error("cannot use the certificate of this controller (fleet.tls.ca, .certificate, .key)")]
    Credentials(#[from] CredentialsError),
    /// The certificate is somebody else's.
    #[error(
        "fleet.tls.certificate is {found}: it is not for a controller (`rswap pki issue --role controller`)"
    )]
    NoController {
        /// Whose.
        found: Identity,
    },
    /// The address.
    #[error("cannot listen on fleet.listen = {address}: choose another")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Who may come in over the network.
#[derive(Clone, Debug, Default)]
pub struct Guests {
    /// Names of agents; `None` is any of the fleet.
    pub agents: Option<BTreeSet<Name>>,
    /// Names of operators who may say what is wanted; `None` is any of the fleet that is no reader.
    pub operators: Option<BTreeSet<Name>>,
    /// Names of operators who may only look.
    pub readers: BTreeSet<Name>,
}

impl Guests {
    fn rule(&self, domain: &str) -> Rule {
        let operators = self.operators.as_ref().map(|names| names.union(&self.readers).cloned().collect());
        let takes = vec![(Role::Agent, self.agents.clone()), (Role::Operator, operators)];
        Rule { domain: domain.to_owned(), takes }
    }

    fn operates(&self, name: &Name) -> bool {
        !self.readers.contains(name) && self.operators.as_ref().is_none_or(|names| names.contains(name))
    }
}

/// A connection that has shown who it is.
pub(crate) type Shown = (Stream<TcpStream>, Peer);

/// TCP, with TLS and certificates at both ends.
#[derive(Debug)]
pub struct Door {
    shown: mpsc::Receiver<Shown>,
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

/// What each handshake needs.
struct Threshold {
    credentials: Credentials,
    guests: Guests,
    strangers: Strangers,
    /// Where somebody who may come in has come from.
    known: Mutex<BTreeSet<IpAddr>>,
    shown: mpsc::Sender<Shown>,
}

impl Door {
    /// Listens at `address`, and shows the certificate in `files`, which are looked at again with each connection.
    ///
    /// # Errors
    /// The files can't be used, or are no controller's; or the address can't be listened to.
    pub async fn open(address: SocketAddr, files: Files, guests: Guests) -> Result<Self, DoorError> {
        let credentials = Credentials::open(files)?;
        let found = credentials.current().0.identity.clone();
        if found.role != Role::Controller {
            return Err(DoorError::NoController { found });
        }
        let listen = |source| DoorError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let (sender, shown) = mpsc::channel(WAITING);
        let (strangers, known) = Default::default();
        let threshold = Arc::new(Threshold { credentials, guests, strangers, known, shown: sender });
        let accepting = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, from)) => threshold.clone().met(stream, from),
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        });
        Ok(Self { shown, address, accepting })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Threshold {
    /// Begins a handshake, if there is a place for it.
    fn met(self: Arc<Self>, stream: TcpStream, from: SocketAddr) {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).contains(&from.ip());
        let Some(stranger) = self.strangers.admit(from.ip(), known) else {
            tracing::warn!(%from, within_s = HANDSHAKE.as_secs(), "turned away: too many have not shown who they are");
            return;
        };
        tokio::spawn(async move {
            let shaken = timeout(HANDSHAKE, self.shake_hands(stream, from)).await;
            let late = || {
                let text = format!("the TLS handshake was not done within {} s", HANDSHAKE.as_secs());
                io::Error::new(io::ErrorKind::TimedOut, text)
            };
            match shaken.unwrap_or_else(|_| Err(late())) {
                Ok(shown) => self.come_in(shown, from.ip(), stranger).await,
                Err(error) => tracing::warn!(%from, %error, "a caller was turned away"),
            }
        });
    }

    async fn shake_hands(&self, stream: TcpStream, from: SocketAddr) -> io::Result<Shown> {
        stream.set_nodelay(true)?;
        let own = self.credentials.current().0;
        let rule = self.guests.rule(&own.identity.domain);
        let (stream, identity) = asynchronous::accept(stream, &own, rule).await?;
        let peer = Peer::shown(&identity, &from.to_string(), |name| self.guests.operates(name));
        let peer =
            peer.ok_or_else(|| io::Error::other(format!("{identity} can't be a host of the fleet")))?;
        Ok((stream, peer))
    }

    /// It keeps its place until it is served: who comes faster than that waits outside.
    async fn come_in(&self, shown: Shown, from: IpAddr, _stranger: Stranger) {
        {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() < KNOWN {
                known.insert(from);
            }
        }
        // The controller is ending.
        drop(self.shown.send(shown).await);
    }
}

impl Listener for Door {
    type Io = Stream<TcpStream>;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.shown.recv().await {
            Some(shown) => shown,
            // The task that accepts ends with this only.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Peer::own(self.address.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_is_let_in_and_does_not_operate() {
        let name = |name: &str| name.parse::<Name>().expect("a name");
        let who = |text: &str| text.parse::<Identity>().expect("an identity");
        let (o, r, x) = (name("o"), name("r"), name("x"));
        let any = Guests { readers: [r.clone()].into(), ..Guests::default() };
        let some = Guests { operators: Some([o.clone()].into()), ..any.clone() };
        assert!(any.operates(&o) && any.operates(&x) && !any.operates(&r));
        assert!(some.operates(&o) && !some.operates(&x) && !some.operates(&r));
        let let_in = |guests: &Guests, text: &str| guests.rule("fleet").admit(&who(text)).is_ok();
        for reader in [&any, &some] {
            assert!(
                let_in(reader, "spiffe://fleet/operator/r") && let_in(reader, "spiffe://fleet/operator/o")
            );
            assert!(let_in(reader, "spiffe://fleet/agent/x"));
            assert!(
                !let_in(reader, "spiffe://fleet/controller/x") && !let_in(reader, "spiffe://other/agent/x")
            );
        }
        assert!(let_in(&any, "spiffe://fleet/operator/x") && !let_in(&some, "spiffe://fleet/operator/x"));
        let closed = Guests { agents: Some([name("a")].into()), ..any };
        assert!(let_in(&closed, "spiffe://fleet/agent/a") && !let_in(&closed, "spiffe://fleet/agent/x"));
    }
}
