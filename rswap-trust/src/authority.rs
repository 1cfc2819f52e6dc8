//! A small authority: a directory with a key that signs, and what it has signed.
//!
//! ```text
//! DIR/               0700
//!   authority.pem    0600  the certificate that signs, and its key
//!   ca.pem           0644  whom hosts trust: that certificate; during a rotation, the one before it too
//! ```
//!
//! While a rotation begins there is `authority.pem.next` too: what signs once `ca.pem` names it.
//!
//! A rotation has three steps, and hosts go on talking in each: a new key signs from now on, and `ca.pem` names both (it is
//! brought to every host); every host gets a new certificate; `ca.pem` names only the new one (and is brought to every host).

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use crate::identity::{self, Identity, IdentityError, Name, Role};

const AUTHORITY: &str = "authority.pem";
/// What is to sign next.
const NEXT: &str = "authority.pem.next";
const BUNDLE: &str = "ca.pem";
const SCHEME: &str = "spiffe://";

/// Why an authority could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file or directory.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was attempted.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is there already.
    #[error("{} exists already, and is not overwritten{hint}", path.display())]
    Exists {
        /// What.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// Others may read what is in the directory.
    #[error("others may look into {} (mode {mode:04o}), where a key is to be: chmod 700", path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Somebody else could exchange what is in it.
    #[error("{} is no directory for a key: {reason}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It is no authority.
    #[error("{} is not the certificate and key of an authority: {reason}", path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No name, or no trust domain.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The steps of a rotation have an order.
    #[error("{0}")]
    Rotation(&'static str),
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From.
    pub from: SystemTime,
    /// Until.
    pub until: SystemTime,
}

/// What was issued to somebody.
#[derive(Clone, Debug)]
pub struct Issued {
    /// For whom.
    pub identity: Identity,
    /// Its certificate (PEM).
    pub certificate: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
    /// Whom it trusts (PEM).
    pub ca: PathBuf,
}

/// An authority that can sign.
#[derive(Debug)]
pub struct Authority {
    directory: PathBuf,
    domain: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes one for the trust domain `domain`, in `directory`.
    ///
    /// # Errors
    /// There is one already, or others may look into the directory.
    pub fn init(directory: &Path, domain: &str, valid: Validity) -> Result<Self, AuthorityError> {
        let domain = identity::domain(domain)?;
        private_directory(directory)?;
        let (pem, certificate) = signer(domain, valid)?;
        create(&directory.join(AUTHORITY), 0o600, pem.as_bytes(), "; `rswap pki rotate` exchanges it")?;
        replace(&directory.join(BUNDLE), 0o644, certificate.as_bytes())?;
        Self::open(directory)
    }

    /// Reads the one in `directory`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(directory: &Path) -> Result<Self, AuthorityError> {
        let path = directory.join(AUTHORITY);
        let wrong = |error: &dyn std::fmt::Display| AuthorityError::Content {
            path: path.clone(),
            reason: error.to_string(),
        };
        let pem = fs::read_to_string(&path).map_err(file("read", &path))?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| wrong(&error))?;
        let uris = identity::uris(&certificate).map_err(|error| wrong(&error))?;
        let domain = match uris.as_slice() {
            [uri] => uri.strip_prefix(SCHEME).ok_or_else(|| wrong(&"it names no trust domain"))?,
            _ => return Err(wrong(&"it names no trust domain")),
        };
        let domain = identity::domain(domain)?.to_owned();
        let key = KeyPair::from_pem(key_of(&pem).ok_or_else(|| wrong(&"there is no key in it"))?)
            .map_err(|error| wrong(&error))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|error| wrong(&error))?;
        Ok(Self { directory: directory.to_owned(), domain, issuer })
    }

    /// The trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Issues a certificate, with a new key, and puts both with `ca.pem` into the directory `to`.
    ///
    /// # Errors
    /// One of the files is there already, unless it may be exchanged (`again`), or others may look into the directory.
    pub fn issue(
        &self,
        name: &Name,
        role: Role,
        valid: Validity,
        to: &Path,
        again: bool,
    ) -> Result<Issued, AuthorityError> {
        let identity = Identity { domain: self.domain.clone(), role, name: name.clone() };
        private_directory(to)?;
        let file = |name: &str| to.join(name);
        let issued = Issued {
            identity: identity.clone(),
            certificate: file("certificate.pem"),
            key: file("key.pem"),
            ca: file(BUNDLE),
        };
        if let Some(path) =
            [&issued.certificate, &issued.key].into_iter().find(|path| !again && path.exists())
        {
            return Err(AuthorityError::Exists { path: path.clone(), hint: "; --again exchanges it" });
        }
        let mut params = params(valid, name.as_str());
        params.subject_alt_names.push(SanType::URI(identity.to_string().try_into()?));
        if let Some(dns) = dns(name.as_str()) {
            params.subject_alt_names.push(SanType::DnsName(dns.try_into()?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Agents dial and are dialled.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let bundle = self.directory.join(BUNDLE);
        let trusted = fs::read(&bundle).map_err(self::file("read", &bundle))?;
        replace(&issued.ca, 0o644, &trusted)?;
        replace(&issued.key, 0o600, key.serialize_pem().as_bytes())?;
        replace(&issued.certificate, 0o644, certificate.pem().as_bytes())?;
        Ok(issued)
    }

    /// Begins a rotation of the one in `directory`: a new key signs, and both are trusted. One that was interrupted while it
    /// began goes on.
    ///
    /// # Errors
    /// A rotation is under way.
    pub fn rotate(directory: &Path, valid: Validity) -> Result<Self, AuthorityError> {
        if resumed(directory)? {
            return Self::open(directory);
        }
        let now = Self::open(directory)?;
        let bundle = directory.join(BUNDLE);
        let trusted = fs::read(&bundle).map_err(file("read", &bundle))?;
        if certificates(&trusted).len() > 1 {
            return Err(AuthorityError::Rotation(
                "a rotation is under way: finish it first (`rswap pki rotate --finish`)",
            ));
        }
        let (pem, certificate) = signer(&now.domain, valid)?;
        // The new key before the bundle that names it: whoever is interrupted in between has lost nothing. The bundle before
        // the new key signs: it signs nothing that the bundle does not vouch for.
        let next = directory.join(NEXT);
        replace(&next, 0o600, pem.as_bytes())?;
        replace(&bundle, 0o644, &[&trusted, certificate.as_bytes()].concat())?;
        put_in_place(&next, &directory.join(AUTHORITY))?;
        Self::open(directory)
    }

    /// Ends a rotation of the one in `directory`: only the new key is trusted.
    ///
    /// # Errors
    /// None is under way, or the key that signs is not the new one.
    pub fn finish_rotation(directory: &Path) -> Result<Self, AuthorityError> {
        if resumed(directory)? {
            // It has signed nothing yet: every host would be cut off.
            return Err(AuthorityError::Rotation(
                "the rotation had been interrupted while it began, and has begun only now: bring ca.pem and a new \
                 certificate to every host before this step",
            ));
        }
        let (path, bundle) = (directory.join(AUTHORITY), directory.join(BUNDLE));
        let trusted = fs::read(&bundle).map_err(file("read", &bundle))?;
        let trusted = certificates(&trusted);
        if trusted.len() < 2 {
            return Err(AuthorityError::Rotation("no rotation is under way (`rswap pki rotate` begins one)"));
        }
        let pem = fs::read_to_string(&path).map_err(file("read", &path))?;
        let signs = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| AuthorityError::Content { path: path.clone(), reason: error.to_string() })?;
        if trusted.last() != Some(&signs) {
            return Err(AuthorityError::Rotation(
                "authority.pem is not what the last certificate in ca.pem belongs to, so the new key does not sign: take \
                 that certificate out of ca.pem, and begin the rotation anew (`rswap pki rotate`)",
            ));
        }
        let certificate = &pem[..pem.find(KEY_BEGINS).unwrap_or(pem.len())];
        replace(&bundle, 0o644, certificate.as_bytes())?;
        Self::open(directory)
    }
}

/// As rcgen writes it (PKCS #8).
const KEY_BEGINS: &str = "-----BEGIN PRIVATE KEY-----";

fn key_of(pem: &str) -> Option<&str> {
    Some(&pem[pem.find(KEY_BEGINS)?..])
}

fn certificates(bundle: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(bundle).filter_map(Result::ok).collect()
}

/// Whether a rotation that was interrupted while it began has begun now. A key that the bundle does not name yet was shown to
/// nobody, and is forgotten.
fn resumed(directory: &Path) -> Result<bool, AuthorityError> {
    let (next, bundle) = (directory.join(NEXT), directory.join(BUNDLE));
    let pem = match fs::read(&next) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        read => read.map_err(file("read", &next))?,
    };
    let trusted = certificates(&fs::read(&bundle).map_err(file("read", &bundle))?);
    let is_named = CertificateDer::from_pem_slice(&pem).is_ok_and(|signs| trusted.contains(&signs));
    match is_named {
        true => put_in_place(&next, &directory.join(AUTHORITY))?,
        false => fs::remove_file(&next).map_err(file("remove", &next))?,
    }
    Ok(is_named)
}

