//! How this host's agent speaks to those of other hosts: with TLS, each showing the other who it is, or, where it
//! is set for development, in the clear.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant, UNIX_EPOCH},
};

use rswap_trust::{Channel, Credentials, CredentialsError, Files, Identity, Name, Role, Rule};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::link::{Link, Timed};
use crate::{
    config::{Config, PoolKindConfig, TlsConfig},
    units::UnixMillis,
};

/// How long two agents may take to show each other who they are.
pub const HANDSHAKE: Duration = Duration::from_secs(5);

/// A certificate that is valid for less than this is called attention to.
const SOON_MS: u64 = 30 * 24 * 3600 * 1000;

/// Why there can be no links.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// The files of `[tls]`.
    #[error("cannot use the certificate of this host (tls.ca, tls.certificate, tls.key)")]
    Credentials(#[from] CredentialsError),
    /// The certificate is somebody else's.
    #[error("tls.certificate is {found}: it is not for an agent (`rswap pki issue --role agent`)")]
    NoAgent {
        /// Whose.
        found: Identity,
    },
    /// A host pool's name is in no certificate.
    #[error("the host pool {pool:?} has a name that no certificate can have: set its certificate_name")]
    PoolName {
        /// Which.
        pool: String,
    },
    /// Everybody on the way could read and write.
    #[error("cannot listen on migrate.listen = {0}: {IN_THE_CLEAR}")]
    Listen(SocketAddr),
}

const IN_THE_CLEAR: &str = "everybody on the way could read it and start programs. Set tls.ca, tls.certificate and tls.key \
                            (`rswap pki` makes them); only on a network for development, set tls.insecure_clear_text = true";

/// How this host speaks to others.
#[derive(Clone, Debug)]
pub struct Links(Arc<Kind>);

#[derive(Debug)]
enum Kind {
    Secure {
        credentials: Box<Credentials>,
        /// Who may call, and be called.
        allow: Option<BTreeSet<Name>>,
        /// Who has to be at which address.
        known: Vec<(SocketAddr, Name)>,
    },
    /// As `tls.insecure_clear_text` asks for.
    Clear,
    /// Nobody is spoken to.
    Closed,
}

/// How links are secured, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "security")]
pub enum LinksView {
    /// Both ends show certificates.
    Tls {
        /// Who this host is to others.
        identity: String,
        /// Until when its certificate is valid.
        valid_until: UnixMillis,
        /// What a person should see to.
        problem: Option<String>,
    },
    /// Everybody on the way can read and write (`tls.insecure_clear_text`).
    ClearText,
    /// There is no certificate, and no other agent is spoken to.
    Closed,
}

impl LinksView {
    /// What a person should see to.
    pub fn problem(&self) -> Option<&str> {
        match self {
            Self::Tls { problem, .. } => problem.as_deref(),
            Self::ClearText => Some(
                "links to other hosts are neither encrypted nor authenticated (tls.insecure_clear_text): whoever is on the \
                 network can read instances and start programs here as root",
            ),
            Self::Closed => None,
        }
    }
}

/// Whoever may be dialled at `address`: who was there before, who is configured, or any that is allowed.
fn expected(
    address: SocketAddr,
    was: Option<&Name>,
    known: &[(SocketAddr, Name)],
    allow: Option<&BTreeSet<Name>>,
) -> Option<BTreeSet<Name>> {
    if let Some(was) = was {
        return Some(BTreeSet::from([was.clone()]));
    }
    let named: BTreeSet<Name> =
        known.iter().filter(|(at, _)| *at == address).map(|(_, name)| name.clone()).collect();
    if named.is_empty() { allow.cloned() } else { Some(named) }
}

/// What a person should see to about a certificate.
fn problem(now: UnixMillis, from: UnixMillis, until: UnixMillis, files: Option<String>) -> Option<String> {
    let certificate = if now < from {
        Some("the certificate of this host is not valid yet: compare the clock".to_owned())
    } else if now > until {
        Some("the certificate of this host has expired: issue it anew".to_owned())
    } else if until.0 - now.0 < SOON_MS {
        let days = (until.0 - now.0) / (24 * 3600 * 1000);
        Some(format!("the certificate of this host expires in {days} days: issue it anew"))
    } else {
        None
    };
    let files = files.map(|error| format!("changed files can't be used, those read before are: {error}"));
    match (files, certificate) {
        (Some(files), Some(certificate)) => Some(format!("{files}; {certificate}")),
        (files, certificate) => files.or(certificate),
    }
}

