//! The agent's end of a connection: HTTP/1.1 over whatever stream a [`Connect`] gives.

use std::{fmt, future::Future, io, net::SocketAddr, pin::Pin, str::FromStr, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use rswap_http::{ApiError, serving::Stream};
use rswap_trust::{Credentials, Name, Role, Rule, asynchronous};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    net::{TcpStream, UnixStream},
    time::timeout,
};

use crate::{Address, door::require_own};

/// How long connecting may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long one address of several may take of that, so that one where nobody is leaves time for the others.
const ADDRESS_WITHIN: Duration = Duration::from_millis(1_500);
/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// An answer that is longer is none of a controller.
const LONGEST_ANSWER_BYTES: usize = 64 << 20;

/// A stream that is being made.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send + 'a>>;

/// Makes streams to the controller: plain ones on this host, or those of a transport that knows both ends.
pub trait Connect: Send + Sync + 'static {
    /// A new stream.
    fn connect(&self) -> Connecting<'_>;

    /// Where it goes, for people.
    fn to(&self) -> String;
}

impl Connect for Address {
    fn connect(&self) -> Connecting<'_> {
        Box::pin(async move {
            let stream = UnixStream::connect(&self.0).await?;
            require_own(&stream)?;
            let stream: Box<dyn Stream> = Box::new(stream);
            Ok(stream)
        })
    }

    fn to(&self) -> String {
        self.to_string()
    }
}

/// Where a controller is: `unix:/PATH` on this host, or `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Whereabouts {
    /// A socket of this host.
    Socket(Address),
    /// On the network.
    Network {
        /// Its name or its address.
        host: String,
        /// The port.
        port: u16,
    },
}

/// The text says nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address of a controller: use HOST:PORT, or unix:/PATH on its own host")]
pub struct WhereaboutsError(pub String);

impl FromStr for Whereabouts {
    type Err = WhereaboutsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || WhereaboutsError(text.to_owned());
        if text.starts_with("unix:") {
            return text.parse().map(Self::Socket).map_err(|_| wrong());
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let fits = match bare {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => host.parse::<Name>().is_ok(),
        };
        let host = bare.unwrap_or(host).to_owned();
        fits.then_some(Self::Network { host, port }).ok_or_else(wrong)
    }
}

impl TryFrom<String> for Whereabouts {
    type Error = WhereaboutsError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Whereabouts> for String {
    fn from(at: Whereabouts) -> Self {
        at.to_string()
    }
}

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Network { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Network { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// A controller on the network, which has to show the certificate of a controller of one's own fleet with this name.
#[derive(Clone, Debug)]
pub struct Secure {
    /// Its name or its address.
    pub host: String,
    /// The port.
    pub port: u16,
    /// What its certificate names.
    pub name: Name,
    /// What this end shows; looked at again with each connection.
    pub own: Arc<Credentials>,
}

impl Secure {
    async fn dial(&self) -> io::Result<Box<dyn Stream>> {
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host((&*self.host, self.port)).await?.collect();
        first_of(&addresses, ADDRESS_WITHIN, |address| self.dial_address(address)).await
    }

    async fn dial_address(&self, address: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let own = self.own.current().0;
        let rule = Rule::of(&own.identity.domain, Role::Controller, Some([self.name.clone()].into()));
        let (stream, _) = asynchronous::dial(stream, address.ip(), &own, rule).await?;
        let stream: Box<dyn Stream> = Box::new(stream);
        Ok(stream)
    }
}

/// What the first of these addresses gives that gives anything, in their order. Each but the last may take `within`, or less where there are
/// so many that all together would have no time; the last has what the caller gives.
async fn first_of<T, F>(
    addresses: &[SocketAddr],
    within: Duration,
    dial: impl Fn(SocketAddr) -> F,
) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let within = within.min(CONNECT_WITHIN / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX));
    let Some((last, before)) = addresses.split_last() else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    };
    let mut failed = String::new();
    for address in before {
        let late = || {
            let text = format!("nothing within {} ms", within.as_millis());
            io::Error::new(io::ErrorKind::TimedOut, text)
        };
        match timeout(within, dial(*address)).await.unwrap_or_else(|_| Err(late())) {
            Ok(found) => return Ok(found),
            Err(error) => failed += &format!("{address}: {error}; "),
        }
    }
    dial(*last).await.map_err(|error| match failed.is_empty() {
        true => error,
        false => io::Error::new(error.kind(), format!("{failed}{last}: {error}")),
    })
}

impl Connect for Secure {
    fn connect(&self) -> Connecting<'_> {
        Box::pin(self.dial())
    }

    fn to(&self) -> String {
        Whereabouts::Network { host: self.host.clone(), port: self.port }.to_string()
    }
}

