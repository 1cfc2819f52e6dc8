//! TLS over a stream that is waited for, with tokio-rustls. No wait is its own: whoever calls sets the time limits.

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::{
    channel::Side,
    credentials::Loaded,
    identity::Identity,
    rule::Rule,
    said::{self, is_cut, unusable},
    verify::Found,
};

/// How long, and how many bytes, a caller that was refused may still send: what is closed with bytes that nobody has read is reset,
/// and the reset would overtake the reason.
const LINGER: (Duration, u64) = (Duration::from_millis(500), 8 << 20);

/// A stream on which both ends have shown who they are.
#[derive(Debug)]
pub struct Stream<S> {
    tls: TlsStream<S>,
    side: Side,
    found: Found,
}

/// For a stream to `address`, which this end has dialled: both show who they are. This end is done before the other has judged it: a
/// refusal comes with the first read.
///
/// # Errors
/// The credentials can't be used, the stream failed, or the other is not taken; the text says why.
pub async fn dial<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    address: IpAddr,
    own: &Loaded,
    rule: Rule,
) -> io::Result<(Stream<S>, Identity)> {
    let (config, found) = own.client(rule).map_err(unusable)?;
    // An address, so that no name is sent in the clear.
    let tls = TlsConnector::from(config).connect(ServerName::IpAddress(address.into()), stream).await;
    shaken(tls.map(TlsStream::from), Side::Dialled, found)
}

/// For a stream that was accepted: both show who they are. Who is refused is told why, for half a second.
///
/// # Errors
/// As [`dial`].
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    own: &Loaded,
    rule: Rule,
) -> io::Result<(Stream<S>, Identity)> {
    let (config, found) = own.server(rule).map_err(unusable)?;
    match TlsAcceptor::from(config).accept(stream).into_fallible().await {
        Ok(tls) => shaken(Ok(tls.into()), Side::Accepted, found),
        Err((error, stream)) => {
            linger(stream).await;
            shaken(Err(error), Side::Accepted, found)
        }
    }
}

async fn linger<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let (limit, bytes) = LINGER;
    let last = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(bytes), &mut tokio::io::sink()).await
    };
    // Who is gone need not know.
    drop(timeout(limit, last).await);
}

fn shaken<S>(tls: io::Result<TlsStream<S>>, side: Side, found: Found) -> io::Result<(Stream<S>, Identity)> {
    let tls = tls.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => said::broken_off(side, &error),
        _ if is_cut(&error) => said::broken_off(side, &error),
        _ => in_words(error, side, &found),
    })?;
    match found.get() {
        Some(Ok(identity)) => Ok((Stream { tls, side, found }, identity)),
        _ => Err(io::Error::other("the other has not shown who it is")),
    }
}

/// What tokio-rustls passes on of rustls, as a blocking channel would say it.
fn in_words(error: io::Error, side: Side, found: &Found) -> io::Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(inner) => said::of(inner, found, side),
        None => error,
    }
}

impl<S> Stream<S> {
    fn said<T>(&self, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        done.map_err(|error| in_words(error, self.side, &self.found))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.tls).poll_read(cx, to);
        self.said(read)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tls).poll_write(cx, from);
        self.said(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.tls).poll_flush(cx);
        self.said(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = Pin::new(&mut self.tls).poll_shutdown(cx);
        self.said(ended)
    }
}

#[cfg(test)]
mod tests;