impl Links {
    /// As `config` has it. The files of certificates are looked at again with each connection.
    ///
    /// # Errors
    /// The certificate of this host can't be used, or is no agent's.
    pub fn open(config: &Config) -> Result<Self, LinksError> {
        let (files, allow) = match &config.tls {
            TlsConfig::Files { ca, certificate, key, allow } => {
                (Files { ca: ca.clone(), certificate: certificate.clone(), key: key.clone() }, allow.clone())
            }
            TlsConfig::ClearText => return Ok(Self(Arc::new(Kind::Clear))),
            TlsConfig::None => return Ok(Self(Arc::new(Kind::Closed))),
        };
        let mut known = Vec::new();
        for pool in &config.pools {
            let PoolKindConfig::Host { host, certificate_name, .. } = &pool.kind else { continue };
            let name = match certificate_name {
                Some(name) => name.clone(),
                None => pool.name.parse().map_err(|_| LinksError::PoolName { pool: pool.name.clone() })?,
            };
            known.push((*host, name));
        }
        let credentials = Box::new(Credentials::open(files)?);
        let found = credentials.current().0.identity.clone();
        if found.role != Role::Agent {
            return Err(LinksError::NoAgent { found });
        }
        Ok(Self(Arc::new(Kind::Secure { credentials, allow, known })))
    }

    /// Whether migrations may be taken at `address`.
    ///
    /// # Errors
    /// They may not: nobody would have to show who it is. Also on loopback, where any user of this host can call.
    pub fn may_listen(&self, address: SocketAddr) -> Result<(), LinksError> {
        match &*self.0 {
            Kind::Closed => Err(LinksError::Listen(address)),
            Kind::Clear | Kind::Secure { .. } => Ok(()),
        }
    }

    /// Calls the agent at `address`, which has to be `was` if it is known who it was before. Returns who it is.
    ///
    /// # Errors
    /// It could not be reached, is somebody else, or would have to be spoken to in the clear.
    pub fn dial(
        &self,
        address: SocketAddr,
        was: Option<&Name>,
        deadline: Instant,
    ) -> io::Result<(Link, Option<Name>)> {
        let (credentials, allow, known) = match &*self.0 {
            Kind::Secure { credentials, allow, known } => (credentials, allow, known),
            Kind::Clear => match was {
                None => return Ok((Link::Clear(Timed::connect(address, deadline)?), None)),
                Some(was) => {
                    let text = format!(
                        "{address} is not asked in the clear: it had the certificate of {was} before"
                    );
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
                }
            },
            Kind::Closed => {
                let text = format!("{address} is not called: {IN_THE_CLEAR}");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
            }
        };
        let own = credentials.current().0;
        let names = expected(address, was, known, allow.as_ref());
        let rule = Rule::of(&own.identity.domain, Role::Agent, names);
        let shaken = deadline.min(Instant::now() + HANDSHAKE);
        let mut channel = Channel::dialled(Timed::connect(address, shaken)?, address.ip(), &own, rule)?;
        let peer = channel.shake_hands().map_err(in_time)?;
        let mut link = Link::Secure(Box::new(channel));
        link.set_deadline(deadline);
        Ok((link, Some(peer.name)))
    }

    /// Whether a host pool of the configuration is at this address.
    pub fn knows(&self, address: IpAddr) -> bool {
        match &*self.0 {
            Kind::Secure { known, .. } => {
                known.iter().any(|(at, _)| at.ip().to_canonical() == address.to_canonical())
            }
            Kind::Clear | Kind::Closed => false,
        }
    }

    /// Whether callers have to show who they are.
    pub fn are_secure(&self) -> bool {
        matches!(&*self.0, Kind::Secure { .. })
    }

    /// Takes a caller's connection, within [`HANDSHAKE`], and returns who it is.
    ///
    /// # Errors
    /// It does not show who it is in time, or may not call; it has been told so.
    pub fn take(&self, stream: TcpStream) -> io::Result<(Link, Option<Name>)> {
        let stream = Timed::new(stream, Instant::now() + HANDSHAKE)?;
        let Kind::Secure { credentials, allow, .. } = &*self.0 else {
            return Ok((Link::Clear(stream), None));
        };
        let own = credentials.current().0;
        let rule = Rule::of(&own.identity.domain, Role::Agent, allow.clone());
        let mut channel = Channel::accepted(stream, &own, rule)?;
        match channel.shake_hands() {
            Ok(peer) => Ok((Link::Secure(Box::new(channel)), Some(peer.name))),
            Err(error) => {
                channel.stream_mut().linger();
                Err(in_time(error))
            }
        }
    }

