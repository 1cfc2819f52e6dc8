//! A host's files: whom it trusts, and what it shows.
//!
//! They are looked at for every new connection and read again when they have changed, so certificates are exchanged without a
//! new start. What can't be used (a certificate that is there before its key, say) leaves what was read before in use.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    version::TLS13,
};
use x509_parser::prelude::FromDer as _;

use crate::{
    identity::{Identity, IdentityError},
    rule::Rule,
    verify::{Found, OfClient, OfServer},
};

/// Where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Certificates of the authorities that are trusted (PEM).
    pub ca: PathBuf,
    /// The host's own certificate, with those in between up to the authority, if there are any (PEM).
    pub certificate: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
}

/// Why they can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// One could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Everybody on the host could be the agent.
    #[error("{} may be read by everybody on this host (mode {mode:04o}): chmod 600", path.display())]
    Open {
        /// The key.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// One holds something else.
    #[error("{}: {reason}", path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The certificate does not say who the host is.
    #[error("{}", path.display())]
    Identity {
        /// The certificate.
        path: PathBuf,
        /// Why.
        #[source]
        source: IdentityError,
    },
}

/// What a change of a file changes: of its content, and (mode and ctime) of who may read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    device: u64,
    inode: u64,
    bytes: u64,
    mode: u32,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Of each file; `None` if it is not there.
type Stamp = [Option<Seen>; 3];

/// What was read.
#[derive(Debug)]
pub struct Loaded {
    /// Who the certificate says that this host is.
    pub identity: Identity,
    /// From when the certificate is valid.
    pub valid_from: SystemTime,
    /// Until when.
    pub valid_until: SystemTime,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

/// A host's files, as they are now.
#[derive(Debug)]
pub struct Credentials {
    files: Files,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Of the files as `loaded` has them.
    stamp: Stamp,
    loaded: Arc<Loaded>,
    problem: Option<String>,
}

impl Credentials {
    /// Reads `files`.
    ///
    /// # Errors
    /// They can't be used.
    pub fn open(files: Files) -> Result<Self, CredentialsError> {
        // Before they are read: a change in between is found by the next look.
        let stamp = stamp(&files);
        let loaded = Arc::new(Loaded::read(&files)?);
        Ok(Self { files, state: Mutex::new(State { stamp, loaded, problem: None }) })
    }

    /// What the files say now; of files that can't be used, what they said before, and what is wrong with them.
    pub fn current(&self) -> (Arc<Loaded>, Option<String>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = stamp(&self.files);
        // What could not be used is tried again each time: it need not be these files that change for the better.
        if stamp != state.stamp || state.problem.is_some() {
            match Loaded::read(&self.files) {
                Ok(loaded) => *state = State { stamp, loaded: Arc::new(loaded), problem: None },
                Err(error) => state.problem = Some(said(&error)),
            }
        }
        (state.loaded.clone(), state.problem.clone())
    }
}

/// An error with its causes.
fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn stamp(files: &Files) -> Stamp {
    [&files.ca, &files.certificate, &files.key].map(|path| {
        let found = fs::metadata(path).ok()?;
        Some(Seen {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            mode: found.mode(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    })
}

fn read(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    fs::read(path).map_err(|source| CredentialsError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let wrong = |reason: String| CredentialsError::Content { path: path.to_owned(), reason };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let found = found.map_err(|error| wrong(format!("it is no PEM: {error}")))?;
    match found.is_empty() {
        true => Err(wrong("there is no certificate in it".to_owned())),
        false => Ok(found),
    }
}

impl Loaded {
    fn read(files: &Files) -> Result<Self, CredentialsError> {
        let wrong = |path: &Path| {
            let path = path.to_owned();
            move |error: &dyn std::fmt::Display| CredentialsError::Content { path, reason: error.to_string() }
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            roots.add(certificate).map_err(|error| wrong(&files.ca)(&error))?;
        }
        let chain = certificates(&files.certificate)?;
        let identity = Identity::of_certificate(&chain[0])
            .map_err(|source| CredentialsError::Identity { path: files.certificate.clone(), source })?;
        let (valid_from, valid_until) =
            validity(&chain[0]).map_err(|error| wrong(&files.certificate)(&error))?;
        let mode = fs::metadata(&files.key).map(|found| found.mode() & 0o7777);
        let mode = mode.map_err(|source| CredentialsError::Read { path: files.key.clone(), source })?;
        if mode & 0o007 != 0 {
            return Err(CredentialsError::Open { path: files.key.clone(), mode });
        }
        let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
            .map_err(|error| wrong(&files.key)(&format!("it holds no private key in PEM: {error}")))?;
        let loaded = Self {
            identity,
            valid_from,
            valid_until,
            roots: Arc::new(roots),
            chain,
            key,
            provider: Arc::new(provider()),
        };
        // Whether certificate and key belong together.
        let any = Rule::of(&loaded.identity.domain, loaded.identity.role, Some(Default::default()));
        loaded.server(any).map_err(|error| wrong(&files.key)(&error))?;
        Ok(loaded)
    }

    /// To dial whoever `rule` admits.
    pub(crate) fn client(&self, rule: Rule) -> Result<(Arc<ClientConfig>, Found), rustls::Error> {
        let found = Found::default();
        let verifier = OfServer {
            roots: self.roots.clone(),
            provider: self.provider.clone(),
            rule,
            found: found.clone(),
        };
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        // Every connection shows its certificate.
        config.resumption = Resumption::disabled();
        Ok((Arc::new(config), found))
    }

    /// To be dialled by whoever `rule` admits.
    pub(crate) fn server(&self, rule: Rule) -> Result<(Arc<ServerConfig>, Found), rustls::Error> {
        let found = Found::default();
        let verifier = OfClient::new(self.roots.clone(), self.provider.clone(), rule, found.clone())?;
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok((Arc::new(config), found))
    }
}

/// ring's, with the cipher first that processors are fastest with.
fn provider() -> CryptoProvider {
    let cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

/// From when and until when the certificate is valid.
fn validity(der: &[u8]) -> Result<(SystemTime, SystemTime), String> {
    let (_, certificate) =
        x509_parser::certificate::X509Certificate::from_der(der).map_err(|error| error.to_string())?;
    let moment = |time: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(time.timestamp()).unwrap_or_default();
        UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))
            .ok_or("a moment that no clock can show".to_owned())
    };
    Ok((moment(certificate.validity().not_before)?, moment(certificate.validity().not_after)?))
}
