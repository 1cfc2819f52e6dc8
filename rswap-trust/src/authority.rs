//! A small authority: a directory with a key that signs, and what it has signed.
//!
//! ```text
//! DIR/               0700
//!   authority.pem    0600  the certificate that signs, and its key
//!   ca.pem           0644  whom hosts trust: that certificate; during a rotation, the one before it too
//! ```
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

    /// Begins a rotation of the one in `directory`: a new key signs, and both are trusted.
    ///
    /// # Errors
    /// A rotation is under way.
    pub fn rotate(directory: &Path, valid: Validity) -> Result<Self, AuthorityError> {
        let now = Self::open(directory)?;
        let bundle = directory.join(BUNDLE);
        let trusted = fs::read(&bundle).map_err(file("read", &bundle))?;
        if trusted_in(&trusted) > 1 {
            return Err(AuthorityError::Rotation(
                "a rotation is under way: finish it first (`rswap pki rotate --finish`)",
            ));
        }
        let (pem, certificate) = signer(&now.domain, valid)?;
        // The bundle first: the new key signs nothing that it does not vouch for.
        replace(&bundle, 0o644, &[&trusted, certificate.as_bytes()].concat())?;
        replace(&directory.join(AUTHORITY), 0o600, pem.as_bytes())?;
        Self::open(directory)
    }

    /// Ends a rotation of the one in `directory`: only the new key is trusted.
    ///
    /// # Errors
    /// None is under way.
    pub fn finish_rotation(directory: &Path) -> Result<Self, AuthorityError> {
        let (path, bundle) = (directory.join(AUTHORITY), directory.join(BUNDLE));
        let trusted = fs::read(&bundle).map_err(file("read", &bundle))?;
        if trusted_in(&trusted) < 2 {
            return Err(AuthorityError::Rotation("no rotation is under way (`rswap pki rotate` begins one)"));
        }
        let pem = fs::read_to_string(&path).map_err(file("read", &path))?;
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

fn trusted_in(bundle: &[u8]) -> usize {
    CertificateDer::pem_slice_iter(bundle).filter(Result::is_ok).count()
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

/// Makes `path` for its owner only, or makes sure that it is.
fn private_directory(path: &Path) -> Result<(), AuthorityError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(file("make the directory", path))?;
    let mode = fs::metadata(path).map_err(file("look at", path))?.mode() & 0o7777;
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
    fs::rename(&unready, path).map_err(file("put in place", path))?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(file("write through", directory))
}
