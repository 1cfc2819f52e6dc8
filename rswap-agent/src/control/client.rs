//! A client for the agent's routes, over its unix socket or its loopback address.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};

use crate::status::ApiError;

/// A line of a stream that is longer than this is not from an agent.
const LINE_LIMIT_BYTES: usize = 1 << 20;

/// How long the agent may take to answer. A stream's lines may take longer.
const ANSWER_WITHIN: Duration = Duration::from_secs(150);

/// How long connecting may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Where the agent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Its control socket.
    Socket(PathBuf),
    /// Its status address.
    Tcp(SocketAddr),
}

/// Why a call had no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no agent.
    #[error(
        "cannot reach the agent at {target}: start it with `rswap agent` as root, or point --socket at it"
    )]
    Connect {
        /// Where it was looked for.
        target: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke, or what came was no HTTP.
    #[error("the call {path} to the agent broke off: see the agent's log, and repeat it")]
    Http {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// No answer came.
    #[error("the agent did not answer {path} within {seconds} s: see its log")]
    Late {
        /// Which.
        path: String,
        /// The limit.
        seconds: u64,
    },
    /// The agent refused.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// The answer can't be read.
    #[error("cannot read the agent's answer to {path}: use an agent and a command line of the same version")]
    Answer {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The stream ended before its last event.
    #[error(
        "the agent's answer to {0} ended too early: see its log, and `rswap ps` for where the instance runs"
    )]
    Cut(String),
}

/// Calls the agent; a connection per call.
#[derive(Clone, Debug)]
pub struct Client {
    target: Target,
}

impl Client {
    /// A client of the agent at `target`.
    pub fn new(target: Target) -> Self {
        Self { target }
    }

    /// GET `path`, as JSON.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let bytes = self.whole(path, None).await?;
        read(path, &bytes)
    }

    /// GET `path`, as text.
    pub async fn get_text(&self, path: &str) -> Result<String, ClientError> {
        Ok(String::from_utf8_lossy(&self.whole(path, None).await?).into_owned())
    }

    /// POST `body` to `path`, both as JSON.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let bytes = self.whole(path, Some(encode(path, body)?)).await?;
        read(path, &bytes)
    }

    /// POST `body` to `path`; each line of the answer is an event.
    pub async fn post_stream(&self, path: &str, body: &impl Serialize) -> Result<Events, ClientError> {
        let response = self.send(path, Some(encode(path, body)?)).await?;
        Ok(Events { path: path.to_owned(), body: response.into_body(), waiting: Vec::new(), ended: false })
    }

    async fn whole(&self, path: &str, body: Option<Vec<u8>>) -> Result<Bytes, ClientError> {
        let response = self.send(path, body).await?;
        collect(path, response).await
    }

    async fn send(&self, path: &str, body: Option<Vec<u8>>) -> Result<Response<Incoming>, ClientError> {
        let (named, connecting) = match &self.target {
            Target::Socket(socket) => {
                let connecting = timeout(CONNECT_WITHIN, UnixStream::connect(socket)).await;
                (socket.display().to_string(), connecting.map(|done| done.map(Stream::from)))
            }
            Target::Tcp(address) => {
                let connecting = timeout(CONNECT_WITHIN, TcpStream::connect(address)).await;
                (address.to_string(), connecting.map(|done| done.map(Stream::from)))
            }
        };
        let stream = connecting
            .unwrap_or_else(|late| Err(late.into()))
            .map_err(|source| ClientError::Connect { target: named, source })?;
        let http = |source| ClientError::Http { path: path.to_owned(), source };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        // Its error is the request's error too, and is reported there.
        tokio::spawn(async move { drop(connection.await) });

        let request = Request::builder()
            .method(if body.is_some() { "POST" } else { "GET" })
            .uri(path)
            .header(header::HOST, "rswap")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .expect("paths and headers are the program's own and valid");
        let response = timeout(ANSWER_WITHIN, sender.send_request(request))
            .await
            .map_err(|_| ClientError::Late { path: path.to_owned(), seconds: ANSWER_WITHIN.as_secs() })?
            .map_err(http)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let bytes = collect(path, response).await?;
        Err(ClientError::Refused(refusal(status, &bytes)))
    }
}

/// What the two kinds of connection have in common.
type Stream = Box<dyn Connection>;
trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Box::new(stream)
    }
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Box::new(stream)
    }
}

fn refusal(status: StatusCode, bytes: &[u8]) -> ApiError {
    match serde_json::from_slice::<ApiError>(bytes) {
        Ok(error) if !error.detail.is_empty() => ApiError { status: status.as_u16(), ..error },
        _ => ApiError::new(
            status,
            format!("the agent answered {status}"),
            "use an agent and a command line of the same version",
        ),
    }
}

async fn collect(path: &str, response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let collected = response.into_body().collect().await;
    Ok(collected.map_err(|source| ClientError::Http { path: path.to_owned(), source })?.to_bytes())
}

fn encode(path: &str, body: &impl Serialize) -> Result<Vec<u8>, ClientError> {
    serde_json::to_vec(body).map_err(|source| ClientError::Answer { path: path.to_owned(), source })
}

fn read<T: DeserializeOwned>(path: &str, bytes: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(bytes).map_err(|source| ClientError::Answer { path: path.to_owned(), source })
}

/// The lines of a streamed answer.
#[derive(Debug)]
pub struct Events {
    path: String,
    body: Incoming,
    waiting: Vec<u8>,
    ended: bool,
}

impl Events {
    /// The next event; `None` at the end of the stream.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.waiting.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.waiting.drain(..=end).collect();
                return read(&self.path, &line).map(Some);
            }
            if self.ended && self.waiting.is_empty() {
                return Ok(None);
            }
            if self.ended || self.waiting.len() > LINE_LIMIT_BYTES {
                return Err(ClientError::Cut(self.path.clone()));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.waiting.extend(frame.data_ref().into_iter().flatten()),
                Some(Err(source)) => return Err(ClientError::Http { path: self.path.clone(), source }),
                None => self.ended = true,
            }
        }
    }
}