/// The certificate that signs for `domain`: with its key, and alone.
fn signer(domain: &str, valid: Validity) -> Result<(String, String), AuthorityError> {
    let key = KeyPair::generate()?;
    let mut params = params(valid, "");
    // No two of one name: who checks a certificate finds the key that signed it by the name.
    let id: String = params.key_identifier(&key).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name = named(&format!("authority {id} of {domain}"));
    // X509-SVID standard, section 3: a signing certificate names the trust domain and no more.
    params.subject_alt_names.push(SanType::URI(format!("{SCHEME}{domain}").try_into()?));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?.pem();
    Ok((format!("{certificate}{}", key.serialize_pem()), certificate))
}

fn params(valid: Validity, common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(common_name);
    (params.not_before, params.not_after) = (valid.from.into(), valid.until.into());
    params.use_authority_key_identifier_extension = true;
    params
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    // RFC 5280, appendix A.1: a common name has at most 64 characters. Nobody here goes by it.
    name.push(DnType::CommonName, common_name.chars().take(64).collect::<String>());
    name
}

/// `name` as a DNS name, if it can be one (RFC 1123, section 2.1).
fn dns(name: &str) -> Option<&str> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.split('.').all(label).then_some(name)
}

fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::File { doing, path, source }
}

/// Makes `path` for this process's user only, or makes sure that it is.
fn private_directory(path: &Path) -> Result<(), AuthorityError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(file("make the directory", path))?;
    // A slash at the end would have a symbolic link followed.
    let itself: PathBuf = path.components().collect();
    let found = fs::symlink_metadata(&itself).map_err(file("look at", path))?;
    let wrong = |reason: String| Err(AuthorityError::Directory { path: path.to_owned(), reason });
    if !found.is_dir() {
        return wrong("it is a symbolic link, which may lead elsewhere next time".to_owned());
    }
    let own = nix::unistd::geteuid().as_raw();
    if found.uid() != own {
        return wrong(format!("it belongs to user {}, and this is user {own}", found.uid()));
    }
    let mode = found.mode() & 0o7777;
    match mode & 0o077 {
        0 => Ok(()),
        _ => Err(AuthorityError::Open { path: path.to_owned(), mode }),
    }
}

fn write(mut to: File, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.sync_all()
}

/// Writes a new file.
fn create(path: &Path, mode: u32, bytes: &[u8], hint: &'static str) -> Result<(), AuthorityError> {
    let made = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let made = made.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => AuthorityError::Exists { path: path.to_owned(), hint },
        _ => file("make", path)(source),
    })?;
    write(made, bytes).map_err(file("write", path))
}

/// Writes a file anew: whoever reads it finds the old one or the new one.
fn replace(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), AuthorityError> {
    let mut unready = path.as_os_str().to_owned();
    unready.push(".new");
    let unready = PathBuf::from(unready);
    // Of somebody who was interrupted.
    let _ = fs::remove_file(&unready);
    create(&unready, mode, bytes, "")?;
    put_in_place(&unready, path)
}

/// Renames `ready` to `path`, whatever happens to the host next.
fn put_in_place(ready: &Path, path: &Path) -> Result<(), AuthorityError> {
    fs::rename(ready, path).map_err(file("put in place", path))?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(file("write through", directory))
}
