//! Who is at the other end of a connection.

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use rswap_fleet::HostName;

/// The other end, as far as the transport vouches for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// For people.
    pub from: String,
    /// The host whose agent it is; `None` where the transport can't say: then it is whichever it claims to be.
    pub host: Option<HostName>,
    /// Whether it may say what is wanted of the fleet.
    pub operator: bool,
}

impl Peer {
    /// Another process of this host, whom nothing vouches for but that it is here.
    pub fn local(from: String) -> Self {
        Self { from, host: None, operator: true }
    }
}

/// A connection over the unix socket.
#[derive(Clone, Debug)]
pub(crate) struct OverSocket;

impl From<OverSocket> for Peer {
    /// It is root, or this process's own user.
    fn from(_: OverSocket) -> Self {
        Self::local("the unix socket".to_owned())
    }
}

/// A listener whose peers are known as such.
pub(crate) struct Known<L>(pub(crate) L);

impl<L> Listener for Known<L>
where
    L: Listener,
    L::Addr: Into<Peer>,
{
    type Io = L::Io;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (stream, address) = self.0.accept().await;
        (stream, address.into())
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        Ok(self.0.local_addr()?.into())
    }
}

impl<L> Connected<IncomingStream<'_, Known<L>>> for Peer
where
    L: Listener,
    L::Addr: Into<Peer>,
{
    fn connect_info(stream: IncomingStream<'_, Known<L>>) -> Self {
        stream.remote_addr().clone()
    }
}