/// Why a call had no result.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody is there.
    #[error(
        "cannot reach the controller at {to}: start it with `rswap controller`, or correct controller.address"
    )]
    Connect {
        /// Where it was looked for.
        to: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or what came was no HTTP.
    #[error("the call {path} to the controller broke off")]
    Http {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// No answer came in time.
    #[error("the controller did not answer {0} in time")]
    Late(String),
    /// The controller refused.
    #[error("the controller refused {path} ({status}): {error}")]
    Refused {
        /// Which.
        path: String,
        /// The HTTP status.
        status: u16,
        /// What it said.
        error: String,
        /// When it can be tried again, in seconds, if it said so.
        retry_after_s: Option<u64>,
    },
    /// What it answered can't be read.
    #[error(
        "cannot read the controller's answer to {path}: use an agent and a controller of the same version ({problem})"
    )]
    Answer {
        /// Which.
        path: String,
        /// Why.
        problem: String,
    },
}

/// GET, or POST where there is a `body`; JSON both ways.
///
/// # Errors
///
/// If nobody answers, or what is answered is no success.
pub async fn call<T: DeserializeOwned>(
    connect: &dyn Connect,
    path: &str,
    body: Option<Vec<u8>>,
) -> Result<T, LinkError> {
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let stream = timeout(CONNECT_WITHIN, connect.connect()).await.unwrap_or_else(|_| Err(late()));
    let stream = stream.map_err(|source| LinkError::Connect { to: connect.to(), source })?;
    let exchange = async {
        let http = |source| LinkError::Http { path: path.to_owned(), source };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        // Its error is the request's error too.
        let connection = tokio::spawn(async move { drop(connection.await) });
        let request = Request::builder()
            .method(if body.is_some() { "POST" } else { "GET" })
            .uri(path)
            .header(header::HOST, "rswap")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())));
        let answer = |problem: String| LinkError::Answer { path: path.to_owned(), problem };
        let request = request.map_err(|error| answer(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(http)?;
        let status = response.status();
        let retry_after = response.headers().get(header::RETRY_AFTER);
        let retry_after_s = retry_after.and_then(|seconds| seconds.to_str().ok()?.parse().ok());
        let bytes = Limited::new(response.into_body(), LONGEST_ANSWER_BYTES).collect().await;
        let bytes = bytes.map_err(|error| answer(error.to_string()))?.to_bytes();
        connection.abort();
        if !status.is_success() {
            let error = match serde_json::from_slice::<ApiError>(&bytes) {
                Ok(error) if !error.detail.is_empty() => error.to_string(),
                _ => String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned(),
            };
            let (path, status) = (path.to_owned(), status.as_u16());
            return Err(LinkError::Refused { path, status, error, retry_after_s });
        }
        serde_json::from_slice(&bytes).map_err(|error| answer(error.to_string()))
    };
    timeout(ANSWER_WITHIN, exchange).await.unwrap_or_else(|_| Err(LinkError::Late(path.to_owned())))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn addresses(count: u16) -> Vec<SocketAddr> {
        (1..=count).map(|port| ([10, 0, 0, 1], port).into()).collect()
    }

    #[tokio::test]
    async fn an_address_where_nobody_answers_leaves_time_for_the_others() {
        let within = Duration::from_millis(100);
        let only = |alive: Option<u16>| {
            move |address: SocketAddr| async move {
                match address.port() {
                    port if Some(port) == alive => Ok(port),
                    1 => Err(io::Error::other("it is somebody else")),
                    _ => std::future::pending().await,
                }
            }
        };
        let since = Instant::now();
        assert_eq!(first_of(&addresses(3), within, only(Some(3))).await.expect("the third"), 3);
        let took = since.elapsed();
        assert!(took >= within && took < CONNECT_WITHIN, "{took:?}");
        // However many there are, the last is reached within the time that all have.
        let since = Instant::now();
        assert_eq!(
            first_of(&addresses(10), Duration::from_secs(5), only(Some(10))).await.expect("the last"),
            10
        );
        assert!(since.elapsed() < CONNECT_WITHIN, "{:?}", since.elapsed());
        // What each said is told.
        let nobody = |address: SocketAddr| async move {
            Err::<(), _>(io::Error::other(format!("no {}", address.port())))
        };
        let said = first_of(&addresses(2), within, nobody).await.expect_err("nobody is there").to_string();
        assert_eq!(said, "10.0.0.1:1: no 1; 10.0.0.1:2: no 2");
        let said = first_of(&addresses(1), within, nobody).await.expect_err("nobody is there").to_string();
        assert_eq!(said, "no 1");
        assert!(first_of(&[], within, nobody).await.is_err());
    }

    #[test]
    fn a_controller_is_on_the_network_or_behind_a_socket() {
        for text in
            ["unix:/run/rswap/controller.sock", "10.0.0.1:7792", "rack-1.example.org:7792", "[fd00::1]:7792"]
        {
            assert_eq!(text.parse::<Whereabouts>().expect(text).to_string(), text);
        }
        for text in [
            "",
            "unix:relative",
            "rack-1",
            "rack-1:",
            "rack-1:0",
            "rack-1:70000",
            ":7792",
            "fd00::1:7792",
            "[x]:1",
            "a/b:1",
        ] {
            assert_eq!(text.parse::<Whereabouts>(), Err(WhereaboutsError(text.to_owned())), "{text}");
        }
    }
}