    /// How links are secured, as it is shown.
    pub fn view(&self, now: UnixMillis) -> LinksView {
        match &*self.0 {
            Kind::Clear => LinksView::ClearText,
            Kind::Closed => LinksView::Closed,
            Kind::Secure { credentials, .. } => {
                let (own, files) = credentials.current();
                let moment = |time: std::time::SystemTime| {
                    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
                    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
                };
                let (from, until) = (moment(own.valid_from), moment(own.valid_until));
                let problem = problem(now, from, until, files);
                LinksView::Tls { identity: own.identity.to_string(), valid_until: until, problem }
            }
        }
    }
}

/// What a time limit says of itself is not what it means.
fn in_time(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            let text = format!("the TLS handshake was not done within {} s", HANDSHAKE.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, text)
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<Name> {
        names.iter().map(|name| name.parse().expect("a name")).collect()
    }

    #[test]
    fn who_was_there_comes_before_who_is_configured_before_who_is_allowed() {
        let at = |last| SocketAddr::from(([10, 0, 0, last], 7791));
        let name = |name: &str| name.parse::<Name>().expect("a name");
        let known = [(at(1), name("a")), (at(1), name("also-a")), (at(2), name("b"))];
        let allow = names(&["a", "b", "c"]);
        let expected = |address, was: Option<&str>, allow: Option<&BTreeSet<Name>>| {
            expected(address, was.map(name).as_ref(), &known, allow)
        };
        assert_eq!(expected(at(1), Some("c"), Some(&allow)), Some(names(&["c"])));
        assert_eq!(expected(at(1), None, Some(&allow)), Some(names(&["a", "also-a"])));
        assert_eq!(expected(at(2), None, None), Some(names(&["b"])));
        assert_eq!(expected(at(3), None, Some(&allow)), Some(allow.clone()));
        assert_eq!(expected(at(3), None, None), None);
        // Another port is another agent.
        assert_eq!(expected(SocketAddr::from(([10, 0, 0, 1], 1)), None, None), None);
    }

    #[test]
    fn in_the_clear_nobody_is_spoken_to_unless_it_is_set() {
        let links = |tls| Links::open(&Config { tls, ..Config::default() }).expect("links");
        let at = |address: &str| address.parse::<SocketAddr>().expect("an address");
        let closed = links(TlsConfig::None);
        for address in ["127.0.0.1:9", "[::ffff:127.0.0.1]:9", "192.0.2.1:9", "0.0.0.0:9"].map(at) {
            let error = closed.may_listen(address).expect_err("it would listen").to_string();
            assert!(
                error.contains("tls.certificate") && error.contains("tls.insecure_clear_text"),
                "{error}"
            );
            let error = closed.dial(address, None, Instant::now() + HANDSHAKE).expect_err("it would call");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            assert!(error.to_string().contains("tls.insecure_clear_text"), "{error}");
        }
        assert_eq!(closed.view(UnixMillis(0)), LinksView::Closed);
        let open = links(TlsConfig::ClearText);
        assert!(open.may_listen(at("0.0.0.0:9")).is_ok());
        assert!(open.view(UnixMillis(0)).problem().is_some());
        // Who showed a certificate before is not believed without.
        let was = "b".parse().expect("a name");
        let error =
            open.dial(at("127.0.0.1:9"), Some(&was), Instant::now() + HANDSHAKE).expect_err("it would ask");
        assert!(error.to_string().contains("had the certificate of b"), "{error}");
    }

    #[test]
    fn a_person_hears_of_a_certificate_in_time() {
        let (from, until) = (UnixMillis(10 * SOON_MS), UnixMillis(20 * SOON_MS));
        let said = |now, files: Option<&str>| problem(UnixMillis(now), from, until, files.map(str::to_owned));
        assert_eq!(said(from.0, None), None);
        assert_eq!(said(until.0 - SOON_MS, None), None);
        assert!(said(until.0 - SOON_MS + 1, None).is_some_and(|text| text.contains("expires in 29 days")));
        assert!(said(until.0 + 1, None).is_some_and(|text| text.contains("has expired")));
        assert!(said(from.0 - 1, None).is_some_and(|text| text.contains("not valid yet")));
        let both = said(until.0 + 1, Some("no PEM")).expect("a problem");
        assert!(both.contains("no PEM") && both.contains("has expired"), "{both}");
    }
}
